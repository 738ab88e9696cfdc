"""Lockstep recalibration of PyTorch models against the tools that estimate, over the same micro-batches, in interleaved rounds.

    python -m tests.bench.recalibrate_torch [--model resnet18] [--batches 64] [--batch 8] [--size 128] [--rounds 3]

The rivals are fvcore's `update_bn_stats` (pip install fvcore) and `torch.optim.swa_utils.update_bn`, which run the model once in training
mode and give statistics that depend on the batch size. bnfold is timed whole, torch.export included. Each turn has the memory of a
process of its own. The ratio is to the faster rival, the median of the rounds'.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from typing import Any

import torch

RIVALS = ("fvcore", "swa_utils")


def model_and_data(args: argparse.Namespace) -> tuple[Any, list[torch.Tensor]]:
    from tests.vision import package

    torch.manual_seed(0)
    model = package("torchvision").models.get_model(args.model).eval()
    return model, list(torch.randn(args.batches * args.batch, 3, args.size, args.size).split(args.batch))


def turn(tool: str, args: argparse.Namespace, queue: Any) -> None:
    """One run; puts its seconds and the peak of its memory beyond what model and data take, in bytes."""
    model, data = model_and_data(args)
    with torch.no_grad():
        model(data[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if tool == "bnfold":
        import bnfold

        bnfold.recalibrate(model, data)
    elif tool == "fvcore":
        from fvcore.nn.precise_bn import update_bn_stats

        model.train()
        update_bn_stats(model, data, num_iters=len(data))
    else:
        from torch.optim.swa_utils import update_bn

        update_bn(data, model)
    seconds = time.perf_counter() - start
    queue.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a name of torchvision's")
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tools = ["bnfold", "swa_utils"]
    try:
        import fvcore  # noqa: F401

        tools.insert(1, "fvcore")
    except ImportError:
        print("fvcore isn't installed, so it isn't measured")
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {tool: [] for tool in tools}
    memory: dict[str, float] = dict.fromkeys(tools, 0.0)
    for number in range(args.rounds):
        for tool in tools if number % 2 == 0 else tools[::-1]:
            queue: Any = context.Queue()
            process = context.Process(target=turn, args=(tool, args, queue))
            process.start()
            took, peak = queue.get()
            process.join()
            seconds[tool].append(took)
            memory[tool] = max(memory[tool], peak)
    for tool in tools:
        print(f"{tool:10} median {statistics.median(seconds[tool]):6.2f} s, {memory[tool] / 2**20:6.0f} MiB beyond model and data")
    ratios = [own / min(seconds[rival][i] for rival in tools[1:]) for i, own in enumerate(seconds["bnfold"])]
    print(f"{args.model}, {args.batches} batches of {args.batch} at {args.size} pixels: bnfold / the faster rival, median of the rounds:")
    print(f"{statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
