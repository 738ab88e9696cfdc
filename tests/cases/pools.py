"""Pooling, reductions, resizing and padding between a layer and its BatchNorm (lines 12, 13, 14, 49)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .builder import Net
from .case import Theme

CASES = Theme()
PADDING = r"pad|shift"


# --- averages (line 12) --------------------------------------------------------------------------


def average(net: Net, *, positive: bool = False, shift: bool = True, **attrs: Any) -> None:
    y = net.op("AveragePool", net.conv(net.input("N", 4, "H", "W"), 4, 6), kernel_shape=[3, 2], **attrs)
    net.output(net.bn(y, 6, positive=positive, shift=shift))


CASES.case(
    "AveragePool",
    12,
    draw=average,
    torch=lambda nn: nn.Sequential(nn.Conv2d(4, 6, 3), nn.AvgPool2d(2), nn.BatchNorm2d(6)),
    example=((2, 4, 8, 7),),
)
CASES.case("AveragePool with padding that doesn't count", 12, draw=partial(average, pads=[1, 1, 1, 0]))
CASES.case("AveragePool with auto_pad, not counted", 12, draw=partial(average, auto_pad="SAME_UPPER", strides=[2, 2]))
CASES.case("AveragePool counting no padding", 12, draw=partial(average, count_include_pad=1))
CASES.case(
    "AveragePool with padding that counts",
    12,
    draw=partial(average, pads=[1, 1, 1, 0], count_include_pad=1),
    left=1,
    reason=PADDING,
    torch=lambda nn: nn.Sequential(nn.Conv2d(4, 6, 3), nn.AvgPool2d(2, padding=1), nn.BatchNorm2d(6)),
    example=((2, 4, 8, 7),),
)
CASES.case("AveragePool with padding that counts, no shift", 12, draw=partial(average, pads=[1, 1, 1, 0], count_include_pad=1, shift=False))
CASES.case(
    "AveragePool with auto_pad that counts",
    12,
    draw=partial(average, auto_pad="SAME_LOWER", count_include_pad=1),
    left=1,
    reason=PADDING,
    ort=False,
)
CASES.case("AveragePool with ceil_mode", 12, draw=partial(average, ceil_mode=1, strides=[2, 2]), opset=19)


@CASES.case(
    "GlobalAveragePool",
    12,
    torch=lambda nn: nn.Sequential(nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(6)),
    example=((2, 4, 8, 7),),
)
def _(net: Net) -> None:
    net.output(net.bn(net.op("GlobalAveragePool", net.conv(net.input("N", 4, "H", "W"), 4, 6)), 6))


@CASES.case("GlobalAveragePool and Flatten", 7, 12)
def _(net: Net) -> None:
    y = net.op("GlobalAveragePool", net.conv(net.input("N", 4, "H", "W"), 4, 6))
    net.output(net.bn(net.op("Flatten", y), 6))


def mean(net: Net, *, axes: tuple[int, ...] = (2, 3), keepdims: int = 1, channels: int = 6) -> None:
    net.output(net.bn(net.reduce("Mean", net.conv(net.input("N", 4, 6, 5), 4, 6), *axes, keepdims=keepdims), channels))


for opset in (6, 8, 11, 13, 18, 22):
    CASES.case(f"ReduceMean over space, opset {opset}", 12, draw=mean, opset=opset, ort=opset > 6)
CASES.case("ReduceMean over space, negative axes, dropped", 12, draw=partial(mean, axes=(-1, -2), keepdims=0), opset=11)
CASES.case("ReduceMean over one axis, dropped", 12, draw=partial(mean, axes=(2,), keepdims=0), opset=18)
CASES.case("ReduceMean over the batch", 12, draw=partial(mean, axes=(0,)))
CASES.case("ReduceMean over channels", 12, draw=partial(mean, axes=(1,), channels=1))
CASES.case(
    "ReduceMean over channels, another axis takes their place",
    12,
    draw=partial(mean, axes=(1,), keepdims=0, channels=4),
    left=1,
    reason=r"ax[ie]s",
)
CASES.case("ReduceSum over space", 12, draw=lambda net: sum_bn(net))


@CASES.case("ReduceMean over everything", 12)
def _(net: Net) -> None:
    y = net.op("ReduceMean", net.conv(net.input("N", 4, "H", "W"), 4, 6))
    net.output(net.bn(y, 1))


def sum_bn(net: Net) -> None:
    net.output(net.bn(net.op("ReduceSum", net.conv(net.input("N", 4, 6, 5), 4, 6), net.ints(2, 3)), 6))


# --- maxima (line 13) ----------------------------------------------------------------------------


def maximum(net: Net, *, positive: bool = True, pads: int = 0, kind: str = "MaxPool") -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    if kind == "MaxPool":
        y = net.op("MaxPool", y, kernel_shape=[2, 3], pads=[pads] * 4)
    elif kind == "GlobalMaxPool":
        y = net.op(kind, y)
    else:
        y = net.reduce("Max" if kind == "ReduceMax" else "Min", y, 2, 3)
    net.output(net.bn(y, 6, positive=positive))


CASES.case("MaxPool, positive scales", 13, draw=maximum)
CASES.case("MaxPool with padding, positive scales", 13, draw=partial(maximum, pads=1))
CASES.case(
    "MaxPool, some scales negative",
    13,
    draw=partial(maximum, positive=False),
    left=1,
    reason="negative",
    torch=lambda nn: nn.Sequential(nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), nn.BatchNorm2d(6)),
    example=((2, 4, 8, 7),),
)
CASES.case("GlobalMaxPool, positive scales", 13, draw=partial(maximum, kind="GlobalMaxPool"))
CASES.case(
    "GlobalMaxPool, some scales negative", 13, draw=partial(maximum, kind="GlobalMaxPool", positive=False), left=1, reason="negative"
)
CASES.case("ReduceMax, positive scales", 13, draw=partial(maximum, kind="ReduceMax"))
CASES.case("ReduceMax, some scales negative", 13, draw=partial(maximum, kind="ReduceMax", positive=False), left=1, reason="negative")


def picking(net: Net, *, op: str = "MaxPool", size: tuple[Any, ...] = ("H", "W"), **attrs: Any) -> None:
    """A maximum of one element only picks positions."""
    y = net.op(op, net.conv(net.input("N", 4, *size), 4, 6), **attrs)
    net.output(net.bn(y, 6))


CASES.case("MaxPool whose kernel is 1, with a stride", 13, draw=partial(picking, kernel_shape=[1, 1], strides=[2, 2]))
CASES.case("MaxPool whose kernel is 1 along one axis", 13, draw=partial(picking, kernel_shape=[1, 2]), left=1, reason="negative")
CASES.case("MaxPool along axes of one element", 13, draw=partial(picking, size=(3, 3), kernel_shape=[3, 3], pads=[1] * 4))
CASES.case("GlobalMaxPool over one element", 13, draw=partial(picking, op="GlobalMaxPool", size=(3, 3)))
CASES.case("ReduceMax over axes of one element", 13, draw=partial(picking, op="ReduceMax", size=(3, 3), axes=[2, 3]))


@CASES.case("MaxPool of one element whose indices are an output, a scale of zero", 13, 48, lively=False)
def _(net: Net) -> None:
    y, places = net.ops("MaxPool", net.conv(net.input("N", 4, "H", "W"), 4, 3), outputs=2, kernel_shape=[1, 1], strides=[2, 1])
    gamma, *rest = (net.weight(a, "p") for a in (np.array([0.7, 0.0, -1.3]), net.normal(3), net.normal(3), np.array([0.5, 1.5, 0.8])))
    net.output(net.bn(y, params=[gamma, *rest]))
    net.output(places, dtype=np.int64)


@CASES.case("MaxPool, a scale of zero among positive ones", 13, 48, lively=False)
def _(net: Net) -> None:
    y = net.op("MaxPool", net.conv(net.input("N", 4, "H", "W"), 4, 3), kernel_shape=[2, 2])
    gamma, *rest = (net.weight(a, "p") for a in (np.array([0.0, 0.7, 1.3]), net.normal(3), net.normal(3), np.array([0.5, 1.5, 0.8])))
    net.output(net.bn(y, params=[gamma, *rest]))


@CASES.case("MaxPool whose indices are an output of the model", 13)
def _(net: Net) -> None:
    """Positive scales leave the place of the maximum where it is."""
    y, places = net.ops("MaxPool", net.conv(net.input("N", 4, "H", "W"), 4, 3), outputs=2, kernel_shape=[2, 2])
    net.output(net.bn(y, 3, positive=True))
    net.output(places, dtype=np.int64)


@CASES.case("LpPool", 13, left=1, reason=r"LpPool|rule")
def _(net: Net) -> None:
    net.output(net.bn(net.op("LpPool", net.conv(net.input("N", 4, 8, 8), 4, 6), kernel_shape=[2, 2]), 6))


# --- Resize and Upsample (line 14) -----------------------------------------------------------------


def resized(net: Net, *, scales: tuple[float, ...] = (1, 1, 2, 3), sizes: tuple[int, ...] = (), **attrs: Any) -> None:
    y = net.conv(net.input(2, 4, 6, 5), 4, 6)
    if net.opset < 10:
        y = net.op("Upsample", y, *([net.constant(np.array(scales, np.float32))] if net.opset == 9 else []), **attrs)
    elif net.opset == 10:
        y = net.op("Resize", y, net.constant(np.array(scales, np.float32)), **attrs)
    else:
        roi = net.constant(np.zeros(0, np.float32)) if net.opset < 13 else ""
        size = [net.constant(np.array(scales if not sizes else [], np.float32))] if not sizes else ["", net.ints(*sizes)]
        if sizes and net.opset < 13:
            size[0] = net.constant(np.zeros(0, np.float32))
        y = net.op("Resize", y, roi, *size, **attrs)
    net.output(net.bn(y, 6))


CASES.case(
    "Resize nearest",
    14,
    draw=partial(resized, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    torch=lambda nn: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Upsample(scale_factor=2), nn.BatchNorm2d(6)),
    example=((2, 4, 6, 5),),
)
CASES.case("Resize linear", 14, draw=partial(resized, mode="linear"))
CASES.case("Resize linear with aligned corners", 14, draw=partial(resized, mode="linear", coordinate_transformation_mode="align_corners"))
CASES.case("Resize cubic", 14, draw=partial(resized, mode="cubic", cubic_coeff_a=-0.75))
CASES.case("Resize to sizes", 14, draw=partial(resized, mode="linear", sizes=(2, 6, 7, 4)))
CASES.case("Resize at opset 10", 14, draw=partial(resized, mode="nearest"), opset=10)
CASES.case("Resize at opset 11", 14, draw=partial(resized, mode="nearest"), opset=11)
CASES.case("Resize at opset 19", 14, draw=partial(resized, mode="linear"), opset=19)
CASES.case("Upsample at opset 9", 14, draw=partial(resized, mode="nearest"), opset=9)
CASES.case("Upsample at opset 7", 14, draw=lambda net: upsample7(net), opset=7)


def upsample7(net: Net) -> None:
    y = net.op("Upsample", net.conv(net.input("N", 4, 6, 5), 4, 6), scales=[1.0, 1.0, 2.0, 2.0], mode="linear")
    net.output(net.bn(y, 6))


@CASES.case("Resize by tf_crop_and_resize, which extrapolates", 14, left=1, reason=r"extrapol|crop|shift|sum")
def _(net: Net) -> None:
    roi = net.constant(np.array([0, 0, 0.2, 0.1, 1, 1, 1.4, 0.9], np.float32))
    y = net.op(
        "Resize",
        net.conv(net.input(2, 4, 6, 5), 4, 6),
        roi,
        "",
        net.ints(2, 6, 5, 6),
        mode="linear",
        coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=3.0,
    )
    net.output(net.bn(y, 6))


@CASES.case("Resize across channels", 14, left=1, reason=r"channel|ax[ie]s|Resize", ort=False)
def _(net: Net) -> None:
    y = net.op("Resize", net.conv(net.input(2, 4, 6, 5), 4, 6), "", net.constant(np.array([1, 2, 1, 1], np.float32)), mode="nearest")
    net.output(net.bn(y, 12))


@CASES.case("Resize cubic that leaves the outside out", 14)
def _(net: Net) -> None:
    """exclude_outside renormalises, so the weights sum to 1 still."""
    y = net.op(
        "Resize",
        net.conv(net.input(2, 4, 6, 5), 4, 6),
        "",
        net.constant(np.array([1, 1, 2, 2], np.float32)),
        mode="cubic",
        exclude_outside=1,
    )
    net.output(net.bn(y, 6))


# --- Pad (line 49) -----------------------------------------------------------------------------------


def padded(net: Net, *, mode: str = "constant", value: float = 0.0, shift: bool = True) -> None:
    y = net.pad(net.conv(net.input("N", 4, "H", "W"), 4, 6), 0, 0, 1, 2, 0, 0, 1, 0, mode=mode, value=value)
    net.output(net.bn(y, 6, shift=shift))


for opset in (6, 9, 11, 13, 18, 21):
    CASES.case(f"reflect Pad at opset {opset}", 49, draw=partial(padded, mode="reflect"), opset=opset, ort=opset > 6)
CASES.case("edge Pad", 49, draw=partial(padded, mode="edge"))
CASES.case("wrap Pad", 49, draw=partial(padded, mode="wrap"), opset=19, ort=True)
CASES.case("zero Pad", 49, draw=padded, left=1, reason=r"pad|Pad|shift|fill")
CASES.case("zero Pad, BatchNorm without shift", 49, draw=partial(padded, shift=False))
CASES.case("constant Pad of 2, BatchNorm without shift", 49, draw=partial(padded, value=2.0, shift=False), left=1, reason=r"pad|Pad|fill")
CASES.case("zero Pad at opset 9", 49, draw=padded, opset=9, left=1, reason=r"pad|Pad|shift|fill")


@CASES.case("zero Pad, and a BatchNorm that is alike in all channels", 49)
def _(net: Net) -> None:
    params = [net.weight(np.full(6, value)) for value in (2, 1, 0.25, 0.9)]
    net.output(net.bn(net.pad(net.conv(net.input("N", 4, "H", "W"), 4, 6), 0, 0, 1, 2, 0, 0, 1, 0), 6, params=params))


@CASES.case("zero Pad of no width", 49)
def _(net: Net) -> None:
    net.output(net.bn(net.pad(net.conv(net.input("N", 4, "H", "W"), 4, 6), *[0] * 8), 6))


@CASES.case("Pad over channels", 49, left=1, reason=r"pad|Pad|shift|fill|ax[ie]s|channel")
def _(net: Net) -> None:
    net.output(net.bn(net.pad(net.conv(net.input("N", 4, "H", "W"), 4, 4), 0, 1, 0, 0, 0, 1, 0, 0), 6))


@CASES.case(
    "constant Pad at opset 9, whose attribute holds no float64",
    49,
    opset=9,
    dtype="float64",
    left=1,
    reason="a number that can't",
    ort=False,
)
def _(net: Net) -> None:
    net.output(net.bn(net.pad(net.conv(net.input("N", 4, 5, 5), 4, 1), 0, 0, 1, 0, 0, 0, 0, 0, value=0.75), 1))


# --- places that are computed ---------------------------------------------------------------------


def sampled(net: Net, *, mode: str = "border", shift: bool = True, steers: bool = False) -> None:
    """steers: a BatchNorm on what says where it is read."""
    y, grid = net.conv(net.input("N", 4, "H", "W"), 4, 6), net.input("N", 5, 3, 2, name="grid")
    if steers:
        grid = net.transpose(net.bn(net.transpose(grid, 0, 3, 1, 2), 2), 0, 2, 3, 1)
    y = net.op("GridSample", y, grid, padding_mode=mode)
    net.output(y if steers else net.bn(y, 6, shift=shift), shape=("N", 6, 5, 3))


for mode in ("border", "reflection"):
    CASES.case(f"GridSample with padding by {mode}", 14, draw=partial(sampled, mode=mode), opset=20)
CASES.case(
    "GridSample of zeros beyond the border", 14, draw=partial(sampled, mode="zeros"), opset=20, left=1, reason="it pads with one constant"
)
CASES.case("GridSample of zeros beyond the border, no shift", 14, draw=partial(sampled, mode="zeros", shift=False), opset=20)
CASES.case("what steers a GridSample", 14, draw=partial(sampled, steers=True), opset=20, left=1, reason="change where it reads")
