"""What `verify` asks of a model, whatever framework it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from .algebra.graph import Graph, Value

if TYPE_CHECKING:
    from .data import Batch, InputSpec
    from .folding.search import Outcome


@dataclass(frozen=True)
class Port:
    """An input or output as the model states it. shape: None where even the rank is left open; None or a name for a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Plan:
    """A model in normal form: all that can be folded is planned, nothing is written.

    outputs: those of the model, by name. inputs: the values that a caller feeds. constants: outputs that are the same whatever goes in,
    and what inputs are where nobody feeds them. narrowest: the largest number of the narrowest floating-point type in which it computes,
    and the operator that gives it.
    """

    graph: Graph
    outputs: Mapping[str, Value]
    outcomes: tuple[Outcome, ...]
    inputs: frozenset[Value] = frozenset()
    constants: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    narrowest: tuple[float, str] = (np.inf, "")


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


class Runner(Protocol):
    """Something that computes outputs by name from inputs by name. It may have a `placement`, complete after a run."""

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]: ...


@runtime_checkable
class Subject(Protocol):
    """One model.

    roundoff: unit roundoff of its coarsest floating-point type, 2**-24 for float32.
    optimisations: with what settings of the runtime a candidate is tried; a reference runs with the first.
    """

    @property
    def roundoff(self) -> float: ...

    @property
    def optimisations(self) -> tuple[str, ...]: ...

    def identity(self) -> str | None:
        """The same for two models of the same operators and numbers, whatever their names; None where that can't be told."""

    def inputs(self) -> list[InputSpec]:
        """What a caller must feed."""

    def ports(self) -> tuple[list[Port], list[Port], list[Port]]:
        """Inputs, inputs with a default that callers may override, and outputs, each in order."""

    def example(self) -> Batch | None:
        """A few samples that came with the model; None where none did."""

    def random(self, *, batch: int, seed: int, input_shapes: Mapping[str, tuple[int, ...]] | None) -> Batch:
        """Random data that the model takes."""

    def plan(self, *, clone: bool = False) -> Plan:
        """The normal form. clone: with operators doubled for a BatchNorm's sake."""

    def oracle(self, *, jitter: int | None = None, outputs: Iterable[str] = ()) -> Runner:
        """The model in float64; with a seed, every weight moved by up to half a unit in the last place. UnsupportedError: can't be had."""

    def deployed(self, provider: str, optimisation: str, *, jitter: int | None = None, precision: str = "full") -> Runner:
        """The model in its stored types on a provider or device; jitter as above. UnsupportedError, DeviceError."""

    def precisions(self, provider: str) -> tuple[str, ...]:
        """In which it is tried there: "full", or "as deployed" (TF32, say), or both, of which the first decides."""

    def require(self, provider: str) -> None:
        """Raise DeviceError or UsageError where there is no such provider or device."""

    def layers(self) -> dict[str, str]:
        """The inner values, in topological order, and the name of the layer that computes each."""

    def folded(self) -> Subject | None:
        """The model with its BatchNorms folded; None where that can't be."""


def roundoff(dtype: np.dtype[Any]) -> float:
    """Unit roundoff of a floating-point type: half the distance from 1 to the next number."""
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).eps) / 2  # type: ignore[no-untyped-call]
