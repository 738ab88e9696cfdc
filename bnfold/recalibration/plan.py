"""A model, cut into the stages of lockstep, whatever its framework.

A front-end says what its BatchNorms are (`StagePlan.find`), what its operators read, make and cost (`operations`), and how a stage runs
(`stage`). What runs in which stage, and what waits in between, is decided here and in `schedule`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from bnfold.algebra.rounding import narrowed
from bnfold.errors import NothingToDoError

from .methods import Statistics
from .moments import Pointwise
from .protocol import BatchNorm, Reading, Stage
from .schedule import Cut, N, NormCall, Operation, cut
from .selection import Select, every

if TYPE_CHECKING:
    from bnfold.data import Batch, InputSpec


class Named(Hashable, Protocol):
    @property
    def name(self) -> str | None: ...


V = TypeVar("V", bound=Named)


class StagePlan(ABC, Generic[N, V]):
    """A model, cut into stages. It isn't touched before `write`.

    layers: the BatchNorms that are measured; calls: theirs. A layer that is called several times has the pooled statistics of all its
    calls; where one call depends on the outcome of another, each is normalised, on the way, with those of the calls measured up to it.
    frozen: the layers that had no statistics of their own. statistics: those that were set, by layer, as they are stored. notes: what the
    report says of BatchNorms that keep theirs, and why.
    """

    none_found = "the model holds no BatchNorm"
    device_room = 0  # bytes of a device's own memory in which values may wait; 0 where all computing is done in the host's

    def __init__(self, select: Select, freeze: bool) -> None:
        self.select, self.freeze = select, freeze
        self.notes: list[str] = []
        self.layers: list[BatchNorm] = []
        self.calls: list[NormCall[N, V]] = []
        self.frozen: set[int] = set()
        self.statistics: dict[int, list[npt.NDArray[Any]]] = {}
        self.keys: list[Any] = []
        self.flat: Callable[[Any], dict[str, Any] | None] | None = None  # takes a batch in the form in which the model is called

    def cut(self) -> None:
        """Find what there is to measure, and cut. Raises NothingToDoError where there is nothing."""
        self.find()
        if not self.calls:
            why = "; ".join(self.notes) or (self.none_found if self.select is every else "no BatchNorm is selected")
            raise NothingToDoError(f"there are no statistics to measure: {why}")
        self._operations = list(self.operations())
        values = dict.fromkeys(value for each in self._operations for value in (*each.reads, *each.makes))
        sizes = {value: size for value in values if (size := self.nbytes(value)) is not None}
        self._cuts, dependent = cut(self._operations, list(map(self._shortened, self.calls)), sizes)
        self.notes += [
            f"{self.layers[layer].name} is called several times, and one call depends on another: its statistics are those of all "
            f"calls, and each call was normalised with those of the calls up to it"
            for layer in sorted(dependent)
        ]

    def place(self, key: Any, layer: Callable[[], BatchNorm]) -> int:
        """That of a call's layer. key: the same for all calls of a layer, which is made at the first."""
        if key not in self.keys:
            self.layers.append(layer())
            self.keys.append(key)
        return self.keys.index(key)

    def keeps(self, name: str, why: str) -> None:
        self.notes.append(f"{name} keeps its statistics: {why}")

    def _shortened(self, call: NormCall[N, V]) -> NormCall[N, V]:
        made = self.pointwise(call)
        return call if made is None else dataclasses.replace(call, source=made[1], through=made[0])

    @property
    def stage_count(self) -> int:
        return len(self._cuts)

    def stages(self, own: bool = False) -> Iterator[Stage]:
        """The stages in order; the next is made after the statistics that this one measured were set.

        own: each call that is measured is normalised with what `Stage.run` is told, and all stages are made before the first runs.
        """
        cuts = cut(self._operations, self.calls)[0] if own else self._cuts  # where nothing waits, nothing runs twice
        place = {call.node: i for i, call in enumerate(self.calls)}
        for number, part in enumerate(cuts):
            readings = [
                Reading(str(each.source.name), each.layer, place[each.node], each.per_activation, self._through(each))
                for each in part.calls
            ]
            yield self.stage(part, readings, own, first=number == 0, last=number == len(cuts) - 1)

    def _through(self, call: NormCall[N, V]) -> Pointwise | None:
        return None if call.through is None else self.weights(call.through)

    def set(self, layer: int, statistics: Statistics) -> str | None:
        """Take over the statistics of a layer, which is normalised with them from now on. Returns why not, where they can't be stored."""
        stored = narrowed(statistics, self.types(layer))
        if isinstance(stored, str):
            self.statistics.pop(layer, None)
            return stored
        self.statistics[layer] = stored
        return None

    # --- what a front-end says ------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def specs(self) -> Sequence[InputSpec]:
        """What the model is fed."""

    @abstractmethod
    def outputs(self, batch: Batch) -> Mapping[str, npt.NDArray[Any]]:
        """What the model gives as it came, by output name; none of it where a BatchNorm in training mode mixes the samples of a batch."""

    @abstractmethod
    def find(self) -> None:
        """Collect the `calls` that are measured, and say of other BatchNorms that are selected why they keep their statistics."""

    @abstractmethod
    def operations(self) -> Iterator[Operation[N, V]]:
        """All operators whose outcome depends on the data, in topological order."""

    @abstractmethod
    def nbytes(self, value: V) -> int | None:
        """Of a value, at the sizes at which `Operation.work` is counted; None where nobody knows."""

    @abstractmethod
    def pointwise(self, call: NormCall[N, V]) -> tuple[N, V] | None:
        """The pointwise convolution before a BatchNorm, and what it reads: where it need not run for its moments."""

    @abstractmethod
    def weights(self, convolution: N) -> Pointwise: ...

    @abstractmethod
    def types(self, layer: int) -> Sequence[np.dtype[Any]]:
        """Those in which a layer's mean and variance are stored."""

    @abstractmethod
    def stage(self, part: Cut[N, V], readings: list[Reading], own: bool, *, first: bool, last: bool) -> Stage: ...

    @abstractmethod
    def write(self) -> Any:
        """A copy of the model with the statistics that were set."""


Plan = StagePlan[Any, Any]
