"""How the bytes of weights lie: framed as protocol buffers within a model's file, or in files beside it.

A message is a sequence of fields; each is a key (field number << 3 | wire type) and its content: wire type 0 a varint, 1 eight bytes,
2 a varint length and that many bytes, 5 four bytes (https://protobuf.dev/programming-guides/encoding). A varint holds seven bits a byte,
the lowest first; the top bit says that more follow. A message whose bytes come in several fields is their concatenation. This is just
enough of it to pass over weights without copying them. The files beside a model are opened with suspicion and mapped into memory.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import onnx
from onnx import TensorProto

from bnfold.errors import ModelError
from bnfold.files import unreadable

from .validate import nbytes

VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5  # wire types; 3 and 4 are groups, which no ONNX message has
# Field numbers of onnx.proto.
GRAPH = 7  # of ModelProto
INITIALIZER = 5  # of GraphProto
RAW_DATA = 9  # of TensorProto


class Malformed(ValueError):
    """Bytes that aren't a protocol buffer."""


class CutShort(Malformed):
    """A field reaches past the end; `end` is where it should end, in bytes from the start."""

    def __init__(self, end: int) -> None:
        super().__init__(f"a field ends at byte {end:,}")
        self.end = end


class Field(NamedTuple):
    """A field of a message: its number, its wire type, and where in the data its key, its content and the next field begin."""

    number: int
    kind: int
    key: int
    start: int
    end: int


def fields(data: bytes, start: int = 0, end: int | None = None) -> Iterator[Field]:
    """The fields of the message in `data[start:end]`. Raises Malformed, or CutShort where the last one is incomplete."""
    at, stop = start, len(data) if end is None else end
    while at < stop:
        key = at
        tag, at = _read_varint(data, at, stop)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise Malformed(f"no field has the number {number}")
        begin = at
        if kind == VARINT:
            _, at = _read_varint(data, at, stop)
        elif kind == BYTES:
            length, begin = _read_varint(data, at, stop)
            at = begin + length
        elif kind in (EIGHT, FOUR):
            at += 8 if kind == EIGHT else 4
        else:
            raise Malformed(f"no field has the wire type {kind}")
        if at > stop:
            raise CutShort(at)
        yield Field(number, kind, key, begin, at)


def opening(number: int, length: int) -> bytes:
    """What stands before the content of a field of wire type 2."""
    return _varint(number << 3 | BYTES) + _varint(length)


def framed(number: int, length: int) -> int:
    """The size in bytes of a field of wire type 2 whose content has the given length."""
    return len(opening(number, length)) + length


def _read_varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise Malformed("a number of more than ten bytes")
    raise CutShort(at + 1)


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


# --- external data --------------------------------------------------------------------------------------------------------------------


class Files:
    """The data files of one model. Each is opened, checked and mapped once.

    A file must lie in the model's folder. Where the model itself is a link, as in Hugging Face's cache, its data may lie with the file
    that it leads to. Absolute paths, '..', other links that lead out, and hard links, which can be any file of the machine, are refused
    (as onnx does): a model from elsewhere must not be able to read them.
    """

    def __init__(self, model: Path) -> None:
        self._bases = list(dict.fromkeys((model.parent.resolve(), model.resolve().parent)))
        self._maps: dict[str, tuple[memoryview, Path]] = {}

    def read(self, tensor: TensorProto) -> tuple[memoryview, Path]:
        """The tensor's bytes, not read from the disk yet, and the file that holds them.

        Raises ModelError where they aren't there or mustn't be read.
        """
        info = {entry.key: entry.value for entry in tensor.external_data}
        location, need = info.get("location", ""), nbytes(tensor)
        data, file = self._open(location, tensor.name)
        try:
            offset, length = int(info.get("offset") or 0), int(info.get("length") or need)
        except ValueError:
            raise ModelError(f"tensor '{tensor.name}' has an offset or a length that is no number; export the model again") from None
        if length != need:
            raise ModelError(
                f"tensor '{tensor.name}' takes {length:,} bytes of '{location}', its shape {list(tensor.dims)} asks for {need:,}; "
                "export the model again"
            )
        if offset < 0 or offset + need > len(data):
            raise ModelError(
                f"tensor '{tensor.name}' needs bytes {offset:,} to {offset + need:,} of '{location}', which has {len(data):,}; "
                "copy the whole file"
            )
        return data[offset : offset + need], file

    def _open(self, location: str, name: str) -> tuple[memoryview, Path]:
        if location in self._maps:
            return self._maps[location]
        parts = PureWindowsPath(location)  # which knows both kinds of slash
        if not location or parts.anchor or ".." in parts.parts:
            raise ModelError(f"tensor '{name}' points outside the model's folder ('{location}'), which is not safe")
        found = next((there for base in self._bases if (there := base / location).exists()), None)
        if found is None:
            raise ModelError(f"the file '{location}' with the data of tensor '{name}' is missing from {self._bases[0]}; copy it there")
        real = found.resolve()
        if not any(real.is_relative_to(base) for base in self._bases):
            raise ModelError(f"tensor '{name}' points outside the model's folder ('{location}' is a link to {real}), which is not safe")
        if why := unreadable(real):
            raise ModelError(f"'{location}', with the data of tensor '{name}', can't be read ({why})")
        try:
            with open(real, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_nlink > 1:
                    raise ModelError(
                        f"tensor '{name}' has its data in a hard link ('{location}'), which is not safe; put a copy in its place"
                    )
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b"")
        except OSError as error:
            raise ModelError(f"'{location}', with the data of tensor '{name}', can't be read ({error.strerror or error})") from None
        self._maps[location] = data, found
        return data, found


def is_external(tensor: TensorProto) -> bool:
    """Whether its data are in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL
