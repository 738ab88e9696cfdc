"""Mistakes that are made when one BatchNorm is folded, each tried on the coefficients that it went into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Node, Norm
from bnfold.text import listed

from .weights import SLACK, Weights, along, exchanged, factors, in_channels, inner_axis, order_of_scales, scale_and_shift, unfolded

BETTER = 0.6  # of the misfit of the right coefficients, in root mean square: what a hypothesis must come down to
MOST_COUNTS = 4096  # numbers of elements that are tried for n/(n - 1)

Refold = Callable[[Array, Array], tuple[Array, Array, Array]]  # scale and shift to weight, bias and what its summands amount to
Explains = Callable[[Array, Array], bool]  # whether a scale and a shift give what the candidate holds


def mistakes(name: str, site: Node, node: Node, want: Weights, have: Weights, *, kept: Norm | None = None) -> Iterator[str]:
    """Those that give what the candidate holds. site: the BatchNorm; node: what it was folded into, itself where nothing takes it.

    kept: the candidate's, where it is still there, so that what it is set to needn't be guessed.
    """
    norm: Norm = site.attrs["norm"]
    up, stored = site is node or site.index > node.index, None if site is node else unfolded(node)
    refold = _itself(norm, want) if site is node else _up(norm, want, stored) if up else _down(norm, want)
    if refold is None:
        return
    s, t = scale_and_shift(norm)
    usual = have.misfit(*refold(s, t))[1]

    def explains(scale: Array, shift: Array) -> bool:
        """To rounding, and much better than the right ones do."""
        if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
            return False
        most, rms = have.misfit(*refold(scale, shift))
        return most <= SLACK and rms < BETTER * usual

    yield from _of_the_variance(norm, name, want, have, explains, up=up, kept=kept)
    for text, (scale, shift) in _of_the_map(norm):
        if explains(scale, shift):
            yield f"{text} (BatchNorm {name})"
    if kept is not None and kept.gamma.shape == norm.gamma.shape and explains(*scale_and_shift(kept)):
        yield from _in_the_norm(norm, kept, name)
    if stored is not None and up and stored.bias.any():
        for text, bias in (("is dropped", t), ("isn't scaled", stored.bias + t)):
            if have.is_explained(want.weight, bias, np.abs(bias) + np.abs(norm.mean * s)):
                yield f"the operator's own bias {text} in the fold of BatchNorm {name}"
    if up and (order := order_of_scales(s, want, have)) is not None and explains(s[order], t[order]):
        yield f"channel order: BatchNorm {name} is folded with its channels in another order, {exchanged(order)}"


def other_statistics(name: str, norm: Norm, want: Weights, have: Weights) -> Iterator[str]:
    """Statistics of another checkpoint: where some mean and variance explain all channels, and many of them are others."""
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
    which, how = list[str](), list[str]()
    if moved.any():
        with np.errstate(all="ignore"):
            shift = off / np.abs(s * ratio) / np.sqrt(norm.var + norm.epsilon)
        which.append("means")
        how = [f"means moved by up to {shift[np.isfinite(shift)].max(initial=0.0):.3g} standard deviations"]
    if wider.any():
        which.append("variances")
        how.insert(0, f"variances times {1 / np.square(ratio).max():.4g} to {1 / np.square(ratio).min():.4g}")
    yield (
        f"statistics of another checkpoint: other running {' and '.join(which)} in BatchNorm {name} explain all channels, as where one "
        f"model was recalibrated ({', '.join(how)})"
    )


def _itself(norm: Norm, want: Weights) -> Refold | None:
    """The coefficients for another scale and shift of a BatchNorm that nothing took."""
    size = np.abs(norm.beta)
    return (
        (lambda scale, shift: (scale, shift, np.abs(shift) + size + np.abs(norm.mean * scale)))
        if norm.gamma.size == want.channels
        else None
    )


def _up(norm: Norm, want: Weights, stored: Weights | None) -> Refold | None:
    """The same of one behind the operator."""
    s, t = scale_and_shift(norm)
    if s.size != want.channels or want.bias.size != want.channels:
        return None
    base, own = want, want.bias - t
    if stored is not None and stored.weight.shape == want.weight.shape and stored.bias.size == want.channels:
        exact = np.allclose(stored.scaled(s), want.weight, rtol=1e-9, atol=0) and np.allclose(stored.bias * s, own, rtol=1e-6, atol=1e-9)
        base, own, s = (stored, stored.bias, np.ones_like(s)) if exact else (base, own, s)
    if not (s != 0).all():
        return None

    def refold(scale: Array, shift: Array) -> tuple[Array, Array, Array]:
        bias = own * (scale / s)
        return base.scaled(scale / s), bias + shift, np.abs(bias) + np.abs(shift) + np.abs(norm.beta) + np.abs(norm.mean * scale)

    return refold


def _down(norm: Norm, want: Weights) -> Refold | None:
    """The same of one in front of it, whose channels are the weight's inputs."""
    s, t = scale_and_shift(norm)
    axis, others = inner_axis(want, s.size), tuple(i for i in range(want.weight.ndim) if i != want.axis)
    if axis is None or not (s != 0).all():
        return None
    summands = np.abs(want.bias) + np.abs(norm.beta).max(initial=0.0)

    def refold(scale: Array, shift: Array) -> tuple[Array, Array, Array]:
        ratio, moved = (along(v, axis, want.weight.ndim) for v in (scale / s, (shift - t) / s))
        return want.weight * ratio, want.bias + (want.weight * moved).sum(axis=others), summands

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


def _in_the_norm(norm: Norm, kept: Norm, name: str) -> Iterator[str]:
    """In what the candidate's BatchNorm is another; not where that is statistics alone, which a recalibration changes."""
    found = [] if kept.epsilon == norm.epsilon else [f"another epsilon ({kept.epsilon:.6g} for {norm.epsilon:.6g})"]
    for what, mine, theirs in (("gamma", norm.gamma, kept.gamma), ("beta", norm.beta, kept.beta)):
        if (off := np.flatnonzero(mine != theirs)).size:
            found.append(f"another {what} in {in_channels(off, mine.size)}")
    if found and not (np.array_equal(norm.mean, kept.mean) and np.array_equal(norm.var, kept.var)):
        found.append("other statistics")
    if found:
        yield f"the candidate's BatchNorm {name} has {listed(found)}"


# --- epsilon, and the number of elements -------------------------------------------------------------------------------------------


def _of_the_variance(
    norm: Norm, name: str, want: Weights, have: Weights, explains: Explains, *, up: bool, kept: Norm | None
) -> Iterator[str]:
    axis = want.axis if up else inner_axis(want, norm.gamma.size)
    if axis is None or want.weight.shape[axis] != norm.gamma.size:
        return
    ratio, tells = factors(want.weight, have.weight, axis)
    with np.errstate(all="ignore"):
        found = (norm.var + norm.epsilon) / np.square(ratio)  # each channel's variance plus epsilon, as the candidate's weights say it
    usable = tells & np.isfinite(found) & (found > 0)
    if not usable.any():
        return
    found = np.where(usable, found, 1.0)
    has = "was folded with" if kept is None else "has"
    for epsilon in _epsilons(norm, found, usable) if kept is None else [kept.epsilon]:
        if epsilon != norm.epsilon and explains(*scale_and_shift(replace(norm, epsilon=epsilon))):
            yield f"another epsilon: the candidate {has} {epsilon:.6g}, BatchNorm {name} has {norm.epsilon:.6g}"
    for n, doubt, factor in _counts(norm, found, usable, have.unit):
        if explains(*scale_and_shift(replace(norm, var=norm.var * factor))):
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
