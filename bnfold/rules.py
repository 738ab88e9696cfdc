"""THE table: for every operator, which affine maps may cross it or end in it, and on what condition.

A rule is the proof of one equation about its operator f, read in two directions:

    up    a(f(x)) = f'(b(x))     a stands behind f: the maps b that must stand before its inputs instead
    down  f(a(x)) = b(f'(x))     the maps a stand before f's inputs: the map b that comes out behind it

f' is f with updated parameters. A rule returns its options, the best first, each a `Step` with the maps that go on and the
updates; or it raises `Blocked` with the reason. Read RULES at the end first: it is the whole theory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .affine import Affine, Array, Blocked
from .graph import Node, Value
from .moves import move_down, move_up


@dataclass(frozen=True)
class Step:
    """One way across a node. maps: one for each input (up), or the output's (down). updates: by parameter role."""

    maps: list[Affine]
    updates: dict[str, Affine] = field(default_factory=dict)


class Rule(NamedTuple):
    up: Callable[[Node, Affine], list[Step]]
    down: Callable[[Node, list[Affine]], list[Step]]


def _no_way(direction: str, why: str) -> Callable[..., list[Step]]:
    def blocked(node: Node, *_: object) -> list[Step]:
        raise Blocked(why)

    blocked.__name__ = f"never_{direction}"
    return blocked


def _identity(value: Value) -> Affine:
    return Affine.identity(value.rank or 0)


def _fixed(a: Affine, node: Node) -> Affine:
    """The map, or Blocked if it varies along an axis that the node mixes (a window slides along it, a sum runs over it)."""
    if mixed := [axis for axis in a.varying if axis in node.attrs.get("mixes", ())]:
        raise Blocked(f"the map varies along axis {mixed[0]}, which it mixes")
    return a


# --- one activation in, the map passes: a(f(x)) = f(a(x)) ---------------------------------------------------------------------


def commutes(**conditions: bool) -> Rule:
    """f(a(x)) = a(f(x)) for every map that meets the conditions (`Affine.require`) and is constant along the mixed axes."""

    def up(node: Node, a: Affine) -> list[Step]:
        if node.attrs.get("drops"):  # the mixed axes are gone from the output
            a = a.map(lambda c: np.expand_dims(c, node.attrs["mixes"]))
        return [Step([_fixed(a, node).require(**conditions)])]

    def down(node: Node, maps: list[Affine]) -> list[Step]:
        a = _fixed(maps[0], node).require(**conditions)
        if node.attrs.get("drops"):
            a = a.map(lambda c: np.squeeze(c, node.attrs["mixes"]))
        return [Step([a])]

    return Rule(up, down)


def _sum_up(node: Node, a: Affine) -> list[Step]:
    """s*sum(x) + t = sum(s*x + t/n)."""
    [step] = commutes().up(node, a)
    b = step.maps[0]
    return [Step([Affine(b.scale, b.shift / _terms(node) if b.shift.any() else b.shift)])]


def _sum_down(node: Node, maps: list[Affine]) -> list[Step]:
    """sum(s*x + t) = s*sum(x) + n*t."""
    [step] = commutes().down(node, maps)
    b = step.maps[0]
    return [Step([Affine(b.scale, b.shift * _terms(node) if b.shift.any() else b.shift)])]


def _terms(node: Node) -> int:
    sizes = [n for axis, n in enumerate(node.inputs[0].sizes or ()) if axis in node.attrs["mixes"]]
    if not sizes or None in sizes:
        raise Blocked("it sums an unknown number of terms and the map's shift is not zero")
    return int(np.prod([n for n in sizes if n is not None]))


def _fill_up(node: Node, a: Affine) -> list[Step]:
    """a(pad(x, v)) = pad(a(x), a(v)), if a(v) is one number."""
    _fixed(a, node)
    new = a(node.attrs["fill"])
    if (new != new.flat[0]).any():
        raise Blocked("it pads with one constant, which the map would make differ from channel to channel")
    return _refilled(node, [a], float(new.flat[0]))


def _fill_down(node: Node, maps: list[Affine]) -> list[Step]:
    """pad(a(x), v) = a(pad(x, u)) with a(u) = v, if u is one number."""
    a, fill = _fixed(maps[0], node), node.attrs["fill"]
    if (a(fill) == fill).all():
        return [Step([a])]
    with np.errstate(divide="ignore", invalid="ignore"):
        old = (fill - a.shift) / a.scale
    if not np.isfinite(old).all() or (old != old.flat[0]).any():
        raise Blocked("it pads with one constant, which the map would make differ from channel to channel")
    return _refilled(node, [a], float(old.flat[0]))


def _refilled(node: Node, maps: list[Affine], fill: float) -> list[Step]:
    if fill == node.attrs["fill"]:
        return [Step(maps)]
    if "fill" not in node.params:
        raise Blocked("it pads with zeros and the map's shift is not zero")
    return [Step(maps, {"fill": Affine(np.float64(0.0), np.float64(fill))})]


# --- several activations in -----------------------------------------------------------------------------------------------


def _to_operand(a: Affine, value: Value) -> Affine:
    """The map for one operand of a broadcasting operator."""
    if value.rank is None:
        raise Blocked(f"the rank of {value.name} isn't known")
    return a.broadcast_from(value.rank, value.sizes)


def _add_up(node: Node, a: Affine) -> list[Step]:
    """s*(x + y) + t = (s*x + t) + s*y: the shift goes to any one branch (with its sign)."""
    signs = node.attrs.get("signs", (1,) * len(node.inputs))
    options: list[Step] = []
    reason = None
    for k, sign in enumerate(signs if a.shift.any() else signs[:1]):
        try:
            options.append(
                Step([_to_operand(Affine(a.scale, sign * a.shift) if i == k else a.linear, v) for i, v in enumerate(node.inputs)])
            )
        except Blocked as blocked:
            reason = reason or blocked
    if not options and reason:
        raise reason
    return options


def _add_down(node: Node, maps: list[Affine]) -> list[Step]:
    """(s*x + t) + (s*y + u) = s*(x + y) + (t + u): the scales must agree."""
    scale = maps[0].scale
    for a in maps[1:]:
        if not np.array_equal(*np.broadcast_arrays(scale, a.scale)):
            raise Blocked("its branches would need the same scale")
        scale = scale if scale.ndim >= a.scale.ndim and scale.size >= a.scale.size else a.scale
    shift: Array = np.zeros(())
    for sign, a in zip(node.attrs.get("signs", (1,) * len(maps)), maps, strict=True):
        shift = shift + sign * a.shift
    return [Step([_of_rank(Affine(scale, shift), node)])]


def _of_rank(a: Affine, node: Node) -> Affine:
    rank = node.output.rank if node.output.rank is not None else max((v.rank or 0) for v in node.inputs)
    return a.map(lambda c: c.reshape((1,) * (rank - c.ndim) + c.shape)).settled()


def _mul_up(node: Node, a: Affine) -> list[Step]:
    """s*(x*y) = (s*x)*y: the scale goes into any one factor."""
    a.require(unshifted=True)
    options: list[Step] = []
    reason = None
    for k in range(node.attrs.get("factors", len(node.inputs))):
        try:
            options.append(Step([_to_operand(a, v) if i == k else _identity(v) for i, v in enumerate(node.inputs)]))
        except Blocked as blocked:
            reason = reason or blocked
    if not options and reason:
        raise reason
    return options


def _mul_down(node: Node, maps: list[Affine]) -> list[Step]:
    """(s*x)*(r*y) = (s*r)*(x*y)."""
    for i, a in enumerate(maps):
        a.require(unshifted=True)
        if i >= node.attrs.get("factors", len(maps)):
            a.require(unscaled=True)  # a divisor
    scale = maps[0].scale
    for a in maps[1:]:
        scale = scale * a.scale
    return [Step([_of_rank(Affine(scale, np.zeros(())), node)])]


def _matmul_up(node: Node, a: Affine) -> list[Step]:
    """s*(x@y) = (s*x)@y if s is constant along the columns, x@(s*y) if along the rows."""
    a.require(unshifted=True)
    options, last = [], a.rank - 1
    for k, along in ((0, last), (1, last - 1)):
        if a.shape[along] == 1:
            maps = [_identity(v) for v in node.inputs]
            maps[k] = _to_operand(a, node.inputs[k])
            options.append(Step(maps))
    if not options:
        raise Blocked("the map varies along both the rows and the columns of a matrix product")
    return options


def _matmul_down(node: Node, maps: list[Affine]) -> list[Step]:
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
        return [Step([_identity(v) if i < steers else _to_operand(a, v) for i, v in enumerate(node.inputs)])]

    def down(node: Node, maps: list[Affine]) -> list[Step]:
        steers = node.attrs.get("selectors", 0)
        if not all(a.is_identity for a in maps[:steers]):
            raise Blocked("the map would change what it chooses")
        first, *others = maps[steers:]
        if not all(first.same_as(a) for a in others):
            raise Blocked("its branches would need the same map")
        return [Step([_of_rank(max((first, *others), key=lambda a: a.scale.size), node).require(**conditions)])]

    return Rule(up, down)


# --- operators that only move data: see moves.py ----------------------------------------------------------------------------


def _move_up(node: Node, a: Affine) -> list[Step]:
    return [Step(move_up(node, a))]


def _move_down(node: Node, maps: list[Affine]) -> list[Step]:
    return [Step([move_down(node, maps)])]


# --- operators with weights absorb the map ----------------------------------------------------------------------------------


def _conv_up(node: Node, a: Affine) -> list[Step]:
    """s*(W*x + b) + t = (s*W)*x + (s*b + t), s and t along the output channels."""
    weight = node.params["weight"]
    s, t = a.along(1, weight.shape[0])
    scale = s.reshape(-1, *(1,) * (len(weight.shape) - 1))
    return [Step([Affine.identity(a.rank)], {"weight": Affine(scale, np.float64(0.0)), "bias": Affine(s, t)})]


def _conv_down(node: Node, maps: list[Affine]) -> list[Step]:
    """W*(s*x + t) + b = (W*s)*x + (b + sum(W*t)): output channel o of group g reads the input channels of group g.

    The sum is the same for every output position only if each sees every tap; where zeros are padded, t must be 0.
    """
    weight, groups = node.params["weight"], node.attrs.get("groups", 1)
    out, fan_in, *kernel = weight.shape
    s, t = maps[0].along(1, groups * fan_in)
    if not node.attrs.get("uniform", True) and t.any():
        raise Blocked(node.attrs.get("uneven", "its outputs don't all see the same taps") + " and the map's shift is not zero")
    s, t = (np.repeat(c.reshape(groups, fan_in), out // groups, axis=0).reshape(out, fan_in, *(1,) * len(kernel)) for c in (s, t))
    updates = {"weight": Affine(s, np.float64(0.0))}
    if t.any():
        updates["bias"] = Affine(np.float64(1.0), (weight.read() * t).sum(axis=tuple(range(1, 2 + len(kernel)))))
    return [Step([_identity(node.output)], updates)]


def _contraction_up(node: Node, a: Affine) -> list[Step]:
    """s*(x.W + b) + t = x.(W*s) + (s*b + t), for a product given by letters: s may vary along the letters of W."""
    w, y = node.attrs["w"], node.attrs["y"]
    if missing := [axis for axis in a.varying if y[axis] not in w]:
        raise Blocked(f"the map varies along axis {missing[0]}, along which its weight doesn't")
    updates = {"weight": Affine(_by_letters(a.scale, y, w), np.float64(0.0))}
    if "bias" in node.params:
        updates["bias"] = Affine(a.scale, a.shift)
    elif a.shift.any():
        raise Blocked("it has no bias")
    return [Step([_identity(node.inputs[0])], updates)]


def _contraction_down(node: Node, maps: list[Affine]) -> list[Step]:
    """(s*x + t).W + b = x.(s*W) + (b + t.W); a scale along letters that W lacks passes on instead.

    An operator without a bias of its own lets the shift travel on, for an Add behind to pick up, or else grows an Add.
    """
    a, x, w, y = maps[0], node.attrs["x"], node.attrs["w"], node.attrs["y"]
    weight = node.params["weight"]
    letters = [x[axis] for axis in a.varying]
    passes = [axis for axis in a.varying if x[axis] not in w]
    if passes and len(passes) < len(letters):
        raise Blocked("the map varies both along its weight and across it")
    out = _identity(node.output)
    updates: dict[str, Affine] = {}
    if passes:
        out = Affine(_by_letters(a.scale, x, y), np.zeros(()))
    else:
        updates["weight"] = Affine(_by_letters(a.scale, x, w), np.float64(0.0))
    if not a.shift.any():
        return [Step([out], updates)]
    product = np.einsum(f"{x},{w}->{y}", a.shift, weight.read())  # sizes of 1 broadcast
    travel = Step([Affine(out.scale, product)], updates)
    if passes or "bias" not in node.params:
        return [travel]
    absorb = Step([out], {**updates, "bias": Affine(np.float64(1.0), product)})
    return [travel, absorb] if node.attrs.get("grows_add") else [absorb]


def _by_letters(c: Array, have: str, want: str) -> Array:
    """Coefficients on the axes `have`, rearranged to the axes `want`; size 1 where they have no such axis."""
    kept = [l for l in want if l in have]
    c = c.reshape([n for l, n in zip(have, c.shape, strict=True) if l in want])
    c = c.transpose([[l for l in have if l in want].index(l) for l in kept])
    return c.reshape([c.shape[kept.index(l)] if l in kept else 1 for l in want])


def _table_up(node: Node, a: Affine) -> list[Step]:
    """s*T[i] + t = (s*T + t)[i], for a row of a table: the map may not vary along the axes of the indices."""
    axes = node.attrs["axes"]  # for each axis of the table, the axis of the output, or None for the one that is looked up
    if lost := [axis for axis in a.varying if axis not in axes]:
        raise Blocked(f"the map varies along axis {lost[0]}, the axis of the indices")
    rows = a.map(lambda c: c.reshape([1 if axis is None else c.shape[axis] for axis in axes]))
    return [Step([_identity(v) for v in node.inputs], {"table": rows})]


def _constant_up(node: Node, a: Affine) -> list[Step]:
    """A constant operand simply becomes a(c)."""
    return [Step([], {"value": a})]


def _recurrent_down(node: Node, maps: list[Affine]) -> list[Step]:
    """W*(s*x + t) + b = (W*s)*x + (b + W*t), for every gate and direction: W is [directions, gates, features]."""
    if not all(a.is_identity for a in maps[1:]):
        raise Blocked("the map would reach its state, not its input")
    weight = node.params["weight"]
    s, t = maps[0].along(-1, weight.shape[-1])
    updates = {"weight": Affine(s.reshape(1, 1, -1), np.float64(0.0))}
    if t.any():
        product = weight.read() @ t  # [directions, gates]
        updates["bias"] = Affine(np.float64(1.0), np.concatenate([product, np.zeros_like(product)], axis=1))  # [W bias, R bias]
    return [Step([_identity(node.output)], updates)]


def _normalised_up(node: Node, a: Affine) -> list[Step]:
    """s*(g*n(x) + b) + t = (s*g)*n(x) + (s*b + t), for a normalisation with an affine part of its own."""
    gamma = node.params["gamma"]
    if outside := [axis for axis in a.varying if gamma.shape[axis] != a.shape[axis]]:
        raise Blocked(f"the map varies along axis {outside[0]}, along which its own scale doesn't")
    return [Step([_identity(v) for v in node.inputs], {"gamma": a.linear, "beta": a})]


# --- affine operators themselves: BatchNorm, and Mul, Add, Sub, Div by constants ---------------------------------------------


def coefficients(node: Node) -> Affine:
    """The map of an affine node: gain * gamma * (x - mean) + beta, each of gamma and beta a parameter where it has that slot.

    For a BatchNorm gain is 1/sqrt(var + eps) (Ioffe & Szegedy 2015, Algorithm 2, line 11).
    """
    gamma = node.params["gamma"].read() if "gamma" in node.params else np.ones(())
    beta = node.params["beta"].read() if "beta" in node.params else np.zeros(())
    scale = node.attrs.get("gain", 1.0) * gamma
    rank = node.output.rank or 0
    a = Affine(scale, beta - node.attrs.get("mean", 0.0) * scale)
    return a.map(lambda c: c.reshape((1,) * (rank - c.ndim) + c.shape)).settled()


def _affine_up(node: Node, a: Affine) -> list[Step]:
    """s*(S*x + T) + t: one with both slots takes it all; an Add takes the shift, and the scale goes on; a Mul the reverse."""
    own, slots = coefficients(node), node.params.keys() & {"gamma", "beta"}
    _grows(node, a)
    if slots == {"gamma", "beta"}:
        return [Step([Affine.identity(a.rank)], {"gamma": a.linear, "beta": a})]
    if slots == {"beta"}:
        return [Step([a.linear], {"beta": a})]
    if slots == {"gamma"} and not a.shift.any():
        return [Step([Affine.identity(a.rank)], {"gamma": a})]
    if (own.scale == 0).any():
        raise Blocked("its own scale has zeros and the map's shift is not zero")
    return [Step([Affine(a.scale, (a.scale * own.shift + a.shift - own.shift) / own.scale)])]


def _affine_down(node: Node, maps: list[Affine]) -> list[Step]:
    """S*(s*x + t) + T, the same in the other direction; what finds no slot passes on as (s, S*t + T - s*T)."""
    a, own, slots = maps[0], coefficients(node), node.params.keys() & {"gamma", "beta"}
    passes = Step([Affine(a.scale, own.scale * a.shift + own.shift - a.scale * own.shift)])
    try:
        _grows(node, a)
    except Blocked:
        return [passes]
    if slots == {"gamma", "beta"}:
        moved = own.scale * (a.shift + node.attrs.get("mean", 0.0) * (a.scale - 1))
        return [Step([Affine.identity(a.rank)], {"gamma": a.linear, "beta": Affine(np.float64(1.0), moved)})]
    if slots == {"beta"} and (a.scale == 1).all():
        return [Step([Affine.identity(a.rank)], {"beta": Affine(np.float64(1.0), own.scale * a.shift)})]
    if slots == {"gamma"}:
        return [Step([Affine(np.float64(1.0), own.scale * a.shift)], {"gamma": a.linear}), passes]
    return [passes]


def _grows(node: Node, a: Affine) -> None:
    """A BatchNorm's vectors keep their shape; a constant operand of Mul or Add may grow to the map's."""
    for role in node.params.keys() & {"gamma", "beta"}:
        if not node.attrs.get("grows"):
            for axis in a.varying:
                if node.params[role].shape[axis] != a.shape[axis]:
                    raise Blocked(f"the map varies along axis {axis}, along which its own coefficients don't")


ANY = commutes()
INCREASING = commutes(increasing=True)
STRETCHING = commutes(increasing=True, unshifted=True)
NEVER_UP = _no_way("up", "nothing behind it can move before it")
NEVER_DOWN = _no_way("down", "nothing before it can move behind it")

RULES: dict[str, Rule] = {
    # any map crosses
    "Identity": ANY,  # a(x) = a(x); dropout at inference, a cast between float types
    "Average": ANY,  # mean(s*x + t) = s*mean(x) + t; global, windowed without counted padding, or along axes
    "Resize": ANY,  # weights that sum to 1 are a mean
    "Crop": ANY,  # a slice by computed bounds
    "Move": Rule(_move_up, _move_down),  # out[i] = in[source(i)]: the coefficients move as the data do
    # maps that keep the order cross
    "Max": INCREASING,  # max(s*x + t) = s*max(x) + t if s >= 0; windowed, global, or along axes; min likewise
    # stretchings cross
    "Relu": STRETCHING,  # relu(s*x) = s*relu(x) if s >= 0; leaky, parametric, absolute value, L1 and L2 norms
    # maps that fix the fill cross
    "Pad": Rule(_fill_up, _fill_down),  # a(pad(x, v)) = pad(a(x), a(v)); average pooling that counts its zeros
    # several activations
    "Sum": Rule(_sum_up, _sum_down),  # s*sum(x) + t = sum(s*x + t/n)
    "Add": Rule(_add_up, _add_down),  # s*(x + y) + t = (s*x + t) + s*y
    "Mul": Rule(_mul_up, _mul_down),  # s*(x*y) = (s*x)*y
    "MatMul": Rule(_matmul_up, _matmul_down),  # s*(x@y) = (s*x)@y or x@(s*y)
    "Mean": chooses(),  # mean(a(x), a(y)) = a(mean(x, y))
    "Where": chooses(),  # c ? a(x) : a(y) = a(c ? x : y)
    "Maximum": chooses(increasing=True),  # max(a(x), a(y)) = a(max(x, y)); min likewise
    # the map ends here
    "Conv": Rule(_conv_up, _conv_down),  # any group, 1-3 D, transposed or not
    "Contraction": Rule(_contraction_up, _contraction_down),  # Linear, Gemm, MatMul by a constant, Einsum
    "Affine": Rule(_affine_up, _affine_down),  # BatchNorm; Mul, Add, Sub, Div by a constant
    "Normalisation": Rule(_normalised_up, NEVER_DOWN),  # the affine part of LayerNorm, InstanceNorm, GroupNorm
    "Table": Rule(_table_up, NEVER_DOWN),  # Embedding
    "Constant": Rule(_constant_up, NEVER_DOWN),
    "Recurrent": Rule(NEVER_UP, _recurrent_down),  # LSTM, GRU, RNN: their input weights
}


def rule_of(node: Node) -> Rule:
    """The node's rule; every operator without a row is a barrier."""
    rule = RULES.get(node.op)
    if rule is None:
        raise Blocked(node.attrs.get("why", "no rule lets a map cross it"))
    return rule
