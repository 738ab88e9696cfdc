"""The float64 oracle against independent arithmetic: PyTorch in double precision, ONNX Runtime in float32, and formulas."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from bnfold.backends.onnx import oracle_windows
from bnfold.backends.onnx.oracle import Oracle
from bnfold.backends.onnx.oracle_convert import jittered
from bnfold.backends.onnx.run import Session
from bnfold.errors import DataError, UnsupportedError, UsageError

Array = np.ndarray


def model(nodes, feeds, outputs=("y",), weights=None, opset=17, functions=(), opsets=(), output_types=None) -> ir.Model:
    """An ONNX model of these nodes; inputs are typed by example, outputs have no shape."""
    weights = weights or {}
    types = output_types or {}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()],
        [helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), None) for name in outputs],
        [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in opsets)]
    ir_version = 3 if opset < 9 else 10
    if ir_version == 3:  # which wants initializers among the inputs
        graph.input.extend(helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in weights.items())
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=functions))


def one(op, arrays, opset=17, outputs=1, jitter=None, inner=(), **attributes):
    """The outputs of a single operator whose inputs are fed; None is an omitted input."""
    feeds = {f"x{i}": a for i, a in enumerate(arrays) if a is not None}
    names = tuple(f"y{i}" for i in range(outputs))
    node = helper.make_node(op, ["" if a is None else f"x{i}" for i, a in enumerate(arrays)], names, **attributes)
    found = Oracle(model([node], feeds, names, opset=opset), jitter=jitter, outputs=inner).run(feeds)
    return found["y0"] if outputs == 1 else tuple(found.values())


def on_ort(op, arrays, opset=17, outputs=1, **attributes):
    feeds = {f"x{i}": a for i, a in enumerate(arrays) if a is not None}
    names = tuple(f"y{i}" for i in range(outputs))
    node = helper.make_node(op, ["" if a is None else f"x{i}" for i, a in enumerate(arrays)], names, **attributes)
    proto = ir.to_proto(model([node], feeds, names, opset=opset))
    for info in proto.graph.output:
        info.ClearField("type")
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, feeds)
    return found[0] if outputs == 1 else tuple(found)


def normal(*shape, seed=0, dtype=np.float64) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def close(a, b, rtol=1e-12):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1.0, float(np.abs(b).max(initial=0))))


# ---- convolution


def tap_by_tap(x, w, b, strides, dilations, begin, end, group) -> Array:
    """Convolution by its definition, one output element at a time."""
    x = np.pad(x, [(0, 0), (0, 0), *zip(begin, end, strict=True)])
    kernel = w.shape[2:]
    out = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(x.shape[2:], kernel, dilations, strides, strict=True)]
    y = np.zeros((x.shape[0], w.shape[0], *out))
    for o in range(w.shape[0]):
        g = o // (w.shape[0] // group)
        inputs = x[:, g * w.shape[1] : (g + 1) * w.shape[1]]
        for place in itertools.product(*map(range, out)):
            window = tuple(slice(p * s, p * s + (k - 1) * d + 1, d) for p, s, k, d in zip(place, strides, kernel, dilations, strict=True))
            y[(slice(None), o, *place)] = (inputs[(slice(None), slice(None), *window)] * w[o]).sum(tuple(range(1, x.ndim)))
    return y + (0 if b is None else b.reshape(-1, *(1,) * len(out)))


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(("stride", "dilation", "pad"), [(1, 1, 0), (2, 1, 1), (1, 2, 2), (3, 2, 1)])
def test_convolution_agrees_with_torch(spatial, group, stride, dilation, pad):
    torch = pytest.importorskip("torch")
    x, w, b = normal(2, 4, *(9, 8, 7)[:spatial]), normal(8, 4 // group, *(3, 2, 3)[:spatial]), normal(8)
    given = {"strides": [stride] * spatial, "dilations": [dilation] * spatial, "pads": [pad] * 2 * spatial, "group": group}
    function = getattr(torch.nn.functional, f"conv{spatial}d")
    for bias in (b, None):
        expected = function(*(None if a is None else torch.tensor(a) for a in (x, w, bias)), stride, pad, dilation, group)
        close(one("Conv", [x, w, bias], **given), expected)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(("stride", "dilation", "pad", "extra"), [(1, 1, 0, 0), (2, 1, 1, 1), (1, 2, 1, 0), (3, 2, 2, 2)])
def test_transposed_convolution_agrees_with_torch(spatial, group, stride, dilation, pad, extra):
    torch = pytest.importorskip("torch")
    x, w, b = normal(2, 4, *(5, 4, 3)[:spatial]), normal(4, 3, *(3, 2, 3)[:spatial]), normal(3 * group)
    given = {"strides": [stride] * spatial, "dilations": [dilation] * spatial, "pads": [pad] * 2 * spatial, "group": group}
    function = getattr(torch.nn.functional, f"conv_transpose{spatial}d")
    expected = function(*map(torch.tensor, (x, w, b)), stride, pad, extra, group, dilation)
    close(one("ConvTranspose", [x, w, b], output_padding=[extra] * spatial, **given), expected)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_auto_pad_agrees_with_the_definition(auto_pad, stride):
    x, w = normal(1, 2, 8, 7), normal(4, 2, 3, 4)
    begin, end = [0, 0], [0, 0]
    if auto_pad != "VALID":
        for i, (n, k) in enumerate(zip(x.shape[2:], w.shape[2:], strict=True)):
            total = max(0, (-(-n // stride) - 1) * stride + k - n)
            half = total // 2
            begin[i], end[i] = (half, total - half) if auto_pad == "SAME_UPPER" else (total - half, half)
    expected = tap_by_tap(x, w, None, [stride] * 2, [1, 1], begin, end, 1)
    close(one("Conv", [x, w], strides=[stride] * 2, auto_pad=auto_pad), expected)


def test_unequal_pads_agree_with_the_definition():
    x, w, b = normal(2, 6, 7, 5), normal(9, 2, 3, 2), normal(9)
    expected = tap_by_tap(x, w, b, [2, 1], [1, 2], [0, 3], [2, 1], 3)
    close(one("Conv", [x, w, b], strides=[2, 1], dilations=[1, 2], pads=[0, 3, 2, 1], group=3), expected)


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("shape", [None, [9, 7], [10, 8], [8, 7]])
def test_transposed_auto_pad_and_output_shape_agree_with_onnx_runtime(auto_pad, shape):
    x, w = normal(1, 2, 5, 4, dtype=np.float32), normal(2, 3, 3, 3, dtype=np.float32)
    given = {"strides": [2, 2], "auto_pad": auto_pad} | ({} if shape is None else {"output_shape": shape})
    close(one("ConvTranspose", [x, w], **given), on_ort("ConvTranspose", [x, w], **given), 1e-5)


def test_the_workspace_bounds_what_is_unfolded(monkeypatch):
    x, w, b = normal(3, 4, 11, 9), normal(6, 2, 3, 3), normal(6)
    given = {"group": 2, "pads": [1, 1, 1, 1], "strides": [2, 1], "dilations": [1, 2]}
    whole = one("Conv", [x, w, b], **given)
    largest = 0
    empty = np.empty

    def watched(shape, *args, **kwargs):
        nonlocal largest
        found = empty(shape, *args, **kwargs)
        if found.ndim > x.ndim:
            largest = max(largest, found.nbytes)
        return found

    row = 8 * 4 * 9 * 7  # bytes of one unfolded output row: channels, taps, width
    monkeypatch.setattr(oracle_windows, "WORKSPACE", 2 * row)
    monkeypatch.setattr(oracle_windows.np, "empty", watched)
    close(one("Conv", [x, w, b], **given), whole, 1e-14)
    assert 0 < largest <= 2 * row


# ---- pooling


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(2, 2, 0), (3, 2, 1), (3, 3, 1), (2, 3, 1)])
def test_average_pool_agrees_with_torch(spatial, ceil, counted, kernel, stride, pad):
    torch = pytest.importorskip("torch")
    x = normal(2, 3, *(9, 8, 7)[:spatial])
    expected = getattr(torch.nn.functional, f"avg_pool{spatial}d")(torch.tensor(x), kernel, stride, pad, bool(ceil), bool(counted))
    given = {"kernel_shape": [kernel] * spatial, "strides": [stride] * spatial, "pads": [pad] * 2 * spatial}
    close(one("AveragePool", [x], opset=19, ceil_mode=ceil, count_include_pad=counted, **given), expected)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize(("kernel", "stride", "pad", "dilation"), [(2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 1, 2), (2, 3, 1, 2)])
def test_max_pool_agrees_with_torch(spatial, ceil, kernel, stride, pad, dilation):
    torch = pytest.importorskip("torch")
    x = normal(1, 1, *(9, 8, 7)[:spatial])
    function = getattr(torch.nn.functional, f"max_pool{spatial}d")
    expected, places = function(torch.tensor(x), kernel, stride, pad, dilation, bool(ceil), return_indices=True)
    given = {"kernel_shape": [kernel] * spatial, "strides": [stride] * spatial, "pads": [pad] * 2 * spatial, "ceil_mode": ceil}
    y, where = one("MaxPool", [x], outputs=2, dilations=[dilation] * spatial, **given)
    close(y, expected)
    np.testing.assert_array_equal(where, places)


@pytest.mark.parametrize("order", [0, 1])
def test_max_pool_places_agree_with_onnx_runtime(order):
    x = normal(2, 3, 6, 5, dtype=np.float32)
    given = {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1], "storage_order": order}
    for mine, theirs in zip(one("MaxPool", [x], outputs=2, **given), on_ort("MaxPool", [x], outputs=2, **given), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("op", ["AveragePool", "MaxPool", "LpPool"])
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_pools_with_auto_pad_agree_with_onnx_runtime(op, auto_pad):
    x = normal(2, 3, 8, 7, dtype=np.float32)
    given = {"kernel_shape": [3, 4], "strides": [2, 2], "auto_pad": auto_pad}
    close(one(op, [x], **given), on_ort(op, [x], **given), 1e-6)


def test_max_pool_of_integers():
    x = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    given = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    node = helper.make_node("MaxPool", ["x"], ["y"], **given)
    y = Oracle(model([node], {"x": x}, output_types={"y": TensorProto.UINT8})).run({"x": x})["y"]
    assert y.dtype == np.uint8
    np.testing.assert_array_equal(y[0, 0], [[5, 7], [13, 15]])


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 4), (2, 3, 5, 4, 3)])
def test_global_pools(shape):
    x, axes = normal(*shape), tuple(range(2, len(shape)))
    close(one("GlobalAveragePool", [x]), x.mean(axes, keepdims=True))
    close(one("GlobalMaxPool", [x]), x.max(axes, keepdims=True))
    close(one("GlobalLpPool", [x], p=3), (np.abs(x) ** 3).sum(axes, keepdims=True) ** (1 / 3))


# ---- BatchNormalization


def bn_formula(x, gamma, beta, mean, var, epsilon=1e-5) -> Array:
    lay = (slice(None), *(None,) * (x.ndim - 2)) if gamma.ndim == 1 else ()
    return (x - mean[lay]) / np.sqrt(var[lay] + np.float64(np.float32(epsilon))) * gamma[lay] + beta[lay]


def bn_inputs(*shape, params=None):
    params = params or (shape[1],)
    return normal(*shape), normal(*params, seed=1), normal(*params, seed=2), normal(*params, seed=3), np.abs(normal(*params, seed=4)) + 0.1


@pytest.mark.parametrize("opset", [1, 6, 7, 8, 9, 11, 13, 14, 15, 17, 22])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4)])
def test_batchnorm_of_every_opset_infers_with_the_running_statistics(opset, shape):
    arrays = bn_inputs(*shape)
    told = {"is_test": 1} if opset < 7 else {}
    if opset == 1:
        told["consumed_inputs"] = [0, 0, 0, 1, 1]
    close(one("BatchNormalization", arrays, opset=opset, epsilon=1e-3, **told), bn_formula(*arrays, epsilon=1e-3))


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15])
def test_batchnorm_agrees_with_onnx_runtime(opset):
    arrays = [a.astype(np.float32) for a in bn_inputs(2, 3, 4, 5)]
    close(one("BatchNormalization", arrays, opset=opset), on_ort("BatchNormalization", arrays, opset=opset), 1e-6)


@pytest.mark.parametrize("opset", [6, 7])
def test_batchnorm_per_activation(opset):
    arrays = bn_inputs(2, 3, 4, 5, params=(3, 4, 5))
    close(one("BatchNormalization", arrays, opset=opset, spatial=0), bn_formula(*arrays))


def test_batchnorm_that_says_per_activation_but_has_a_number_per_channel():
    arrays = bn_inputs(2, 3, 4, 5)
    close(one("BatchNormalization", arrays, opset=7, spatial=0), bn_formula(*arrays))


@pytest.mark.parametrize(("opset", "outputs"), [(6, 5), (7, 5), (9, 5), (14, 3), (15, 3)])
def test_batchnorm_in_training_mode_uses_the_batch(opset, outputs):
    arrays = bn_inputs(4, 3, 5, 6)
    x, gamma, beta, mean, var = arrays
    told = {"training_mode": 1} if opset >= 14 else {}
    y, new_mean, new_var, *_ = one("BatchNormalization", arrays, opset=opset, outputs=outputs, momentum=0.75, **told)
    now, spread = x.mean((0, 2, 3)), x.var((0, 2, 3))
    close(y, bn_formula(x, gamma, beta, now, spread))
    close(new_mean, 0.75 * mean + 0.25 * now)
    close(new_var, 0.75 * var + 0.25 * spread)


def test_batchnorm_with_statistics_of_another_type():
    arrays = bn_inputs(2, 3, 4)
    mixed = [arrays[0].astype(np.float16), *(a.astype(np.float32) for a in arrays[1:])]
    close(one("BatchNormalization", mixed, opset=15), bn_formula(*(a.astype(np.float64) for a in mixed)))


# ---- other operators that the evaluator has wrong or not at all


def test_normalisations_agree_with_torch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x, gamma, beta = normal(2, 6, 4, 5), normal(6), normal(6, seed=1)
    tensors = [torch.tensor(a) for a in (x, gamma, beta)]
    eps = float(np.float32(1e-5))
    close(one("GroupNormalization", [x, gamma, beta], opset=21, num_groups=3), functional.group_norm(tensors[0], 3, *tensors[1:], eps=eps))
    close(
        one("InstanceNormalization", [x, gamma, beta]), functional.instance_norm(*tensors[:1], weight=tensors[1], bias=tensors[2], eps=eps)
    )
    a, b = normal(4, 5), normal(4, 5, seed=1)
    expected = functional.layer_norm(tensors[0], (4, 5), torch.tensor(a), torch.tensor(b), eps=eps)
    close(one("LayerNormalization", [x, a, b], axis=2), expected)
    close(one("RMSNormalization", [x, a], opset=23, axis=2), functional.rms_norm(tensors[0], (4, 5), torch.tensor(a), eps=eps))
    given = {"size": 3, "alpha": 0.5, "beta": 0.5, "bias": 2.0}
    close(one("LRN", [x], **given), functional.local_response_norm(tensors[0], 3, 0.5, 0.5, 2.0))


def test_group_normalization_of_opset_18_has_parameters_per_group():
    x, gamma, beta = normal(2, 6, 4), normal(3), normal(3, seed=1)
    per_channel = one("GroupNormalization", [x, np.repeat(gamma, 2), np.repeat(beta, 2)], opset=21, num_groups=3)
    close(one("GroupNormalization", [x, gamma, beta], opset=18, num_groups=3), per_channel)


@pytest.mark.parametrize(("op", "name", "opset"), [
    ("Gelu", "gelu", 20), ("HardSwish", "hardswish", 14), ("Mish", "mish", 18), ("Softplus", "softplus", 17), ("Sigmoid", "sigmoid", 17),
    ("Selu", "selu", 17), ("Elu", "elu", 17), ("Softsign", "softsign", 17), ("LeakyRelu", "leaky_relu", 17),
    ("HardSigmoid", "hardsigmoid", 17),
])  # fmt: skip
def test_activations_agree_with_torch(op, name, opset):
    torch = pytest.importorskip("torch")
    x = 3 * normal(40)
    given = {"alpha": 1 / 6} if op == "HardSigmoid" else {}
    single = 1e-6 if op in ("Selu", "LeakyRelu", "HardSigmoid") else 1e-12  # their constants are stored in float32
    close(one(op, [x], opset=opset, **given), getattr(torch.nn.functional, name)(torch.tensor(x)), single)


def test_gelu_by_tanh_and_erf_are_in_float64():
    torch = pytest.importorskip("torch")
    x = normal(40)
    close(one("Gelu", [x], opset=20, approximate="tanh"), torch.nn.functional.gelu(torch.tensor(x), approximate="tanh"))
    close(one("Erf", [x]), torch.erf(torch.tensor(x)))


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1])
def test_softmaxes_agree_with_onnx_runtime(op, opset, axis):
    x = normal(2, 3, 4, dtype=np.float32)
    given = {} if axis is None else {"axis": axis}
    close(one(op, [x], opset=opset, **given), on_ort(op, [x], opset=opset, **given), 1e-6)


def test_log_softmax_of_far_apart_numbers_stays_finite():
    y = one("LogSoftmax", [np.array([[0.0, 2000.0]])])
    np.testing.assert_array_equal(y, [[-2000.0, 0.0]])


@pytest.mark.parametrize("opset", [10, 13, 19, 21])
def test_dequantize_linear_is_exact(opset):
    x, scale, zero = np.array([[1, -2, 3], [4, 5, -6]], np.int8), np.array([0.1, 0.2], np.float32), np.array([1, -1], np.int8)
    given = {"axis": 0} if opset >= 13 else {}
    if opset == 10:
        scale, zero = scale[:1].reshape(()), zero[:1].reshape(())
    lay = (slice(None), None) if scale.ndim else ()
    close(one("DequantizeLinear", [x, scale, zero], opset=opset, **given), (x - zero.astype(float)[lay]) * scale.astype(float)[lay], 1e-15)
    bias = np.array([2**30 + 1], np.int32)
    assert one("DequantizeLinear", [bias, np.float32(1).reshape(())], opset=max(13, opset))[0] == 2**30 + 1


def test_blocked_dequantize_linear():
    x, scale = np.arange(12, dtype=np.int8).reshape(2, 6), normal(2, 2, dtype=np.float32)
    close(one("DequantizeLinear", [x, scale], opset=21, axis=1, block_size=3), x * np.repeat(scale.astype(float), 3, 1), 1e-15)


def test_loop_stacks_its_scan_outputs():
    scalar = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Add", ["s", "w"], ["t"]),
            helper.make_node("Mul", ["t", "t"], ["v"]),
        ],
        "body",
        [scalar("i", TensorProto.INT64, []), scalar("go", TensorProto.BOOL, []), scalar("s", TensorProto.FLOAT, [2, 2])],
        [scalar("on", TensorProto.BOOL, []), scalar("t", TensorProto.FLOAT, [2, 2]), scalar("v", TensorProto.FLOAT, [2, 2])],
    )
    feeds = {"x": normal(2, 2, dtype=np.float32)}
    weights = {"n": np.array(3), "w": np.array([0.5, 0.25], np.float32)}
    found = Oracle(model([helper.make_node("Loop", ["n", "", "x"], ["y", "z"], body=body)], feeds, ("y", "z"), weights)).run(feeds)
    x, w = feeds["x"].astype(float), weights["w"].astype(float)
    close(found["y"], x + 3 * w)
    close(found["z"], np.stack([(x + k * w) ** 2 for k in (1, 2, 3)]))


# ---- recurrent


def onnx_order(w: Array, gates: int, order: tuple[int, ...]) -> Array:
    return np.concatenate([np.split(w, gates)[i] for i in order])


@pytest.mark.parametrize(("op", "gates", "order"), [("RNN", 1, (0,)), ("GRU", 3, (1, 0, 2)), ("LSTM", 4, (0, 3, 1, 2))])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_operators_agree_with_torch(op, gates, order, bidirectional):
    torch = pytest.importorskip("torch")
    steps, batch, size, hidden = 5, 3, 4, 6
    net = getattr(torch.nn, op)(size, hidden, bidirectional=bidirectional, dtype=torch.float64)
    x = normal(steps, batch, size)
    expected, final = net(torch.tensor(x))
    p = {k: v.detach().numpy() for k, v in net.named_parameters()}
    ends = ("l0", "l0_reverse") if bidirectional else ("l0",)
    w = np.stack([onnx_order(p[f"weight_ih_{e}"], gates, order) for e in ends])
    r = np.stack([onnx_order(p[f"weight_hh_{e}"], gates, order) for e in ends])
    b = np.stack([np.concatenate([onnx_order(p[f"bias_{k}_{e}"], gates, order) for k in ("ih", "hh")]) for e in ends])
    given = {"hidden_size": hidden, "direction": "bidirectional" if bidirectional else "forward"}
    if op == "GRU":
        given["linear_before_reset"] = 1
    y, h, *_ = one(op, [x, w, r, b], opset=14, outputs=3 if op == "LSTM" else 2, **given)
    close(y.transpose(0, 2, 1, 3).reshape(steps, batch, -1), expected.detach())
    close(h, (final[0] if op == "LSTM" else final).detach())


@pytest.mark.parametrize(("op", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent_operators_with_lengths_and_first_states_agree_with_onnx_runtime(op, gates, direction):
    d, size, hidden = 2 if direction == "bidirectional" else 1, 3, 4
    x, lengths = normal(5, 3, size, dtype=np.float32), np.array([5, 2, 3], np.int32)
    w, r = normal(d, gates * hidden, size, dtype=np.float32), normal(d, gates * hidden, hidden, dtype=np.float32)
    b, h = normal(d, 2 * gates * hidden, dtype=np.float32), normal(d, 3, hidden, dtype=np.float32)
    arrays = [x, w, r, b, lengths, h]
    given = {"hidden_size": hidden, "direction": direction, "clip": 1.5}
    if op == "LSTM":
        arrays += [normal(d, 3, hidden, seed=1, dtype=np.float32), normal(d, 3 * hidden, dtype=np.float32)]
        given["activations"] = ["HardSigmoid", "Tanh", "Softsign"] * d
    elif op == "GRU":
        given["activations"] = ["Sigmoid", "Relu"] * d
    outputs = 3 if op == "LSTM" else 2
    found, expected = (f(op, arrays, opset=14, outputs=outputs, **given) for f in (one, on_ort))
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs, 1e-5)


# ---- resizing


@pytest.mark.parametrize(("mode", "torch_mode"), [("linear", "bilinear"), ("cubic", "bicubic")])
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("size", [(10, 14), (5, 4), (7, 3)])
def test_resize_agrees_with_torch(mode, torch_mode, corners, size):
    torch = pytest.importorskip("torch")
    x = normal(2, 3, 7, 6)
    expected = torch.nn.functional.interpolate(torch.tensor(x), size, mode=torch_mode, align_corners=corners)
    coordinates = "align_corners" if corners else "pytorch_half_pixel"
    sizes = np.array([2, 3, *size])
    close(one("Resize", [x, None, None, sizes], mode=mode, coordinate_transformation_mode=coordinates), expected)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "align_corners", "half_pixel_symmetric"])
@pytest.mark.parametrize("scale", [2.0, 0.7, 1.5])
def test_resize_agrees_with_onnx_runtime(mode, coordinates, scale):
    x = normal(1, 2, 10, 7, dtype=np.float32)
    scales = np.array([1, 1, scale, 2 * scale], np.float32)
    given = {"mode": mode, "coordinate_transformation_mode": coordinates}
    close(one("Resize", [x, None, scales], opset=19, **given), on_ort("Resize", [x, None, scales], opset=19, **given), 2e-5)


@pytest.mark.parametrize("nearest", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
def test_nearest_modes_agree_with_onnx_runtime(nearest):
    x, sizes = normal(1, 2, 6, 5, dtype=np.float32), np.array([1, 2, 9, 4])
    given = {"mode": "nearest", "nearest_mode": nearest, "coordinate_transformation_mode": "half_pixel"}
    close(one("Resize", [x, None, None, sizes], **given), on_ort("Resize", [x, None, None, sizes], **given), 1e-7)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("outside", [0, 1])
def test_antialiased_resize_agrees_with_onnx_runtime(mode, outside):
    x, sizes = normal(1, 2, 12, 11, dtype=np.float32), np.array([1, 2, 5, 4])
    given = {"mode": mode, "antialias": 1, "exclude_outside": outside}
    close(one("Resize", [x, None, None, sizes], opset=18, **given), on_ort("Resize", [x, None, None, sizes], opset=18, **given), 1e-5)


def test_crop_and_resize_agrees_with_onnx_runtime():
    x, sizes = normal(1, 1, 8, 7, dtype=np.float32), np.array([1, 1, 5, 4])
    roi = np.array([0, 0, 0.2, -0.1, 1, 1, 1.2, 0.8], np.float32)
    given = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0}
    close(one("Resize", [x, roi, None, sizes], **given), on_ort("Resize", [x, roi, None, sizes], **given), 1e-5)


def test_resize_along_named_axes_keeps_the_aspect():
    x = normal(1, 2, 6, 8, dtype=np.float32)
    given = {"axes": [2, 3], "keep_aspect_ratio_policy": "not_larger", "mode": "linear"}
    arrays = [x, None, None, np.array([9, 20])]
    close(one("Resize", arrays, opset=18, **given), on_ort("Resize", arrays, opset=18, **given), 1e-5)


@pytest.mark.parametrize(("op", "opset"), [("Upsample", 9), ("Resize", 10)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_the_first_versions_of_resize_agree_with_onnx_runtime(op, opset, mode):
    x, scales = normal(1, 2, 5, 6, dtype=np.float32), np.array([1, 1, 2, 1.5], np.float32)
    close(one(op, [x, scales], opset=opset, mode=mode), on_ort(op, [x, scales], opset=opset, mode=mode), 1e-6)
    if op == "Upsample":
        by_attribute = one(op, [x], opset=7, mode=mode, scales=scales.tolist())
        close(by_attribute, one(op, [x, scales], opset=opset, mode=mode))
        close(one(op, [x], opset=6, mode=mode, height_scale=2.0, width_scale=1.5), by_attribute)


# ---- opset 6


@pytest.mark.parametrize(("op", "function"), [("Add", np.add), ("Sub", np.subtract), ("Mul", np.multiply), ("Div", np.divide)])
def test_broadcasting_of_opset_6(op, function):
    a, b = normal(2, 3, 4, 5), normal(3, 4) + 3
    close(one(op, [a, b], opset=6, broadcast=1, axis=1), function(a, b[:, :, None]))
    close(one(op, [a, b[0]], opset=6, broadcast=1, axis=2), function(a, b[0][:, None]))
    close(one(op, [a, normal(5)], opset=6, broadcast=1), function(a, normal(5)))
    close(one(op, [a, np.array([2.0])], opset=6, broadcast=1, axis=1), function(a, 2.0))
    close(one(op, [a, a + 3], opset=6), function(a, a + 3))


def test_the_rest_of_opset_6():
    x, slope = normal(2, 3, 4), normal(3)
    close(one("PRelu", [x, slope], opset=6), np.where(x > 0, x, x * slope[:, None]))
    a, b, c = normal(2, 3), normal(4, 3), normal(4)
    close(one("Gemm", [a, b, c], opset=6, transB=1, broadcast=1, alpha=0.5, beta=2.0), 0.5 * a @ b.T + 2 * c)
    for told in ({"is_test": 1}, {}):
        close(one("Dropout", [x], opset=6, **told), x)
    close(one("Pad", [x], opset=6, pads=[0, 0, 1, 0, 0, 2], value=3.0), np.pad(x, [(0, 0), (0, 0), (1, 2)], constant_values=3.0))
    close(one("Slice", [x], opset=6, axes=[1, 2], starts=[1, -3], ends=[3, 2**31]), x[:, 1:3, -3:])
    close(one("Clip", [x], opset=6, min=-0.5, max=0.5), np.clip(x, -0.5, 0.5))
    close(one("Squeeze", [x[:, :1]], opset=6, axes=[1]), x[:, 0])
    close(one("Unsqueeze", [x], opset=6, axes=[0, 4]), x[None, ..., None])
    close(one("Softmax", [x], opset=6), np.exp(x) / np.exp(x).sum((1, 2), keepdims=True))
    close(one("ReduceMean", [x], opset=6, axes=[1, 2], keepdims=0), x.mean((1, 2)))
    close(one("Concat", [x, x], opset=6, axis=1), np.concatenate([x, x], 1))
    for part, whole in zip(one("Split", [x], opset=6, outputs=2, axis=1, split=[1, 2]), (x[:, :1], x[:, 1:]), strict=True):
        close(part, whole)


# ---- whole models


def small_network(dtype=np.float32) -> ir.Model:
    rng = np.random.default_rng(5)
    c = 6
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        make("BatchNormalization", ["a", "g", "b", "m", "v"], ["bn"]),
        make("Relu", ["bn"], ["r"]),
        make("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        make("Conv", ["p", "d"], ["e"], group=c, pads=[1, 1, 1, 1]),
        make("Constant", [], ["half"], value_float=0.1),
        make("Cast", ["half"], ["same"], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
        make("Mul", ["e", "same"], ["f"]),
        make("GlobalAveragePool", ["f"], ["q"]),
        make("Flatten", ["q"], ["flat"]),
        make("Gemm", ["flat", "k", "o"], ["y"], transB=1),
    ]
    weights = {
        "w": rng.standard_normal((c, 3, 3, 3)),
        "g": rng.standard_normal(c),
        "b": rng.standard_normal(c),
        "m": rng.standard_normal(c),
        "v": rng.uniform(0.5, 2, c),
        "d": rng.standard_normal((c, 1, 3, 3)),
        "k": rng.standard_normal((4, c)),
        "o": rng.standard_normal(4),
    }
    weights = {k: v.astype(dtype) for k, v in weights.items()}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return model(nodes, {"x": np.zeros((2, 3, 8, 8), dtype)}, weights=weights, opset=15, output_types={"y": kind})


def test_a_network_agrees_with_onnx_runtime_to_float32():
    net, feeds = small_network(), {"x": normal(2, 3, 8, 8, dtype=np.float32)}
    found = Oracle(net, outputs=["bn", "flat"]).run(feeds)
    assert list(found) == ["y", "bn", "flat"]
    assert {v.dtype for v in found.values()} == {np.dtype(np.float64)}
    for name, expected in Session(net, outputs=["bn", "flat"], threads=1).run(feeds).items():
        close(found[name], expected, 1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_network_in_any_type_is_computed_in_float64(dtype):
    """The same stored numbers give the same answer in whatever type they are stored."""
    net = small_network(dtype)
    before = ir.to_proto(net).SerializeToString(deterministic=True)
    x = normal(2, 3, 8, 8).astype(dtype)
    found = Oracle(net).run({"x": x})["y"]
    assert ir.to_proto(net).SerializeToString(deterministic=True) == before
    proto = ir.to_proto(small_network(np.float64))
    for tensor, own in zip(proto.graph.initializer, net.graph.initializers.values(), strict=True):
        tensor.CopyFrom(onnx.numpy_helper.from_array(own.const_value.numpy().astype(np.float64), tensor.name))
    np.testing.assert_array_equal(found, Oracle(ir.from_proto(proto)).run({"x": x.astype(np.float64)})["y"])


def test_functions_and_branches_are_in_float64_with_our_operators():
    make = helper.make_node
    erf = helper.make_function("local", "F", ["a", "s"], ["b"], [make("Erf", ["a"], ["e"]), make("Mul", ["e", "s"], ["b"])],
                               [helper.make_opsetid("", 17)])  # fmt: skip
    value = helper.make_tensor("third", TensorProto.FLOAT, [], [1 / 3])
    info = helper.make_tensor_value_info
    branch = helper.make_graph(
        [make("Erf", ["f"], ["t"]), make("Mul", ["t", "third"], ["yes"])], "then", [], [info("yes", TensorProto.FLOAT, None)], [value]
    )
    other = helper.make_graph([make("Identity", ["f"], ["no"])], "else", [], [info("no", TensorProto.FLOAT, None)])
    feeds = {"x": normal(7, dtype=np.float32), "c": np.array(True)}
    nodes = [make("F", ["x", "w"], ["f"], domain="local"), make("If", ["c"], ["y"], then_branch=branch, else_branch=other)]
    net = model(nodes, feeds, weights={"w": np.array(0.7, np.float32)}, functions=[erf], opsets=[("local", 1)])
    torch = pytest.importorskip("torch")
    inner = torch.erf(torch.tensor(feeds["x"]).double()) * float(np.float32(0.7))
    close(Oracle(net).run(feeds)["y"], torch.erf(inner) * float(np.float32(1 / 3)))
    close(Oracle(net).run({**feeds, "c": np.array(False)})["y"], inner)


def test_nothing_is_rounded_on_the_way():
    """Types that a node names (casts, constants, ranges, random numbers) are widened too."""
    make = helper.make_node
    nodes = [
        make("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        make("CastLike", ["h", "x"], ["i"]),
        make("Constant", [], ["k"], value_floats=[0.5, 0.25]),
        make("ConstantOfShape", ["n"], ["z"]),
        make("EyeLike", ["z"], ["eye"], dtype=TensorProto.FLOAT),
        make("RandomNormal", [], ["noise"], shape=[2, 2], seed=3.0),
        make("Sum", ["eye", "noise", "z"], ["s"]),
        make("Mul", ["i", "k"], ["j"]),
        make("Add", ["j", "s"], ["y"]),
    ]
    feeds = {"x": normal(2, 2)}
    noise = np.random.RandomState(3).randn(2, 2)
    found = Oracle(model(nodes, feeds, weights={"n": np.array([2, 2])})).run(feeds)["y"]
    close(found, feeds["x"] * [0.5, 0.25] + np.eye(2) + noise, 1e-15)


def test_nan_and_infinity_pass():
    x = normal(1, 3, 8, 8, dtype=np.float32)
    x[0, 0, 0, 0], x[0, 1, 1, 1] = np.nan, np.inf
    found = Oracle(small_network()).run({"x": np.repeat(x, 2, 0)})["y"]
    assert np.isnan(found).any()


# ---- jitter


@pytest.mark.parametrize(("dtype", "bits"), [(np.float16, 11), (ml_dtypes.bfloat16, 8), (np.float32, 24)])
def test_jitter_is_at_most_half_a_unit_in_the_last_place(dtype, bits):
    stored = np.concatenate([normal(500), 1e-6 * normal(100), [0.0, 1.0, 2.0, np.inf]]).astype(dtype)
    array = stored.astype(np.float64)
    moved = jittered(array, helper.np_dtype_to_tensor_dtype(stored.dtype), "w", 0)
    np.testing.assert_array_equal(moved == array, (array == 0) | np.isinf(array))
    np.testing.assert_array_equal(moved.astype(dtype)[:500], stored[:500])  # it rounds back to what was stored
    normals = np.abs(array[:500]) > 1e-3
    relative = np.abs(moved[:500] - array[:500])[normals] / np.abs(array[:500][normals])
    assert 2.0 ** -(bits + 2) < relative.max() <= 2.0**-bits


def test_jitter_is_a_matter_of_the_seed_and_shows_in_the_output():
    net, feeds = small_network(), {"x": normal(2, 3, 8, 8, dtype=np.float32)}
    still, a, same, b = (Oracle(net, jitter=seed).run(feeds)["y"] for seed in (None, 1, 1, 2))
    np.testing.assert_array_equal(a, same)
    for moved, from_ in ((a, still), (b, still), (a, b)):
        assert 1e-10 < np.abs(moved - from_).max() < 1e-5


def test_jitter_leaves_what_steers():
    """Scales of a Resize, also where they are computed, and limits of a Clip."""
    make = helper.make_node
    nodes = [
        make("Shape", ["x"], ["s"]),
        make("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        make("Mul", ["f", "scales"], ["g"]),
        make("Cast", ["g"], ["sizes"], to=TensorProto.INT64),
        make("Resize", ["x", "", "", "sizes"], ["r"], mode="nearest"),
        make("Clip", ["r", "", "limit"], ["y"]),
    ]
    feeds = {"x": normal(1, 1, 7, 7, dtype=np.float32)}
    net = model(nodes, feeds, weights={"scales": np.array([1, 1, 2, 2], np.float32), "limit": np.array(0.1, np.float32)})
    for seed in range(5):
        np.testing.assert_array_equal(Oracle(net, jitter=seed).run(feeds)["y"], Oracle(net).run(feeds)["y"])


# ---- refusals


def test_an_operator_that_nobody_has_is_named():
    feeds = {"x": normal(2, 2, dtype=np.float32)}
    node = helper.make_node("FusedThing", ["x"], ["y"], domain="com.example", name="fused")
    with pytest.raises(
        UnsupportedError, match=r"^the float64 oracle lacks the operator com\.example::FusedThing of opset 1 \(node 'fused'\)$"
    ):
        Oracle(model([node], feeds, opsets=[("com.example", 1)]))
    node = helper.make_node("Multinomial", ["x"], ["y"], name="draw")
    with pytest.raises(UnsupportedError, match=r"lacks the operator Multinomial of opset 17 \(node 'draw'\)"):
        Oracle(model([node], feeds))


def test_an_operator_that_fails_is_named():
    with pytest.raises(UnsupportedError, match=r"can't run the operator Conv \(node 'y0'\): ValueError: weights \(4, 2, 3\) in 1 groups"):
        one("Conv", [normal(1, 3, 5), normal(4, 2, 3)])


def test_an_inner_value_that_is_not_there():
    with pytest.raises(UsageError, match="the model computes no value 'zebra'"):
        Oracle(small_network(), outputs=["zebra"])


def test_feeds_that_do_not_fit():
    with pytest.raises(DataError, match=r"input 'x' has shape \(2, 3, 8, 8\), the data have \(1, 3\)"):
        Oracle(small_network()).run({"x": normal(1, 3)})
    with pytest.raises(DataError, match="input 'x' takes float32, the data are int64"):
        Oracle(small_network()).run({"x": np.zeros((2, 3, 8, 8), np.int64)})
