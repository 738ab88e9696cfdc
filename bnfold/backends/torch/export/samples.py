"""An exported program whose batch is fixed, with fewer samples in it (see `backends.onnx.graph.samples`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node as Op
from torch.utils import _pytree as pytree

from bnfold.capture import quiet
from bnfold.data.samples import fits_fewer, fixed_size

from .trace import Traced
from .walk import value_of


def with_samples(program: ExportedProgram, samples: int) -> ExportedProgram | None:
    """The program, exported anew with so many samples; None where its batch isn't fixed, where the shapes don't show where it goes, or
    where torch.export makes another graph of it."""
    batch = fixed_size(Traced(program, program).specs)
    if batch is None or program.example_inputs is None:
        return None

    def cut(leaf: Any) -> Any:
        return leaf[:samples] if isinstance(leaf, Tensor) and leaf.shape[:1] == (batch,) else leaf

    try:
        with quiet(), torch.no_grad():
            module = program.module(check_guards=False)
            module._forward_pre_hooks.clear()  # they hold callers to the old shapes
            for op in module.graph.nodes:
                op.args = tuple(_retold(each, batch, samples) for each in op.args)
            module.recompile()
            args, kwargs = pytree.tree_map(cut, program.example_inputs)
            made = torch.export.export(module, args, kwargs, strict=False)
    except Exception:  # operators raise what they like where sizes don't fit
        return None
    return made if _is_alike(program, made, batch, samples) else None


def _retold(argument: Any, batch: int, samples: int) -> Any:
    """Sizes that begin with the batch, with the number of samples in its place."""
    sizes = isinstance(argument, (list, tuple)) and len(argument) > 0 and type(argument[0]) is int and argument[0] == batch
    return [samples, *argument[1:]] if sizes else argument


def _is_alike(before: ExportedProgram, made: ExportedProgram, batch: int, samples: int) -> bool:
    """Whether the inputs have the same names, the operators are the same, and the shapes of what each gives fit."""
    if [op.name for op in Traced(before, before).input_nodes] != [op.name for op in Traced(made, made).input_nodes]:
        return False
    olds, news = ([op for op in program.graph.nodes if op.op == "call_function"] for program in (before, made))

    def fits(old: Op, new: Op) -> bool:
        shapes = [[tuple(leaf.shape) for leaf in pytree.tree_leaves(value_of(op)) if isinstance(leaf, Tensor)] for op in (old, new)]
        return len(shapes[0]) == len(shapes[1]) and all(fits_fewer(a, b, batch, samples) for a, b in zip(*shapes, strict=True))

    return [op.target for op in olds] == [op.target for op in news] and all(map(fits, olds, news))
