"""Coefficients in units of roundoff: how far two parameters are apart, measured by what rounding can make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Array
from bnfold.algebra.blocks import aligned, folded
from bnfold.algebra.graph import Node, Param, Tensor
from bnfold.folding.plan import NormalForm

from .structure import FIXED, AffineChain, ParameterPair, coefficients_of, has, order_of_axes

LIMIT = 4.0  # units of roundoff
DOUBLE_LIMIT = 2 * LIMIT  # in float64 what they are compared with is rounded as well
DOUBLE = 2.0**-53

Summands = dict[Node, list[Array]]  # by operator


@dataclass(frozen=True, eq=False)
class UnitErrors:
    """Of one parameter. made: arrays of the same shape, of which `measure` makes |have - want| in units of roundoff, in any block.

    unit: this roundoff; axis: of the output channels; limit: in units.
    """

    made: tuple[npt.NDArray[Any], ...]
    measure: Callable[..., tuple[Array, Array, Array]]
    unit: float
    axis: int
    limit: float

    @cached_property
    def most(self) -> float:
        """The largest of the units. (Block by block: the arrays may be large.)"""
        return max((float(self.measure(*each)[2].max(initial=0.0)) for each in aligned(*self.made)), default=0.0)

    @cached_property
    def whole(self) -> tuple[Array, Array, Array]:
        """want, have and units."""
        return self.measure(*self.made)

    def by_channel(self) -> tuple[Array, Array, Array]:
        """want, have and units as matrices, a row a channel."""
        one, two, three = (np.moveaxis(x, self.axis, 0).reshape(x.shape[self.axis], -1) if x.ndim else x.reshape(1, 1) for x in self.whole)
        return one, two, three


class ShapesDifferError(ValueError):
    """Two parameters have shapes that can't be held against each other."""


def errors_of(pair: ParameterPair, hidden: Summands, merged: Mapping[Node, Array]) -> UnitErrors | None:
    """None where neither side has such a parameter. Raises ShapesDifferError.

    hidden: see `hidden_summands`; merged: see `merged_summands`; both of either side.
    """
    a, role, b, its_role = pair
    if role in FIXED:
        sides = [_Side(np.asarray(node.attrs.get(role, role == "gain"), np.float64)) for node in (a, b)]
    else:
        param, other = a.params[role], b.params[its_role]
        if not has(a, role) and not has(b, its_role) and param.default == other.default:
            return None
        sides = [_side(param), _side(other)]
        if a.op == b.op == "Contraction" and role == its_role == "weight" and (order := order_of_axes(a, b)) is not None:
            sides[1] = sides[1].transposed(order)
    further = [merged[node] for node in (a, b) if role == "weight" and node in merged]
    try:
        made = np.broadcast_arrays(*sides[0], *sides[1], *further)
    except ValueError:
        shapes = [np.broadcast_shapes(*(array.shape for array in side)) for side in sides]
        raise ShapesDifferError(f"the {role} of {a.label} {a.name} has shape {shapes[1]} instead of {shapes[0]}") from None
    shape, summed = made[0].shape, role not in ("weight", *FIXED)
    if summed:
        made = (*made, np.broadcast_to(np.maximum(*(_total(hidden.get(node, ()), shape) for node in (a, b))), shape))
    shifted = tuple(bool(side.shift.any()) for side in sides)
    unit, tiny = precision(_limit(pair))
    measure = partial(_measure, shifted=shifted, summed=summed, unit=unit, tiny=tiny)
    return UnitErrors(tuple(made), measure, unit, _channel_axis(a, role, len(shape)), LIMIT if unit > DOUBLE else DOUBLE_LIMIT)


class _Side(NamedTuple):
    """A parameter as it is stored, and the map that it awaits."""

    array: npt.NDArray[Any]
    scale: Array = np.ones(())
    shift: Array = np.zeros(())

    def transposed(self, order: Sequence[int]) -> _Side:
        return _Side(*(each.transpose(order) if each.ndim == len(order) else each for each in self))


def _side(param: Param) -> _Side:
    array = param.original() if (source := param.source()) is None else source
    return _Side(array) if param.update is None else _Side(array, param.update.scale, param.update.shift)


def _measure(*made: npt.NDArray[Any], shifted: tuple[bool, ...], summed: bool, unit: float, tiny: float) -> tuple[Array, Array, Array]:
    """want, have and the units in which they are apart. made: both sides, other magnitudes, last what to add if `summed`."""
    (want, mine), (have, theirs) = (_read(*made[i : i + 3], shifted=shifted[i // 3]) for i in (0, 3))
    magnitude = np.maximum(mine, theirs)
    for each in made[6 : len(made) - summed]:
        magnitude = np.maximum(magnitude, each)
    return want, have, in_units(want, have, magnitude + made[-1] if summed else magnitude, unit, tiny)


def _read(array: npt.NDArray[Any], scale: Array, shift: Array, *, shifted: bool) -> tuple[Array, Array]:
    """A coefficient, and what its summands amount to: |S*w| + |T| for the update (S, T) of a stored w."""
    with np.errstate(invalid="ignore", over="ignore"):
        found = array.astype(np.float64) * scale
        size = np.abs(found)
        return (found + shift, size + np.abs(shift)) if shifted else (found, size)


def chain_errors(one: AffineChain, other: AffineChain) -> Iterator[tuple[str, UnitErrors]]:
    """Of the maps of affine operators in a row: scale and shift."""
    stored = (param.tensor for node in other.nodes for param in node.params.values() if param.tensor is not None)
    unit, tiny = max(map(precision, (float(other.nodes[0].attrs["limit"]), *map(rounded_in, stored))))
    limit = LIMIT if unit > DOUBLE else DOUBLE_LIMIT
    for role, want, have, magnitude in coefficients_of(one, other):
        measure = partial(_in_units_of, unit=unit, tiny=tiny)
        yield role, UnitErrors((want, have, magnitude), measure, unit, min(1, max(want.ndim - 1, 0)), limit)


def _in_units_of(want: Array, have: Array, magnitude: Array, unit: float, tiny: float) -> tuple[Array, Array, Array]:
    return want, have, in_units(want, have, magnitude, unit, tiny)


def _total(summands: Iterable[Array], shape: tuple[int, ...]) -> Array:
    """The sum of magnitudes of which each has a number a channel, or else its largest counts for all."""
    total = np.zeros((1,) * len(shape))
    for each in summands:
        total = total + (each.reshape(shape) if each.size == math.prod(shape) else each.max())
    return total


def in_units(want: Array, have: Array, magnitude: Array, unit: float, tiny: float) -> Array:
    """|have - want| over unit * magnitude; a number that is none by itself counts as infinite.

    An error of `tiny` counts as none, and so does a 0 for what is below the type's normal range: some targets know no such numbers.
    """
    with np.errstate(all="ignore"):
        error = np.abs(have - want)
        units = np.asarray(np.maximum(error - tiny, 0) / (unit * magnitude))
        most = units.max(initial=0.0)
        if not most <= 1:
            np.copyto(units, 0.0, where=(have == 0) & (np.abs(want) < tiny / unit))
        if np.isnan(most):
            np.copyto(units, np.inf, where=np.isnan(units))
            np.copyto(units, 0.0, where=(error <= tiny) | (want == have) | (np.isnan(want) & np.isnan(have)))
    return units


def hidden_summands(plan: NormalForm, scales: Mapping[Node, Array] = MappingProxyType({})) -> Summands:
    """What the planned shifts no longer show: |beta| + |s*mean|, and what a weight makes of them, for each site that went in.

    Where branches were merged, those of all branches, and their own biases; where operators in a row were, what the last makes of the
    others'. scales: by which biases were multiplied later, by channel.
    """
    found: Summands = {}
    into_host = {m.branch: m.host for m in plan.merges if m.branch is not None}

    def last(node: Node) -> Node:
        return last(into_host[node]) if node in into_host else node

    for branch in into_host:
        if (bias := branch.params.get("bias")) is not None:
            found.setdefault(last(branch), []).append(_magnitude(bias))
    for outcome in plan.outcomes:
        for site_node in outcome.site.nodes if outcome.folded else ():
            if "mean" not in site_node.attrs:
                continue
            own = coefficients(site_node)
            summands = np.abs(own.shift) + 2 * np.abs(own.scale * np.asarray(site_node.attrs["mean"]))
            for node in outcome.into:
                weight = node.params.get("weight")
                went_down = site_node.index < node.index and weight is not None  # into W*t
                found.setdefault(last(node), []).append(summands.max() * _row_sums(node) if went_down else summands)
    for host, (_, summands) in plan.hosts.items():
        found.setdefault(host, []).append(summands)
    for node, scale in scales.items():
        found[node] = [each.ravel() * scale if each.size in (1, scale.size) else each * scale.max() for each in found.get(node, ())]
    return found


def merged_summands(plan: NormalForm) -> dict[Node, Array]:
    """For each operator into which others were merged, the magnitudes of all weights that are in its own, where they may cancel."""
    branches = {m.host: m.summands_now for m in plan.merges if m.host not in plan.hosts}
    return branches | {host: weight() for host, (weight, _) in plan.hosts.items()}


def _row_sums(node: Node) -> Array:
    """The sum of |W| over all that one output reads, the largest of all outputs."""
    param, outputs = node.params["weight"], node.output_axes
    sums = np.zeros([n if axis in outputs else min(n, 1) for axis, n in enumerate(param.shape)])
    for weight, _, part in folded(param, sums):
        part += np.abs(weight).sum(axis=tuple(axis for axis, n in enumerate(part.shape) if n != weight.shape[axis]), keepdims=True)
    return np.asarray(sums.max(initial=0.0))


def _magnitude(param: Param) -> Array:
    """What a coefficient's summands amount to: |S*w| + |T| for the update (S, T) of a stored w."""
    size = np.abs(param.original())
    return size if param.update is None else np.abs(param.update.scale) * size + np.abs(param.update.shift)


def precision(limit: float) -> tuple[float, float]:
    """Unit roundoff and half the smallest positive number of the IEEE type whose largest number is (2 - 2**(1 - p)) * 2**emax."""
    fraction, exponent = np.frexp(limit)
    unit = 1.0 - float(fraction)  # 2**-p
    return unit, float(np.ldexp(unit, 2 - int(exponent)))


def type_of(limit: float) -> str:
    """The floating-point type whose largest number it is."""
    names = {65504.0: "float16", 2.0**128 * (1 - 2.0**-8): "bfloat16", 2.0**128 * (1 - 2.0**-24): "float32"}
    return names.get(limit, "float64" if limit > 1e300 else f"a type that ends at {limit:.3g}")


def _limit(pair: ParameterPair) -> float:
    """The largest number of the type in which the candidate's parameter was rounded, or else what belongs to it."""
    a, role, b, its_role = pair
    params = (b.params.get(its_role), a.params.get(role), *b.params.values(), *a.params.values())
    for tensor in (param.tensor for param in params if param is not None):
        if tensor is not None:
            return rounded_in(tensor)
    return float(a.attrs.get("limit", np.finfo(np.float32).max))


def rounded_in(tensor: Tensor) -> float:
    """The largest number of the type in which a tensor was rounded."""
    return tensor.limit if tensor.cast_from is None else tensor.cast_from


def _channel_axis(node: Node, role: str, rank: int) -> int:
    """The axis of a parameter along which its output channels lie."""
    if not rank:
        return 0
    if role == "weight":
        return weight_axis(node)
    return 1 if node.op == "Affine" and rank > 1 else 0 if node.op == "Conv" else rank - 1


def weight_axis(node: Node) -> int:
    """The axis of an operator's weight along which its output channels lie."""
    w, y = node.attrs.get("w", ""), node.attrs.get("y", "")
    return next((i for i in reversed(range(len(w))) if w[i] in y), 0)


def output_axis(node: Node | None, rank: int) -> int:
    """The axis of a value along which the channels lie that an operator with coefficients gave it."""
    last = node is not None and node.op == "Contraction" and node.attrs.get("y", "")[-1:] in node.attrs.get("w", "")
    return rank - 1 if rank < 2 or last else 1
