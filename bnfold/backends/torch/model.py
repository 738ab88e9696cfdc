"""A PyTorch model (see `bnfold.model`)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bnfold.algebra.rounding import roundoff
from bnfold.data.spec import Port
from bnfold.errors import NO_BATCHNORM
from bnfold.folding.options import PLAIN, FoldOptions
from bnfold.folding.plan import NormalForm, normal_form
from bnfold.model import Model
from bnfold.report import Size
from bnfold.running import Elsewhere, Extract, Shapes, Stream

from .export.call import Call, example_of, forward_names, in_places, random_example, shortened_call
from .export.copies import average
from .export.functional import entangled, functional
from .export.samples import with_samples
from .export.sizes import Sizes
from .export.tensors import NUMPY, port_of, to_numpy, to_tensor
from .export.trace import Traced, trace
from .export.walk import FLOATS, dtype_of, float_types, frame, is_batchnorm, mutates, size_of
from .fuse import fuse
from .lowering.table import lowering as lowering_of
from .runtime.interpreter import StoredTypes, TorchOracle, inner, rounds
from .runtime.session import TorchSession, device_for, device_of, precise, precisions
from .writing.checks import compared
from .writing.editor import boundary, extract
from .writing.reading import as_program

if TYPE_CHECKING:
    import onnx_ir as ir

    from bnfold.algebra.graph import Graph, Value
    from bnfold.data import Batch, InputSpec
    from bnfold.data.source import Flat
    from bnfold.report import FuseReport, VerifyReport

    from .recalibration.plan import TorchPlan


class TorchModel(Model):
    """See `bnfold.model.Model`. A module's data flow is read when it is first asked for. model: a module, an exported program, or the data
    flow of either. example: how a module is called (see `export.trace.trace`), or another model, as which it is called."""

    kind = "torch"
    nothing_to_fold = NO_BATCHNORM
    _beside_onnx = False

    def __init__(self, model: nn.Module | ExportedProgram | Traced, example: Any = None) -> None:
        self.source = model
        if isinstance(example, TorchModel):
            example = example.traced if example.states_inputs else example._call
        self._example = example
        if isinstance(model, Traced):
            self.source, self.traced = model.model, model

    @cached_property
    def traced(self) -> Traced:
        return trace(self.source, self._example)

    @property
    def _call(self) -> Any:
        """How it is called: its data flow, where that was read already."""
        return vars(self).get("traced", self._example)

    @property
    def states_inputs(self) -> bool:
        return not isinstance(self.source, nn.Module)

    @property
    def is_unread(self) -> bool:
        return not self.states_inputs and not isinstance(self._call, Traced)

    @property
    def needs_example(self) -> bool:
        return not self.states_inputs and self._call is None

    @property
    def brings_example(self) -> bool:
        return bool(getattr(self.source, "pretrained_cfg", None)) or getattr(self.source, "example_input_array", None) is not None

    @property
    def preprocessing(self) -> Mapping[str, Any] | None:
        found = getattr(self.source, "pretrained_cfg", None)
        return found if isinstance(found, Mapping) else None

    @property
    def arguments(self) -> list[str]:
        return super().arguments if self.states_inputs else forward_names(self.source)

    def called(self, like: Any = None, shapes: Shapes | None = None, types: Mapping[str, str] | None = None) -> TorchModel:
        if isinstance(like, Model) and not isinstance(like, TorchModel):  # it gives its inputs in their order
            like = tuple(map(to_tensor, like.random(batch=2, seed=0, input_shapes=shapes).values()))
        elif like is None and shapes and not self.states_inputs:
            return self._as_called(random_example(self.source, shapes, types or {}))
        return TorchModel(self.source, like)

    def fed(self, item: Any, count: int | None = None) -> TorchModel:
        if self.states_inputs:
            return self
        example = example_of(self.source, item)
        return self._as_called(example if count is None else shortened_call(self.source, example, count))

    def _as_called(self, example: Any) -> TorchModel:
        """Called with what has a position by that, and not by name: an exported program is called just as its module was traced."""
        call = Call((), dict(example)) if isinstance(example, Mapping) else example
        return TorchModel(self.source, in_places(self.source, call) if isinstance(call, Call) else call)

    def fewer(self, samples: int) -> TorchModel | None:
        if not isinstance(self.source, ExportedProgram) or (made := with_samples(self.source, samples)) is None:
            return None
        fewer = TorchModel(made)
        fewer.rounded, fewer._beside_onnx = self.rounded, self._beside_onnx
        return fewer

    def beside(self, other: Model) -> TorchModel:
        """Then providers of ONNX Runtime are asked for, and this model runs on the CPU where they name no device of PyTorch's."""
        made = copy.copy(self)
        made._beside_onnx = True
        return made

    @property
    def calls(self) -> Sequence[TorchModel]:
        return (self, *map(TorchModel, self.traced.others))

    @cached_property
    def roundoff(self) -> float:
        return max((roundoff(NUMPY[kind]) for kind in float_types(self.traced.program)), default=2.0**-24)

    @cached_property
    def arithmetic(self) -> float:
        computed = (dtype_of(op) for op in self.traced.program.graph.nodes)
        return max(self.roundoff, *(roundoff(NUMPY[kind]) for kind in computed if kind in FLOATS))

    @property
    def holds_batchnorm(self) -> bool:
        return any(map(is_batchnorm, self.traced.program.graph.nodes))

    def size(self) -> Size | None:
        return size_of(self.traced.program) if self.states_inputs or "traced" in vars(self) else None

    def identity(self) -> str:
        return self.traced.identity()

    @property
    def specs(self) -> list[InputSpec]:
        return self.traced.specs

    @property
    def flat(self) -> Flat:
        return self.traced.flat

    def interface(self) -> tuple[list[Port], list[Port], list[Port]]:
        inputs = [port_of(op.name, op) for op in self.traced.input_nodes]
        return inputs, [], [port_of(name, op) for name, op in self.traced.output_nodes.items()]

    def example(self) -> Batch | None:
        """What the model was traced with."""
        given = self.traced.program.example_inputs
        if given is None:
            return None
        found = dict(zip(self.traced.flat_names, pytree.tree_leaves(given), strict=True))
        return {spec.name: to_numpy(found[spec.name]) for spec in self.traced.specs}

    def sizes(self) -> dict[str, int]:
        first = {spec.shape[0] for spec in self.traced.specs if spec.shape}
        return {str(symbol): size for symbol, size in Sizes(self.traced.program).probes[0].items() if str(symbol) not in first}

    def normal_form(self, options: FoldOptions = PLAIN) -> NormalForm:
        # As a program, not as a module: what can be folded is a matter of the function, not of who wrote the code.
        lowering = lowering_of(Traced(self.traced.program, self.traced.program))
        graph = lowering.graph()
        by_name = {op.name: op for op in lowering.program.graph.nodes}
        fed = [lowering.value(by_name[op.name]) for op in self.traced.input_nodes]
        for op, value in zip(self.traced.input_nodes, fed, strict=True):
            value.name = op.name
        named = Traced(lowering.program, lowering.program).output_nodes.items()
        fixed = {name: op for name, op in named if lowering.constants.is_constant(op)}
        constants = {f"output {name}": array for name, op in fixed.items() if (array := lowering.const(op)) is not None}
        outputs = {name: value for name, value in lowering.named_outputs.items() if name not in fixed}
        return normal_form(graph, outputs, options, inputs=fed, constants=constants)

    def oracle(self, *, jitter: int | None = None, outputs: Iterable[str] = ()) -> TorchOracle:
        return TorchOracle(self.traced, jitter=jitter, outputs=outputs, rounds=self.rounded)

    def rounds(self) -> bool:
        return rounds(self.traced.program)

    def deployed(
        self, provider: str, optimisation: str, *, jitter: int | None = None, precision: str = "full", threads: int = 0
    ) -> TorchSession:
        return TorchSession(self.traced, device=self._device(provider), jitter=jitter, precision=precision, threads=threads)

    def precisions(self, provider: str) -> tuple[str, ...]:
        return precisions(self._device(provider))

    def computing(self) -> AbstractContextManager[None]:
        return precise()

    def elsewhere(self, candidate: Model) -> Elsewhere | None:
        return compared(self.traced, candidate.traced) if isinstance(candidate, TorchModel) else None

    def _device(self, provider: str) -> str:
        return device_for(provider) if self._beside_onnx else provider

    def place(self, provider: str, device: str | None) -> str:
        return device or provider

    def require(self, provider: str) -> None:
        device_of(self._device(provider))

    def layers(self) -> dict[str, str]:
        return {op.name: frame(op) or op.name for op in inner(self.traced)}

    # --- inner values, by the names of the exported graph that is lowered --------------------------------------------------------------

    @cached_property
    def _functional(self) -> Traced:
        program = self.traced.program
        program = functional(program) if entangled(program) else program
        return Traced(program, program)

    def lowered(self) -> tuple[Graph, Mapping[str, Value]]:
        lowering = lowering_of(self._functional)
        graph = lowering.graph()
        for op in self._functional.input_nodes:
            lowering.value(op).name = op.name
        return graph, lowering.named_outputs

    def stream(self, feeds: Batch, wanted: Iterable[str], *, jitter: int | None = None, exact: bool = True) -> Stream:
        names = set(wanted)
        steps = TorchOracle(self._functional, jitter=jitter) if exact else StoredTypes(self._functional, jitter=jitter)
        for op, value in steps.values(feeds):
            if op.name in names and isinstance(value, Tensor):
                written = mutates(op) or any(mutates(user) for user in op.users)
                yield op.name, to_numpy(value.clone() if written else value)

    def edge(self, output: str, stops: Collection[str]) -> list[str]:
        return boundary(self._functional.program, output, {*stops, *(op.name for op in self._functional.input_nodes)})

    def types(self, names: Iterable[str]) -> dict[str, Any]:
        kinds = {op.name: dtype_of(op) for op in self._functional.program.graph.nodes}
        return {name: NUMPY[kind] for name in names if (kind := kinds.get(name)) in NUMPY}

    def part(self, inputs: Mapping[str, npt.NDArray[Any]], output: str, also: Iterable[str] = ()) -> Extract:
        return Extract(".pt2", extract(self._functional.program, inputs, [output, *also]))

    # --- what is made of it --------------------------------------------------------------------------------------------------------------

    def folded(self, options: FoldOptions = PLAIN) -> tuple[TorchModel, FuseReport]:
        made, report = fuse(self.traced, options)
        return TorchModel(made, self), report

    def as_graph(self) -> Model:
        return TorchModel(as_program(self.traced)) if isinstance(self.source, nn.Module) else super().as_graph()

    def in_source_form(self, made: Any, *, changed: bool = True) -> Any:
        return made.module() if isinstance(self.source, nn.Module) and isinstance(made, ExportedProgram) else made

    def averaged(self, others: Sequence[Model], shares: Sequence[float]) -> nn.Module:
        return average([self.source, *(other.source for other in others)], shares)

    def remade(self, made: nn.Module | ExportedProgram) -> TorchModel:
        return TorchModel(made, self)

    def lockstep(self, **options: Any) -> TorchPlan:
        from .recalibration.plan import plan_of

        return plan_of(self.source, self._call, **options)

    def save(self, path: str | Path, *, force: bool = False, as_state: bool = False, plain_state: bool = False) -> list[Path]:
        from .files.save import save

        save(self.source, path, check=_held_against, force=force, example=self._call, as_state=as_state, plain_state=plain_state)
        return [Path(path)]

    def reloaded(self, path: Path, *, as_state: bool = False) -> str:
        from .files.save import reloaded

        return reloaded(self.source, path, as_state=as_state)


def _held_against(traced: Traced, made: ir.Model) -> VerifyReport:
    """Whether an ONNX model is what a PyTorch model is."""
    from bnfold.backends.onnx.model import OnnxModel
    from bnfold.verification.verify import check_fold

    return check_fold(TorchModel(traced), OnnxModel(made))
