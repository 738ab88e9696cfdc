"""ATen operators that are affine maps: batch_norm, and add, sub, mul, div by a constant. These are the sites."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node as Op

from bnfold.algebra.affine import Affine, Array
from bnfold.algebra.graph import Layout, Norm, Param

from ..export.walk import (
    arguments,
    dtype_of,
    elements,
    epsilon,
    frame,
    frames,
    in_training,
    is_float,
    is_tensor,
    mutates,
    operator_name,
    written,
)
from .lowering import Slot, TorchLowering, vector

BN_ROLES = ("gamma", "beta", "running mean", "running variance")
STATISTICS = ("running_mean", "running_var")


def batchnorm(ctx: TorchLowering, op: Op) -> str | None:
    """gamma*(x - mean)/sqrt(var + eps) + beta along axis 1. The native forms give a tuple, of which the first item counts."""
    given = arguments(op)
    x = given["input"]
    stats = [given.get("running_mean"), given.get("running_var")]
    items = ctx.items(op)
    out = op if is_float(op) else items.get(0)
    if out is None:
        return "its output isn't used"
    training = in_training(op)
    rank, channels = ctx.rank(x), int(x.meta["val"].shape[1])
    constants = [ctx.const(given["weight"]), ctx.const(given["bias"]), *map(ctx.const, stats)]
    refusal = None
    if training and stats[0] is None:
        refusal = "it has no running statistics (track_running_stats=False): it normalises each batch by itself"
    elif training:
        told = (
            "export the model in evaluation mode, or recalibrate it with --freeze"
            if ctx.host.copies_weights
            else "call eval() on the model"
        )
        refusal = f"it is in training mode: it normalises each batch by itself; {told}"
    elif any(given[name] is not None and c is None for name, c in zip(("weight", "bias"), constants[:2], strict=True)):
        refusal = "its gamma or beta is computed from the data"
    elif constants[2] is None or constants[3] is None:
        refusal = "its running statistics are not constants"
    else:
        refusal = _sick(constants, epsilon(given))
    key, name = _identity(ctx, op, stats)
    if refusal is not None:
        ctx.barrier(op, refusal)
        ctx.site(key, ctx.nodes[-1], channels, is_batchnorm=True, name=name, refusal=refusal)
        return None
    mean, var = (vector(np.asarray(c), rank) for c in constants[2:])
    params: dict[str, Param] = {}
    slots: dict[str, Slot | str] = {}
    gain = 1 / np.sqrt(var + epsilon(given))
    shift = np.zeros(())
    for role, argument in (("gamma", "weight"), ("beta", "bias")):
        param = ctx.param(op, given[argument], vector(np.zeros(channels), rank).shape) if isinstance(given[argument], Op) else None
        if param is not None:
            params[role], slots[role] = param, argument
        elif role == "gamma" and constants[0] is not None:
            gain = gain * vector(constants[0], rank)
        elif role == "beta" and constants[1] is not None:
            shift = vector(constants[1], rank)
    if len(params) == 1:  # the rules move a BatchNorm's coefficients both or not at all
        (role,) = params
        if role == "gamma":
            gain = gain * params[role].read()
        else:
            shift = params[role].read()
        params, slots = {}, {}
    dead = 0 if constants[0] is None else int((constants[0] == 0).sum())
    ones, zeros = np.ones(channels), np.zeros(channels)
    vectors = [default if c is None else np.ravel(c) for c, default in zip(constants, (ones, zeros, zeros, ones), strict=True)]
    norm = Norm(vectors[0], vectors[1], vectors[2], vectors[3], epsilon(given))
    attrs = {"gain": gain, "mean": mean, "shift": shift, "dead": dead, "norm": norm}
    made = ctx.emit("Affine", op, [x], attrs, params, slots, output=None if out is op else out)
    ctx.done.update(items.values())
    ctx.site(key, made, channels, is_batchnorm=True, name=name)
    return None


def _identity(ctx: TorchLowering, op: Op, stats: list[Any]) -> tuple[Any, str]:
    """What makes two calls one layer, and its name: the qualified name of its statistics, or its own module's."""
    stored = [ctx.constants.stored(s) for s in stats]
    owner = stored[0].target.rpartition(".")[0] if stored[0] is not None and stored[0].target.endswith("running_mean") else frame(op)
    key: Any = op if stored[0] is None or stored[1] is None else (stored[0].target, stored[1].target)
    return key, owner


def _sick(constants: list[Array | None], epsilon: float) -> str | None:
    """What makes parameters unusable, with the channel: not finite, or a negative variance."""
    for role, c in zip(BN_ROLES, constants, strict=True):
        if c is not None and not np.isfinite(c).all():
            k = int(np.flatnonzero(~np.isfinite(c.ravel()))[0])
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
    if given.get("rounding_mode") is not None or ctx.is_activation(one) == ctx.is_activation(other):
        return None
    first = ctx.is_activation(one)
    c = _number(ctx, other if first else one)
    if c is None or ctx.rank(one if first else other) != ctx.rank(op):
        return None
    alpha = _multiple(given)
    if alpha is None:
        return None
    if name == "add":
        return np.asarray(1.0 if first else alpha), c * alpha if first else c
    if name == "sub":
        return np.asarray(1.0 if first else -alpha), -c * alpha if first else c
    if name == "mul":
        return c, np.zeros(())
    return (1 / c, np.zeros(())) if first and (c != 0).all() else None


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
    if ctx.host.copies_weights and not any(s.target in key for s in map(ctx.constants.stored, ctx.program.graph.nodes) if s is not None):
        key = chain[-1]
    ctx.site(key, made, channels, is_batchnorm=True, name=owner, refusal=refusal)


# --- arithmetic ----------------------------------------------------------------------------------------------------------------


def negation(ctx: TorchLowering, op: Op) -> str | None:
    """-x, the affine map that no parameter can change."""
    ctx.emit("Affine", op, [arguments(op)["self"]], {"gain": -1.0})
    return None


def reversed_sub(ctx: TorchLowering, op: Op) -> str | None:
    """rsub(self, other, alpha) is other - alpha*self."""
    given = arguments(op)
    alpha = _multiple(given)
    if alpha is None:
        return "it subtracts a computed multiple"
    if ctx.is_activation(given["other"]) and alpha != 1:
        return "it subtracts a multiple"
    if ctx.is_activation(given["other"]):
        ctx.emit("Add", op, [given["other"], given["self"]], {"signs": (1, -1)})
        return None
    c = _number(ctx, given["other"])
    if c is None or ctx.value(given["self"]).sizes != ctx.value(op).sizes:
        return "its constant makes the tensor larger, or may"
    ctx.emit("Affine", op, [given["self"]], {"gain": -alpha, "shift": _ranked(c, ctx.rank(op))})
    return None


def _ranked(c: Array, rank: int) -> Array:
    return c.reshape((1,) * (rank - c.ndim) + c.shape)


def _beside_zeros(ctx: TorchLowering, op: Op, x: Op, zeros: Op) -> Op | None:
    """x, where all that is added to it are zeros: what a branch still gives that was merged into another."""
    same = ctx.value(x).probes == ctx.value(op).probes and dtype_of(x) == dtype_of(op)
    return x if same and operator_name(zeros) in ("new_zeros", "zeros_like") else None


def arithmetic(ctx: TorchLowering, op: Op) -> str | None:
    """add, sub, mul, div: of two activations, or by a constant, which makes an affine operator."""
    name, given = operator_name(op), arguments(op)
    one, other = given["self"], given["other"]
    if given.get("rounding_mode") is not None:
        return "it rounds"
    if not all(is_float(each) for each in (one, other) if isinstance(each, Op)):
        return "it isn't floating point"
    alpha = _multiple(given)
    if alpha is None:
        return "it adds a computed multiple"
    if ctx.is_activation(one) and ctx.is_activation(other):
        if name == "add" and (kept := _beside_zeros(ctx, op, one, other) or _beside_zeros(ctx, op, other, one)) is not None:
            ctx.emit("Identity", op, [kept])
            return None
        if name in ("add", "sub"):
            if alpha != 1:
                return "it adds a multiple"
            ctx.emit("Add", op, [one, other], {"signs": (1, 1 if name == "add" else -1)})
        else:
            ctx.emit("Mul", op, [one, other], {"factors": 2 if name == "mul" else 1})
        return None
    if not ctx.is_activation(one) and not ctx.is_activation(other):
        return "it writes into a constant, or what it makes of constants is written into"
    first = ctx.is_activation(one)
    x, argument = (one, "other") if first else (other, "self")
    array, rank = _number(ctx, given[argument]), ctx.rank(op)
    if array is None:
        return "its constant can't be evaluated"
    if name == "div" and not first:
        return "it divides by an activation"
    if name == "div" and (array == 0).any():
        return "it divides by zero"
    shape = (1,) * (rank - array.ndim) + array.shape
    sizes = ctx.value(x).sizes
    if ctx.rank(x) != rank or sizes is None or any(n != 1 and n != own for n, own in zip(shape, sizes, strict=True)):
        return "its constant makes the tensor larger, or may"
    step = _step(ctx, op)
    if step is None:
        return "it isn't affine"
    if not isinstance(given[argument], Op) and (step[0] == 1).all() and not step[1].any() and ctx.value(x).sizes == ctx.value(op).sizes:
        ctx.same(op, x)  # sum() begins with a 0
        return None
    param = None
    if isinstance(given[argument], Op) and not (first and alpha == 0):  # times 0, no constant makes a difference
        param = ctx.param(op, given[argument], shape, _layout(name, first, alpha, shape, array.shape))
    if param is None:
        scale, shift = (_ranked(c, rank) for c in step)
        ctx.emit("Affine", op, [x], {"gain": scale, "shift": shift})
        return None
    role = "gamma" if name in ("mul", "div") else "beta"
    gain = 1.0 if role == "gamma" else float(step[0])
    made = ctx.emit("Affine", op, [x], {"gain": gain, "grows": True}, {role: param}, {role: argument})
    constants = [n for n in shape if n != 1]
    behind_affine = made.inputs[0].producer is not None and made.inputs[0].producer.op == "Affine"
    if len(constants) == 1 or (not constants and behind_affine):  # a scalar alone is not worth moving
        owner = frame(op)
        name = owner if owner and frames(op)[-1] == owner and made.name.startswith(owner) else made.name
        assert param.tensor is not None
        key = made if ctx.host.copies_weights else ("constant", param.tensor.name)
        ctx.site(key, made, constants[0] if constants else 1, is_batchnorm=False, name=name)
    return None


def _layout(name: str, first: bool, alpha: float, canonical: tuple[int, ...], stored: tuple[int, ...]) -> Layout:
    """What a stored constant means: with the sign and the multiple that the operator gives it, or its reciprocal."""

    def back(w: Array) -> Array:
        return w.reshape(stored) if w.shape == canonical else w

    if name == "div":
        return Layout(f"reciprocal {canonical}", lambda w: 1 / w.reshape(canonical), lambda w: back(1 / w), linear=False)
    factor = alpha if first and name != "mul" else 1.0
    factor = -factor if name == "sub" and first else factor
    return Layout(f"{factor} {canonical}", lambda w: factor * w.reshape(canonical), lambda w: back(w / factor), gain=abs(factor))
