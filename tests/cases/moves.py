"""Operators that only move data between a layer and its BatchNorm, or pass them on (lines 7, 11)."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx

from .builder import Net
from .case import Theme

CASES = Theme()
MIXED = r"ax[ie]s|copies|varies|differ"


# --- Reshape, Flatten, Squeeze, Unsqueeze, Transpose (line 7) -----------------------------------


@CASES.case(
    "Flatten of a conv to 1 x 1",
    7,
    torch=lambda nn: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.BatchNorm1d(6)),
    example=((2, 4, 3, 3),),
)
def _(net: Net) -> None:
    net.output(net.bn(net.op("Flatten", net.conv(net.input("N", 4, 3, 3), 4, 6)), 6))


@CASES.case(
    "Flatten that merges space into channels",
    7,
    left=1,
    reason=MIXED,
    torch=lambda nn: nn.Sequential(nn.Conv2d(4, 3, 3), nn.Flatten(), nn.BatchNorm1d(18)),
    example=((2, 4, 5, 4),),
)
def _(net: Net) -> None:
    """Every pixel of a channel has a map of its own."""
    net.output(net.bn(net.op("Flatten", net.conv(net.input("N", 4, 5, 4), 4, 3)), 18))


@CASES.case("Flatten before a dense layer, BatchNorm behind it", 7)
def _(net: Net) -> None:
    x = net.op("Flatten", net.conv(net.input("N", 4, 5, 4), 4, 3))
    net.output(net.bn(net.gemm(x, 18, 6), 6))


@CASES.case("Squeeze behind a conv", 7)
def _(net: Net) -> None:
    net.output(net.bn(net.squeeze(net.conv(net.input("N", 4, 3, 3), 4, 6), 2, 3), 6))


@CASES.case("Squeeze of one of two axes", 7)
def _(net: Net) -> None:
    net.output(net.bn(net.squeeze(net.conv(net.input("N", 4, 3, "W"), 4, 6), 2), 6))


@CASES.case("Squeeze with a negative axis at opset 11", 7, opset=11)
def _(net: Net) -> None:
    net.output(net.bn(net.squeeze(net.conv(net.input("N", 4, "H", 3), 4, 6), -1), 6))


@CASES.case(
    "Unsqueeze behind a dense layer",
    7,
    torch=lambda nn: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (6, 1, 1)), nn.BatchNorm2d(6)),
    example=((5, 4),),
)
def _(net: Net) -> None:
    net.output(net.bn(net.unsqueeze(net.gemm(net.input("N", 4), 4, 6), 2, 3), 6))


def squeezed(net: Net) -> None:
    y = net.bn(net.unsqueeze(net.gemm(net.input("N", 4), 4, 6), 2), 6)
    net.output(net.squeeze(net.op("LeakyRelu", y), 2))


for opset in (7, 9, 11, 13, 21):
    CASES.case(f"Unsqueeze and Squeeze at opset {opset}", 7, draw=squeezed, opset=opset)


@CASES.case(
    "Reshape of a dense layer into an image",
    7,
    torch=lambda nn: nn.Sequential(nn.Linear(4, 24), nn.Unflatten(1, (6, 2, 2)), nn.BatchNorm2d(6)),
    example=((5, 4),),
)
def _(net: Net) -> None:
    """The generator of a DCGAN: each channel's scale repeats over its pixels."""
    net.output(net.bn(net.reshape(net.gemm(net.input("N", 4), 4, 24), -1, 6, 2, 2), 6))


@CASES.case("Reshape of a matmul into an image", 4, 7)
def _(net: Net) -> None:
    net.output(net.bn(net.reshape(net.op("MatMul", net.input("N", 4), net.matrix(4, 24)), -1, 6, 4), 6))


@CASES.case("Reshape that copies sizes by 0", 7)
def _(net: Net) -> None:
    net.output(net.bn(net.reshape(net.conv(net.input("N", 4, 6, 5), 4, 6), 0, 0, -1), 6))


@CASES.case("Reshape to a shape computed in the graph", 7)
def _(net: Net) -> None:
    """view(x.size(0), x.size(1), -1), as torch's older exporter writes it."""
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    ones = net.op("Mul", y, net.scalar(1.0))
    shape = net.op("Shape", net.input("N", 6, name="like"))
    sizes = [net.unsqueeze(net.op("Gather", shape, net.constant(np.array(i, np.int64))), 0) for i in (0, 1)]
    net.output(net.bn(net.op("Reshape", ones, net.op("Concat", *sizes, net.ints(-1), axis=0)), 6))


@CASES.case("Reshape at opset 6 and IR 3", 7, opset=6, ort=False)
def _(net: Net) -> None:
    net.output(net.bn(net.reshape(net.conv(net.input("N", 4, 6, 5), 4, 6), 0, 6, -1), 6))


@CASES.case("Reshape that joins pairs of channels", 7)
def _(net: Net) -> None:
    """[N, 6, 4, 4] -> [N, 3, 8, 4]: channel c holds the conv's channels 2c and 2c + 1 whole."""
    net.output(net.bn(net.reshape(net.conv(net.input("N", 4, 6, 6), 4, 6), -1, 3, 8, 4), 3))


@CASES.case("Reshape that splits a channel", 7, left=1, reason=MIXED)
def _(net: Net) -> None:
    net.output(net.bn(net.reshape(net.conv(net.input("N", 4, 6, 6), 4, 6), -1, 12, 2, 4), 12))


@CASES.case("Reshape that mixes channels", 7, left=1, reason=MIXED)
def _(net: Net) -> None:
    """[N, 6, 4, 4] -> [N, 4, 6, 4]: 24 elements to a channel where the conv has 16."""
    net.output(net.bn(net.reshape(net.conv(net.input("N", 4, 6, 6), 4, 6), -1, 4, 6, 4), 4))


@CASES.case("Reshape that mixes channels, sizes equal by chance", 7, left=1, reason=MIXED)
def _(net: Net) -> None:
    """[N, 4, 6, 6] read as [N, 6, 4, 6] and back to six channels."""
    net.output(net.bn(net.reshape(net.conv(net.input(2, 4, 8, 8), 4, 4), 2, 6, 4, 6), 6))


@CASES.case("Reshape that swaps length and channels without moving data", 7, left=1, reason=MIXED)
def _(net: Net) -> None:
    """[N, 6, 6] -> Reshape -> [N, 6, 6] is no transposition: the dense layer's channels stay last."""
    net.output(net.bn(net.reshape(linear(net, 2, 6, n=6), 2, 6, 6), 6))


@CASES.case("Reshape that moves rows of the batch", 7, left=1, reason=MIXED)
def _(net: Net) -> None:
    net.output(net.bn(net.reshape(net.gemm(net.input(4, 4), 4, 6), 2, 12), 12))


@CASES.case("MatMul, Transpose, BatchNorm, sizes equal by chance", 6, 7, left=1, reason=MIXED)
def _(net: Net) -> None:
    """The normalised axis 1 is the matmul's row."""
    net.output(net.bn(net.transpose(net.op("MatMul", net.input(6, 4), net.matrix(4, 6)), 1, 0), 6))


@CASES.case("MatMul, Reshape, BatchNorm, sizes equal by chance", 6, 7, left=1, reason=MIXED)
def _(net: Net) -> None:
    net.output(net.bn(net.reshape(net.op("MatMul", net.input(4, 4), net.matrix(4, 4)), 1, 4, 4), 4))


@CASES.case("Transpose to channels last and back", 7)
def _(net: Net) -> None:
    y = net.transpose(net.relu(net.transpose(net.input("N", 4, "H", "W"), 0, 2, 3, 1)), 0, 3, 1, 2)
    y = net.transpose(net.transpose(net.conv(y, 4, 6), 0, 2, 3, 1), 0, 3, 1, 2)
    net.output(net.bn(y, 6))


@CASES.case("Transpose without perm", 7)
def _(net: Net) -> None:
    """[L, 6, N] reversed."""
    y = net.transpose(net.conv(net.input("N", 4, "L"), 4, 6, dims=1), 0, 1, 2)
    net.output(net.bn(net.op("Transpose", y), 6))


def linear(net: Net, *lead: int | str, n: int) -> str:
    """A dense layer with bias on [*lead, 4]."""
    return net.op("Add", net.op("MatMul", net.input(*lead, 4), net.matrix(4, n)), net.bias(n))


# --- what passes data on (line 11) ---------------------------------------------------------------


@CASES.case("Identity between", 11)
def _(net: Net) -> None:
    net.output(net.bn(net.op("Identity", net.op("Identity", net.conv(net.input("N", 4, "H", "W"), 4, 6))), 6))


def dropout(net: Net) -> None:
    net.output(net.bn(net.dropout(net.gemm(net.input("N", 4), 4, 6)), 6))


for opset in (6, 7, 10, 12, 13, 22):
    CASES.case(f"Dropout between, opset {opset}", 11, draw=dropout, opset=opset, ort=opset > 6)
CASES.case(
    "Dropout and Identity in a chain",
    11,
    draw=lambda net: net.output(net.op("Identity", net.bn(net.dropout(net.conv(net.input("N", 4, "L"), 4, 6, dims=1)), 6))),
    torch=lambda nn: nn.Sequential(nn.Conv1d(4, 6, 3), nn.Dropout(), nn.BatchNorm1d(6), nn.Identity()),
    example=((2, 4, 7),),
)


@CASES.case("Dropout whose mask is an output of the model", 11)
def _(net: Net) -> None:
    y = net.gemm(net.input("N", 4), 4, 6)
    y, mask = net.ops("Dropout", y, net.constant(np.array(0.5, np.float32)), net.constant(np.array(False)), outputs=2)
    net.output(net.bn(y, 6))
    net.output(mask, dtype=np.bool_)


@CASES.case("Cast from float16 to float32 between", 11, double=False, dtype="float16")
def _(net: Net) -> None:
    y = net.op("Cast", net.conv(net.input("N", 4, "H", "W"), 4, 6), to=1)
    net.statistics = net.affine = np.float32
    net.output(net.bn(y, 6), dtype=np.float32)


@CASES.case("Cast to an integer type and back", 11, left=1, reason=r"Cast|rule", double=False)
def _(net: Net) -> None:
    """Truncation is no affine map."""
    y = net.op("Cast", net.op("Cast", net.conv(net.input("N", 4, "H", "W"), 4, 6), to=7), to=1)
    net.output(net.bn(y, 6))


# --- Tile, Expand, Flip ---------------------------------------------------------------------------


@CASES.case("Expand of a pooled conv", 7)
def _(net: Net) -> None:
    y = net.op("GlobalAveragePool", net.conv(net.input("N", 4, "H", "W"), 4, 6))
    net.output(net.bn(net.op("Expand", y, net.ints(1, 6, 3, 2)), 6))


@CASES.case("Tile along space", 7)
def _(net: Net) -> None:
    net.output(net.bn(net.op("Tile", net.conv(net.input("N", 4, 5, "W"), 4, 6), net.ints(1, 1, 2, 1)), 6))


@CASES.case("Tile along channels, copies unlike", 7, left=1, reason=MIXED)
def _(net: Net) -> None:
    net.output(net.bn(net.op("Tile", net.conv(net.input("N", 4, 5, 5), 4, 3), net.ints(1, 2, 1, 1)), 6))


# --- data at computed places -----------------------------------------------------------------------


@CASES.case("Gather of rows at computed places", 16, 58)
def _(net: Net) -> None:
    places = net.input("M", name="places", dtype="int64")
    net.output(net.op("LeakyRelu", net.bn(net.op("Gather", net.gemm(net.input(5, 4), 4, 6), places, axis=0), 6)))


@CASES.case("Gather of neighbours at computed places", 16, 58)
def _(net: Net) -> None:
    places = net.input("M", 3, name="places", dtype="int64")
    y = net.op("Gather", net.gemm(net.input(5, 4), 4, 6), places, axis=0)
    net.output(net.op("LeakyRelu", net.bn(net.transpose(y, 0, 2, 1), 6)))


@CASES.case("Gather of channels at computed places", 16, left=1, reason=r"computed places")
def _(net: Net) -> None:
    places = net.input(6, name="places", dtype="int64")
    net.output(net.op("LeakyRelu", net.bn(net.op("Gather", net.conv(net.input("N", 4, "H", "W"), 4, 6), places, axis=1), 6)))


@CASES.case("GatherND at computed places", 16, below=2)
def _(net: Net) -> None:
    places = net.input(2, "M", 1, name="places", dtype="int64")
    y = net.transpose(net.conv(net.input(2, 4, "H", "W"), 4, 6), 0, 2, 3, 1)
    y = net.op("GatherND", y, places, batch_dims=1)
    net.output(net.op("LeakyRelu", net.bn(net.transpose(y, 0, 3, 1, 2), 6)))


@CASES.case("GatherElements at computed places", 16)
def _(net: Net) -> None:
    places = net.input(2, 6, 5, 5, name="places", dtype="int64")
    y = net.conv(net.input(2, 4, 7, 7), 4, 6)
    net.output(net.op("LeakyRelu", net.bn(net.op("GatherElements", y, places, axis=2), 6)))


def scattered(net: Net, reduction: str = "add", each: bool = False, bias: bool = True, full: bool = False) -> None:
    """As graph networks gather: what the nodes send along edges, where these end. each: with places for each channel."""
    y = net.gemm(net.input(4, 5), 5, 6, bias=False)
    starts, ends = (net.input("M", name=name, dtype="int64") for name in ("starts", "ends"))
    sent, places = net.op("Gather", y, starts, axis=0), net.unsqueeze(ends, 1)
    if each:
        places = net.op("Expand", places, net.ints(1, 6))
    base = y if full else net.op("ConstantOfShape", net.op("Shape", y), value=onnx.numpy_helper.from_array(np.zeros(1, net.dtype)))
    how = {"axis": 0} if each else {}
    y = net.op("ScatterElements" if each else "ScatterND", base, places, sent, reduction=reduction, **how)
    net.output(net.op("Tanh", net.bn(net.op("Add", y, net.bias(6)) if bias else y, 6, positive=True)))


for kind in ("add", "max"):
    for each in (False, True):
        name = f"Scatter{'Elements' if each else 'ND'} by {kind}"
        CASES.case(f"{name} onto zeros", 16, draw=partial(scattered, reduction=kind, each=each), opset=18)
CASES.case("a sum of messages, a shift", 16, draw=partial(scattered, bias=False), opset=18, left=1, reason="shift is not zero")
CASES.case("a sum of messages onto values", 16, draw=partial(scattered, full=True), opset=18, left=1, reason="known to be zero")
CASES.case("messages in others' places", 16, draw=partial(scattered, reduction="none"), opset=18, left=1, reason="puts elements")


@CASES.case("ReverseSequence", 16, below=4)
def _(net: Net) -> None:
    """Between two directions of a recurrent network: [time, batch, features]."""
    x, lengths = net.input(4, 3, 5), net.op("Add", net.input(3, name="lengths", dtype="int64"), net.ints(1))
    y = net.op("ReverseSequence", net.op("Add", net.op("MatMul", x, net.matrix(5, 6)), net.bias(6)), lengths)
    net.output(net.op("Tanh", net.transpose(net.bn(net.transpose(y, 1, 2, 0), 6), 2, 0, 1)))
