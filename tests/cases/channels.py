"""Operators that rearrange, take apart or join channels before a BatchNorm (lines 15 to 18)."""

from __future__ import annotations

from functools import partial

import numpy as np

from .builder import Net, element
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


@CASES.case("GatherND of channels", 16, opset=13)
def _(net: Net) -> None:
    y = net.transpose(net.conv(net.input("N", 4, "H", "W"), 4, 6), 1, 0, 2, 3)
    y = net.op("GatherND", y, net.constant(np.array([[4], [-1], [0]], np.int64)))
    net.output(net.bn(net.transpose(y, 1, 0, 2, 3), 3))


@CASES.case("GatherND of single elements", 16, opset=13)
def _(net: Net) -> None:
    y = net.conv(net.input(3, 4, 5, 5), 4, 6)
    places = np.stack(np.meshgrid([0, 2, 1], [5, 3], [1], indexing="ij"), -1)
    net.output(net.bn(net.op("GatherND", net.transpose(y, 0, 1, 3, 2), net.constant(places.astype(np.int64))), 2))


@CASES.case("BatchNorm before a GatherND", 16, opset=13)
def _(net: Net) -> None:
    y = net.transpose(net.bn(net.op("Sigmoid", net.input(2, 6, 5)), 6), 1, 2, 0)
    y = net.op("GatherND", y, net.constant(np.array([[1], [5], [2]], np.int64)))
    net.output(net.conv(net.transpose(y, 2, 0, 1), 3, 4, dims=1))


@CASES.case("GatherElements along the channels", 16, opset=13)
def _(net: Net) -> None:
    places = np.broadcast_to(np.array([5, -6, 2]).reshape(1, 3, 1, 1), (2, 3, 4, 4))
    y = net.op("GatherElements", net.conv(net.input(2, 4, 6, 6), 4, 6), net.constant(np.array(places, np.int64)), axis=1)
    net.output(net.bn(y, 3))


def compressed(net: Net, mask: tuple[int, ...], **attrs: int) -> None:
    y = net.conv(net.input(2, 4, 6, 6), 4, 6)
    kept = net.op("Compress", y, net.constant(np.array(mask, bool)), **attrs)
    net.output(net.bn(kept if attrs else net.reshape(kept, 2, 3, 4, 4), sum(mask) if attrs.get("axis") == 1 else 6 if attrs else 3))


CASES.case("Compress of the channels", 16, draw=partial(compressed, mask=(1, 0, 1, 1, 0, 1), axis=1))
CASES.case("Compress along another axis", 16, draw=partial(compressed, mask=(0, 1, 1), axis=-1))
CASES.case("Compress of all, by whole channels", 16, draw=partial(compressed, mask=(1,) * 48 + (0,) * 48 + (1,) * 48))
CASES.case(
    "Compress of all that mixes channels", 16, draw=partial(compressed, mask=(0,) * 8 + (1,) * 96), left=1, reason="copies|differ|varies"
)


@CASES.case("Compress by a computed mask", 16)
def _(net: Net) -> None:
    y = net.conv(net.input(2, 4, 6, 6), 4, 6)
    mask = net.op("Greater", net.op("ReduceMax", net.input(4, 2, name="z"), axes=[1], keepdims=0), net.scalar(0.1))
    net.output(net.bn(net.op("Compress", y, mask, axis=2), 6))


def centred(net: Net, sizes: tuple[int, int], shift: bool = True) -> None:
    y = net.conv(net.input("N", 4, 7, 8), 4, 6, 1)
    net.output(net.bn(net.op("CenterCropPad", y, net.ints(*sizes), axes=[2, 3]), 6, shift=shift))


CASES.case("CenterCropPad that crops", 16, draw=partial(centred, sizes=(4, 5)), opset=18)
CASES.case("CenterCropPad that crops and pads, no shift", 16, draw=partial(centred, sizes=(4, 11), shift=False), opset=18)
CASES.case("CenterCropPad that crops and pads", 16, draw=partial(centred, sizes=(4, 11)), opset=18, left=1, reason="pads with one constant")
CASES.case("CenterCropPad that changes nothing", 16, draw=partial(centred, sizes=(7, 8)), opset=18)


@CASES.case("GatherElements that mixes channels", 16, opset=13, left=1, reason="varies|differ|ax")
def _(net: Net) -> None:
    places = net.rng.integers(0, 6, (2, 3, 4, 4))
    y = net.op("GatherElements", net.conv(net.input(2, 4, 6, 6), 4, 6), net.constant(places.astype(np.int64)), axis=1)
    net.output(net.bn(y, 3))


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


@CASES.case("two parts of one conv with the channels last, a BatchNorm on each, and a part that nobody reads", 16)
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, 5, 7), 4, 6)
    for i, places in enumerate(((0, 3, 1), (5, 4), (2,))):
        part = net.transpose(net.op("Gather", net.transpose(y, 0, 2, 3, 1), net.ints(*places), axis=3), 0, 3, 1, 2)
        if i < 2:
            net.output(net.bn(part, len(places)))


@CASES.case("two slices of one conv, a BatchNorm on each", 16)
def _(net: Net) -> None:
    """Two users, who read different channels."""
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    net.output(net.bn(net.slice(y, 1, 0, 3), 3), net.bn(net.slice(y, 1, 3, 6), 3))


# --- sequences (line 16): as torch.export writes a chunk -------------------------------------------


def at(net: Net, parts: str, position: int) -> str:
    return net.op("SequenceAt", parts, net.constant(np.array(position, np.int64)))


def chunks(
    net: Net, *, split: int | tuple[int, ...] | None = 3, places: tuple[int, ...] = (0, 1), axis: int = 1, keepdims: int = 1
) -> None:
    """The parts of a convolution's output along the channels, each with a BatchNorm of its own."""
    sizes = [] if split is None else [net.constant(np.array(split, np.int64))]
    parts = net.op("SplitToSequence", net.conv(net.input("N", 4, "H", "W"), 4, 6), *sizes, axis=axis, keepdims=keepdims)
    taken = [at(net, parts, place) for place in places]
    if not keepdims:
        taken = [net.unsqueeze(y, 1) for y in taken]
    channels = [1 if split is None else split if isinstance(split, int) else split[place] for place in places]
    net.output(*[net.bn(y, n) for y, n in zip(taken, channels, strict=True)])


CASES.case("SplitToSequence and SequenceAt", 16, draw=chunks)
CASES.case("SplitToSequence into uneven parts", 16, draw=partial(chunks, split=(1, 2, 3), places=(2, 0)))
CASES.case("SplitToSequence along a negative axis, and negative places", 16, draw=partial(chunks, axis=-3, places=(-1, -2)))
CASES.case("SplitToSequence into single channels", 16, draw=partial(chunks, split=None, places=(4, -1)))
CASES.case("SplitToSequence into single channels without their axis", 16, draw=partial(chunks, split=None, places=(4, -1), keepdims=0))
CASES.case("SplitToSequence at opset 11", 16, draw=chunks, opset=11)


@CASES.case("SplitToSequence whose last part is shorter", 16)
def _(net: Net) -> None:
    parts = net.op("SplitToSequence", net.conv(net.input("N", 4, "H", "W"), 4, 7), net.constant(np.array(3, np.int64)), axis=1)
    net.output(net.bn(at(net, parts, -1), 1), net.bn(at(net, parts, 1), 3))


@CASES.case("chunks, one BatchNorm, and a concatenation", 16, 17)
def _(net: Net) -> None:
    """A ghost BatchNorm along the batch: every part gets the same map."""
    parts = net.op("SplitToSequence", net.conv(net.input(4, 4, 6, 6), 4, 6), net.constant(np.array(2, np.int64)), axis=0)
    params = net.bn_params(6)
    done = [net.bn(at(net, parts, i), params=params) for i in range(2)]
    net.output(net.op("Sigmoid", net.op("ConcatFromSequence", net.op("SequenceConstruct", *done), axis=0)))


@CASES.case("SequenceConstruct and ConcatFromSequence", 17)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    y = net.op("ConcatFromSequence", net.op("SequenceConstruct", net.conv(x, 4, 2), net.conv(x, 4, 4)), axis=1)
    net.output(net.bn(y, 6))


@CASES.case("ConcatFromSequence with a new axis", 17)
def _(net: Net) -> None:
    x = net.input("N", 4, "L")
    y = net.op("ConcatFromSequence", net.op("SequenceConstruct", net.conv(x, 4, 6, dims=1), net.conv(x, 4, 6, dims=1)), axis=-1, new_axis=1)
    net.output(net.bn(y, 6))


@CASES.case("ConcatFromSequence with a constant part", 17)
def _(net: Net) -> None:
    x = net.input(1, 4, 5, 5)
    parts = net.op("SequenceConstruct", net.conv(x, 4, 4, kernel=1), net.weight(net.normal(1, 2, 5, 5)))
    parts = net.op("SequenceInsert", parts, net.conv(x, 4, 3, kernel=1))
    net.output(net.bn(net.op("ConcatFromSequence", parts, axis=1), 9))


@CASES.case("a sequence that grows and shrinks", 16, 17)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    first, second, third = (net.conv(x, 4, n) for n in (2, 3, 4))
    parts = net.op("SequenceInsert", net.op("SequenceEmpty", dtype=element(net.dtype)), second)
    parts = net.op("SequenceInsert", net.op("SequenceInsert", parts, first, net.constant(np.array(0, np.int64))), third)
    shorter = net.op("Identity", net.op("SequenceErase", parts, net.constant(np.array(0, np.int64))))
    net.output(net.bn(net.op("ConcatFromSequence", shorter, axis=1), 7), shape=["N", 7, "H", "W"])
    net.output(net.op("Sigmoid", first))


@CASES.case("BatchNorm before a sequence", 16, opset=18)
def _(net: Net) -> None:
    parts = net.op("SplitToSequence", net.bn(net.op("Sigmoid", net.input("N", 6, "H", "W")), 6), net.ints(2, 4), axis=1)
    net.output(net.conv(at(net, parts, 1), 4, 3), net.conv(at(net, parts, 0), 2, 3))


@CASES.case("BatchNorm before a sequence that is joined again", 16, 17)
def _(net: Net) -> None:
    parts = net.op("SplitToSequence", net.bn(net.op("Sigmoid", net.input("N", 6, 5, 5)), 6), net.ints(2, 4), axis=1)
    parts = net.op("SequenceInsert", parts, net.op("Sigmoid", net.input("N", 2, 5, 5, name="z")))
    net.output(net.conv(net.op("ConcatFromSequence", parts, axis=1), 8, 3), net.op("Tanh", at(net, parts, -1)))


@CASES.case("a place in a sequence that the caller gives", 16, left=1, reason="sequence", below=1)
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    parts = net.op("SplitToSequence", y, net.constant(np.array(3, np.int64)), axis=1)
    place = net.input(name="place", dtype=np.int64)
    net.output(net.bn(net.op("SequenceAt", parts, place), 3), shape=["N", 3, "H", "W"])


@CASES.case("a sequence whose parts are used otherwise too", 16, left=1, reason="is also used by", below=1)
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    parts = net.op("SplitToSequence", y, net.constant(np.array(3, np.int64)), axis=1)
    place = net.input(name="place", dtype=np.int64)
    net.output(net.bn(at(net, parts, 0), 3), net.op("SequenceAt", parts, place), shape=["N", 3, "H", "W"])


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
