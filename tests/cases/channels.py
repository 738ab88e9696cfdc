"""Operators that rearrange, take apart or join channels before a BatchNorm (lines 15 to 18)."""

from __future__ import annotations

from functools import partial

from .builder import Net
from .case import Theme
from .moves import MIXED

CASES = Theme()


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
