"""Statistics of PyTorch models: those of one batch of everything, however the data come; and those of the same network in ONNX."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from arrays import measure
from modules import Net, difference, lively, norm, run
from torch import nn
from vision import package

import bnfold
from bnfold.backends.torch.recalibration.moments import Meter
from bnfold.recalibration.moments import pool
from bnfold.recalibration.spill import Frontier
from bnfold.report import RecalibrateReport

DATA = torch.randn(23, 3, 10, 9, generator=torch.Generator().manual_seed(3)) * 2 + 1


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def network() -> nn.Module:
    """Six layers deep, with writing in place, a skip connection, dropout and a head."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.relu_(s.b1(s.c1(x)))
        z = s.b2(s.c2(y))
        z += y
        return s.b3(s.head(s.drop(F.relu(z, inplace=True).mean((2, 3)))))

    parts = {"c1": nn.Conv2d(3, 6, 3), "b1": norm(6), "c2": nn.Conv2d(6, 6, 3, padding=1), "b2": norm(6)}
    return Net(forward, **parts, drop=nn.Dropout(0.5), head=nn.Linear(6, 4), b3=norm(4, 1)).eval()


def one_batch(module: nn.Module, data: torch.Tensor) -> dict[str, torch.Tensor]:
    """The statistics with which one batch of all data is normalised, by PyTorch itself in float64 (its variance is M2/(n - 1))."""
    model = copy.deepcopy(module).double()
    for each in model.modules():
        each.training = isinstance(each, nn.modules.batchnorm._BatchNorm)
        if each.training:
            each.momentum = 1.0
    with torch.no_grad():
        model(data.double())
    return {name: buffer for name, buffer in model.named_buffers() if "running" in name}


def check(module: nn.Module, data: torch.Tensor, fresh: nn.Module, report: RecalibrateReport, bound: float) -> None:
    counts = {layer.name: layer.count for layer in report.layers}
    want = one_batch(module, data)
    found = {name: buffer for name, buffer in fresh.named_buffers() if "running" in name}
    assert found.keys() == want.keys()
    for name, buffer in found.items():
        exact, n = want[name], counts[name.rpartition(".")[0]]
        exact = exact * (n - 1) / n if name.endswith("var") else exact
        assert float((buffer - exact).abs().max()) <= bound * float(exact.abs().max()), name


@pytest.mark.parametrize("size", [1, 4, 8, 23])
def test_the_size_of_a_micro_batch_changes_nothing(size: int) -> None:
    net = network().double()
    fresh, report = bnfold.recalibrate(net, DATA.double(), batch_size=size)
    check(net, DATA, fresh, report, 1e-12)
    assert report.samples == 23


def test_in_float32_the_statistics_are_right_to_rounding() -> None:
    net = network()
    fresh, report = bnfold.recalibrate(net, DATA, batch_size=5)
    check(net, DATA, fresh, report, 1e-6)


def test_neither_order_nor_spilling_changes_anything() -> None:
    net = network().double()
    want, _ = bnfold.recalibrate(net, DATA.double(), batch_size=6)
    for data, budget in ((DATA.flip(0), 1 << 30), (DATA, 0), (DATA, 4000)):
        got, report = bnfold.recalibrate(net, data.double(), batch_size=6, memory_budget=budget)
        assert bool(report.spilled_bytes) == (budget < 1 << 30)
        for one, other in zip(want.buffers(), got.buffers(), strict=True):
            assert torch.allclose(one.double(), other.double(), rtol=1e-12, atol=1e-13)


def test_nothing_but_the_statistics_changes_and_the_argument_stays() -> None:
    net = network()
    net.drop.train()
    before = copy.deepcopy(net.state_dict())
    fresh, _ = bnfold.recalibrate(net, DATA)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert type(fresh) is type(net)
    assert [m.training for m in fresh.modules()] == [m.training for m in net.modules()]
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(before[name], tensor) == ("running" not in name), name


def test_a_network_in_training_mode_is_measured_in_evaluation_mode() -> None:
    net = network()
    want, _ = bnfold.recalibrate(net, DATA)
    got, _ = bnfold.recalibrate(net.train(), DATA)
    assert all(torch.equal(a, b) for a, b in zip(want.buffers(), got.buffers(), strict=True))
    assert got.training


def test_it_equals_the_onnx_route() -> None:
    net = network().double()
    buffer = torch.onnx.export(
        net, (DATA[:2].double(),), dynamo=True, optimize=False, dynamic_shapes=(({0: torch.export.Dim("b")},),), verbose=False
    )
    assert buffer is not None
    model: onnx.ModelProto = buffer.model_proto
    _, there = bnfold.recalibrate(model, DATA.double().numpy(), batch_size=4)
    _, here = bnfold.recalibrate(net, DATA.double(), batch_size=7)
    for one, other in zip(here.layers, there.layers, strict=True):
        assert one.count == other.count
        assert one.mean_shift == pytest.approx(other.mean_shift, rel=1e-9)
        assert one.var_ratio == pytest.approx(other.var_ratio, rel=1e-9)
        assert one.stderr == pytest.approx(other.stderr, rel=1e-9)


def test_an_exported_program_gives_the_same() -> None:
    net = network().double()
    program = torch.export.export(net, (DATA[:2].double(),), dynamic_shapes=(({0: torch.export.Dim("b", min=1)},),))
    want, _ = bnfold.recalibrate(net, DATA.double())
    got, _ = bnfold.recalibrate(program, DATA.double(), batch_size=3)
    assert isinstance(got, torch.export.ExportedProgram)
    for name, buffer in want.named_buffers():
        assert torch.allclose(buffer.double(), got.state_dict[name].double(), rtol=1e-12), name
    assert difference(run(want, DATA.double()), run(got, DATA.double())) < 1e-12
    decomposed, _ = bnfold.recalibrate(program.run_decompositions(), DATA.double(), batch_size=3)
    assert difference(run(want, DATA.double()), run(decomposed, DATA.double())) < 1e-12


def test_a_layer_that_is_called_twice_has_the_pooled_statistics() -> None:
    net = Net(lambda s, x: s.b(s.c(x)).relu() + s.b(s.d(x)).relu(), c=nn.Conv2d(3, 4, 3), d=nn.Conv2d(3, 4, 3), b=norm(4)).double().eval()
    fresh, report = bnfold.recalibrate(net, DATA.double(), batch_size=4)
    both = torch.cat([net.c(DATA.double()), net.d(DATA.double())])
    assert torch.allclose(fresh.b.running_mean, both.mean((0, 2, 3)), rtol=1e-12)
    assert torch.allclose(fresh.b.running_var, both.var((0, 2, 3), correction=0), rtol=1e-12)
    assert [layer.count for layer in report.layers] == [2 * 23 * 8 * 7]


def test_frozen_statistics_are_measured_too() -> None:
    frozen = lively(package("torchvision.ops").FrozenBatchNorm2d(4))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), frozen, nn.ReLU(), nn.Conv2d(4, 4, 1), lively(type(frozen)(4))).double().eval()
    fresh, report = bnfold.recalibrate(net, DATA.double(), batch_size=4)
    assert [layer.name for layer in report.layers] == ["1", "4"]
    inner = net[0](DATA.double())
    assert torch.allclose(fresh[1].running_var, inner.var((0, 2, 3), correction=0), rtol=1e-12)
    outer = net[3](fresh[1](inner).relu())
    assert torch.allclose(fresh[4].running_mean, outer.mean((0, 2, 3)), rtol=1e-10)


class Own(nn.Module):
    """A norm of somebody's own, of [n, channels, height, width]. how: what it makes of x, its mean, its variance and its weight."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("running_mean", torch.randn(4, 1, 1))
        self.register_buffer("running_var", torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.how(x, self.running_mean, self.running_var, self.weight)
        return made


OWN = {
    "one and more": (lambda x, m, v, w: (x - m) / (v + 1e-5).sqrt() * (1 + w), ""),
    "a clamp": (lambda x, m, v, w: (x - m) * w / v.clamp(min=1e-5).sqrt(), ""),
    "no epsilon, and a softplus": (lambda x, m, v, w: F.softplus(w) * (x - m) * v.rsqrt() + 1, ""),
    "a deviation by another name": (lambda x, m, v, w: (x - m) / v * w, "which tensors its statistics are isn't known"),
    "the mean alone is another": (lambda x, m, v, w: (x - 2 * m) / v.sqrt(), "which tensors its statistics are isn't known"),
    "mixed with those of the sample": (
        lambda x, m, v, w: (x - 0.5 * (m + x.mean((2, 3), keepdim=True))) / (v + x.var((2, 3), keepdim=True)).sqrt() * w,
        "its forward is its own, and holds no BatchNorm that bnfold knows",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_statistics_of_a_class_of_somebodys_own(name: str) -> None:
    """Measured where its arithmetic shows that they are the mean and the variance of what comes in; else left, and told."""
    how, why = OWN[name]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Own(how), nn.Conv2d(4, 4, 1), norm(4)).double().eval()
    fresh, report = bnfold.recalibrate(net, DATA.double())
    assert [layer.name for layer in report.layers] == ["3"] if why else ["1", "3"]
    inner = net[0](DATA.double())
    if why:
        assert any(note.startswith("1 keeps its statistics") and note.endswith(why) for note in report.notes)
        assert torch.equal(fresh[1].running_mean, net[1].running_mean)
    else:
        assert torch.allclose(fresh[1].running_mean.ravel(), inner.mean((0, 2, 3)), rtol=1e-12)
        assert torch.allclose(fresh[1].running_var.ravel(), inner.var((0, 2, 3), correction=0), rtol=1e-12)
    assert torch.allclose(fresh[3].running_mean, fresh[:3](DATA.double()).mean((0, 2, 3)), rtol=1e-10)


def test_statistics_of_the_batch_are_left_and_said() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 1), norm(4)).eval()
    _, report = bnfold.recalibrate(net, DATA)
    assert [layer.name for layer in report.layers] == ["3"]
    assert "1 keeps its statistics: it has none (track_running_stats=False)" in report.notes[0]
    with pytest.raises(bnfold.NothingToDoError, match="track_running_stats=False"):
        bnfold.recalibrate(net[:2], DATA)
    with pytest.raises(bnfold.NothingToDoError, match="the model holds no BatchNorm"):
        bnfold.recalibrate(net[:1], DATA)


def test_views_that_are_written_to() -> None:
    """The halves of a tensor are written to in place, and read through the whole afterwards."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = s.b(s.c(x))
        y[:, :2].relu_()
        y.chunk(2, 1)[1].mul_(2)
        return s.d(s.e(y))

    net = Net(forward, c=nn.Conv2d(3, 4, 3), b=norm(4), e=nn.Conv2d(4, 4, 1), d=norm(4)).double().eval()
    fresh, report = bnfold.recalibrate(net, DATA.double(), batch_size=4)
    check(net, DATA, fresh, report, 1e-12)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(kind: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3), norm(4)).eval().to(kind)
    fresh, _ = bnfold.recalibrate(net, DATA.to(kind), batch_size=4)
    exact = one_batch(net, DATA.to(kind))
    assert fresh[1].running_mean.dtype == kind
    for name, buffer in fresh.named_buffers():
        if "running" in name:
            assert torch.allclose(buffer.double(), exact[name], rtol=0.02, atol=0.02)


def test_batches_with_labels_and_dicts() -> None:
    net = network()
    want, _ = bnfold.recalibrate(net, DATA)
    labels = torch.arange(23) % 4

    def loader() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from zip(DATA.split(5), labels.split(5), strict=True)

    class Optional(nn.Sequential):
        def forward(self, pixels=None, labels=None, detailed=None):  # type: ignore[no-untyped-def]  # as transformers' models have them
            made = super().forward(pixels)
            return made if labels is None else (made, nn.functional.cross_entropy(made.mean((2, 3)), labels))

    single = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)).eval()
    for model, batches in (
        (Optional(*single), loader()),
        (Optional(*single), [(batch,) for batch in DATA.split(5)]),
        (single, loader()),
        (single, list(loader())),
        (single, torch.utils.data.DataLoader(list(zip(DATA, labels, strict=True)), 5)),
    ):
        got, report = bnfold.recalibrate(model, batches)
        assert report.samples == 23
        assert torch.allclose(got[1].running_mean, model[0](DATA).mean((0, 2, 3)), atol=1e-5)
    assert want is not net


def test_samples_of_several_sizes() -> None:
    """The network is read for one size at first; another one starts it afresh, unless the data can be read only once."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.AdaptiveAvgPool2d(2), nn.Conv2d(4, 3, 1), norm(3)).double().eval()
    shapes = [(2, 3, 9, 9), (3, 3, 12, 7), (1, 3, 9, 9)]
    batches = [torch.randn(shape).double() for shape in shapes]
    inner = torch.cat([net[0](batch).transpose(0, 1).flatten(1) for batch in batches], 1)
    for data in (batches, (batch for batch in batches), lambda: iter(batches)):
        fresh, report = bnfold.recalibrate(net, data)
        assert report.samples == 6
        assert torch.allclose(fresh[1].running_mean, inner.mean(1), rtol=1e-12)
        assert torch.allclose(fresh[1].running_var, inner.var(1, correction=0), rtol=1e-12)
    with pytest.raises(bnfold.DataError, match=r"PyTorch can't run linear on these data: mat1 and mat2 shapes cannot be multiplied"):
        bnfold.recalibrate(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Flatten(), nn.Linear(196, 2), norm(2, 1)).double(), batches)
    with pytest.raises(bnfold.DataError, match=r"batch 2 of the list given: input 'input' takes .*, the data are \(3, 4, 9, 9\)"):
        bnfold.recalibrate(net, [batches[0], torch.randn(3, 4, 9, 9).double()])


def test_a_network_that_takes_one_batch_size() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), norm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.bn(self.conv(x.view(4, 3, 10, 9)))
            return y

    net = Fixed().double().eval()
    fresh, report = bnfold.recalibrate(net, DATA.double(), batch_size=4)
    assert report.samples == 20
    assert torch.allclose(fresh.bn.running_mean, net.conv(DATA[:20].double()).mean((0, 2, 3)), rtol=1e-12)


def test_parts_that_are_needed_at_different_times() -> None:
    """A split of which one part waits for a later stage, a recurrent layer that gives several tensors, a size that is computed."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        one, two = s.b(s.c(x)).split([2, 3], 1)
        z = s.g(two) + s.e(s.d(one)).mean((2, 3), keepdim=True)
        y, (h, _) = s.lstm(s.h(z).flatten(2).transpose(1, 2))
        return s.n(y.sum(1) / y.shape[1] + h[0])

    parts = {"c": nn.Conv2d(3, 5, 3), "b": norm(5), "d": nn.Conv2d(2, 4, 3), "e": norm(4), "g": nn.Conv2d(3, 4, 1), "h": norm(4)}
    net = Net(forward, **parts, lstm=nn.LSTM(4, 6, batch_first=True), n=norm(6, 1)).double().eval()
    fresh, report = bnfold.recalibrate(net, DATA.double(), batch_size=4)
    check(net, DATA, fresh, report, 1e-9)


def test_bad_data_are_one_line() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)).eval()
    with pytest.raises(bnfold.DataError, match="there are no samples; give at least one"):
        bnfold.recalibrate(net, [], example=DATA)
    nn.init.ones_(net[0].weight)
    wild = DATA.clone()
    wild[3] = 3e38
    with pytest.raises(bnfold.DataError, match="NaN, infinity or an overflow to channel"):
        bnfold.recalibrate(net, wild)


def test_values_far_from_zero() -> None:
    net = nn.Sequential(norm(3), nn.Conv2d(3, 2, 1)).eval()
    fresh, _ = bnfold.recalibrate(net, torch.randn(200, 3, 4, 4) + 1e4, batch_size=7)
    assert torch.allclose(fresh[0].running_var, torch.ones(3), rtol=0.1)


def test_an_epsilon_that_gives_no_numbers() -> None:
    with pytest.raises(bnfold.ModelError, match="the epsilon of 0 is nan"):
        bnfold.recalibrate(nn.Sequential(nn.BatchNorm2d(3, eps=float("nan"))).eval(), DATA)
    report = bnfold.recalibrate(nn.Sequential(nn.BatchNorm2d(3, eps=0.0)).eval(), torch.ones_like(DATA))[1]
    assert any(note.startswith("0 keeps its statistics") and note.endswith("its epsilon of 0 not above 0") for note in report.notes)


def test_sums_that_overflow() -> None:
    net = nn.Sequential(norm(3)).eval()
    fresh, _ = bnfold.recalibrate(net, DATA * 1e18)
    assert torch.allclose(fresh[0].running_var, (DATA.double() * 1e18).var((0, 2, 3), correction=0).float(), rtol=1e-6)
    kept, report = bnfold.recalibrate(net, DATA * 1e25)
    assert torch.equal(kept[0].running_var, net[0].running_var)
    assert "0 keeps its statistics: its new variance of channel 0 is" in report.notes[0]


def test_values_that_wait_on_a_device() -> None:
    with Frontier(memory_budget=100, device_room=200) as frontier:
        frontier.put(0, "there", torch.ones(40))
        assert frontier.room == 40
        frontier.put(0, "here", np.ones(20, np.float32))
        frontier.put(0, "on disk", np.ones(20, np.float32))
        assert (frontier.peak, frontier.spilled) == (320, 80)
        assert isinstance(frontier.get(0, "there"), torch.Tensor)
        frontier.drop(0, "there")
        assert frontier.room == 200


def test_moments_of_a_tensor() -> None:
    for x in (
        torch.randn(5, 3, 4, 6) * 3 + 1e4,
        torch.randn(40, 64, 30, 31),
        torch.randn(7, 2),
        torch.randn(4, 1, 9).double(),
        torch.randn(3, 4, 5).half(),
        torch.randn(2, 3, 65, 127).transpose(0, 1),
        torch.randn(1, 2, 800, 800) - 100,
    ):
        got, want = pool([Meter(x.device).measure(x)]), measure(x.float().numpy() if x.dtype == torch.float16 else x.numpy())
        assert (got.count, got.samples) == (want.count, want.samples)
        for name in ("mean", "m2"):
            scale = np.abs(getattr(want, name)).max()
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=2e-6, atol=2e-6 * scale)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda() -> None:
    net = network()
    fresh, report = bnfold.recalibrate(net, DATA, batch_size=5, device="cuda")
    check(net, DATA, fresh, report, 1e-5)


def test_a_device_that_isnt_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(bnfold.DeviceError, match=r"device cuda isn't available: .*; use device cpu"):
        bnfold.recalibrate(network(), DATA, device="cuda")
    with pytest.raises(bnfold.UsageError, match="PyTorch models run on cpu or cuda, not on 'tpu'"):
        bnfold.recalibrate(network(), DATA, device="tpu")
