"""What `--resume` keeps: a run that was stopped at any moment goes on, and ends with the same bytes as one that wasn't."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cases.builder import Net
from modules import lively
from torch import nn

from bnfold.api import recalibrate
from bnfold.cli import run as command
from bnfold.errors import DataError, UsageError
from bnfold.recalibration.journal import Journal

X = np.random.default_rng(0).normal(0.5, 1.5, (300, 3, 6, 6)).astype(np.float32)


class StopError(Exception):
    """In the place of a kill."""


def residual() -> onnx.ModelProto:
    """Four stages, and values that wait over several of them."""
    net = Net("resume")
    x = net.relu(net.bn(net.conv(net.input("N", 3, 6, 6), 3, 5, pads=1), 5))
    for _ in range(2):
        x = net.relu(net.op("Add", x, net.bn(net.conv(x, 5, 5, pads=1), 5)))
    net.output(net.bn(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), 5, 4), 4))
    return net.model()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if i == 0 else 5, 5, 3, padding=1) for i in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(5) for _ in range(3)])
        self.last = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](self.convs[0](x)).relu()
        for conv, norm in zip(self.convs[1:], self.norms[1:], strict=True):
            x = (x + norm(conv(x))).relu()
        made: torch.Tensor = self.last(x.mean((2, 3)))
        return made


def module() -> nn.Module:
    torch.manual_seed(0)
    return lively(Residual()).eval()


def numbers(made: Any) -> bytes:
    """All that a model stores."""
    if isinstance(made, onnx.ModelProto):
        return made.SerializeToString(deterministic=True)
    return b"".join(tensor.numpy().tobytes() for tensor in made.state_dict().values())


@contextlib.contextmanager
def stopped(name: str, at: int, before: bool) -> Iterator[None]:
    """What stops at a call of a method of the journal's, before it does its work or behind it."""
    plain, calls = getattr(Journal, name), 0

    def counted(self: Journal, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and before:
            raise StopError
        made = plain(self, *args, **options)
        if calls == at:
            raise StopError
        return made

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(StopError):
        patch.setattr(Journal, name, counted)
        yield
        raise AssertionError("nothing stopped it")


# A method of the journal's, at which of its calls, whether before its work, and whether something was kept by then. There are 75 batches.
STAGES = [
    ("write", 50, True, False), ("stage_done", 1, True, False), ("stage_done", 1, False, True), ("write", 200, False, True),
    ("stage_done", 3, True, True), ("stage_done", 3, False, True),
]  # fmt: skip
PASSES = [("pass_done", 1, False, False), ("pass_done", 2, True, False), ("pass_done", 2, False, True)]


@pytest.mark.parametrize(
    ("make", "method", "budget", "moments"),
    [(residual, "exact", 1 << 30, STAGES[::2]), (residual, "exact", 0, STAGES), (residual, "prior", 1 << 30, STAGES[-1:])]
    + [(residual, method, 0, PASSES) for method in ("precise", "ioffe-szegedy", "moving-average")]
    + [(module, "exact", 0, STAGES[2:5:2]), (module, "moving-average", 0, PASSES[-1:])],
)
def test_it_goes_on_wherever_it_stopped(
    make: Callable[[], Any], method: str, budget: int, moments: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"batch_size": 4, "method": method, "memory_budget": budget}
    wanted, _ = recalibrate(make(), X, **how)
    monkeypatch.setattr("bnfold.recalibration.journal.SHARE", 0)
    for number, (name, at, before, kept) in enumerate(moments):
        folder = tmp_path / str(number)
        with stopped(name, at, before):
            recalibrate(make(), X, **how, resume=folder)
        for has in (kept, True):
            fresh, report = recalibrate(make(), X, **how, resume=folder)
            assert numbers(fresh) == numbers(wanted)
            assert any("went on behind" in note for note in report.notes) == has
        assert not list(folder.rglob("*.values"))


def test_what_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one stage: the micro-batches that run behind a stop are those of the stages that were left."""
    from bnfold.backends.onnx.recalibration.stage import OnnxStage

    runs, plain = 0, OnnxStage.run

    def counted(self: OnnxStage, *args: Any) -> Any:
        nonlocal runs
        runs += 1
        return plain(self, *args)

    monkeypatch.setattr(OnnxStage, "run", counted)
    with stopped("stage_done", 3, True):
        recalibrate(residual(), X, batch_size=100, resume=tmp_path)
    assert runs == 9
    recalibrate(residual(), X, batch_size=100, resume=tmp_path)
    assert runs == 9 + 6


def test_as_many_samples_as_are_needed(tmp_path: Path) -> None:
    """Trials that are done are not measured again."""
    wanted, found = recalibrate(residual(), X, until=0.07)
    assert found.samples > 64
    with stopped("stage_done", 6, False):
        recalibrate(residual(), X, until=0.07, resume=tmp_path)
    fresh, report = recalibrate(residual(), X, until=0.07, resume=tmp_path)
    assert numbers(fresh) == numbers(wanted)
    assert report.samples == found.samples


def other_model() -> onnx.ModelProto:
    proto = residual()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[::-1]
    return proto


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("model", {"model": other_model()}),
        ("data set", {"batches": X + 1}),
        ("data set", {"batches": np.concatenate([X[:-1], X[:1]])}),
        ("method", {"method": "prior"}),
        ("choice of layers", {"skip_layers": ["*0"]}),
        ("batch size", {"batch_size": 50}),
    ],
)
def test_another_run_is_told(what: str, change: dict[str, Any], tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": residual(), "batches": X, "batch_size": 100, "resume": tmp_path}
    recalibrate(**given)
    with pytest.raises(UsageError, match=f"measured with another {what}.*another folder"):
        recalibrate(**given | change)


def test_a_generator_that_gives_other_samples_is_told(tmp_path: Path) -> None:
    def batches(x: np.ndarray) -> Iterator[np.ndarray]:
        yield from np.split(x, 3)

    wanted, _ = recalibrate(residual(), batches(X), resume=tmp_path)
    again, _ = recalibrate(residual(), batches(X), resume=tmp_path)
    assert numbers(again) == numbers(wanted)
    with pytest.raises(UsageError, match="another data set"):
        recalibrate(residual(), batches(X + 1), resume=tmp_path)


def test_damaged_files_are_told(tmp_path: Path) -> None:
    with stopped("stage_done", 2, False):
        recalibrate(residual(), X, resume=tmp_path)
    (values,) = sorted(tmp_path.rglob("*.values"))[-1:]
    values.write_bytes(values.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged"):
        recalibrate(residual(), X, resume=tmp_path)
    next(tmp_path.rglob("stage-0.npz")).write_bytes(b"no archive")
    with pytest.raises(DataError, match="--resume"):
        recalibrate(residual(), X, resume=tmp_path)


def test_two_at_once_are_told(tmp_path: Path) -> None:
    def batches() -> Iterator[np.ndarray]:
        yield X[:100]
        with pytest.raises(UsageError, match="another process is at work there"):
            recalibrate(residual(), batches(), resume=tmp_path)
        yield X[100:]

    _, report = recalibrate(residual(), batches(), resume=tmp_path)
    assert report.samples == 300


KILLED = """
import os, signal, sys
from bnfold.recalibration.journal import Journal

def killing(name, at, before):
    plain, calls = getattr(Journal, name), 0
    def run(self, *args, **options):
        nonlocal calls
        calls += 1
        if calls == at and before:
            os.kill(os.getpid(), signal.SIGKILL)
        made = plain(self, *args, **options)
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return made
    setattr(Journal, name, run)

killing(sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1) == "before")
from bnfold.cli import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_killed_on_the_command_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    if kind == "onnx":
        onnx.save(residual(), "m.onnx")
        model, out = ["m.onnx"], "out.onnx"
    else:
        torch.save(module().state_dict(), "m.pth")
        model, out = ["m.pth", "--arch", f"{__file__}:module"], "out.pth"
    base = ["recalibrate", *model, "--data", "x.npy", "-q"]
    assert command([*base, "-o", f"whole-{out}"]) == 0
    moments = [("write", 50, "before"), ("stage_done", 2, "before"), ("stage_done", 2, "behind")]
    for name, at, before in moments if kind == "onnx" else moments[1:2]:
        line = [sys.executable, "-c", KILLED, name, str(at), before, *base, "-o", out, "--resume", "kept"]
        run = subprocess.run(line, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
        assert run.returncode == -signal.SIGKILL
        assert not Path(out).exists()
    assert command([*base, "-o", out, "--resume", "kept", "--report", "r.json"]) == 0
    assert any("went on behind stage" in note for note in json.loads(Path("r.json").read_text())["notes"])
    assert Path(out).read_bytes() == Path(f"whole-{out}").read_bytes()


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """A limit on the size of a file, in the place of a disk that is full."""
    onnx.save(residual(), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", X)
    command = [sys.executable, "-m", "bnfold", "recalibrate", "m.onnx", "--data", "x.npy", "-o", "out.onnx", "--resume", "kept", "-q"]

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))

    full = subprocess.run(command, cwd=tmp_path, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert full.returncode == 2
    assert full.stderr.count("\n") == 1
    assert "can't be written to (File too large): make room there" in full.stderr
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0


@pytest.mark.slow
def test_a_lost_process_and_those_that_go_on(tmp_path: Path) -> None:
    """One of two is killed before it has its record of the second stage, the other has its own: both go on behind the first."""
    onnx.save(residual(), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "killed.py").write_text(KILLED.replace("at and before:", "at and before and os.environ['RANK'] == '1':"))
    (tmp_path / "whole.py").write_text("import sys\nfrom bnfold.cli import run\nsys.exit(run(sys.argv[1:]))\n")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    base = ["recalibrate", "m.onnx", "--data", "x.npy", "-o", "out.onnx", "--resume", "kept", "--report", "r.json"]
    how: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}}
    lost = subprocess.run([*start, "killed.py", "stage_done", "2", "before", *base], **how, check=False, capture_output=True, timeout=120)
    assert lost.returncode != 0
    assert b"has stopped" in lost.stderr
    subprocess.run([*start, "whole.py", *base], **how, check=True, timeout=120)
    assert any("went on behind stage 1 " in note for note in json.loads((tmp_path / "r.json").read_text())["notes"])
    wanted, made = (onnx.load_from_string(numbers(each)) for each in (recalibrate(residual(), X)[0], onnx.load(tmp_path / "out.onnx")))
    for one, other in zip(wanted.graph.initializer, made.graph.initializer, strict=True):
        np.testing.assert_allclose(onnx.numpy_helper.to_array(one), onnx.numpy_helper.to_array(other), rtol=1e-6, atol=1e-6)
