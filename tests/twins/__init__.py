"""The cases of the matrix as PyTorch modules."""

from __future__ import annotations

from .convert import NotInTorchError, Twin

__all__ = ["NotInTorchError", "Twin"]
