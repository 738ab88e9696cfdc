"""Constant channels that leave, in modules, programs and files: what is left computes the same, and every coefficient is certified."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

import bnfold

torch = pytest.importorskip("torch")
nn = torch.nn

DIGITS = Path(__file__).parents[2] / "samples" / "digits"


def conv(i, o, kernel=3, groups=1, activation=nn.ReLU, padding=None):
    padding = kernel // 2 if padding is None else padding
    return nn.Sequential(nn.Conv2d(i, o, kernel, padding=padding, groups=groups, bias=False), nn.BatchNorm2d(o), activation())


class Residual(nn.Module):
    """As ResNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8, padding=0), nn.Sequential(conv(8, 12), nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x):
        x = self.a(x)
        return torch.relu(x + self.b(x)).mean((2, 3))


class Inverted(nn.Module):
    """As MobileNetV3's: a depthwise convolution, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(conv(3, 16, 1, activation=nn.Hardswish), conv(16, 16, 3, 16, nn.ReLU6))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Hardsigmoid())
        self.down = conv(16, 6, 1, activation=nn.Identity)

    def forward(self, x):
        y = self.up(x)
        return self.down(y * self.gate(y))


class Dense(nn.Module):
    """As DenseNet's, with a BatchNorm that stays in front of a zero padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.layer = nn.Sequential(nn.ReLU(), conv(8, 6, 1), nn.Conv2d(6, 4, 3, padding=1, bias=False))
        self.last = conv(12, 5, 1, activation=nn.SiLU)

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.cat([x, self.layer(self.norm(x))], 1))


def tail():
    """A channel becomes four features, and one that isn't 0 goes into the biases behind."""
    convs = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.Tanh()
    ends = nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 9, bias=False), nn.BatchNorm1d(9), nn.ELU(), nn.Linear(9, 4)
    return nn.Sequential(*convs, *ends)


BLOCKS = {"residual": Residual, "inverted": Inverted, "dense": Dense, "tail": tail}


def slimmed(made, dead=0.4):
    """Gammas of 0, as training with an L1 norm on them leaves them, of which most have a shift that a ReLU makes 0."""
    torch.manual_seed(0)
    for norm in (each for each in made.modules() if isinstance(each, (nn.BatchNorm1d, nn.BatchNorm2d))):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.4)
        nn.init.normal_(norm.running_mean, 0, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        off = torch.arange(int(dead * norm.num_features))
        with torch.no_grad():
            norm.weight[off] = 0
            norm.bias[off] = torch.where(off % 3 < 2, -1, 1) * (norm.bias[off].abs() + 0.01)
    return made.eval()


def exported(module, x):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False, "dynamo": False}
        torch.onnx.export(module, (x,), file, **how)
    return onnx.load_from_string(file.getvalue())


X = torch.randn(2, 3, 11, 11, generator=torch.Generator().manual_seed(0))


def forms(module):
    return {"module": module, "program": torch.export.export(module, (X,)), "file": exported(module, X)}


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_left_computes_the_same(name: str) -> None:
    module = slimmed(BLOCKS[name]())
    counts = []
    for form, given in forms(module).items():
        fused, report = bnfold.fuse(given, example=X, drop_dead=True)
        counts.append([(each.channels, each.dropped, each.dead) for each in report.dropped])
        assert all(each.reason for each in report.dropped if each.dropped < each.dead)
        assert report.verify is not None
        assert (report.verify.verdict, report.verify.levels.coefficients.verdict) == ("equivalent", "equivalent")
        assert report.parameters.after < report.parameters.before
        assert report.multiply_adds.after < report.multiply_adds.before
        again = bnfold.verify(given, fused, example=None if form == "file" else X)
        assert (again.verdict, again.levels.coefficients.certified) == ("equivalent", report.batchnorms.before)
        if form == "file":
            onnx.checker.check_model(fused, full_check=True)
        else:
            run = fused if form == "module" else fused.module()
            assert torch.allclose(run(X), module(X), atol=1e-5)
    assert counts[0] == counts[1] == counts[2]
    assert sum(dropped for _, dropped, _ in counts[0]) > 0


def test_exactly_what_leaves_and_what_stays() -> None:
    """In front of zeros that are padded, a constant leaves where the activation makes it 0; a gate makes nothing of 0."""
    residual = {each.name: each for each in bnfold.fuse(slimmed(Residual()), example=X, drop_dead=True)[1].dropped}
    assert (residual["b.0.0"].dropped, residual["b.0.0"].dead) == (3, 4)
    assert "pads with zeros" in residual["b.0.0"].reason
    assert residual["a.0"].dropped == residual["b.1"].dropped == 0
    fused, report = bnfold.fuse(slimmed(Inverted()), example=X, drop_dead=True)
    left = 16 - next(each.dropped for each in report.dropped if each.name == "up.1.0")
    assert 1 < left < 16
    depthwise, gate = fused.up[1][0], fused.gate[3]
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels, len(depthwise.weight)) == (left,) * 4
    assert fused.up[0][0].out_channels == fused.gate[1].in_channels == gate.out_channels == fused.down[0].in_channels == left


def test_one_channel_stays() -> None:
    module = slimmed(tail(), dead=1.0)
    for given in (module, exported(module, X)):
        report = bnfold.fuse(given, example=X, drop_dead=True)[1]
        assert [each.channels - each.dropped for each in report.dropped] == [1, 1, 1, 4]
        assert report.verify is not None
        assert report.verify.verdict == "equivalent"


def test_a_wrong_bias_is_found() -> None:
    module = slimmed(tail())
    fused, _ = bnfold.fuse(module, example=X, drop_dead=True)
    with torch.no_grad():
        fused[4].bias[0] += 1e-3
    verdict = bnfold.verify(module, fused, example=X, coefficients_only=True)
    assert (verdict.verdict, "bias" in verdict.reason) == ("different", True)


def test_a_smaller_module_is_saved_and_loaded(tmp_path: Path) -> None:
    fused, _ = bnfold.fuse(slimmed(Inverted()), example=X, drop_dead=True)
    for name in ("a.safetensors", "a.pth"):
        bnfold.save(fused, tmp_path / name)
        assert torch.equal(bnfold.load(tmp_path / name, arch=Inverted)(X), fused(X))


class Stated(nn.Module):
    """Its code states how many features there are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.Linear(72, 4)

    def forward(self, x):
        return self.linear(torch.relu(self.norm(self.conv(x))).view(-1, 72))


class Twice(nn.Module):
    """It calls a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.conv(torch.sigmoid(self.norm(self.conv(x)))))))


@pytest.mark.parametrize(("kind", "why"), [(Stated, "stated in the code"), (Twice, "called once")])
def test_what_the_code_holds_stays_in_a_module_alone(kind, why: str) -> None:
    module = slimmed(kind())
    for form, given in (("module", module), ("program", torch.export.export(module, (X,)))):
        fused, report = bnfold.fuse(given, example=X, drop_dead=True)
        dropped = sum(each.dropped for each in report.dropped)
        assert dropped == 0 if form == "module" else dropped > 0
        if form == "module":
            assert any(why in each.reason for each in report.dropped)
            assert torch.allclose(fused(X), module(X), atol=1e-5)


def test_the_command_on_a_slimmed_network(tmp_path: Path) -> None:
    model = onnx.load(DIGITS / "digits.onnx")
    norms = {node.input[1] for node in model.graph.node if node.op_type == "BatchNormalization"}
    for tensor in (each for each in model.graph.initializer if each.name in norms):
        gamma = onnx.numpy_helper.to_array(tensor).copy()
        gamma[np.argsort(np.abs(gamma))[: len(gamma) // 3]] = 0
        tensor.CopyFrom(onnx.numpy_helper.from_array(gamma, tensor.name))
    onnx.save(model, tmp_path / "slim.onnx")
    command = [sys.executable, "-m", "bnfold", "fuse", "slim.onnx", "-o", "fused.onnx", "--drop-dead", "--report", "fuse.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    report = json.loads((tmp_path / "fuse.json").read_text())
    assert report["verify"]["levels"]["coefficients"]["verdict"] == "equivalent"
    assert report["parameters"]["after"] < 0.9 * report["parameters"]["before"]
    assert f"{report['parameters']['before']:,} to {report['parameters']['after']:,} parameters" in done.stdout
    checked = [sys.executable, "-m", "bnfold", "verify", "slim.onnx", "fused.onnx", "--data", str(DIGITS / "test.npz"), "-q"]
    assert subprocess.run(checked, cwd=tmp_path, check=False).returncode == 0


def test_it_needs_no_batchnorm() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    nn.init.zeros_(module[0].weight[1])
    nn.init.ones_(module[0].bias)
    fused, report = bnfold.fuse(module, example=torch.ones(2, 4), drop_dead=True)
    assert (fused[0].out_features, fused[2].in_features, report.parameters.after) == (5, 5, 43)
    assert torch.allclose(fused(torch.ones(2, 4)), module(torch.ones(2, 4)), atol=1e-6)
