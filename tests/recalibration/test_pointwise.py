"""Moments behind a pointwise convolution, known from those before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from arrays import measure
from cases.builder import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from single import normal
from torch import nn

import bnfold
from bnfold.backends.torch.recalibration.moments import Meter
from bnfold.errors import DataError
from bnfold.recalibration import schedule as stages
from bnfold.recalibration.moments import Moments, Pointwise, Samples, measure_through, pool


def by_numpy(x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any] | None) -> Samples:
    return measure_through(x, Pointwise(weight, bias))


def by_torch(x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any] | None) -> Samples:
    tensors = Pointwise(torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias))
    return Meter(torch.device("cpu")).measure_through(torch.from_numpy(x), tensors)


Through = Callable[..., Samples]
BOTH = pytest.mark.parametrize("through", [by_numpy, by_torch])


def exact(x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any] | None) -> Moments:
    y = np.einsum("oc,nc...->no...", weight, x.astype(np.float64))
    return measure(y if bias is None else y + bias.reshape(-1, *[1] * (y.ndim - 2)))


def agree(found: Moments, wanted: Moments, tolerance: float = 1e-12) -> None:
    assert (found.count, found.samples) == (wanted.count, wanted.samples)
    scale = np.sqrt(wanted.m2.max() / max(wanted.count, 1)) + np.abs(wanted.mean).max()
    np.testing.assert_allclose(found.mean, wanted.mean, atol=tolerance * scale)
    np.testing.assert_allclose(found.m2, wanted.m2, atol=tolerance * wanted.m2.max())
    np.testing.assert_allclose(found.spread, wanted.spread, atol=tolerance * np.abs(wanted.spread).max())


@BOTH
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_affine_map_takes_the_moments_along(through: Through, data: st.DataObject) -> None:
    """Mean, deviations and their spread among the samples, for the standard errors: those of the output itself, in float64."""
    samples, into, out = (data.draw(st.integers(1, 6)) for _ in range(3))
    space = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = rng.normal(data.draw(st.sampled_from([0, 3, 1e3])), 1, (samples, into, *space)).astype(data.draw(st.sampled_from(["f4", "f8"])))
    weight, bias = rng.normal(size=(out, into)), rng.normal(size=out) if data.draw(st.booleans()) else None
    agree(pool([through(x, weight, bias)]), exact(x, weight, bias), 1e-9)


@BOTH
def test_many_samples_in_blocks(through: Through) -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = rng.normal(size=(70, 16, 40, 30)).astype(np.float32), rng.normal(size=(48, 16)), rng.normal(size=48)
    agree(pool([through(x, weight, bias)]), exact(x, weight, bias))


@BOTH
def test_channels_that_nearly_cancel_keep_their_digits(through: Through) -> None:
    """The first output is the small difference of two large inputs; in float32, products of 1e6 would leave none of its digits."""
    rng = np.random.default_rng(1)
    common = rng.normal(0, 1e3, (8, 1, 20, 20))
    x = (common + rng.normal(0, 1e-1, (8, 2, 20, 20))).astype(np.float32)
    weight = np.array([[1.0, -1.0], [1.0, 1.0]])
    found, wanted = pool([through(x, weight, None)]), exact(x, weight, None)
    np.testing.assert_allclose(found.variance(), wanted.variance(), rtol=1e-7)


@BOTH
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_no_data_have_no_moments(through: Through, shape: tuple[int, ...]) -> None:
    found = through(np.zeros(shape, np.float32), np.ones((5, 3)), None)
    assert found.count == 0
    assert found.mean.shape == found.m2.shape == (0, 5)


@BOTH
def test_what_overflows_or_is_not_finite_shows(through: Through) -> None:
    x = np.ones((2, 3, 4, 4), np.float32)
    x[1, 2, 0, 0] = np.nan
    with np.errstate(invalid="ignore"):
        found = through(x, np.ones((5, 3)), None)
    assert np.isfinite(found.mean[0]).all()
    assert np.isnan(found.mean[1]).all()


# --- in networks ----------------------------------------------------------------------------------------------------------------


class Bottlenecks(nn.Module):
    """Expansions of which the moments are known without running them, and one that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.wide, self.first = nn.Conv2d(4, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.narrow = nn.Sequential(nn.Conv2d(24, 4, 1), nn.BatchNorm2d(4))
        self.shared, self.second = nn.Conv2d(4, 24, 1), nn.BatchNorm2d(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.narrow(self.first(self.wide(x)).relu())
        y = self.shared(x)
        return y.sigmoid() * self.second(y)


def as_module() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return Bottlenecks().eval(), [torch.randn(n, 3, 12, 11) for n in (3, 3, 2)]


def as_onnx() -> tuple[Any, Any]:
    net = Net("bottlenecks")
    x = net.bn(net.conv(net.input("N", 3, 12, 11), 3, 4), 4)
    narrow = net.bn(net.conv(net.relu(net.bn(net.conv(x, 4, 24, 1), 24)), 24, 4, 1), 4)
    shared = net.conv(net.op("Add", x, narrow), 4, 24, 1)
    net.output(net.op("Mul", net.op("Sigmoid", shared), net.bn(shared, 24)))
    return ir.from_proto(net.model()), [{"x": normal(n, 3, 12, 11, dtype=np.float32)} for n in (3, 3, 2)]


def statistics(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    if isinstance(model, nn.Module):
        return {name: buffer.numpy() for name, buffer in model.named_buffers()}
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


@pytest.mark.parametrize("make", [as_module, as_onnx])
@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_the_statistics_are_the_same_and_less_is_held(make: Callable[[], tuple[Any, Any]], budget: int, monkeypatch: Any) -> None:
    found, held, errors = {}, {}, {}
    monkeypatch.setattr(stages, "PER_BYTE", -1)  # nothing runs twice
    for pays in (False, True):
        model, data = make()
        with monkeypatch.context() as patch:
            if not pays:
                patch.setattr(Pointwise, "pays", lambda *_: False)
            calibrated, report = bnfold.recalibrate(model, data, memory_budget=budget)
        found[pays], held[pays] = statistics(calibrated), report.held_bytes
        errors[pays] = [(layer.stderr, layer.var_stderr) for layer in report.layers]
    assert held[True] < 0.7 * held[False]
    np.testing.assert_allclose(errors[True], errors[False], rtol=1e-5)
    for name, array in found[False].items():
        np.testing.assert_allclose(found[True][name], array, rtol=2e-6, atol=2e-6, err_msg=name)


CONVOLUTIONS = {
    "pointwise": ({}, True),
    "without a bias": ({"bias": False}, True),
    "padded": ({"padding": 1}, False),
    "same": ({"padding": "same"}, True),
    "with a stride": ({"stride": 2}, False),
    "in groups": ({"groups": 2}, False),
    "three by three": ({"kernel_size": 3}, False),
    "one by three": ({"kernel_size": (1, 3)}, False),
    "few outputs": ({"out_channels": 8}, False),
}


def test_one_large_sample_is_measured_in_blocks() -> None:
    meter, x = Meter(torch.device("cpu")), torch.randn(1, 16, 256, 256)
    found = pool([meter.measure(x)])
    np.testing.assert_allclose(found.variance(), x.double().var((0, 2, 3), correction=0).numpy(), rtol=1e-6)
    assert len(meter._room(1, torch.float32)) < x.numel()


WEIGHTS: dict[str, Callable[[Net, str], str]] = {
    "stored": lambda net, w: w,
    "behind an Identity": lambda net, w: net.op("Identity", w),
    "rounded on the way": lambda net, w: net.op("Cast", net.op("Cast", w, to=16), to=1),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_is_computed_is_taken_as_it_runs(name: str) -> None:
    from bnfold.backends.onnx.recalibration.plan import plan_of

    net = Net("computed")
    y = net.op("Conv", net.input("N", 4, 12, 11), WEIGHTS[name](net, net.weight(net.normal(24, 4, 1, 1))))
    net.output(net.bn(y, 24), y)
    model, data = ir.from_proto(net.model()), {"x": normal(8, 4, 12, 11, dtype=np.float32) + 3}
    assert through_what(plan_of(model)) == [name != "rounded on the way"]
    calibrated, _ = bnfold.recalibrate(model, [data])
    outputs = onnxruntime.InferenceSession(net.model().SerializeToString(), providers=["CPUExecutionProvider"]).run(None, data)
    wanted = measure(outputs[1])
    norm = next(node for node in calibrated.graph if node.op_type == "BatchNormalization")
    for value, array in zip(norm.inputs[3:], (wanted.mean, wanted.variance()), strict=True):
        np.testing.assert_allclose(value.const_value.numpy(), array, rtol=1e-5, atol=1e-5)


def test_what_the_data_do_not_reach_is_no_input() -> None:
    """The convolution reads an initializer that callers may override."""
    net = Net("overridable", ir=8)
    net.hold = "overridable"
    x = net.weight(net.normal(2, 4, 6, 7))
    net.hold = "initializer"
    y = net.bn(net.op("Add", net.conv(net.bn(net.input("N", 4, 6, 7), 4), 4, 24, 1), net.conv(x, 4, 24, 1)), 24)
    net.output(y, net.bn(net.conv(x, 4, 24, 1), 24))
    _, report = bnfold.recalibrate(ir.from_proto(net.model()), [{"x": normal(2, 4, 6, 7, dtype=np.float32)}])
    assert len(report.layers) >= 2


def test_channels_that_do_not_fit_are_told_apart() -> None:
    net = Net("channels")
    net.output(net.bn(net.conv(net.input("N", "C", 12, 11), 4, 24, 1), 24))
    with pytest.raises(DataError, match=r"brings 5 channels to the convolution before BatchNormalization\w*, which takes 4"):
        bnfold.recalibrate(ir.from_proto(net.model()), [{"x": normal(2, 5, 12, 11, dtype=np.float32)}])
    net = Net("another size")
    net.output(net.bn(net.conv(net.input("N", 4, 12, 11), 4, 24, 1), 12))
    with pytest.raises(DataError, match=r"brings 24 channels to BatchNormalization\w*, which has 12"):
        bnfold.recalibrate(ir.from_proto(net.model()), [{"x": normal(2, 4, 12, 11, dtype=np.float32)}])


def single(dtype: torch.dtype = torch.float32, **given: Any) -> nn.Module:
    settings = {"in_channels": 4, "out_channels": 24, "kernel_size": 1} | given
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(**settings), nn.BatchNorm2d(settings["out_channels"]))
    return made.eval().to(dtype)


def through_what(plan: Any) -> list[bool]:
    return [reading.through is not None for stage in plan.stages() for reading in stage.readings]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_which_convolutions_of_pytorch_need_not_run(name: str) -> None:
    from bnfold.backends.torch.recalibration.plan import plan_of

    given, short = CONVOLUTIONS[name]
    example = torch.zeros(2, 3, 12, 11)
    assert through_what(plan_of(single(**given), example))[-1] == short
    assert not any(through_what(plan_of(single(torch.float16, **given), example.half())))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_which_convolutions_of_onnx_need_not_run(name: str, staged: list[str]) -> None:
    from bnfold.backends.onnx.recalibration.plan import plan_of

    given, short = CONVOLUTIONS[name]
    settings: dict[str, Any] = {}
    if (padding := given.get("padding")) is not None:
        settings |= {"auto_pad": "SAME_UPPER"} if padding == "same" else {"pads": [padding] * 4}
    if "stride" in given:
        settings["strides"] = [given["stride"]] * 2
    net, out = Net("single"), given.get("out_channels", 24)
    kernel = {"three by three": (3, 3), "one by three": (1, 3)}.get(name, (1, 1))
    x = net.bn(net.conv(net.input("N", 3, 12, 11), 3, 4, 1), 4)
    groups = given.get("groups", 1)
    weight = net.weight(net.normal(out, 4 // groups, *kernel))
    net.output(net.bn(net.op("Conv", x, weight, group=groups, **settings), out))
    model = ir.from_proto(net.model())
    assert through_what(plan_of(model))[-1] == short
