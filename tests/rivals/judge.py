"""The networks that the tools are given, and whether what comes out is right."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cases import ALL, Case
from compare import Feeds, batchnorms, difference, feeds, is_valid, roundoff, run_double, run_stored

from .tools import silent

WRONG = 1e-4  # of the largest output, in float64: weights that were rounded to float32 are off by far less
CASE = "case:"


@cache
def cases() -> dict[str, Case]:
    return {CASE + case.name: case for case in ALL}


def names(*, of_modules: bool) -> list[str]:
    """The rows of the catalogue that a tool of this kind can be given."""
    return [name for name, case in cases().items() if not of_modules or case.torch is not None]


def network(name: str, of_modules: bool) -> tuple[Any, Any, float]:
    """A network of this name, what it is called with, and how far outputs may be off."""
    case = cases().get(name)
    if not of_modules:
        model = onnx.load(name) if case is None else case.build()
        if case is None:
            return model, feeds(model), WRONG
        return model, feeds(model, below=case.below), max(WRONG, case.roundoffs * roundoff(model))
    import torch
    from architectures.list import lively, make
    from vision import declare

    declare()
    if case is None:
        module, shape = make(name)
        return module, (torch.randn(2, *shape),), WRONG
    assert case.torch is not None
    torch.manual_seed(0)
    return lively(case.torch(torch.nn)).eval(), tuple(torch.randn(shape) for shape in case.example), WRONG


def peak() -> int:
    """The most memory that this process has had, in bytes (ru_maxrss would count its parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def judge_onnx(model: onnx.ModelProto, made: onnx.ModelProto | None, data: Feeds, limit: float) -> dict[str, Any]:
    """BatchNorms before and left, and what is wrong with the model, if anything."""
    before = batchnorms(model)
    if made is None:
        return {"before": before, "left": before}
    found: dict[str, Any] = {"before": before, "left": batchnorms(made)}
    if is_valid(model, full=True) and not is_valid(made, full=True):
        return found | {"invalid": "onnx's checker refuses it"}
    if {i.name for i in made.graph.input} != {i.name for i in model.graph.input} and model.ir_version >= 4:
        return found | {"wrong": "an input is gone"}
    try:
        with silent():
            off = difference(run_double(model, data), run_double(made, data))
    except Exception:  # an operator that only ONNX Runtime knows, or nobody
        try:
            off = difference(run_stored(model, data), run_stored(made, data))
        except Exception as error:
            return found | {"invalid": f"{type(error).__name__}: {error}"[:200]}
    return found | ({} if off <= limit else {"wrong": f"{off:.1g}"})


def judge_module(module: Any, made: Any, example: Any, limit: float) -> dict[str, Any]:
    """The same of a module, whose BatchNorms are those that run."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += "batch_norm" in func.name()
            return func(*args, **(kwargs or {}))

    def run(each: Any) -> tuple[int, list[Any]]:
        with torch.no_grad(), Counting() as counting:
            outputs = torch.utils._pytree.tree_leaves(each.double()(*(x.double() for x in example)))
        return counting.count, [y.numpy() for y in outputs if isinstance(y, torch.Tensor)]

    before, want = run(module)
    if made is None:
        return {"before": before, "left": before}
    try:
        left, got = run(made)
    except Exception as error:
        return {"before": before, "left": before, "invalid": f"{type(error).__name__}: {error}"[:200]}
    off = difference(*({str(i): np.asarray(y) for i, y in enumerate(each)} for each in (want, got))) if len(want) == len(got) else np.inf
    return {"before": before, "left": left} | ({} if off <= limit else {"wrong": f"{off:.1g}"})
