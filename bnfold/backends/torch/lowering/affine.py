"""ATen operators that are affine maps: batch_norm, and add, sub, mul, div by a constant. These are the sites."""

from __future__ import annotations

from typing import Any

from torch.fx import Node as Op

from bnfold.algebra import weights
from bnfold.algebra.affine import Blocked
from bnfold.algebra.geometry import pointwise

from ..export.walk import (
    arguments,
    dtype_of,
    epsilon,
    frame,
    in_training,
    is_float,
    operator_name,
)
from .chains import StoredNorm, multiple, number
from .lowering import TorchLowering


def batchnorm(ctx: TorchLowering, op: Op) -> None:
    """The native forms give a tuple, of which the first item counts."""
    given = arguments(op)
    stats = [given.get("running_mean"), given.get("running_var")]
    ctx.output(op)  # Blocked where it isn't used
    constants = [ctx.const(each) for each in (given["weight"], given["bias"], *stats)]
    refusal = None
    if in_training(op) and stats[0] is None:
        refusal = "it has no running statistics (track_running_stats=False): it normalises each batch by itself"
    elif in_training(op):
        how = "export the model in evaluation mode, or recalibrate it with --freeze" if ctx.copies_weights else "call eval() on the model"
        refusal = f"it is in training mode: it normalises each batch by itself; {how}"
    elif any(given[name] is not None and c is None for name, c in zip(("weight", "bias"), constants[:2], strict=True)):
        refusal = "its gamma or beta is computed from the data"
    elif constants[2] is None or constants[3] is None:
        refusal = "its running statistics are not constants"
    layer, name = _identity(ctx, op, stats)
    channels = int(given["input"].meta["val"].shape[1])
    keys = ("weight", "bias")
    weights.batchnorm(ctx, op, given["input"], keys, constants, epsilon(given), layer=layer, channels=channels, name=name, refusal=refusal)
    if ctx.nodes[-1].op == "Affine":
        wide = dtype_of(given["running_var"])
        mixed = None if wide == dtype_of(given["input"]) else wide
        ctx.nodes[-1].attrs |= {"stored": _stored(ctx, given), "mixed": mixed}


def _stored(ctx: TorchLowering, given: dict[str, Any]) -> StoredNorm | None:
    """Its tensors, where the model holds all of them as they are."""
    names = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var"}
    tensors = {role: given[name] for role, name in names.items() if given[name] is not None}
    return StoredNorm(tensors, epsilon(given)) if all(ctx.constants.stored(each) is not None for each in tensors.values()) else None


def _identity(ctx: TorchLowering, op: Op, stats: list[Any]) -> tuple[Any, str]:
    """What makes two calls one layer, and its name: the qualified name of its statistics, or its own module's."""
    stored = [ctx.constants.stored(s) for s in stats]
    owner = stored[0].target.rpartition(".")[0] if stored[0] is not None and stored[0].target.endswith("running_mean") else frame(op)
    key: Any = op if stored[0] is None or stored[1] is None else (stored[0].target, stored[1].target)
    return key, owner


# --- arithmetic ----------------------------------------------------------------------------------------------------------------


def reversed_sub(ctx: TorchLowering, op: Op) -> None:
    """rsub(self, other, alpha) is other - alpha*self."""
    given = arguments(op)
    _combined(ctx, op, "sub", ("other", "self"), multiple(given))


def arithmetic(ctx: TorchLowering, op: Op) -> None:
    """add, sub, mul, div: of two activations, or by a constant, which makes an affine operator."""
    name, given = operator_name(op), arguments(op)
    if given.get("rounding_mode") is not None:
        raise Blocked("it rounds")
    if not all(is_float(each) for each in (given["self"], given["other"]) if isinstance(each, Op)):
        raise Blocked("it isn't floating point")
    _combined(ctx, op, name, ("self", "other"), multiple(given))


def _combined(ctx: TorchLowering, op: Op, kind: str, keys: tuple[str, str], alpha: float | None) -> None:
    one, other = (arguments(op)[key] for key in keys)
    flows = [ctx.is_activation(each) for each in (one, other)]
    if alpha is None:
        raise Blocked("it adds a computed multiple")
    if all(flows):
        if kind == "add" and (kept := _beside_zeros(ctx, op, one, other) or _beside_zeros(ctx, op, other, one)) is not None:
            pointwise(ctx, op, "Identity", kept)
        elif kind in ("add", "sub"):
            if alpha != 1:
                raise Blocked("it adds a multiple")
            pointwise(ctx, op, "Add", one, other, signs=(1, 1 if kind == "add" else -1))
        else:
            pointwise(ctx, op, "Mul", one, other, factors=2 if kind == "mul" else 1)
        return
    if not any(flows):
        raise Blocked("it writes into a constant, or what it makes of constants is written into")
    x, key = (one, keys[1]) if flows[0] else (other, keys[0])
    argument = arguments(op)[key]
    c = number(ctx.const, argument)
    if c is None:
        raise Blocked("its constant can't be evaluated")
    if ctx.rank(x) != ctx.rank(op):
        raise Blocked(weights.LARGER)
    if not isinstance(argument, Op) and ctx.value(x).sizes == ctx.value(op).sizes:
        found = weights.step(kind, c, first=flows[0], alpha=alpha)
        if found is not None and (found[0] == 1).all() and not found[1].any():
            ctx.same(op, x)  # sum() begins with a 0
            return
    weights.by_constant(ctx, op, kind, x, key if isinstance(argument, Op) else None, c, first=flows[0], alpha=alpha)


def _beside_zeros(ctx: TorchLowering, op: Op, x: Op, zeros: Op) -> Op | None:
    """x, where all that is added to it are zeros: what a branch still gives that was merged into another."""
    same = ctx.value(x).probes == ctx.value(op).probes and dtype_of(x) == dtype_of(op)
    return x if same and operator_name(zeros) in ("new_zeros", "zeros_like") else None
