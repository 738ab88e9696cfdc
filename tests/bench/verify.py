"""What `verify` takes on a ResNet-50 at 224 x 224 and its fold, level by level, beyond loading; ONNX and PyTorch.

    python -m tests.bench.verify [--rounds 3] [--kinds onnx,torch] [--depth 50]

Wanted on two cores: levels 1 and 2 within 10 s, level 1 alone within 2 s and without PyTorch. Each round is a process of its own.
What is held at once: two models in float64 (the reference, and the one that is compared with it), the values of one of them that are still
needed, and at most 512 MiB of outputs and what moved weights do to them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WANTED = {"levels 1 and 2": 10.0, "level 1": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default="onnx,torch")
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one, args.depth)))
        return
    for kind in args.kinds.split(","):
        command = [sys.executable, "-W", "ignore", "-m", "tests.bench.verify", "--depth", str(args.depth), "--one", kind]
        taken = [json.loads(subprocess.check_output(command, text=True).splitlines()[-1]) for _ in range(args.rounds)]
        print(
            f"ResNet-{args.depth}, {kind}: {taken[0]['verdict']}, {args.rounds} rounds, at most {max(t['mb'] for t in taken):.0f} MB held"
        )
        for key in taken[0]["seconds"]:
            found = [t["seconds"][key] for t in taken]
            wanted = f", wanted {WANTED[key]:g}" if key in WANTED else ""
            print(f"  {key}: {statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f}{wanted})")


def measured(kind: str, depth: int) -> dict[str, Any]:
    reference, candidate, data = (onnx_pair if kind == "onnx" else torch_pair)(depth)
    from opened import verify

    seconds: dict[str, float] = {}
    start, used = time.perf_counter(), time.process_time()
    verify(reference, candidate, data, coefficients_only=True)
    seconds["level 1"] = time.perf_counter() - start
    seconds["level 1, processor time"] = time.process_time() - used
    if kind == "onnx":
        assert "torch" not in sys.modules
    start, used = time.perf_counter(), time.process_time()
    verify(reference, candidate, data, oracle_only=True)
    seconds["levels 1 and 2"] = time.perf_counter() - start
    seconds["levels 1 and 2, processor time"] = time.process_time() - used
    marks: list[tuple[str, float]] = []
    report = verify(reference, candidate, data, progress=lambda stage, done, total: marks.append((stage, time.perf_counter())))
    marks.append(("", time.perf_counter()))
    for (stage, begun), (_, ended) in itertools.pairwise(marks):
        seconds[f"of all three, {stage}"] = seconds.get(f"of all three, {stage}", 0.0) + ended - begun
    return {"verdict": report.verdict, "seconds": seconds, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def onnx_pair(depth: int) -> tuple[Any, Any, Any]:
    """The files of `tests.bench.models` and of our fold, made beforehand so that neither is in the way of what is measured."""
    import bnfold

    made = subprocess.check_output([sys.executable, "-m", "tests.bench.models", str(depth), "torchscript"], text=True)
    path = Path(made.splitlines()[-1])
    folded = path.with_name(f"{path.stem}-fused.onnx")
    if not folded.exists():
        bnfold.save(bnfold.fuse(bnfold.load(path), check=False)[0], folded)
    return bnfold.load(path), bnfold.load(folded), None


def torch_pair(depth: int) -> tuple[Any, Any, Any]:
    """Both as traced programs, since tracing is what loading is to an ONNX file."""
    import torch

    import bnfold
    from bnfold.backends.torch.export.trace import trace
    from tests.vision import package

    torch.manual_seed(0)
    module = getattr(package("torchvision").models, f"resnet{depth}")().eval()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_var.uniform_(0.5, 1.5)
                layer.running_mean.normal_()
    x = torch.randn(2, 3, 224, 224)
    return trace(module, x), trace(bnfold.fuse(module, example=x, check=False)[0], x), None


if __name__ == "__main__":
    main()
