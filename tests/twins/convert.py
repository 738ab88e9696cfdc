"""An ONNX model as the module that a PyTorch user would have written: layers where torch has them, functions elsewhere.

Nodes that share their parameters are one layer that is called several times. Layers are named after their nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

Step = Callable[[dict[str, Any]], None]
RUNNING: list[Any] = []  # the twins whose forward runs: a copy's steps are the original's, and find their layers in the copy


class NotInTorchError(Exception):
    """What the model means can't be said in torch, or not in the same operators; the text says why."""


class Op:
    """A node with its attributes and what is known of its inputs."""

    def __init__(self, twin: Twin, node: onnx.NodeProto) -> None:
        self.twin, self.node = twin, node
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self.inputs, self.outputs = list(node.input), list(node.output)

    def get(self, name: str, default: Any = None) -> Any:
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] != ""

    def const(self, index: int) -> np.ndarray | None:
        return self.twin.constants.get(self.inputs[index]) if self.has(index) else None

    def ints(self, name: str, index: int, default: Any = None) -> Any:
        """A setting that is an attribute in old opsets and a constant input in new ones."""
        if name in self.attributes:
            value = self.attributes[name]
            return list(value) if isinstance(value, (list, tuple)) else [value]
        if not self.has(index):
            return default
        found = self.const(index)
        if found is None:
            raise NotInTorchError(f"{self.node.op_type}: its {name} is computed")
        return found.ravel().tolist()

    def parameter(self, index: int) -> nn.Parameter:
        """A float constant as a parameter of the module; the same for all who read it."""
        return self.twin.parameter(self.inputs[index])

    def rank(self, index: int = 0) -> int:
        rank = self.twin.ranks.get(self.inputs[index])
        if rank is None:
            raise NotInTorchError("the rank of an input isn't known")
        return rank


class Twin(nn.Module):
    """model: with float64 data and weights. Called with its inputs in order; gives a dict of its outputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from .operators import OPERATORS

        super().__init__()
        graph = model.graph
        initial = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        if model.functions or any(n.domain not in ("", "ai.onnx") for n in graph.node):
            raise NotInTorchError("it has functions of its own")
        self.names = [i.name for i in graph.input if i.name not in initial]
        if model.ir_version >= 4 and any(i.name in initial for i in graph.input):
            raise NotInTorchError("callers may override its weights")
        if graph.sparse_initializer:
            raise NotInTorchError("it has sparse weights")
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.constants: dict[str, np.ndarray] = dict(initial)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        values = [*inferred.value_info, *inferred.input, *inferred.output]
        self.ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}
        self.results = [o.name for o in graph.output]
        self._steps: list[Step] = []
        self._layers: dict[Any, str] = {}
        for node in graph.node:
            if node.op_type == "Constant":
                value = Op(self, node).get("value")
                if value is None:
                    raise NotInTorchError("it has a constant in an unusual form")
                self.constants[node.output[0]] = numpy_helper.to_array(value)
            elif node.op_type == "Identity" and node.input[0] in self.constants:
                self.constants[node.output[0]] = self.constants[node.input[0]]
            elif node.op_type not in OPERATORS:
                raise NotInTorchError(f"{node.op_type} has no counterpart")
            else:
                self._steps.append(OPERATORS[node.op_type](Op(self, node)))
        for name in self.results:
            if name in self.constants:
                self.parameter(name)

    def parameter(self, name: str) -> nn.Parameter:
        own = "p_" + "".join(c if c.isalnum() else "_" for c in name)
        if own not in self._parameters:
            self.register_parameter(own, nn.Parameter(tensor(self.constants[name])))
        found = self._parameters[own]
        assert found is not None
        return found

    def layer(self, op: Op, key: Any, make: Callable[[], nn.Module]) -> Callable[..., Tensor]:
        """A layer named after its node; the one that is there already where the key is the same. It is called by its name."""
        if key not in self._layers:
            name = "".join(c if c.isalnum() or c == "_" else "_" for c in op.node.name or f"{op.node.op_type}_{len(self._layers)}")
            while name in self._modules or hasattr(self, name):
                name += "_"
            self.add_module(name, make())
            self._layers[key] = name
        return lambda *inputs, name=self._layers[key]: getattr(RUNNING[-1], name)(*inputs)  # type: ignore[no-any-return]

    def value(self, env: dict[str, Any], name: str) -> Tensor:
        """An activation, or a constant as a parameter or buffer."""
        if name in env:
            return env[name]
        array = self.constants[name]
        return RUNNING[-1].parameter(name) if array.dtype.kind == "f" else torch.from_numpy(np.array(array))

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        env: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        RUNNING.append(self)
        try:
            for step in self._steps:
                step(env)
            return {name: self.value(env, name) for name in self.results}
        finally:
            RUNNING.pop()


def tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
        raise NotInTorchError("its weights are of an unusual type")
    return torch.from_numpy(np.array(array, dtype=np.float64))
