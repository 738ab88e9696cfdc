"""Convolution and pooling of the float64 oracle against PyTorch, ONNX Runtime and their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx import TensorProto, helper
from single import close, model, normal, on_ort, one

from bnfold.backends.onnx.oracle import convolution as oracle_windows
from bnfold.backends.onnx.oracle.evaluator import Oracle

Array = np.ndarray


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


@pytest.mark.parametrize("sizes", [(40,), (6, 40), (5, 6, 7)])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (2, 1)])
def test_wide_kernels_of_single_channels(sizes, stride, dilation, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(oracle_windows, "CACHE", 1 << 14)  # several blocks
    x, w, b = normal(2, 30, *sizes), normal(30, 1, *(3, 2, 5)[-len(sizes) :]), normal(30)
    pads = [dilation] * (len(sizes) - 1) + [2 * dilation]
    strides = [stride] * (len(sizes) - 1) + [1]
    given = {"strides": strides, "dilations": [dilation] * len(sizes), "pads": pads * 2, "group": 30}
    function = getattr(torch.nn.functional, f"conv{len(sizes)}d")
    close(one("Conv", [x, w, b], **given), function(*map(torch.tensor, (x, w, b)), strides, pads, dilation, 30))
    x[0, 3, ..., 3] = np.inf  # which reaches no further than the kernel does
    expected = function(*map(torch.tensor, (x, w, b)), strides, pads, dilation, 30).numpy()
    assert np.isfinite(expected[0, 3]).any()
    np.testing.assert_array_equal(np.isfinite(one("Conv", [x, w, b], **given)), np.isfinite(expected))


@pytest.mark.parametrize("sizes", [(200,), (15, 14), (5, 6, 7)])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_fewer_outputs_than_inputs(sizes, group, dilation, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(oracle_windows, "CACHE", 1 << 9)  # several blocks
    x, w, b = normal(2, 12, *sizes), normal(4, 12 // group, *(3, 2, 3)[: len(sizes)]), normal(4)
    given = {"dilations": [dilation] * len(sizes), "pads": [1] * 2 * len(sizes), "group": group}
    function = getattr(torch.nn.functional, f"conv{len(sizes)}d")
    close(one("Conv", [x, w, b], **given), function(*map(torch.tensor, (x, w, b)), 1, 1, dilation, group))


@pytest.mark.parametrize("width", [9, 50])
@pytest.mark.parametrize("pads", [[0, 3, 2, 1], [-1, 2, 0, -2], [-2, -1, -1, 0]])
@pytest.mark.parametrize(("strides", "dilations"), [([1, 1], [1, 2]), ([2, 1], [1, 1]), ([3, 2], [2, 3]), ([1, 4], [1, 1])])
def test_single_channels_with_any_padding(width, pads, strides, dilations, monkeypatch):
    monkeypatch.setattr(oracle_windows, "CACHE", 1 << 11)  # several blocks
    x, w, b = normal(2, 5, 11, width), normal(5, 1, 3, 2), normal(5)
    cut = x[:, :, max(0, -pads[0]) : 11 - max(0, -pads[2]), max(0, -pads[1]) : width - max(0, -pads[3])]
    begin, end = ([max(0, n) for n in each] for each in (pads[:2], pads[2:]))
    expected = tap_by_tap(cut, w, b, strides, dilations, begin, end, 5)
    close(one("Conv", [x, w, b], strides=strides, dilations=dilations, pads=pads, group=5), expected)


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


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        (
            {"x": (2, 4, 6, 5), "w": (6, 2, 3, 3), "offset": (2, 36, 6, 5), "b": (6,), "mask": (2, 18, 6, 5)},
            {"pads": [1] * 4, "group": 2, "offset_group": 2},
        ),
        (
            {"x": (1, 4, 7, 9), "w": (3, 4, 3, 2), "offset": (1, 48, 4, 8), "b": (3,), "mask": (1, 24, 4, 8)},
            {"pads": [0, 1, 2, 0], "strides": [2, 1], "dilations": [1, 2], "offset_group": 4},
        ),
        ({"x": (1, 2, 5, 5), "w": (3, 2, 1, 1), "offset": (1, 2, 5, 5)}, {}),
    ],
)
def test_deform_conv_agrees_with_onnx_runtime(sizes, settings):
    """Its taps lie between elements, and beyond the border."""
    arrays = [2 * normal(*shape, seed=i).astype(np.float32) for i, shape in enumerate(sizes.values())]
    settings = {**settings, "kernel_shape": list(sizes["w"][2:])}
    close(one("DeformConv", arrays, opset=19, **settings), on_ort("DeformConv", arrays, opset=19, **settings), 1e-5)
