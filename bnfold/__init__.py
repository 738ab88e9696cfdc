"""Recalibrate, fold and verify the BatchNorm layers of trained PyTorch and ONNX models.

    model = bnfold.load("model.onnx")
    fresh, measured = bnfold.recalibrate(model, batches)
    fused, folded = bnfold.fuse(fresh)
    if bnfold.verify(fresh, fused, batches):
        bnfold.save(fused, "fused.onnx")

`bnfold.pipeline` does all of it at once. Everything is imported when first asked for, so that `import bnfold` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .api import fuse, inspect, load, recalibrate, restore, save, verify
    from .certificates import certificate
    from .errors import (
        BnfoldError,
        CheckError,
        DataError,
        DeviceError,
        InputError,
        ModelError,
        NothingToDoError,
        OutOfMemoryError,
        UnsupportedError,
        UsageError,
    )
    from .report import BenchReport, ExplainReport, FuseReport, InspectReport, PipelineReport, RecalibrateReport, Report, VerifyReport
    from .verbs.benchmark import bench
    from .verbs.explanations import explain
    from .verbs.parts import average, measure_part, merge_models, merge_parts
    from .verbs.pipelines import pipeline

__all__ = [  # noqa: RUF022 - in the order of the work
    "__version__",
    "load",
    "save",
    "inspect",
    "recalibrate",
    "measure_part",
    "merge_models",
    "merge_parts",
    "restore",
    "fuse",
    "verify",
    "pipeline",
    "bench",
    "average",
    "explain",
    "certificate",
    "Report",
    "InspectReport",
    "RecalibrateReport",
    "FuseReport",
    "VerifyReport",
    "PipelineReport",
    "BenchReport",
    "ExplainReport",
    "BnfoldError",
    "CheckError",
    "DataError",
    "DeviceError",
    "InputError",
    "ModelError",
    "NothingToDoError",
    "OutOfMemoryError",
    "UnsupportedError",
    "UsageError",
]
_HOMES = {
    "bench": ".verbs.benchmark",
    "certificate": ".certificates",
    "explain": ".verbs.explanations",
    **dict.fromkeys(("average", "measure_part", "merge_models", "merge_parts"), ".verbs.parts"),
    "pipeline": ".verbs.pipelines",
}


def _home(name: str) -> str:
    return ".errors" if name.endswith("Error") else ".report" if name.endswith("Report") else _HOMES.get(name, ".api")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bnfold' has no attribute {name!r}")
    found = getattr(importlib.import_module(_home(name), "bnfold"), name)
    if not isinstance(found, type):
        found = importlib.import_module(".library", "bnfold").verb(found)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
