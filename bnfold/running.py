"""What runs: something that computes outputs from inputs, where it did, and a piece of a model that runs by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .data import Batch

Shapes = Mapping[str, tuple[int, ...]]
Stream = Iterator[tuple[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Placement:
    """Where a model's nodes run: so many, of so many, on the provider asked for.
    source: who says so: "session" (the runtime's own record), "profile" (of one run), "operators" (seen as one run called them).
    on_cpu: operator and name of those that fell to the CPU.
    """

    nodes: int
    of: int
    source: str
    on_cpu: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Extract:
    """A piece of a model that runs by itself. suffix: of the file that holds it; data: the file's content."""

    suffix: str
    data: bytes


class Elsewhere(NamedTuple):
    """Two models that are code, in other calls than those that were read.

    reference, candidate: functions of a call; moved: that of the reference with moved weights, by a seed. calls: with a text each. bounded:
    whether the candidate states for which sizes it holds, and refuses others.
    """

    reference: Callable[[Any], Any]
    candidate: Callable[[Any], Any]
    moved: Callable[[int], Any]
    calls: list[tuple[str, Any]]
    bounded: bool


class Runner(Protocol):
    """Something that computes outputs by name from inputs by name. It may have a `placement`, complete after a run."""

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]: ...


class Renaming:
    """A runner under other names of its inputs and outputs."""

    def __init__(self, runner: Runner, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        self._runner, self._inputs, self._outputs = runner, inputs, outputs

    @property
    def placement(self) -> Placement | None:
        return getattr(self._runner, "placement", None)

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        found = self._runner.run({self._inputs.get(name, name): np.asarray(array) for name, array in feeds.items()})
        return {self._outputs.get(name, name): array for name, array in found.items()}


def by_value(names: Mapping[str, str]) -> dict[str, str]:
    return {own: name for name, own in names.items()}
