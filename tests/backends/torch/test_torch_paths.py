"""A module has more paths than the one that was traced: what folds is right on all of them, or stays with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import Net, difference, kept, norm, run
from torch import Tensor, nn

import bnfold
from bnfold.backends.torch.export.trace import trace
from bnfold.backends.torch.writing.checks import DifferentialTest


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def net(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """With two convolutions and two BatchNorms behind them, which a forward may use or not."""
    usual = {"a": nn.Conv1d(3, 4, 3), "z": nn.Conv1d(3, 4, 3), "b": norm(4, 1), "d": norm(4, 1)}
    return Net(forward, **{**usual, **parts}).eval()


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


class Loop(nn.Module):
    """A BatchNorm for each of the first frames, behind one convolution; the frames that are left go without."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.a, self.norms = nn.Conv1d(3, 4, 3), nn.ModuleList(norm(4, 1) for _ in range(norms))

    def forward(self, x: Tensor) -> Tensor:
        """[n, frames, 3, length] to [n, frames, 4, length - 2]."""
        made = [self.a(x[:, t]) for t in range(x.shape[1])]
        return torch.stack([norm(y) for norm, y in zip(self.norms, made, strict=False)] + made[len(self.norms) :], 1)


# name: (network, the example, BatchNorms that stay, other inputs that it takes)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, set[str], list[Any]]] = {
    "another convolution for short ones": (
        lambda: net(lambda s, x: s.b(s.a(x) if x.shape[-1] > 32 else s.z(x))),
        data(2, 3, 40),
        set(),
        [data(2, 3, 16), data(1, 3, 33), data(3, 3, 32)],
    ),
    "bare when short": (
        lambda: net(lambda s, x: s.b(s.a(x)) if x.shape[-1] > 32 else s.a(x)),
        data(2, 3, 40),
        {"b"},
        [data(2, 3, 16), data(2, 3, 33)],
    ),
    "bare when long": (lambda: net(lambda s, x: s.b(s.a(x)) if x.shape[-1] <= 60 else s.a(x)), data(2, 3, 40), {"b"}, [data(2, 3, 61)]),
    "bare when much longer": (
        lambda: net(lambda s, x: s.b(s.a(x)) if x.shape[-1] <= 600 else s.a(x)),
        data(2, 3, 40),
        {"b"},
        [data(2, 3, 601)],
    ),
    "bare for large areas": (
        lambda: net(lambda s, x: s.b(s.a(x)) if x.shape[2] * x.shape[3] <= 2000 else s.a(x), a=nn.Conv2d(3, 4, 3), b=norm(4)),
        data(2, 3, 8, 8),
        {"b"},
        [data(1, 3, 64, 64)],
    ),
    "bare for many samples": (
        lambda: net(lambda s, x: s.b(s.a(x)) if x.shape[0] <= 100 else s.a(x)),
        data(2, 3, 9),
        {"b"},
        [data(101, 3, 9)],
    ),
    "bare when alone": (lambda: net(lambda s, x: s.b(s.a(x)) if len(x) > 1 else s.a(x)), data(2, 3, 9), {"b"}, [data(1, 3, 9)]),
    "bare when not alone": (lambda: net(lambda s, x: s.b(s.a(x)) if len(x) == 1 else s.a(x)), data(1, 3, 9), {"b"}, [data(2, 3, 9)]),
    "another norm when odd": (
        lambda: net(lambda s, x: (s.d if x.shape[2] % 2 else s.b)(s.a(x))),
        data(2, 3, 10),
        {"b", "d"},
        [data(2, 3, 9)],
    ),
    "bare at one length": (lambda: net(lambda s, x: s.a(x) if x.shape[2] == 77 else s.b(s.a(x))), data(2, 3, 40), {"b"}, [data(2, 3, 77)]),
    "at some lengths": (
        lambda: net(lambda s, x: s.b(s.a(x) if x.shape[2] in (40, 50) else s.z(x))),
        data(2, 3, 40),
        set(),
        [data(2, 3, 50), data(2, 3, 41)],
    ),
    "by two sizes": (
        lambda: net(lambda s, x: s.b(s.a(x)) if len(x) * x.shape[2] > 33 else s.a(x)),
        data(2, 3, 40),
        {"b"},
        [data(2, 3, 16)],
    ),
    "by two inputs": (
        lambda: net(lambda s, x, y: s.b(s.a(x)) if x.shape[2] == y.shape[2] else s.a(x) + y.mean()),
        (data(2, 3, 9), data(2, 3, 9)),
        {"b"},
        [(data(2, 3, 9), data(2, 3, 8))],
    ),
    "by two axes": (
        lambda: net(lambda s, x: (lambda y: s.b(y) if x.shape[2] == x.shape[3] else y)(s.a(x)), a=nn.Conv2d(3, 4, 3), b=norm(4)),
        data(2, 3, 8, 8),
        {"b"},
        [data(2, 3, 9, 8)],
    ),
    "without the first axis": (lambda: net(lambda s, x: s.b(s.a(x)) if x.ndim == 3 else s.a(x)), data(2, 3, 9), {"b"}, [data(3, 9)]),
    "a loop over frames": (
        lambda: net(lambda s, x: sum(s.b(s.a(x[:, t])) for t in range(x.shape[1]))),
        data(2, 3, 3, 9),
        set(),
        [data(2, 5, 3, 9)],
    ),
    "more frames than norms": (lambda: Loop(2).eval(), data(2, 1, 3, 9), {"norms.0", "norms.1"}, [data(2, 2, 3, 9), data(2, 3, 3, 9)]),
    "as many frames as channels": (
        lambda: net(lambda s, x: torch.stack([s.b(s.a(x[:, t])) if t < 4 else s.a(x[:, t]) for t in range(x.shape[1])], 1)),
        data(2, 3, 3, 9),
        {"b"},
        [data(2, 5, 3, 9)],
    ),
    "only one of two": (
        lambda: net(lambda s, x: (lambda y: s.d(s.c(y)) if x.shape[2] > 5 else s.c(y))(s.b(s.a(x))), c=nn.Conv1d(4, 4, 1)),
        data(2, 3, 9),
        {"d"},
        [data(2, 3, 5)],
    ),
    "zeros for an example": (
        lambda: net(lambda s, x: s.b(s.a(x)) if x.shape[-1] > 20 else s.d(s.a(x))),
        torch.zeros(2, 3, 40),
        {"b", "d"},
        [data(2, 3, 9)],
    ),
    "ids": (
        lambda: net(lambda s, x: (lambda y: s.b(y) if x.shape[1] > 8 else y)(s.a(s.e(x).mT)), e=nn.Embedding(7, 3)),
        torch.arange(24).reshape(2, 12) % 7,
        {"b"},
        [torch.arange(6).reshape(1, 6)],
    ),
    "without the last axis": (
        lambda: net(lambda s, x: s.b(s.a(x)) if x.ndim == 3 else s.b(s.lin(x)) + s.lin(x), lin=nn.Linear(3, 4)),
        data(2, 3, 9),
        {"b"},
        [data(2, 3)],
    ),
    "without the last axis, alike": (
        lambda: net(lambda s, x: s.b(s.a(x) if x.ndim == 3 else s.lin(x)), lin=nn.Linear(3, 4)),
        data(2, 3, 9),
        set(),
        [data(2, 3)],
    ),
    "half precision": (lambda: net(lambda s, x: s.b(s.a(x)) if x.shape[-1] > 20 else s.a(x)).half(), data(2, 3, 40).half(), {"b"}, []),
    "a tensor that is no buffer": (
        lambda: (lambda k: net(lambda s, x: F.conv1d(s.b(s.a(x)) if x.shape[-1] > 20 else s.a(x), k, groups=4)))(torch.ones(4, 1, 3)),
        data(2, 3, 40),
        {"b"},
        [data(2, 3, 9)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_that_choose_the_path(name: str) -> None:
    make, example, stay, others = CASES[name]
    module = make()
    fused, report = bnfold.fuse(module, example=example)
    reasons = {layer: reason for layer, reason in kept(report).items() if "doesn't reach it" not in reason}
    assert set(reasons) == stay
    assert not stay or any("on all paths of the code" in reason for reason in reasons.values())
    close = 0.05 if name == "half precision" else 1e-4
    for each in (example, *others):
        assert difference(run(module, each), run(fused, each)) < close
    inspected = bnfold.inspect(module, example=example)
    assert kept(inspected) == kept(report)


def wrong_when_short(module: Any) -> nn.Module:
    """The network with its BatchNorm folded into one of two convolutions."""
    wrong = copy.deepcopy(module)
    scale = (module.b.weight / (module.b.running_var + module.b.eps).sqrt()).detach()
    wrong.a.weight.data = module.a.weight.data * scale[:, None, None]
    wrong.a.bias.data = (module.a.bias.data - module.b.running_mean) * scale + module.b.bias.data
    wrong.b = nn.Identity()
    return wrong


@pytest.mark.parametrize("given", [True, False])
def test_verify_tries_other_sizes(given: bool) -> None:
    module = CASES["another convolution for short ones"][0]()
    example = data(2, 3, 40)
    report = bnfold.verify(module, wrong_when_short(module), [example] if given else None, example=example)
    assert report.verdict == "different"
    assert "of shape" in report.reason
    right, _ = bnfold.fuse(module, example=example)
    assert bnfold.verify(module, right, [example] if given else None, example=example).verdict == "equivalent"


class Features(nn.Module):
    """A network that gives out what stands before its BatchNorm, if asked."""

    def __init__(self, deep: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv1d(3, 4, 3), norm(4, 1), nn.Conv1d(4, 4, 1), norm(4, 1)
        self.deep = deep

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        """[n, 3, length] to [n, 4, length - 2]."""
        y = self.a(x)
        if self.deep:
            y = self.b(y).relu()
            return self.d(self.c(y)) if features else y
        return y if features else self.b(y)


def test_arguments_that_were_not_exercised_are_named() -> None:
    module, x = Features().eval(), data(2, 3, 9)
    for report in (bnfold.fuse(module, example=x)[1], bnfold.inspect(module, example=(x, False))):
        assert [note for note in report.notes if "features=False" in note and "not exercised" in note]
    plain = net(lambda s, x: s.b(s.a(x)))
    assert bnfold.fuse(plain, example=x)[1].notes == ()


class Several(nn.Module):
    """What else a call may hold more or less of, and the code ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 3), norm(4, 1)

    def forward(self, xs: list[Tensor], *more: Any, **others: Any) -> Tensor:
        return self.a(xs[0]) if len(xs) > 2 or more or others else self.b(self.a(xs[0]))


def test_structures_that_were_not_exercised_are_named() -> None:
    report = bnfold.fuse(Several().eval(), example=([data(2, 3, 9)] * 2,))[1]
    assert any("xs=a list of 2, *more=(), **others={} alone" in note for note in report.notes), report.notes


def test_several_calls_as_the_example() -> None:
    x = data(2, 3, 9)
    calls: list[Any] = [(x,), {"x": x, "features": True}]
    module = Features().eval()
    fused, report = bnfold.fuse(module, example=calls)
    assert "call 2 of the example" in kept(report)["b"]
    assert report.notes == ()
    assert torch.equal(module(x, features=True), fused(x, features=True))
    module = Features(deep=True).eval()
    fused, report = bnfold.fuse(module, example=calls)
    assert {layer.name: layer.into for layer in report.layers} == {"b": ("a",), "d": ("c",)}
    assert (report.batchnorms.before, report.batchnorms.after) == (2, 0)
    assert report.verify is not None
    assert report.verify.verdict == "equivalent"
    for which in (False, True):
        assert difference([module(x, features=which)], [fused(x, features=which)]) < 1e-5
    assert bnfold.verify(module, fused, example=calls).verdict == "equivalent"


def test_the_check_runs_on_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnfold.backends.torch.writing import module as write_module

    right = write_module._set

    def wrong(root: nn.Module, target: str, tensor: Tensor, **how: Any) -> None:
        right(root, target, tensor * (1.001 if target.startswith("c.") else 1), **how)

    monkeypatch.setattr(write_module, "_set", wrong)
    x = data(2, 3, 9)
    module = Features(deep=True).eval()
    with pytest.raises(bnfold.CheckError, match="failed its check"):
        bnfold.fuse(module, example=[(x,), {"x": x, "features": True}])


def test_one_list_is_one_call() -> None:
    """Of tensors: the arguments. Inside a tuple: an argument."""
    module = Net(lambda s, x, y: s.b(s.l(x)) + y, l=nn.Linear(4, 4), b=norm(4, 1)).eval()
    assert bnfold.fuse(module, example=[data(6, 4), data(6, 4)])[1].batchnorms.after == 0

    def forward(s: Any, x: Tensor, groups: list[Tensor]) -> Tensor:
        assert sum(map(len, groups)) == len(x)
        return torch.stack([s.b(s.l(x))[g].mean(0) for g in groups])

    parts = Net(forward, l=nn.Linear(4, 4), b=norm(4, 1)).eval()
    assert bnfold.fuse(parts, example=(data(6, 4), [torch.arange(3), torch.arange(3, 6)]))[1].batchnorms.after == 0


class Pads(nn.Module):
    def __init__(self, width: Callable[..., Any]) -> None:
        super().__init__()
        self.c, self.b, self.width = nn.Conv1d(3, 4, 3), norm(4, 1), width

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """[n, 3, length] to [n, 4, padded]."""
        y = self.c(x)
        return self.b(F.pad(y, (0, self.width(y, *more))))


def read(n: Tensor) -> int:
    number = n.item()
    torch._check(number >= 0)
    torch._check(number < 4)
    return number  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("width", "example", "stay"),
    [
        (lambda y: 30 - y.shape[-1], data(2, 3, 42), 1),  # a crop with the example, a padding with less
        (lambda y: -y.shape[-1] % 8, data(2, 3, 18), 1),  # nothing with the example
        (lambda y: -(y.shape[-1] // 2), data(2, 3, 18), 0),
        (lambda y: -3, data(2, 3, 18), 0),
        (lambda y, n: read(n), (data(2, 3, 8), torch.tensor(2)), 1),
        (lambda y, n: -read(n), (data(2, 3, 8), torch.tensor(2)), 0),
    ],
)
def test_a_padding_whose_width_is_computed(width: Any, example: Any, stay: int) -> None:
    module = Pads(width).eval()
    program = trace(module, example).program
    for model in (module, program):
        report = bnfold.fuse(model, example=example)[1]
        assert report.batchnorms.after == stay
        assert not stay or "pad pad blocks" in kept(report)["b"]


def test_other_data_may_give_other_sizes() -> None:
    """Where verify feeds others, to see that they reach the layers."""

    def forward(s: Any, x: Tensor, n: Tensor) -> Tensor:
        length = n.item()
        torch._check(length >= 1)
        torch._check(length < 6)
        made: Tensor = s.b(s.c(x)[..., :length])  # type: ignore[misc]  # torch says that a slice takes whole numbers alone
        return made

    module, example = Net(forward, c=nn.Conv1d(3, 4, 3), b=norm(4, 1)).eval(), (data(2, 3, 8), torch.tensor(2))
    assert bnfold.verify(module, bnfold.fuse(module, example=example)[0], [example]).verdict == "equivalent"


def same(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Padded as TensorFlow does."""
    sides = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[-2:]]
    return layer(F.pad(x, [sides[1] // 2, sides[1] - sides[1] // 2, sides[0] // 2, sides[0] - sides[0] // 2]))


class Deep(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, 2), norm(3)) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, height, width] to [n, 3, 1, 1] or so."""
        for conv, after in self.layers:  # type: ignore[misc]
            x = after(same(x, conv))
        return x


def test_sizes_that_are_long_formulas_are_not_read_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnfold.backends.torch.export.program.MOST_TERMS", 15)
    module = Deep(2).eval()
    example = data(1, 3, 64, 64)
    traced = trace(module, example)
    assert traced.specs[0].shape[2:] == (64, 64)
    assert "read at the example's sizes" in traced.note
    assert trace(module, example, patient=True).specs[0].shape[2:] != (64, 64)
    fused, report = bnfold.fuse(module, example=example)
    assert report.batchnorms.after == 0
    assert traced.note in report.notes
    assert {(65, 65), (32, 32)} <= {tuple(other.call.args[0].shape[2:]) for other in DifferentialTest(traced).others}
    assert difference(run(module, data(1, 3, 50, 41)), run(fused, data(1, 3, 50, 41))) < 1e-4
