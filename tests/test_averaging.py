"""Averaged checkpoints: the mean of the weights, statistics measured afresh, and the scores of both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import bnfold
from bnfold.cli import run


def arrays(path: str) -> dict[str, np.ndarray]:
    return {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


def test_files_of_onnx(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["average", "model.onnx", "another.onnx", "--data", "x.npy", "-o", "mean.onnx", "--html", "mean.html"]) == 0
    assert "<h1>bnfold average: model.onnx, another.onnx</h1>" in Path("mean.html").read_text(encoding="utf-8")
    assert "mean.onnx" in capsys.readouterr().out
    one, other, mean = map(arrays, ("model.onnx", "another.onnx", "mean.onnx"))
    for name in ("weight", "bias", "gamma", "beta"):
        np.testing.assert_array_equal(mean[name], ((one[name].astype(float) + other[name]) / 2).astype(np.float32))
    measured, _ = bnfold.recalibrate(bnfold.load("mean.onnx"), np.load("x.npy"))
    for place in (3, 4):  # statistics are those of the data, and no mean of the two
        value = measured.graph.node(-1).inputs[place]
        np.testing.assert_array_equal(mean[value.name], value.const_value.numpy())
    assert run(["average", "model.onnx", "none.onnx", "--data", "x.npy", "-o", "odd.onnx"]) == 3
    assert "model 2 is of another network than the first" in capsys.readouterr().err
    assert run(["average", "model.onnx", "--data", "x.npy", "-o", "odd.onnx"]) == 2


def test_checkpoints(here: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layers = "nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)"
    Path("net.py").write_text(f"from torch import nn\ndef make():\n    return nn.Sequential({layers})\n")
    scope: dict[str, Any] = {}
    exec(Path("net.py").read_text(), scope)
    nets = [scope["make"]().eval() for _ in range(3)]
    for place, net in enumerate(nets):
        torch.save(net.state_dict(), f"{place}.pth")
    before = copy.deepcopy(nets[0].state_dict())
    mean, report = bnfold.average(nets, [torch.from_numpy(np.load("x.npy"))], weights=[1, 1, 2])
    expected = sum(share * net[0].weight.double() for share, net in zip((0.25, 0.25, 0.5), nets, strict=True)).float()
    assert torch.equal(mean[0].weight, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in nets[0].state_dict().items())
    assert report.layers[0].count
    np.savez("labelled.npz", x=np.load("x.npy"), labels=np.arange(24) % 2)
    line = ["average", "0.pth", "1.pth", "2.pth", "--arch", "net.py:make", "--data", "labelled.npz", "-o", "mean.pth"]
    assert run([*line, "--accept-harm", "--report", "r.json"]) == 0
    found = json.loads(Path("r.json").read_text())
    assert found["accuracy_before"]["samples"] == found["accuracy_after"]["samples"] == 24
    with pytest.raises(bnfold.ModelError, match="another network"):
        bnfold.average([nets[0], torch.nn.Conv2d(3, 4, 3)], [np.load("x.npy")])
