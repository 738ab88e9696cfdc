"""One architecture through the three routes: ONNX, the module, the exported program. Prints a line of JSON.

python -m tests.architectures.sweep NAME
"""

from __future__ import annotations

import collections
import copy
import io
import json
import re
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bnfold
from bnfold.backends.torch.export.tensors import flat_outputs
from bnfold.backends.torch.export.trace import trace
from bnfold.capture import quiet
from bnfold.report import FuseReport
from tests.architectures.list import make

EXACT = 1e-9  # relative, in float64


def main(name: str) -> None:
    start = time.perf_counter()
    module, shape = make(name)
    found: dict[str, Any] = {"name": name, "shape": shape}
    double = copy.deepcopy(module).double()
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = {key: value.numpy() for key, value in flat_outputs(double(x)).items()}
    traced = trace(double, x)
    found["torch"], copied = route(double, x)
    found["torch"]["error"] = error(want, run(copied, x))
    found["pt2"], program = route(traced.program, None)
    found["pt2"]["error"] = error(want, run(program.module(), x))
    found["onnx"] = onnx_route(double, x)
    fused, _ = bnfold.fuse(module, example=x.float(), check=False)
    verdict = bnfold.verify(module, fused, x.float(), samples=2)
    found["verdict"], found["reason"] = verdict.verdict, verdict.reason
    found["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(found))


def route(model: Any, example: Any) -> tuple[dict[str, Any], Any]:
    fused, report = bnfold.fuse(model, example=example, check=False)
    return summary(report) | lowered(model, example, report), fused


def lowered(model: Any, example: Any, report: FuseReport) -> dict[str, int]:
    """How many stay with --lower mul-add, where some stay without it."""
    if not report.batchnorms.after:
        return {"lowered": 0}
    return {"lowered": bnfold.fuse(model, example=example, lower="mul-add", check=False)[1].batchnorms.after}


def summary(report: FuseReport, names: dict[str, str] | None = None) -> dict[str, Any]:
    """names: the module's name of a BatchNorm, where the report's is another."""
    names = names or {}
    kept = {names.get(layer.name, layer.name): layer.reason for layer in report.layers if layer.verdict == "kept"}
    reasons = collections.Counter(general(reason) for reason in kept.values())
    counts = report.batchnorms
    return {"before": counts.before, "after": counts.after, "reasons": dict(reasons.most_common()), "kept": sorted(kept)}


def general(reason: str) -> str:
    """A reason without the names of this network's layers and the numbers of their channels."""
    behind = reason.rpartition("behind it: ")[2]
    behind = re.sub(r"^\S+ \S+ blocks, ", lambda m: f"{m[0].split()[0]} blocks, ", behind)
    return re.sub(r"\d+ of its \d+ scales (is|are) negative", "some of its scales are negative", behind)


def onnx_route(double: nn.Module, x: Tensor) -> dict[str, Any]:
    """Exported with its BatchNorms. The outputs are the float64 oracle's, before and after, on one sample.

    The reference is the file, not the module: ONNX states attributes (epsilon, the slopes of activations) in float32.
    """
    from bnfold.backends.onnx.files.load import from_proto
    from bnfold.backends.onnx.oracle.evaluator import Oracle

    proto = exported(double, x)
    fused, report = bnfold.fuse(proto, check=False)
    norms = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    found = summary(report, {node.name: node.input[3].rpartition(".")[0] for node in norms}) | lowered(proto, None, report)
    feeds = {proto.graph.input[0].name: x[:1].numpy()}
    want, got = (Oracle(from_proto(each)).run(feeds) for each in (proto, fused))
    found["error"] = error(want, got)
    return found


def exported(double: nn.Module, x: Tensor) -> Any:
    """By the newer exporter; of a Conv3d without a bias it makes one with a bias of two axes, which ONNX forbids, so then by the older."""
    if not any(isinstance(m, nn.Conv3d) and m.bias is None for m in double.modules()):
        with quiet():
            made = torch.onnx.export(
                double, (x,), dynamo=True, optimize=False, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
            )
        assert made is not None
        return made.model_proto
    import onnx

    buffer = io.BytesIO()
    keep = torch.onnx.TrainingMode.PRESERVE
    with quiet():
        torch.onnx.export(
            double,
            (x,),
            buffer,
            dynamo=False,
            training=keep,
            do_constant_folding=False,
            dynamic_axes={"x": {0: "batch"}},
            input_names=["x"],
        )
    return onnx.load_from_string(buffer.getvalue())


def run(module: nn.Module, x: Tensor) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {key: value.numpy() for key, value in flat_outputs(module(x)).items()}


def error(want: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> float:
    assert list(want) == list(got)
    return max(_off(want[key], got[key]) for key in want)


def _off(want: np.ndarray, got: np.ndarray) -> float:
    return float(np.abs(want - got).max() / max(np.abs(want).max(), 1e-30))


if __name__ == "__main__":
    main(sys.argv[1])
