"""Moments of a tensor where it lies, by PyTorch's own reductions (see `bnfold.moments` for what they are and how they pool)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from ...affine import Array
from ...moments import Moments

BLOCK = {"cpu": 1 << 19, "cuda": 1 << 26}  # elements that are worked through at once: on a CPU, what its caches hold
SHORT = 1 << 12  # elements up to which a sum of squares without a cascade is right to 2e-7, and quicker


class Meter:
    """Measures tensors on one device. What it works in is kept from one tensor to the next: new memory costs more than the sums."""

    def __init__(self, device: torch.device) -> None:
        self._block = BLOCK[device.type]
        self._buffer = torch.empty(0, device=device)

    def measure(self, x: Tensor) -> Moments:
        """Moments of each channel of x, [samples, channels, ...], of any floating-point type.

        For each sample and channel: the mean c in the type of the data (float32 for half precision), then sum(x - c) and sum((x - c)^2),
        by which the mean is c + sum(x - c)/n and M2 is sum((x - c)^2) - sum(x - c)^2/n (the corrected two-pass algorithm; Chan, Golub &
        LeVeque 1983, "Algorithms for computing the sample variance", equation 1.7). The sums are PyTorch's; those of many elements are
        in cascade, whose error grows with the logarithm of n: measured, M2 is right to 2e-7 in float32 at mean 1e4 and deviation 1.
        Everything from there on is float64. What overflows float32 on the way is measured again, all in float64.
        """
        kind = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        moments = self._measure(x.reshape(*x.shape[:2], -1), kind)
        if kind == torch.float32 and not (moments.m2 < float("inf")).all():
            return self._measure(x.reshape(*x.shape[:2], -1), torch.float64)
        return moments

    def _measure(self, rows: Tensor, kind: torch.dtype) -> Moments:
        samples, channels, size = rows.shape
        if not rows.numel():
            return Moments.empty(channels)
        several = min(samples, max(1, self._block // (channels * size)))
        band = channels if several > 1 else min(channels, max(1, self._block // size))
        buffer = self._room(several * band * size, kind)
        sums = torch.zeros(3, samples, channels, dtype=torch.float64, device=rows.device)
        for i in range(0, samples, several):
            for c in range(0, channels, band):
                at = (slice(i, i + several), slice(c, c + band))
                part, (centre, first, second) = rows[at].to(kind), sums[:, at[0], at[1]]
                if size == 1:
                    centre.copy_(part.squeeze(2))
                    continue
                mean = part.mean(2, keepdim=True)
                off = torch.sub(part, mean, out=buffer[: part.numel()].view(part.shape))
                centre.copy_(mean.squeeze(2))
                first.copy_(off.sum(2))
                second.copy_(vector_norm(off, dim=2)).square_() if size <= SHORT else second.copy_(off.square_().sum(2))
        return _pooled(sums.cpu().numpy(), size)

    def _room(self, elements: int, kind: torch.dtype) -> Tensor:
        if self._buffer.dtype != kind or len(self._buffer) < elements:
            self._buffer = torch.empty(max(elements, self._block), dtype=kind, device=self._buffer.device)
        return self._buffer


def _pooled(sums: Array, size: int) -> Moments:
    """Of one micro-batch, from c, sum(x - c) and sum((x - c)^2) of each sample, [3, samples, channels]."""
    centre, first, second = sums
    means, m2 = centre + first / size, second - first * first / size
    mean = means.mean(0)
    between = size * np.square(means - mean).sum(0)
    return Moments(len(means) * size, mean, m2.clip(0).sum(0) + between, len(means), between)
