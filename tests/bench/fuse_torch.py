"""What `fuse` adds to torch.export on PyTorch models, against torch.fx.experimental.optimization.fuse, in interleaved rounds.

    python -m tests.bench.fuse_torch [--rounds 5] [--size 224] [NAMES]

bnfold reads the data flow by torch.export, with all axes of images open; its own time is that of folding the exported module and of its
check. torch.fx folds Conv+BatchNorm by pattern, in float32, and checks nothing. Times are of the processor, in one thread; a ratio is the
median of the rounds'. Names: of torchvision's and timm's networks.
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
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(name: str, module: nn.Module, x: torch.Tensor, rounds: int) -> None:
    traced = trace(module, x)
    axes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    calls: dict[str, Callable[[], object]] = {
        "export": lambda: torch.export.export(module, (x,), dynamic_shapes=axes),
        "fold": lambda: fuse(traced),
        "rival": lambda: optimization.fuse(module),
        "all": lambda: bnfold.fuse(module, example=x),
    }
    times: dict[str, list[float]] = {key: [] for key in calls}
    for number in range(rounds + 1):  # the first warms up
        for key in list(calls)[:: 1 if number % 2 else -1]:
            seconds = timed(calls[key])
            if number:
                times[key].append(seconds)
    export, fold, rival, both = (statistics.median(times[key]) for key in calls)
    print(f"{name}: torch.export {export:.2f} s; folding {fold:.2f} s; all of bnfold.fuse {both:.2f} s; torch.fx {rival:.2f} s;")
    for text, one, other in (("bnfold.fuse over torch.export", "all", "export"), ("folding over torch.fx", "fold", "rival")):
        ratios = [first / second for first, second in zip(times[one], times[other], strict=True)]
        print(f"  {text}: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def main() -> None:
    from tests.vision import package

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["resnet50", "mobilenet_v2", "efficientnet_b0"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    models, timm = package("torchvision").models, package("timm")
    torch.manual_seed(0)
    for name in args.names:
        module = models.get_model(name) if name in models.list_models() else timm.create_model(name)
        measure(name, module.eval(), torch.randn(2, 3, args.size, args.size), args.rounds)


if __name__ == "__main__":
    main()
