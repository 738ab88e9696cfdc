"""The right coefficients in another order: channels, groups or axes exchanged, before the fold or after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Node

from .weights import Weights, along, factors, scale_and_shift

MOST = 4096  # channels among which another order is looked for

Order = npt.NDArray[Any]  # for each place, whose coefficients lie there


def orders(want: Weights, have: Weights, groups: int, sites: list[Node]) -> Iterator[str]:
    """Those that give what the candidate holds. sites: the BatchNorms that were folded in."""
    still = np.abs(want.bias) + max((float(np.abs(n.attrs["norm"].mean).max(initial=0.0)) for n in sites), default=0.0)
    scales = [(np.ones(want.channels), ""), *_scale_behind(want, sites)]
    yield from _outputs(want, have, groups, scales, still)
    order = _permutation(want.bias.reshape(-1, 1), have.bias.reshape(-1, 1))
    if order is not None and have.is_explained(want.weight, want.bias[order], still):
        yield f"channel order: output channels of the bias alone are swapped, {exchanged(order)}"
    if want.weight.ndim >= 2:
        inner = 1 - want.axis if want.axis < 2 else 0
        order = _permutation(*(_rows(side.weight, inner) for side in (want, have)))
        if order is not None and have.is_explained(np.take(want.weight, order, inner), want.bias, still):
            yield f"channel order: input channels of the weight are swapped, {exchanged(order)}"
    for text, turn in _turns(want.weight.shape):
        for scale, _ in scales:
            with np.errstate(all="ignore"):
                factor = along(scale, want.axis, want.weight.ndim)
                weight = turn(want.weight / factor) * factor
            if np.isfinite(weight).all() and have.is_explained(weight, want.bias, still):
                yield text


def _outputs(want: Weights, have: Weights, groups: int, scales: list[tuple[Array, str]], still: Array) -> Iterator[str]:
    for scale, when in scales:
        mine, theirs = (side.scaled(1 / scale) for side in (want, have))
        order = _permutation(_rows(mine, want.axis), _rows(theirs, have.axis))
        if order is None:
            continue
        weight = Weights(np.take(mine, order, want.axis), want.bias, want.axis).scaled(scale)
        for bias, what in ((want.bias[order], ""), (want.bias, " of the weight alone")):
            if have.is_explained(weight, bias, still):
                if groups > 1 and (named := _group_order(order, groups)):
                    yield f"group order: {named}{what}{when}"
                yield f"channel order: output channels{what} are swapped{when}, {exchanged(order)}"


def _scale_behind(want: Weights, sites: list[Node]) -> Iterator[tuple[Array, str]]:
    """The scale that a BatchNorm gave to the output channels, if it is one alone."""
    if len(sites) == 1 and sites[0].attrs["norm"].gamma.size == want.channels:
        scale, _ = scale_and_shift(sites[0].attrs["norm"])
        if np.isfinite(scale).all() and (scale != 0).all():
            yield scale, " before the fold"


def order_of_scales(scale: Array, want: Weights, have: Weights) -> Order | None:
    """The order of a BatchNorm's channels that gives the candidate's scales."""
    with np.errstate(all="ignore"):
        theirs = scale * factors(want.weight, have.weight, want.axis)[0]
    if not np.isfinite(theirs).all() or scale.size > MOST:
        return None
    order = np.empty(scale.size, np.intp)
    order[np.argsort(theirs, kind="stable")] = np.argsort(scale, kind="stable")
    return None if _in_place(order) else order


def exchanged(order: Order) -> str:
    """Which places hold others' coefficients."""
    moved = np.flatnonzero(order != np.arange(len(order)))
    if len(moved) == 2:
        return f"{moved[0]} and {moved[1]}"
    shown = ", ".join(f"{i} holds {order[i]}" for i in moved[:4])
    return f"{shown}{' and so on' if len(moved) > 4 else ''} ({len(moved)} of {len(order)})"


def _turns(shape: tuple[int, ...]) -> Iterator[tuple[str, Callable[[Array], Array]]]:
    """A weight's axes exchanged or reversed, as far as its shape leaves it the same."""
    if len(shape) >= 2 and shape[0] == shape[1]:
        yield "transposed weight: input and output channels are exchanged", lambda w: w.swapaxes(0, 1)
    if len(shape) >= 4 and shape[2] == shape[3] and shape[2] > 1:
        yield "transposed weight: the kernel's height and width are exchanged", lambda w: w.swapaxes(2, 3)
    if len(shape) >= 3 and max(shape[2:]) > 1:
        yield "the kernel is flipped", lambda w: np.flip(w, tuple(range(2, w.ndim)))


def _rows(weight: Array, axis: int) -> Array:
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def _permutation(want: Array, have: Array) -> Order | None:
    """For each row of `have` the row of `want` that it equals, as nearly as the numbers tell; None where all stay, or two are the same."""
    count = len(want)
    if want.shape != have.shape or not 1 < count <= MOST or not (np.isfinite(want).all() and np.isfinite(have).all()):
        return None
    # By a few random projections, so that large weights take no time.
    axes = np.random.default_rng(0).normal(size=(want.shape[1], min(want.shape[1], 8)))
    one, other = want @ axes, have @ axes
    distance = (np.square(other)[:, None].sum(-1) + np.square(one).sum(-1)[None]) - 2 * other @ one.T
    if want.shape[1] == 1:
        distance = np.square(other - one.T)
    order = distance.argmin(axis=1)
    stays = distance[np.arange(count), np.arange(count)] <= distance.min(axis=1) * (1 + 1e-9) + 1e-24
    order = np.where(stays, np.arange(count), order)
    return None if _in_place(order) or len(set(order.tolist())) < count else order


def _in_place(order: Order) -> bool:
    return bool((order == np.arange(len(order))).all())


def _group_order(order: Order, groups: int) -> str:
    size, rest = divmod(len(order), groups)
    if rest or size == 0:
        return ""
    for g, o in ((groups, size), (size, groups)):
        if size > 1 and (order == np.arange(len(order)).reshape(g, o).T.ravel()).all():
            return f"the output channels are laid out as {o} x {g} for {g} x {o}"
    blocks = order.reshape(groups, size)
    if (blocks == blocks[:, :1] + np.arange(size)).all() and (blocks[:, 0] % size == 0).all():
        return f"the groups come in the order {', '.join(str(int(b) // size) for b in blocks[:, 0][:16])}"
    return ""
