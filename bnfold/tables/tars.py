"""Tar shards, as webdataset makes them: a sample is the neighbours whose names differ only behind the first dot."""

from __future__ import annotations

import itertools
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import counted
from ..errors import DataError
from .library import Library
from .table import Table

EXTRAS = ("__key__", "__url__")


def tars(library: Library, files: Sequence[Path]) -> Table:
    """The samples of shards, in the order of the files."""
    sizes: dict[str, int] = {}

    def samples_in(path: str | Path) -> int:
        path = os.path.abspath(path)
        if path not in sizes:
            sizes[path] = _samples_in(path)
        return sizes[path]

    held = list(itertools.dropwhile(lambda path: not samples_in(path), files))
    if not held:
        raise DataError(f"{library.spec}: there are no samples; give at least one")
    dataset = library.streamed("webdataset", held)

    def open_(wanted: list[str]) -> Iterator[Any]:
        """Every shard is looked over before it is used: the library takes one that is cut or damaged for one that ends there."""
        for table in _blamed(library.rows(dataset.select_columns([*wanted, *EXTRAS])), held, samples_in):
            start = 0
            for url, rows in itertools.groupby(table["__url__"].to_pylist()):
                samples_in(url)
                yield table.slice(start, length := len(list(rows)))
                start += length
        for path in files:
            samples_in(path)

    def name(place: int, row: Mapping[str, Any]) -> str:
        return f"{row['__url__']}: {row['__key__']}"

    return Table(
        open_,
        dataset.features or {},
        counted(len(files), "tar file"),
        name,
        count=lambda: sum(map(samples_in, files)),
        extras=EXTRAS,
    )


def _blamed(rows: Iterator[Any], files: Sequence[Path], check: Callable[[Path], int]) -> Iterator[Any]:
    """The rows; an error is that of the file that is to blame, where one is cut or damaged."""
    try:
        yield from rows
    except DataError:
        for path in files:
            check(path)
        raise


def _samples_in(path: str) -> int:
    """The number of samples in a tar file: neighbours whose names differ only behind the first dot. DataError unless it is whole."""
    samples, last = 0, None
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                key = (folder, base.partition(".")[0])
                if member.isreg() and not base.startswith((".", "__")) and "." in base:
                    samples, last = samples + (key != last), key
                archive.members = []  # type: ignore[attr-defined]  # the list that it keeps of all, which nobody reads here
            end = archive.offset
        with open(path, "rb") as file:
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{path}: can't be read as .tar ({error}); fetch or make it again") from None
    if not block:
        raise DataError(f"{path}: the archive is cut off after {counted(samples, 'sample')}; fetch or make it again")
    if any(block):
        raise DataError(f"{path}: the archive is damaged behind {counted(samples, 'sample')}; fetch or make it again")
    return samples
