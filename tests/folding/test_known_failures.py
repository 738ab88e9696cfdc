"""What today's tools get wrong when they fold, each as a test of ours.

Every mistake below was seen in the tool named. A test here asserts the right outcome in plain terms, and in float64 that the
function hasn't changed: the figures in brackets are by how much those tools were off.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import pytest
from cases import Net
from compare import batchnorms, defaults, difference, feeds, interface, operators, run_double, run_stored
from onnx import numpy_helper

import bnfold

Draw = Callable[[Net], None]


def fused(
    draw: Draw, *, opset: int = 17, dtype: str = "float64", statistics: str | None = None, ir: int | None = None
) -> tuple[onnx.ModelProto, onnx.ModelProto, str]:
    """The drawn model, the folded one and the first reason why a BatchNorm stays."""
    net = Net(draw.__name__, opset=opset, dtype=dtype, statistics=statistics, ir=ir)
    draw(net)
    model = net.model()
    result, report = bnfold.fuse(model, check=False)
    onnx.checker.check_model(result)
    assert interface(result) == interface(model)
    data = feeds(model)
    if dtype == "float64" and statistics is None:
        assert difference(run_double(model, data), run_double(result, data)) <= 1e-12
    return model, result, next((layer.reason for layer in report.layers if layer.reason), "")


def image(net: Net, channels: int = 4) -> str:
    return net.input("N", channels, 8, 8)


# --- torch.fx, Inductor, torchao, AIMET, Brevitas: calls and users --------------------------------------------------------------


def conv_called_twice(net: Net) -> None:
    x, w, b, params = image(net), net.filters(4, 4, 3, 3), net.bias(4), net.bn_params(4)
    for _ in range(2):
        x = net.bn(net.conv(x, 4, 4, weight=w, bias=b), params=params)
    net.output(x)


def conv_called_twice_before_two_batchnorms(net: Net) -> None:
    x, w, b = image(net), net.filters(4, 4, 3, 3), net.bias(4)
    net.output(net.bn(net.conv(x, 4, 4, weight=w, bias=b), 4), net.bn(net.conv(x, 4, 4, weight=w, bias=b), 4))


def dense_called_twice_before_two_batchnorms(net: Net) -> None:
    x, w, b = net.input("N", 4), net.matrix(4, 4), net.bias(4)
    y = net.bn(net.op("Gemm", x, w, b), 4)
    net.output(net.bn(net.op("Gemm", y, w, b), 4))


@pytest.mark.parametrize("draw", [conv_called_twice, conv_called_twice_before_two_batchnorms, dense_called_twice_before_two_batchnorms])
def test_a_layer_called_twice(draw: Draw) -> None:
    """torch.fx, Inductor, torchao, AIMET and Brevitas scale the shared weight twice, or for the wrong call (0.2 to 8)."""
    _, result, _ = fused(draw)
    assert batchnorms(result) == 0


def test_linear_over_the_last_axis_batchnorm_over_axis_1_equal_sizes() -> None:
    """torch.fx, torch.jit.freeze, AIMET and Brevitas fold it (7.4)."""

    def draw(net: Net) -> None:
        net.output(net.bn(net.op("Add", net.op("MatMul", net.input("N", 6, 6), net.matrix(6, 6)), net.bias(6)), 6))

    _, result, reason = fused(draw)
    assert batchnorms(result) == 1
    assert "axis" in reason


@pytest.mark.parametrize("kind", ["Gemm", "Conv"])
@pytest.mark.parametrize("elsewhere", ["operator", "output"])
def test_a_layer_whose_output_is_used_elsewhere(kind: str, elsewhere: str) -> None:
    """torch.jit.freeze folds the linear layer (2.7), torchao the convolution (2.1); as a model output AIMET's file is invalid."""

    def draw(net: Net) -> None:
        y = net.gemm(net.input("N", 4), 4, 6) if kind == "Gemm" else net.conv(image(net), 4, 6)
        net.output(net.bn(y, 6), y if elsewhere == "output" else net.op("Sigmoid", y))

    _, result, reason = fused(draw)
    assert batchnorms(result) == 1
    assert "output" in reason


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv_transpose_with_equal_channels_and_groups(groups: int) -> None:
    """Inductor scales the wrong axis (1.95); torch.nn.utils, torchao and Brevitas crash or do so with groups."""

    def draw(net: Net) -> None:
        net.output(net.bn(net.conv_transpose(image(net), 4, 4, groups=groups, strides=[2, 2]), 4))

    _, result, _ = fused(draw)
    assert batchnorms(result) == 0


def test_conv_batchnorm_batchnorm() -> None:
    """torchao folds the second in place of the first (5.2)."""

    def draw(net: Net) -> None:
        net.output(net.bn(net.bn(net.conv(image(net), 4, 6), 6), 6))

    _, result, _ = fused(draw)
    assert batchnorms(result) == 0


@pytest.mark.parametrize("opset", [14, 15, 22])
def test_training_mode(opset: int) -> None:
    """torchao, AIMET and onnxscript fold it silently."""

    def draw(net: Net) -> None:
        y = net.conv(image(net), 4, 6)
        net.output(net.ops("BatchNormalization", y, *net.bn_params(6), outputs=3, training_mode=1)[0])

    _, result, reason = fused(draw, opset=opset)
    assert batchnorms(result) == 1
    assert "training" in reason


# --- ONNX Runtime, AIMET: what stands between -------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["Transpose", "Reshape"])
def test_matmul_then_transpose_or_reshape_equal_sizes(between: str) -> None:
    """ONNX Runtime's MatMul+BatchNorm fusion folds it with default options, up to version 1.31 (2 to 5)."""

    def draw(net: Net) -> None:
        y = net.op("MatMul", net.input(6, 6), net.matrix(6, 6))
        net.output(net.bn(net.transpose(y, 1, 0) if between == "Transpose" else net.reshape(y, 1, 6, 6), 6))

    _, result, reason = fused(draw)
    assert batchnorms(result) == 1
    assert "ax" in reason


def test_matmul_then_transpose_that_keeps_the_channel() -> None:
    """The sound twin of the above: the channels of the matmul are the BatchNorm's."""

    def draw(net: Net) -> None:
        y = net.op("MatMul", net.input("N", 6, 6), net.matrix(6, 6))
        net.output(net.bn(net.transpose(y, 0, 2, 1), 6))

    _, result, _ = fused(draw)
    assert (batchnorms(result), operators(result)["Add"]) == (0, 1)


def test_a_reshape_that_mixes_channels() -> None:
    """AIMET folds through it (3.0)."""

    def draw(net: Net) -> None:
        net.output(net.bn(net.reshape(net.conv(net.input(2, 4, 8, 8), 4, 4), 2, 6, 4, 6), 6))

    _, result, reason = fused(draw)
    assert batchnorms(result) == 1
    assert reason


def test_a_constant_along_the_width_equal_sizes() -> None:
    """OnnxSlim multiplies the filters by a constant that lies along W."""

    def draw(net: Net) -> None:
        y = net.op("Mul", net.bn(net.conv(image(net), 4, 6), 6), net.bias(6))
        net.output(net.op("Add", y, net.bias(6)))

    _, result, _ = fused(draw)
    assert batchnorms(result) == 0


# --- attributes -----------------------------------------------------------------------------------------------------------------


def test_epsilon_zero() -> None:
    """AIMET takes its own epsilon (892)."""

    def draw(net: Net) -> None:
        gamma, beta, mean, _ = net.bn_params(6)
        var = net.weight(np.geomspace(1e-9, 1, 6), "var")
        net.output(net.bn(net.conv(image(net), 4, 6), params=[gamma, beta, mean, var], epsilon=0.0))

    _, result, _ = fused(draw)
    assert batchnorms(result) == 0


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_auto_pad_counts_as_padding(auto_pad: str) -> None:
    """AIMET pushes the shift of a BatchNorm into the convolution behind it (8.6)."""

    def draw(net: Net) -> None:
        net.output(net.conv(net.bn(image(net), 4), 4, 6, auto_pad=auto_pad))

    _, result, reason = fused(draw)
    assert batchnorms(result) == 1
    assert "pad" in reason


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 1.0), (1.0, 0.25), (-2.0, 3.0), (0.5, 0.0)])
@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_alpha_and_beta(alpha: float, beta: float, trans: int) -> None:
    """AIMET ignores them (5.1)."""

    def draw(net: Net) -> None:
        net.output(net.bn(net.gemm(net.input("N", 6), 6, 6, alpha=alpha, beta=beta, transB=trans), 6))

    _, result, _ = fused(draw)
    assert batchnorms(result) == 0


def test_gemm_reads_no_bias_times_zero() -> None:
    """Whatever a bias holds, times a beta of zero it is nothing."""

    def draw(net: Net) -> None:
        bias = net.weight(np.full(6, np.inf), "bias")
        net.output(net.bn(net.op("Gemm", net.input("N", 4), net.matrix(4, 6), bias, beta=0.0), 6))

    _, result, _ = fused(draw, dtype="float32")
    assert batchnorms(result) == 0
    assert all(np.isfinite(y).all() for y in run_stored(result, feeds(result)).values())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_gemm_with_a_bias_of_one_element(shape: tuple[int, ...]) -> None:
    """AIMET's file is invalid."""

    def draw(net: Net) -> None:
        net.output(net.bn(net.op("Gemm", net.input("N", 4), net.matrix(4, 6), net.weight(net.normal(*shape), "bias")), 6))

    _, result, _ = fused(draw)
    assert batchnorms(result) == 0


def test_matmul_on_a_3d_input() -> None:
    """AIMET turns it into a Gemm, which takes 2-D inputs alone."""

    def draw(net: Net) -> None:
        y = net.op("MatMul", net.input("N", 5, 4), net.matrix(4, 6))
        net.output(net.transpose(net.bn(net.transpose(y, 0, 2, 1), 6), 0, 2, 1))

    _, result, _ = fused(draw, dtype="float32")
    assert (batchnorms(result), operators(result)["MatMul"]) == (0, 1)
    run_stored(result, feeds(result))


@pytest.mark.parametrize("opset", [7, 8])
def test_spatial_zero(opset: int) -> None:
    """Below opset 9 a BatchNorm may have moments for each element; tools crash or take them for a channel's."""

    def draw(net: Net) -> None:
        net.output(net.bn(net.conv(net.input("N", 4, 5, 6), 4, 6), (6, 3, 4), spatial=0))

    _, result, reason = fused(draw, opset=opset)
    assert batchnorms(result) == 1
    assert reason


# --- forms ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 13, 22])
def test_an_empty_string_for_the_bias(opset: int) -> None:
    def draw(net: Net) -> None:
        net.output(net.bn(net.conv(image(net), 4, 6, bias=""), 6))

    _, result, _ = fused(draw, opset=opset)
    assert batchnorms(result) == 0
    assert all(node.input[2] for node in result.graph.node if node.op_type == "Conv")


def test_conv_3d() -> None:
    def draw(net: Net) -> None:
        net.output(net.bn(net.conv(net.input("N", 4, 5, 5, 5), 4, 6, dims=3), 6))

    _, result, _ = fused(draw)
    assert batchnorms(result) == 0


def test_nodes_without_names() -> None:
    """Tools that keep a table by node name fold one BatchNorm into another's convolution."""

    def draw(net: Net) -> None:
        net.named = False
        net.output(net.bn(net.conv(net.relu(net.bn(net.conv(image(net), 4, 6), 6)), 6, 3), 3))

    _, result, _ = fused(draw)
    assert batchnorms(result) == 0


def test_a_batchnorm_output_that_is_a_model_output() -> None:
    def draw(net: Net) -> None:
        y = net.bn(net.conv(image(net), 4, 6), 6)
        net.output(y, net.bn(net.conv(net.relu(y), 6, 3), 3))

    model, result, _ = fused(draw)
    assert batchnorms(result) == 0
    assert [o.name for o in result.graph.output] == [o.name for o in model.graph.output]


def test_initializers_that_callers_may_override() -> None:
    """onnxsim and OnnxSlim fold them and drop the input: whoever overrides one then gets the old value, or an error."""

    def draw(net: Net) -> None:
        net.hold = "overridable"
        net.output(net.bn(net.conv(image(net), 4, 6), 6))

    model, result, reason = fused(draw, dtype="float32")
    assert batchnorms(result) == 1
    assert reason
    assert defaults(result) == defaults(model)
    data = feeds(model) | {name: np.full_like(np.ones(6, np.float32), 0.5) for name in ("gamma_0", "var_0")}
    assert difference(run_stored(model, data), run_stored(result, data)) == 0


# --- health -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "value"), [(3, -0.5), (3, np.nan), (0, np.nan), (1, np.inf), (2, -np.inf)])
def test_ill_parameters_never_reach_a_weight(which: int, value: float) -> None:
    """With a negative variance every tool writes NaN weights."""

    def draw(net: Net) -> None:
        arrays = [net.rng.uniform(0.5, 1.5, 6), net.normal(6), net.normal(6), net.rng.uniform(0.5, 1.5, 6)]
        arrays[which][4] = value
        net.output(net.bn(net.conv(image(net), 4, 6), params=[net.weight(a, "p") for a in arrays]))

    model, result, reason = fused(draw, dtype="float32")
    assert batchnorms(result) == 1
    assert "4" in reason, "the channel is named"
    assert [t.SerializeToString() for t in result.graph.initializer] == [t.SerializeToString() for t in model.graph.initializer]


# --- half precision -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
def test_half_precision_with_float32_statistics(dtype: str, bias: bool) -> None:
    """onnxscript and OnnxSlim write float32 weights beside half data, an invalid file; so does AIMET where there is no bias."""

    def draw(net: Net) -> None:
        net.output(net.bn(net.conv(image(net), 4, 6, bias=bias), 6))

    model, result, _ = fused(draw, opset=22, dtype=dtype, statistics="float32")
    assert batchnorms(result) == 0
    kind = onnx.TensorProto.FLOAT16 if dtype == "float16" else onnx.TensorProto.BFLOAT16
    weights = {name for node in result.graph.node for name in node.input[1:]}
    assert [t.data_type for t in result.graph.initializer if t.name in weights] == [kind, kind]
    data = feeds(model)
    assert difference(run_double(model, data), run_double(result, data)) <= 16 * (2.0**-11 if dtype == "float16" else 2.0**-8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("statistics", [None, "float32"])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_weight_is_rounded_once(dtype: str, statistics: str | None, transposed: bool) -> None:
    """Each stored coefficient is the float64 result rounded to nearest: 0.5 units in the last place. Half arithmetic is off by 2.7."""

    def draw(net: Net) -> None:
        x = net.input("N", 4, 9, 9)
        net.output(net.bn(net.conv_transpose(x, 4, 6) if transposed else net.conv(x, 4, 6), 6))

    model, result, _ = fused(draw, opset=22, dtype=dtype, statistics=statistics)
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    layer, norm = model.graph.node
    w, b = (weights[name].astype(np.float64) for name in layer.input[1:])
    gamma, beta, mean, var = (weights[name].astype(np.float64) for name in norm.input[1:])
    epsilon = next(a.f for a in norm.attribute if a.name == "epsilon")
    s = gamma / np.sqrt(var + epsilon)
    exact = w * s.reshape((1, -1, 1, 1) if transposed else (-1, 1, 1, 1)), s * b + (beta - s * mean)
    kind = np.dtype({"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype])
    stored = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    for name, right in zip(result.graph.node[0].input[1:], exact, strict=True):
        assert stored[name].dtype == kind
        ulp = np.spacing(np.abs(stored[name])).astype(np.float64)
        assert (np.abs(stored[name].astype(np.float64) - right) <= 0.5001 * ulp).all()
