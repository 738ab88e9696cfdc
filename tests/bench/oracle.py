"""The float64 oracle beside the machine's own matrix product of the same multiply-adds.

    python -m tests.bench.oracle [NAMES] [--rounds 5] [--size 224] [--batch 1]

The network is an ONNX file with its BatchNorms; all that it does counts for the oracle, convolutions, depthwise ones, pooling and resizing,
and for the matrix product only the multiply-adds of operators with weights, at the rate of a float64 product of two 1024 x 1024 matrices.
A ratio is the median of the rounds', in each of which both run; processor time, so that threads and other programs don't count. Wanted:
at most 3.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

import bnfold
from bnfold.backends.onnx.files.load import from_proto
from bnfold.backends.onnx.oracle.evaluator import Oracle
from tests.architectures.list import make
from tests.power.models import exported

NAMES = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "deeplabv3_mobilenet_v3_large")
SIDE = 1024


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    square = np.random.default_rng(0).standard_normal((SIDE, SIDE))
    print("| architecture | multiply-adds | oracle, s | over dgemm |\n|---|--:|--:|--:|")
    for name in args.names:
        shape = (3, args.size, args.size)
        model = exported(make(name)[0], shape, torch.float32)
        work = bnfold.fuse(model, check=False)[1].multiply_adds
        assert work is not None
        oracle, x = Oracle(from_proto(model)), np.random.default_rng(1).standard_normal((args.batch, *shape)).astype(np.float32)
        oracle.run({"x": x})
        taken, ratios = [], []
        for _ in range(args.rounds):
            product = seconds(lambda: square @ square) / SIDE**3 * work.before * args.batch
            taken.append(seconds(lambda oracle=oracle, x=x: oracle.run({"x": x})))
            ratios.append(taken[-1] / product)
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        said = f"{statistics.median(taken):.2f} | {middle:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {name} | {work.before / 1e6:,.0f} M | {said} |", flush=True)


if __name__ == "__main__":
    main()
