"""A large model's folded weights: made one at a time, and the same numbers as those that are held."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from cases import ALL
from onnx import helper, numpy_helper

from bnfold.backends.onnx import folded
from bnfold.backends.onnx.files import load as loading
from bnfold.backends.onnx.fuse import fuse
from bnfold.backends.onnx.graph.proto import stored_tensors

ROOT = Path(__file__).resolve().parents[3]
LAYERS, CHANNELS = 32, 1024  # 4 MiB each
MIB = 1 << 20
START = """if True:
    import resource, subprocess, sys
    subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def deep(path: Path, layers: int) -> Path:
    """Matrices with a BatchNorm behind each, in a file beside the model's."""
    weight, ones = np.linspace(-1, 1, CHANNELS**2, dtype=np.float32).reshape(CHANNELS, CHANNELS), np.full(CHANNELS, 0.9, np.float32)
    nodes, stored = [], [numpy_helper.from_array(ones, "ones")]
    for i in range(layers):
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"c{i}"]))
        nodes.append(helper.make_node("BatchNormalization", [f"c{i}", *["ones"] * 4], [f"x{i + 1}"]))
        stored.append(numpy_helper.from_array(weight[:, :, None, None], f"w{i}"))
    ends = [helper.make_tensor_value_info(name, 1, ["N", CHANNELS, 1, 1]) for name in ("x0", f"x{layers}")]
    model = helper.make_model(helper.make_graph(nodes, "deep", ends[:1], ends[1:], stored), opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    return path


def peak(*arguments: str | Path) -> int:
    """Bytes of resident memory that a command takes at most, mapped files too. (A child starts with the peak of who starts it, so that
    is a small one.)"""
    command = [sys.executable, "-c", START, sys.executable, "-m", "bnfold", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no peak of memory to ask for")
def test_a_large_model_is_not_held_twice(tmp_path: Path) -> None:
    small, large = deep(tmp_path / "small.onnx", 1), deep(tmp_path / "large.onnx", LAYERS)
    size = LAYERS * 4 * MIB
    taken = peak("fuse", large, "-o", tmp_path / "folded.onnx", "--no-verify") - peak("inspect", small)
    assert taken < size + 96 * MIB  # the file, as it is mapped, 64 MiB that are held, and a few weights
    assert (tmp_path / "folded.onnx.data").stat().st_size >= size


def test_what_is_made_again_is_what_was_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LARGE", 0)
    made = 0
    for case in ALL[::8]:
        onnx.save(case.build(), tmp_path / "m.onnx")
        model = loading.load(tmp_path / "m.onnx")
        held, _ = fuse(model)
        with monkeypatch.context() as patch:
            patch.setattr(folded, "HELD", 0)
            again, _ = fuse(model)
        for one, other in zip(stored_tensors(held).values(), stored_tensors(again).values(), strict=True):
            assert (one.name, one.dtype, one.shape, one.tobytes()) == (other.name, other.dtype, other.shape, other.tobytes()), case.name
            made += isinstance(one, ir.Tensor) and isinstance(other, ir.LazyTensor)
    assert made > 10
