"""A table as a source of samples, a row each: which columns are inputs, which one holds the labels, and what becomes of their rows.

Images are decoded when they are needed; numbers and lists of them go in as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bnfold.errors import DataError

from ..corrupt import CorruptError
from ..images.pipeline import Pipeline, resolve, shaped
from ..source import LABELS, Chunk, Request, Source
from ..spec import Array, Batch, InputSpec
from .table import DataTable, Rows, missing, numbers, parquet, saved
from .tars import KEYS, tars

CLASSES = ("label", "labels", "cls", "target", "targets", "class", "y", "fine_label", "coarse_label", "category", *KEYS)
WHOLE = re.compile(r"u?int\d+")
NUMBERS = re.compile(r"(list of )*(u?int\d+|float\d+|bool)")


def table_source(request: Request, files: Sequence[Path]) -> Source:
    """Samples of shards, or, where there are no `files`, of the folder that save_to_disk wrote.

    As many as are asked for: the first ones of shards, which are read in order, and a choice by the seed of a folder of save_to_disk.
    UnsupportedError where pyarrow is missing, DataError where what it reads doesn't fit.
    """
    spec, samples = request.spec, request.samples
    form = files[0].suffix.lower() if files else None
    table = saved(spec, samples, request.seed) if form is None else parquet(spec, files) if form == ".parquet" else tars(spec, files)
    chosen = _inputs(table.columns, request.inputs, spec, request.column)
    label, notes = _labels(table.columns, chosen)
    if samples is not None and files and (table.total is None or samples < table.total):
        notes.append(f"{spec}: the first {samples} samples are taken, in the order of the files")
    described = f"{spec}: {table.what}, {', '.join(f'column {name!r}' for name in chosen.values())}"
    pictures = [name for name in chosen.values() if table.columns[name] == "image"]
    if not pictures:
        arrays = partial(_arrays, table, chosen, label, spec)
        return Source(arrays, described, tuple(notes), table.total, count=table.count)
    one = request.only_input("images serve", "arrays, or FILE.py:FUNCTION")
    pipeline, assumed = resolve(shaped(one, request.input_shapes), request.images)
    images = partial(_images, table, pictures[0], one.name, label, pipeline, spec)
    return Source(images, f"{described}: {pipeline}", (*notes, *assumed), table.total, images=True, count=table.count)


def _inputs(columns: Mapping[str, str], inputs: Sequence[InputSpec], spec: str, column: str | None) -> dict[str, str]:
    """The column of each input. DataError where there is none, or where it could be one of several."""
    has = ", ".join(f"{name!r} ({kind})" for name, kind in columns.items() if not name.startswith("__")) or "none"
    usable = [name for name, kind in columns.items() if kind == "image" or NUMBERS.fullmatch(kind)]
    if column is not None:
        if len(inputs) != 1:
            raise DataError(f"--column {column}: that is for a model with one input, and this one has {len(inputs)}; name columns as these")
        if column not in usable:
            raise DataError(f"{spec}: no column {column!r} that holds images or numbers; it has {has}")
        return {inputs[0].name: column}
    found: dict[str, str] = {}
    for one in inputs:
        exact = [name for name in usable if name == one.name] or [name for name in usable if name.rpartition(".")[0] == one.name]
        if exact:
            found[one.name] = exact[0]
    if len(inputs) == 1 and not found:
        images = [name for name in usable if columns[name] == "image"] if len(inputs[0].shape) == 4 else []
        others = [name for name in usable if columns[name] != "image" and name not in (*CLASSES, *LABELS) and not name.startswith("__")]
        fitting = images or [name for name in others if not WHOLE.fullmatch(columns[name])] or others
        if len(fitting) > 1:
            raise DataError(
                f"{spec}: columns {', '.join(map(repr, fitting))} could all be input {inputs[0].name!r}; name one: --column {fitting[0]}"
            )
        found = dict(zip([inputs[0].name], fitting, strict=False))
    if without := [repr(one.name) for one in inputs if one.name not in found]:
        raise DataError(f"{spec}: no column for input {', '.join(without)}; it has {has}; name columns of arrays as the inputs")
    return found


def _labels(columns: Mapping[str, str], chosen: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """The column of the labels, and notes."""
    names = [name for name in CLASSES if name in columns and name not in chosen.values()]
    whole = [name for name in names if WHOLE.fullmatch(columns[name])]
    if whole:
        return whole[0], [f"the labels are those of column {whole[0]!r}, not of {', '.join(map(repr, whole[1:]))}"] if whole[1:] else []
    if names:
        return None, [f"the labels aren't used: classes are integers, and column {names[0]!r} holds {columns[names[0]]}"]
    return None, []


def _images(table: DataTable, column: str, name: str, label: str | None, pipeline: Pipeline, spec: str) -> Iterator[Chunk]:
    """One chunk for each row, which is decoded when it is needed."""

    def make(cell: Any, where: str) -> Batch:
        found = cell.as_py() if hasattr(cell, "as_py") else cell
        content, path = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (found, None)
        if content is None and path and os.path.isfile(path):
            content = Path(path)
        if not content:
            raise CorruptError(where, "there is no image")
        return {name: pipeline(content, where)[None]}

    for _, rows, labels in _parts(table, [column], label, spec):
        for place, (of, cell) in enumerate(zip(rows.names, rows.columns[column], strict=True)):
            yield Chunk({}, None if labels is None else labels[place : place + 1], of, single=True, make=partial(make, cell, of))


def _arrays(table: DataTable, chosen: Mapping[str, str], label: str | None, spec: str) -> Iterator[Chunk]:
    """One chunk for the rows that were read at once, or, where their shapes differ, for each row."""
    for where, rows, labels in _parts(table, list(chosen.values()), label, spec):
        found = {name: numbers(rows.columns[column], f"{where}, column {column!r}") for name, column in chosen.items()}
        arrays = {name: values for name, values in found.items() if not isinstance(values, list)}
        if len(arrays) == len(found):
            yield Chunk(arrays, labels, where)
            continue
        for place, of in enumerate(rows.names):
            one = {name: values[place][None] for name, values in found.items()}
            yield Chunk(one, None if labels is None else labels[place : place + 1], of, single=True)


def _parts(table: DataTable, wanted: list[str], label: str | None, spec: str) -> Iterator[tuple[str, Rows, Array | None]]:
    """The rows that were read at once, what an error calls them, and their labels."""
    start = 0
    for rows in table.read(list(dict.fromkeys([*wanted, *([] if label is None else [label])]))):
        where = f"{spec}, from row {start}"
        labels: Any = None
        start += len(rows.names)
        if label is not None:
            if missing(rows.columns[label]):
                raise DataError(f"{where}: some rows have no label in column {label!r}; give all of them one, or leave the column out")
            labels = numbers(rows.columns[label], where)
        yield where, rows, labels
