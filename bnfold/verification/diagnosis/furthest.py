"""Which coefficients of an operator are off: the one that is furthest, and the channels, where they are few."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnfold.algebra.graph import Node

from .held import SLACK, both_held


@dataclass(frozen=True)
class Coefficient:
    """One number of two models. what: its role; position: in the array of all of that role."""

    what: str = ""
    channel: int | None = None
    position: tuple[int, ...] = ()
    expected: float | None = None
    found: float | None = None


def furthest(p: Node, q: Node) -> Coefficient:
    """The one that is off by most, relatively; an empty one where the two operators hold none that can be compared."""
    if (both := both_held(p, q)) is None:
        return Coefficient()
    want, have = both
    roles = ("gain", "shift") if "norm" in p.attrs else ("weight", "bias")
    most, worst = -1.0, Coefficient()
    for role, mine, theirs, axis in zip(roles, (want.weight, want.bias), (have.weight, have.bias), (want.axis, 0), strict=True):
        with np.errstate(all="ignore"):
            off = np.abs(theirs - mine) / np.maximum(np.abs(mine), np.abs(mine).mean() if mine.size else 1.0)
        off = np.where(mine == theirs, 0.0, np.where(np.isnan(off), np.inf, off))
        if off.size and off.max() > most:
            at = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
            most, worst = float(off.max()), Coefficient(role, at[axis], at, float(mine[at]), float(theirs[at]))
    return worst


def channels_off(p: Node, q: Node) -> str:
    """In words, to stand behind others."""
    if (both := both_held(p, q)) is None:
        return ""
    want, have = both
    others = tuple(i for i in range(want.weight.ndim) if i != want.axis)
    off = (np.abs(want.weight - have.weight) > SLACK * have.unit * np.abs(want.weight)).any(axis=others)
    shifted = np.abs(want.bias - have.bias) > SLACK * have.unit * np.maximum(np.abs(want.bias), np.abs(want.bias).mean())
    if not (off.any() or shifted.any()):
        return "; its coefficients are right"
    parts = []
    for what, which in (("weight", np.atleast_1d(off)), ("bias", shifted)):
        channels = np.flatnonzero(which)
        if len(channels):
            shown = ", ".join(map(str, channels[:4])) + (" and others" if len(channels) > 4 else "")
            parts.append(f"its {what} is off in channel{'s' * (len(channels) > 1)} {shown} ({len(channels)} of {len(which)})")
    return "; " + ", ".join(parts)
