"""Lockstep recalibration of PyTorch models against the tools that estimate, over the same micro-batches, in interleaved rounds.

    python -m tests.bench.recalibrate_torch [--model resnet18] [--batches 128] [--batch 8] [--size 128] [--rounds 3]

The rivals are fvcore's `update_bn_stats` (pip install fvcore) and `torch.optim.swa_utils.update_bn`, which run the model once in training
mode and give statistics that depend on the batch size. bnfold is timed whole, torch.export included. Each tool has a process of its own,
as its users would run it: in one that they shared, those with small values would be given the memory that bnfold made for waiting ones,
which spares them much of their time. They take turns, and one round, which isn't counted, warms up each. The ratio is to the faster
rival, the median of the rounds'. Memory is measured in a fresh process for each.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

RIVALS = ("fvcore", "swa_utils")


def model_and_data(args: argparse.Namespace) -> tuple[Any, list[torch.Tensor]]:
    from tests.vision import package

    torch.manual_seed(0)
    model = package("torchvision").models.get_model(args.model).eval()
    return model, list(torch.randn(args.batches * args.batch, 3, args.size, args.size).split(args.batch))


def turn(tool: str, model: Any, data: list[torch.Tensor]) -> float:
    """The seconds of one run."""
    model = copy.deepcopy(model)
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
    return time.perf_counter() - start


def turns(tool: str, args: argparse.Namespace, ends: Any) -> None:
    """Takes a turn for each True that comes through the pipe, and sends its seconds."""
    model, data = model_and_data(args)
    while ends.recv():
        ends.send(turn(tool, model, data))


def memory(tool: str, args: argparse.Namespace, queue: Any) -> None:
    """Puts the peak of a run's memory beyond what model and data take, in bytes."""
    model, data = model_and_data(args)
    with torch.no_grad():
        model(data[0])
    before = peak()
    turn(tool, model, data)
    queue.put(peak() - before)


def peak() -> int:
    """The most memory that this process has had, in bytes (ru_maxrss would count its parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a name of torchvision's")
    parser.add_argument("--batches", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tools = ["bnfold", "swa_utils"]
    if find_spec("fvcore") is not None:
        tools.insert(1, "fvcore")
    else:
        print("fvcore isn't installed, so it isn't measured")
    context = multiprocessing.get_context("spawn")
    pipes = {tool: context.Pipe() for tool in tools}
    processes = [context.Process(target=turns, args=(tool, args, theirs)) for tool, (_, theirs) in pipes.items()]
    for process in processes:
        process.start()
    seconds: dict[str, list[float]] = {tool: [] for tool in tools}
    for number in range(args.rounds + 1):
        for tool in tools if number % 2 == 0 else tools[::-1]:
            pipes[tool][0].send(True)
            seconds[tool].append(pipes[tool][0].recv())
    for process, (ours, _) in zip(processes, pipes.values(), strict=True):
        ours.send(False)
        process.join()
    for tool in tools:
        seconds[tool] = seconds[tool][1:]
        queue: Any = context.Queue()
        process = context.Process(target=memory, args=(tool, args, queue))
        process.start()
        most = queue.get()
        process.join()
        print(f"{tool:10} median {statistics.median(seconds[tool]):6.2f} s, {most / 2**20:6.0f} MiB beyond model and data")
    ratios = [own / min(seconds[rival][i] for rival in tools[1:]) for i, own in enumerate(seconds["bnfold"])]
    print(f"{args.model}, {args.batches} batches of {args.batch} at {args.size} pixels: bnfold / the faster rival, median of the rounds:")
    print(f"{statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
