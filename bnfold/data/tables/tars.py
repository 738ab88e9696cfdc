"""Tar shards, as webdataset makes them: a sample is the neighbours whose names differ only behind the first dot."""

from __future__ import annotations

import bz2
import io
import itertools
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from bnfold.errors import DataError
from bnfold.files import most_unpacked
from bnfold.text import counted

from .table import ROWS, DataTable, Rows, reading

TRIED = 5  # samples that show what all hold
KEYS = {f"json.{key}": key for key in ("label", "cls", "class", "class_id")}  # of the .json files, as columns that may hold labels
PACKED: dict[str, Callable[[], Any]] = {"gz": partial(zlib.decompressobj, 31), "bz2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}
LEAST = 1 << 28  # bytes that any packed file may unpack to
DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(("txt", "text", "transcript"), bytes.decode),
    **dict.fromkeys(("cls", "cls2", "index", "inx", "id"), int),
    **dict.fromkeys(("json", "jsn"), json.loads),
    "npy": lambda content: np.lib.format.read_array(io.BytesIO(content), allow_pickle=False),
    "pth": lambda content: _tensor(content),
}
# Bytes are images, but for these: sounds, films, meshes and what needs a decoder of its own.
OTHERS = re.compile(
    r"(.*\.)?(aiff|au|avr|caf|flac|htk|svx|mat4|mat5|mpc2k|ogg|paf|pvf|raw|rf64|sd2|sds|ircam|voc|w64|wav|nist|wavex|wve|mp3|opus|"
    r"mkv|mp4|avi|mpeg|mov|glb|ply|stl|ten|tb|mp|msg|cbor|npz)",
    re.IGNORECASE,
)


def tars(spec: str, files: Sequence[Path]) -> DataTable:
    """The samples of shards, in the order of the files."""
    files = [Path(os.path.abspath(path)) for path in files]
    sizes: dict[Path, int] = {}

    def count(path: Path) -> int:
        if path not in sizes:
            sizes[path] = _count(path)
        return sizes[path]

    first = next((path for path in files if count(path)), None)
    if first is None:
        raise DataError(f"{spec}: there are no samples; give at least one")
    with reading(first):
        columns = _columns([sample for _, sample in itertools.islice(_samples(first), TRIED)])

    def read(wanted: list[str]) -> Iterator[Rows]:
        """Every shard is looked over before it is used: one that is cut or damaged would seem to end there."""
        for path in files:
            count(path)
            with reading(path):
                samples = _samples(path, {"json" if name in KEYS else name for name in wanted})
                while part := list(itertools.islice(samples, ROWS)):
                    for name in KEYS.keys() & set(wanted):
                        for key, sample in part:
                            _check_class(sample.get(name), KEYS[name], f"{path}: {key}")
                    yield Rows([f"{path}: {key}" for key, _ in part], {name: [sample.get(name) for _, sample in part] for name in wanted})

    return DataTable(columns, counted(len(files), "tar file"), read, count=lambda: sum(map(count, files)))


def _count(path: Path) -> int:
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
    if not block or any(block):
        what = "damaged behind" if block else "cut off after"
        raise DataError(f"{path}: the archive is {what} {counted(samples, 'sample')}; fetch or make it again")
    return samples


def _files_in(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """The files of samples: the sample's name, and what stands behind its first dot."""
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # the list that it keeps of all, which nobody reads here
        folder, slash, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if member.isreg() and dot and not base.startswith((".", "__")):
            yield f"{folder}{slash}{stem}", suffix, member


def _samples(path: Path, wanted: Container[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each sample's name, and what its files (those that are wanted, or all) hold, by what stands behind the first dot; see KEYS too."""
    with tarfile.open(path, "r:") as archive:
        for key, files in itertools.groupby(_files_in(archive), lambda file: file[0]):
            sample: dict[str, Any] = {}
            for _, field, member in files:
                if field in sample:
                    raise ValueError(f"Duplicate field {field!r} for sample {key!r} in TAR archive {str(path)!r}")
                file = cast(IO[bytes], archive.extractfile(member))
                sample[field] = _decoded(field, file.read()) if wanted is None or field in wanted else None
            document = sample.get("json")
            if isinstance(document, dict):
                sample |= {column: document[name] for column, name in KEYS.items() if name in document}
            yield key, sample


def _decoded(field: str, content: bytes) -> Any:
    *_, inner, kind = ["", *field.lower().split(".")]
    if kind in PACKED:
        kind, content = inner, _unpacked(content, PACKED[kind])
    return DECODERS[kind](content) if kind in DECODERS else content


def _unpacked(content: bytes, decompressor: Callable[[], Any]) -> bytes:
    """The content, of one stream or several, in bounded memory."""
    parts, most = [], most_unpacked(len(content), LEAST)
    while content:
        one = decompressor()
        parts.append(one.decompress(content, most + 1))
        most -= len(parts[-1])
        if most < 0:
            raise ValueError(f"a file of {len(content):,} bytes unpacks to more than {most_unpacked(len(content), LEAST):,}")
        if not one.eof:
            raise EOFError("a packed file is cut short")
        content = one.unused_data
    return b"".join(parts)


def _tensor(content: bytes) -> Any:
    import torch

    found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return found.numpy() if hasattr(found, "numpy") else found


def _columns(samples: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What each column holds, as the first samples show."""
    if any(sample.keys() - KEYS != samples[0].keys() - KEYS for sample in samples):
        raise ValueError(
            "The TAR archives of the dataset should be in WebDataset format, but the files in the archive don't share the same prefix or "
            "the same types."
        )
    found: dict[str, str] = {}
    for field, value in itertools.chain.from_iterable(sample.items() for sample in samples):
        if "null" in found.get(field, "null"):
            found[field] = "dict" if OTHERS.fullmatch(field) else _kind(value)
    return found


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "list of " * value.ndim + str(value.dtype)
    if isinstance(value, list):
        return f"list of {_kind(value[0] if value else None)}"
    return {bytes: "image", str: "string", bool: "bool", int: "int64", float: "float64", dict: "dict"}.get(type(value), "null")


def _check_class(found: Any, key: str, where: str) -> None:
    """DataError for a class in a .json file that is no integer."""
    if not isinstance(found, int) or isinstance(found, bool) or not -(2**63) <= found < 2**63:
        what = f"there is no {key!r} in its .json file" if found is None else f"{key!r} in its .json file is {found!r:.40}"
        raise DataError(f"{where}: {what}; classes are integers: give every sample one, or leave that key out of all")
