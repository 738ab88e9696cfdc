"""A BatchNorm written out as arithmetic with constants: frozen statistics, a scale and a shift."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node as Op

from bnfold.algebra import weights
from bnfold.algebra.affine import Affine, Array

from ..export.walk import arguments, elements, frame, is_float, is_tensor, mutates, operator_name, written
from .lowering import TorchLowering


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
        if op.op != "call_function" or ctx.constants.is_constant(op) or step(ctx, op) is None:
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


def step(ctx: TorchLowering, op: Op) -> tuple[Array, Array] | None:
    """Scale and shift of an operator that is arithmetic with a constant; None of another."""
    name = operator_name(op)
    if name not in ("add", "sub", "mul", "div", "neg") or not is_float(op) or len(op.all_input_nodes) == 0:
        return None
    given = arguments(op)
    one, other = given["self"], given.get("other", -1.0)
    if name == "neg":
        return np.asarray(-1.0), np.zeros(())
    first, alpha = ctx.is_activation(one), multiple(given)
    if given.get("rounding_mode") is not None or first == ctx.is_activation(other) or alpha is None:
        return None
    c = number(ctx, other if first else one)
    if c is None or ctx.rank(one if first else other) != ctx.rank(op):
        return None
    return weights.step(name, c, first=first, alpha=alpha)


def multiple(given: dict[str, Any]) -> float | None:
    """The number by which an operator multiplies before it adds (0 is one too); None where it is complex, or computed."""
    alpha = given.get("alpha", 1)
    return float(alpha) if isinstance(alpha, (int, float)) else None


def number(ctx: TorchLowering, argument: Any) -> Array | None:
    """A constant tensor or a number."""
    if isinstance(argument, Op):
        return ctx.const(argument)
    return np.asarray(float(argument)) if isinstance(argument, (int, float)) else None


def _lower_chain(ctx: TorchLowering, chain: list[Op]) -> None:
    x, rank = _source(ctx, chain[0]), ctx.rank(chain[-1])
    whole = Affine.identity(rank)
    for op in chain:
        found = step(ctx, op)
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
