"""An ONNX model (see `bnfold.model`)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from bnfold.algebra.rounding import roundoff
from bnfold.data.spec import Port
from bnfold.errors import ALREADY_FOLDED, OTHER_NETWORK, ModelError
from bnfold.folding.options import PLAIN, FoldOptions
from bnfold.folding.plan import NormalForm, normal_form
from bnfold.model import Model
from bnfold.report import Size
from bnfold.running import Extract, Stream

from .files.load import from_proto, save, to_proto
from .graph.constants import FLOATS
from .graph.edit import extract, inlined, reads
from .graph.proto import identity, self_contained, stored_tensors
from .graph.ranges import inputs
from .graph.samples import with_samples
from .graph.walk import all_graphs, all_nodes, axes, batchnorms, held_tensor, name_of
from .graph.weights import computed_in
from .lowering.table import lower
from .lowering.table import lowering as lowering_of
from .oracle.widen import narrower

if TYPE_CHECKING:
    from bnfold.algebra.graph import Graph, Value
    from bnfold.data import Batch, InputSpec
    from bnfold.report import FuseReport

    from .oracle.evaluator import Oracle
    from .recalibration.plan import OnnxPlan
    from .runtime.bisect import Culprit
    from .runtime.session import Session

CHUNK = 8  # values that one run in the stored types gives out, for ONNX Runtime gives all of them at the end
# Rounding spreads an error evenly over one unit in the last place: variance 1/12. A stored number can only move by whole units, so
# one in twelve moves by one: the same variance.
MOVED = 1 / 12


class OnnxModel(Model):
    """See `bnfold.model.Model`. model: as onnx_ir has it; a proto is read once, here."""

    kind = "onnx"
    optimisations = ("off", "on")
    nothing_to_fold = ALREADY_FOLDED  # where it was exported, say

    def __init__(self, model: ir.Model | onnx.ModelProto) -> None:
        self.source = model
        self.model = model if isinstance(model, ir.Model) else from_proto(model)

    @cached_property
    def roundoff(self) -> float:
        kinds = {t.dtype for t in stored_tensors(self.model).values() if t.dtype in FLOATS}
        kinds |= {v.dtype for v in (*self.model.graph.inputs, *self.model.graph.outputs) if v.dtype in FLOATS}
        return max((roundoff(kind.numpy()) for kind in kinds), default=2.0**-24)

    @cached_property
    def arithmetic(self) -> float:
        kinds = computed_in(self._skeleton.graph, self._inlined.graph.initializers)
        return max([self.roundoff, *(roundoff(ir.DataType(kind).numpy()) for kind in kinds)])

    @property
    def holds_batchnorm(self) -> bool:
        return any(True for _ in batchnorms(self.model))

    def size(self) -> Size:
        operators = sum(node.op_type != "Constant" for node in all_nodes(self._inlined.graph))
        stored = stored_tensors(self.model).values()
        return Size(operators, sum(t.nbytes for t in stored), sum(t.size for t in stored if t.dtype in FLOATS))

    def identity(self) -> str:
        return identity(self.model)

    @property
    def specs(self) -> list[InputSpec]:
        return inputs(self.model)

    def interface(self) -> tuple[list[Port], list[Port], list[Port]]:
        graph = self.model.graph
        fed = [v for v in graph.inputs if v.name not in graph.initializers]
        # Below IR version 4 every initializer is listed as an input, and none is meant to be fed.
        defaults = [v for v in graph.inputs if v.name in graph.initializers] if (self.model.ir_version or 0) >= 4 else []
        return [_port(v) for v in fed], [_port(v) for v in defaults], [_port(v) for v in graph.outputs]

    def normal_form(self, options: FoldOptions = PLAIN) -> NormalForm:
        model = self._inlined
        lowering = lowering_of(model)
        graph, known = lowering.graph(), lowering.constants
        outputs = {str(v.name): lowering.value(v) for v in model.graph.outputs if not known.is_constant(v)}
        constants = {f"output {v.name}": array for v in model.graph.outputs if (array := known.get(v)) is not None}
        fed = {f"the default of input {v.name}": held_tensor(v) for v in model.graph.inputs if not known.is_constant(v)}
        constants |= {name: tensor.numpy() for name, tensor in fed.items() if tensor is not None}
        inputs = [lowering.value(v) for v in model.graph.inputs]
        return normal_form(graph, outputs, options, inputs=inputs, constants=constants)

    def fewer(self, samples: int) -> OnnxModel | None:
        made = with_samples(self.model, samples)
        return None if made is None else OnnxModel(made)

    def oracle(self, *, jitter: int | None = None, outputs: Iterable[str] = ()) -> Oracle:
        from .oracle.evaluator import Oracle

        return Oracle(self.model, skeleton=self._bare, jitter=jitter, outputs=outputs, rounds=self.rounded)

    def rounds(self) -> bool:
        from .oracle.quantised import rounds

        return any(rounds(self._skeleton.graph, self._inlined.graph.initializers))

    def deployed(
        self, provider: str, optimisation: str, *, jitter: int | None = None, precision: str = "full", threads: int = 0
    ) -> Session:
        from .runtime.session import Session

        model = self.model if jitter is None else self._moved(jitter)
        return Session(model, provider=provider, optimise=optimisation == "on", precision=precision, threads=threads)

    def precisions(self, provider: str) -> tuple[str, ...]:
        from .runtime.providers import precisions

        return precisions(provider)

    def _moved(self, seed: int) -> ir.Model:
        """The model with one in twelve of its weights moved to the next number that is stored or that a cast leaves (see MOVED)."""
        from .oracle.evaluator import moving

        copy = OnnxModel(self.model.clone())
        rng, kinds = np.random.default_rng(seed), moving(self.model)
        for value, tensor in stored_tensors(copy.model).items():
            array = tensor.numpy()
            if tensor.dtype not in FLOATS or value.name not in kinds:
                continue
            draw = rng.random(array.shape)
            with np.errstate(over="ignore"):
                near = array.astype(ir.DataType(narrower(tensor.dtype.value, kinds[value.name])).numpy(), copy=False)
            up, down = (np.nextafter(near, np.asarray(way, near.dtype)).astype(array.dtype) for way in (np.inf, -np.inf))
            keep = (array == 0) | ~np.isfinite(near.astype(np.float64)) | (draw >= MOVED)
            moved = ir.Tensor(np.where(keep, array, np.where(draw < MOVED / 2, up, down)), dtype=tensor.dtype, name=value.name)
            node = value.producer()
            if node is None:
                value.const_value = moved
            else:
                node.attributes.clear()
                node.attributes["value"] = ir.AttrTensor("value", moved)
        return copy.model

    def require(self, provider: str) -> None:
        from .runtime.providers import resolve

        resolve(provider)

    def layers(self) -> dict[str, str]:
        return {v.name: name_of(node) for node in self.model.graph for v in node.outputs if v.name}

    # --- inner values --------------------------------------------------------------------------------------------------------------

    def lowered(self) -> tuple[Graph, Mapping[str, Value]]:
        graph = lower(self._inlined)
        named = {v.name: v for node in graph.nodes for v in node.outputs}
        outputs = {str(v.name): named[v.name] for g in all_graphs(self._inlined.graph) for v in g.outputs if v.name in named}
        return graph, outputs

    def stream(self, feeds: Batch, wanted: Iterable[str], *, jitter: int | None = None, exact: bool = True) -> Stream:
        from .oracle.evaluator import Oracle
        from .runtime.session import Session

        known = {v.name for node in self._inlined.graph for v in node.outputs}
        names = [name for name in wanted if name in known]
        if exact:
            yield from Oracle(self._inlined, skeleton=self._skeleton, jitter=jitter, rounds=self.rounded).stream(feeds, names)
            return
        order = [v.name for node in self._inlined.graph for v in node.outputs if v.name in set(names)]
        model = self._inlined if jitter is None else OnnxModel(self._inlined)._moved(jitter)
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            found = Session(model, outputs=[name for name in chunk if name]).run(feeds)
            for name in chunk:
                if name:
                    yield name, found.pop(name)

    def edge(self, output: str, stops: Collection[str]) -> list[str]:
        graph = self._skeleton.graph
        made = {name: node for node in graph.node for name in node.output if name}
        stored = set(self._inlined.graph.initializers)
        found: dict[str, None] = {}
        seen, stack = {output}, [output]
        while stack:
            for name in sorted(reads(made[stack.pop()])):
                if name and name not in seen and name not in stored:
                    seen.add(name)
                    if name in stops or name not in made:
                        found[name] = None
                    else:
                        stack.append(name)
        return list(found)

    @cached_property
    def _inlined(self) -> ir.Model:
        """With functions in the places of their calls; the model itself, where it has none."""
        return inlined(self.model) if self.model.functions else self.model

    @cached_property
    def _skeleton(self) -> onnx.ModelProto:
        return self_contained(self._inlined, initializers=False) if self.model.functions else self._bare

    @cached_property
    def _bare(self) -> onnx.ModelProto:
        return self_contained(self.model, initializers=False)

    def types(self, names: Iterable[str]) -> dict[str, Any]:
        wanted = set(names)
        values = [*self._inlined.graph.inputs, *(v for node in self._inlined.graph for v in node.outputs)]
        return {str(v.name): v.dtype.numpy() for v in values if v.name in wanted and v.dtype is not None}

    def part(self, inputs: Mapping[str, npt.NDArray[Any]], output: str, also: Iterable[str] = ()) -> Extract:
        proto = extract(self_contained(self._inlined), inputs, [output, *also])
        return Extract(".onnx", proto.SerializeToString())

    def culprit(self, feeds: Batch, provider: str, unit: float) -> Culprit | None:
        """Which optimisation of ONNX Runtime harms the model (see `bisect`)."""
        from .runtime.bisect import culprit

        return culprit(self._inlined, feeds, provider, unit)

    # --- what is made of it --------------------------------------------------------------------------------------------------------

    def folded(self, options: FoldOptions = PLAIN) -> tuple[OnnxModel, FuseReport]:
        from .fuse import fuse

        made, report = fuse(self.model, options)
        return OnnxModel(made), report

    def averaged(self, others: Sequence[Model], shares: Sequence[float]) -> ir.Model:
        made = self.model.clone()
        for name, value in made.graph.initializers.items():
            tensors = [_weight(each, name, number) for number, each in enumerate((self, *others), 1)]
            first = tensors[0]
            for number, tensor in enumerate(tensors, 1):
                if (tensor.dtype, tensor.shape) != (first.dtype, first.shape):
                    raise ModelError(f"{OTHER_NETWORK.format(number)}: {name} has another type or shape in it")
            if first.dtype in FLOATS:
                mean = sum(share * tensor.numpy().astype(np.float64) for share, tensor in zip(shares, tensors, strict=True))
                value.const_value = ir.Tensor(np.asarray(mean).astype(first.numpy().dtype), dtype=first.dtype, name=name)
            elif any(not np.array_equal(tensor.numpy(), first.numpy()) for tensor in tensors):
                raise ModelError(f"{name} holds integers, which differ between the models; average them before they are quantised")
        for number, each in enumerate(_onnx(others), 2):
            if [node.op_type for node in each.model.graph] != [node.op_type for node in made.graph]:
                raise ModelError(f"{OTHER_NETWORK.format(number)}: their operators differ")
        return made

    def remade(self, made: ir.Model) -> OnnxModel:
        return OnnxModel(made)

    def lockstep(self, *, device: str = "cpu", **options: Any) -> OnnxPlan:
        from .recalibration.plan import plan_of

        options.pop("one_size", None)  # all axes are open, or none
        return plan_of(self.model, provider=device, **options)

    def in_source_form(self, made: ir.Model, *, changed: bool = True) -> ir.Model | onnx.ModelProto:
        if isinstance(self.source, ir.Model):
            return made
        return to_proto(made) if changed else copy.deepcopy(self.source)

    def save(self, path: str | Path, *, force: bool = False, as_state: bool = False, plain_state: bool = False) -> list[Path]:
        return save(self.model, path, force=force)


def _onnx(models: Iterable[Model]) -> list[OnnxModel]:
    if wrong := next((each for each in models if not isinstance(each, OnnxModel)), None):
        raise ModelError(f"an ONNX model can't be averaged with one of {wrong.kind}")
    return [each for each in models if isinstance(each, OnnxModel)]


def _weight(model: Model, name: str, number: int) -> ir.TensorProtocol:
    found = _onnx([model])[0].model.graph.initializers.get(name)
    if found is None or found.const_value is None:
        raise ModelError(f"{OTHER_NETWORK.format(number)}: it has no weight {name}")
    return found.const_value


def _port(value: ir.Value) -> Port:
    dtype = value.type if value.dtype is None or not isinstance(value.type, ir.TensorType) else value.dtype.name.lower()
    return Port(value.name or "", str(dtype), axes(value))
