"""What the yardstick of `verify` moves, what counts as a measurement, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from cases import Net
from modules import Net as Module
from modules import lively, norm, weight
from torch import nn

import bnfold
from bnfold.backends.onnx.oracle import evaluator as oracle
from bnfold.backends.onnx.oracle.evaluator import moving
from bnfold.backends.torch.export.constants import weights
from bnfold.backends.torch.export.trace import trace
from bnfold.verification.noise import Errors, Noise, worst_part
from bnfold.verification.yardstick import FUNCTION_LIMIT, Scale, Truth, chance, deployed_ratio, function_ratio

UNIT = 2.0**-24

# --- what moves -------------------------------------------------------------------------------------------------------------------


def written_out(net: Net, y: str) -> str:
    """A layer normalisation as exporters without LayerNormalization write it."""
    centred = net.op("Sub", y, net.reduce("Mean", y, 1))
    variance = net.op("Add", net.reduce("Mean", net.op("Pow", centred, net.scalar(2.0)), 1), net.scalar(1e-5))
    return net.op("Div", centred, net.op("Sqrt", variance))


def normalised(net: Net) -> None:
    net.output(written_out(net, net.bn(net.conv(net.input("N", 3, 8, 8), 3, 8), 8)))


@pytest.mark.parametrize("exponent", [2.0, 3.0])
def test_a_layer_normalisation_written_out(exponent: float) -> None:
    """A negative number to the power of 1.9999999 is none."""

    def draw(net: Net) -> None:
        y = net.bn(net.conv(net.input("N", 3, 8, 8), 3, 8), 8)
        net.output(net.op("Pow", net.op("Sub", y, net.reduce("Mean", y, 1)), net.scalar(exponent)))

    for each in (draw, normalised):
        net = Net("norm", dtype="float32", opset=13)
        each(net)
        fused, report = bnfold.fuse(net.model())
        assert report.batchnorms.after == 0
        assert bnfold.verify(net.model(), fused).verdict == "equivalent"


def test_a_layer_normalisation_written_out_in_torch() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = s.b(s.c(x))
        centred = y - y.mean(1, keepdim=True)
        return centred / (centred.pow(s.two).mean(1, keepdim=True) + 1e-5).sqrt()

    torch.manual_seed(0)
    net = Module(forward, c=nn.Conv2d(3, 8, 3), b=norm(8), two=torch.full((8, 1, 1), 2.0)).eval()
    x = torch.randn(2, 3, 8, 8)
    fused, report = bnfold.fuse(net, example=x)
    assert report.batchnorms.after == 0
    assert bnfold.verify(net, fused, x).verdict == "equivalent"


def test_weights_are_told_from_settings() -> None:
    net = Net("settings", dtype="float32", opset=17)

    def held(name: str, *shape: int) -> str:
        return net.weight(1 + np.abs(net.normal(*shape)), name)

    x = net.op("Conv", net.input("N", 3, 8, 8), held("kernel", 4, 3, 1, 1), held("bias", 4))
    x = net.op("Mul", net.op("Cast", net.op("Transpose", held("scale", 1, 1, 4, 1), perm=[0, 2, 1, 3]), to=onnx.TensorProto.FLOAT), x)
    x = net.op("Div", net.op("Add", x, held("epsilon")), held("divisor"))
    x = net.op("Pow", x, held("exponent", 4, 1, 1))
    x = net.op("Clip", x, held("low"), held("high"))
    x = net.op("PRelu", x, held("slope", 4, 1, 1))
    x = net.op("Where", net.op("Greater", x, held("threshold", 4, 1, 1)), x, net.op("Max", x, held("bound", 4, 1, 1)))
    x = net.op("Resize", x, "", held("scales", 4))
    x = net.op("Mul", x, net.op("Gather", held("choices", 5), net.weight(np.array(1), "which", dtype=np.int64)))
    net.output(net.bn(net.op("Conv", x, held("single", 1, 4, 1, 1)), params=[held(name, 1) for name in ("gamma", "beta", "mean", "var")]))
    found = moving(ir.from_proto(net.model()))
    assert {name.partition("_")[0] for name in found} == {"kernel", "bias", "scale", "single", "gamma", "beta", "mean", "var"}


def test_weights_are_told_from_settings_in_torch() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = (s.b(s.c(x)) * s.scale.transpose(0, 1) + s.shift) / s.divisor
        y = torch.clamp(y, min=s.low, max=s.high).abs().pow(s.exponent)
        return s.r(torch.where(y > s.threshold, y, torch.maximum(y, s.bound)))[:, 0] @ s.matrix

    arrays = {name: weight(4, 1, 1) for name in ("shift", "low", "high", "exponent", "threshold", "bound")}
    parts = {"c": nn.Conv2d(3, 4, 1), "b": norm(4), "scale": weight(4, 1, 1, 1), "divisor": weight(1), "matrix": weight(8, 2)}
    recurrent = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 1, 1))
    net = Module(forward, **parts, **arrays, r=recurrent).eval()
    found = weights(trace(net, torch.randn(2, 3, 8, 8)).program)
    norms = {f"b.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    computed = {"r.bias", "r.parametrizations.weight.original0", "r.parametrizations.weight.original1"}
    assert found == {"c.weight", "c.bias", "scale", "shift", "matrix", *norms, *computed}


# --- what counts ------------------------------------------------------------------------------------------------------------------


def answering(*values: float) -> Any:
    """Runs that give an output of these numbers."""
    return lambda batch: {"y": np.array(values)}


def test_a_run_that_comes_to_nothing_is_drawn_again() -> None:
    truth = Truth(answering(1.0, 2.0), [{}])
    nothing, some = answering(np.nan, np.nan), answering(1 + 1e-7, 2 - 1e-7)
    truth.measure(lambda seed: nothing if seed < 2 else some)
    assert len(truth.noise["y"].runs) == 3
    assert truth.noise["y"].rms == pytest.approx(1e-7, rel=1e-6)
    assert "nan" in truth.noise["y"].problem


def test_a_number_that_does_not_come_out_is_left_out() -> None:
    noise = Noise()
    want = np.array([1.0, 2.0, 3.0, -np.inf])
    noise.add([want], [np.array([1 + 1e-7, np.inf, 3 - 1e-7, -np.inf])])
    noise.add([want], [np.array([1 + 1e-7, 2 + 1e-7, 3 - 1e-7, -np.inf])])
    assert [run.count for run in noise.runs] == [2, 3]
    np.testing.assert_allclose(noise.squares[0], [1e-14, 5e-15, 1e-14, 0], rtol=1e-6)


@pytest.mark.parametrize("moved", [answering(np.nan, np.nan), answering(1.0, 2.0), lambda batch: {"y": np.zeros(3)}])
def test_where_nothing_was_measured_the_depth_decides(moved: Any) -> None:
    """No number, none that moves, another shape: a right fold is told from a wrong one all the same."""
    truth = Truth(answering(1.0, 2.0), [{}], depth=lambda: 20)
    truth.measure(lambda seed: moved)
    scale = truth.scale("y", UNIT)
    assert scale.silent

    def ratio(error: float) -> float:
        return function_ratio(truth.compare(answering(1 + error, 2 - error))["y"], truth.noise["y"], scale)

    assert ratio(20 * UNIT) < FUNCTION_LIMIT < ratio(1e-3)


def test_a_channel_without_noise_goes_by_the_others() -> None:
    """Where one weight in twelve moves, none may in one channel."""
    want, noise = np.ones((2, 4, 8)), np.full((2, 4, 8), 1e-14)
    noise[:, 3] = 0
    assert worst_part(want, np.full(want.shape, 1e-7), noise)[0] < 2


def test_a_number_that_hangs_on_the_rounding_of_weights_is_inconclusive() -> None:
    """The root of a difference that is zero before rounding."""
    net = Net("root", dtype="float32", opset=17)
    x = net.input("N", 3, 8, 8)
    kernel, gamma = net.normal(4, 3, 1, 1).astype(np.float32), (0.5 + np.abs(net.normal(4))).astype(np.float32)
    held = [net.weight(a) for a in (gamma, np.zeros(4), np.zeros(4), np.ones(4))]
    scale = gamma.astype(np.float64) / np.sqrt(1 + np.float64(np.float32(1e-2)))
    y = net.bn(net.op("Conv", x, net.weight(kernel)), params=held)
    other = net.op("Conv", x, net.weight(kernel * scale.reshape(4, 1, 1, 1)))
    net.output(net.op("Sqrt", net.op("Sub", net.op("Tanh", y), net.op("Tanh", other))))
    _, report = bnfold.fuse(net.model())
    assert report.verify is not None
    assert report.verify.verdict == "inconclusive"
    assert "moved within their rounding" in report.verify.reason


@pytest.mark.parametrize(("depth", "passes"), [(3, False), (121, True)])
def test_a_few_roundings_of_a_deep_network_are_no_defect(depth: int, passes: bool) -> None:
    """A reference whose sums happen to be exact errs less than any other of its depth."""
    truth = Truth(answering(1.0), [{}], depth=lambda: depth)
    exact, candidate = Errors(), Errors()
    exact.add(np.array([UNIT]))
    candidate.add(np.array([9 * UNIT]))
    ratio = deployed_ratio(candidate, exact, Noise(), Scale(1.0, UNIT, 1, False), truth.roundings())
    assert (ratio < 2) is passes


def test_few_errors_scatter_by_chance() -> None:
    """Of errors of one size, the root mean square of a few comes out so many times too large in one of hundreds of draws, no more."""
    rng = np.random.default_rng(0)
    for count in (1, 3, 24, 1000):
        found = np.sqrt(np.square(rng.standard_normal((4000, count))).mean(1))
        assert 0.99 < (found < chance(count)).mean() <= 1
    assert chance(100_000) < 1.01


def test_noise_that_few_of_many_numbers_carry_counts_as_few() -> None:
    """Near a pole one of a thousand numbers errs, and by chance that one errs twice as much as the reference's."""
    rng = np.random.default_rng(0)
    for carriers in (1, 10, 1000):
        size, want = np.where(np.arange(1000) < carriers, 1.0, 1e-6), np.ones((1, 1000))
        noise = Noise()
        for _ in range(3):
            noise.add([want], [want + size])
        assert noise.spread == pytest.approx(carriers, rel=1e-3)
        found = np.sqrt(np.square(rng.standard_normal((400, 1000)) * size).sum(1) / np.square(size).sum())
        assert 0.99 < (found < chance(noise.spread)).mean() <= 1


@pytest.mark.parametrize("seed", [13, 26])
def test_a_right_export_with_few_outputs_is_no_other(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    net = lively(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(2), nn.Linear(64, 3))).eval()
    x = torch.randn(2, 1, 8, 8)
    bnfold.save(net, tmp_path / "net.onnx", example=x)
    assert bnfold.verify(net, bnfold.load(tmp_path / "net.onnx"), x).verdict == "equivalent"


# --- what it costs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [1, 2, 64, 300])
def test_a_check_costs_as_much_whatever_comes_out(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = oracle.Oracle.run
    monkeypatch.setattr(oracle.Oracle, "run", lambda self, feeds: (runs.append(len(next(iter(feeds.values()), []))), run(self, feeds))[1])
    net = Net("few", dtype="float32", opset=17)
    y = net.op("Flatten", net.op("GlobalAveragePool", net.relu(net.bn(net.conv(net.input(1, 3, 8, 8), 3, 4), 4))))
    net.output(net.gemm(y, 4, numbers))
    bnfold.fuse(net.model())
    assert sum(runs) == 2


@pytest.mark.parametrize("seed", range(40))
def test_what_settles_a_quick_check_is_within_any_noise(seed: int) -> None:
    """Noise of any size and shape, of some or all numbers, between outputs of all sizes: it never leaves a run less than was assumed."""
    rng = np.random.default_rng(seed)
    want = rng.standard_normal((1, 50)) * 10.0 ** rng.integers(-6, 7, (1, 50))
    alive = rng.random(want.shape) < rng.choice([0.1, 0.5, 1.0])
    off = np.where(alive, rng.standard_normal(want.shape), 0.0) * UNIT * 10.0 ** rng.integers(-3, 3) * np.abs(want)
    noise = np.where(alive, rng.standard_normal(want.shape), 0.0) * UNIT * 10.0 ** rng.integers(-6, 3, want.shape) * np.abs(want)
    truth = Truth(lambda _: {"y": want}, [{}])
    settled = truth.settled(lambda _: {"y": want + off}, UNIT)
    assert settled is not None
    errors, scale = settled["y"]
    truth.measure(lambda _: lambda _: {"y": want + noise}, least=1)
    measured = function_ratio(truth.compare(lambda _: {"y": want + off}, UNIT)["y"], truth.noise["y"], truth.scale("y", UNIT))
    assert measured <= function_ratio(errors, Noise(), scale) * (1 + 1e-9)


@pytest.mark.parametrize("got", [np.full((1, 9), np.nan), np.ones((1, 8)), None])
def test_nothing_is_settled_where_numbers_are_missing_or_parts_are_judged(got: Any) -> None:
    truth = Truth(lambda _: {"y": np.ones((1, 9))}, [{}])
    assert truth.settled(lambda _: {} if got is None else {"y": got}, UNIT) is None
    parts = Truth(lambda _: {"y": np.ones((1, 2, 8))}, [{}])
    assert parts.settled(lambda _: {"y": np.ones((1, 2, 8))}, UNIT) is None


def autocast(seed: int) -> onnx.ModelProto:
    """A network stored in float32 whose convolutions compute in half precision, as exporters write it under autocast."""
    net = Net("autocast", opset=18)
    net.rng = np.random.default_rng(seed)
    narrow = {"to": onnx.TensorProto.FLOAT16}
    h = net.op("Cast", net.input("N", 3, 12, 12), **narrow)
    for channels in (3, 8, 8):
        weight, bias = (net.op("Cast", net.weight(a), **narrow) for a in (net.normal(8, channels, 3, 3, scale=0.3), net.normal(8)))
        h = net.op("Cast", net.op("Conv", h, weight, bias), to=onnx.TensorProto.FLOAT)
        h = net.op("Cast", net.op("Relu", net.bn(h, 8, positive=True)), **narrow)
    net.output(net.op("Cast", net.op("Flatten", net.op("GlobalAveragePool", h)), to=onnx.TensorProto.FLOAT))
    return net.model()


@pytest.mark.parametrize("seed", range(4))
def test_weights_move_by_what_a_cast_leaves_of_them(seed: int) -> None:
    model = autocast(seed)
    fused, report = bnfold.fuse(model)
    assert report.batchnorms.after == 0
    verdict = bnfold.verify(model, fused)
    assert verdict.verdict == "equivalent", verdict.reason
    weight = next(t for t in fused.graph.initializer if len(t.dims) == 4 and t.dims[1] == 8)
    wrong = onnx.numpy_helper.to_array(weight).copy()
    wrong[3] *= np.float16(1.01)
    weight.CopyFrom(onnx.numpy_helper.from_array(wrong, weight.name))
    assert bnfold.verify(model, fused).verdict == "different"
