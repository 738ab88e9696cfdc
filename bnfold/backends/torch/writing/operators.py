"""Operators with constants, in the place of a module or of an operator of a program (see `folding.lower`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node as Op

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Node, Window

from ..export.walk import arguments, set_argument

KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"Mul": torch.mul, "Add": torch.add, "Max": torch.maximum, "Min": torch.minimum}
ATEN = {
    "Mul": torch.ops.aten.mul.Tensor,
    "Add": torch.ops.aten.add.Tensor,
    "Max": torch.ops.aten.maximum.default,
    "Min": torch.ops.aten.minimum.default,
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONSTANTS = {"Mul": "mul", "Add": "add", "Max": "max", "Min": "min", "weight": "weight", "bias": "bias"}  # and what holds them in a module


class Elementwise(nn.Module):
    """An operator with a constant each, in their order: x * mul, x + add, max(x, max), min(x, min)."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], like: Tensor) -> None:
        """shapes: of the constants, by the operators' names (`KINDS`). like: says on what device they are, and of what type."""
        super().__init__()
        self.kinds = [kind for kind in KINDS if kind in shapes]
        for kind in self.kinds:
            self.register_buffer(CONSTANTS[kind], torch.zeros(*shapes[kind], dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] to [N, C, ...], in the type of x, also where the constants are of a wider one."""
        y = x
        for kind in self.kinds:
            y = KINDS[kind](y, getattr(self, CONSTANTS[kind]))
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def extra_repr(self) -> str:
        return ", ".join(self.kinds)


def calls(arrays: Mapping[str, Array], constants: Mapping[str, Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators of a program, each with what it is given besides the tensor. constants: in the program's terms."""
    if "weight" not in arrays:
        return [(ATEN[kind], (constant,)) for kind, constant in constants.items()]
    channels, _, *kernel = np.shape(arrays["weight"])
    one, zero = [1] * len(kernel), [0] * len(kernel)
    return [(torch.ops.aten.convolution.default, (*constants.values(), one, zero, one, False, zero, channels))]


def multiply(value: Op, factor: Op) -> Op:
    """A constant that an operator of a program makes, times another one."""
    with value.graph.inserting_after(value):
        made: Op = value.graph.call_function(torch.ops.aten.mul.Tensor, (value, factor))
    made.meta = {"val": value.meta["val"] * factor.meta["val"], "tensor_meta": {}}
    return made


def operators(shapes: Mapping[str, Sequence[int]], like: Tensor) -> nn.Module:
    """A module that computes them: of one convolution, torch's own."""
    if "weight" not in shapes:
        return Elementwise(shapes, like)
    channels, _, *kernel = shapes["weight"]
    kind = CONVOLUTIONS[len(kernel) - 1]
    return kind(channels, channels, 1, groups=channels, dtype=like.dtype, device=like.device)


def reset(op: Op, node: Node) -> None:
    """State the groups and the window of an operator of a program that holds others, if it is a convolution."""
    window = node.attrs.get("window")
    if node.op == "Conv":
        set_argument(op, "groups", node.attrs["groups"])
    if isinstance(window, Window):
        if isinstance(arguments(op)["padding"], str):
            assert isinstance(op.target, torch._ops.OpOverload)
            op.target = op.target.overloadpacket.default
        for name, value in (("stride", window.stride), ("padding", window.before), ("dilation", window.dilation)):
            set_argument(op, name, list(value))


def swap(first: Op, second: Op) -> None:
    """Let two operators of a program stand in the other order."""
    source, given = (op.all_input_nodes[0] for op in (first, second))
    second.replace_all_uses_with(first)
    second.replace_input_with(given, source)
    first.replace_input_with(source, second)
    second.append(first)
