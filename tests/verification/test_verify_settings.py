"""Level 1 of `verify` compares models whole: an operator that is set otherwise is no equal, another way to write it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import bnfold

F = np.float32
RNG = np.random.default_rng(0)
ARRAYS: dict[str, Any] = {
    "w": RNG.normal(size=(4, 4, 3, 3)).astype(F),
    "square": RNG.normal(size=(8, 8)).astype(F),
    "vector": RNG.normal(size=8).astype(F),
    "lstm": RNG.normal(size=(1, 12, 8)).astype(F),
    "lstm.r": RNG.normal(size=(1, 12, 3)).astype(F),
    "zero": np.array(0, F),
    "half": np.array(0.5, F),
    "one": np.array([1]),
    "two": np.array([2]),
    "spatial": np.array([2, 3]),
    "twice": np.array([1, 1, 2, 2], F),
    "borders": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "flat": np.array([0, -1]),
    "steps": np.array([8, -1, 8]),
}
ARRAYS["square.T"] = ARRAYS["square"].T.copy()
ARRAYS["lstm.other"] = ARRAYS["lstm.r"] + (np.arange(3) == 1).astype(F)


def built(*nodes: onnx.NodeProto, opset: int = 17, x: Any = ("N", 4, 8, 8), **arrays: Any) -> onnx.ModelProto:
    held = {**ARRAYS, **arrays}
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in held.items() if name in read],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def conv(**settings: Any) -> onnx.NodeProto:
    return helper.make_node("Conv", ["x", "w"], ["h"], name="conv", **settings)


def behind(op: str, *more: str, opset: int = 17, **settings: Any) -> onnx.ModelProto:
    """A convolution and an operator."""
    return built(conv(), helper.make_node(op, ["h", *more], ["y"], name="op", **settings), opset=opset)


def alone(op: str, *more: str, opset: int = 17, x: Any = ("N", 4, 8, 8), **settings: Any) -> onnx.ModelProto:
    return built(helper.make_node(op, ["x", *more], ["y"], name="op", **settings), opset=opset, x=x)


def branching(factor: float) -> onnx.ModelProto:
    y = [helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, None)]
    then = helper.make_graph([helper.make_node("Mul", ["h", "f"], ["t"])], "t", [], y, [numpy_helper.from_array(np.array(factor, F), "f")])
    other = helper.make_graph([helper.make_node("Neg", ["h"], ["t"])], "e", [], y)
    sign = [helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0), helper.make_node("Greater", ["s", "zero"], ["c"])]
    return built(conv(), *sign, helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other))


def looping(trips: int) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("i", 7, []), helper.make_tensor_value_info("c", 9, [])]
    inner, outer = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("v", "u"))
    nodes = [helper.make_node("Sin", ["v"], ["u"]), helper.make_node("Identity", ["c"], ["d"])]
    body = helper.make_graph(nodes, "b", [*inputs, inner], [helper.make_tensor_value_info("d", 9, []), outer])
    return built(conv(), helper.make_node("Loop", ["trips", "", "h"], ["y"], body=body), trips=np.array(trips))


def padded(mode: str, value: float = 0.0) -> onnx.ModelProto:
    given = ["v"] if mode == "constant" else []
    return built(
        helper.make_node("Pad", ["x", "borders", *given], ["p"], mode=mode),
        helper.make_node("Conv", ["p", "w"], ["y"]),
        v=np.array(value, F),
    )


def recurrent(r: str = "lstm.r", **settings: Any) -> onnx.ModelProto:
    steps = helper.make_node("Reshape", ["x", "steps"], ["s"])
    return built(steps, helper.make_node("LSTM", ["s", "lstm", r], ["y"], hidden_size=3, **settings), x=(2, 4, 8, 8))


def rounded(kind: int) -> onnx.ModelProto:
    return built(conv(), helper.make_node("Cast", ["h"], ["c"], to=kind), helper.make_node("Cast", ["c"], ["y"], to=1))


def largest(k: str, **settings: Any) -> onnx.ModelProto:
    return built(conv(), helper.make_node("TopK", ["h", k], ["y", "places"], **settings))


def through_half() -> onnx.ModelProto:
    there, back = helper.make_node("Cast", ["h"], ["c"], to=10), helper.make_node("Cast", ["c"], ["d"], to=1)
    return built(conv(), there, back, helper.make_node("Sin", ["d"], ["y"]))


def beside(op: str, *inputs: str, **settings: Any) -> onnx.ModelProto:
    """A convolution and an operator that also reads what goes in."""
    return built(conv(pads=[1] * 4), helper.make_node(op, inputs, ["y"], **settings))


OTHERWISE: dict[str, tuple[onnx.ModelProto, onnx.ModelProto]] = {
    "strides": (built(conv(), helper.make_node("Relu", ["h"], ["y"])), built(conv(strides=[2, 2]), helper.make_node("Relu", ["h"], ["y"]))),
    "pads": (alone("Conv", "w", pads=[1] * 4), alone("Conv", "w", pads=[0, 0, 2, 2])),
    "dilations": (alone("Conv", "w", pads=[1] * 4), alone("Conv", "w", pads=[2] * 4, dilations=[2, 2])),
    "a slope": (behind("LeakyRelu"), behind("LeakyRelu", alpha=0.1)),
    "an axis": (behind("Softmax", axis=1), behind("Softmax", axis=2)),
    "an epsilon": (alone("LayerNormalization", "vector"), alone("LayerNormalization", "vector", epsilon=1e-6)),
    "a resize mode": (behind("Resize", "", "twice"), behind("Resize", "", "twice", mode="linear")),
    "k": (largest("one"), largest("two")),
    "largest": (largest("one"), largest("one", largest=0)),
    "a bound": (behind("Clip", "half"), behind("Clip", "", "half")),
    "an integer type": (rounded(6), rounded(3)),
    "a narrow type on the way": (behind("Sin"), through_half()),
    "reduced axes": (behind("ReduceMean", axes=[2, 3]), behind("ReduceMean", axes=[1, 3])),
    "keepdims": (behind("ReduceMax", axes=[2]), behind("ReduceMax", axes=[2], keepdims=0)),
    "alpha": (alone("Gemm", "square", x=("N", 8)), alone("Gemm", "square", x=("N", 8), alpha=0.5)),
    "the transposed input": (alone("Gemm", "square", x=(8, 8)), alone("Gemm", "square", x=(8, 8), transA=1)),
    "the transposed weight": (alone("Gemm", "square", x=(8, 8)), alone("Gemm", "square", x=(8, 8), transB=1)),
    "perm": (behind("Transpose", perm=[0, 2, 1, 3]), behind("Transpose", perm=[0, 1, 3, 2])),
    "a pad mode": (padded("reflect"), padded("edge")),
    "a pad value": (padded("constant"), padded("constant", 1.0)),
    "the axis of a Concat": (alone("Concat", "x", axis=1), alone("Concat", "x", axis=2)),
    "a constant": (behind("Pow", "one"), behind("Pow", "two")),
    "counted padding": (
        behind("AveragePool", kernel_shape=[3, 3], pads=[1] * 4),
        behind("AveragePool", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
    ),
    "a branch": (branching(2), branching(3)),
    "how often a loop runs": (looping(2), looping(3)),
    "a recurrent weight": (recurrent(), recurrent("lstm.other")),
    "the order of elements": (alone("DepthToSpace", blocksize=2), alone("DepthToSpace", blocksize=2, mode="CRD")),
    "picked channels": (behind("Gather", "one", axis=1), behind("Gather", "two", axis=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_set_otherwise_differs(name: str) -> None:
    one, other = OTHERWISE[name]
    assert bnfold.verify(one, other, coefficients_only=True).verdict == "different"
    assert bnfold.verify(one, one, coefficients_only=True).levels.coefficients.verdict == "equivalent"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (behind("Relu"), behind("Sigmoid")),
        (beside("Mul", "h", "x"), beside("Div", "h", "x")),
        (beside("Concat", "h", "x", axis=1), beside("Concat", "x", "h", axis=1)),
    ],
    ids=["another function", "the other operation", "the order of inputs"],
)  # fmt: skip
def test_another_operator_can_t_be_paired(one: onnx.ModelProto, other: onnx.ModelProto) -> None:
    assert bnfold.verify(one, other, coefficients_only=True).verdict == "inconclusive"


ANOTHER_FORM: dict[str, tuple[onnx.ModelProto, onnx.ModelProto]] = {
    "auto_pad": (alone("Conv", "w", auto_pad="SAME_UPPER"), alone("Conv", "w", pads=[1] * 4, kernel_shape=[3, 3], strides=[1, 1], group=1)),
    "auto_pad with strides": (
        alone("Conv", "w", auto_pad="SAME_UPPER", strides=[2, 2]),
        alone("Conv", "w", pads=[0, 0, 1, 1], strides=[2, 2], dilations=[1, 1]),
    ),
    "defaults": (behind("LeakyRelu"), behind("LeakyRelu", alpha=0.01)),
    "an operator that does nothing": (
        built(conv(), helper.make_node("Dropout", ["h"], ["d"]), helper.make_node("Sin", ["d"], ["y"])),
        behind("Sin"),
    ),
    "a product and a sum": (
        alone("Gemm", "square", "vector", x=("N", 8)),
        built(helper.make_node("MatMul", ["x", "square"], ["h"]), helper.make_node("Add", ["h", "vector"], ["y"]), x=("N", 8)),
    ),
    "a weight that lies otherwise": (alone("Gemm", "square", x=("N", 8)), alone("Gemm", "square.T", x=("N", 8), transB=1)),
    "a global pool": (behind("GlobalAveragePool"), behind("ReduceMean", axes=[-1, -2])),
    "axes that became an input": (behind("ReduceMean", axes=[2, 3], opset=13), behind("ReduceMean", "spatial", opset=18)),
    "bounds that became inputs": (behind("Clip", min=0.0, opset=9), behind("Clip", "zero", opset=13)),
    "the last axis": (behind("Softmax", axis=3, opset=11), behind("Softmax", opset=13)),
    "a new axis": (behind("Unsqueeze", axes=[1], opset=11), behind("Unsqueeze", "one", opset=13)),
    "a flattening": (behind("Flatten"), behind("Reshape", "flat")),
    "padding that became an input": (
        built(helper.make_node("Pad", ["x"], ["p"], pads=[0, 0, 1, 1, 0, 0, 1, 1]), helper.make_node("Conv", ["p", "w"], ["y"]), opset=10),
        built(helper.make_node("Pad", ["x", "borders"], ["p"]), helper.make_node("Conv", ["p", "w"], ["y"]), opset=13),
    ),
    "a Relu as a bound": (behind("Relu"), behind("Clip", "zero")),
    "a Relu as a maximum": (behind("Relu"), behind("Max", "zero")),
    "the order of a sum": (beside("Add", "h", "x"), beside("Sum", "x", "h")),
}


@pytest.mark.parametrize("name", ANOTHER_FORM)
def test_another_way_to_write_it_is_equal(name: str) -> None:
    for one, other in (ANOTHER_FORM[name], ANOTHER_FORM[name][::-1]):
        assert bnfold.verify(one, other, coefficients_only=True).verdict == "equivalent"


def halved(divisor: str) -> onnx.ModelProto:
    """What a convolution gives, up to a row that the network computes from a size that is open."""
    sizes = [helper.make_node("Shape", ["x"], ["shape"]), helper.make_node("Gather", ["shape", "two"], ["size"], axis=0)]
    end = helper.make_node("Div", ["size", divisor], ["end"])
    return built(
        *sizes, end, conv(), helper.make_node("Slice", ["h", "one", "end", "two"], ["y"]), x=("N", 4, "H", "W"), eight=np.array([8])
    )


def test_what_sets_an_operator_may_be_computed() -> None:
    assert bnfold.verify(halved("two"), halved("two"), coefficients_only=True).levels.coefficients.verdict == "equivalent"
    assert bnfold.verify(halved("two"), halved("eight"), coefficients_only=True).verdict == "different"


@pytest.mark.parametrize(("low", "verdict"), [(0.0, "equivalent"), (0.5, "different")])
def test_an_activation_that_a_runtime_put_into_a_convolution(low: float, verdict: str) -> None:
    given = {"activation": "Clip", "activation_params": [low, 6.0]}
    fused = built(helper.make_node("FusedConv", ["x", "w"], ["y"], domain="com.microsoft", **given))
    fused.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    plain = built(conv(), helper.make_node("Clip", ["h", "zero", "six"], ["y"]), six=np.array(6, F))
    assert bnfold.verify(plain, fused, coefficients_only=True).verdict == verdict


def test_a_setting_that_changes_nothing_is_another_form() -> None:
    one, other = (
        built(conv(), *(helper.make_node("Transpose", [a], [b], perm=perm) for a, b, perm in zip("ht", "ty", perms, strict=True)))
        for perms in (([0, 2, 3, 1], [0, 2, 1, 3]), ([0, 3, 2, 1], [0, 1, 2, 3]))
    )
    assert bnfold.verify(one, other, coefficients_only=True).verdict == "different"
    report = bnfold.verify(one, other)
    assert (report.verdict, report.levels.coefficients.verdict) == ("equivalent", "skipped")
    assert "although Transpose t has perm" in report.levels.coefficients.reason


# --- PyTorch ----------------------------------------------------------------------------------------------------------------------------

torch = pytest.importorskip("torch")
nn, fn = torch.nn, torch.nn.functional

TORCH: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a slope": (lambda h: fn.leaky_relu(h, 0.01), lambda h: fn.leaky_relu(h, 0.1)),
    "an axis": (lambda h: h.softmax(1), lambda h: h.softmax(2)),
    "an epsilon": (lambda h: fn.layer_norm(h, (8,)), lambda h: fn.layer_norm(h, (8,), eps=1e-6)),
    "corners": (
        lambda h: fn.interpolate(h, scale_factor=2, mode="bilinear", align_corners=True),
        lambda h: fn.interpolate(h, scale_factor=2, mode="bilinear"),
    ),
    "largest": (lambda h: h.topk(2)[0], lambda h: h.topk(2, largest=False)[0]),
    "a bound": (lambda h: h.clamp(0, 6), lambda h: h.clamp(0, 7)),
    "a threshold": (lambda h: (h > 0).float(), lambda h: (h > 0.5).float()),
    "an integer type": (lambda h: h.int().float(), lambda h: h.to(torch.int8).float()),
    "a narrow type on the way": (lambda h: h.sin(), lambda h: h.half().float().sin()),
    "perm": (lambda h: h.permute(0, 2, 1, 3).sin(), lambda h: h.permute(0, 3, 2, 1).sin()),
    "a pad value": (lambda h: fn.pad(h, (1, 1)).sin(), lambda h: fn.pad(h, (1, 1), value=1.0).sin()),
    "a multiple": (lambda h: torch.add(h.sin(), h.cos(), alpha=2), lambda h: torch.add(h.sin(), h.cos(), alpha=3)),
    "a number that is added": (lambda h: h.sin() + 2, lambda h: h.sin() + 3),
    "an exponent": (lambda h: h**2, lambda h: h**4),
    "a part": (lambda h: h[:, :, 1:].sin(), lambda h: h[:, :, :-1].sin()),
    "counted padding": (lambda h: fn.avg_pool2d(h, 3, 1, 1), lambda h: fn.avg_pool2d(h, 3, 1, 1, count_include_pad=False)),
    "the scale of attention": (
        lambda h: fn.scaled_dot_product_attention(h, h, h),
        lambda h: fn.scaled_dot_product_attention(h, h, h, scale=0.5),
    ),
    "a branch": (
        lambda h: torch.cond(h.sum() > 0, lambda t: t * 2, lambda t: -t.clone(), (h,)),
        lambda h: torch.cond(h.sum() > 0, lambda t: t * 3, lambda t: -t.clone(), (h,)),
    ),
}


class Behind(nn.Module):
    """A convolution and a function."""

    def __init__(self, convolution: Any, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.convolution, self.function = convolution, function

    def forward(self, x: Any) -> Any:
        return self.function(self.convolution(x))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TORCH)
def test_what_is_set_otherwise_differs_in_torch(name: str) -> None:
    convolution = nn.Conv2d(3, 4, 3, padding=1)
    one, other = (Behind(copy.deepcopy(convolution), function).eval() for function in TORCH[name])
    assert bnfold.verify(one, other, example=X, coefficients_only=True).verdict == "different"


@pytest.mark.parametrize(
    ("function", "verdict"),
    [
        (lambda h: fn.max_pool2d(fn.leaky_relu(h), 2), "equivalent"),
        (lambda h: fn.avg_pool2d(h.clamp(0, 6), 3, 2, 1).flatten(1), "equivalent"),
        (lambda h: h.mean((2, 3)).softmax(1), "equivalent"),
        (lambda h: h.cumsum(1), "inconclusive"),  # whose settings nobody has put in the other's terms
    ],
)
def test_settings_in_both_frameworks(function: Callable[[Any], Any], verdict: str, tmp_path: Any) -> None:
    convolution = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    net = Behind(convolution, function).eval()
    axes = {"x": {0: "N"}}
    torch.onnx.export(net, (X,), tmp_path / "net.onnx", dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes)
    file = bnfold.load(tmp_path / "net.onnx")
    assert bnfold.verify(net, file, coefficients_only=True).verdict == verdict
    other = copy.deepcopy(net)
    other.convolution.stride = (1, 1)
    assert bnfold.verify(other, file, example=X, coefficients_only=True).verdict != "equivalent"


def test_a_fill_is_held_against_the_one_that_is_planned() -> None:
    rows = {"gamma": np.full(4, 2, F), "beta": np.ones(4, F), "mean": np.full(4, -0.5, F), "var": np.ones(4, F)}
    norm = helper.make_node("BatchNormalization", ["p", *rows], ["y"], name="bn")
    model = built(conv(), helper.make_node("Pad", ["h", "borders"], ["p"], name="pad"), norm, **rows)
    fused, report = bnfold.fuse(model)
    assert report.layers[0].into == ("conv", "pad")
    assert bnfold.verify(model, fused).levels.coefficients.verdict == "equivalent"
    fill = next(t for t in fused.graph.initializer if t.name == fused.graph.node[1].input[2])
    fill.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(fill) * F(1.0001), fill.name))
    assert bnfold.verify(model, fused).verdict == "different"
