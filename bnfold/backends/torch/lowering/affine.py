"""ATen operators that are affine maps: batch_norm, and add, sub, mul, div by a constant. These are the sites."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node as Op

from bnfold.algebra import weights
from bnfold.algebra.affine import Affine, Array, Blocked
from bnfold.algebra.geometry import pointwise

from ..export.walk import (
    arguments,
    dtype_of,
    elements,
    epsilon,
    frame,
    in_training,
    is_float,
    is_tensor,
    mutates,
    operator_name,
    written,
)
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


def _identity(ctx: TorchLowering, op: Op, stats: list[Any]) -> tuple[Any, str]:
    """What makes two calls one layer, and its name: the qualified name of its statistics, or its own module's."""
    stored = [ctx.constants.stored(s) for s in stats]
    owner = stored[0].target.rpartition(".")[0] if stored[0] is not None and stored[0].target.endswith("running_mean") else frame(op)
    key: Any = op if stored[0] is None or stored[1] is None else (stored[0].target, stored[1].target)
    return key, owner


# --- a BatchNorm written out: frozen statistics, a scale and a shift ------------------------------------------------------------


def frozen(ctx: TorchLowering) -> None:
    """Lower each BatchNorm whose forward is plain arithmetic (FrozenBatchNorm2d) as one map."""
    for chain in frozen_chains(ctx):
        _lower_chain(ctx, chain)


def frozen_chains(ctx: TorchLowering) -> list[list[Op]]:
    """The operators of each such call, in order: of a module with running statistics, or with a scale made of the root of a variance."""
    named = {s.target for s in map(ctx.constants.stored, ctx.program.graph.nodes) if s is not None}
    owners = {name.rpartition(".")[0] for name in named if name.rpartition(".")[2] == "running_mean"}
    owners = {owner for owner in owners if f"{owner}.running_var".lstrip(".") in named}
    chains: list[list[Op]] = []
    for op in ctx.program.graph.nodes:
        if op.op != "call_function" or ctx.constants.is_constant(op) or _step(ctx, op) is None:
            continue
        if mutates(op) and any(len(target.users) > 1 for target in written(op)):
            continue
        last = chains[-1] if chains else None
        if last and last[-1] is _source(ctx, op) and frame(last[-1]) == frame(op) and len(last[-1].users) == 1:
            last.append(op)
        else:
            chains.append([op])
    return [chain for chain in chains if frame(chain[0]) in owners or (any(_has_root(ctx, op) for op in chain) and _is_all(ctx, chain))]


def _is_all(ctx: TorchLowering, chain: list[Op]) -> bool:
    """Whether a module's forward holds nothing else, so that the module is a BatchNorm; in a program there are no modules."""
    others = set(ctx.host.inside(frame(chain[0]))) - set(chain)
    return all(ctx.constants.is_constant(op) or not is_tensor(op) for op in others)


def _has_root(ctx: TorchLowering, op: Op) -> bool:
    """Whether the constant of an operator is made of the root of a vector to which a number was added, as a variance and an epsilon."""
    stack = [source for source in op.all_input_nodes if ctx.constants.is_constant(source)]
    while stack:
        maker = stack.pop()
        if operator_name(maker) in ("rsqrt", "sqrt", "pow"):
            under = maker.all_input_nodes[0] if maker.all_input_nodes else maker
            if operator_name(under) == "add" and len(under.all_input_nodes) == 1 and elements(under) != 1:
                return True
        stack += [source for source in maker.all_input_nodes if source.op == "call_function"]
    return False


def _source(ctx: TorchLowering, op: Op) -> Op:
    return next(source for source in op.all_input_nodes if not ctx.constants.is_constant(source))


def _step(ctx: TorchLowering, op: Op) -> tuple[Array, Array] | None:
    """Scale and shift of an operator that is arithmetic with a constant; None of another."""
    name = operator_name(op)
    if name not in ("add", "sub", "mul", "div", "neg") or not is_float(op) or len(op.all_input_nodes) == 0:
        return None
    given = arguments(op)
    one, other = given["self"], given.get("other", -1.0)
    if name == "neg":
        return np.asarray(-1.0), np.zeros(())
    first, alpha = ctx.is_activation(one), _multiple(given)
    if given.get("rounding_mode") is not None or first == ctx.is_activation(other) or alpha is None:
        return None
    c = _number(ctx, other if first else one)
    if c is None or ctx.rank(one if first else other) != ctx.rank(op):
        return None
    return weights.step(name, c, first=first, alpha=alpha)


def _multiple(given: dict[str, Any]) -> float | None:
    """The number by which an operator multiplies before it adds (0 is one too); None where it is complex, or computed."""
    alpha = given.get("alpha", 1)
    return float(alpha) if isinstance(alpha, (int, float)) else None


def _number(ctx: TorchLowering, argument: Any) -> Array | None:
    """A constant tensor or a number."""
    if isinstance(argument, Op):
        return ctx.const(argument)
    return np.asarray(float(argument)) if isinstance(argument, (int, float)) else None


def _lower_chain(ctx: TorchLowering, chain: list[Op]) -> None:
    x, rank = _source(ctx, chain[0]), ctx.rank(chain[-1])
    whole = Affine.identity(rank)
    for op in chain:
        found = _step(ctx, op)
        assert found is not None
        scale, shift = (c.reshape((1,) * (rank - c.ndim) + c.shape) for c in found)
        whole = Affine(scale, shift).after(whole)
    whole = whole.settled()
    if len(whole.varying) > 1 or ctx.value(x).sizes != ctx.value(chain[-1]).sizes:
        return
    ctx.done.update(chain)
    owner = frame(chain[0])
    channels = max(whole.shape) if whole.varying else 1
    made = ctx.emit("Affine", chain[-1], [x], {"gain": whole.scale, "shift": whole.shift})
    made.native.group = chain
    refusal = None
    if not (np.isfinite(whole.scale).all() and np.isfinite(whole.shift).all()):
        refusal = "its scale or its shift is not finite"
    # A module's calls are one layer; in a program, so are those that read the same statistics.
    key: Any = (f"{owner}.running_mean", f"{owner}.running_var")
    if ctx.copies_weights and not any(s.target in key for s in map(ctx.constants.stored, ctx.program.graph.nodes) if s is not None):
        key = chain[-1]
    ctx.site(key, made, channels, is_batchnorm=True, name=owner, refusal=refusal)


# --- arithmetic ----------------------------------------------------------------------------------------------------------------


def negation(ctx: TorchLowering, op: Op) -> None:
    weights.negation(ctx, op, arguments(op)["self"])


def reversed_sub(ctx: TorchLowering, op: Op) -> None:
    """rsub(self, other, alpha) is other - alpha*self."""
    given = arguments(op)
    _combined(ctx, op, "sub", ("other", "self"), _multiple(given))


def arithmetic(ctx: TorchLowering, op: Op) -> None:
    """add, sub, mul, div: of two activations, or by a constant, which makes an affine operator."""
    name, given = operator_name(op), arguments(op)
    if given.get("rounding_mode") is not None:
        raise Blocked("it rounds")
    if not all(is_float(each) for each in (given["self"], given["other"]) if isinstance(each, Op)):
        raise Blocked("it isn't floating point")
    _combined(ctx, op, name, ("self", "other"), _multiple(given))


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
    c = _number(ctx, argument)
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
