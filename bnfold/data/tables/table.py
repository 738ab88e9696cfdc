"""Tables: rows in named columns, read in parts; Parquet files and folders of save_to_disk, as pyarrow reads them."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bnfold.errors import DataError, UnsupportedError
from bnfold.text import counted, first_line

from ..spec import Array

ROWS = 64  # that are read at once
BUFFER = 1 << 16  # bytes: so that a column is streamed, and not read whole for each group of rows
NAMES = {"halffloat": "float16", "float": "float32", "double": "float64", "date32[day]": "date32", "date64[ms]": "date64"}


class Rows(NamedTuple):
    """Some neighbours. names: what an error calls each. columns: an arrow array each, or a list, in which None is nothing."""

    names: list[str]
    columns: dict[str, Any]


@dataclass(frozen=True)
class DataTable:
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
    except (DataError, UnsupportedError, MemoryError):
        raise
    except Exception as error:  # of any kind: each reader has its own
        raise DataError(f"{where}: can't be read ({type(error).__name__}: {first_line(error)})") from None


def parquet(spec: str, files: Sequence[Path]) -> DataTable:
    """The rows of Parquet files, in the order of the files, in the types of the first."""
    reader = _pyarrow(spec, "pyarrow.parquet")
    total = 0
    for path in files:
        with reading(path):
            total += reader.read_metadata(path).num_rows
    with reading(files[0]):
        schema = reader.read_schema(files[0])
        columns = _columns(schema)

    def read(wanted: list[str]) -> Iterator[Rows]:
        for path in files:
            with reading(path), reader.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER) as file:
                if gone := [name for name in wanted if name not in file.schema_arrow.names]:
                    raise DataError(f"{path}: can't be read (it has no column {gone[0]!r}, and {files[0]} has)")
                place = itertools.count()
                for batch in file.iter_batches(ROWS, columns=wanted):
                    names = [f"{path}, row {next(place)}" for _ in range(batch.num_rows)]
                    yield Rows(names, {name: _typed(batch.column(name), schema.field(name).type) for name in wanted})

    return DataTable(columns, f"{counted(total, 'row')} in {counted(len(files), 'file')}", read, total)


def saved(spec: str, samples: int | None, seed: int) -> DataTable:
    """A folder of save_to_disk; `samples` of it, when that is fewer, by a shuffle from `seed`."""
    arrow = _pyarrow(spec)
    with reading(spec):
        files = _saved_files(spec)
        if not files:
            raise DataError(f"{spec}: there are no samples; give at least one")
        table = arrow.concat_tables([arrow.ipc.open_stream(arrow.memory_map(str(path))).read_all() for path in files])
        columns = _columns(table.schema)
    total = table.num_rows
    places: Any = range(total)
    if samples is not None and 0 < samples < total:
        places = np.random.default_rng(seed).permutation(total)[:samples]

    def read(wanted: list[str]) -> Iterator[Rows]:
        part = table.select(wanted)
        with reading(spec):
            for start in range(0, len(places), ROWS):
                these = places[start : start + ROWS]
                found = part.slice(start, len(these))
                if len(places) < total:
                    found = arrow.concat_tables([part.slice(place, 1) for place in these])
                found.validate(full=True)  # a file that is mapped is believed, and its offsets may lead anywhere
                found = found.combine_chunks()
                yield Rows([f"{spec}, row {place}" for place in these], {name: found[name].chunk(0) for name in wanted})

    what = counted(total, "row")
    return DataTable(columns, what if len(places) == total else f"{samples} of {what}", read, len(places))


def _saved_files(spec: str) -> list[Path]:
    """The arrow files of a data set, or of the only split of several."""
    folder = Path(spec)
    if not (folder / "state.json").is_file():
        names = sorted(json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"])
        if len(names) != 1:
            raise DataError(f"{spec}: it holds the splits {', '.join(names) or 'of none'}; name one, say {folder / (names or ['x'])[0]}")
        folder /= names[0]
    return [folder / file["filename"] for file in json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]]


def _columns(schema: Any) -> dict[str, str]:
    """What each column holds. `datasets` leaves its own types with the schema, which tell an image from a sound."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
    return {field.name: _kind(field.type, features.get(field.name)) for field in schema}


def _kind(kind: Any, feature: Any) -> str:
    kind, feature = getattr(kind, "storage_type", kind), feature if isinstance(feature, dict) else {}
    if hasattr(kind, "index_type"):  # a dictionary of values
        return _kind(kind.value_type, feature)
    if hasattr(kind, "value_type"):
        return f"list of {_kind(kind.value_type, feature.get('feature'))}"
    text = str(kind)
    if text.startswith("struct<"):
        names = {kind.field(place).name for place in range(kind.num_fields)}
        mark = feature.get("_type")
        return "image" if "bytes" in names <= {"bytes", "path"} and (mark == "Image" or not isinstance(mark, str)) else "dict"
    return "image" if text in ("binary", "large_binary") else NAMES.get(text, text)


def _typed(column: Any, kind: Any) -> Any:
    return column if column.type == kind else column.cast(kind)


def _pyarrow(spec: str, module: str = "pyarrow") -> Any:
    try:
        importlib.import_module("pyarrow")
        return importlib.import_module(module)
    except ImportError as error:
        what = "isn't installed" if error.name == "pyarrow" else f"can't be imported ({error})"
        raise UnsupportedError(f"{spec}: reading it needs the pyarrow library, which {what}: pip install pyarrow") from None


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
