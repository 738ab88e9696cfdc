"""Moments of a tensor where it lies, by PyTorch's own reductions (see `bnfold.moments` for what they are and how they pool)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.linalg import vector_norm

from ...moments import Samples

BLOCK = {"cpu": 1 << 19, "cuda": 1 << 26}  # elements that are worked through at once: on a CPU, what its caches hold
FAR = 10.0  # deviations from zero up to which the rounding of a mean in float32 moves neither it nor the variance by 1e-6
SHORT = 1 << 12  # elements up to which a sum of squares without a cascade is right to 2e-7, and quicker


class Meter:
    """Measures tensors on one device. What it works in is kept from one tensor to the next: new memory costs more than the sums."""

    def __init__(self, device: torch.device) -> None:
        self._block = BLOCK[device.type]
        self._buffer = torch.empty(0, device=device)

    def measure(self, x: Tensor) -> Samples:
        """Mean and squared deviations of each sample and channel of x, [samples, channels, ...], of any floating-point type.

        For each sample and channel: the mean c in the type of the data (float32 for half precision), then sum((x - c)^2), and where the
        mean is more than FAR deviations from zero, so that its rounding tells, sum(x - c) too, by which the mean is c + sum(x - c)/n and
        M2 is sum((x - c)^2) - sum(x - c)^2/n (the corrected two-pass algorithm; Chan, Golub & LeVeque 1983, "Algorithms for computing the
        sample variance", equation 1.7). The sums are PyTorch's; those of many elements are in cascade, whose error grows with the
        logarithm of n: measured, M2 is right to 2e-7 in float32 at mean 1e4 and deviation 1. Everything from there on is float64. What
        overflows float32 on the way is measured again, all in float64.
        """
        kind = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        samples = self._measure(x.reshape(*x.shape[:2], -1), kind)
        if kind == torch.float32 and not (samples.m2 < float("inf")).all():
            return self._measure(x.reshape(*x.shape[:2], -1), torch.float64)
        return samples

    def _measure(self, rows: Tensor, kind: torch.dtype) -> Samples:
        samples, channels, size = rows.shape
        if not rows.numel():
            return Samples(size, *np.zeros((2, 0, channels)))
        several = min(samples, max(1, self._block // (channels * size)))
        band = channels if several > 1 else min(channels, max(1, self._block // size))
        buffer = self._room(several * band * size, kind)
        means, m2 = np.zeros((2, samples, channels))
        for i in range(0, samples, several):
            for c in range(0, channels, band):
                part = rows[i : i + several, c : c + band].to(kind)
                at = (slice(i, i + several), slice(c, c + band))
                mean = part.mean(2, keepdim=True)
                means[at] = here = _array(mean)[..., 0]
                if size == 1:
                    continue
                off = torch.sub(part, mean, out=buffer[: part.numel()].view(part.shape))
                norm = _array(vector_norm(off, dim=2)) if size <= SHORT else None
                if norm is not None and (np.abs(here) * (size**0.5 / FAR) <= norm).all():
                    np.square(norm, out=m2[at], dtype=np.float64)
                    continue
                left = _array(off.sum(2)).astype(np.float64)
                squares = _array(off.square_().sum(2)) if norm is None else np.square(norm, dtype=np.float64)
                means[at] += left / size
                m2[at] = np.maximum(squares - left * left / size, 0)
        return Samples(size, means, m2)

    def _room(self, elements: int, kind: torch.dtype) -> Tensor:
        if self._buffer.dtype != kind or len(self._buffer) < elements:
            self._buffer = torch.empty(max(elements, self._block), dtype=kind, device=self._buffer.device)
        return self._buffer


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = tensor.cpu().numpy()
    return found
