"""Recalibrate, fold and verify the BatchNorm layers of trained PyTorch and ONNX models.

    model = bnfold.load("model.onnx")
    fresh, report = bnfold.recalibrate(model, batches)
    fused, report = bnfold.fuse(model)
    report = bnfold.verify(model, fused, batches)
    bnfold.save(fused, "fused.onnx")

Everything is imported when first asked for, so that `import bnfold` costs nothing.
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
        UnsupportedError,
        UsageError,
    )
    from .parts import measure_part, merge_parts

_HOME = dict.fromkeys(("load", "save", "inspect", "recalibrate", "restore", "fuse", "verify"), ".api") | {
    "certificate": ".certificates",
    "measure_part": ".parts",
    "merge_parts": ".parts",
}
_HOME |= dict.fromkeys(
    (
        "BnfoldError",
        "CheckError",
        "DataError",
        "DeviceError",
        "InputError",
        "ModelError",
        "NothingToDoError",
        "UnsupportedError",
        "UsageError",
    ),
    ".errors",
)

__all__ = [  # noqa: RUF022 - in the order of the work
    "__version__",
    "load",
    "save",
    "inspect",
    "recalibrate",
    "measure_part",
    "merge_parts",
    "restore",
    "fuse",
    "verify",
    "certificate",
    "BnfoldError",
    "CheckError",
    "DataError",
    "DeviceError",
    "InputError",
    "ModelError",
    "NothingToDoError",
    "UnsupportedError",
    "UsageError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bnfold' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], "bnfold"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
