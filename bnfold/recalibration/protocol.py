"""What lockstep asks of a network that is cut into stages, and what it hands on: types alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bnfold.algebra.affine import Array
from bnfold.errors import DataError

from .methods import Accumulator
from .moments import Moments, Pointwise, Samples

Values = Mapping[str, Any]  # arrays, of numpy or of the framework that computes
NOTHING: Mapping[int, Moments] = {}
Progress = Callable[[str, int, "int | None"], None]


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """A BatchNorm as it came. mean, variance: float64 [channels], the old statistics."""

    name: str
    mean: Array
    variance: Array


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

    held, spilled: the most bytes that waited at once, and those of them that went to disk.
    """

    tallies: list[Accumulator]
    samples: int = 0
    batches: int = 0
    held: int = 0
    spilled: int = 0
    notes: list[str] = field(default_factory=list)

    def count(self, parts: Sequence[Measurement]) -> None:
        """Count the data of all processes. Raises DataError where there were none."""
        self.samples, self.batches = sum(part.samples for part in parts), sum(part.batches for part in parts)
        if not self.batches:
            raise DataError("the data hold no batch, so there is nothing to measure: give at least one sample")
