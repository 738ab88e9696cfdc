"""The framing of protocol buffers: just enough to pass over weights without copying them.

A message is a sequence of fields; each is a key (field number << 3 | wire type) and its content: wire type 0 a varint, 1 eight bytes,
2 a varint length and that many bytes, 5 four bytes (https://protobuf.dev/programming-guides/encoding). A varint holds seven bits a byte,
the lowest first; the top bit says that more follow. A message whose bytes come in several fields is their concatenation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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
