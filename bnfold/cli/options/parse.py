"""Texts of the command line to values. All raise UsageError, which names the option."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bnfold.errors import UsageError

TYPES = ("float32", "int64", "int32", "int16", "int8", "uint8", "bool")


def size_in_bytes(text: str, option: str) -> int:
    """Bytes of "512M", "2G", "1000": powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{option} {text}: not a size; write it like 512M or 2G")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


@dataclass(frozen=True)
class Shape:
    """An input's sizes, and one of TYPES where it was named; float32 stands for the floating-point type that the model has."""

    sizes: tuple[int, ...]
    dtype: str | None = None


def shapes(given: Iterable[str], names: Sequence[str], option: str) -> dict[str, Shape]:
    """Shapes by input name, from "NAME=1,3,224,224" or "NAME=1,16:int64"; without NAME where there is one input. names: the model's."""
    found = {}
    for text in given:
        name, equals, shape = text.rpartition("=")
        sizes, colon, dtype = shape.partition(":")
        if not equals and len(names) != 1:
            raise UsageError(f"{option} {text}: the model has {len(names)} inputs ({', '.join(names)}); write NAME={text}")
        name = name if equals else names[0]
        if name not in names:
            raise UsageError(f"{option} {text}: the model has no input '{name}'; its inputs are {', '.join(names)}")
        if not re.fullmatch(r"[0-9]{1,9}([,x][0-9]{1,9})*", sizes):
            raise UsageError(f"{option} {text}: not a shape; write it like 1,3,224,224")
        if re.match("0+([,x]|$)", sizes):
            raise UsageError(f"{option} {text}: no samples; the first number is how many go through at once, 1 or more")
        if colon and dtype not in TYPES:
            raise UsageError(f"{option} {text}: {dtype!r} is no type for an input; give one of {', '.join(TYPES)}")
        found[name] = Shape(tuple(int(n) for n in re.split("[,x]", sizes)), dtype or None)
    return found


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers from "0.485,0.456,0.406"."""
    try:
        return tuple(float(n) for n in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: not numbers; write them like 0.485,0.456,0.406") from None


def height_and_width(text: str, option: str) -> tuple[int, int]:
    """(height, width) from "224" or "224,320"."""
    match = re.fullmatch(r"([1-9]\d*)(?:[,x]([1-9]\d*))?", text.strip())
    if match is None:
        raise UsageError(f"{option} {text}: not a size; write it like 224, or 224,320 for height and width")
    return int(match[1]), int(match[2] or match[1])


def resize(text: str, option: str) -> int | tuple[int, int]:
    """The shorter side from "256", (height, width) from "256,320", and 0 for none."""
    match = re.fullmatch(r"(\d+)(?:[,x]([1-9]\d*))?", text.strip())
    if match is None or (match[2] and not int(match[1])):
        raise UsageError(
            f"{option} {text}: not a size; write it like 256 for the shorter side, 256,320 for height and width, or 0 for none"
        )
    return (int(match[1]), int(match[2])) if match[2] else int(match[1])


def part(text: str, option: str) -> tuple[int, int]:
    """(which, of how many) from "0/4"."""
    match = re.fullmatch(r"(\d+)/([1-9]\d*)", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"{option} {text}: write it like 0/4, the first of four parts, up to 3/4")
    return int(match[1]), int(match[2])


def json_object(text: str, option: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{option} {text}: not a JSON object; write it like '{{\"depth\": 18}}'")
    return found
