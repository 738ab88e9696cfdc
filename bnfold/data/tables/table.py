"""Tables of rows: Parquet files, and folders that save_to_disk wrote."""

from __future__ import annotations

import bisect
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.errors import DataError
from bnfold.text import counted

from .library import ROWS, Library


@dataclass(frozen=True)
class Table:
    """Rows in arrow tables, opened anew for every pass.

    features: what `datasets` takes the columns for. total: the number of rows, where that is known; count: what finds it out otherwise.
    row: what a row is called, by its place and the columns that it was read with. extras: columns to be read for that.
    """

    open: Callable[[list[str]], Iterator[Any]]
    features: Mapping[str, Any]
    what: str
    row: Callable[[int, Mapping[str, Any]], str]
    total: int | None = None
    count: Callable[[], int] | None = None
    extras: tuple[str, ...] = ()


def saved(library: Library, samples: int | None, seed: int) -> Table:
    """A folder of save_to_disk; `samples` of it, when that is fewer, by a shuffle from `seed`."""
    spec = library.spec
    with library.reading():
        states = [json.loads(path.read_text("utf-8")) for path in Path(spec).glob("state.json")]
        if states and not states[0]["_data_files"]:  # which the library can't read
            raise DataError(f"{spec}: there are no samples; give at least one")
        dataset = library.datasets.load_from_disk(spec)
        if hasattr(dataset, "keys"):
            names = sorted(dataset.keys())
            if len(names) != 1:
                raise DataError(
                    f"{spec}: it holds the splits {', '.join(names) or 'of none'}; name one, say {Path(spec) / (names or ['x'])[0]}"
                )
            dataset = dataset[names[0]]
        total = len(dataset)
        chosen = None
        if samples is not None and 0 < samples < total:
            chosen = np.random.default_rng(seed).permutation(total)[:samples]
            dataset = dataset.select(chosen)

    def name(place: int, row: Mapping[str, Any]) -> str:
        return f"{spec}, row {place if chosen is None else chosen[place]}"

    what = counted(total, "row") if chosen is None else f"{samples} of {counted(total, 'row')}"
    return Table(lambda wanted: library.rows(dataset.select_columns(wanted)), dataset.features, what, name, len(dataset))


def parquet(library: Library, files: Sequence[Path]) -> Table:
    """The rows of Parquet files, in the order of the files."""
    reader = importlib.import_module("pyarrow.parquet")
    ends: list[int] = []
    for path in files:
        with library.reading(str(path)):
            ends.append((ends[-1] if ends else 0) + reader.read_metadata(path).num_rows)
    with library.reading(str(files[0])):
        features = library.datasets.Features.from_arrow_schema(reader.read_schema(files[0]))

    def name(place: int, row: Mapping[str, Any]) -> str:
        number = bisect.bisect_right(ends, place)
        return f"{files[number]}, row {place - (ends[number - 1] if number else 0)}"

    def open_(wanted: list[str]) -> Iterator[Any]:
        return library.rows(library.streamed("parquet", files, columns=wanted, batch_size=ROWS))

    return Table(open_, features, f"{counted(ends[-1], 'row')} in {counted(len(files), 'file')}", name, ends[-1])
