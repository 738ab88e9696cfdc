"""A model, cut into the stages of lockstep, whatever its framework.

A front-end says what its BatchNorms are (`StagePlan.find`), what its operators read, make and cost (`operations`), and how a stage runs
(`stage`). What runs in which stage, and what waits in between, is decided here and in `schedule`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from bnfold.algebra.affine import Array
from bnfold.algebra.rounding import narrowed
from bnfold.data import Batch, InputSpec
from bnfold.errors import DataError, ModelError, NothingToDoError, UsageError
from bnfold.text import meant, some

from .methods import Accumulator, Statistics
from .moments import Moments, Pointwise, Samples
from .schedule import Cut, N, NormCall, Operation, cut

Values = Mapping[str, Any]  # arrays, of numpy or of the framework that computes
NOTHING: Mapping[int, Moments] = {}
Progress = Callable[[str, int, "int | None"], None]
Select = Callable[[str], bool]


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """A BatchNorm as it came. mean, variance: float64 [channels], the old statistics. epsilon: None where it isn't known."""

    name: str
    mean: Array
    variance: Array
    epsilon: float | None = None

    def refusal(self, variance: Array) -> str | None:
        """Why it would give no numbers with a new variance, float64 [channels]; None where it gives some."""
        if self.epsilon is None or not (bad := np.flatnonzero(variance + self.epsilon <= 0)).size:
            return None
        return f"its new variance of channel {bad[0]} is {variance[bad[0]]:.3g}, and with its epsilon of {self.epsilon:g} not above 0"


@dataclass(frozen=True)
class Reading:
    """The input of one call of a layer. per_activation: each element of a sample is a channel (ONNX's spatial = 0). axis: of the channels.

    through: None, or a pointwise convolution, in the stage's own arrays, that takes the value to the input.
    """

    value: str
    layer: int  # its place in Plan.layers
    call: int  # its place among all calls
    per_activation: bool = False
    through: Pointwise | None = None
    axis: int = 1


class Stage(Protocol):
    """A part of the network that ends at the inputs of some BatchNorms.

    readings: what is measured in this stage: values that `run` gives, or that it needs. needs: the values that were left by earlier
    stages, or that are the data's, and are asked for here. keeps: the values that later stages need, of those from before, the data's and
    this stage's own; all others are dropped.
    """

    readings: list[Reading]
    needs: list[str]
    keeps: dict[str, None]

    def run(self, values: Values, own: Mapping[int, Moments] = NOTHING) -> Values:
        """One micro-batch: from the values that it needs to those that it computes. Raises DataError where they don't fit the network.

        own: by call, the moments with which it is normalised in this micro-batch, in a plan whose stages were asked for so.
        """
        ...

    def measure(self, array: Any, through: Pointwise | None = None) -> Moments | Samples:
        """A value of its own, [samples, channels, ...], or what is made of it: arrays may lie on a device."""
        ...

    def waiting(self, array: Any, room: int) -> Any:
        """A value of its own as it waits for a later stage: on its device, where that has room for so many bytes, else as numpy's array."""
        ...


@dataclass(eq=False)
class Measurement:
    """What the data said. tallies: one for each layer. samples, batches: how many there were, in all processes together.

    peak_bytes, spilled_bytes: the most bytes that waited at once, and those of them that went to disk.
    """

    tallies: list[Accumulator]
    samples: int = 0
    batches: int = 0
    peak_bytes: int = 0
    spilled_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def count(self, parts: Sequence[Measurement]) -> None:
        """Count the data of all processes. Raises DataError where there were none."""
        self.samples, self.batches = sum(part.samples for part in parts), sum(part.batches for part in parts)
        if not self.batches:
            raise DataError("the data hold no batch, so there is nothing to measure: give at least one sample")


def every(name: str) -> bool:
    return True


class Selection:
    """The names of BatchNorms that match one of `layers` (all, where there are none) and none of `skipped`; remembers what it was asked.

    Patterns are those of the shell: * for anything, ? for one character, [abc] for one of these.
    """

    def __init__(self, layers: Sequence[str] = (), skipped: Sequence[str] = ()) -> None:
        self._layers, self._skipped = tuple(layers), tuple(skipped)
        self._names: dict[str, None] = {}

    def __call__(self, name: str) -> bool:
        self._names[name] = None
        return (not self._layers or _any(name, self._layers)) and not _any(name, self._skipped)

    def check(self) -> None:
        """UsageError for a pattern that matches none of the names asked for."""
        for pattern in (*self._layers, *self._skipped):
            if not any(fnmatchcase(name, pattern) for name in self._names):
                names = list(self._names)
                raise UsageError(f"no BatchNorm is called {pattern!r}; there are {some(names)}{meant(pattern, names)}")


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


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

    def __init__(self, select: Select, freeze: bool) -> None:
        self.select, self.freeze = select, freeze
        self.notes: list[str] = []
        self.layers: list[BatchNorm] = []
        self.calls: list[NormCall[N, V]] = []
        self.frozen: set[int] = set()
        self.statistics: dict[int, list[npt.NDArray[Any]]] = {}
        self.keys: list[Any] = []
        self._places: dict[Any, int] = {}
        self.flat: Callable[[Any], dict[str, Any] | None] | None = None  # takes a batch in the form in which the model is called

    @property
    def device_room(self) -> int:
        """Bytes of a device's own memory in which values may wait; 0 where all computing is done in the host's."""
        return 0

    def cut(self) -> None:
        """Find what there is to measure, and cut. Raises NothingToDoError where there is nothing, ModelError for an epsilon of NaN."""
        self.find()
        if not self.calls:
            why = "; ".join(self.notes) or (self.none_found if self.select is every else "no BatchNorm is selected")
            raise NothingToDoError(f"there are no statistics to measure: {why}")
        for layer in self.layers:
            if layer.epsilon is not None and not np.isfinite(layer.epsilon):
                raise ModelError(f"the epsilon of {layer.name} is {layer.epsilon}, so it gives no numbers: correct it in the model")
        self._operations = list(self.operations())
        values = dict.fromkeys(value for each in self._operations for value in (*each.reads, *each.makes))
        sizes = {value: size for value in values if (size := self.nbytes(value)) is not None}
        short = {each.makes[0]: each for each in self._operations if each.pointwise and each.reads}
        calls = [self._shortened(call, short.get(call.source)) for call in self.calls]
        self._cuts, dependent = cut(self._operations, calls, sizes)
        self.notes += [
            f"{self.layers[layer].name} is called several times, and one call depends on another: its statistics are those of all "
            f"calls, and each call was normalised with those of the calls up to it"
            for layer in sorted(dependent)
        ]

    def place(self, key: Any, layer: Callable[[], BatchNorm]) -> int:
        """That of a call's layer. key: the same for all calls of a layer, which is made at the first."""
        if key not in self._places:
            self._places[key] = len(self.keys)
            self.layers.append(layer())
            self.keys.append(key)
        return self._places[key]

    @cached_property
    def nodes(self) -> dict[int, list[N]]:
        """The operators that normalise, by layer; once all are found."""
        found: dict[int, list[N]] = {}
        for call in self.calls:
            found.setdefault(call.layer, []).append(call.node)
        return found

    def keeps(self, name: str, why: str) -> None:
        self.notes.append(f"{name} keeps its statistics: {why}")

    @staticmethod
    def _shortened(call: NormCall[N, V], made: Operation[N, V] | None) -> NormCall[N, V]:
        """A call that is measured without running the pointwise convolution that makes its input."""
        if made is None or call.per_activation or call.axis != 1:
            return call
        return replace(call, source=made.reads[0], through=made.node)

    @property
    def stage_count(self) -> int:
        return len(self._cuts)

    def stages(self, own: bool = False, done: int = 0, known: Mapping[str, np.dtype[Any]] | None = None) -> Iterator[Stage]:
        """The stages in order; the next is made after the statistics that this one measured were set.

        own: each call that is measured is normalised with what `Stage.run` is told, and all stages are made before the first runs.
        done: how many are left out, whose statistics are set already; known: the types of the values that they left for later stages.
        """
        cuts = cut(self._operations, self.calls)[0] if own else self._cuts  # where nothing waits, nothing runs twice
        place = {call.node: i for i, call in enumerate(self.calls)}
        for number, part in enumerate(cuts[done:], done):
            readings = [
                Reading(str(each.source.name), each.layer, place[each.node], each.per_activation, through, each.axis)
                for each in part.calls
                for through in (None if each.through is None else self.weights(each.through),)
            ]
            yield self.stage(part, readings, own, first=number == 0, last=number == len(cuts) - 1)

    def set(self, layer: int, statistics: Statistics) -> str | None:
        """Take over the statistics of a layer, which is normalised with them from now on. Returns why not, where they can't be stored."""
        forms = self.forms(layer)
        stored = narrowed(statistics, [dtype for dtype, _ in forms])
        if isinstance(stored, str):
            self.statistics.pop(layer, None)
            return stored
        self.statistics[layer] = [array.reshape(shape) for array, (_, shape) in zip(stored, forms, strict=True)]
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
    def identity(self) -> str:
        """The same for the same operators and numbers, whatever their names."""

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
    def weights(self, convolution: N) -> Pointwise: ...

    @abstractmethod
    def forms(self, layer: int) -> Sequence[tuple[np.dtype[Any], tuple[int, ...]]]:
        """The types and shapes in which a layer's mean and variance are stored."""

    @abstractmethod
    def stage(self, part: Cut[N, V], readings: list[Reading], own: bool, *, first: bool, last: bool) -> Stage: ...

    @abstractmethod
    def write(self) -> Any:
        """A copy of the model with the statistics that were set."""


Plan = StagePlan[Any, Any]
