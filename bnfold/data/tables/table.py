"""A table: rows in named columns, read in parts by whoever knows its form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bnfold.errors import DataError

from ..spec import Array

ROWS = 64  # that are read at once


class Rows(NamedTuple):
    """Some neighbours. names: what an error calls each. columns: an arrow array each, or a list, in which None is nothing."""

    names: list[str]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows, read anew for every pass. columns: what each holds, in words: `image`, `list of float32`, `string`.

    read: the rows in parts, of the columns that are asked for; what stands in one of images is bytes, or a dict of bytes and path.
    total: the number of rows, where that is known; count: what finds it out otherwise.
    """

    columns: Mapping[str, str]
    what: str
    read: Callable[[list[str]], Iterator[Rows]]
    total: int | None = None
    count: Callable[[], int] | None = None


@contextmanager
def reading(where: object) -> Iterator[None]:
    """A reader's errors as DataErrors of one line."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of any kind: each reader has its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise DataError(f"{where}: can't be read ({type(error).__name__}: {lines[0][:300].rstrip('.')})") from None


def missing(column: Any) -> bool:
    """Whether some rows hold nothing."""
    return any(value is None for value in column) if isinstance(column, list) else column.null_count > 0


def numbers(column: Any, where: str) -> Array | list[Array]:
    """A column as one array, without a copy where that can be; a list of arrays where their shapes differ."""
    if missing(column):
        raise DataError(f"{where}: some rows hold nothing; fill them or leave them out")
    if isinstance(column, list):
        try:
            rows = [np.asarray(value) for value in column]
        except ValueError:
            raise _ragged(where) from None
        if any(row.dtype.kind not in "biufc" for row in rows):
            raise DataError(f"{where}: some rows hold no numbers, or larger ones than 64 bits can; mend them or leave them out")
        return rows if len({row.shape for row in rows}) > 1 else np.stack(rows)
    if hasattr(column, "to_numpy_ndarray"):  # a tensor of one shape
        made: Array = column.to_numpy_ndarray()
        return made
    if hasattr(column, "storage"):
        return numbers(column.storage, where)
    if hasattr(column, "dictionary_decode"):
        return numbers(column.dictionary_decode(), where)
    if not hasattr(column.type, "value_type"):
        flat: Array = column.to_numpy(zero_copy_only=False)
        return flat
    sizes = {len(column[0])} if hasattr(column.type, "list_size") and len(column) else set(column.value_lengths().to_pylist())
    inner = numbers(column.flatten(), where) if len(sizes) == 1 else []
    if not isinstance(inner, list):
        return inner.reshape(len(column), *sizes, *inner.shape[1:])
    found = [numbers(row.values, where) for row in column]
    alike = [row for row in found if not isinstance(row, list)]
    if len(alike) < len(found):
        raise _ragged(where)
    return alike


def _ragged(where: str) -> DataError:
    return DataError(f"{where}: the lists in a row are of different lengths; make them alike")
