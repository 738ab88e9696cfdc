"""An ONNX model as `verify` sees it (see `bnfold.model`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from bnfold.data.random import random_feeds
from bnfold.folding.plan import normal_form
from bnfold.model import Plan, Port, roundoff

from .graph.constants import FLOATS
from .graph.inline import inlined
from .graph.inputs import inputs
from .graph.walk import all_graphs, all_nodes, axes, held_tensor, name_of
from .lowering.table import lowering as lowering_of
from .oracle.evaluator import Oracle, moving
from .runtime.providers import precisions, resolve
from .runtime.session import Session

if TYPE_CHECKING:
    from bnfold.data import Batch, InputSpec

    from .network import OnnxNetwork

# Rounding spreads an error evenly over one unit in the last place: variance 1/12. A stored number can only move by whole units, so
# one in twelve moves by one: the same variance.
MOVED = 1 / 12


class OnnxSubject:
    """See `bnfold.model.Subject`. The model is never changed."""

    kind = "onnx"
    optimisations = ("off", "on")

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    @cached_property
    def roundoff(self) -> float:
        kinds = {t.dtype for t in self._weights().values() if t.dtype in FLOATS}
        kinds |= {v.dtype for v in (*self.model.graph.inputs, *self.model.graph.outputs) if v.dtype in FLOATS}
        return max((roundoff(kind.numpy()) for kind in kinds), default=2.0**-24)

    def _weights(self) -> dict[ir.Value, ir.TensorProtocol]:
        """Every stored tensor, those of subgraphs and of Constant nodes too."""
        found = {}
        for graph in all_graphs(self.model.graph):
            values = (*graph.initializers.values(), *(v for node in graph for v in node.outputs))
            found.update({v: tensor for v in values if (tensor := held_tensor(v)) is not None})
        return found

    def identity(self) -> str:
        """The same for two models of the same operators, with the same attributes, and the same numbers, whatever their names."""
        digest = hashlib.sha256()
        for node in all_nodes(self.model.graph):
            digest.update(f"{node.domain}:{node.op_type}:{len(node.inputs)}:{len(node.outputs)}".encode())
            for name in sorted(node.attributes):
                made = ir.to_proto(node.attributes[name])
                digest.update(made.SerializeToString(deterministic=True) if not made.HasField("g") else name.encode())
        for tensor in self._weights().values():
            digest.update(f"{tensor.dtype}{tensor.shape}".encode() + tensor.tobytes())
        return digest.hexdigest()

    def inputs(self) -> list[InputSpec]:
        return inputs(self.model)

    def ports(self) -> tuple[list[Port], list[Port], list[Port]]:
        graph = self.model.graph
        fed = [v for v in graph.inputs if v.name not in graph.initializers]
        # Below IR version 4 every initializer is listed as an input, and none is meant to be fed.
        defaults = [v for v in graph.inputs if v.name in graph.initializers] if (self.model.ir_version or 0) >= 4 else []
        return [_port(v) for v in fed], [_port(v) for v in defaults], [_port(v) for v in graph.outputs]

    def example(self) -> Batch | None:
        return None

    def random(self, *, batch: int, seed: int, input_shapes: Mapping[str, tuple[int, ...]] | None) -> Batch:
        return random_feeds(self.inputs(), batch=batch, seed=seed, input_shapes=input_shapes)

    def plan(self, *, clone: bool = False) -> Plan:
        model = inlined(self.model)
        lowering = lowering_of(model)
        graph, known = lowering.graph(), lowering.constants
        outputs = {str(v.name): lowering.value(v) for v in model.graph.outputs if not known.is_constant(v)}
        constants = {f"output {v.name}": array for v in model.graph.outputs if (array := known.get(v)) is not None}
        fed = {f"the default of input {v.name}": held_tensor(v) for v in model.graph.inputs if not known.is_constant(v)}
        constants |= {name: tensor.numpy() for name, tensor in fed.items() if tensor is not None}
        inputs = [lowering.value(v) for v in model.graph.inputs]
        return normal_form(graph, outputs, clone=clone, inputs=inputs, constants=constants)

    def oracle(self, *, jitter: int | None = None, outputs: Iterable[str] = ()) -> Oracle:
        return Oracle(self.model, jitter=jitter, outputs=outputs)

    def deployed(self, provider: str, optimisation: str, *, jitter: int | None = None, precision: str = "full") -> Session:
        model = self.model if jitter is None else self._moved(jitter)
        return Session(model, provider=provider, optimise=optimisation == "on", precision=precision)

    def precisions(self, provider: str) -> tuple[str, ...]:
        return precisions(provider)

    def _moved(self, seed: int) -> ir.Model:
        """The model with one in twelve of its weights moved to the next stored number, up or down (see MOVED)."""
        copy = OnnxSubject(self.model.clone())
        rng, names = np.random.default_rng(seed), moving(self.model)
        for value, tensor in copy._weights().items():
            array = tensor.numpy()
            if tensor.dtype not in FLOATS or value.name not in names:
                continue
            draw = rng.random(array.shape)
            up = np.nextafter(array, np.asarray(np.inf, array.dtype))
            down = np.nextafter(array, np.asarray(-np.inf, array.dtype))
            keep = (array == 0) | ~np.isfinite(array.astype(np.float64)) | (draw >= MOVED)
            moved = ir.Tensor(np.where(keep, array, np.where(draw < MOVED / 2, up, down)), dtype=tensor.dtype, name=value.name)
            node = value.producer()
            if node is None:
                value.const_value = moved
            else:
                node.attributes.clear()
                node.attributes["value"] = ir.AttrTensor("value", moved)
        return copy.model

    def require(self, provider: str) -> None:
        resolve(provider)

    def layers(self) -> dict[str, str]:
        return {v.name: name_of(node) for node in self.model.graph for v in node.outputs if v.name}

    def network(self) -> OnnxNetwork:
        """See `bnfold.verification.normal_form`."""
        from .network import OnnxNetwork

        return OnnxNetwork(self)

    def folded(self) -> OnnxSubject | None:
        from .fuse import fuse

        model, report = fuse(self.model)
        return OnnxSubject(model) if any(layer.verdict == "folded" for layer in report.layers) else None


def _port(value: ir.Value) -> Port:
    dtype = value.type if value.dtype is None or not isinstance(value.type, ir.TensorType) else value.dtype.name.lower()
    return Port(value.name or "", str(dtype), axes(value))
