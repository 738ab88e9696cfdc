"""Rows of a table as samples: images are decoded when they are needed, numbers and lists of numbers go in as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.errors import DataError

from ..corrupt import CorruptError
from ..source import Chunk
from ..spec import Array, Batch
from .table import Table

if TYPE_CHECKING:
    from ..images import Pipeline


def of_images(table: Table, wanted: list[str], column: str, name: str, label: str | None, pipeline: Pipeline) -> Iterator[Chunk]:
    """One chunk for each row, which is decoded when it is needed."""

    def make(cell: Any, where: str) -> Batch:
        found = cell.as_py()
        content, path = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (found, None)
        if content is None and path and os.path.isfile(path):
            content = Path(path)
        if not content:
            raise CorruptError(where, "there is no image")
        return {name: pipeline(content, where)[None]}

    start = 0
    for part in table.open(wanted):
        labels = _labels(part, label, table.what)
        names = {extra: part[extra].to_pylist() for extra in table.extras}
        for row, cell in enumerate(part[column]):
            where = table.row(start + row, {extra: values[row] for extra, values in names.items()})
            yield Chunk({}, None if labels is None else labels[row : row + 1], where, single=True, make=partial(make, cell, where))
        start += part.num_rows


def of_arrays(table: Table, wanted: list[str], chosen: Mapping[str, str], label: str | None, spec: str) -> Iterator[Chunk]:
    """One chunk for the rows that were read at once, or, where their shapes differ, for each row."""
    start = 0
    for part in table.open(wanted):
        where = f"{spec}, from row {start}"
        labels = _labels(part, label, where)
        found = {name: _numbers(_whole(part[column]), f"{where}, column {column!r}") for name, column in chosen.items()}
        arrays = {name: values for name, values in found.items() if not isinstance(values, list)}
        if len(arrays) == len(found):
            yield Chunk(arrays, labels, where)
        for row in range(part.num_rows if len(arrays) < len(found) else 0):
            one = {name: values[row][None] for name, values in found.items()}
            yield Chunk(one, None if labels is None else labels[row : row + 1], f"{spec}, row {start + row}", single=True)
        start += part.num_rows


def _labels(part: Any, label: str | None, where: str) -> Array | None:
    if label is None:
        return None
    if part[label].null_count:
        raise DataError(f"{where}: some rows have no label in column {label!r}; give all of them one, or leave the column out")
    made: Array = part[label].to_numpy()
    return made


def _whole(column: Any) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _numbers(array: Any, where: str) -> Array | list[Array]:
    """An arrow array as numpy's, without a copy where that can be; a list of arrays where their shapes differ."""
    if array.null_count:
        raise DataError(f"{where}: some rows hold nothing; fill them or leave them out")
    if hasattr(array, "to_numpy_ndarray"):
        made: Array = array.to_numpy_ndarray()
        return made
    if hasattr(array, "storage"):
        return _numbers(array.storage, where)
    if not hasattr(array, "flatten") or not hasattr(array.type, "value_type"):
        flat: Array = array.to_numpy(zero_copy_only=False)
        return flat
    sizes = {len(array[0])} if hasattr(array.type, "list_size") and len(array) else set(array.value_lengths().to_pylist())
    inner = _numbers(array.flatten(), where) if len(sizes) == 1 else []
    if not isinstance(inner, list):
        return inner.reshape(len(array), *sizes, *inner.shape[1:])
    rows = [_numbers(row.values, where) for row in array]
    alike = [row for row in rows if not isinstance(row, list)]
    if len(alike) < len(rows):
        raise DataError(f"{where}: the lists in a row are of different lengths; make them alike")
    return alike
