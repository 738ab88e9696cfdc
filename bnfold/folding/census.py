"""Every BatchNorm that a model holds, so that no report tells of fewer: who meets only some of them says of the others why."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from bnfold.report import Layer


@dataclass(frozen=True)
class Held:
    """A BatchNorm in a model. key: what the back-end knows it by; why: the reason why nobody could meet it, or didn't."""

    key: Any
    name: str
    channels: int
    why: str


def missed(held: Iterable[Held], met: Container[Any]) -> list[Held]:
    """Those of the model's BatchNorms that were not met."""
    return [each for each in held if each.key not in met]


def kept(held: Iterable[Held], met: Container[Any]) -> list[Layer]:
    """The same, as layers that stay."""
    return [Layer(each.name, each.channels, "kept", (), each.why) for each in missed(held, met)]
