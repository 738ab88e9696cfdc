"""Operators with weights in the terms of the rules: what both front-ends make of the arguments that they read.

Each function emits the neutral node of one operator, or raises `Blocked`.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import numpy as np

from .affine import Array, Blocked
from .geometry import move, pointwise, reduction
from .graph import Node, Norm, Param, Window
from .layouts import Shape, reciprocal, scaled, swapped
from .lowering import Key, Lowering, Op, Ref

BN_ROLES = ("gamma", "beta", "running mean", "running variance")
LETTERS = "abcdefgh"
VECTOR = "an operand is a vector, or of unknown rank"
LARGER = "its constant makes the tensor larger, or may"


# --- linear operators ------------------------------------------------------------------------------------------------------------------


def same_padding(kernel: Shape, dilation: Shape) -> list[tuple[int, int]]:
    """What keeps the size at a stride of 1; the odd one goes behind."""
    return [(n // 2, n - n // 2) for n in (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))]


def convolution(
    ctx: Lowering,
    op: Op,
    x: Ref,
    weight: Param,
    bias: Key,
    groups: int,
    stride: Shape,
    dilation: Shape,
    padding: Sequence[tuple[int, int]] | None,
    *,
    transposed: bool = False,
    extended: bool = False,
    steers: Sequence[Ref] | None = None,
) -> None:
    """Any convolution. weight: as it is stored. padding: zeros on both sides of each spatial axis; None where the input's size decides.

    extended: whether a transposed one has outputs beyond the last tap. steers: what says where each tap of a deformable one reads, and
    how much of it counts.
    """
    shape, kernel = weight.shape, weight.shape[2:]
    if not kernel:
        raise Blocked(f"its weight has the shape {shape}, which has no kernel")
    padded = padding is None or any(map(any, padding))
    attrs: dict[str, Any] = {"groups": groups, "uniform": not padded, "uneven": "it pads with zeros", "transposed": transposed}
    if transposed:
        weight = weight.seen_as(*swapped(shape, groups))
        plain = not padded and not extended and {*kernel, *stride} <= {1}
        attrs |= {"uniform": plain, "uneven": "its outputs see different taps"}
    elif steers is not None:
        attrs |= {"uniform": False, "uneven": "it reads zeros beyond the border"}
    elif padding is not None:
        attrs["window"] = Window(stride, dilation, *(tuple(side) for side in zip(*padding, strict=True)))
    params = {"weight": weight, "bias": ctx.bias(op, bias, weight, weight.shape[:1])}
    ctx.emit("Conv", op, [x, *(steers or ())], attrs, params)


def contraction(ctx: Lowering, op: Op, x: Ref, weight: Param, xs: str, ws: str, ys: str, bias: Param | None = None) -> Node:
    """A product by letters. Where it has no bias of its own, and the front-end lets it, an Add grows behind it."""
    y = ctx.output(op)
    ctx.set_rank(y, len(ys))
    if ctx.value(y).rank != len(ys) or ctx.rank(x) != len(xs):
        raise Blocked("its rank isn't certain")
    attrs: dict[str, Any] = {"x": xs, "w": ws, "y": ys}
    if bias is None and (slot := ctx.slot_behind(op)) is not None:
        bias, attrs["grows_add"] = Param(None, (1,) * len(ys), slot=slot), True
    return ctx.emit("Contraction", op, [x], attrs, {"weight": weight} | ({} if bias is None else {"bias": bias}))


def matrix_product(
    ctx: Lowering,
    op: Op,
    keys: tuple[Key, Key],
    *,
    swaps: tuple[bool, bool] = (False, False),
    alpha: float = 1.0,
    bias: Param | None = None,
) -> Node:
    """alpha * A @ B (+ bias) by a constant on either side, batched or not; of two activations otherwise. swaps: transposed operands."""
    given = [ctx.arg(op, key) for key in keys]
    which = next((i for i in (1, 0) if ctx.is_constant(given[i])), None)
    if which is None:
        if min(ctx.value(ref).rank or 0 for ref in given) < 2:
            raise Blocked(VECTOR)
        if any(swaps):
            raise Blocked("it transposes a computed operand")
        return ctx.emit("MatMul", op, given)
    x, weight = given[1 - which], ctx.param(op, keys[which])
    rank, shape = ctx.value(x).rank or 0, weight.shape
    if rank < 2 or len(shape) < 2:
        raise Blocked(VECTOR)
    letters = LETTERS[: max(rank, len(shape)) - 2]
    lead = [(name, n) for name, n in zip(letters[len(letters) - len(shape) + 2 :], shape[:-2], strict=True) if n != 1]
    terms = ["km" if swaps[0] else "mk", "ok" if swaps[1] else "ko"]
    canonical = tuple(n for _, n in lead) + shape[-2:]
    weight = weight.seen_as(canonical, scaled(canonical, shape, alpha))
    xs, ws = letters[len(letters) - rank + 2 :] + terms[1 - which], "".join(name for name, _ in lead) + terms[which]
    return contraction(ctx, op, x, weight, xs, ws, f"{letters}mo", bias)


def einsum(ctx: Lowering, op: Op, equation: str, keys: Sequence[Key]) -> None:
    """A product of one activation and one constant; of one activation alone it moves data, or sums them."""
    given = [ctx.arg(op, key) for key in keys]
    *terms, y = _spelled(equation.replace(" ", ""), [ctx.rank(ref) for ref in given])
    flows = [i for i, ref in enumerate(given) if not ctx.is_constant(ref)]
    if len(given) > 2 or len(flows) != 1:
        raise Blocked("it isn't the product of one activation and one constant")
    x = terms[flows[0]]
    if len(given) == 1:
        gone = [i for i, name in enumerate(x) if name not in y]
        if gone and "".join(name for name in x if name in y) != y:
            raise Blocked("it sums and moves")
        if gone:
            reduction(ctx, op, "Sum", given[0], gone, drops=True)
        else:
            kept = {x.index(name): o for o, name in enumerate(y) if x.count(name) == 1}
            move(ctx, op, given, lambda xs, _: np.einsum(f"{x}->{y}", xs[0]), kept)
        return
    which = 1 - flows[0]
    weight, w = ctx.param(op, keys[which], role="constant"), terms[which]
    if any(len(set(term)) != len(term) for term in (x, w, y)):
        raise Blocked("its equation has a diagonal")
    if set(x) - set(w) - set(y) or set(w) - set(x) - set(y) or 1 in weight.shape:
        raise Blocked("its equation sums over one operand alone, or broadcasts")
    contraction(ctx, op, given[flows[0]], weight, x, w, y)


def _spelled(equation: str, ranks: Sequence[int]) -> list[str]:
    """The letters of each operand and of the result, with some for the axes that an ellipsis stands for, which are aligned at the back."""
    left, arrow, y = equation.partition("->")
    single = "".join(sorted(name for name in set(left) - {",", "."} if left.count(name) == 1))
    terms = [*left.split(","), y if arrow else "..." * ("." in left) + single]
    counts = [rank - len(term) + 3 for term, rank in zip(terms, ranks, strict=False) if "." in term]
    free = "".join(name for name in ascii_letters if name not in equation)[: max(counts, default=0)]
    return [term.replace("...", free[len(free) - counts.pop(0) :] if counts else free) if "." in term else term for term in terms]


def table(ctx: Lowering, op: Op, key: Key, indices: Ref, axis: int) -> None:
    """Rows of a constant along an axis, looked up by an activation."""
    rows, rank = ctx.param(op, key, role="table"), ctx.rank(indices, "its indices")
    axis %= len(rows.shape)
    axes = [i if i < axis else None if i == axis else i + rank - 1 for i in range(len(rows.shape))]
    ctx.emit("Table", op, [indices], {"axes": axes}, {"table": rows})


def normalisation(ctx: Lowering, op: Op, x: Ref, gamma: Key, beta: Key | None, *, trailing: bool) -> None:
    """By the data's own statistics, and its own scale and bias: of the last axes (trailing), or of the channels. beta: None for none."""
    own, rank = ctx.param(op, gamma, role="own scale"), ctx.rank(x)
    shape = (1,) * (rank - len(own.shape)) + own.shape if trailing else (1, *own.shape, *(1,) * (rank - 2))
    params = {"gamma": own.seen_as(shape, scaled(shape, own.shape))}
    if beta is not None:
        params["beta"] = ctx.bias(op, beta, own, shape, own.shape)
        if params["beta"].refusal:
            raise Blocked(params["beta"].refusal)
    ctx.emit("Normalisation", op, [x], {}, params)


# --- affine operators: the sites -------------------------------------------------------------------------------------------------------


def batchnorm(
    ctx: Lowering,
    op: Op,
    x: Ref,
    keys: tuple[Key, Key],
    constants: Sequence[Array | None],
    epsilon: float,
    *,
    layer: Any,
    channels: int,
    name: str = "",
    note: str = "",
    refusal: str | None = None,
) -> None:
    """gamma*(x - mean)/sqrt(var + epsilon) + beta along axis 1, or from there on.

    constants: as in BN_ROLES; None for a gamma or beta that it lacks. layer: what makes two calls one. refusal: why it
    may not be tried.
    """
    refusal = refusal or unusable(constants, epsilon)
    if refusal is not None:
        ctx.barrier(op, refusal)
        ctx.site(layer, ctx.nodes[-1], channels, is_batchnorm=True, name=name, refusal=refusal)
        return
    stored = np.asarray(constants[3]).shape or (1,)
    shape = (1, *stored, *(1,) * (ctx.rank(x) - 1 - len(stored)))
    defaults = zip(constants, (1.0, 0.0, 0.0, 1.0), strict=True)
    gamma, beta, mean, var = (np.full(shape, default) if c is None else np.reshape(c, shape) for c, default in defaults)
    found = {role: ctx.coefficient(op, key, shape) for role, key in zip(("gamma", "beta"), keys, strict=True)}
    params = {role: param for role, param in found.items() if param is not None}
    gain, shift = 1 / np.sqrt(var + epsilon), np.zeros(())
    if len(params) < 2:  # the rules move a BatchNorm's coefficients both or not at all
        params, gain, shift = {}, gain * gamma, beta
    norm = Norm(gamma.ravel(), beta.ravel(), mean.ravel(), var.ravel(), epsilon)
    attrs = {"gain": gain, "mean": mean, "shift": shift, "dead": int((gamma == 0).sum()), "norm": norm}
    ctx.site(layer, ctx.emit("Affine", op, [x], attrs, params), channels, is_batchnorm=True, name=name, note=note)


def unusable(constants: Sequence[Array | None], epsilon: float) -> str | None:
    """What makes parameters unusable, with the channel: not finite, or a negative variance; computed ones may differ in shape."""
    stated = [(role, c) for role, c in zip(BN_ROLES, constants, strict=True) if c is not None]
    if len({c.shape for _, c in stated}) > 1:
        return "its parameters differ in shape: " + ", ".join(f"{role} {c.shape}" for role, c in stated)
    for role, c in stated:
        if not np.isfinite(c).all():
            k = int(np.flatnonzero(~np.isfinite(c))[0])
            return f"its {role} is {c.ravel()[k]} in channel {k}"
    var = np.ravel(np.asarray(constants[3]))
    if (var < 0).any():
        k = int(np.argmax(var < 0))
        return f"its running variance is negative ({var[k]:.3g}) in channel {k}"
    if not np.isfinite(epsilon):
        return f"its epsilon is {epsilon}"
    if (var + epsilon <= 0).any():
        return f"its running variance and epsilon are both zero in channel {int(np.argmax(var + epsilon <= 0))}"
    return None


def negation(ctx: Lowering, op: Op, x: Ref) -> None:
    """-x, the affine map that no parameter can change."""
    ctx.rank(x)
    pointwise(ctx, op, "Affine", x, gain=-1.0)


def step(kind: str, c: Array, *, first: bool, alpha: float = 1.0) -> tuple[Array, Array] | None:
    """Scale and shift of x + alpha*c ("add"), x - alpha*c ("sub"), x*c, x/c; where x isn't first, of c + alpha*x and so on. None of c/x."""
    if kind in ("add", "sub"):
        sign = 1.0 if kind == "add" else -1.0
        return (np.ones(()), sign * alpha * c) if first else (np.asarray(sign * alpha), c)
    if kind == "mul":
        return c, np.zeros(())
    return (1 / c, np.zeros(())) if first and (c != 0).all() else None


def by_constant(
    ctx: Lowering,
    op: Op,
    kind: str,
    x: Ref,
    key: Key,
    c: Array,
    *,
    first: bool,
    alpha: float = 1.0,
    shape: Shape | None = None,
    normalises: bool = False,
) -> None:
    """x + alpha*c and so on, as `step` has it. key: of the constant; None for a number. shape: the constant's in the tensor's rank.

    normalises: whether the constant is made of the root of a variance, which makes it the scale of a BatchNorm that is written out.
    """
    rank = ctx.rank(x)
    if kind == "div" and (not first or (c == 0).any()):
        raise Blocked("it divides by zero" if first else "it divides by an activation")
    shape, sizes = (1,) * (rank - c.ndim) + c.shape if shape is None else shape, ctx.value(x).sizes
    if len(shape) != rank or sizes is None or any(n not in (1, own) for n, own in zip(shape, sizes, strict=True)):
        raise Blocked(LARGER)
    found = step(kind, c, first=first, alpha=alpha)
    assert found is not None
    factor = (alpha if first else 1.0) * (-1.0 if kind == "sub" and first else 1.0) if kind in ("add", "sub") else 1.0
    layout = reciprocal(shape, c.shape) if kind == "div" else scaled(shape, c.shape, factor) if factor else None
    param = None if key is None or layout is None else ctx.coefficient(op, key, shape, layout)  # times 0, no constant makes a difference
    if param is None:
        scale, shift = (part.reshape((1,) * (rank - part.ndim) + part.shape) for part in found)
        ctx.emit("Affine", op, [x], {"gain": scale, "shift": shift})
        return
    role, gain = ("gamma", 1.0) if kind in ("mul", "div") else ("beta", float(found[0]))
    made = ctx.emit("Affine", op, [x], {"gain": gain, "grows": True}, {role: param})
    if role == "gamma" and (source := made.inputs[0].producer) is not None and "weight" in source.params:
        tensor = source.params["weight"].tensor
        if tensor is not None and tensor.integers:  # which this is the scale of
            made.attrs["scales_integers"] = True
            return
    vector = [n for n in shape if n != 1]
    behind_affine = made.inputs[0].producer is not None and made.inputs[0].producer.op == "Affine"
    if len(vector) == 1 or (not vector and behind_affine):  # a scalar alone is not worth moving
        layer, name = ctx.layer_of(op, made, param)
        note = "written out as arithmetic" if normalises else ""
        ctx.site(layer, made, vector[0] if vector else 1, is_batchnorm=normalises, name=name, note=note)
