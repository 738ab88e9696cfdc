"""What folding does to the ranges of weights, and where a quantiser with one scale for a tensor would suffer from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import Net
from modules import Net as Module
from modules import folded
from onnx import numpy_helper
from torch import nn

import bnfold
from bnfold.cli import run
from bnfold.report import WeightRange


def spread(net: Net, gammas: list[float]) -> None:
    """A convolution whose BatchNorm multiplies its channels by so much."""
    y = net.conv(net.input("N", 3, "H", "W"), 3, len(gammas), 3, bias=False, weight=net.weight(net.normal(len(gammas), 3, 3, 3), "filters"))
    ones, zeros = np.ones(len(gammas)), np.zeros(len(gammas))
    stored = [net.weight(np.array(each)) for each in (gammas, zeros, zeros, ones)]
    net.output(net.op("BatchNormalization", y, *stored, epsilon=0.0))


def ranges(net: Net) -> tuple[onnx.ModelProto, tuple[WeightRange, ...]]:
    fused, report = bnfold.fuse(net.model())
    return fused, report.ranges


def quantised(weight: np.ndarray) -> np.ndarray:
    """Int8 with one scale for the tensor, by ONNX Runtime."""
    scale = np.float32(np.abs(weight).max() / 127)
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    constants = [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(np.int8(0), "z")]
    graph = onnx.helper.make_graph(nodes, "q", [value("w", 1, weight.shape)], [value("y", 1, weight.shape)], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"w": weight})[0])


def median_error(weight: np.ndarray) -> float:
    rows, other = weight.reshape(len(weight), -1), quantised(weight).reshape(len(weight), -1)
    return float(np.median(np.median(np.abs(rows - other), axis=1) / np.median(np.abs(rows), axis=1)))


@pytest.mark.parametrize("largest", [2.0, 400.0])
def test_the_range_before_and_after_and_the_error_of_int8(largest: float) -> None:
    net = Net("spread")
    spread(net, [2.0, 2.0, 2.0, 2.0, largest])
    model = net.model()
    fused, (found,) = ranges(net)
    for proto, ratio, error in ((model, found.before, found.error_before), (fused, found.after, found.error)):
        weight = next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.startswith("filters"))
        channels = np.abs(weight).max(axis=(1, 2, 3))
        assert ratio == pytest.approx(channels.max() / np.median(channels), rel=1e-6)
        assert error == pytest.approx(median_error(weight), rel=1e-3)
    assert bool(found.warning) == (largest > 2)
    if largest > 2:
        assert found.warning.endswith(", from the fold: use a scale for each channel, or --equalise")


def test_merged_branches_with_outliers_in_each_channel_are_told_apart() -> None:
    """RepVGG's: the identity's BatchNorm puts one large number into each channel, which no scale per channel helps."""

    def draw(net: Net, identity: float) -> None:
        x = net.relu(net.input("N", 6, "H", "W"))
        y = net.conv(x, 6, 6, 3, bias=False, pads=1)
        ones, zeros = np.ones(6), np.zeros(6)
        stored = [net.weight(each) for each in (identity * ones, zeros, zeros, ones)]
        net.output(net.op("Add", y, net.op("BatchNormalization", x, *stored, epsilon=0.0)))

    mild, wild = Net("repvgg"), Net("repvgg")
    draw(mild, 0.5)
    draw(wild, 50.0)
    assert [each.warning for each in ranges(mild)[1]] == [""]
    (found,) = ranges(wild)[1]
    assert found.after < 1.1
    assert found.warning.startswith("int8 with one scale puts the weights of its median channel off by ")
    assert found.warning.endswith("%, from merging branches: a scale for each channel is no help, --equalise may be")


def test_channels_of_zeros_and_weights_that_stay_count_for_nothing() -> None:
    net = Net("dead")
    spread(net, [0.0, 0.0, 0.0, 0.0, 1.0])
    assert [(each.after, each.error < 0.02, each.warning) for each in ranges(net)[1]] == [(1.0, True, "")]
    empty = Net("all dead")
    spread(empty, [0.0, 0.0])
    assert [(each.after, each.error) for each in ranges(empty)[1]] == [(1.0, 0.0)]


def test_module_and_program_report_the_same_also_of_linear_and_transposed_layers() -> None:
    def forward(net: Module, x):
        return net.last(net.norm2(net.up(net.norm1(net.conv(x)).relu())).relu().mean((2, 3)))

    parts = {
        "conv": nn.Conv2d(3, 6, 3),
        "norm1": nn.BatchNorm2d(6),
        "up": nn.ConvTranspose2d(6, 4, 2, groups=2),
        "norm2": nn.BatchNorm2d(4),
    }
    net = Module(forward, **parts, last=nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))).eval()
    net.norm1.weight.data[2], net.norm2.weight.data[1], net.last[1].weight.data[4] = 300.0, 300.0, 300.0
    (_, report), (_, other) = folded(net, torch.randn(2, 3, 8, 8))
    assert [each.name for each in report.ranges] == ["conv", "up", "last.0"]
    assert all(each.after > 50 and each.warning for each in report.ranges)
    assert [(a.before, a.after, a.error) for a in report.ranges] == [(b.before, b.after, b.error) for b in other.ranges]


def test_the_command_shows_ranges_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net("spread")
    spread(net, [1.0, 1.0, 1.0, 1.0, 200.0])
    onnx.save(net.model(), tmp_path / "model.onnx")
    assert run(["inspect", str(tmp_path / "model.onnx"), "--report", str(tmp_path / "report.json")]) == 0
    shown = capsys.readouterr().out.splitlines()
    (found,) = json.loads((tmp_path / "report.json").read_text())["ranges"]
    assert found.keys() == {"name", "before", "after", "error_before", "error", "warning"}
    assert "weight range" in shown[1]
    assert f"{found['before']:.3g} to {found['after']:.3g}" in shown[2]
    assert f"{found['warning']} ({found['name']})" in shown
