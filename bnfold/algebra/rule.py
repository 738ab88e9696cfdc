"""What a rule is, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from .affine import Affine, Blocked
from .graph import Node, Value


@dataclass(frozen=True)
class Step:
    """One way across a node. maps: one for each input (up), or the output's alone (down). updates: by parameter role."""

    maps: list[Affine]
    updates: dict[str, Affine] = field(default_factory=dict)


class Rule(NamedTuple):
    """Both directions of one equation; each gives its options, the best first, or raises `Blocked`."""

    up: Callable[[Node, Affine], list[Step]]
    down: Callable[[Node, list[Affine]], list[Step]]


def identity(value: Value) -> Affine:
    """The map that does nothing to a value."""
    return Affine.identity(value.rank or 0)


def never(why: str) -> Callable[..., list[Step]]:
    """A direction in which no map crosses."""

    def blocked(node: Node, *_: object) -> list[Step]:
        raise Blocked(why)

    return blocked
