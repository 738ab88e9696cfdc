"""Files whose quantisation makes no sense: one line that says which operator, what is wrong and what to do, and status 3."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from cases import Net

import bnfold
from bnfold.errors import ModelError

ONES = np.full(6, 0.01)
TROUBLES: dict[str, tuple[dict[str, Any], str]] = {
    "a scale of 0": ({"scale": ONES * [1, 0, 1, 1, 1, 1]}, "a scale of it is 0 at place 1, where it must be a number other than 0"),
    "a scale that is no number": ({"scale": np.nan}, "a scale of it is nan, where it must be a number other than 0"),
    "an infinite scale": ({"scale": np.inf}, "a scale of it is inf"),
    "too few scales": ({"scale": ONES[:5], "zero": np.zeros(5, np.int8)}, r"scales have the shape \(5\), where axis 0 asks for \(6\)"),
    "too few zero points": ({"zero": np.zeros(5, np.int8)}, r"zero points have the shape \(5\), and its scales \(6\)"),
    "zero points of another type": ({"zero": np.zeros(6, np.uint8)}, "its zero point is uint8, and its integers are int8"),
    "an axis beyond the last": ({"axis": 4}, "its axis is 4, and what it quantises has 4 axes"),
    "an axis before the first": ({"axis": -5}, "its axis is -5, and what it quantises has 4 axes"),
    "a matrix of scales": ({"scale": ONES.reshape(6, 1), "zero": np.zeros((6, 1), np.int8)}, "must be one number, or one for each place"),
    "blocks of another size": (
        {"scale": np.full((6, 3, 3, 3), 0.01), "zero": np.zeros((6, 3, 3, 3), np.int8), "axis": 1, "block_size": 2},
        r"where axis 1 in blocks of 2 asks for \(6, 2, 3, 3\)",
    ),
}


def drawn(*, scale: Any = ONES, zero: Any = None, axis: int = 0, rounded: bool = False, act: bool = False, **attrs: Any) -> onnx.ModelProto:
    """act: of activations. rounded: of a float weight."""
    net = Net("quantisation", opset=21)
    x = net.input("N", 4, "H", "W")
    scale = np.asarray(scale, np.float32)
    ends = net.constant(scale), net.constant(np.zeros(scale.shape, np.int8) if zero is None else zero)
    stored = net.filters(6, 4, 3, 3) if rounded else net.constant(net.rng.integers(-100, 100, (6, 4, 3, 3)).astype(np.int8))
    if act:
        x, stored = net.op("DequantizeLinear", net.op("QuantizeLinear", x, *ends), *ends), net.filters(6, 4, 3, 3)
    elif rounded:
        stored = net.op("QuantizeLinear", stored, *ends, axis=axis, **attrs)
    w = stored if act else net.op("DequantizeLinear", stored, *ends, axis=axis, **attrs)
    net.output(net.bn(net.op("Conv", x, w), 6))
    return net.model()


@pytest.mark.parametrize("name", TROUBLES)
def test_what_makes_no_sense_is_refused(name: str) -> None:
    how, text = TROUBLES[name]
    model = drawn(**how)
    with pytest.raises(ModelError, match=text):
        bnfold.fuse(model)
    if "another type" not in name:
        rounded = drawn(**how, rounded=True)
        with pytest.raises(ModelError, match=f"^QuantizeLinear 'QuantizeLinear_node_0' is not valid: .*{text}"):
            bnfold.inspect(rounded)


def test_activations_are_asked_too() -> None:
    for scale in (0.0, np.nan):
        with pytest.raises(ModelError, match="QuantizeLinear 'QuantizeLinear_node_0' is not valid"):
            bnfold.verify(drawn(scale=scale, act=True), drawn(scale=0.01, act=True))


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    onnx.save(drawn(scale=0.0), tmp_path / "model.onnx")
    command = [sys.executable, "-m", "bnfold", "fuse", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "out.onnx")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 3
    assert run.stderr.count("\n") == 1, run.stderr
    assert "a scale of it is 0, where it must be a number other than 0; export the model again" in run.stderr
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("kind", [np.int8, ml_dtypes.int4, ml_dtypes.uint4])
def test_a_file_of_packed_integers_is_read_and_written(kind: Any, tmp_path: Path) -> None:
    net = Net("packed", opset=21)
    info = ml_dtypes.iinfo(kind)
    codes = net.rng.integers(int(info.min), int(info.max) + 1, (64, 16, 3, 3)).astype(kind)
    scale, zero = net.weight(net.rng.uniform(0.01, 0.02, 64)), net.constant(np.full(64, int(info.min) // 2 + 3).astype(kind))
    w = net.op("DequantizeLinear", net.constant(codes), scale, zero, axis=0)
    net.output(net.bn(net.op("Conv", net.input("N", 16, "H", "W"), w), 64))
    onnx.save(net.model(), tmp_path / "model.onnx")
    fused, report = bnfold.fuse(bnfold.load(tmp_path / "model.onnx"))
    assert report.batchnorms.after == 0, report.layers[0].reason
    bnfold.save(fused, tmp_path / "fused.onnx")
    found = next(t for t in onnx.load(tmp_path / "fused.onnx").graph.initializer if list(t.dims) == [64, 16, 3, 3])
    made = onnx.numpy_helper.to_array(found)
    assert made.dtype == codes.dtype
    np.testing.assert_array_equal(made[1::2].astype(int), codes[1::2].astype(int))
    assert bnfold.verify(bnfold.load(tmp_path / "model.onnx"), bnfold.load(tmp_path / "fused.onnx")).verdict == "equivalent"
