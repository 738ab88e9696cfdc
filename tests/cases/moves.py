"""Operators that only move data between a layer and its BatchNorm (lines 7, 11, 15, 16, 17, 18)."""

from __future__ import annotations

from functools import partial

import numpy as np

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


# --- DepthToSpace and pixel shuffle (line 15) ----------------------------------------------------


@CASES.case("DepthToSpace DCR", 15)
def _(net: Net) -> None:
    net.output(net.bn(net.op("DepthToSpace", net.conv(net.input("N", 4, 5, 6), 4, 12), blocksize=2), 3))


@CASES.case(
    "DepthToSpace CRD",
    15,
    torch=lambda nn: nn.Sequential(nn.Conv2d(4, 12, 3), nn.PixelShuffle(2), nn.BatchNorm2d(3)),
    example=((2, 4, 5, 6),),
)
def _(net: Net) -> None:
    net.output(net.bn(net.op("DepthToSpace", net.conv(net.input("N", 4, 5, 6), 4, 12), blocksize=2, mode="CRD"), 3))


@CASES.case("DepthToSpace with dynamic sizes", 15)
def _(net: Net) -> None:
    net.output(net.bn(net.op("DepthToSpace", net.conv(net.input("N", 4, "H", "W"), 4, 12), blocksize=2, mode="CRD"), 3))


@CASES.case("pixel shuffle as Reshape, Transpose, Reshape", 15, 16)
def _(net: Net) -> None:
    y = net.reshape(net.conv(net.input("N", 4, 5, 6), 4, 12), -1, 3, 2, 2, 3, 4)
    net.output(net.bn(net.reshape(net.transpose(y, 0, 1, 4, 2, 5, 3), -1, 3, 6, 8), 3))


@CASES.case("SpaceToDepth, channels of one block unlike", 15, left=1, reason=MIXED)
def _(net: Net) -> None:
    net.output(net.bn(net.op("SpaceToDepth", net.conv(net.input("N", 4, 6, 6), 4, 3), blocksize=2), 12))


# --- shuffle, Gather, Slice, Split (line 16) -----------------------------------------------------


@CASES.case(
    "channel shuffle",
    16,
    torch=lambda nn: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ChannelShuffle(2), nn.BatchNorm2d(6)),
    example=((2, 4, 6, 5),),
)
def _(net: Net) -> None:
    y = net.reshape(net.conv(net.input("N", 4, 6, 5), 4, 6), -1, 2, 3, 4, 3)
    net.output(net.bn(net.reshape(net.transpose(y, 0, 2, 1, 3, 4), -1, 6, 4, 3), 6))


@CASES.case("channel shuffle with dynamic sizes", 16)
def _(net: Net) -> None:
    """As many sizes as can be are copied by 0."""
    y = net.reshape(net.conv(net.input("N", 4, "L"), 4, 6, dims=1), 0, 2, 3, -1)
    net.output(net.bn(net.reshape(net.transpose(y, 0, 2, 1, 3), 0, 6, -1), 6))


def gathered(net: Net, *, indices: tuple[int, ...], axis: int = 1) -> None:
    y = net.conv(net.input("N", 4, 6, "W"), 4, 6)
    net.output(net.bn(net.op("Gather", y, net.ints(*indices), axis=axis), len(indices)))


CASES.case("Gather that permutes channels", 16, draw=partial(gathered, indices=(5, 3, 1, 0, 2, 4)))
CASES.case("Gather of some channels", 16, draw=partial(gathered, indices=(4, 0)))
CASES.case("Gather with negative indices", 16, draw=partial(gathered, indices=(-1, 1, -3)))
CASES.case("Gather that repeats a channel", 16, draw=partial(gathered, indices=(0, 1, 1)), left=1, reason=MIXED)


@CASES.case("Slice of some channels", 16)
def _(net: Net) -> None:
    net.output(net.bn(net.slice(net.conv(net.input("N", 4, "H", "W"), 4, 6), 1, 1, 4), 3))


@CASES.case("Slice of every second channel", 16)
def _(net: Net) -> None:
    net.output(net.bn(net.slice(net.conv(net.input("N", 4, "H", "W"), 4, 6), 1, 0, 6, 2), 3))


@CASES.case("Slice that reverses the channels", 16)
def _(net: Net) -> None:
    net.output(net.bn(net.slice(net.conv(net.input("N", 4, "H", "W"), 4, 6), 1, -1, -7, -1), 6))


@CASES.case("Slice of space (a crop)", 16)
def _(net: Net) -> None:
    y = net.slice(net.conv(net.input("N", 4, "H", "W"), 4, 6), 3, 1, -1)
    net.output(net.bn(net.slice(y, 2, 0, 4), 6))


@CASES.case("Slice with attributes at opset 9", 16, opset=9)
def _(net: Net) -> None:
    net.output(net.bn(net.slice(net.conv(net.input("N", 4, "H", "W"), 4, 6), 1, 2, 6), 4))


def split_bns(net: Net, *, normed: tuple[int, ...] = (0, 1), opset_sizes: tuple[int, ...] = (2, 4)) -> None:
    parts = net.split(net.conv(net.input("N", 4, "H", "W"), 4, sum(opset_sizes)), 1, *opset_sizes)
    net.output(*[net.bn(p, n) if i in normed else p for i, (p, n) in enumerate(zip(parts, opset_sizes, strict=True))])


CASES.case("Split with a BatchNorm on each part", 16, draw=split_bns)
CASES.case("Split with a BatchNorm on one part", 16, draw=partial(split_bns, normed=(1,)))
CASES.case("Split into three", 16, draw=partial(split_bns, normed=(0, 2), opset_sizes=(1, 2, 3)))
for opset in (7, 11, 13, 18, 22):
    CASES.case(f"Split at opset {opset}", 16, draw=split_bns, opset=opset)


@CASES.case("Split by num_outputs", 16, opset=18)
def _(net: Net) -> None:
    parts = net.ops("Split", net.conv(net.input("N", 4, "H", "W"), 4, 6), outputs=2, axis=1, num_outputs=2)
    net.output(*[net.bn(p, 3) for p in parts])


@CASES.case("two slices of one conv, a BatchNorm on each", 16)
def _(net: Net) -> None:
    """Two users, who read different channels."""
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    net.output(net.bn(net.slice(y, 1, 0, 3), 3), net.bn(net.slice(y, 1, 3, 6), 3))


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


# --- Concat (lines 17, 18) --------------------------------------------------------------------------


@CASES.case("Concat of two convs", 17)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    y = net.op("Concat", net.conv(x, 4, 2), net.conv(x, 4, 3, bias=False), axis=1)
    net.output(net.bn(y, 5))


@CASES.case("Concat of a conv, a pooled conv and a gemm image", 12, 17)
def _(net: Net) -> None:
    x = net.input("N", 4, 6, 6)
    pooled = net.op("AveragePool", net.conv(x, 4, 3, 1, pads=0), kernel_shape=[3, 3])
    dense = net.reshape(net.gemm(net.op("Flatten", x), 144, 32), -1, 2, 4, 4)
    net.output(net.bn(net.op("Concat", net.conv(x, 4, 2), pooled, dense, axis=1), 7))


@CASES.case("Concat along space", 17)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    net.output(net.bn(net.op("Concat", net.conv(x, 4, 6), net.conv(x, 4, 6), axis=-1), 6))


@CASES.case("Concat of a conv with itself along space", 17)
def _(net: Net) -> None:
    """Both uses ask for the same map."""
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    net.output(net.bn(net.op("Concat", y, y, axis=2), 6))


@CASES.case("Concat of a conv with an input", 18, left=1, reason=r"input of the model|input")
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    net.output(net.bn(net.op("Concat", net.conv(x, 4, 6, pads=1), x, axis=1), 10))


@CASES.case("Concat of a conv with a sigmoid", 18, left=1, reason=r"Sigmoid")
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    net.output(net.bn(net.op("Concat", net.conv(x, 4, 6), net.op("Sigmoid", net.conv(x, 4, 2)), axis=1), 8))


@CASES.case("two overlapping slices of one conv, a BatchNorm on each", 16, 36, left=2, reason=r"used|differ")
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    net.output(net.bn(net.slice(y, 1, 0, 4), 4), net.bn(net.slice(y, 1, 3, 6), 3))


@CASES.case("Concat of a conv with itself along channels", 17, left=1, reason=r"used|differ|twice|maps")
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 3)
    net.output(net.bn(net.op("Concat", y, y, axis=1), 6))


@CASES.case("Concat whose branch is used elsewhere", 17, left=1, reason=r"used|elsewhere|users")
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    y = net.conv(x, 4, 2)
    net.output(net.bn(net.op("Concat", y, net.conv(x, 4, 3), axis=1), 5), net.relu(y))
