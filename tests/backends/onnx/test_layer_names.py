"""Layers of PyTorch's bear their own names in what the newer exporter writes, by its metadata."""

from __future__ import annotations

import pytest

import bnfold

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
nn = torch.nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.sigmoid(self.bn2(torch.sigmoid(self.bn2(torch.sigmoid(self.bn1(self.conv1(x)))))))


def test_a_layer_goes_by_its_own_name_unless_it_is_called_twice() -> None:
    made = torch.onnx.export(nn.Sequential(Block(), Block()).eval(), (torch.randn(2, 3, 4, 4),), dynamo=True, optimize=False, verbose=False)
    report = bnfold.inspect(made.model_proto)
    assert report.layers[0].into == ("0.conv1",)
    names = [layer.name for layer in report.layers]
    assert names[0] == "0.bn1"
    assert "0.bn2" not in names
    assert len(set(names)) == len(names) == 4
    fresh, measured = bnfold.recalibrate(made.model_proto, [torch.randn(8, 3, 4, 4)], layers=["1.bn1"])
    assert [layer.name for layer in measured.layers if layer.count] == ["1.bn1"]
    assert bnfold.restore(fresh, measured.before)[1] == ["1.bn1"]
