"""Where two models part and why, in PyTorch and between PyTorch and ONNX; and in a ResNet-18."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modules import lively, norm
from torch import nn
from torch.fx.experimental import optimization
from vision import package

import bnfold
from bnfold.backends.onnx.files.load import from_proto
from bnfold.backends.onnx.model import OnnxModel
from bnfold.backends.torch.export.trace import trace
from bnfold.backends.torch.model import TorchModel
from bnfold.model import Model
from bnfold.verification.coefficients import correspond
from bnfold.verification.comparison import alike
from bnfold.verification.diagnosis.localise import localise
from bnfold.verification.diagnosis.sides import Located
from bnfold.verification.normal_form import Normal
from tests.verification.diagnosis.test_localise import reproduce
from tests.verification.test_torch_verify import exported

X = torch.randn(4, 3, 12, 11, generator=torch.Generator().manual_seed(5))


def network() -> Any:
    torch.manual_seed(0)
    first = (nn.Conv2d(3, 8, 3, bias=False), norm(8, positive=True), nn.ReLU())
    second = (nn.Conv2d(8, 8, 3, padding=1), norm(8, positive=True), nn.ReLU())
    front = (norm(8, positive=True), nn.Conv2d(8, 8, 3, padding=1), nn.Sigmoid())
    return nn.Sequential(*first, *second, *front, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


def padded(m: Any) -> Any:
    """As a tool folds that doesn't mind the padding: the shift of a BatchNorm into the bias of the convolution behind it."""
    b, c = m[6], m[7]
    s = b.weight / torch.sqrt(b.running_var + b.eps)
    t = b.bias - b.running_mean * s
    c.bias.data = c.bias + (c.weight * t[None, :, None, None]).sum((1, 2, 3))
    c.weight.data = c.weight * s[None, :, None, None]
    m[6] = nn.Identity()
    return m


CASES: dict[str, tuple[Callable[[Any], Any], bool, str, str]] = {
    "epsilon": (lambda m: setattr(m[1], "eps", 1e-3), True, "0", "another epsilon: .* 0.001, BatchNorm 1 has 1e-05"),
    "epsilon, not folded": (lambda m: setattr(m[4], "eps", 1.1e-5), False, "3", "another epsilon: .* 1.1e-05, BatchNorm 4"),
    "epsilon of one that stays": (lambda m: setattr(m[6], "eps", 2e-5), True, "6", "another epsilon: .* 2e-05, BatchNorm 6"),
    "no epsilon, not folded": (lambda m: setattr(m[4], "eps", 0.0), False, "3", "another epsilon: the candidate has 0, BatchNorm 4"),
    "gamma, not folded": (lambda m: m[4].weight[2].mul_(1.01), False, "3", r"BatchNorm 4 has another gamma in channel 2 \(1 of 8\)"),
    "gamma and statistics, not folded": (
        lambda m: [m[4].weight[2].mul_(1.01), m[4].running_var.add_(1e-3)],
        False,
        "3",
        r"BatchNorm 4 has another gamma in channel 2 \(1 of 8\) and other statistics",
    ),
    "lacking": (lambda m: m.__setitem__(8, nn.Identity()), True, "8", "the candidate lacks sigmoid 8, .* behind conv2d 7"),
    "lacking in front": (lambda m: m.__setitem__(5, nn.Identity()), True, "3", "the candidate lacks relu 5, .* front of BatchNorm 6"),
    "another activation": (lambda m: m.__setitem__(8, nn.Tanh()), True, "8", "the candidate has tanh 8 where the reference has sigmoid 8"),
    "another slope": (lambda m: m.__setitem__(5, nn.LeakyReLU(0.1)), True, "5", "has leaky_relu 5 where the reference has relu 5"),
    "unbiased": (lambda m: m[4].running_var.mul_(440 / 439), True, "3", "unbiased variance: .* n = 440"),
    "mean": (lambda m: m[4].running_mean.zero_(), True, "3", r"the running mean isn't subtracted \(BatchNorm 4\)"),
    "gamma": (lambda m: m[4].weight.fill_(1), True, "3", r"gamma is missing .*\(BatchNorm 4\)"),
    "beta": (lambda m: m[1].bias.zero_(), True, "0", r"beta is missing .*\(BatchNorm 1\)"),
    "bias": (lambda m: m[3].bias.zero_(), True, "3", "the operator's own bias is dropped in the fold of BatchNorm 4"),
    "stale": (lambda m: m[1].running_var.mul_(torch.linspace(0.7, 1.5, 8)), True, "0", "another checkpoint: other running variances"),
    "order of the BatchNorm": (
        lambda m: [t.copy_(t.flip(0)) for t in (m[4].weight, m[4].bias, m[4].running_mean, m[4].running_var)],
        True,
        "3",
        "channel order: BatchNorm 4 is folded with its channels in another order",
    ),
    "order": (lambda m: m[3].weight.copy_(m[3].weight[[0, 1, 5, 3, 4, 2, 6, 7]]), True, "3", "swapped before the fold, 2 and 5"),
    "transposed": (lambda m: m[3].weight.copy_(m[3].weight.swapaxes(0, 1).clone()), True, "3", "transposed weight"),
    "padding": (padded, True, "7", "padding: the map is off at its border alone, .* of BatchNorm 6 in front"),
    "training": (lambda m: m[4].train(), False, "3", "training mode: BatchNorm 4 .* depends on the others in its batch"),
    "NaN": (lambda m: m[4].bias[3].fill_(float("nan")), True, "3", r"bias holds nan at \(3\)"),
    "infinity": (
        lambda m: m[11].weight[2, 2].fill_(float("inf")),
        True,
        "11",
        r"weight holds inf at \(2, 2\)",
    ),
}


def spoilt(net: Any, change: Callable[[Any], Any], fold: bool) -> Any:
    wrong = copy.deepcopy(net)
    with torch.no_grad():
        change(wrong)
        return optimization.fuse(wrong) if fold else wrong


@pytest.mark.parametrize("name", CASES)
def test_causes(name: str) -> None:
    change, fold, layer, cause = CASES[name]
    net = network()
    report = bnfold.verify(net, spoilt(net, change, fold), X)
    assert (report.verdict, report.first_difference) == ("different", layer), report
    assert report.difference is not None
    assert re.search(cause, report.difference.cause), report.difference


def test_a_module_in_half_precision_may_take_wider_numbers() -> None:
    """It casts them itself."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*network()[:3]).half()

        def forward(self, x: torch.Tensor) -> Any:
            return self.net(x.half()).float()

    report = bnfold.verify(nn.Sequential(*network()[:3]), bnfold.fuse(Half().eval(), example=X)[0], X)
    assert (report.verdict, report.first_difference) == ("different", "0"), report
    assert report.reason.startswith("the candidate computes in float16 (")
    assert report.difference is not None
    assert "the candidate computes in float16" in report.difference.cause


@pytest.mark.parametrize("name", ["epsilon", "padding", "order"])
@pytest.mark.parametrize("side", [0, 1])
def test_either_side_may_be_onnx(name: str, side: int, tmp_path: Path) -> None:
    change, fold, _, cause = CASES[name]
    net = network()
    wrong = spoilt(net, change, fold)
    pair = (exported(net, X), wrong) if side == 0 else (net, exported(wrong, X))
    report = bnfold.verify(*pair, X, bundle=tmp_path / "bundle")
    assert report.difference is not None
    assert re.search(re.sub("BatchNorm .", "BatchNorm .*", cause), report.difference.cause), report.difference
    assert report.bundle, report.notes
    assert "different" in reproduce(tmp_path / "bundle")


def test_in_the_stored_types_where_there_is_no_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> None:
        raise bnfold.UnsupportedError("it has no form in float64")

    monkeypatch.setattr("bnfold.backends.torch.model.TorchOracle", lacking)
    net = network()
    first = TorchModel(trace(net, X))
    second = TorchModel(trace(spoilt(net, *CASES["mean"][:2]), first.traced))
    (name,) = (spec.name for spec in first.inputs())
    found = localise(first, second, {name: X.numpy()}, None)
    assert found is not None
    assert not found.sides.exact
    assert found.difference.layer == "3"


@pytest.mark.parametrize("name", ["epsilon", "epsilon, not folded", "unbiased", "training", "padding", "NaN"])
def test_a_bundle_runs_without_bnfold(name: str, tmp_path: Path) -> None:
    change, fold, _, _ = CASES[name]
    net = network()
    report = bnfold.verify(net, spoilt(net, change, fold), X, bundle=tmp_path / "bundle")
    assert report.bundle, report.notes
    assert "\ndifferent\n" in reproduce(tmp_path / "bundle")


# --- a real architecture ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet() -> Any:
    torch.manual_seed(0)
    net = lively(package("torchvision.models").resnet18(weights=None)).eval()
    with torch.no_grad():
        for each in net.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.running_var.mul_(5)
                each.running_mean.mul_(0.3)
    return net


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def traced(resnet: Any) -> Any:
    return trace(resnet, IMAGES)


@pytest.fixture(scope="module")
def onnx_reference(resnet: Any) -> OnnxModel:
    return OnnxModel(from_proto(exported(resnet, IMAGES)))


def of(name: str) -> Callable[[Any], Any]:
    return lambda m: m.get_submodule(name)


def every_norm(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda m: [change(each) for each in m.modules() if isinstance(each, nn.BatchNorm2d)]


RESNET: dict[str, tuple[Callable[[Any], Any], bool, str, str]] = {
    "epsilon": (every_norm(lambda b: setattr(b, "eps", 1.1e-5)), True, "conv1", "another epsilon: .* 1.1e-05, BatchNorm bn1 has 1e-05"),
    "one epsilon": (lambda m: setattr(m.layer2[0].bn2, "eps", 1e-3), True, "layer2.0.conv2", "another epsilon: .* 0.001"),
    "unbiased": (every_norm(lambda b: b.running_var.mul_(512 / 511)), True, "conv1", "unbiased variance: .* n = 512"),
    "mean": (lambda m: m.layer3[1].bn1.running_mean.zero_(), True, "layer3.1.conv1", "the running mean isn't subtracted"),
    "gamma": (lambda m: m.layer2[0].downsample[1].weight.fill_(1), True, "layer2.0.downsample.0", "gamma is missing"),
    "beta": (lambda m: m.layer4[0].bn1.bias.zero_(), True, "layer4.0.conv1", "beta is missing"),
    "stale": (
        lambda m: (m.layer3[1].bn1.running_mean.add_(0.1), m.layer3[1].bn1.running_var.mul_(torch.linspace(0.9, 1.2, 256))),
        True,
        "layer3.1.conv1",
        "statistics of another checkpoint",
    ),
    "order": (
        lambda m: m.layer1[0].conv1.weight.copy_(m.layer1[0].conv1.weight[[1, 0, *range(2, 64)]]),
        True,
        "layer1.0.conv1",
        "channel order: .*, 0 and 1",
    ),
    "transposed": (
        lambda m: m.layer1[0].conv1.weight.copy_(m.layer1[0].conv1.weight.swapaxes(0, 1).clone()),
        True,
        "layer1.0.conv1",
        "transposed weight: input and output channels",
    ),
    "training": (lambda m: m.layer1[1].bn2.train(), False, "layer1.1.conv2", "training mode: BatchNorm layer1.1.bn2"),
    "NaN": (lambda m: m.layer1[0].bn2.bias[3].fill_(float("nan")), True, "layer1.0.conv2", r"bias holds nan at \(3\)"),
}


def located(reference: Model, candidate: Model) -> Located:
    one, other = alike(reference, candidate)
    (name,) = (spec.name for spec in one.inputs())
    found = localise(one, other, {name: IMAGES.numpy()}, next(iter(correspond(one.plan(), other.plan()).mismatches), None))
    assert found is not None
    return found


class Alive:
    """How many values of both models are alive at once, and how many bytes: counted by their ends."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.seen = self.most = self.most_bytes = 0

    def add(self, array: np.ndarray) -> None:
        self.seen += 1
        self.sizes[self.seen] = array.nbytes
        weakref.finalize(array, self.sizes.pop, self.seen)
        self.most, self.most_bytes = max(self.most, len(self.sizes)), max(self.most_bytes, sum(self.sizes.values()))


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    found = Alive()
    original = Normal.stream

    def counted(self: Normal, *args: Any, **options: Any) -> Any:
        for name, array in original(self, *args, **options):
            copied = np.array(array)
            found.add(copied)
            del array
            yield name, copied
            del copied

    monkeypatch.setattr(Normal, "stream", counted)
    return found


OFTEN = ("epsilon", "stale", "order", "training")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in RESNET])
def test_causes_in_a_resnet(name: str, resnet: Any, traced: Any, alive: Alive) -> None:
    change, fold, layer, cause = RESNET[name]
    found = located(TorchModel(traced), TorchModel(trace(spoilt(resnet, change, fold), traced)))
    assert found.difference.layer == layer
    assert re.search(cause, found.difference.cause), found.difference
    assert alive.most <= 9


@pytest.mark.parametrize(
    "name", ["epsilon", "unbiased", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mean", "order", "NaN"))]
)
def test_causes_in_a_resnet_of_onnx(name: str, resnet: Any, onnx_reference: OnnxModel, alive: Alive) -> None:
    change, fold, _, cause = RESNET[name]
    found = located(onnx_reference, OnnxModel(from_proto(exported(spoilt(resnet, change, fold), IMAGES))))
    assert re.search(re.sub("BatchNorm .*", "BatchNorm", cause), found.difference.cause), found.difference
    assert alive.most <= 9


def test_memory_is_bounded(resnet: Any, traced: Any, alive: Alive) -> None:
    """However many values are compared, few of them are alive at once."""
    change, fold, layer, _ = RESNET["mean"]
    found = located(TorchModel(traced), TorchModel(trace(spoilt(resnet, change, fold), traced)))
    assert found.difference.layer == layer
    assert alive.seen > 120
    assert alive.most <= 9
    assert alive.most_bytes <= 9 * 2 * 64 * 32 * 32 * 8
