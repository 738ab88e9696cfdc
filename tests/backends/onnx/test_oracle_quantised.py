"""The oracle's operators on integer codes: as ONNX Runtime computes them, and without their rounding or moved across it by chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import Net
from cases.quantised import rounded, weight
from single import close, normal, on_ort, one

from bnfold.backends.onnx.model import OnnxModel
from bnfold.backends.onnx.oracle.quantised import REACH

RNG = np.random.default_rng(0)
Q = RNG.integers(0, 256, (2, 4, 6, 6)).astype(np.uint8)
W = RNG.integers(-128, 128, (6, 4, 3, 3)).astype(np.int8)
A, B = RNG.integers(0, 256, (3, 5)).astype(np.uint8), RNG.integers(-128, 128, (5, 4)).astype(np.int8)
U8, I8 = np.array(120, np.uint8), np.array(3, np.int8)
EACH = np.linspace(0.002, 0.006, 6, dtype=np.float32)


def f32(value: float) -> np.ndarray:
    return np.array(value, np.float32)


CASES: dict[str, tuple[str, list[np.ndarray], dict[str, Any]]] = {
    "QuantizeLinear": ("QuantizeLinear", [RNG.normal(0, 3, (2, 4, 5)).astype(np.float32), f32(0.03), U8], {}),
    "QuantizeLinear, axis": (
        "QuantizeLinear",
        [RNG.normal(0, 3, (2, 6)).astype(np.float32), 4 * EACH, np.arange(6, dtype=np.int8)],
        {"axis": 1},
    ),
    "QuantizeLinear, halves": ("QuantizeLinear", [np.arange(-6, 7, dtype=np.float32) / 2, f32(1)], {}),
    "QuantizeLinear, int16": ("QuantizeLinear", [RNG.normal(0, 3, (2, 6)).astype(np.float32), f32(1e-4), np.array(7, np.int16)], {}),
    "DynamicQuantizeLinear": ("DynamicQuantizeLinear", [RNG.normal(1, 3, (2, 4, 5)).astype(np.float32)], {}),
    "DynamicQuantizeLinear, positive": ("DynamicQuantizeLinear", [RNG.uniform(2, 3, (2, 4)).astype(np.float32)], {}),
    "ConvInteger": ("ConvInteger", [Q, W.view(np.uint8), U8, np.array(128, np.uint8)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "MatMulInteger": ("MatMulInteger", [A, B, U8, np.arange(4, dtype=np.int8)], {}),
    "QLinearConv": (
        "QLinearConv",
        [Q, f32(0.02), U8, W, EACH, np.zeros(6, np.int8), f32(0.3), U8, RNG.integers(-9000, 9000, 6).astype(np.int32)],
        {"pads": [1, 1, 1, 1]},
    ),
    "QLinearMatMul": ("QLinearMatMul", [A, f32(0.02), U8, B, f32(0.01), I8, f32(0.2), U8], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_codes_are_those_of_the_runtime(name: str) -> None:
    op, arrays, attributes = CASES[name]
    outputs = 3 if op.startswith("Dynamic") else 1
    mine, theirs = (run(op, arrays, opset=21, outputs=outputs, **attributes) for run in (one, on_ort))
    for got, want in zip(*((found if outputs > 1 else (found,)) for found in (mine, theirs)), strict=True):
        if want.dtype.kind == "f":
            close(got, want, 1e-6)
        else:
            assert got.dtype == want.dtype
            assert (got != want).mean() < 0.01, "but for what lies on a step of float32"
            assert np.abs(got.astype(int) - want.astype(int)).max() <= 1


def test_a_model_without_its_rounding_is_continuous() -> None:
    """What isn't rounded is cut to the range of the codes alone; a weight that is rounded stays so."""
    net = Net("continuous", opset=19)
    x = rounded(net, net.input("N", 4, 5, 5), zero=10, scale=0.1)
    net.output(net.op("Conv", x, weight(net, (6, 4, 3, 3), float_first=True)), x)
    model = OnnxModel(net.model())
    unrounded = model.unrounded()
    assert unrounded is not None
    data = {"x": normal(2, 4, 5, 5, dtype=np.float32)}
    with_steps, without = model.exact().run(data), unrounded.exact().run(data)
    codes, cut = (list(found.values())[1] for found in (with_steps, without))
    np.testing.assert_allclose(cut, np.clip(data["x"].astype(float), -1, 24.5), atol=1e-7)
    assert 0 < np.abs(codes - cut).max() <= 0.05 + 1e-9
    assert np.abs(codes / 0.1 - np.rint(codes / 0.1)).max() < 1e-6
    name = net.nodes[3].output[0]
    close(next(iter(without.values())), one("Conv", [cut, model.exact(outputs=[name]).run(data)[name]]))


def test_moved_activations_fall_on_other_sides_of_steps() -> None:
    net = Net("moved", opset=19)
    net.output(rounded(net, net.input("N", 4000), scale=0.1))
    model = OnnxModel(net.model())
    data = {"x": normal(2, 4000, dtype=np.float32)}
    plain, moved, other = (model.exact(jitter=seed).run(data).popitem()[1] for seed in (None, 1, 2))
    share = (np.abs(moved - plain) > 0.05).mean()
    assert REACH / 3 < share < REACH, "half of those within the reach of a step"
    assert (moved != other).any()
    assert model.unrounded() is not None


def test_a_model_that_rounds_weights_alone_is_its_own() -> None:
    net = Net("weights alone", opset=19)
    net.output(net.op("Conv", net.input("N", 4, 5, 5), weight(net, (6, 4, 3, 3), float_first=True)))
    assert OnnxModel(net.model()).unrounded() is None
