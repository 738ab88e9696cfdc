"""Moments of a tensor where it lies, by PyTorch's own reductions (see `bnfold.moments` for what they are and how they pool)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...moments import Moments

BLOCK = 1 << 20  # elements that are worked through at once on a CPU, where what they leave in the cache is used again


def measure(x: Tensor) -> Moments:
    """Moments of each channel of x, [samples, channels, ...], of any floating-point type.

    For each sample and channel: the mean c in the type of the data (float32 for half precision), then sum(x - c) and sum((x - c)^2), by
    which the mean is c + sum(x - c)/n and M2 is sum((x - c)^2) - sum(x - c)^2/n (the corrected two-pass algorithm; Chan, Golub & LeVeque
    1983, "Algorithms for computing the sample variance", equation 1.7). The sums are PyTorch's, in cascade, so their error grows with
    the logarithm of n: measured, M2 is right to 2e-7 in float32 at mean 1e4 and deviation 1. Everything from there on is float64.
    """
    samples, channels = x.shape[:2]
    rows = x.reshape(samples, channels, -1)
    size = rows.shape[2]
    if not rows.numel():
        return Moments.empty(channels)
    step = max(1, BLOCK // (channels * size)) if x.device.type == "cpu" else samples
    parts = [_sums(rows[i : i + step]) for i in range(0, samples, step)]
    centre, first, second = (torch.cat(each).double() for each in zip(*parts, strict=True))
    means, m2 = centre + first / size, second - first * first / size
    mean = means.mean(0)
    between = size * (means - mean).square().sum(0)
    total = m2.clamp_min(0).sum(0) + between
    return Moments(samples * size, mean.cpu().numpy(), total.cpu().numpy(), samples, between.cpu().numpy())


def _sums(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    if rows.shape[2] == 1:
        one = rows.squeeze(2)
        return one, torch.zeros_like(one), torch.zeros_like(one)
    centre = rows.mean(2, keepdim=True)
    off = rows - centre
    first = off.sum(2)
    return centre.squeeze(2), first, off.square_().sum(2)
