"""Tar shards, as webdataset makes them: a sample is the neighbours whose names differ only behind the first dot."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from bnfold.errors import DataError
from bnfold.text import counted

from .library import Library
from .table import Table

EXTRAS = ("__key__", "__url__")
KEYS = {f"json.{key}": key for key in ("label", "cls", "class", "class_id")}  # of the .json files, as columns that may hold labels


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
    features = dict(dataset.features or {})
    document = features.get("json")
    if isinstance(document, dict):
        features |= {name: document[key] for name, key in KEYS.items() if key in document}

    def open_(wanted: list[str]) -> Iterator[Any]:
        """Every shard is looked over before it is used: the library takes one that is cut or damaged for one that ends there."""
        arrow = importlib.import_module("pyarrow")
        classes = {name: _classes_in(held, KEYS[name]) for name in wanted if name in KEYS}
        whole = dataset.select_columns([*(name for name in wanted if name not in classes), *EXTRAS])
        for table in _blamed(library.rows(whole), held, samples_in):
            start = 0
            for url, rows in itertools.groupby(table["__url__"].to_pylist()):
                samples_in(url)
                part = table.slice(start, length := len(list(rows)))
                for name, values in classes.items():
                    part = part.append_column(name, arrow.array(itertools.islice(values, length), arrow.int64()))
                yield part
                start += length
        for path in files:
            samples_in(path)

    def name(place: int, row: Mapping[str, Any]) -> str:
        return f"{row['__url__']}: {row['__key__']}"

    return Table(
        open_,
        features,
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
    """The number of samples in a tar file. DataError unless it is whole."""
    samples, last = 0, None
    try:
        with tarfile.open(path, "r:") as archive:
            for name, _, _ in _files_in(archive):
                samples, last = samples + (name != last), name
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


def _classes_in(paths: Sequence[Path], key: str) -> Iterator[int]:
    """What the samples' .json files hold under a key, read here since the library wants all these files to be alike in every other key too.

    DataError for anything but an integer.
    """
    for path in paths:
        with tarfile.open(path, "r:") as archive:
            for sample, files in itertools.groupby(_files_in(archive), lambda file: file[0]):
                found = None
                for _, suffix, member in files:
                    if suffix == "json":
                        document = json.load(cast(IO[bytes], archive.extractfile(member)))
                        found = document.get(key) if isinstance(document, dict) else None
                if not isinstance(found, int) or isinstance(found, bool) or not -(2**63) <= found < 2**63:
                    what = f"there is no {key!r} in its .json file" if found is None else f"{key!r} in its .json file is {found!r:.40}"
                    raise DataError(f"{path}: {sample}: {what}; classes are integers: give every sample one, or leave that key out of all")
                yield found


def _files_in(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """The files of samples: the sample's name, and what stands behind its first dot."""
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # the list that it keeps of all, which nobody reads here
        folder, slash, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if member.isreg() and dot and not base.startswith((".", "__")):
            yield f"{folder}{slash}{stem}", suffix, member
