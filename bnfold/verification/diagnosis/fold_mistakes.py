"""Mistakes that are made when one BatchNorm is folded, each tried on the coefficients that it went into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Node, Norm

from .channel_order import exchanged, order_of_scales
from .channels import along, factors, scale_and_shift
from .held import SLACK, Found, Held, unfolded

BETTER = 0.6  # of the misfit of the right coefficients, in root mean square: what a hypothesis must come down to
MOST_COUNTS = 4096  # numbers of elements that are tried for n/(n - 1)

Refold = Callable[[Array, Array], tuple[Array, Array]]  # scale and shift to weight and bias


def mistakes(name: str, site: Node, node: Node, want: Held, have: Found, *, folded: bool = True) -> Iterator[str]:
    """Those that give what the candidate holds. site: the BatchNorm; node: what it was folded into, itself where nothing takes it.

    folded: whether the candidate's isn't there any more.
    """
    norm: Norm = site.attrs["norm"]
    up, kept = site is node or site.index > node.index, site is node
    stored = unfolded(node)
    refold = _up(norm, want, kept, stored) if up else _down(norm, want)
    if refold is None:
        return
    trial = _Trial(norm, refold, have, up=up)
    yield from _of_the_variance(name, norm, want, trial, "was folded with" if folded else "has")
    for text, (scale, shift) in _of_the_map(norm):
        if np.isfinite(scale).all() and np.isfinite(shift).all() and trial.explains(scale, shift):
            yield f"{text} (BatchNorm {name})"
    s, t = trial.right
    if up and not kept and stored is not None and stored.bias.any():
        for text, bias in (("is dropped", t), ("isn't scaled", stored.bias + t)):
            if have.is_explained(trial.weight, bias, np.abs(bias) + np.abs(norm.mean * s)):
                yield f"the operator's own bias {text} in the fold of BatchNorm {name}"
    if up and (order := order_of_scales(s, want, have)) is not None and trial.explains(s[order], t[order]):
        yield f"channel order: BatchNorm {name} is folded with its channels in another order, {exchanged(order)}"


class _Trial:
    """What the candidate holds, against what comes out of other scales and shifts. up: whether the BatchNorm stands behind."""

    def __init__(self, norm: Norm, refold: Refold, have: Found, *, up: bool) -> None:
        self.norm, self.refold, self.have, self.up = norm, refold, have, up
        self.right = scale_and_shift(norm)
        self.weight, self.bias = refold(*self.right)
        self.usual = self._misfit(*self.right)[1]

    def explains(self, scale: Array, shift: Array) -> bool:
        """To rounding, and much better than the right ones do."""
        most, usual = self._misfit(scale, shift)
        return most <= SLACK and usual < BETTER * self.usual

    def _misfit(self, scale: Array, shift: Array) -> tuple[float, float]:
        beta = np.abs(self.norm.beta)
        with np.errstate(all="ignore"):
            weight, bias = self.refold(scale, shift)
            if self.up:
                summands = np.abs(shift) + beta + np.abs(self.norm.mean * scale) + np.abs(bias - shift)
            else:
                summands = np.abs(self.bias) + beta.max(initial=0.0)
        return self.have.misfit(weight, bias, summands)


def _up(norm: Norm, want: Held, kept: bool, stored: Held | None) -> Refold | None:
    """The coefficients for another scale and shift of a BatchNorm behind the operator."""
    s, t = scale_and_shift(norm)
    if s.size != want.channels or want.bias.size != want.channels:
        return None
    if kept:
        return lambda scale, shift: (scale, shift)
    own = want.bias - t
    if stored is not None and stored.weight.shape == want.weight.shape and stored.bias.size == want.channels:
        direct = Held(stored.weight, stored.bias, want.axis)
        if np.allclose(direct.scaled(s), want.weight, rtol=1e-9, atol=0) and np.allclose(stored.bias * s, own, rtol=1e-6, atol=1e-9):
            return lambda scale, shift: (direct.scaled(scale), stored.bias * scale + shift)
    if not (s != 0).all():
        return None
    return lambda scale, shift: (want.scaled(scale / s), own * (scale / s) + shift)


def _down(norm: Norm, want: Held) -> Refold | None:
    """The same for a BatchNorm in front of it, whose channels are the weight's inputs."""
    s, t = scale_and_shift(norm)
    axes = [i for i in range(min(want.weight.ndim, 2)) if i != want.axis and want.weight.shape[i] == s.size]
    if not axes or not (s != 0).all():
        return None
    axis = axes[0]
    others = tuple(i for i in range(want.weight.ndim) if i != want.axis)

    def refold(scale: Array, shift: Array) -> tuple[Array, Array]:
        ratio, moved = (along(v, axis, want.weight.ndim) for v in (scale / s, (shift - t) / s))
        return want.weight * ratio, want.bias + (want.weight * moved).sum(axis=others)

    return refold


def _of_the_map(norm: Norm) -> list[tuple[str, tuple[Array, Array]]]:
    """In words, and the scale and shift that come of it."""
    s, t = scale_and_shift(norm)
    one, zero = np.ones_like(s), np.zeros_like(t)
    with np.errstate(all="ignore"):
        return [
            ("the running mean isn't subtracted", scale_and_shift(replace(norm, mean=0 * norm.mean))),
            ("the running mean is added, not subtracted", scale_and_shift(replace(norm, mean=-norm.mean))),
            ("gamma is missing (1 in its place)", scale_and_shift(replace(norm, gamma=np.ones_like(norm.gamma)))),
            ("beta is missing (0 in its place)", scale_and_shift(replace(norm, beta=0 * norm.beta))),
            ("beta has the other sign", scale_and_shift(replace(norm, beta=-norm.beta))),
            ("gamma has lost its sign", scale_and_shift(replace(norm, gamma=np.abs(norm.gamma)))),
            ("epsilon is left out", scale_and_shift(replace(norm, epsilon=0.0))),
            ("epsilon is added outside the square root", scale_and_shift(norm, 1 / (np.sqrt(norm.var) + norm.epsilon))),
            ("the square root of the variance is missing", scale_and_shift(norm, 1 / (norm.var + norm.epsilon))),
            ("the variance is squared before its root", scale_and_shift(norm, 1 / np.sqrt(norm.var**2 + norm.epsilon))),
            ("it isn't divided by the standard deviation", scale_and_shift(norm, one)),
            ("the BatchNorm is missing", (one, zero)),
            ("the BatchNorm is applied twice", (s * s, s * t + t)),
            ("its scale is applied, its shift isn't", (s, zero)),
            ("its shift is applied, its scale isn't", (one, t)),
        ]


# --- epsilon, and the number of elements -------------------------------------------------------------------------------------------


def _of_the_variance(name: str, norm: Norm, want: Held, trial: _Trial, has: str) -> Iterator[str]:
    axis = want.axis if trial.up else next((i for i in range(min(want.weight.ndim, 2)) if i != want.axis), 0)
    if want.weight.shape[axis] != norm.gamma.size:
        return
    ratio, tells = factors(want.weight, trial.have.weight, axis)
    with np.errstate(all="ignore"):
        found = (norm.var + norm.epsilon) / np.square(ratio)  # each channel's variance plus epsilon, as the candidate's weights say it
    usable = tells & np.isfinite(found) & (found > 0)
    if not usable.any():
        return
    found = np.where(usable, found, 1.0)
    for epsilon in _epsilons(norm, found, usable):
        if epsilon != norm.epsilon and trial.explains(*scale_and_shift(replace(norm, epsilon=epsilon))):
            yield f"another epsilon: the candidate {has} {epsilon:.6g}, BatchNorm {name} has {norm.epsilon:.6g}"
    for n, doubt, factor in _counts(norm, found, usable, trial.have.unit):
        if trial.explains(*scale_and_shift(replace(norm, var=norm.var * factor))):
            which = "unbiased" if factor > 1 else "biased"
            doubtful = f" (give or take {doubt})" if doubt > 1 or n >= MOST_COUNTS else ""
            yield f"the {which} variance: the candidate's variances are {factor:.6g} times the reference's, n = {n}{doubtful}"


def _epsilons(norm: Norm, found: Array, usable: Array) -> Iterator[float]:
    """The epsilon that fits best, and the plainest numbers near it."""
    weights = usable / np.square(found)
    fitted = float((weights * (found - norm.var)).sum() / weights.sum())
    if not -1e-9 <= fitted < 1e3:
        return
    tried = [float(f"{fitted:.{digits}g}") for digits in range(1, 6)]
    yield from dict.fromkeys([*(e for e in tried if e >= 0 and abs(e - fitted) <= 0.05 * abs(fitted)), max(fitted, 0.0)])


def _counts(norm: Norm, found: Array, usable: Array, unit: float) -> Iterator[tuple[int, int, float]]:
    """The number of elements whose n/(n - 1) fits, or the inverse of that, give or take what rounding hides; first what twos divide."""
    with np.errstate(all="ignore"):
        weights = usable * np.square(norm.var / found)
        factor = float((weights * np.where(norm.var > 0, (found - norm.epsilon) / norm.var, 1.0)).sum() / weights.sum())
    for f, invert in ((factor, False), (1 / factor if factor > 0 else 0.0, True)):
        if 1 + 1e-7 < f <= 2.0:
            count = f / (f - 1)
            doubt = int(count * (count - 1) * unit) + 1  # one more or less changes the variance by 1/n**2
            near = range(max(2, round(count) - doubt), round(count) + doubt + 1)[:MOST_COUNTS]
            for n in sorted(near, key=lambda n: (-(n & -n), abs(n - count)))[:4]:
                yield n, doubt, (n - 1) / n if invert else n / (n - 1)
