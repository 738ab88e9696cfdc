"""The command line on PyTorch models, as their users have them: checkpoints with an architecture, exported programs, modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from modules import lively

import bnfold
from bnfold.backends.torch.export.call import random_example
from bnfold.backends.torch.export.copies import duplicate
from bnfold.backends.torch.export.trace import trace
from bnfold.backends.torch.files.load import build
from bnfold.cli import run
from tests.backends.torch.test_torch_files import FACTORY

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with net.py, a checkpoint c.pth, a program m.pt2, a module whole.pt, data x.npy and d.npz."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FACTORY)
    torch.manual_seed(0)
    net = lively(build("net.py:make", None))
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, "c.pth")
    torch.save(net, "whole.pt")
    x = torch.randn(2, 1, 8, 8)
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), "m.pt2")
    data = np.random.default_rng(0).standard_normal((30, 1, 8, 8)).astype(np.float32)
    np.save("x.npy", data)
    np.savez("d.npz", x=data, labels=np.arange(30) % 5)
    return tmp_path


ARCH = ["--arch", "net.py:make"]
SHAPE = ["--input-shape", "1,1,8,8"]


def test_a_checkpoint_becomes_each_of_its_forms(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in ("f.safetensors", "f.pth", "f.pt2", "f.onnx"):
        assert run(["fuse", "c.pth", *ARCH, *SHAPE, "-o", out]) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith("1 of 1 folded, ")
        assert "names of the weights begin with 'module.'" in printed.err
        assert run(["verify", "c.pth", out, *ARCH, "--data", "x.npy"]) == 0
        assert capsys.readouterr().out.startswith("equivalent, ")
    onnx.checker.check_model(onnx.load("f.onnx"))


def test_a_program_made_of_a_checkpoint_is_called_by_position(here: Path) -> None:
    for number, line in enumerate(
        (["fuse", "c.pth", *SHAPE], ["recalibrate", "c.pth", "--data", "d.npz"], ["pipeline", "c.pth", "--data", "d.npz"])
    ):
        assert run([*line, *ARCH, "-o", f"{number}.pt2"]) == 0
        assert torch.export.load(f"{number}.pt2").module()(torch.randn(3, 1, 8, 8)).shape == (3, 5)


def test_the_whole_way(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, more, out in (("c.pth", ARCH, "p.safetensors"), ("m.pt2", [], "p.pt2"), ("whole.pt", ["--trust-pickle"], "p.pt")):
        assert run(["pipeline", model, *more, "--data", "d.npz", "-o", out, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["verify"]["verdict"] == "equivalent"
        assert report["fuse"]["batchnorms"] == {"before": 1, "after": 0}
        assert report["recalibrate"]["samples"] == report["accuracy_before"]["samples"] == 30
        assert Path(out).is_file()


def test_recalibrated_weights_keep_their_kind(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recalibrate", "c.pth", *ARCH, "--data", "x.npy", "-o", "r.pt", "--batch-size", "4"]) == 0
    state = torch.load("r.pt", weights_only=True)
    assert set(state) == set(build("net.py:make", None).state_dict())
    assert run(["recalibrate", "m.pt2", "--data", "x.npy", "-o", "r.pt2"]) == 0
    capsys.readouterr()
    assert run(["inspect", "r.pt2", *ARCH]) == 0
    out, err = capsys.readouterr()
    assert " operators to " in out.splitlines()[0]
    assert err == "bnfold: r.pt2: an exported program holds its network, so --arch isn't used\n"
    program = bnfold.load("r.pt2")
    assert torch.allclose(program.state_dict["bn.running_mean"], state["bn.running_mean"], rtol=1e-5)


def test_either_side_may_be_of_the_other_framework(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "m.pt2", "-o", "f.onnx", "-q"]) == 0
    assert run(["verify", "m.pt2", "c.pth", *ARCH, "--input-shape", "2,1,8,8"]) == 6  # nothing is folded
    assert run(["verify", "f.onnx", "c.pth", *ARCH, "--provider", "cpu"]) == 0
    assert run(["bench", "m.pt2", "f.onnx", "--rounds", "5", "-q"]) == 0
    assert "candidate / reference" in capsys.readouterr().out


# How often torch.export, which takes its time, reads a module: the model and the recalibrated one once each.
EXPORTS = {
    "inspect c.pth --input-shape 1,1,8,8": 1,
    "fuse c.pth --input-shape 1,1,8,8 -o f.pth": 1,
    "recalibrate c.pth --data x.npy -o r.pth": 1,
    "recalibrate c.pth --data d.npz --eval d.npz --input-shape 1,1,8,8 -o r.pth": 2,
    "verify c.pth c.pth --input-shape 1,1,8,8": 2,
    "verify c.pth c.pth --data x.npy --input-shape 1,1,8,8": 2,
    "pipeline c.pth --data d.npz --eval d.npz --input-shape 1,1,8,8 -o p.pth": 2,
}


@pytest.mark.parametrize("line", EXPORTS)
def test_a_module_is_read_no_more_often_than_it_changes(line: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, count = torch.export.export, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return read(*args, **kwargs)

    monkeypatch.setattr("torch.export.export", counted)
    assert run([*line.split(), *ARCH]) in (0, 6)
    assert count[0] == EXPORTS[line]


def test_what_was_read_serves_its_own_module_alone_and_as_it_was_read(here: Path) -> None:
    net, x = build("net.py:make", None), torch.randn(2, 1, 8, 8)
    whole, small = trace(net, x), trace(net, x, one_size=True)
    assert trace(net, whole) is trace(net, whole, evaluation=True) is trace(net, whole, one_size=True) is whole
    assert trace(net, small) is not small
    other = trace(duplicate(net), whole)
    assert other.model is not net
    assert torch.equal(other.example.args[0], x)
    net.train()
    assert trace(net, whole, evaluation=True) is not whole


PAIRS = """
import torch
from torch import nn

class Pairs(nn.Module):  # rows that integers point at
    def __init__(self):
        super().__init__()
        self.l, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8)

    def forward(self, x, idx):
        return torch.relu(self.b(self.l(x[idx].mean(1))))

class Words(Pairs):
    def forward(self, x, idx):
        return torch.relu(self.b(self.l(x * idx.sum(1, keepdim=True))))
"""


def test_data_by_name_are_cut_only_where_they_are_samples(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example that a file gives a module, which stays in the program: a graph's nodes can't be cut."""
    Path("pairs.py").write_text(PAIRS)
    rng = np.random.default_rng(0)
    np.savez("p.npz", x=rng.standard_normal((9, 4)).astype(np.float32), idx=rng.integers(0, 9, (9, 3)))
    for name, kept, said in (("Pairs", 9, "1 sample"), ("Words", 2, "9 samples")):
        torch.save(lively(build(f"pairs.py:{name}", None)).state_dict(), "p.pth")
        line = ["p.pth", "--arch", f"pairs.py:{name}", "--data", "p.npz"]
        assert run(["recalibrate", *line, "-o", f"{name}.pt2"]) == 0
        assert said in capsys.readouterr().out
        assert [len(tensor) for tensor in torch.export.load(f"{name}.pt2").example_inputs[0]] == [kept, kept]
        assert run(["pipeline", *line, "-o", f"{name}.pth"]) == 0


TABULAR = """
import torch
from torch import nn


class Tabular(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.bn, self.head = nn.Embedding(2, 3), nn.BatchNorm1d(3 * 4 + 5), nn.Linear(3 * 4 + 5, 2)

    def forward(self, ids, mask, x):
        rows = torch.where(mask[..., None], self.table(ids), 0.0)
        return self.head(self.bn(torch.cat([rows.flatten(1), x], 1)))


def make():
    return Tabular()
"""


def test_inputs_that_are_integers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("tabular.py").write_text(TABULAR)
    torch.save(lively(build("tabular.py:make", None)).state_dict(), "t.pth")
    known = ["--arch", "tabular.py:make"]
    for name in ("ids=1,4:int64", "mask=1,4:bool", "x=1,5"):
        known += ["--input-shape", name]
    assert run(["fuse", "t.pth", *known, "-o", "f.pth"]) == 0
    assert "1 of 1 folded, " in capsys.readouterr().out
    assert run(["verify", "t.pth", "f.pth", *known]) == 0
    assert run(["fuse", "t.pth", *known, "-o", "f.pt2"]) == 0
    assert run(["verify", "t.pth", "f.pt2", *known]) == 0
    assert run(["verify", "f.pt2", "f.pth", *known]) == 0
    made = random_example(build("tabular.py:make", None), {"ids": [50], "x": [2]}, {"ids": "int32"})
    assert (made.kwargs["ids"].dtype, set(made.kwargs["ids"].tolist()), made.kwargs["x"].dtype) == (torch.int32, {0, 1}, torch.float32)
    assert run(["inspect", "t.pth", "--arch", "tabular.py:make", "--input-shape", "ids=1,4", "--input-shape", "x=1,5"]) == 4
    assert "torch.export can't read Tabular" in capsys.readouterr().err


NONSENSE = {
    "inspect c.pth": (2, "weights without a network; say what builds it, with --arch"),
    "inspect c.pth --arch net.py:make": (2, "give an example of its input, such as --input-shape 1,3,224,224"),
    "inspect c.pth --arch net.py:make --input-shape 1,x": (2, "--input-shape 1,x: not a shape"),
    "inspect c.pth --arch net.py:make --input-shape x=1,1,8,8:int46": (2, "'int46' is no type for an input; give one of float32, int64, "),
    "inspect c.pth --arch net.py:make --input-shape 1,1,8,8:": (2, "--input-shape 1,1,8,8:: '' is no type for an input"),
    "verify m.pt2 m.pt2 --input-shape x=2,1,8,8:int64": (2, "--input-shape x=...:int64: the model takes float32 there"),
    "inspect whole.pt": (3, "give --trust-pickle if you trust where it comes from"),
    "fuse m.pt2 -o f.pt2 --input-shape z=2,1,8,8": (2, "--input-shape z=2,1,8,8: the model has no input 'z'; its inputs are"),
    "inspect m.pt2 --input-shape z=2,1,8,8": (2, "--input-shape z=2,1,8,8: the model has no input 'z'; its inputs are"),
    "inspect m.pt2 --input-shape 1,1,9,9": (2, "8, 8); (1, 1, 9, 9) doesn't fit it"),
    "recalibrate m.pt2 --data x.npy -o f.pt2 --input-shape 1,1,9,9": (2, "8, 8); (1, 1, 9, 9) doesn't fit it"),
    "fuse m.pt2 -o f.pt2 --input-shape 2,1,x": (2, "--input-shape 2,1,x: not a shape"),
    "fuse m.pt2 -o f.safetensors": (2, "f.safetensors: the name must end in .pt2 or .onnx, such as f.pt2"),
    "fuse m.pt2 -o m.pt2": (2, "m.pt2: this is an input"),
    "recalibrate m.pt2 --data x.npy -o f.pt2 --provider cpu": (2, "--provider cpu: that is for ONNX models; for PyTorch give --device"),
    "recalibrate m.pt2 --data x.npy -o f.pt2 --device tpu": (2, "PyTorch models run on cpu or cuda, not on 'tpu'"),
    "recalibrate m.pt2 --data net.py:nope -o f.pt2": (2, "nope"),
}


@pytest.mark.parametrize("line", NONSENSE)
def test_bad_input_is_one_line(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in here.iterdir()} | {"__pycache__"}
    status, text = NONSENSE[line]
    found = run(line.split())
    out, err = capsys.readouterr()
    assert text in err
    assert found in (status, 3)
    assert out == ""
    assert "Traceback" not in err
    assert {path.name for path in here.iterdir()} <= before


def test_a_device_that_isnt_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert run(["recalibrate", "m.pt2", "--data", "x.npy", "-o", "f.pt2", "--device", "cuda"]) == 5
    assert "device cuda isn't available" in capsys.readouterr().err


def test_a_process_of_its_own(here: Path) -> None:
    """As a user runs it; and a command on ONNX files never imports torch."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bnfold", "fuse", "m.pt2", "-o", "f.onnx"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "written: f.onnx" in done.stdout) == (0, True), done.stderr
    code = "import sys; from bnfold.cli import run; status = run(['inspect', 'f.onnx']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False).returncode == 0
