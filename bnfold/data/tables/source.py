"""A table as a source of samples, a row each: images are decoded when they are needed, numbers and lists of them go in as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bnfold.errors import DataError

from ..corrupt import CorruptError
from ..images.pipeline import Pipeline, resolve, shaped
from ..source import Chunk, Request, Source
from ..spec import Array, Batch
from . import arrow, columns
from .table import Rows, Table, missing, numbers
from .tars import tars


def table_source(asked: Request, files: Sequence[Path]) -> Source:
    """Samples of shards, or, where there are no `files`, of the folder that save_to_disk wrote.

    As many as are asked for: the first ones of shards, which are read in order, and a choice by the seed of a folder of save_to_disk.
    DataError where pyarrow is missing or what it reads doesn't fit.
    """
    spec, samples = asked.spec, asked.samples
    if not files:
        table = arrow.saved(spec, samples, asked.seed)
    else:
        table = (arrow.parquet if files[0].suffix.lower() == ".parquet" else tars)(spec, files)
    chosen = columns.of_inputs(table.columns, asked.inputs, spec, asked.column)
    label, notes = columns.of_labels(table.columns, chosen)
    if samples is not None and files and (table.total is None or samples < table.total):
        notes.append(f"{spec}: the first {samples} samples are taken, in the order of the files")
    described = f"{spec}: {table.what}, {', '.join(f'column {name!r}' for name in chosen.values())}"
    pictures = [name for name in chosen.values() if table.columns[name] == "image"]
    if not pictures:
        arrays = partial(_arrays, table, chosen, label, spec)
        return Source(arrays, described, tuple(notes), table.total, count=table.count)
    one = asked.only_input("images serve", "arrays, or FILE.py:FUNCTION")
    pipeline, assumed = resolve(shaped(one, asked.input_shapes), asked.images)
    images = partial(_images, table, pictures[0], one.name, label, pipeline, spec)
    return Source(images, f"{described}: {pipeline}", (*notes, *assumed), table.total, images=True, count=table.count)


def _images(table: Table, column: str, name: str, label: str | None, pipeline: Pipeline, spec: str) -> Iterator[Chunk]:
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


def _arrays(table: Table, chosen: Mapping[str, str], label: str | None, spec: str) -> Iterator[Chunk]:
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


def _parts(table: Table, wanted: list[str], label: str | None, spec: str) -> Iterator[tuple[str, Rows, Array | None]]:
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
