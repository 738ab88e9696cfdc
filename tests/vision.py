"""torchvision and timm beside a torch whose compiled operators don't match: only their Python parts are used here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

_LIBRARY: list[Any] = []  # an operator lives as long as the library that declares it


def declare() -> None:
    """Declare the compiled operators that torchvision registers shapes for when it is imported."""
    if _LIBRARY:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # they are there
            break
    _LIBRARY.append(library)


def package(name: str) -> Any:
    """torchvision or timm, or a part of them; the test is skipped where it isn't installed."""
    declare()
    return pytest.importorskip(name)
