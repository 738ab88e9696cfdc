"""Arithmetic with constants: what an operator multiplies by and adds, and what several do, one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.fx import Node as Op

from bnfold.algebra import weights
from bnfold.algebra.affine import Affine, Array

from ..export.walk import arguments, is_float, multiple, operator_name
from .lowering import TorchLowering

Const = Callable[[Any], Array | None]


def step(ctx: TorchLowering, op: Op, const: Const | None = None) -> tuple[Array, Array] | None:
    """Scale and shift of an operator that is arithmetic with a constant; None of another. const: what gives a constant's array."""
    name = operator_name(op)
    if name not in ("add", "sub", "mul", "div", "neg") or not is_float(op) or len(op.all_input_nodes) == 0:
        return None
    given = arguments(op)
    one, other = given["self"], given.get("other", -1.0)
    if name == "neg":
        return np.asarray(-1.0), np.zeros(())
    if given.get("rounding_mode") is not None or ctx.is_activation(one) == ctx.is_activation(other):
        return None
    first, alpha = ctx.is_activation(one), multiple(given)
    if alpha is None:
        return None
    c = number(const or ctx.const, other if first else one)
    if c is None or ctx.rank(one if first else other) != ctx.rank(op):
        return None
    return weights.step(name, c, first=first, alpha=alpha)


def number(const: Const, argument: Any) -> Array | None:
    """A constant tensor or a number."""
    if isinstance(argument, Op):
        return const(argument)
    return np.asarray(float(argument)) if isinstance(argument, (int, float)) else None


def composed(ctx: TorchLowering, ops: list[Op], const: Const | None = None) -> Affine | None:
    """The map of operators one behind the other."""
    rank = ctx.rank(ops[-1])
    whole = Affine.identity(rank)
    for op in ops:
        if (found := step(ctx, op, const)) is None:
            return None
        whole = Affine(*(c.reshape((1,) * (rank - c.ndim) + c.shape) for c in found)).after(whole)
    return whole


def mapped(ctx: TorchLowering, ops: list[Op], numbers: Mapping[Op, torch.Tensor]) -> tuple[Array, Array] | None:
    """Scale and shift of operators along their channels, with other numbers in some of the stored tensors."""
    whole = composed(ctx, ops, ctx.constants.with_numbers(numbers).get)
    return None if whole is None else (whole.scale.ravel(), whole.shift.ravel())


def close(one: Array, other: Array) -> bool:
    return (one.size == other.size or 1 in (one.size, other.size)) and np.allclose(one, other, rtol=1e-9, atol=1e-9)
