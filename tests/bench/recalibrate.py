"""Lockstep recalibration of a ResNet-18 against one plain forward pass over the same images, in interleaved rounds.

    python -m tests.bench.recalibrate [--images 256] [--batch 8] [--rounds 3] [--budget BYTES]

The forward pass is ONNX Runtime's without graph optimisation, its session made beforehand; recalibration is timed whole. Round by round
the two take turns, and the ratio is the median of the rounds' ratios, for the load of the machine changes over time.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from bnfold import recalibrate


def resnet18(folder: Path) -> ir.Model:
    """torchvision's ResNet-18, exported with its BatchNorms kept."""
    import torch

    # torchvision's Python side names these operators even where its compiled part can't be loaded.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    path = folder / "resnet18.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(network, (torch.randn(2, 3, 224, 224),), path, dynamo=True, optimize=False, dynamic_shapes=shapes, verbose=False)
    return ir.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=1 << 30, help="bytes of activations held in memory")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model = resnet18(Path(folder))
        path = Path(folder, "plain.onnx")
        ir.save(model, path)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        plain = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = plain.get_inputs()[0].name
        images = np.random.default_rng(0).standard_normal((args.images, 3, 224, 224), dtype=np.float32)
        batches = [{name: images[i : i + args.batch]} for i in range(0, args.images, args.batch)]
        plain.run(None, batches[0])

        ratios = []
        print(f"{args.images} images in micro-batches of {args.batch}")
        for number in range(args.rounds):
            start = time.perf_counter()
            for batch in batches:
                plain.run(None, batch)
            forward = time.perf_counter() - start
            start = time.perf_counter()
            _, report = recalibrate(model, batches, memory_budget=args.budget)
            whole = time.perf_counter() - start
            ratios.append(whole / forward)
            print(f"round {number + 1}: forward {forward:.2f} s, recalibrate {whole:.2f} s, ratio {whole / forward:.2f}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(
            f"median ratio {statistics.median(ratios):.2f}; held {report.held_bytes / 2**20:.0f} MiB, "
            f"spilled {report.spilled_bytes / 2**20:.0f} MiB, peak memory of the process {peak:.0f} MiB"
        )


if __name__ == "__main__":
    main()
