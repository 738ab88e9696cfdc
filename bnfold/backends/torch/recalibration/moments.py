"""Moments of a tensor where it lies, by PyTorch's own reductions (see `bnfold.recalibration.moments`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.linalg import vector_norm

from bnfold.recalibration.moments import Pointwise, Samples

BLOCK = {"cpu": 1 << 19, "cuda": 1 << 26}  # elements that are worked through at once: on a CPU, what its caches hold
FAR = 10.0  # deviations from zero up to which the rounding of a mean in float32 moves neither it nor the variance by 1e-6
SHORT = 1 << 12  # elements up to which a sum of squares without a cascade is right to 2e-7, and quicker


class Meter:
    """Measures tensors on one device. What it works in is kept from one tensor to the next: new memory costs more than the sums."""

    def __init__(self, device: torch.device) -> None:
        self._block = BLOCK[device.type]
        self._device = device
        self._buffers: dict[torch.dtype, Tensor] = {}

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
        rows = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
        samples = self._measure(rows, kind)
        if kind == torch.float32 and not (samples.m2 < float("inf")).all():
            return self._measure(rows, torch.float64)
        return samples

    def _measure(self, rows: Tensor, kind: torch.dtype) -> Samples:
        samples, channels, size = rows.shape
        if not rows.numel():
            return Samples(size, *np.zeros((2, 0, channels)))
        several = min(samples, max(1, self._block // (channels * size)))
        band = channels if several > 1 else min(channels, max(1, self._block // size))
        means, m2 = np.empty((2, samples, channels))
        for i in range(0, samples, several):
            for c in range(0, channels, band):
                at = (slice(i, i + several), slice(c, c + band))
                means[at], m2[at] = self._block_of(rows[at], kind)
        return Samples(size, means, m2)

    def _block_of(self, rows: Tensor, kind: torch.dtype) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        part, size = rows.to(kind), rows.shape[2]
        mean = part.mean(2, keepdim=True)
        means = _array(mean)[..., 0].astype(np.float64)
        if size == 1:
            return means, np.zeros_like(means)
        off = torch.sub(part, mean, out=self._room(part.numel(), kind)[: part.numel()].view(part.shape))
        norm = _array(vector_norm(off, dim=2)) if size <= SHORT else None
        if norm is not None and (np.abs(means) * (size**0.5 / FAR) <= norm).all():
            return means, np.square(norm, dtype=np.float64)
        left = _array(off.sum(2)).astype(np.float64)
        squares = _array(off.square_().sum(2)) if norm is None else np.square(norm, dtype=np.float64)
        return means + left / size, np.maximum(squares - left * left / size, 0)

    def measure_through(self, x: Tensor, pointwise: Pointwise) -> Samples:
        """What `measure` gives of a pointwise convolution's output, from its input [samples, C_in, ...]. All in float64."""
        rows = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
        samples, channels, size = rows.shape if rows.numel() else (0, *rows.shape[1:])
        several = max(1, self._block // max(channels * size, 1))
        found = [self._through(rows[i : i + several], pointwise) for i in range(0, samples, several)]
        means, m2 = map(np.concatenate, zip(*found, strict=True)) if found else np.zeros((2, 0, len(pointwise.weight)))
        return Samples(size, means, np.maximum(m2, 0))

    def _through(self, rows: Tensor, pointwise: Pointwise) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        off = self._room(rows.numel(), torch.float64)[: rows.numel()].view(rows.shape).copy_(rows)
        mean = off.mean(2, keepdim=True)
        off -= mean
        means, m2 = pointwise.moments(mean[..., 0], torch.bmm(off, off.mT))
        return _array(means), _array(m2)

    def _room(self, elements: int, kind: torch.dtype) -> Tensor:
        if kind not in self._buffers or len(self._buffers[kind]) < elements:
            self._buffers[kind] = torch.empty(max(elements, self._block), dtype=kind, device=self._device)
        return self._buffers[kind]


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = tensor.cpu().numpy()
    return found
