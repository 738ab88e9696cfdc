"""ATen operators that are affine maps, the sites, and those in which maps end, in the terms of the rules."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node as Op
from torch.utils import _pytree as pytree

from bnfold.algebra import weights
from bnfold.algebra.affine import Blocked
from bnfold.algebra.geometry import pointwise
from bnfold.algebra.graph import Param
from bnfold.algebra.layouts import scaled

from ..export.walk import (
    arguments,
    dtype_of,
    epsilon,
    frame,
    in_training,
    is_float,
    multiple,
    operator_name,
)
from .arithmetic import number
from .chains import StoredNorm
from .lowering import TorchLowering, each

SETTINGS = ("groups", "stride", "padding", "dilation", "output_padding")


def conv(ctx: TorchLowering, op: Op) -> None:
    """conv1d to conv3d, conv_transpose1d to 3d, and convolution, which is all of them."""
    given, weight = arguments(op), ctx.param(op, "weight")
    kernel = weight.shape[2:]
    if ctx.rank(given["input"]) != len(weight.shape):
        raise Blocked("its input has no batch axis")
    if any(isinstance(leaf, Op) for leaf in pytree.tree_leaves([given.get(name) for name in SETTINGS])):
        raise Blocked("its settings are computed from the sizes of the input")
    stride, dilation = (each(given[key], len(kernel)) for key in ("stride", "dilation"))
    transposed = bool(given.get("transposed", "transpose" in operator_name(op)))
    padding = given["padding"]
    if padding == "same":
        widths = weights.same_padding(kernel, dilation)
    else:
        widths = [(n, n) for n in each(0 if padding == "valid" else padding, len(kernel))]
    extended = transposed and any(each(given["output_padding"], len(kernel)))
    weights.convolution(
        ctx, op, given["input"], weight, "bias", int(given["groups"]), stride, dilation, widths, transposed=transposed, extended=extended
    )
    ctx.nodes[-1].attrs["even"] = True  # it has one number for both sides


def deform_conv(ctx: TorchLowering, op: Op) -> None:
    """torchvision's, whose schema states each setting twice, and a mask that it may not use."""
    given = arguments(op)
    stride, pad, dilation = ((int(given[f"{name}_h"]), int(given[f"{name}_w"])) for name in ("stride", "pad", "dilation"))
    steers = [given["offset"], given["mask"]][: 1 + given["use_mask"]]
    padding = [(n, n) for n in pad]
    weight = ctx.param(op, "weight")
    weights.convolution(ctx, op, given["input"], weight, "bias", int(given["groups"]), stride, dilation, padding, steers=steers)


def linear(ctx: TorchLowering, op: Op) -> None:
    """x @ W.T + b over the last axis; a vector of features is a barrier's affair."""
    weight, rank = ctx.param(op, "weight"), ctx.rank(arguments(op)["input"])
    if len(weight.shape) != 2 or rank < 2:
        raise Blocked(weights.VECTOR)
    bias = ctx.bias(op, "bias", weight, (1,) * (rank - 1) + weight.shape[:1])
    weights.matrix_product(ctx, op, ("input", "weight"), swaps=(False, True), bias=None if bias.refusal else bias)


def addmm(ctx: TorchLowering, op: Op) -> None:
    """beta*self + alpha*(mat1 @ mat2), with one of the matrices constant."""
    given = arguments(op)
    if not any(ctx.is_constant(given[name]) for name in ("mat2", "mat1")):
        ctx.param(op, "mat2")  # which says why it isn't
    alpha, beta = (given[name] if isinstance(given[name], (int, float)) else None for name in ("alpha", "beta"))
    if alpha is None or beta is None:
        raise Blocked("its alpha or beta is computed")
    if alpha == 0:
        raise Blocked("its alpha is zero")
    bias = None if beta == 0 else _times_beta(ctx, op, float(beta))  # times 0 it isn't read at all
    weights.matrix_product(ctx, op, ("mat1", "mat2"), alpha=float(alpha), bias=bias)


def _times_beta(ctx: TorchLowering, op: Op, beta: float) -> Param:
    added = arguments(op)["self"]
    if not ctx.is_constant(added):
        raise Blocked("what it adds is computed from the data")
    stored = ctx.shape(added)
    shape = (1,) * (2 - len(stored)) + stored
    return ctx.param(op, "self", shape, scaled(shape, stored, beta), role="bias")


def matmul(ctx: TorchLowering, op: Op) -> None:
    """matmul, mm, bmm."""
    one, other = (name for name in arguments(op) if name in ("self", "other", "mat2"))
    weights.matrix_product(ctx, op, (one, other))


def einsum(ctx: TorchLowering, op: Op) -> None:
    given = arguments(op)
    weights.einsum(ctx, op, str(given["equation"]), [f"tensors.{i}" for i in range(len(given["tensors"]))])


def embedding(ctx: TorchLowering, op: Op) -> None:
    """Rows of a table; padding_idx and the like matter in training alone."""
    weights.table(ctx, op, "weight", arguments(op)["indices"], 0)


def normalisation(ctx: TorchLowering, op: Op) -> None:
    """layer_norm, group_norm and instance_norm by the data's own statistics: their own scale and bias."""
    given, name = arguments(op), operator_name(op).removeprefix("native_")
    if name == "instance_norm" and not given["use_input_stats"]:
        raise Blocked("it normalises by running statistics, which no BatchNorm does in this form")
    weights.normalisation(ctx, op, given["input"], "weight", "bias", trailing=name == "layer_norm")


def rms_norm(ctx: TorchLowering, op: Op) -> None:
    weights.normalisation(ctx, op, arguments(op)["input"], "weight", None, trailing=True)


def recurrent(ctx: TorchLowering, op: Op) -> None:
    """lstm, gru and rnn: the input weights of the first layer, one set for each direction (LSTM's order of gates doesn't matter here)."""
    given = arguments(op)
    if "params" not in given:
        raise Blocked("its sequences are packed")
    per, directions = 4 if given["has_biases"] else 2, 2 if given["bidirectional"] else 1
    if len(given["params"]) != per * directions * int(given["num_layers"]):
        raise Blocked("it projects its state")
    params: dict[str, Param] = {}
    for d in range(directions):
        for role, place in (("weight", per * d), ("bias", per * d + 2))[: per // 2]:
            stored = ctx.shape(given["params"][place])
            params[f"{role}{d}"] = ctx.param(op, f"params.{place}", (1, *stored), role=role, computed=False)
    states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
    flowing = [given["input"], *filter(ctx.is_activation, states)]
    more: list[Any] = [item for i, item in sorted(ctx.items(op).items()) if i]
    ctx.emit("Recurrent", op, flowing, {}, params, more=more)


# --- affine maps ----------------------------------------------------------------------------------------------------------------------


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
    layer, name = _identity(ctx, op, given)
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


def _identity(ctx: TorchLowering, op: Op, given: dict[str, Any]) -> tuple[Any, str]:
    """What makes two calls one layer, and its name: that of whom its statistics belong to, or else its own module's."""
    held = [given.get(role) for role in ("running_mean", "running_var", "weight", "bias")]
    mean, var, *_ = stored = [None if each is None else ctx.constants.stored(each) for each in held]
    owner = ctx.constants.owner(op, mean) if mean is not None and mean.target.endswith("running_mean") else frame(op)
    if mean is None or var is None:
        return op, owner
    affine = (each if found is None else found.target for each, found in zip(held[2:], stored[2:], strict=True))
    return (mean.target, var.target, *affine, epsilon(given)), owner


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
    if alpha is None or not math.isfinite(alpha):
        raise Blocked("it adds a computed multiple" if alpha is None else "the multiple that it adds isn't finite")
    if all(flows):
        beside = [_beside_zeros(ctx, op, one, other), _beside_zeros(ctx, op, other, one) if alpha == 1 else None]
        if kind == "add" and (kept := beside[0] or beside[1]) is not None:
            pointwise(ctx, op, "Identity", kept)
        elif kind in ("add", "sub"):
            pointwise(ctx, op, "Add", one, other, multiples=(1, alpha if kind == "add" else -alpha))
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
