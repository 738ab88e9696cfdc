"""RepVGG's branches, merged into a plain network (Ding et al. 2021, "RepVGG: Making VGG-style ConvNets Great Again", arXiv:2101.03697).

    pip install torch onnx onnxscript scikit-learn
    python samples/reparam/reparam.py

trains a small network whose blocks are sums of a 3x3 convolution, a 1x1 convolution and the block's input, each with a BatchNorm, folds its
ONNX file, and prints the operators before and after, and the time that ONNX Runtime takes. In half a minute or so.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import onnx
from torch import Tensor, nn, relu

import bnfold

sys.path.append(str(Path(__file__).resolve().parents[1] / "digits"))
from recipe import digits, trained
from train import export

EPOCHS = 6


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        for name, size in (("large", 3), ("small", 1)):
            conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)
            self.add_module(name, nn.Sequential(conv, nn.BatchNorm2d(c_out)))
        self.same = nn.BatchNorm2d(c_out) if (c_in, stride) == (c_out, 1) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x) + self.small(x)
        return relu(y if self.same is None else y + self.same(x))


def network() -> nn.Module:
    blocks = Block(1, 16), Block(16, 16), Block(16, 32, 2), Block(32, 32), Block(32, 32)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def main() -> None:
    x, y, x_test, _ = digits()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trained.onnx"
        export(trained(0, x, y, EPOCHS, network), path)
        model = onnx.load(path)
    fused, report = bnfold.fuse(model)
    before, after = (Counter(node.op_type for node in each.graph.node) for each in (model, fused))
    print("| operator | before | after |\n|---|--:|--:|")
    for name in sorted(before | after):
        print(f"| {name} | {before[name]} | {after[name]} |")
    print("", *(f"{each.into}: {len(each.branches)} branches" for each in report.merged), "", sep="\n")
    print(bnfold.verify(model, fused, x_test[:64].numpy()), end="\n\n")
    print(bnfold.bench(model, fused, x_test[:1].numpy()))


if __name__ == "__main__":
    main()
