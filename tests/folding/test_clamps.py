"""Maps that pass what clips, on request: exact where nothing folded before, and certified by the coefficients."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import ALL, Case
from compare import OTHER_SIZES, SIZES, batchnorms, difference, feeds, is_valid, operators, run_double, run_stored

import bnfold

MORE = {  # the cases that stay without it, and what they then hold
    "conv, Relu, BatchNorm, padded conv": {"Relu": 0},
    "BatchNorm without shift, Relu, conv, scales of both signs": {"Relu": 0, "Max": 1, "Min": 1},
    "BatchNorm without shift, Clip to 6, conv": {"Clip": 0, "Max": 1, "Min": 1},
    "BatchNorm, Relu, GlobalAveragePool, gemm": {"Relu": 0, "Max": 1},
}


@pytest.mark.parametrize("case", [case for case in ALL if case.left and not case.clone], ids=str)
def test_what_folds_besides(case: Case) -> None:
    model = case.build()
    fused, report = bnfold.fuse(model, clamps=True)
    assert batchnorms(fused) == report.batchnorms.after == (0 if case.name in MORE else case.left)
    if case.name not in MORE:
        return
    onnx.checker.check_model(fused, full_check=is_valid(model, full=True))
    assert {kind: operators(fused)[kind] for kind in MORE[case.name]} == MORE[case.name]
    assert report.verify is not None
    assert (report.verify.verdict, report.verify.levels.coefficients.verdict) == ("equivalent", "equivalent")
    assert bnfold.verify(model, fused).levels.coefficients.certified == 1
    exact = case.build_double()
    folded, _ = bnfold.fuse(exact, clamps=True, check=False)
    for sizes in (SIZES, OTHER_SIZES):
        data = feeds(exact, sizes, below=case.below)
        assert difference(run_double(exact, data), run_double(folded, data)) <= 1e-12
        data = feeds(model, sizes, below=case.below)
        assert difference(run_stored(model, data), run_stored(fused, data)) <= 1e-5


def test_nothing_else_changes_than_without() -> None:
    lost = []
    for case in [case for case in ALL if not case.left][::6]:
        if batchnorms(bnfold.fuse(case.build(), clone=case.clone, clamps=True, check=False)[0]):
            lost.append(case.name)
    assert lost == []


def test_a_wrong_bound_is_found_by_its_coefficient() -> None:
    model = next(case for case in ALL if case.name == "BatchNorm, Relu, GlobalAveragePool, gemm").build()
    fused, _ = bnfold.fuse(model, clamps=True)
    tensor = next(t for t in fused.graph.initializer if t.name.endswith(".max"))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[-1] *= np.float32(1 + 1e-4)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    verdict = bnfold.verify(model, fused, coefficients_only=True)
    assert (verdict.verdict, "the low of Relu" in verdict.reason) == ("different", True)


def test_a_network_whose_blocks_begin_with_batchnorm(tmp_path: Path) -> None:
    """As DenseNet's: in a module, in the program, and in a file; with channels that are off, and scales of both signs."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, 8, 1, bias=False)
            self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.Conv2d(8, 4, 3, padding=1, bias=False)

        def forward(self, x):
            y = self.conv1(self.relu1(self.norm1(x)))
            return torch.cat([x, self.conv2(self.relu2(self.norm2(y)))], 1)

    def network():
        torch.manual_seed(0)
        head = (nn.BatchNorm2d(14), nn.Hardtanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, 5))
        made = nn.Sequential(nn.Conv2d(3, 6, 3), Block(6), Block(10), *head).eval()
        for each in made.modules():
            if isinstance(each, nn.BatchNorm2d):
                for tensor in (each.weight, each.bias, each.running_mean):
                    nn.init.normal_(tensor)
                nn.init.uniform_(each.running_var, 0.5, 2)
        with torch.no_grad():
            made[3].weight[1] = made[1].norm1.weight[2] = 0
        return made

    module, x = network(), torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "net.onnx"
    how = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False, "dynamo": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, **how)
    assert bnfold.fuse(module, example=x)[1].batchnorms.after == 3
    for given in (module, torch.export.export(module, (x,)), bnfold.load(path)):
        fused, report = bnfold.fuse(given, example=x, clamps=True)
        assert report.batchnorms.after == 0
        assert report.verify is not None
        assert report.verify.levels.coefficients.certified == 5
        if given is module:
            assert torch.allclose(fused(x), module(x), atol=1e-5)
            assert not [each for each in fused.modules() if type(each) in (nn.ReLU, nn.Hardtanh)]
            bnfold.save(fused, tmp_path / "folded.safetensors")
            assert torch.equal(bnfold.load(tmp_path / "folded.safetensors", arch=network)(x), fused(x))


def test_where_the_code_holds_the_bounds_a_batchnorm_stays() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    nn = torch.nn

    class Called(nn.Module):
        def __init__(self, relu) -> None:
            super().__init__()
            self.norm, self.relu, self.conv = nn.BatchNorm2d(3), relu, nn.Conv2d(3, 3, 1)
            nn.init.ones_(self.norm.bias)

        def forward(self, x):
            return self.relu(self.conv(self.relu(self.norm(x))))

    x = torch.randn(1, 3, 4, 4)
    for relu, why in ((nn.ReLU(), "the code calls its module in several places"), (nn.functional.relu, "calls it as a function")):
        _, report = bnfold.fuse(Called(relu).eval(), example=x, clamps=True)
        assert [layer.verdict for layer in report.layers] == ["kept"]
        assert why in report.layers[0].reason
