"""`--freeze` on PyTorch models: a BatchNorm in training mode gets statistics of its own, is out of training mode, and folds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modules import Net, difference, kept, norm, run
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import bnfold
from bnfold.cli import run as command

aten = torch.ops.aten
X = 2 * torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 1
BATCHES = [X[i : i + 8] for i in range(0, 24, 8)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def net(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm(6, **options), nn.SiLU(), nn.Conv2d(6, 4, 3), norm(4))


def one_in_training() -> nn.Sequential:
    model = net().eval()
    model[1].train()
    return model


def exported(model: nn.Module) -> ExportedProgram:
    dims = {0: Dim("n", min=2)}
    shapes = ((dims,),) if isinstance(model, Net) else (dims,)
    return torch.export.export(model, (X[:8],), dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize("make", [one_in_training, lambda: net().train(), lambda: nn.Sequential(nn.Conv2d(3, 6, 3), norm(6)).train()])
def test_a_module_in_training_mode(make: Callable[[], nn.Sequential]) -> None:
    model = make()
    _, report = bnfold.fuse(model, example=X[:2], check=False)
    assert kept(report)["1"].startswith("it is in training mode: it normalises each batch by itself")
    frozen, measured = bnfold.recalibrate(model, BATCHES, freeze=True)
    assert "1 was in training mode, and has statistics of its own now" in measured.notes
    assert model[1].training
    assert not any(m.training for m in frozen.modules() if isinstance(m, nn.BatchNorm2d))
    assert frozen[0].training == model[0].training  # nothing else changes its mode
    torch.testing.assert_close(frozen[1].running_mean, model[0](X).mean((0, 2, 3)))
    result, report = bnfold.fuse(frozen, example=X[:2])
    assert not kept(report)
    assert difference(run(frozen, X[:3]), run(result, X[:3])) < 1e-5


def test_code_that_never_leaves_training_mode_says_so() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(s.b(s.c(x)), s.mean, s.var, training=True)

    model = Net(forward, c=nn.Conv2d(3, 4, 3), b=norm(4), mean=torch.zeros(4), var=torch.ones(4)).eval()
    _, report = bnfold.recalibrate(model, BATCHES, freeze=True)
    assert report.notes[0].endswith("its code has it in training mode even in evaluation: it normalises each batch by itself")


def call(op: Any, *, statistics: bool = True, training: bool = True) -> Callable[[Any, Tensor], Tensor]:
    """A convolution and one of the operators for a BatchNorm, of which the first result counts."""

    def forward(s: Any, x: Tensor) -> Tensor:
        stored = (s.b.running_mean, s.b.running_var) if statistics else ()
        return torch.relu(op(s.c(x), s.b.weight, s.b.bias, *stored, *((True,) if training else ()), 0.1, 1e-5)[0])

    return forward


def plain(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return Net(forward, c=nn.Conv2d(3, 6, 3), b=norm(6)).train()


PROGRAMS: dict[str, Callable[[], ExportedProgram]] = {
    "as exported": lambda: exported(net().train()),
    "decomposed": lambda: exported(net().train()).run_decompositions({}),
    "core ATen": lambda: exported(net().train()).run_decompositions(),
    "no statistics": lambda: exported(net(track_running_stats=False).train()),
    "no statistics, decomposed": lambda: exported(net(track_running_stats=False).train()).run_decompositions({}),
    "no affine part": lambda: exported(net(affine=False).train()).run_decompositions({}),
    "within no_grad": lambda: exported(Net(lambda s, x: torch.no_grad()(s.n)(x), n=net()).train()),
    "native": lambda: exported(plain(call(aten.native_batch_norm))),
    "legit": lambda: exported(plain(call(aten._native_batch_norm_legit))),
    "legit without statistics": lambda: exported(plain(call(aten._native_batch_norm_legit.no_stats, statistics=False))),
    "with update": lambda: exported(plain(call(aten._batch_norm_with_update, training=False))),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_in_training_mode(name: str) -> None:
    program = PROGRAMS[name]()
    before = {key: tensor.clone() for key, tensor in program.state_dict.items()}
    report = bnfold.inspect(program)
    assert len(kept(report)) == len(report.layers) > 0
    assert all("normalises each batch by itself" in why for why in kept(report).values())
    frozen, measured = bnfold.recalibrate(program, BATCHES, freeze=True)
    assert len(measured.layers) == len(report.layers)
    assert all("was in training mode" in note or "had no statistics" in note for note in measured.notes)
    assert {spec.kind.name for spec in frozen.graph_signature.output_specs} == {"USER_OUTPUT"}
    stated = {key: tensor.clone() for key, tensor in frozen.state_dict.items()}
    alone, among = run(frozen, X[:3])[0], run(frozen, X)[0]
    assert torch.allclose(alone, among[:3], atol=1e-5)  # the batch decides nothing any more
    assert torch.allclose(among, run(program, X)[0], atol=1e-3)  # and all data as one batch are normalised as before
    assert all(torch.equal(stated[key], tensor) for key, tensor in frozen.state_dict.items())  # nothing is updated
    result, folded = bnfold.fuse(frozen)
    assert not kept(folded)
    assert difference(run(frozen, X[:3]), run(result, X[:3])) < 1e-5
    assert before.keys() == program.state_dict.keys() or "no statistics" in name


def test_a_program_that_reads_the_moments_of_each_batch_stays() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y, mean, _ = aten.native_batch_norm(s.c(x), s.b.weight, s.b.bias, s.b.running_mean, s.b.running_var, True, 0.1, 1e-5)
        return y + mean[:, None, None]  # type: ignore[no-any-return]

    with pytest.raises(bnfold.NothingToDoError, match="the statistics of each batch are used elsewhere in the program"):
        bnfold.recalibrate(exported(plain(forward)), BATCHES, freeze=True)


def test_only_what_is_selected_is_frozen() -> None:
    frozen, report = bnfold.recalibrate(exported(net().train()), BATCHES, freeze=True, layers=["4"])
    assert [layer.name for layer in report.layers] == ["4"]
    assert list(kept(bnfold.inspect(frozen))) == ["1"]


@pytest.mark.parametrize("program", [False, True])
def test_what_is_in_training_mode_is_not_changed(program: bool) -> None:
    model = net().train()
    given = exported(model) if program else model
    state = given.state_dict if isinstance(given, ExportedProgram) else given.state_dict()
    before = copy.deepcopy(dict(state))
    bnfold.verify(given, exported(net().train()) if program else net().train(), BATCHES, example=X[:2])
    bnfold.recalibrate(given, BATCHES, freeze=True)
    bnfold.fuse(given, example=X[:2])
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bnfold.save(exported(net().train()), tmp_path / "m.pt2")
    np.save(tmp_path / "x.npy", X.numpy())
    m, x, out = (str(tmp_path / name) for name in ("m.pt2", "x.npy", "out.pt2"))
    assert command(["recalibrate", m, "--data", x, "-o", out, "-q"]) == 4
    assert "--freeze gives it statistics of its own" in capsys.readouterr().err
    assert command(["pipeline", m, "--data", x, "--freeze", "-o", out, "-q"]) == 0
    assert not kept(bnfold.inspect(bnfold.load(out)))
    assert not any("batch_norm" in str(op.target) for op in bnfold.load(out).graph.nodes)
