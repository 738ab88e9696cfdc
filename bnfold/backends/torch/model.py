"""A PyTorch model as `verify` sees it (see `bnfold.model`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node as Op
from torch.utils import _pytree as pytree

from bnfold.data.random import random_feeds
from bnfold.errors import BnfoldError
from bnfold.folding.plan import normal_form
from bnfold.model import Plan, Port, roundoff

from .export.sizes import Sizes
from .export.trace import NUMPY, Traced, to_numpy, trace
from .export.walk import FLOATS, frame
from .lowering.table import lowering as lowering_of
from .runtime.session import Oracle, Session, device_of, inner, precisions

if TYPE_CHECKING:
    from bnfold.data import Batch, InputSpec

    from .network import TorchNetwork

# The types by the names that ONNX has for them, so that a model of one framework can be held against one of the other.
NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float",
    torch.float64: "double",
    torch.bool: "bool",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}


class TorchSubject:
    """See `bnfold.model.Subject`. The model is never changed. beside_onnx: whether it is held against an ONNX model.

    Then the providers that are asked for are ONNX Runtime's, and this model runs on the CPU where they name no device of PyTorch's.
    """

    kind = "torch"
    optimisations = ("off",)

    def __init__(self, traced: Traced, *, beside_onnx: bool = False) -> None:
        self.traced = traced
        self._beside_onnx = beside_onnx

    @cached_property
    def roundoff(self) -> float:
        program = self.traced.program
        held = (*program.state_dict.values(), *program.constants.values())
        kinds = {t.dtype for t in held if isinstance(t, Tensor) and t.dtype in FLOATS}
        kinds |= {op.meta["val"].dtype for op in self.traced.input_nodes if op.meta["val"].dtype in FLOATS}
        return max((roundoff(NUMPY[kind]) for kind in kinds), default=2.0**-24)

    def identity(self) -> str:
        """The same for two models of the same operators, with the same arguments, and the same numbers, whatever their names."""
        digest, program = hashlib.sha256(), self.traced.program
        for op in program.graph.nodes:
            if op.op == "call_function":
                rest = [each for each in (*op.args, *op.kwargs.items()) if not isinstance(each, Op)]
                digest.update(f"{op.target}{rest}".encode())
        for tensor in (*program.state_dict.values(), *program.constants.values()):
            if isinstance(tensor, Tensor):
                found = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + found.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def inputs(self) -> list[InputSpec]:
        return self.traced.specs

    def flat(self, item: Any) -> dict[str, Any] | None:
        """See `Traced.flat`."""
        return self.traced.flat(item)

    def ports(self) -> tuple[list[Port], list[Port], list[Port]]:
        inputs = [_port(op.name, op) for op in self.traced.input_nodes]
        return inputs, [], [_port(name, op) for name, op in self.traced.output_nodes.items()]

    def example(self) -> Batch | None:
        """What the model was traced with."""
        given = self.traced.program.example_inputs
        if given is None:
            return None
        found = dict(zip(self.traced.flat_names, pytree.tree_leaves(given), strict=True))
        return {spec.name: to_numpy(found[spec.name]) for spec in self.traced.specs}

    def random(self, *, batch: int, seed: int, input_shapes: Mapping[str, tuple[int, ...]] | None) -> Batch:
        sizes = {str(symbol): size for symbol, size in Sizes(self.traced.program).probes[0].items()}
        for spec in self.traced.specs:
            if spec.shape and isinstance(spec.shape[0], str):
                sizes.pop(spec.shape[0], None)
        return random_feeds(self.traced.specs, batch=batch, seed=seed, input_shapes=input_shapes, sizes=sizes)

    def plan(self, *, clone: bool = False) -> Plan:
        # As a program, not as a module: what can be folded is a matter of the function, not of who wrote the code.
        lowering = lowering_of(Traced(self.traced.program, self.traced.program))
        graph = lowering.graph()
        by_name = {op.name: op for op in lowering.program.graph.nodes}
        fed = [lowering.value(by_name[op.name]) for op in self.traced.input_nodes]
        for op, value in zip(self.traced.input_nodes, fed, strict=True):
            value.name = op.name
        fixed = {
            name: op for name, op in Traced(lowering.program, lowering.program).output_nodes.items() if lowering.constants.is_constant(op)
        }
        constants = {f"output {name}": array for name, op in fixed.items() if (array := lowering.const(op)) is not None}
        outputs = {name: value for name, value in lowering.outputs.items() if name not in fixed}
        return normal_form(graph, outputs, clone=clone, inputs=fed, constants=constants)

    def oracle(self, *, jitter: int | None = None, outputs: Iterable[str] = ()) -> Oracle:
        return Oracle(self.traced, jitter=jitter, outputs=outputs)

    def deployed(self, provider: str, optimisation: str, *, jitter: int | None = None, precision: str = "full") -> Session:
        return Session(self.traced, device=self._device(provider), jitter=jitter, precision=precision)

    def precisions(self, provider: str) -> tuple[str, ...]:
        return precisions(self._device(provider))

    def elsewhere(self, candidate: Any) -> tuple[Any, Any, Any, list[tuple[str, Any]]] | None:
        """What two modules give at other sizes than the traced ones: functions of a call for this one, for the candidate, and for this one
        with moved weights by a seed; and the calls with a text each. None where either is no module."""
        from .export.other_calls import compared

        other = getattr(candidate, "subject", candidate)
        return compared(self.traced, other.traced) if isinstance(other, TorchSubject) else None

    def _device(self, provider: str) -> str:
        """Where it runs for a provider, of whose options only the number of the device counts here."""
        kind, _, rest = provider.partition(":")
        if not self._beside_onnx:
            return provider
        if kind.lower() not in ("cpu", "cuda"):
            return "cpu"
        number = rest if rest.isdigit() else next((text[10:] for text in rest.split(",") if text.startswith("device_id=")), "")
        return f"cuda:{number}" if number and kind.lower() == "cuda" else kind.lower()

    def require(self, provider: str) -> None:
        device_of(self._device(provider))

    def layers(self) -> dict[str, str]:
        return {op.name: frame(op) or op.name for op in inner(self.traced)}

    def network(self) -> TorchNetwork:
        """See `bnfold.verification.normal_form`."""
        from .network import TorchNetwork

        return TorchNetwork(self)

    def folded(self) -> TorchSubject | None:
        from .fuse import fuse

        try:
            model, report = fuse(self.traced)
            if not any(layer.verdict == "folded" for layer in report.layers):
                return None
            return TorchSubject(trace(model, self.traced), beside_onnx=self._beside_onnx)
        except BnfoldError:
            return None


def _port(name: str, op: torch.fx.Node) -> Port:
    value = op.meta["val"]
    shape = tuple(n if isinstance(n, int) else int(n.node.expr) if n.node.expr.is_number else None for n in value.shape)
    return Port(name, NAMES.get(value.dtype, str(value.dtype).removeprefix("torch.")), shape)
