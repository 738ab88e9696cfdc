"""The networks that are timed: architectures of the sweep, exported once into a folder under the system's temporary one."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

SHAPE = (3, 224, 224)


def file(name: str) -> Path:
    """An ONNX file of an architecture of `tests.architectures`, BatchNorms kept, batch dynamic. resnet50 takes 103 MB."""
    folder = Path(tempfile.gettempdir(), "bnfold-bench")
    path = folder / f"{name}.onnx"
    if path.exists():
        return path
    import onnx
    import torch

    from tests.architectures.list import make
    from tests.power.models import exported

    folder.mkdir(exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    onnx.save(exported(make(name)[0], SHAPE, torch.float32), part)
    os.replace(part, path)
    return path


if __name__ == "__main__":
    print(file(sys.argv[1]))
