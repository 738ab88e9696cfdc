"""Small ONNX networks, written as they read: `net.output(net.bn(net.conv(net.input("N", 4, 8, 8), 4, 6), 6))`.

Every weight is random and lively (no zeros, no ones, no symmetry by chance), so that a coefficient which lands on the wrong
channel or is rounded twice shows. The seed is the network's name: a case is the same network in each run.
The same drawing can be had in float64 altogether, where a right fold differs by 1e-14 and not by rounding.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
Value = str


def element(dtype: Any) -> int:
    """The ONNX element type of a numpy dtype."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


class Net:
    """A graph that grows operator by operator; each method returns the name of the value that it makes.

    hold: where weights live: "initializer", "overridable" (initializers that callers may replace), "constant" (Constant nodes),
    "identity" (initializers behind an Identity). dtype: of the data and the weights; statistics: of the BatchNorms' mean and variance
    (opset 14 and later lets them differ), affine: of their gamma and beta (opset 15).
    """

    def __init__(self, seed: str, *, opset: int = 17, ir: int | None = None, dtype: str = "float32", statistics: str | None = None) -> None:
        self.rng = np.random.default_rng(zlib.crc32(seed.encode()))
        self.opset, self.ir, self.dtype, self.hold, self.named = opset, ir, DTYPES[dtype], "initializer", True
        self.statistics = self.affine = DTYPES[statistics or dtype]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.metadata: dict[str, str] = {}
        self.value_info = False
        self._names: dict[str, int] = {}
        self._prefix = ""

    # --- values ------------------------------------------------------------------------------

    def fresh(self, stem: str) -> str:
        """A name that nothing has yet."""
        self._names[stem] = self._names.get(stem, -1) + 1
        return f"{self._prefix}{stem}_{self._names[stem]}"

    def input(self, *shape: int | str | None, name: str = "x", dtype: Any = None) -> Value:
        """An input of the model; a string is a dynamic axis, None one without a name. dtype: a numpy dtype, by default the network's."""
        self.inputs.append(helper.make_tensor_value_info(name, element(self.dtype if dtype is None else dtype), shape))
        return name

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return self.rng.normal(0, scale, shape)

    def weight(self, array: np.ndarray, stem: str = "w", *, dtype: Any = None) -> Value:
        """A floating-point weight, held where the network holds its weights."""
        return self.constant(np.asarray(array).astype(self.dtype if dtype is None else dtype), stem, hold=self.hold)

    def constant(self, array: np.ndarray, stem: str = "c", *, hold: str = "initializer") -> Value:
        """A tensor of just this type."""
        name = self.fresh(stem)
        if hold == "constant":
            return self.op("Constant", value=numpy_helper.from_array(array, name), output=name)
        self.initializers.append(numpy_helper.from_array(array, name))
        if hold == "overridable":
            self.inputs.append(helper.make_tensor_value_info(name, element(array.dtype), array.shape))
        return self.op("Identity", name) if hold == "identity" else name

    def ints(self, *values: int) -> Value:
        return self.constant(np.array(values, np.int64), "i")

    def scalar(self, value: float) -> Value:
        return self.constant(np.array(value, self.dtype), "s")

    def output(self, *values: Value, dtype: Any = None, shape: Sequence[int | str] | None = None) -> None:
        """Declare outputs of the model; where no shape is given it is inferred when the model is made."""
        for value in values:
            self.outputs.append(helper.make_tensor_value_info(value, element(self.dtype if dtype is None else dtype), shape))

    # --- operators ---------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: Value, output: str | None = None, domain: str = "", **attrs: Any) -> Value:
        """One operator with one output."""
        return self.ops(op_type, *inputs, outputs=[output or self.fresh(op_type.lower())], domain=domain, **attrs)[0]

    def ops(self, op_type: str, *inputs: Value, outputs: int | list[str], domain: str = "", **attrs: Any) -> list[Value]:
        """One operator with several outputs."""
        names = [self.fresh(op_type.lower()) for _ in range(outputs)] if isinstance(outputs, int) else outputs
        label = self.fresh(f"{op_type}_node") if self.named else ""
        node = helper.make_node(op_type, inputs, names, name=label, domain=domain, **attrs)
        self.nodes.append(node)
        return names

    def filters(self, cout: int, cin: int, *kernel: int, groups: int = 1) -> Value:
        """A convolution's weight [cout, cin / groups, *kernel] whose outputs have a variance of about 1."""
        fan = cin // groups * int(np.prod(kernel))
        return self.weight(self.normal(cout, cin // groups, *kernel, scale=fan**-0.5), "filters")

    def bias(self, size: int) -> Value:
        return self.weight(self.normal(size), "bias")

    def conv(
        self,
        x: Value,
        cin: int,
        cout: int,
        kernel: int = 3,
        *,
        dims: int = 2,
        groups: int = 1,
        bias: bool | Value = True,
        pads: int = 0,
        weight: Value | None = None,
        **attrs: Any,
    ) -> Value:
        w = weight or self.filters(cout, cin, *(kernel,) * dims, groups=groups)
        b = [bias] if isinstance(bias, str) else [self.bias(cout)] * bias
        if pads:
            attrs["pads"] = [pads] * (2 * dims)
        return self.op("Conv", x, w, *b, kernel_shape=[kernel] * dims, group=groups, **attrs)

    def conv_transpose(
        self, x: Value, cin: int, cout: int, kernel: int = 3, *, dims: int = 2, groups: int = 1, bias: bool = True, **attrs: Any
    ) -> Value:
        w = self.weight(self.normal(cin, cout // groups, *(kernel,) * dims, scale=(cin // groups * kernel) ** -0.5), "filters")
        return self.op("ConvTranspose", x, w, *[self.bias(cout)] * bias, kernel_shape=[kernel] * dims, group=groups, **attrs)

    def matrix(self, *shape: int) -> Value:
        return self.weight(self.normal(*shape, scale=shape[-2] ** -0.5), "matrix")

    def gemm(self, x: Value, k: int, n: int, *, bias: bool | Value = True, **attrs: Any) -> Value:
        w = self.matrix(n, k) if attrs.get("transB") else self.matrix(k, n)
        return self.op("Gemm", x, w, *([bias] if isinstance(bias, str) else [self.bias(n)] * bias), **attrs)

    def bn_params(self, channels: int | tuple[int, ...], *, positive: bool = False, shift: bool = True) -> list[Value]:
        """Gamma, beta, mean and variance. positive: no negative gamma. shift=False: beta and mean 0, so that the map has no shift."""
        shape = (channels,) if isinstance(channels, int) else channels
        gamma = self.rng.uniform(0.5, 1.5, shape)
        if not positive:
            flat = gamma.reshape(-1)
            flat[::2] *= -1
        beta, mean = (self.normal(*shape) if shift else np.zeros(shape) for _ in range(2))
        arrays = (gamma, self.affine), (beta, self.affine), (mean, self.statistics), (self.rng.uniform(0.3, 2.0, shape), self.statistics)
        return [self.weight(a, stem, dtype=t) for (a, t), stem in zip(arrays, ("gamma", "beta", "mean", "var"), strict=True)]

    def bn(
        self,
        x: Value,
        channels: int | tuple[int, ...] = 0,
        *,
        positive: bool = False,
        shift: bool = True,
        params: Sequence[Value] = (),
        epsilon: float | None = 1e-2,
        **attrs: Any,
    ) -> Value:
        """A BatchNormalization at inference, as the network's opset writes it. epsilon=None leaves the attribute out."""
        if self.opset < 7:
            attrs.setdefault("is_test", 1)
        if epsilon is not None:
            attrs["epsilon"] = epsilon
        return self.op("BatchNormalization", x, *(params or self.bn_params(channels, positive=positive, shift=shift)), **attrs)

    def relu(self, x: Value) -> Value:
        return self.op("Relu", x)

    def transpose(self, x: Value, *perm: int) -> Value:
        return self.op("Transpose", x, perm=perm)

    def reshape(self, x: Value, *shape: int) -> Value:
        return self.op("Reshape", x, self.ints(*shape))

    def squeeze(self, x: Value, *axes: int) -> Value:
        return self.op("Squeeze", x, self.ints(*axes)) if self.opset >= 13 else self.op("Squeeze", x, axes=axes)

    def unsqueeze(self, x: Value, *axes: int) -> Value:
        return self.op("Unsqueeze", x, self.ints(*axes)) if self.opset >= 13 else self.op("Unsqueeze", x, axes=axes)

    def reduce(self, kind: str, x: Value, *axes: int, keepdims: int = 1) -> Value:
        if self.opset >= 18:
            return self.op(f"Reduce{kind}", x, self.ints(*axes), keepdims=keepdims)
        return self.op(f"Reduce{kind}", x, axes=axes, keepdims=keepdims)

    def slice(self, x: Value, axis: int, start: int, end: int, step: int = 1) -> Value:
        if self.opset >= 10:
            return self.op("Slice", x, self.ints(start), self.ints(end), self.ints(axis), self.ints(step))
        return self.op("Slice", x, axes=[axis], starts=[start], ends=[end])

    def split(self, x: Value, axis: int, *sizes: int) -> list[Value]:
        if self.opset >= 13:
            return self.ops("Split", x, self.ints(*sizes), outputs=len(sizes), axis=axis)
        return self.ops("Split", x, outputs=len(sizes), axis=axis, split=sizes)

    def pad(self, x: Value, *pads: int, mode: str = "constant", value: float = 0.0) -> Value:
        if self.opset < 11:
            return self.op("Pad", x, pads=pads, mode=mode, value=value)
        return self.op("Pad", x, self.ints(*pads), *[self.scalar(value)] * (value != 0), mode=mode)

    def dropout(self, x: Value) -> Value:
        """A Dropout at inference."""
        if self.opset >= 12:
            return self.op("Dropout", x, self.constant(np.array(0.5, np.float32)), self.constant(np.array(False)))
        old: dict[str, Any] = {"is_test": 1} if self.opset < 7 else {}
        return self.op("Dropout", x, ratio=0.5, **old)

    # --- scopes ------------------------------------------------------------------------------

    def child(self, prefix: str) -> Net:
        """The body of an If, a Loop, a Scan or a function: shares the seed's stream and the types, has operators of its own."""
        child = Net.__new__(Net)
        child.__dict__ |= self.__dict__ | {
            "nodes": [],
            "initializers": [],
            "inputs": [],
            "outputs": [],
            "_names": {},
            "_prefix": f"{prefix}/",
        }
        return child

    def graph(self, name: str = "body") -> onnx.GraphProto:
        """The graph as it stands, its outputs without shapes."""
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)

    def function(self, name: str, inputs: Sequence[Value], outputs: Sequence[Value], body: Net) -> None:
        """Register `body` as the local function `name` of the domain "local"."""
        opsets = [helper.make_opsetid("", self.opset)]
        self.functions.append(helper.make_function("local", name, inputs, outputs, body.nodes, opsets))

    def model(self) -> onnx.ModelProto:
        """The finished model, with whatever shapes of outputs onnx can infer."""
        opsets = [helper.make_opsetid("", self.opset)] + [helper.make_opsetid("local", 1)] * bool(self.functions)
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted({n.domain for n in self.nodes} - {"", "local"})]
        ir = self.ir or max(helper.find_min_ir_version_for(opsets[:1]), 8 if self.functions else 3)
        if ir < 4:  # there every initializer is listed as an input
            listed = {i.name for i in self.inputs}
            for t in self.initializers:
                if t.name not in listed:
                    self.inputs.append(helper.make_tensor_value_info(t.name, t.data_type, t.dims))
        model = helper.make_model(
            self.graph("case"), opset_imports=opsets, ir_version=ir, functions=self.functions, producer_name="bnfold tests"
        )
        helper.set_model_props(model, self.metadata)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        if self.value_info:
            return inferred
        for mine, found in zip(model.graph.output, inferred.graph.output, strict=True):
            if found.type.tensor_type.HasField("shape"):
                mine.type.tensor_type.shape.CopyFrom(found.type.tensor_type.shape)
        return model


__all__ = ["DTYPES", "Net", "TensorProto", "Value", "element"]
