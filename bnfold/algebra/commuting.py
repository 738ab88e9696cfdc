"""Proofs, first half: the operators that let maps cross. `rules` is the table that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from .affine import Affine, Array, Blocked
from .graph import Node, Value
from .rule import Rule, Step, identity


def _fixed(a: Affine, node: Node) -> Affine:
    """The map, or Blocked if it varies along an axis that the node mixes (a window slides along it, a sum runs over it)."""
    if mixed := [axis for axis in a.varying if axis in node.attrs.get("mixes", ())]:
        raise Blocked(f"the map varies along axis {mixed[0]}, which it mixes")
    return a


def _strict(a: Affine, node: Node) -> Affine:
    """The map, or Blocked if it makes equal what the node must tell apart (the places of its maxima are used)."""
    if node.attrs.get("strict") and (a.scale == 0).any():
        raise Blocked("its indices are used and some of the map's scales are zero")
    return a


# --- one activation in, the map passes: a(f(x)) = f(a(x)) ---------------------------------------------------------------------


def commutes(**conditions: bool) -> Rule:
    """f(a(x)) = a(f(x)) for every map that meets the conditions (`Affine.require`) and is constant along the mixed axes.

    Where each window holds one element (`attrs["picks"]`), f only picks positions, and there are no conditions.
    """

    def crosses(node: Node, a: Affine) -> Affine:
        return _fixed(a, node) if node.attrs.get("picks") else _fixed(_strict(a, node), node).require(**conditions)

    def up(node: Node, a: Affine) -> list[Step]:
        if node.attrs.get("drops"):  # the mixed axes are gone from the output
            a = a.map(lambda c: np.expand_dims(c, node.attrs["mixes"]))
        return [Step(_steered(node, crosses(node, a)))]

    def down(node: Node, maps: list[Affine]) -> list[Step]:
        a = crosses(node, _unsteered(maps))
        if node.attrs.get("drops"):
            a = a.map(lambda c: np.squeeze(c, node.attrs["mixes"]))
        return [Step([a])]

    return Rule(up, down)


def _steered(node: Node, a: Affine) -> list[Affine]:
    """A map for the first input, and none for others, which say where that is read."""
    return [a, *map(identity, node.inputs[1:])]


def _unsteered(maps: list[Affine]) -> Affine:
    if not all(a.is_identity for a in maps[1:]):
        raise Blocked("the map would change where it reads")
    return maps[0]


def lookup_up(node: Node, a: Affine) -> list[Step]:
    """a(x[i]) = a(x)[i] for any places i, where the map is the same for all that may be looked up.

    From `axis` on, the places stand for `taken` of the input's axes, and `given` of the output's are theirs.
    """
    return [Step([_looked_up(node, a, "given", "taken")])]


def lookup_down(node: Node, maps: list[Affine]) -> list[Step]:
    """The same, read the other way."""
    return [Step([_looked_up(node, maps[0], "taken", "given")])]


def _looked_up(node: Node, a: Affine, here: str, there: str) -> Affine:
    axis, old, new = (node.attrs[name] for name in ("axis", here, there))
    if lost := [i for i in a.varying if axis <= i < axis + old]:
        raise Blocked(f"the map varies along axis {lost[0]}, along which it looks up at computed places")
    return a.map(lambda c: c.reshape(*c.shape[:axis], *(1,) * new, *c.shape[axis + old :]))


def clamp_up(node: Node, a: Affine) -> list[Step]:
    """a(clamp(x; l, h)) = clamp(a(x); a(l), a(h)) if s > 0, with the bounds swapped if s < 0; and both are t where s = 0."""
    ends = [_mapped(a, bound) for bound in _bounds(node)]
    return [Step([a], _rebounded(node, np.minimum(*ends), np.maximum(*ends)))]


def clamp_down(node: Node, maps: list[Affine]) -> list[Step]:
    """clamp(a(x); l, h) = a(clamp(x; b(l), b(h))) with b the inverse of a; where s = 0, it is the constant clamp(t; l, h)."""
    a, (low, high) = maps[0], _bounds(node)
    still = a.scale == 0
    with np.errstate(over="ignore"):
        inverse = Affine(1 / np.where(still, 1.0, a.scale), np.where(still, 0.0, -a.shift / np.where(still, 1.0, a.scale)))
    ends = [_mapped(inverse, bound) for bound in (low, high)]
    out = Affine(a.scale, np.where(still, np.clip(a.shift, low, high), a.shift))
    return [Step([out], _rebounded(node, np.minimum(*ends), np.maximum(*ends)))]


def _bounds(node: Node) -> tuple[Array, Array]:
    """A clamp's bounds as they are by now; infinite where there is none, which the largest number of the type stands for."""
    limit = node.attrs["limit"]
    ends = [node.params[role].read() for role in ("low", "high")]
    low, high = np.minimum(*ends), np.maximum(*ends)
    return np.where(low <= -limit, -np.inf, low), np.where(high >= limit, np.inf, high)


def _mapped(a: Affine, bound: Array) -> Array:
    """A bound, which may be infinite, behind a map."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(a.scale == 0, a.shift, a.scale * bound + a.shift)


def _rebounded(node: Node, low: Array, high: Array) -> dict[str, Affine]:
    limit = node.attrs["limit"]
    bounds = {"low": np.clip(low, -limit, limit), "high": np.clip(high, -limit, limit)}
    if (why := node.attrs.get("clips")) and any((c != node.params[role].read()).any() for role, c in bounds.items()):
        raise Blocked(why)
    return {role: Affine(np.zeros(()), c) for role, c in bounds.items()}


def sum_up(node: Node, a: Affine) -> list[Step]:
    """s*sum(x) + t = sum(s*x + t/n)."""
    return [Step([_shared_out(node, commutes().up(node, a), lambda shift, n: shift / n)])]


def sum_down(node: Node, maps: list[Affine]) -> list[Step]:
    """sum(s*x + t) = s*sum(x) + n*t."""
    return [Step([_shared_out(node, commutes().down(node, maps), lambda shift, n: shift * n)])]


def _shared_out(node: Node, steps: list[Step], by: Callable[[Array, int], Array]) -> Affine:
    a = steps[0].maps[0]
    return Affine(a.scale, by(a.shift, _terms(node))) if a.shift.any() else a


def _terms(node: Node) -> int:
    sizes = [n for axis, n in enumerate(node.inputs[0].sizes or ()) if axis in node.attrs["mixes"]]
    if not sizes or None in sizes:
        raise Blocked("it sums an unknown number of terms and the map's shift is not zero")
    return int(np.prod([n for n in sizes if n is not None]))


def _fill(node: Node) -> float:
    """What it pads with, an earlier map's update included."""
    return float(node.params["fill"].read()) if "fill" in node.params else float(node.attrs["fill"])


def fill_up(node: Node, a: Affine) -> list[Step]:
    """a(pad(x, v)) = pad(a(x), a(v)), if a(v) is one number."""
    _fixed(a, node)
    new = a(_fill(node))
    if (new != new.flat[0]).any():
        raise Blocked("it pads with one constant, which the map would make differ from channel to channel")
    return _refilled(node, _steered(node, a), float(new.flat[0]))


def fill_down(node: Node, maps: list[Affine]) -> list[Step]:
    """pad(a(x), v) = a(pad(x, u)) with a(u) = v, if u is one number."""
    a, fill = _fixed(_unsteered(maps), node), _fill(node)
    if (a(fill) == fill).all():
        return [Step([a])]
    with np.errstate(divide="ignore", invalid="ignore"):
        old = (fill - a.shift) / a.scale
    if not np.isfinite(old).all() or (old != old.flat[0]).any():
        raise Blocked("it pads with one constant, which the map would make differ from channel to channel")
    return _refilled(node, [a], float(old.flat[0]))


def _refilled(node: Node, maps: list[Affine], fill: float) -> list[Step]:
    if fill == _fill(node):
        return [Step(maps)]
    if "fill" not in node.params:
        what = "zeros and the map's shift is not zero" if _fill(node) == 0 else "a number that can't change"
        raise Blocked(f"it pads with {what}")
    return [Step(maps, {"fill": Affine(np.zeros(()), np.asarray(fill))})]


# --- several activations in -----------------------------------------------------------------------------------------------


def _to_operand(a: Affine, value: Value) -> Affine:
    """The map for one operand of a broadcasting operator."""
    if value.rank is None:
        raise Blocked(f"the rank of {value.name} isn't known")
    return a.broadcast_from(value.rank, value.sizes)


def _into_one(node: Node, takers: Iterable[int], own: Callable[[int], Affine], rest: Affine | None = None) -> list[Step]:
    """A map for any one operand, and another for the rest (None: none): an option for each that can take it."""
    options: list[Step] = []
    reason = None
    for k in takers:
        try:
            maps = [own(k) if i == k else rest for i in range(len(node.inputs))]
            options.append(Step([identity(v) if a is None else _to_operand(a, v) for a, v in zip(maps, node.inputs, strict=True)]))
        except Blocked as blocked:
            reason = reason or blocked
    if not options and reason:
        raise reason
    return options


def add_up(node: Node, a: Affine) -> list[Step]:
    """s*(x + n*y) + t = (s*x + t) + n*s*y = s*x + n*(s*y + t/n): the shift goes to any one branch of which there is some."""
    multiples = node.attrs.get("multiples", (1,) * len(node.inputs))
    takers = [k for k, n in enumerate(multiples) if n] if a.shift.any() else range(1)
    return _into_one(node, takers, lambda k: Affine(a.scale, a.shift / multiples[k]) if multiples[k] else a, a.linear)


def add_down(node: Node, maps: list[Affine]) -> list[Step]:
    """(s*x + t) + n*(s*y + u) = s*(x + n*y) + (t + n*u): the scales must agree."""
    scale = maps[0].scale
    for a in maps[1:]:
        if not (scale == a.scale).all():
            raise Blocked("its branches would need the same scale")
        scale = scale if scale.ndim >= a.scale.ndim and scale.size >= a.scale.size else a.scale
    shift: Array = np.zeros(())
    for multiple, a in zip(node.attrs.get("multiples", (1,) * len(maps)), maps, strict=True):
        shift = shift + multiple * a.shift
    return [Step([_of_rank(Affine(scale, shift), node)])]


def _of_rank(a: Affine, node: Node) -> Affine:
    rank = node.output.rank if node.output.rank is not None else max((v.rank or 0) for v in node.inputs)
    return a.map(lambda c: c.reshape((1,) * (rank - c.ndim) + c.shape)).settled()


def mul_up(node: Node, a: Affine) -> list[Step]:
    """s*(x*y) = (s*x)*y: the scale goes into any one factor."""
    a.require(unshifted=True)
    return _into_one(node, range(node.attrs.get("factors", len(node.inputs))), lambda _: a)


def mul_down(node: Node, maps: list[Affine]) -> list[Step]:
    """(s*x)*(r*y) = (s*r)*(x*y)."""
    for i, a in enumerate(maps):
        a.require(unshifted=True)
        if i >= node.attrs.get("factors", len(maps)):
            a.require(unscaled=True)  # a divisor
    scale = maps[0].scale
    for a in maps[1:]:
        scale = scale * a.scale
    return [Step([_of_rank(Affine(scale, np.zeros(())), node)])]


def matmul_up(node: Node, a: Affine) -> list[Step]:
    """s*(x@y) = (s*x)@y if s is constant along the columns, x@(s*y) if along the rows."""
    a.require(unshifted=True)
    takers = [k for k, along in ((0, -1), (1, -2)) if a.shape[along] == 1]
    if not takers:
        raise Blocked("the map varies along both the rows and the columns of a matrix product")
    return _into_one(node, takers, lambda _: a)


def matmul_down(node: Node, maps: list[Affine]) -> list[Step]:
    """(s*x)@(r*y) = s*r*(x@y) if s and r are constant along the axis that is summed over."""
    for a, summed in zip(maps, (-1, -2), strict=True):
        a.require(unshifted=True)
        if a.rank and a.shape[summed] != 1:
            raise Blocked("the map varies along the axis that the matrix product sums over")
    return [Step([_of_rank(Affine(maps[0].scale * maps[1].scale, np.zeros(())), node)])]


def chooses(**conditions: bool) -> Rule:
    """Each output element is one of the inputs' elements (or their mean): f(a(x), a(y)) = a(f(x, y)).

    The first `attrs["selectors"]` inputs only steer the choice and may carry no map.
    """

    def up(node: Node, a: Affine) -> list[Step]:
        a.require(**conditions)
        steers = node.attrs.get("selectors", 0)
        return [Step([identity(v) if i < steers else _to_operand(a, v) for i, v in enumerate(node.inputs)])]

    def down(node: Node, maps: list[Affine]) -> list[Step]:
        steers = node.attrs.get("selectors", 0)
        if not all(a.is_identity for a in maps[:steers]):
            raise Blocked("the map would change what it chooses")
        first, *others = maps[steers:]
        if not all(first.same_as(a) for a in others):
            raise Blocked("its branches would need the same map")
        return [Step([_of_rank(max((first, *others), key=lambda a: a.scale.size), node).require(**conditions)])]

    return Rule(up, down)
