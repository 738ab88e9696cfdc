"""BatchNorms of PyTorch that stay, written as other operators: in a module, its state, and a program."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bnfold


class Net(nn.Module):
    """One that folds, and one in front of each of two nonlinearities, of four axes and of two; and an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.image, self.vector, self.last = nn.BatchNorm2d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn(self.conv(x)))
        x = torch.tanh(self.image(x)).mean((2, 3))
        return self.last(torch.tanh(self.vector(x)))


def net() -> nn.Module:
    torch.manual_seed(0)
    module = Net().eval()
    with torch.no_grad():
        for each in module.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm):
                for tensor in (each.weight, each.bias, each.running_mean):
                    if tensor is not None:
                        tensor.normal_()
                each.running_var.uniform_(0.5, 2)
    return module


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", ["mul-add", "depthwise"])
def test_in_a_module_and_in_a_program(how: str, tmp_path: Path) -> None:
    module = net()
    before = copy.deepcopy(module.state_dict())
    for given in (module, torch.export.export(module, (X,))):
        fused, report = bnfold.fuse(given, example=X, lower=how)
        assert [layer.verdict for layer in report.layers] == ["folded", "lowered", "lowered", "lowered"]
        assert report.batchnorms.after == 0
        assert report.verify is not None
        assert (report.verify.verdict, report.verify.levels.coefficients.certified) == ("equivalent", 4)
        run = fused if given is module else fused.module()
        assert torch.allclose(run(X), module(X), atol=1e-6)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    folded, _ = bnfold.fuse(module, example=X, lower=how)
    assert isinstance(folded.image, nn.Conv2d) == (how == "depthwise")
    bnfold.save(folded, tmp_path / "folded.safetensors")
    again = bnfold.load(tmp_path / "folded.safetensors", arch=net)
    assert torch.equal(again(X), folded(X))


@pytest.mark.parametrize("how", ["mul-add", "depthwise"])
def test_one_into_which_another_folds(how: str) -> None:
    module = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.Tanh()).eval()
    for norm in (module[1], module[2]):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    for given in (module, torch.export.export(module, (X,))):
        fused, report = bnfold.fuse(given, example=X, lower=how)
        assert [(layer.verdict, layer.into) for layer in report.layers] == [("lowered", ()), ("folded", ("1",))]
        run = fused if given is module else fused.module()
        assert torch.allclose(run(X), module(X), atol=1e-6)


def test_data_of_a_narrower_type_than_the_coefficients() -> None:
    norm = nn.BatchNorm2d(3)
    module = nn.Sequential(nn.Conv2d(3, 3, 1).half(), nn.Tanh(), norm, nn.Tanh()).eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.weight)
    for given in (module, torch.export.export(module, (X.half(),))):
        fused, report = bnfold.fuse(given, example=X.half(), lower="depthwise")
        assert report.layers[0].notes[-1].startswith("written as Mul and Add, since")
        run = fused if given is module else fused.module()
        assert run(X.half()).dtype == torch.float16
        assert torch.allclose(run(X.half()).float(), module(X.half()).float(), atol=2e-3)


def test_a_call_in_the_forward_stays_and_says_why() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("statistics", torch.rand(2, 3) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(nn.functional.batch_norm(torch.tanh(x), self.statistics[0], self.statistics[1]))

    _, report = bnfold.fuse(Called().eval(), example=X, lower="mul-add")
    assert [(layer.verdict, layer.reason) for layer in report.layers] == [
        ("kept", "it is computed in the forward of Called, which stays as it is")
    ]
    program = torch.export.export(Called().eval(), (X,))
    assert bnfold.fuse(program, lower="mul-add")[1].batchnorms.after == 0
