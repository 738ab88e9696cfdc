"""Each method of recalibration against its formula over PyTorch's own training mode, for PyTorch and for ONNX alike."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import Net, norm
from onnx import numpy_helper
from torch import Tensor, nn

import bnfold
from bnfold.capture import quiet
from bnfold.errors import DataError, UsageError
from bnfold.recalibration.methods import METHODS, Exact, IoffeSzegedy, Method, MovingAverage, Precise, Prior, method

DATA = torch.randn(26, 3, 8, 7, generator=torch.Generator().manual_seed(3)) * 2 + 1
SIZE = 8  # so that the last micro-batch is ragged
Statistics = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def network() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = F.relu(s.b1(s.c1(x)))
        z = F.relu(s.b2(s.c2(y)) + y)
        return s.b3(s.head(z.mean((2, 3))))

    parts = {"c1": nn.Conv2d(3, 6, 3), "b1": norm(6), "c2": nn.Conv2d(6, 6, 3, padding=1), "b2": norm(6)}
    return Net(forward, **parts, head=nn.Linear(6, 4), b3=norm(4, 1)).eval()


def training(module: nn.Module, batches: list[Tensor], momentum: float | None = None) -> tuple[nn.Module, dict[str, list[Tensor]]]:
    """The module after a pass in training mode, in float64, and the inputs of each BatchNorm, batch by batch."""
    model = copy.deepcopy(module).double()
    seen: dict[str, list[Tensor]] = {}
    for name, each in model.named_modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            each.train()
            each.momentum = momentum
            if momentum is None:
                each.reset_running_stats()
            seen[name] = []
            each.register_forward_pre_hook(lambda m, inputs, name=name: seen[name].append(inputs[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch.double())
    return model, seen


def running(module: nn.Module) -> Statistics:
    return {name: buffer.double().numpy() for name, buffer in module.named_buffers() if "running" in name}


def per_batch(seen: list[Tensor], correction: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Elements, means and variances of each micro-batch."""
    axes = [0, *range(2, seen[0].ndim)]
    counts = np.array([x.numel() / x.shape[1] for x in seen])
    return counts, np.stack([x.mean(axes) for x in seen]), np.stack([x.var(axes, correction=correction) for x in seen])


def exported(module: nn.Module) -> onnx.ModelProto:
    """With BatchNorms whose parameters have the module's names."""
    buffer = io.BytesIO()
    keep = torch.onnx.TrainingMode.PRESERVE
    with quiet():
        torch.onnx.export(
            module, (DATA[:2],), buffer, dynamo=False, training=keep, do_constant_folding=False, input_names=["x"], dynamic_axes={"x": [0]}
        )
    return onnx.load_from_string(buffer.getvalue())


def by_torch(module: nn.Module, **options: Any) -> Statistics:
    fresh, _ = bnfold.recalibrate(module, list(DATA.split(SIZE)), **options)
    return running(fresh)


def by_onnx(module: nn.Module, **options: Any) -> Statistics:
    fresh, _ = bnfold.recalibrate(exported(module), list(DATA.split(SIZE)), **options)
    tensors = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in fresh.graph.initializer}
    return {name: array for name, array in tensors.items() if "running" in name}


BACKENDS = pytest.mark.parametrize("measured", [by_torch, by_onnx])
By = Callable[..., Statistics]


def agree(found: Statistics, wanted: Statistics, rtol: float = 2e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=rtol, atol=rtol * np.abs(array).max(), err_msg=name)


@BACKENDS
@pytest.mark.parametrize("unbiased", [None, True])
def test_precise_batchnorm(measured: By, unbiased: bool | None) -> None:
    module = network()
    _, seen = training(module, list(DATA.split(SIZE)))
    wanted = {}
    for name, inputs in seen.items():
        counts, means, variances = per_batch(inputs, 0)
        share = (counts / counts.sum())[:, None]
        mean = (share * means).sum(0)
        n = counts.sum()
        wanted[f"{name}.running_mean"] = mean
        wanted[f"{name}.running_var"] = ((share * (means**2 + variances)).sum(0) - mean**2) * (n / (n - 1) if unbiased else 1)
    agree(measured(module, method=method("precise", unbiased=unbiased)), wanted)


@BACKENDS
@pytest.mark.parametrize("unbiased", [None, False])
def test_algorithm_2_of_ioffe_and_szegedy(measured: By, unbiased: bool | None) -> None:
    module = network()
    _, seen = training(module, list(DATA.split(SIZE)))
    wanted = {}
    for name, inputs in seen.items():
        counts, means, variances = per_batch(inputs, 0 if unbiased is False else 1)
        share = (counts / counts.sum())[:, None]
        wanted[f"{name}.running_mean"], wanted[f"{name}.running_var"] = ((share * each).sum(0) for each in (means, variances))
    agree(measured(module, method=method("ioffe-szegedy", unbiased=unbiased)), wanted)


@BACKENDS
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_moving_average_is_that_of_training(measured: By, momentum: float | None) -> None:
    module = network()
    trained, _ = training(module, list(DATA.split(SIZE)), momentum)
    agree(measured(module, method=MovingAverage(momentum=momentum)), running(trained))


@BACKENDS
@pytest.mark.parametrize("mean_shift", [False, True])
def test_prior_of_the_old_statistics(measured: By, mean_shift: bool) -> None:
    """Layer by layer, each normalised with its blended statistics."""
    module, strength, n = network(), 10.0, len(DATA)
    model = copy.deepcopy(module).double()
    share = strength / (strength + n)
    for _, each in model.named_modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):

            def blend(m: Any, inputs: tuple[Tensor, ...]) -> None:
                axes = [0, *range(2, inputs[0].ndim)]
                mean, variance = inputs[0].mean(axes), inputs[0].var(axes, correction=0)
                mixed = share * m.running_var + (1 - share) * variance
                if mean_shift:
                    mixed = mixed + share * (1 - share) * (m.running_mean - mean) ** 2
                m.running_mean, m.running_var = share * m.running_mean + (1 - share) * mean, mixed

            each.register_forward_pre_hook(blend)
    with torch.no_grad():
        model(DATA.double())
    agree(measured(module, method=Prior(strength=strength, mean_shift=mean_shift)), running(model))


@BACKENDS
def test_a_prior_of_no_samples_is_the_exact_method(measured: By) -> None:
    module = network()
    exact = measured(module)
    agree(measured(module, method=Prior(strength=0)), exact, 1e-12)
    agree(measured(module, method=Prior(strength=1e12)), running(module), 1e-6)


@BACKENDS
def test_unbiased_variance(measured: By) -> None:
    module = network()
    biased, unbiased = measured(module), measured(module, method=Exact(unbiased=True), layers=["*b1*"])
    n = len(DATA) * 6 * 5
    np.testing.assert_allclose(unbiased["b1.running_var"], biased["b1.running_var"] * n / (n - 1), rtol=1e-6)


@BACKENDS
@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.lockstep])
def test_in_lockstep_the_size_of_micro_batches_changes_nothing(measured: By, name: str) -> None:
    module = network()
    agree(measured(module, method=name, batch_size=3), measured(module, method=name, batch_size=26), 1e-6)


@pytest.mark.parametrize("kind", [Precise(), IoffeSzegedy(), MovingAverage()])
def test_a_layer_called_twice_is_normalised_call_by_call(kind: Method) -> None:
    module = Net(lambda s, x: s.last(s.bn(s.conv(F.relu(s.bn(x))))), bn=norm(3), conv=nn.Conv2d(3, 3, 3, padding=1), last=norm(3)).eval()
    batches = list(DATA.split(SIZE))
    if isinstance(kind, MovingAverage):
        wanted = running(training(module, batches, 0.1)[0])
    else:
        _, seen = training(module, batches)
        wanted = {}
        for name, inputs in seen.items():
            counts, means, variances = per_batch(inputs, int(kind.is_unbiased))
            share = (counts / counts.sum())[:, None]
            mean = (share * means).sum(0)
            between = 0 if kind.is_unbiased else (share * (means - mean) ** 2).sum(0)
            wanted[f"{name}.running_mean"], wanted[f"{name}.running_var"] = mean, (share * variances).sum(0) + between
    fresh, _ = bnfold.recalibrate(module, batches, method=kind)
    agree(running(fresh), wanted)


@pytest.mark.parametrize("kind", [Exact(), Precise(), MovingAverage()])
def test_frozen_batchnorms_are_measured_too(kind: Method) -> None:
    """torchvision's, which is four plain operations: the same statistics as those of a BatchNorm in its place."""

    class Frozen(nn.Module):
        def __init__(self, of: nn.Module) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, getattr(of, name).detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            w, b, rv, rm = (getattr(self, n).reshape(1, -1, 1, 1) for n in ("weight", "bias", "running_var", "running_mean"))
            scale = w * (rv + 1e-5).rsqrt()
            return x * scale + (b - rm * scale)

    first, second = norm(6), norm(5)
    parts = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
    plain = nn.Sequential(parts[0], first, parts[1], parts[2], second).eval()
    frozen = nn.Sequential(parts[0], Frozen(first), parts[1], parts[2], Frozen(second)).eval()
    batches = list(DATA.split(SIZE))
    found = running(bnfold.recalibrate(frozen, batches, method=kind)[0])
    agree(found, {k: v for k, v in running(bnfold.recalibrate(plain, batches, method=kind)[0]).items() if k in found}, 1e-5)


def test_one_value_per_channel_cannot_be_normalised_by_itself() -> None:
    module = nn.Sequential(nn.Linear(3, 4), norm(4, 1), nn.Linear(4, 4), norm(4, 1)).eval()
    with pytest.raises(DataError, match="bring one value per channel to a BatchNorm, and the method precise normalises each by itself"):
        bnfold.recalibrate(module, DATA[:, :, 0, 0], method="precise", batch_size=1)


@BACKENDS
def test_a_last_batch_too_small_to_be_normalised_is_left_out(measured: By) -> None:
    """The BatchNorm behind the pooling sees one value of it."""
    module = network()
    found = measured(module, method="precise", batch_size=5)  # 26 is five times 5, and one
    fresh, report = bnfold.recalibrate(module, DATA[:25], method="precise", batch_size=5)
    agree(found, running(fresh), 1e-5)
    assert report.samples == 25
    _, report = bnfold.recalibrate(module, DATA, method="precise", batch_size=5)
    assert report.notes[-1] == "1 sample left out, in micro-batches too small to be normalised by themselves"


@pytest.mark.parametrize(
    ("choice", "given", "text"),
    [
        ("median", {}, "no method of recalibration is called 'median'; there are exact, precise"),
        ("exact", {"momentum": 0.1}, "the method exact has no momentum; it has unbiased"),
        ("moving-average", {"momentum": 0.0}, "the momentum is 0.0; it must be above 0 and at most 1"),
        ("moving-average", {"momentum": 1.5}, "the momentum is 1.5"),
        ("prior", {"strength": -1.0}, "the old statistics count as -1.0 samples; give 0 or more"),
        ("prior", {"strength": float("inf")}, "count as inf samples"),
    ],
)
def test_settings_that_make_no_sense(choice: str, given: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        method(choice, **given)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.integers(0, 2**31))
def test_parts_of_the_data_add_up(sizes: list[int], seed: int) -> None:
    """Whatever the cuts, in any order: what an additive method makes of a sum of tallies is what it makes of all."""
    from arrays import measure

    rng = np.random.default_rng(seed)
    batches = [measure(rng.normal(rng.normal(), 1 + rng.random(), (size, 3, 4))) for size in sizes]
    for kind in (Precise(), IoffeSzegedy()):
        old = (np.zeros(3), np.ones(3))
        whole = kind.start(*old)
        for batch in batches:
            kind.add(whole, batch)
        apart = [kind.start(*old) for _ in batches]
        for tally, batch in zip(apart, batches, strict=True):
            kind.add(tally, batch)
        apart.reverse()
        total = sum(apart[1:], apart[0])
        for one, other in zip(kind.statistics(whole, old, 0), kind.statistics(total, old, 0), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("opset", [9, 13, 14, 17])
@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if not kind.lockstep])
def test_where_each_batch_is_normalised_by_itself_the_runtime_computes(name: str, opset: int, digits: Path) -> None:
    """A BatchNormalization takes its mean and variance in the type that the model stores them in."""
    model = onnx.load(digits)
    model.opset_import[0].version = opset
    data = np.random.default_rng(0).standard_normal((2, 16, 1, 8, 8), dtype=np.float32)
    _, report = bnfold.recalibrate(model, [{"image": batch} for batch in data], method=name)
    assert len(report.layers) == 8
    assert not any("float64 reference evaluator" in note for note in report.notes)
