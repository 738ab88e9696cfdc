"""Time over the size of the graph: many layers, a wide concatenation, a value with many readers, a long chain of moves.

    python -m tests.bench.scaling [--sizes 250,500,1000] [--shapes chain,concat,readers,moves]

Each line: the processor seconds of inspect, of fuse without its check, of comparing the coefficients of both, and of cutting into the
stages of recalibration; then how much the slowest of these grew since the line before, where the graph grew as the sizes say.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from cases.builder import Net

from bnfold import api
from bnfold.backends.onnx.recalibration.plan import plan_of
from bnfold.cli import COLLECTED

CHANNELS = 2


def chain(net: Net, size: int) -> str:
    """So many times convolution, BatchNorm and Relu, one behind the other."""
    x = net.input("N", CHANNELS, 4, 4)
    for _ in range(size):
        x = net.relu(net.bn(net.conv(x, CHANNELS, CHANNELS, 1), CHANNELS))
    return x


def concat(net: Net, size: int) -> str:
    """A BatchNorm behind so many convolutions."""
    x = net.input("N", CHANNELS, 4, 4)
    return net.bn(net.op("Concat", *(net.conv(x, CHANNELS, CHANNELS, 1) for _ in range(size)), axis=1), CHANNELS * size)


def readers(net: Net, size: int) -> str:
    """A BatchNorm that so many convolutions read."""
    x = net.bn(net.input("N", CHANNELS, 4, 4), CHANNELS)
    return net.op("Sum", *(net.conv(x, CHANNELS, CHANNELS, 1) for _ in range(size)))


def moves(net: Net, size: int) -> str:
    """A BatchNorm behind so many transpositions of a convolution."""
    x = net.conv(net.input("N", CHANNELS, 4, 4), CHANNELS, CHANNELS, 1)
    for _ in range(size):
        x = net.op("Transpose", x, perm=[0, 1, 3, 2])
    return net.bn(x, CHANNELS)


SHAPES: dict[str, Callable[[Net, int], str]] = {each.__name__: each for each in (chain, concat, readers, moves)}


def graph(shape: str, size: int) -> ir.Model:
    net = Net("scaling")
    net.output(SHAPES[shape](net, size))
    return ir.from_proto(net.model())


def steps(model: ir.Model) -> dict[str, Callable[[], object]]:
    """What is timed, in order."""
    fused = []
    return {
        "inspect": lambda: api.inspect(model),
        "fuse": lambda: fused.append(api.fuse(model, check=False)[0]),
        "coefficients": lambda: api.verify(model, fused[0], coefficients_only=True),
        "stages": lambda: plan_of(model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="250,500,1000")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    args = parser.parse_args()
    gc.set_threshold(*COLLECTED)
    print("| graph | size | inspect | fuse | coefficients | stages | growth |\n|---|--:|--:|--:|--:|--:|--:|")
    for shape in args.shapes.split(","):
        before = None
        for size in map(int, args.sizes.split(",")):
            seconds = []
            for run in steps(graph(shape, size)).values():
                gc.collect()  # what the step before left
                start = time.process_time()
                run()
                seconds.append(time.process_time() - start)
            growth = "" if before is None else f"{max(np.array(seconds) / before):.1f}"
            print(f"| {shape} | {size:,} | " + " | ".join(f"{each:.2f}" for each in seconds) + f" | {growth} |", flush=True)
            before = np.array(seconds)


if __name__ == "__main__":
    main()
