"""What a copy of a module shares with the original, and what is left in the original when bnfold has worked on a copy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import Net, difference, norm, run
from torch import nn

import bnfold
from bnfold.backends.torch.export.copies import unchanged

X = torch.randn(6, 3, 10, 9, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _with_lambda(net: Net) -> Callable[..., Any]:
    net.step = lambda x: net.b(net.c(x))
    return lambda s, x: s.step(x)


def _with_patched_forward(net: Net) -> Callable[..., Any]:
    own = net.c.forward
    net.c.forward = lambda x: 2 * own(x)
    return lambda s, x: s.b(s.c(x))


def _with_default(net: Net) -> Callable[..., Any]:
    net.steps = [lambda x, *, s=net: x, lambda x, s=net: s.b(s.c(x))]
    return lambda s, x: s.steps[1](s.steps[0](x))


def _with_hook(net: Net) -> Callable[..., Any]:
    net.kept = {}
    net.b.register_forward_hook(lambda module, given, output: net.kept.update(b=output))
    return lambda s, x: (s.b(s.c(x)).sigmoid(), s.kept["b"].sum())


def _with_hook_on_a_dict(net: Net) -> Callable[..., Any]:
    kept = net.kept = {"log": []}
    net.b.register_forward_hook(lambda module, given, output: kept.update(b=output))
    return lambda s, x: (s.b(s.c(x)).sigmoid(), s.kept["b"].sum())


@pytest.mark.parametrize("held", [_with_lambda, _with_patched_forward, _with_default, _with_hook, _with_hook_on_a_dict])
def test_functions_that_close_over_the_model_belong_to_the_copy_in_a_copy(held: Callable[[Net], Callable[..., Any]]) -> None:
    net = Net(len, c=nn.Conv2d(3, 4, 3), b=norm(4)).double().eval()
    net.run = held(net)
    want = run(net, X)
    fused, report = bnfold.fuse(net, example=X)
    assert (report.batchnorms.after, [layer.into for layer in report.layers]) == (0, [("c",)])
    fresh, _ = bnfold.recalibrate(net, [X])
    assert not any(type(value).__name__ == "FakeTensor" for value in getattr(net, "kept", {}).values())
    want_fresh = run(fresh, X)
    assert difference(want, want_fresh) > 0.1
    refolded, _ = bnfold.fuse(fresh, example=X)
    with torch.no_grad():  # which the copies don't share
        for tensor in net.state_dict().values():
            tensor.fill_(7)
    assert difference(want, run(fused, X)) < 1e-12
    assert difference(want_fresh, run(refolded, X)) < 1e-12


@pytest.mark.parametrize("verb", [bnfold.fuse, bnfold.inspect, lambda net, example: bnfold.recalibrate(net, [example])])
def test_code_that_reaches_the_originals_modules_is_refused(verb: Callable[..., Any]) -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)).double()

    class Global(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return layer(x).relu()

    with pytest.raises(bnfold.UnsupportedError, match=r"its code reaches layer by another name than its own.*as an exported program"):
        verb(Global().eval(), example=X)


def test_a_parameter_that_forward_makes() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = s.b(s.c(x))
        if not hasattr(s, "scale"):
            s.scale = nn.Parameter(torch.full_like(y[0, :, :1, :1], 2))
        return y * s.scale

    net = Net(forward, c=nn.Conv2d(3, 4, 3), b=norm(4)).double().eval()
    fused, _ = bnfold.fuse(net, example=X)
    assert not hasattr(net, "scale")
    assert difference(run(net, X), run(fused, X)) < 1e-12
    del net.scale
    torch.export.export(net, (X,))
    for verb in (bnfold.fuse, bnfold.inspect):
        with pytest.raises(bnfold.UnsupportedError, match="holds no numbers in scale"):
            verb(net, example=X)


def test_a_buffer_that_forward_updates_stays_as_it_was() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = s.b(s.c(x))
        s.calls += 1
        s.average.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)
        return y.relu()

    net = Net(forward, c=nn.Conv2d(3, 4, 3), b=norm(4), calls=torch.tensor(3), average=torch.zeros(4)).double().eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fused, report = bnfold.fuse(net, example=X)
    assert report.batchnorms.after == 0
    assert bnfold.verify(net, fused, [X]).verdict == "equivalent"
    bnfold.recalibrate(net, [X])
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert (int(fused.calls), float(fused.average.abs().max())) == (3, 0.0)


def test_threads_read_a_module_one_behind_the_other() -> None:
    """Else one puts back what the other has put there meanwhile."""
    net = Net(lambda s, x: s.b(s.c(x)).relu(), c=nn.Conv2d(3, 4, 3), b=norm(4))
    inside = threading.Event()

    def other() -> None:
        with unchanged(net):
            inside.set()

    thread = threading.Thread(target=other)
    with unchanged(net):
        thread.start()
        assert not inside.wait(0.3)
    thread.join(10)
    assert inside.is_set()
    assert not any(layer._forward_pre_hooks for layer in net.modules())
