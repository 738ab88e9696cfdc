"""Tables that pyarrow reads: Parquet files, and folders that Hugging Face's `datasets` wrote with save_to_disk."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.errors import DataError
from bnfold.text import counted

from .table import ROWS, Rows, Table, reading

BUFFER = 1 << 16  # bytes: so that a column is streamed, and not read whole for each group of rows
NAMES = {"halffloat": "float16", "float": "float32", "double": "float64", "date32[day]": "date32", "date64[ms]": "date64"}


def parquet(spec: str, files: Sequence[Path]) -> Table:
    """The rows of Parquet files, in the order of the files, in the types of the first."""
    reader = _pyarrow(spec, "pyarrow.parquet")
    ends: list[int] = []
    for path in files:
        with reading(path):
            ends.append((ends[-1] if ends else 0) + reader.read_metadata(path).num_rows)
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

    return Table(columns, f"{counted(ends[-1], 'row')} in {counted(len(files), 'file')}", read, ends[-1])


def saved(spec: str, samples: int | None, seed: int) -> Table:
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
    return Table(columns, what if len(places) == total else f"{samples} of {what}", read, len(places))


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
        raise DataError(f"{spec}: reading it needs the pyarrow library, which {what}; install bnfold[datasets]") from None
