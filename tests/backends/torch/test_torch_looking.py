"""Code that looks at what folds: at its own modules, or at their parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import Net
from torch import Tensor, nn

import bnfold

X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))


def checked(model: nn.Module, x: Tensor = X) -> tuple[nn.Module, bnfold.FuseReport]:
    """The folded copy, which gives the same in float64, the argument being as it was."""
    before = copy.deepcopy(model.state_dict())
    fused, report = bnfold.fuse(model, example=x)
    want, got = (copy.deepcopy(each).double()(x.double()) for each in (model, fused))
    assert float((want - got).abs().max()) <= 1e-6 * float(want.abs().max())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return fused, report


def _children(s: Any, x: Tensor) -> Tensor:
    for child in s.children():
        x = child(x) + 1 if isinstance(child, nn.BatchNorm2d) else child(x)
    return x


LOOKING: dict[str, tuple[Callable[[Any, Tensor], Tensor], set[str]]] = {
    "isinstance": (_children, {"b", "d"}),
    "num_features": (lambda s, x: s.d(s.c(F.relu(s.b(s.a(x))))) * s.b.num_features, {"b"}),
    "the bias of a convolution": (lambda s, x: s.d(s.c(F.relu(s.b(s.a(x) * (2 if s.a.bias is None else 1))))), {"b"}),
    "nothing": (lambda s, x: s.d(s.c(F.relu(s.b(s.a(x))))), set()),
}


def looking(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    norms = [nn.BatchNorm2d(4) for _ in range(2)]
    for norm in norms:
        norm.running_mean.normal_()
    return Net(forward, a=nn.Conv2d(3, 4, 3, bias=False), b=norms[0], c=nn.Conv2d(4, 4, 3), d=norms[1]).eval()


@pytest.mark.parametrize("name", LOOKING)
def test_what_code_looks_at_stays(name: str) -> None:
    forward, stay = LOOKING[name]
    report = checked(looking(forward))[1]
    assert {layer.name for layer in report.layers if layer.verdict == "kept"} == stay
    assert all("the module's own code, or a hook, looks at it" in layer.reason for layer in report.layers if layer.verdict == "kept")


def test_what_a_hook_reads_stays() -> None:
    model = looking(LOOKING["nothing"][0])
    seen: list[torch.Size] = []
    model.b.register_forward_hook(lambda module, given, output: seen.append(module.weight.shape))
    fused, report = bnfold.fuse(model, example=X)
    assert {layer.name: layer.verdict for layer in report.layers} == {"b": "kept", "d": "folded"}
    fused(X)
