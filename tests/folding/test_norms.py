"""The scale and shift of other normalisations, moved into what reads them: in modules, programs and files."""

from __future__ import annotations

import warnings
from itertools import combinations
from pathlib import Path

import onnx
import pytest

import bnfold

torch = pytest.importorskip("torch")
nn = torch.nn


class WrittenOut(nn.Module):
    """An RMS normalisation as networks have it in their code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Of a transformer: two readers of one normalisation, one of which has no bias; a residual stream; a last one that nobody reads."""

    def __init__(self, rms) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.LayerNorm(8), rms(8), nn.LayerNorm(8)
        self.q, self.k, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 16, bias=False), nn.Linear(16, 8)

    def forward(self, x):
        y = self.first(x)
        x = x + torch.sigmoid(self.q(y)) * self.k(y)
        return self.last(x + self.down(torch.relu(self.up(self.second(x)))))


def block(rms=WrittenOut):
    torch.manual_seed(0)
    made = Block(rms).eval()
    for norm in (made.first, made.last):
        nn.init.normal_(norm.weight)
        nn.init.zeros_(norm.bias) if norm is made.first else nn.init.normal_(norm.bias)
    nn.init.normal_(made.second.weight)
    return made


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rms", [WrittenOut, nn.RMSNorm])
def test_in_a_module_and_a_program(rms) -> None:
    module = block(rms)
    for given in (module, torch.export.export(module, (X,))):
        fused, report = bnfold.fuse(given, example=X, norm_affine=True)
        moved = {layer.name.partition(",")[0]: layer.into for layer in report.layers if layer.verdict == "folded"}
        assert moved == {"first": ("q", "k"), "second": ("up",)}
        assert any("layer_norm last stay: layer_norm_1 is an output of the model" in note for note in report.notes)
        assert report.verify is not None
        assert (report.verify.verdict, report.verify.levels.coefficients.verdict) == ("equivalent", "equivalent")
        run = fused if given is module else fused.module()
        assert torch.allclose(run(X), module(X), atol=1e-5)
    fused, _ = bnfold.fuse(module, example=X, norm_affine=True)
    assert bool((fused.first.weight == 1).all())
    assert bool((fused.second.weight == 1).all())
    assert not bool((module.first.weight == 1).any())


def test_a_shift_grows_the_biases_that_it_needs() -> None:
    module = block()
    nn.init.normal_(module.first.bias)
    for given in (module, torch.export.export(module, (X,))):
        fused, report = bnfold.fuse(given, example=X, norm_affine=True)
        assert {name for layer in report.layers for name in layer.into} == {"q", "k", "up"}
        run = fused if given is module else fused.module()
        assert torch.allclose(run(X), module(X), atol=1e-5)
    assert module.k.bias is None
    assert bnfold.fuse(module, example=X, norm_affine=True)[0].k.bias is not None


def test_in_a_file_and_groups_of_channels(tmp_path: Path) -> None:
    norms = nn.GroupNorm(2, 4), nn.InstanceNorm2d(3, affine=True)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), norms[0], nn.Conv2d(4, 3, 3), norms[1], nn.Conv2d(3, 2, 1))
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), (torch.randn(1, 3, 6, 6),), tmp_path / "a.onnx", dynamo=False, opset_version=17)
    fused, report = bnfold.fuse(bnfold.load(tmp_path / "a.onnx"), norm_affine=True)
    assert {name for layer in report.layers for name in layer.into} == {"/2/Conv", "/4/Conv"}
    assert report.verify is not None
    assert (report.verify.verdict, report.verify.levels.coefficients.verdict) == ("equivalent", "equivalent")
    assert not [node for node in fused.graph if node.op_type == "Add"]


def test_without_the_option_there_is_nothing_to_do() -> None:
    with pytest.raises(bnfold.NothingToDoError):
        bnfold.fuse(block(), example=X)


class Several(nn.Module):
    """What asks for each option: a convolution that is read twice, a BatchNorm in front of a ReLU, and a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.norm, self.relu, self.last = nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)
        self.layer, self.head = nn.LayerNorm(4), nn.Linear(4, 5)

    def forward(self, x):
        y = self.conv(x)
        z = self.last(self.relu(self.norm(torch.sigmoid(torch.sigmoid(y) + self.bn(y)))))
        return self.head(self.layer(z.mean((2, 3))))


@pytest.mark.parametrize("options", [c for n in (2, 3) for c in combinations(("clone", "clamps", "norm_affine"), n)], ids="+".join)
def test_what_was_done_together_is_certified(options) -> None:
    torch.manual_seed(0)
    module, x = Several().eval(), torch.randn(2, 3, 8, 8)
    for norm in (module.bn, module.norm, module.layer):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    fused, report = bnfold.fuse(torch.export.export(module, (x,)), **dict.fromkeys(options, True))
    assert sum(layer.verdict == "folded" for layer in report.layers) == len(options)
    assert report.verify is not None
    assert report.verify.levels.coefficients.verdict == "equivalent"
    spoilt = fused.state_dict["last.weight"].detach().clone()
    spoilt[1, 2, 0, 0] *= 1.001
    fused.state_dict["last.weight"] = nn.Parameter(spoilt)
    assert bnfold.verify(module, fused, example=x, coefficients_only=True).verdict == "different"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "inception_v2", "resnet50", "shufflenet"])
def test_all_at_once_is_certified_in_the_networks_that_onnx_ships(name: str) -> None:
    path = Path(onnx.__file__).parent / f"backend/test/data/light/light_{name}.onnx"
    _, report = bnfold.fuse(bnfold.load(path), clamps=True, norm_affine=True, drop_dead=True, merge_linear=True)
    assert report.batchnorms.after == 0
    assert report.verify is not None
    assert report.verify.levels.coefficients.verdict == "equivalent"


def test_constants_at_an_input_are_no_normalisation_s() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return torch.sigmoid(self.conv(x * 2.5 + torch.arange(1.0, 4.0)[:, None, None]))

    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(bnfold.NothingToDoError):
        bnfold.fuse(torch.export.export(Scaled(), (x,)), norm_affine=True)
