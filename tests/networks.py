"""Small networks with BatchNorms, and their folds made independently of bnfold: for tests of what `verify` says about a pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

Weights = dict[str, np.ndarray]
NO_FAULT = "this ONNX Runtime fuses MatMul and BatchNormalization rightly, as 1.32 and later do: there is no fault to find"
EPSILON = float(np.float32(1e-5))  # as an attribute stores it
# Each step: operator, name, inputs, attributes. A BatchNorm stands right behind the operator that it is folded into.
Step = tuple[str, str, tuple[str, ...], dict[str, Any]]

RESIDUAL: list[Step] = [
    ("Conv", "stem", ("x",), {"pads": [1, 1, 1, 1]}),
    ("BatchNormalization", "stem_bn", ("stem",), {}),
    ("Relu", "stem_relu", ("stem_bn",), {}),
    ("Conv", "body", ("stem_relu",), {"pads": [1, 1, 1, 1]}),
    ("BatchNormalization", "body_bn", ("body",), {}),
    ("Add", "sum", ("body_bn", "stem_relu"), {}),
    ("Relu", "sum_relu", ("sum",), {}),
    ("Conv", "grouped", ("sum_relu",), {"group": 4, "strides": [2, 2]}),
    ("BatchNormalization", "grouped_bn", ("grouped",), {}),
    ("Relu", "grouped_relu", ("grouped_bn",), {}),
    ("GlobalAveragePool", "pool", ("grouped_relu",), {}),
    ("Flatten", "flat", ("pool",), {}),
    ("Gemm", "y", ("flat",), {}),
]
TABULAR: list[Step] = [
    ("Gemm", "first", ("x",), {}),
    ("BatchNormalization", "first_bn", ("first",), {}),
    ("Relu", "first_relu", ("first_bn",), {}),
    ("Gemm", "second", ("first_relu",), {}),
    ("BatchNormalization", "second_bn", ("second",), {}),
    ("Sigmoid", "second_sigmoid", ("second_bn",), {}),
    ("Gemm", "y", ("second_sigmoid",), {}),
]
DECODER: list[Step] = [
    ("ConvTranspose", "up", ("x",), {"group": 2, "strides": [2, 2]}),
    ("BatchNormalization", "up_bn", ("up",), {}),
    ("LeakyRelu", "up_relu", ("up_bn",), {"alpha": 0.1}),
    ("Conv", "y_conv", ("up_relu",), {}),
    ("BatchNormalization", "y", ("y_conv",), {}),
]
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "residual": {"stem": (8, 3, 3, 3), "body": (8, 8, 3, 3), "grouped": (8, 2, 2, 2), "y": (8, 5)},
    "tabular": {"first": (6, 16), "second": (16, 12), "y": (12, 1)},
    "decoder": {"up": (4, 3, 2, 2), "y_conv": (5, 6, 1, 1)},
}
STEPS = {"residual": RESIDUAL, "tabular": TABULAR, "decoder": DECODER}
INPUTS: dict[str, tuple[int | str, ...]] = {"residual": ("N", 3, 8, 8), "tabular": ("N", 6), "decoder": ("N", 4, 5, 5)}
NETWORKS = tuple(STEPS)


def weights(network: str, seed: int = 0, dtype: Any = np.float32) -> Weights:
    """Trained-looking weights as they are stored."""
    rng = np.random.default_rng([seed, len(network)])
    made: Weights = {}
    for name, shape in SHAPES[network].items():
        fan_in = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
        made[name + ".weight"] = rng.normal(0, 1.4 / np.sqrt(fan_in), shape)
        made[name + ".bias"] = rng.normal(0, 0.1, channels(network, name))
    for op, name, inputs, _ in STEPS[network]:
        if op == "BatchNormalization":
            n = channels(network, inputs[0])
            made[name + ".gamma"] = rng.uniform(0.5, 1.5, n) * rng.choice([1, 1, 1, -1], n)
            made[name + ".beta"] = rng.normal(0, 0.3, n)
            made[name + ".mean"] = rng.normal(0, 0.5, n)
            made[name + ".var"] = rng.uniform(0.1, 2.0, n)
    return {name: array.astype(dtype) for name, array in made.items()}


def channels(network: str, name: str) -> int:
    shape = SHAPES[network][name]
    step = next(s for s in STEPS[network] if s[1] == name)
    if step[0] == "Conv":
        return shape[0]
    return shape[1] * int(step[3].get("group", 1))


def folded(network: str, w: Weights, arithmetic: Any = np.float64, epsilon: float = EPSILON) -> Weights:
    """The weights without BatchNorms, computed in `arithmetic` and rounded to their own type."""
    a = {name: array.astype(arithmetic) for name, array in w.items()}
    for op, name, (source, *_), _ in STEPS[network]:
        if op != "BatchNormalization":
            continue
        gamma, beta, mean, var = (a.pop(f"{name}.{role}") for role in ("gamma", "beta", "mean", "var"))
        s = gamma / np.sqrt(var + arithmetic(epsilon))
        maker, _, _, attrs = next(step for step in STEPS[network] if step[1] == source)
        weight = a[source + ".weight"]
        if maker == "Conv":
            a[source + ".weight"] = weight * s.reshape(-1, 1, 1, 1)
        elif maker == "Gemm":
            a[source + ".weight"] = weight * s
        else:
            groups = attrs.get("group", 1)
            per_input = s.reshape(groups, 1, -1).repeat(weight.shape[0] // groups, axis=1).reshape(weight.shape[0], -1)
            a[source + ".weight"] = weight * per_input[:, :, None, None]
        a[source + ".bias"] = (a[source + ".bias"] - mean) * s + beta
    return {name: array.astype(w[name].dtype) for name, array in a.items()}


def model(
    network: str,
    w: Weights,
    *,
    epsilon: float = EPSILON,
    edit: Callable[[list[Any]], None] | None = None,
    opset: int = 17,
    outputs: tuple[str, ...] = ("y",),
) -> ir.Model:
    """The network with these weights; a BatchNorm without weights was folded. edit: changes the list of ONNX nodes."""
    nodes, instead = [], {}
    folds = {inputs[0]: name for op, name, inputs, _ in STEPS[network] if op == "BatchNormalization" and name + ".gamma" not in w}
    for op, name, inputs, attrs in STEPS[network]:
        if op == "BatchNormalization" and inputs[0] in folds:
            continue
        own = [f"{name}.{role}" for role in ("weight", "bias", "gamma", "beta", "mean", "var") if f"{name}.{role}" in w]
        if op == "BatchNormalization":
            attrs = {"epsilon": epsilon, **attrs}
        out = folds.get(name, name)
        nodes.append(helper.make_node(op, [instead.get(i, i) for i in inputs] + own, [out], name=f"node_{name}", **attrs))
    if edit is not None:
        edit(nodes)
    dtype = helper.np_dtype_to_tensor_dtype(next(iter(w.values())).dtype)
    rank = len(INPUTS[network])
    graph = helper.make_graph(
        nodes,
        network,
        [helper.make_tensor_value_info("x", dtype, INPUTS[network])],
        [helper.make_tensor_value_info(name, dtype, None if name != "y" or rank == 4 else ("N", None)) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in w.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    assert dtype in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    return ir.from_proto(made)


def small(nodes: list[Any], arrays: Weights, inputs: dict[str, Any], outputs: dict[str, Any], *, opset: int = 17) -> ir.Model:
    """A float32 model of these nodes; arrays, shapes of inputs and shapes of outputs by name."""
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    if opset < 9:
        graph.input.extend(helper.make_tensor_value_info(name, kind, array.shape) for name, array in arrays.items())
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=3 if opset < 9 else 10))


def as_max(name: str) -> Any:
    """Relu in other words, so that the structures can't be paired there."""

    def edit(nodes):
        node = next(n for n in nodes if n.name == name)
        place = list(nodes).index(node)
        nodes.insert(place + 1, helper.make_node("Max", [f"{name}.once", f"{name}.once"], list(node.output)))
        node.output[0] = f"{name}.once"

    return edit
