"""How a plan changes the ranges of weights, and which a quantiser with one scale for a whole tensor will spoil.

Such a quantiser takes its step from the largest number of the tensor. Channels that are much smaller than the largest, or that are small
themselves but for one number, keep few of their digits: what folding a BatchNorm or merging branches can make of a harmless weight.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.algebra.affine import Affine, Array
from bnfold.algebra.blocks import folded, measured
from bnfold.algebra.graph import Graph, Node, Param
from bnfold.algebra.rounding import BFLOAT16, told
from bnfold.report import WeightRange

from .feasible import rescaled
from .lower import Written
from .options import Target

NARROW: Mapping[Target, np.dtype[Any]] = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
LEVELS = 127  # of 8 bits on either side of zero
MOST = 128  # weights of a channel that are looked at
# Where the weights of the median channel are off by more than this much of themselves: about what 4 bits with a scale for each channel do
# to weights, and where networks begin to lose accuracy: see the figures of samples/quantised.
HARMFUL = 0.1


def weight_ranges(nodes: Iterable[Node], merged: Container[Node]) -> tuple[WeightRange, ...]:
    """Of each of the operators whose weight changes. merged: those into which branches were merged."""
    found = []
    for node in nodes:
        param = node.params.get("weight")
        if param is None or param.tensor is None or param.tensor.quantised is not None or param.update is None:
            continue
        channels = node.output_axes
        weight = param.original() if (source := param.source()) is None else source
        seen, scale, shift = (_seen(each, weight.shape, channels) for each in (weight, param.update.scale, param.update.shift))
        before, error_before, _ = _measured(seen, measured(param, channels).largest)
        after, error, by_channel = _measured(Affine(scale, shift)(seen), _largest_folded(param, channels))
        warning = ""
        if error > HARMFUL:
            cause = "" if error_before > HARMFUL else ", from merging branches" if node in merged else ", from the fold"
            helped = by_channel <= HARMFUL
            advice = "use a scale for each channel, or --equalise" if helped else "a scale for each channel is no help, --equalise may be"
            warning = f"int8 with one scale puts the weights of its median channel off by {error:.0%}{cause}: {advice}"
        found.append(WeightRange(node.name, before, after, error_before, error, warning))
    return tuple(found)


def _seen(array: npt.NDArray[Any], shape: tuple[int, ...], channels: tuple[int, ...]) -> Array:
    """Of what broadcasts to a weight's shape at most MOST numbers of each channel, a row a channel."""
    rows = np.moveaxis(np.broadcast_to(array, shape), channels, range(len(channels)))
    inner = rows.shape[len(channels) :]
    numbers = int(np.prod(inner))
    columns: tuple[Any, ...] = np.unravel_index(np.arange(0, numbers, max(-(-numbers // MOST), 1)), inner) if inner else ()
    return rows[(..., *columns)].reshape(int(np.prod(rows.shape[: len(channels)])), -1).astype(np.float64)


def _largest_folded(param: Param, channels: tuple[int, ...]) -> Array:
    """Of each channel the largest magnitude with the update; each channel's own factor just scales it."""
    update, before = param.update, measured(param, channels).largest
    assert update is not None
    if not update.shift.any() and np.broadcast_shapes(update.shape, before.shape) == before.shape:
        return np.abs(update(before))
    found = np.zeros(before.shape)
    for _, weight, high in folded(param, found):
        others = tuple(axis for axis, n in enumerate(high.shape) if n != weight.shape[axis])
        np.maximum(high, np.abs(weight).max(axis=others, keepdims=True), out=high)
    return found


def _measured(seen: Array, largest: Array) -> tuple[float, float, float]:
    """The largest over the median of the channels' largest magnitudes, and the errors of 8 bits with one scale and with one per channel.

    Channels of zeros, which any quantiser keeps, don't count. seen: some weights of each channel.
    """
    largest = largest.ravel()
    live = largest != 0
    if not live.any():
        return 1.0, 0.0, 0.0
    seen, largest = seen[live], largest[live]
    return float(largest.max() / _median(largest)), *_errors(seen, largest)


def _errors(seen: Array, largest: Array) -> tuple[float, float]:
    """How far 8 bits put the weights of the median channel off, with one scale and with one per channel: the median error over the median
    weight, of those that aren't 0.

    Not the mean squares, in which one large weight hides what becomes of all the others. largest: what the steps of each channel reach to.
    """
    live = seen.any(axis=1)
    if not live.any():
        return 0.0, 0.0
    seen, steps = np.where(seen == 0, np.nan, seen)[live], largest[live, None] / LEVELS
    found = []
    with np.errstate(all="ignore"):
        sizes = _medians(np.abs(seen))
        for step in (largest.max() / LEVELS, steps):
            off = seen / step
            np.round(off, out=off)
            off *= step
            off -= seen
            found.append(_median((_medians(np.abs(off, out=off)) / sizes).ravel()))
    return found[0], found[1]


def _medians(rows: Array) -> Array:
    """The lower median of each row's numbers that aren't NaN, which sorting puts last; the rows are sorted. (numpy's nanmedian takes row
    by row.)"""
    middle = (np.isfinite(rows).sum(axis=1, keepdims=True) - 1) // 2
    rows.sort(axis=1)
    return np.take_along_axis(rows, middle, axis=1)


def _median(numbers: Array) -> float:
    """NaN where one is NaN. (numpy's median imports masked arrays.)"""
    numbers = np.sort(numbers)
    return float(numbers[-1] if np.isnan(numbers[-1]) else numbers[[(numbers.size - 1) // 2, numbers.size // 2]].mean())


# --- the type to come ------------------------------------------------------------------------------------------------------------------


def in_target(graph: Graph, written: Iterable[Written], target: Target) -> list[str]:
    """What becomes of the new coefficients in the type to which the model will be converted."""
    updated = ((node, role, *each) for node, role, param in graph.updates() for each in _made(graph, node, role, param))
    others = ((each.node, role, "coefficients", array) for each in written for role, array in each.constants.items())
    found = ((node, role, what, told(array, NARROW[target])) for node, role, what, array in chain(updated, others))
    said = {(node, role): f"{what} {clause}" for node, role, what, clause in found if clause}
    return [f"--target {target}: the {role} of {node.name} has {text}" for (node, role), text in said.items()]


def _made(graph: Graph, node: Node, role: str, param: Param) -> Iterator[tuple[str, Array]]:
    """What a parameter becomes, and behind that the scales of one that is quantised, which are what is stored."""
    yield "coefficients", param.layout.stored(param.read())
    if (made := rescaled(graph, node, role)) is not None:
        yield "scales", made.scale.astype(np.float64)
