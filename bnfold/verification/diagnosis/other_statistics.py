"""Statistics of another checkpoint: whether some other mean and variance, whatever they are, explain all channels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bnfold.algebra.graph import Node, Norm

from .channels import factors, scale_and_shift
from .held import SLACK, Found, Held


def other_statistics(name: str, site: Node, want: Held, have: Found) -> Iterator[str]:
    """Where they do, and many of them are others."""
    norm: Norm = site.attrs["norm"]
    if norm.gamma.size != want.channels:
        return
    ratio, alive = factors(want.weight, have.weight, want.axis)
    ratio = np.where(alive, ratio, 1.0)
    if not have.is_explained(want.scaled(ratio), have.bias, np.abs(have.bias)) or (ratio <= 0).any():
        return
    var = (norm.var + norm.epsilon) / np.square(ratio) - norm.epsilon
    s, t = scale_and_shift(norm)
    own = np.where(alive, want.bias - t, 0.0)  # the operator's own bias, scaled
    off = np.abs(have.bias - (own * ratio + norm.beta - norm.mean * s * ratio))
    summands = np.abs(want.bias) + np.abs(norm.beta) + np.abs(norm.mean * s) + np.abs(own)
    wider, moved = np.abs(ratio - 1) > SLACK * have.unit, off > SLACK * have.unit * summands
    if (var[alive] < 0).any() or (wider | moved).sum() < max(2, len(ratio) / 2):
        return
    which = " and ".join(name for name, some in (("means", moved.any()), ("variances", wider.any())) if some)
    with np.errstate(all="ignore"):
        shift = off / np.abs(s * ratio) / np.sqrt(norm.var + norm.epsilon)
    worst = float(shift[np.isfinite(shift)].max(initial=0.0))
    yield (
        f"statistics of another checkpoint: other running {which} in BatchNorm {name} explain all channels, as where one model was "
        f"recalibrated (variances times {1 / np.square(ratio).max():.4g} to {1 / np.square(ratio).min():.4g}, means moved by up to "
        f"{worst:.3g} standard deviations)"
    )
