"""PyTorch networks for the tests: modules put together from a function, lively BatchNorms, and both routes through `fuse`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import bnfold
from bnfold.backends.torch.export.call import as_call
from bnfold.backends.torch.export.copies import duplicate
from bnfold.backends.torch.export.trace import trace
from bnfold.report import FuseReport

EXACT = 1e-12  # relative, in float64


class Net(nn.Module):
    """A network whose forward is a function of itself and its inputs; what is given by name is registered."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter) or part is None:
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def lively(module: nn.Module, *, positive: bool = False) -> nn.Module:
    """Statistics and coefficients that show: no zeros, no ones, and negative gammas unless `positive`."""
    for each in module.modules():
        if isinstance(getattr(each, "running_var", None), Tensor):
            with torch.no_grad():
                each.running_mean.normal_()
                each.running_var.uniform_(0.5, 2.0)
                if isinstance(each.weight, Tensor):
                    each.weight.uniform_(0.5, 1.5)
                    if not positive:
                        each.weight[::2] *= -1
                    each.bias.normal_()
    return module


def norm(channels: int, dims: int = 2, *, positive: bool = False, **options: Any) -> nn.Module:
    """A lively BatchNorm."""
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    return lively(kind(channels, **options), positive=positive)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def tensors(returned: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]


def run(model: nn.Module | ExportedProgram, example: Any) -> list[Tensor]:
    """The output tensors on inputs of its own."""
    module = model.module() if isinstance(model, ExportedProgram) else model
    call = as_call(module, example)
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (call.args, call.kwargs))
    with torch.no_grad():
        return tensors(module(*args, **kwargs))


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its output."""
    assert [t.shape for t in one] == [t.shape for t in other]
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in zip(one, other, strict=True))


def folded(module: nn.Module, example: Any, *, double: bool = True) -> tuple[tuple[Any, FuseReport], tuple[Any, FuseReport]]:
    """Both routes in float64: the module's copy and its exported program, each with its report. The function must not change.

    The module that is given must be as it was, bit for bit.
    """
    model = duplicate(module).double() if double else module
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy, report = bnfold.fuse(model, example=example, check=False)
    program = trace(model, example).program
    changed, other = bnfold.fuse(program, check=False)
    want = run(model, example)
    for result in (copy, changed):
        assert difference(want, run(result, example if isinstance(result, nn.Module) else as_call(model, example))) < (
            EXACT if double else 1e-4
        )
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return (copy, report), (changed, other)


def kept(report: FuseReport) -> dict[str, str]:
    """The BatchNorms that stay, with their reasons."""
    return {layer.name: layer.reason for layer in report.layers if layer.verdict == "kept"}
