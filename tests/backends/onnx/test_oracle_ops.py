"""Normalisations, activations, recurrences, resizing and opset 6 of the float64 oracle against PyTorch, ONNX Runtime and formulas."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cases import ALL, Net
from compare import difference, feeds, run_double, run_stored
from onnx import TensorProto, helper
from single import close, model, normal, on_ort, one

from bnfold.backends.onnx.oracle.evaluator import Oracle

Array = np.ndarray


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
    x = np.array([*3 * normal(40), -700.0, 700.0])
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


def test_attributes_that_no_version_knows_mean_nothing():
    x = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(one("Relu", [x], opset=13, own=[1, 2]), x)
    np.testing.assert_array_equal(one("Transpose", [x], opset=13, own="yes"), x.T)
    np.testing.assert_array_equal(one("Where", [x > 2, x, -x], opset=13, own=1), np.where(x > 2, x, -x))
    scaled = one("LayerNormalization", [x, np.full(3, 2.0)], opset=17, own=1.5)
    np.testing.assert_array_equal(scaled, one("LayerNormalization", [x, np.full(3, 2.0)], opset=17))


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


# ---- what reads bits


@pytest.mark.parametrize(("stored", "to"), [("float32", "int32"), ("float32", "uint32"), ("float16", "int16"), ("float32", "float32")])
def test_bits_are_those_of_the_stored_type(stored, to):
    x = np.array([0.1, -2.7, 1e-3, 3.0], stored)
    found = one("BitCast", [x], opset=26, to=helper.np_dtype_to_tensor_dtype(np.dtype(to)))
    assert np.array_equal(found, x.view(to))


def test_bits_of_half_as_bfloat16():
    x = np.array([0.1, -2.7, 1e-3, 3.0], np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("BitCast", ["h"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
    ]
    drawn = model(nodes, {"x": x}, opset=26)
    assert np.array_equal(Oracle(drawn).run({"x": x})["y"], x.astype(np.float16).view(ml_dtypes.bfloat16).astype(np.float64))


def test_bits_of_a_stored_constant():
    packed = np.array([0.5, -1.5], np.float32)
    nodes = [helper.make_node("BitCast", ["w"], ["f"], to=TensorProto.FLOAT), helper.make_node("Mul", ["x", "f"], ["y"])]
    drawn = model(nodes, {"x": np.ones(2, np.float32)}, weights={"w": packed.view(np.int32)}, opset=26)
    assert np.array_equal(Oracle(drawn).run({"x": np.ones(2, np.float32)})["y"], packed)


def test_gemm_reads_no_c_times_zero():
    arrays = [normal(2, 3, dtype=np.float32), normal(3, 4, dtype=np.float32), np.full(4, np.inf, np.float32)]
    close(one("Gemm", arrays, beta=0.0), on_ort("Gemm", arrays, beta=0.0), 1e-6)


@pytest.mark.parametrize("axes", [[-3, -1], [-1, -3], [0, -1], [-1, 0], [-2, -4], [1, -1], [2]])
@pytest.mark.parametrize("opset", [11, 13, 21])
def test_axes_counted_from_the_back(opset, axes):
    """Those of Unsqueeze are of the output, and all are meant at once; those of Squeeze likewise of the input."""
    x = normal(2, 3)
    wide, axes_as = np.expand_dims(x, tuple(axes)), [np.array(axes, np.int64)] if opset >= 13 else []
    told = {} if axes_as else {"axes": axes}
    close(one("Unsqueeze", [x, *axes_as], opset=opset, **told), wide)
    close(one("Squeeze", [wide, *axes_as], opset=opset, **told), x)


@pytest.mark.parametrize("case", [case for case in ALL if "Fused" in case.name], ids=str)
def test_fused_operators_agree_with_onnx_runtime(case):
    net = case.build()
    data = feeds(net)
    assert difference(run_double(net, data), run_stored(net, data)) < 1e-6


@pytest.mark.parametrize(("op", "count"), [("Gelu", 1), ("BiasGelu", 2), ("FastGelu", 1), ("FastGelu", 2), ("QuickGelu", 1)])
def test_activations_of_onnx_runtime(op, count):
    net = Net(op)
    net.output(net.op(op, net.input(4, 6), *[net.bias(6)] * (count - 1), domain="com.microsoft"), shape=[4, 6])
    data = feeds(net.model())
    assert difference(run_double(net.model(), data), run_stored(net.model(), data)) < 1e-6
