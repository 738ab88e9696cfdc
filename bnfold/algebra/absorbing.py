"""Proofs, second half: the operators in which maps end. `rules` is the table that they belong to.

A weight is updated by a map over its own canonical array (`graph.Param`), here always the least that says it: a scale along
one axis, or a bias.
"""

from __future__ import annotations

import numpy as np

from .affine import Affine, Array, Blocked, NoBias
from .graph import Node
from .rule import Step, identity


def conv_up(node: Node, a: Affine) -> list[Step]:
    """s*(W*x + b) + t = (s*W)*x + (s*b + t), s and t along the output channels.

    Further inputs only steer which elements each tap reads, and how much of them (a deformable convolution): y is linear in W all the same.
    """
    weight = node.params["weight"]
    s, t = a.along(1, weight.shape[0])
    scale = s.reshape(-1, *(1,) * (len(weight.shape) - 1))
    return [Step([identity(v) for v in node.inputs], {"weight": Affine.scaling(scale), "bias": Affine(s, t)})]


def conv_down(node: Node, maps: list[Affine]) -> list[Step]:
    """W*(s*x + t) + b = (W*s)*x + (b + sum(W*t)): output channel o of group g reads the input channels of group g.

    The sum is the same for every output position only if each sees every tap; where zeros are padded, t must be 0. Without a place for a
    bias it travels on.
    """
    if not all(a.is_identity for a in maps[1:]):
        raise Blocked("the map would move the places that it reads")
    weight, groups = node.params["weight"], node.attrs.get("groups", 1)
    out, fan_in, *kernel = weight.shape
    s, t = maps[0].along(1, groups * fan_in)
    if not node.attrs.get("uniform", True) and t.any():
        raise Blocked(node.attrs.get("uneven", "its outputs don't all see the same taps") + " and the map's shift is not zero")
    s, t = (np.repeat(c.reshape(groups, fan_in), out // groups, axis=0).reshape(out, fan_in, *(1,) * len(kernel)) for c in (s, t))
    updates = {"weight": Affine.scaling(s)}
    if not t.any():
        return [Step([identity(node.output)], updates)]
    product = (weight.read() * t).sum(axis=tuple(range(1, 2 + len(kernel))))
    if node.params["bias"].refusal:
        return [Step([Affine.shifting(product.reshape(1, -1, *(1,) * len(kernel)))], updates)]
    return [Step([identity(node.output)], {**updates, "bias": Affine.shifting(product)})]


def contraction_up(node: Node, a: Affine) -> list[Step]:
    """s*(x.W + b) + t = x.(W*s) + (s*b + t), for a product given by letters: s may vary along the letters of W."""
    w, y = node.attrs["w"], node.attrs["y"]
    if missing := [axis for axis in a.varying if y[axis] not in w]:
        raise Blocked(f"the map varies along axis {missing[0]}, along which its weight doesn't")
    updates = {"weight": Affine.scaling(_by_letters(a.scale, y, w))}
    if "bias" in node.params:
        updates["bias"] = Affine(a.scale, a.shift)
    elif a.shift.any():
        raise NoBias("it has no bias")
    return [Step([identity(node.inputs[0])], updates)]


def contraction_down(node: Node, maps: list[Affine]) -> list[Step]:
    """(s*x + t).W + b = x.(s*W) + (b + t.W); a scale along letters that W lacks passes on instead.

    What passes, s*(x.W) + t.W + b = s*(x.W + b) + (t.W + b - s*b), leaves the bias as it is. An operator without a bias of its own
    lets the shift travel on, for an Add behind to pick up, or else grows an Add.
    """
    a, x, w, y = maps[0], node.attrs["x"], node.attrs["w"], node.attrs["y"]
    weight = node.params["weight"]
    letters = [x[axis] for axis in a.varying]
    passes = [axis for axis in a.varying if x[axis] not in w]
    if passes and len(passes) < len(letters):
        raise Blocked("the map varies both along its weight and across it")
    out = identity(node.output)
    updates: dict[str, Affine] = {}
    if passes:
        out = Affine(_by_letters(a.scale, x, y), np.zeros(()))
    else:
        updates["weight"] = Affine.scaling(_by_letters(a.scale, x, w))
    shift = a.shift
    own = node.params["bias"].read() if passes and "bias" in node.params else np.zeros(())
    if not shift.any() and not own.any():
        return [Step([out], updates)]
    product = np.einsum(f"{x},{w}->{y}", shift, weight.read()) + own * (1 - out.scale)  # sizes of 1 broadcast
    travel = Step([Affine(out.scale, product)], updates)
    if passes or "bias" not in node.params:
        return [travel]
    absorb = Step([out], {**updates, "bias": Affine.shifting(product)})
    return [travel, absorb] if node.attrs.get("grows_add") else [absorb]


def _by_letters(c: Array, have: str, want: str) -> Array:
    """Coefficients on the axes `have`, rearranged to the axes `want`; size 1 where they have no such axis."""
    kept = [name for name in want if name in have]
    c = c.reshape([n for name, n in zip(have, c.shape, strict=True) if name in want])
    c = c.transpose([[name for name in have if name in want].index(name) for name in kept])
    return c.reshape([c.shape[kept.index(name)] if name in kept else 1 for name in want])


def table_up(node: Node, a: Affine) -> list[Step]:
    """s*T[i] + t = (s*T + t)[i], for a row of a table: the map may not vary along the axes of the indices."""
    axes = node.attrs["axes"]  # for each axis of the table, the axis of the output, or None for the one that is looked up
    if lost := [axis for axis in a.varying if axis not in axes]:
        raise Blocked(f"the map varies along axis {lost[0]}, the axis of the indices")
    rows = a.map(lambda c: c.reshape([1 if axis is None else c.shape[axis] for axis in axes]))
    return [Step([identity(v) for v in node.inputs], {"table": rows})]


def constant_up(node: Node, a: Affine) -> list[Step]:
    """A constant operand simply becomes a(c)."""
    shape = node.params["value"].shape
    try:
        np.broadcast_shapes(a.shape, shape)
    except ValueError:  # as in a graph that no runtime takes
        raise Blocked(f"the map varies as {a.shape}, which doesn't fit a constant of shape {shape}") from None
    return [Step([], {"value": a})]


def recurrent_down(node: Node, maps: list[Affine]) -> list[Step]:
    """W*(s*x + t) + b = (W*s)*x + (b + W*t), for every gate and direction.

    W is [directions, gates, features] in one parameter, "weight" (ONNX), or in one for each direction, "weight0" and "weight1" (PyTorch),
    and so is the bias, in which those of the recurrence may follow those of the input.
    """
    if not all(a.is_identity for a in maps[1:]):
        raise Blocked("the map would reach its state, not its input")
    updates: dict[str, Affine] = {}
    for role in [name for name in node.params if name.startswith("weight")]:
        weight, bias = node.params[role], role.replace("weight", "bias")
        s, t = maps[0].along(-1, weight.shape[-1])
        updates[role] = Affine.scaling(s.reshape(1, 1, -1))
        if t.any() and bias not in node.params:
            raise Blocked("it has no bias and the map's shift is not zero")
        if t.any():
            product = weight.read() @ t  # [directions, gates]
            rest = np.zeros((len(product), node.params[bias].shape[1] - product.shape[1]))
            updates[bias] = Affine.shifting(np.concatenate([product, rest], axis=1))
    return [Step([identity(node.output)], updates)]


def normalised_up(node: Node, a: Affine) -> list[Step]:
    """s*(g*n(x) + b) + t = (s*g)*n(x) + (s*b + t), for a normalisation with an affine part of its own."""
    gamma = node.params["gamma"]
    if outside := [axis for axis in a.varying if gamma.shape[axis] != a.shape[axis]]:
        raise Blocked(f"the map varies along axis {outside[0]}, along which its own scale doesn't")
    if "beta" not in node.params and a.shift.any():
        raise NoBias("it has no bias")
    updates = {"gamma": a.linear, "beta": a}
    return [Step([identity(v) for v in node.inputs], {role: updates[role] for role in node.params})]


# --- affine operators themselves: BatchNorm, and Mul, Add, Sub, Div by constants ---------------------------------------------


def coefficients(node: Node) -> Affine:
    """The map of an affine node: gain * gamma * (x - mean) + beta + shift, each of gamma and beta a parameter where it has that slot.

    For a BatchNorm gain is 1/sqrt(var + eps) (Ioffe & Szegedy 2015, Algorithm 2, line 11).
    """
    gamma = node.params["gamma"].read() if "gamma" in node.params else np.ones(())
    beta = node.params["beta"].read() if "beta" in node.params else np.zeros(())
    scale = node.attrs.get("gain", 1.0) * gamma
    rank = node.output.rank or 0
    a = Affine(scale, beta + node.attrs.get("shift", 0.0) - node.attrs.get("mean", 0.0) * scale)
    return a.map(lambda c: c.reshape((1,) * (rank - c.ndim) + c.shape)).settled()


def affine_up(node: Node, a: Affine) -> list[Step]:
    """s*(S*x + T) + t: one with both slots takes it all; an Add takes the shift, and the scale goes on; a Mul the reverse, where the whole
    of it can't go on."""
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
    passes = Step([Affine(a.scale, (a.scale * own.shift + a.shift - own.shift) / own.scale)])
    if slots != {"gamma"} or not a.scale.all():
        return [passes]
    absorbs = Step([Affine.shifting(a.shift / (a.scale * own.scale))], {"gamma": a.linear})
    return [absorbs, passes] if node.attrs.get("scales_integers") else [passes, absorbs]


def affine_down(node: Node, maps: list[Affine]) -> list[Step]:
    """S*(s*x + t) + T, the same in the other direction; what finds no slot passes on as (s, S*t + T - s*T)."""
    a, own, slots = maps[0], coefficients(node), node.params.keys() & {"gamma", "beta"}
    passes = Step([Affine(a.scale, own.scale * a.shift + own.shift - a.scale * own.shift)])
    try:
        _grows(node, a)
    except Blocked:
        return [passes]
    if slots == {"gamma", "beta"}:
        moved = own.scale * (a.shift + node.attrs.get("mean", 0.0) * (a.scale - 1))
        return [Step([Affine.identity(a.rank)], {"gamma": a.linear, "beta": Affine.shifting(moved)})]
    if slots == {"beta"} and (a.scale == 1).all():
        return [Step([Affine.identity(a.rank)], {"beta": Affine.shifting(own.scale * a.shift)})]
    if slots == {"gamma"}:
        return [Step([Affine.shifting(own.scale * a.shift)], {"gamma": a.linear}), passes]
    return [passes]


def _grows(node: Node, a: Affine) -> None:
    """A BatchNorm's vectors keep their shape; a constant operand of Mul or Add may grow to the map's."""
    for role in node.params.keys() & {"gamma", "beta"}:
        if not node.attrs.get("grows"):
            for axis in a.varying:
                if node.params[role].shape[axis] != a.shape[axis]:
                    raise Blocked(f"the map varies along axis {axis}, along which its own coefficients don't")
