"""Recalibration of a ResNet-18 (ONNX): against plain forward passes, under memory budgets, and in one and two processes.

    python -m tests.bench.recalibrate_scaling [--images 128] [--batch 8] [--rounds 3]

Interleaved rounds. The rival of the one pass is the plain forward pass by ONNX Runtime, without graph optimisation, which every other way
to measure statistics needs at least once for each pass over the data: to measure the same statistics by hooks takes one for each of the K
BatchNorms in a row. One and two processes run the whole command, from the start of Python on; two share the cores of one machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

import bnfold
from tests.bench.recalibrate import resnet18

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = {"1 GiB": 1 << 30, "64 MiB": 64 << 20, "0": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = resnet18(folder)
        ir.save(model, folder / "plain.onnx")
        images = np.random.default_rng(0).standard_normal((args.images, 3, 224, 224), dtype=np.float32)
        np.save(folder / "images.npy", images)
        budgets(folder, model, images, args.batch, args.rounds)
        processes(folder, args.batch, args.rounds)


def budgets(folder: Path, model: ir.Model, images: np.ndarray, batch: int, rounds: int) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(folder / "plain.onnx", options, providers=["CPUExecutionProvider"])
    name = plain.get_inputs()[0].name
    ratios: dict[str, list[float]] = {budget: [] for budget in BUDGETS}
    found = {}
    for _ in range(rounds):
        start = time.perf_counter()
        for i in range(0, len(images), batch):
            plain.run(None, {name: images[i : i + batch]})
        forward = time.perf_counter() - start
        for label, budget in BUDGETS.items():
            start = time.perf_counter()
            _, found[label] = bnfold.recalibrate(model, images, batch_size=batch, memory_budget=budget)
            ratios[label].append((time.perf_counter() - start) / forward)
    layers = len(found["0"].layers)
    print(f"{len(images)} images in micro-batches of {batch}, {layers} BatchNorms")
    for label, report in found.items():
        print(
            f"memory budget {label}: {statistics.median(ratios[label]):.2f} plain forward passes ({min(ratios[label]):.2f} to "
            f"{max(ratios[label]):.2f}); frontier of {report.held_bytes / 2**20:.0f} MiB, {report.spilled_bytes / 2**20:.0f} MiB written"
        )


def processes(folder: Path, batch: int, rounds: int) -> None:
    command = ["recalibrate", "plain.onnx", "--data", "images.npy", "--batch-size", str(batch), "-o", "out.onnx", "--force", "-q"]
    launchers = {1: ["-m", "bnfold"], 2: ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bnfold"]}
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, launcher in launchers.items():
            start = time.perf_counter()
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, *launcher, *command], cwd=folder, check=True, capture_output=True, env=environment)
            seconds[count].append(time.perf_counter() - start)
    ratios = [two / one for one, two in zip(seconds[1], seconds[2], strict=True)]
    print(
        f"whole command: one process {statistics.median(seconds[1]):.1f} s, two on the same {os.cpu_count()} cores "
        f"{statistics.median(seconds[2]):.1f} s, ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
