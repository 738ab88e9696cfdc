"""The networks that are timed: torchvision's, with lively BatchNorms, exported once into a folder under the system's temporary one."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def resnet(depth: int, exporter: str = "dynamo") -> Path:
    """An ONNX file of torchvision's ResNet of that depth, BatchNorms kept, batch dynamic. Depth 50 takes 103 MB.

    exporter: "dynamo", which computes a bias of zeros for each convolution in the graph, or "torchscript", which leaves it out.
    """
    folder = Path(tempfile.gettempdir(), "bnfold-bench")
    path = folder / f"resnet{depth}-{exporter}.onnx"
    if path.exists():
        return path
    import torch

    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    network = getattr(torchvision().models, f"resnet{depth}")().eval()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5)
                layer.running_var.uniform_(0.5, 1.5)
                layer.bias.normal_()
                layer.running_mean.normal_()
    part = path.with_suffix(f".{os.getpid()}.part")
    options: dict[str, Any] = {
        "dynamo": {"dynamo": True, "optimize": False, "external_data": False, "dynamic_shapes": ({0: torch.export.Dim("batch")},)},
        "torchscript": {
            "dynamo": False,
            "training": torch.onnx.TrainingMode.PRESERVE,
            "do_constant_folding": False,
            "input_names": ["x"],
            "dynamic_axes": {"x": {0: "batch"}},
        },
    }
    torch.onnx.export(network, (torch.randn(2, 3, 224, 224),), part, verbose=False, **options[exporter])
    os.replace(part, path)
    return path


def torchvision() -> Any:
    """The library, even where its compiled part can't be loaded: its Python side names that part's operators on import."""
    try:
        import torchvision
    except RuntimeError:
        import torch

        global _operators  # they last as long as this
        _operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


if __name__ == "__main__":
    print(resnet(int(sys.argv[1]), *sys.argv[2:]))
