"""What `fuse` adds to torch.export on PyTorch models, against torch.fx.experimental.optimization.fuse, in interleaved rounds.

    python -m tests.bench.fuse_torch [--rounds 5] [--size 224]

bnfold reads the data flow by torch.export; its own time is that of folding the exported module.
torch.fx folds Conv+BatchNorm by pattern, in float32, and checks nothing. A ratio is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.fx.experimental import optimization

import bnfold
from bnfold.backends.torch.export.trace import trace
from bnfold.backends.torch.fuse import fuse


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(name: str, module: nn.Module, x: torch.Tensor, rounds: int) -> None:
    traced = trace(module, x)
    calls: dict[str, Callable[[], object]] = {
        "export": lambda: trace(module, x),
        "own": lambda: fuse(traced),
        "rival": lambda: optimization.fuse(module),
        "checked": lambda: bnfold.fuse(module, example=x),
    }
    times: dict[str, list[float]] = {key: [] for key in calls}
    for number in range(rounds + 1):  # the first warms up
        for key in list(calls)[:: 1 if number % 2 else -1]:
            seconds = timed(calls[key])
            if number:
                times[key].append(seconds)
    export, own, rival, checked = (statistics.median(times[key]) for key in calls)
    print(f"{name}: export {export:.2f} s; fuse adds {own:.2f} s, with its check {checked - export:.2f} s; torch.fx {rival:.2f} s;")
    ratios = [one / other for one, other in zip(times["own"], times["rival"], strict=True)]
    print(f"  what fuse adds over torch.fx: {statistics.median(ratios):.1f} (from {min(ratios):.1f} to {max(ratios):.1f})")


def main() -> None:
    from tests.vision import package

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    models = package("torchvision").models
    torch.manual_seed(0)
    for name in ("resnet50", "mobilenet_v2"):
        measure(name, models.get_model(name).eval(), torch.randn(2, 3, args.size, args.size), args.rounds)


if __name__ == "__main__":
    main()
