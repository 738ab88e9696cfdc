"""What every verb asks of a model, whatever its framework: a kind of model is one class of these methods (see `backends.open`)."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt

from .data.spec import Port
from .errors import UnsupportedError, UsageError
from .folding.options import PLAIN, FoldOptions
from .folding.plan import NormalForm
from .report import Size
from .running import Elsewhere, Extract, Renaming, Runner, Shapes, Stream, by_value

if TYPE_CHECKING:
    from .algebra.graph import Graph, Value
    from .data import Batch, InputSpec
    from .data.source import Flat
    from .report import FuseReport


class Model(ABC):
    """One model. What it gives is its caller's: nothing that a method does changes the model itself. A kind of model says what stands
    under "what a kind gives", by the model's own names; the rest follows from it.
    source: the object that a caller gave. kind: the framework. optimisations: with what settings of the runtime a candidate is tried; a
    reference runs with the first. own_inputs, own_outputs: the model's own names by those that a caller uses, where these are others.
    """

    kind: ClassVar[str] = ""
    optimisations: ClassVar[tuple[str, ...]] = ("off",)
    nothing_to_fold: ClassVar[str] = ""  # what to say of a model that holds no BatchNorm
    source: Any = None
    rounded = True  # whether float64 runs keep the rounding of activations
    own_inputs: Mapping[str, str] = {}
    own_outputs: Mapping[str, str] = {}

    # --- what a kind gives: what it is, how it is called, what it computes, what is made of it --------------------------------------------

    @property
    @abstractmethod
    def roundoff(self) -> float:
        """Unit roundoff of its coarsest floating-point type, 2**-24 for float32."""

    @property
    def arithmetic(self) -> float:
        """Unit roundoff of the coarsest type in which it computes, which may be coarser than what it stores."""
        return self.roundoff

    @property
    @abstractmethod
    def specs(self) -> list[InputSpec]:
        """What a caller must feed."""

    @abstractmethod
    def interface(self) -> tuple[list[Port], list[Port], list[Port]]:
        """Inputs, inputs with a default that callers may override, and outputs, each in order."""

    @property
    def holds_batchnorm(self) -> bool:
        """Whether there is an operator of that name; what is written out of simpler ones may be there all the same."""
        return False

    def size(self) -> Size | None:
        """How large it is; None where code would have to be read for it."""
        return None

    def identity(self) -> str | None:
        """The same for two models of the same operators and numbers, whatever their names; None where that can't be told."""
        return None

    def example(self) -> Batch | None:
        """A few samples that came with the model; None where none did."""
        return None

    def sizes(self) -> Mapping[str, int] | None:
        """The sizes of its dynamic axes, by their names, at which it is known to run."""
        return None

    @property
    def flat(self) -> Flat | None:
        """What takes an item of somebody's data that is nested as the model's arguments are; None where these are plain tensors."""
        return None

    @abstractmethod
    def layers(self) -> dict[str, str]:
        """The inner values, in topological order, and the name of the layer that computes each."""

    @property
    def states_inputs(self) -> bool:
        """Whether it says by itself what it takes: a file does, code doesn't."""
        return True

    @property
    def is_unread(self) -> bool:
        """Whether it says nothing of what it takes, and hasn't been called yet."""
        return False

    @property
    def preprocessing(self) -> Mapping[str, Any] | None:
        """How images become its input, as timm has it, where it says so."""
        return None

    @property
    def needs_example(self) -> bool:
        """Whether nothing at all says how it is called."""
        return False

    @property
    def brings_example(self) -> bool:
        """Whether one came with it."""
        return False

    @property
    def arguments(self) -> list[str]:
        """The names of what it is called with, as far as they are known before it is."""
        return [spec.name for spec in self.specs]

    def called(self, like: Any = None, shapes: Shapes | None = None, types: Mapping[str, str] | None = None) -> Model:
        """The model, called as in an example, as another model is, or with random data of some shapes; itself where it says how."""
        return self

    def fed(self, item: Any, count: int | None = None) -> Model:
        """The model, called as with an item of somebody's data. count: how many samples of it are enough, where it may hold many."""
        return self

    def fewer(self, samples: int) -> Model | None:
        """The model with so many samples in a batch that it fixes, by its own names; None where its shapes don't show that this can be."""
        return None

    def beside(self, other: Model) -> Model:
        """The model, as it is held against one of another framework, whose providers are asked for."""
        return self

    @property
    def calls(self) -> Sequence[Model]:
        """The model in each of the calls that its example states."""
        return (self,)

    def normal_form(self, options: FoldOptions = PLAIN) -> NormalForm:
        """See `plan`. UnsupportedError: it has none."""
        raise UnsupportedError("the model has no graph that bnfold can read")

    def lowered(self) -> tuple[Graph, Mapping[str, Value]]:
        """The neutral graph as it stands, and the outputs by name. UnsupportedError: there is none."""
        raise UnsupportedError("the model has no graph that bnfold can read")

    @abstractmethod
    def oracle(self, *, jitter: int | None = None, outputs: Iterable[str] = ()) -> Runner:
        """The model in float64; with a seed, every weight moved by up to half a unit in the last place. outputs: further values."""

    @abstractmethod
    def deployed(self, provider: str, optimisation: str, *, jitter: int | None = None, precision: str = "full", threads: int = 0) -> Runner:
        """The model in its stored types on a provider or device; jitter as above. threads: that an operator may use, 0 for as many as the
        runtime likes. UnsupportedError, DeviceError."""

    def unrounded(self) -> Model | None:
        """The model without the rounding of activations to integers, which makes it a continuous function; None where it rounds none."""
        if not self.rounds():
            return None
        made = copy.copy(self)
        made.rounded = False
        return made

    def rounds(self) -> bool:
        """Whether it rounds activations to integers."""
        return False

    def place(self, provider: str, device: str | None) -> str:
        """Which of a provider of ONNX Runtime and a device of PyTorch it runs on."""
        return provider

    @abstractmethod
    def require(self, provider: str) -> None:
        """Raise DeviceError or UsageError where there is no such provider or device."""

    def precisions(self, provider: str) -> tuple[str, ...]:
        """In which it is tried there: "full", or "as deployed" (TF32, say), or both, of which the first decides."""
        return ("full",)

    def computing(self) -> AbstractContextManager[Any]:
        """How the device computes while statistics are measured: with float32 in full."""
        return nullcontext()

    def elsewhere(self, candidate: Model) -> Elsewhere | None:
        """What code gives in other calls than those read. None where either is no code."""
        return None

    def stream(self, feeds: Batch, wanted: Iterable[str], *, jitter: int | None = None, exact: bool = True) -> Stream:
        """The wanted inner values in the order in which they are computed, in float64 or in the stored types. jitter: as for `oracle`."""
        raise UnsupportedError("the inner values of the model can't be seen")

    def part(self, inputs: Mapping[str, npt.NDArray[Any]], output: str, also: Iterable[str] = ()) -> Extract:
        """What computes one value from others, with its weights. inputs: these, in their stored types; also: other values to give out."""
        raise UnsupportedError("no part can be cut out of the model")

    def edge(self, output: str, stops: Collection[str]) -> list[str]:
        """Which of some values, or of the model's inputs, another is computed from."""
        raise UnsupportedError("the inner values of the model can't be seen")

    def types(self, names: Iterable[str]) -> dict[str, Any]:
        """The numpy types in which inner values are stored, as far as they are known."""
        return {}

    def culprit(self, feeds: Batch, provider: str, unit: float) -> Any:
        """Which optimisation of the runtime harms the model; None where none does."""
        return None

    def folded(self, options: FoldOptions = PLAIN) -> tuple[Model, FuseReport]:
        """A copy with every BatchNorm folded that can be, and what became of each."""
        raise UnsupportedError("the model can't be folded")

    def lockstep(self, **options: Any) -> Any:
        """The model cut into stages, for recalibration (`recalibration.lockstep.Plan`). NothingToDoError: it holds no BatchNorm."""
        raise UnsupportedError("the statistics of the model can't be measured")

    def averaged(self, others: Sequence[Model], shares: Sequence[float]) -> Any:
        """The model with the mean of its weights and the others'. shares: its own first, then theirs. ModelError: another network."""
        raise UnsupportedError("models of this kind can't be averaged: give checkpoints, or ONNX files")

    def remade(self, made: Any) -> Model:
        """What was made of the model, called as this one is."""
        raise UnsupportedError("nothing can be made of the model")

    def as_graph(self) -> Model:
        """The model as a graph of operators, in which a fold may change more than in code. UsageError: it is one."""
        raise UsageError("graph=True is for a torch.nn.Module, whose code folding leaves alone; this model is a graph already")

    def in_source_form(self, made: Any, *, changed: bool = True) -> Any:
        """What was made of the model, in the form in which the model came in. changed: whether it says anything else than the model."""
        return made

    def save(self, path: str | Path, *, force: bool = False, as_state: bool = False, plain_state: bool = False) -> list[Path]:
        """Write it atomically, and say which files these are (see `api.save`)."""
        raise UnsupportedError("the model can't be written")

    def reloaded(self, path: Path, *, as_state: bool = False) -> str:
        """How what `save` writes is loaded, where that isn't plain."""
        return ""

    def renamed(self, own_inputs: Mapping[str, str], own_outputs: Mapping[str, str]) -> Model:
        """The same model under other names of its inputs and outputs. own_inputs, own_outputs: its own, by those."""
        made = copy.copy(self)
        vars(made).update(own_inputs=dict(own_inputs), own_outputs=dict(own_outputs), _plans={})  # plans bear the other names
        return made

    def of_fewer(self, samples: int) -> Model | None:
        """See `fewer`."""
        made = self.fewer(samples)
        return None if made is None else made.renamed(self.own_inputs, self.own_outputs)

    def own(self, feeds: Batch) -> Batch:
        """What a caller feeds, by the model's own names."""
        return {self.own_inputs.get(name, name): array for name, array in feeds.items()}

    def inputs(self) -> list[InputSpec]:
        """What a caller must feed."""
        return [dataclasses.replace(spec, name=self._public(spec.name)) for spec in self.specs]

    def ports(self) -> tuple[list[Port], list[Port], list[Port]]:
        """See `interface`."""
        (inputs, defaults, outputs), named = self.interface(), by_value(self.own_outputs)
        given = [dataclasses.replace(port, name=self._public(port.name)) for port in inputs]
        return given, defaults, [dataclasses.replace(port, name=named.get(port.name, port.name)) for port in outputs]

    def random(self, *, batch: int, seed: int, input_shapes: Shapes | None) -> Batch:
        """Random data that the model takes."""
        from .data.random import random_feeds

        shapes = None if input_shapes is None else {self.own_inputs.get(name, name): shape for name, shape in input_shapes.items()}
        made = random_feeds(self.specs, batch=batch, seed=seed, input_shapes=shapes, sizes=self.sizes()).items()
        return {self._public(name): array for name, array in made}

    def plan(self, options: FoldOptions = PLAIN) -> NormalForm:
        """The normal form, worked out once with the same options. UnsupportedError: it has none."""
        plans: dict[FoldOptions, NormalForm] = vars(self).setdefault("_plans", {})
        if options not in plans:
            plans[options] = self.normal_form(options).renamed(by_value(self.own_inputs), by_value(self.own_outputs))
        return plans[options]

    def exact(self, *, jitter: int | None = None, outputs: Iterable[str] = ()) -> Runner:
        """The float64 oracle (see `oracle`)."""
        return self._renaming(self.oracle(jitter=jitter, outputs=outputs))

    def session(self, provider: str, optimisation: str = "off", **how: Any) -> Runner:
        """The model as it runs on a provider (see `deployed`)."""
        return self._renaming(self.deployed(provider, optimisation, **how))

    def _renaming(self, runner: Runner) -> Runner:
        return Renaming(runner, self.own_inputs, by_value(self.own_outputs)) if self.own_inputs or self.own_outputs else runner

    def _public(self, name: str) -> str:
        return next((given for given, own in self.own_inputs.items() if own == name), name)
