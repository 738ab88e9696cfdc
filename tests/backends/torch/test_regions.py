"""BatchNorms in regions of a PyTorch model: those that only wrap count as if they weren't there, branches and loops stay, and are told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modules import Net, difference, kept, norm, run
from torch import Tensor, nn
from torch._higher_order_ops.map import map as mapped
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

import bnfold
from bnfold.backends.torch.export.regions import has_regions
from bnfold.backends.torch.export.trace import trace
from bnfold.backends.torch.runtime.interpreter import TorchOracle
from bnfold.cli import run as command

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Region = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def net(forward: Callable[..., Any]) -> nn.Module:
    return Net(forward, c=nn.Conv2d(3, 4, 3), b=norm(4), head=nn.Conv2d(4, 2, 1), hb=norm(2)).eval()


def body(s: Any, x: Tensor) -> Tensor:
    return torch.relu(s.b(s.c(x)))


def within(*regions: Region, cast: bool = False) -> Callable[..., Tensor]:
    """The body within regions, the head behind them."""

    def forward(s: Any, x: Tensor) -> Tensor:
        with ExitStack() as stack:
            for region in regions:
                stack.enter_context(region())
            y = body(s, x.float() if cast else x)
        return s.hb(s.head(y.float()))  # type: ignore[no-any-return]

    return forward


def off() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", enabled=False)


def bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def no_grad() -> AbstractContextManager[Any]:
    return torch.no_grad()


REGIONS = {
    "vmap": lambda s, x: s.hb(s.head(torch.vmap(lambda y: 2 * y)(body(s, x)))),
    "vmap over a layer": lambda s, x: s.hb(torch.vmap(lambda y: s.head(y))(body(s, x))),
    "no_grad": within(no_grad),
    "autocast that is off": within(off),
    "autocast that is off, after a cast": within(off, cast=True),
    "autocast": within(bfloat16),
    "autocast, off within": within(bfloat16, off, cast=True),
    "no_grad, autocast within": within(no_grad, off),
    "checkpoint": lambda s, x: s.hb(s.head(checkpoint(lambda y: body(s, y), x, use_reentrant=True))),
    "no_grad, in place": lambda s, x: s.hb(s.head(no_grad()(lambda y: torch.relu_(s.b(s.c(y))))(x))),
}


def program_of(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (X,), dynamic_shapes=(({0: torch.export.Dim.AUTO},),), strict=False)


@pytest.mark.parametrize("name", REGIONS)
def test_what_only_wraps_is_seen_through(name: str) -> None:
    model = net(REGIONS[name])
    for given in (model, program_of(model)):
        result, report = bnfold.fuse(given, example=X)
        assert [(layer.name, layer.verdict) for layer in report.layers] == [("b", "folded"), ("hb", "folded")]
        assert report.verify is not None
        assert report.verify.verdict == "equivalent"
        assert difference(run(given, X), run(result, X)) < (0.05 if "autocast" in name else 1e-5)
        assert bnfold.verify(given, result, [X]).verdict == "equivalent"


@pytest.mark.parametrize("name", REGIONS)
def test_what_only_wraps_is_measured(name: str) -> None:
    model = net(REGIONS[name])
    x = 2 * X + 1
    for given in (model, program_of(model)):
        fresh, report = bnfold.recalibrate(given, [x])
        assert [layer.name for layer in report.layers] == ["b", "hb"]
        state = fresh.state_dict() if isinstance(fresh, nn.Module) else fresh.state_dict
        torch.testing.assert_close(
            state["b.running_mean"], model.c(x).mean((0, 2, 3)), rtol=0.03 if "autocast" in name else 1e-4, atol=1e-2
        )
        if not isinstance(fresh, nn.Module):
            assert has_regions(fresh) == has_regions(given)  # only numbers have changed


def test_a_program_says_that_its_regions_are_gone() -> None:
    program = program_of(net(REGIONS["no_grad"]))
    result, report = bnfold.fuse(program, example=X)
    assert has_regions(program)
    assert not has_regions(result)
    assert "written out" in report.notes[0]


def test_a_module_under_autocast_is_written_as_it_computes(tmp_path: Path) -> None:
    model = net(REGIONS["autocast"])
    bnfold.save(model, tmp_path / "net.pt2", example=X)
    assert torch.equal(run(bnfold.load(tmp_path / "net.pt2"), X)[0], run(model, X)[0])


@pytest.mark.parametrize("seed", [2, 3, 6])
def test_a_right_fold_under_autocast_errs_as_its_arithmetic_does_not_as_what_is_stored(seed: int) -> None:
    """In bfloat16, though all that is stored is float32; with few outputs one side's error may be some times the other's by chance."""

    def forward(s: Any, x: Tensor) -> Tensor:
        with bfloat16():
            y = s.b(s.c(x)).relu()
        made: Tensor = s.hb(s.head(y.float().mean((2, 3))))
        return made

    torch.manual_seed(seed)
    model = Net(forward, c=nn.Conv2d(3, 8, 3), b=norm(8), head=nn.Linear(8, 3), hb=norm(3, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    fused, _ = bnfold.fuse(model, example=x, check=False)
    assert bnfold.verify(model, fused, [x]).verdict == "equivalent"
    with torch.no_grad():
        fused.c.bias += 1e-3
    assert bnfold.verify(model, fused, [x]).verdict == "different"


@pytest.mark.parametrize("cast", [False, True], ids=["autocast", "its code casts"])
def test_a_bias_that_a_layer_gets_is_stored_as_its_weight(cast: bool) -> None:
    """And not as what is computed in: what rounds the weight in each call rounds the bias as well."""

    class Layer(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return self._conv_forward(input, self.weight.to(input.dtype), bias)

    def forward(s: Any, x: Tensor) -> Tensor:
        with bfloat16():
            made: Tensor = s.b(s.c(x.bfloat16() if cast else x))
        return made

    model = Net(forward, c=(Layer if cast else nn.Conv2d)(3, 4, 3, bias=False), b=norm(4)).eval()
    fused, report = bnfold.fuse(model, example=X)
    assert report.verify is not None
    assert report.verify.verdict == "equivalent"
    assert fused.c.bias.dtype is torch.float32
    _, report = bnfold.fuse(program_of(model))
    assert report.verify is not None
    assert report.verify.verdict == "equivalent"


def test_a_module_under_autocast_that_takes_no_fewer_samples() -> None:
    """It is tried as it was called, in float64; and what runs in no float64 errs as what autocast computes in does."""

    def forward(s: Any, ids: Tensor, offsets: Tensor) -> Tensor:
        with bfloat16():
            made: Tensor = s.l(s.b(s.e(ids, offsets)))
        return made

    model = Net(forward, e=nn.EmbeddingBag(20, 6, mode="mean"), b=norm(6, 1), l=nn.Linear(6, 3)).eval()
    example = (torch.arange(15), torch.tensor([0, 4, 9]))
    fused, report = bnfold.fuse(model, example=example)
    assert report.batchnorms.after == 0
    assert bnfold.verify(model, fused, [example]).verdict == "equivalent"


def conditional(s: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda t: s.d(t).clone(), lambda t: (s.e(t).float() + 1).clone(), (s.b(s.c(x)),))  # type: ignore[no-any-return]


def branches() -> nn.Module:
    return Net(conditional, c=nn.Conv2d(3, 4, 3), b=norm(4), d=norm(4), e=norm(4)).eval()


def looped() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        return while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, s.d(y)), (torch.tensor(0), s.b(s.c(x))))[1]  # type: ignore[no-any-return]

    return Net(forward, c=nn.Conv2d(3, 4, 3), b=norm(4), d=norm(4)).eval()


def frame_by_frame() -> nn.Module:
    return Net(lambda s, x: mapped(lambda y: s.d(y[None])[0], s.b(s.c(x))), c=nn.Conv2d(3, 4, 3), b=norm(4), d=norm(4)).eval()


@pytest.mark.parametrize(
    ("make", "where", "inside"),
    [
        (branches, "a branch of torch.cond", ["d", "e"]),
        (looped, "the body of a while_loop", ["d"]),
        (frame_by_frame, "the body of a map", ["d"]),
    ],
)
def test_branches_and_bodies_stay_and_are_told(make: Callable[[], nn.Module], where: str, inside: list[str]) -> None:
    model = make()
    with torch.no_grad():
        program = torch.export.export(model, (X,), strict=False)
    why = f"it stands in {where}, which runs as a whole"
    for given in (model, program):
        result, report = bnfold.fuse(given, example=X)
        assert [(layer.name, layer.channels, layer.verdict) for layer in report.layers] == [
            ("b", 4, "folded"),
            *((name, 4, "kept") for name in inside),
        ]
        assert set(kept(report).values()) == {why}
        assert (report.batchnorms.before, report.batchnorms.after) == (1 + len(inside), len(inside))
        assert difference(run(given, X), run(result, X)) < 1e-5
        _, measured = bnfold.recalibrate(given, [X])
        assert [layer.name for layer in measured.layers] == ["b"]
        assert measured.notes == tuple(f"{name} keeps its statistics: {why}" for name in inside)


def test_strict_fails_for_a_branch(tmp_path: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(branches(), (X,), strict=False)
    bnfold.save(program, tmp_path / "net.pt2")
    assert command(["fuse", str(tmp_path / "net.pt2"), "--strict", "-o", str(tmp_path / "out.pt2"), "-q"]) == 1
    assert not (tmp_path / "out.pt2").exists()


def test_what_a_branch_calls_too_stays() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.b(s.c(x))
        return torch.cond(y.sum() > 0, lambda t, u: (s.b(s.d(t)) + u).clone(), lambda t, u: (2 * u).clone(), (x, y))  # type: ignore[no-any-return]

    model = Net(forward, c=nn.Conv2d(3, 4, 3), b=norm(4), d=nn.Conv2d(3, 4, 3)).eval()
    result, report = bnfold.fuse(model, example=X)
    assert [layer.reason for layer in report.layers] == [
        "its parameters are also read by a cond",
        "it stands in a branch of torch.cond, which runs as a whole",
    ]
    for x in (X, -X, 1 - X):
        assert difference(run(model, x), run(result, x)) < 1e-6


# --- what the call doesn't reach, and what is no BatchNorm that anybody knows -----------------------------------------------------


class Own(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own, which no rule reads."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.addcmul(x, x, x))


def test_every_module_is_counted() -> None:
    parts: dict[str, Any] = {
        "c": nn.Conv2d(3, 4, 3),
        "b": norm(4),
        "never": norm(5),
        "own": Own(4),
        "aside": norm(4),
        "still": norm(1),
        "t": torch.ones(2, 1, 3, 3),
    }

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.own(s.b(s.c(x))) + s.aside.bias[:, None, None]
        return y * s.still(s.t).mean()  # type: ignore[no-any-return]

    model = Net(forward, **parts).eval()
    report = bnfold.inspect(model, example=X)
    assert {layer.name: layer.reason for layer in report.layers} == {
        "b": "",
        "never": "the call that was traced doesn't reach it",
        "own": "its forward is its own, and holds no BatchNorm that bnfold knows",
        "aside": "it isn't called itself: its parameters are read elsewhere",
        "still": "it normalises constants alone",
    }
    assert (report.batchnorms.before, report.batchnorms.after) == (5, 4)
    _, measured = bnfold.recalibrate(model, [X])
    assert [layer.name for layer in measured.layers] == ["b"]
    assert len(measured.notes) == 4


def test_a_model_of_nothing_else_is_not_said_to_hold_none() -> None:
    model = Net(lambda s, x: s.c(x), c=nn.Conv2d(3, 4, 3), never=norm(5)).eval()
    _, report = bnfold.fuse(model, example=X)
    assert kept(report) == {"never": "the call that was traced doesn't reach it"}
    with pytest.raises(bnfold.NothingToDoError, match="never keeps its statistics"):
        bnfold.recalibrate(model, [X])


def test_a_layer_that_the_code_calls_under_no_name_counts_once() -> None:
    layer = norm(4).eval()
    model = Net(lambda s, x: layer(s.c(x)), c=nn.Conv2d(3, 4, 3), b=layer).eval()
    assert len(bnfold.inspect(model, example=X).layers) == 1


def test_other_names_of_a_module_count_once() -> None:
    model = Net(lambda s, x: s.other(s.c(x)), c=nn.Conv2d(3, 4, 3), b=norm(4)).eval()
    model.other = model.b
    assert len(bnfold.inspect(model, example=X).layers) == 1


def test_branches_and_loops_run_in_float64() -> None:
    for make in (branches, looped, frame_by_frame):
        model = make()
        oracle = TorchOracle(trace(model, X))
        for x in (X, -X):
            (found,) = oracle.run({oracle._traced.specs[0].name: x.numpy()}).values()
            assert found.dtype == np.float64
            assert np.abs(found - run(model, x)[0].numpy()).max() < 1e-5


def test_a_program_counts_every_operator() -> None:
    """Weights that a batch_norm standardises, as timm's, are computed once; nothing else is left."""

    def forward(s: Any, x: Tensor) -> Tensor:
        w = s.w.reshape(1, 4, -1)
        w = nn.functional.batch_norm(w, None, None, training=True).reshape(4, 3, 3, 3)
        return s.b(nn.functional.conv2d(x, w)) * s.d(s.t).mean()  # type: ignore[no-any-return]

    model = Net(forward, w=nn.Parameter(torch.randn(4, 3, 3, 3)), b=norm(4), d=norm(1), t=torch.randn(2, 1, 3, 3)).eval()
    program = torch.export.export(model, (X,), strict=False)
    for given in (program, program.run_decompositions({})):
        result, report = bnfold.fuse(given, example=X)
        assert (report.batchnorms.before, report.batchnorms.after) == (3, 0)
        assert not any("batch_norm" in str(op.target) for op in result.graph.nodes)
        assert difference(run(given, X), run(result, X)) < 1e-5
