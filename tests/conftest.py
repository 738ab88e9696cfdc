"""What several test files use: the sample, and small models that nobody needs to train."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "samples" / "digits"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under nohup: the programs that tests interrupt would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Processes side by side share the cores: with as many threads in each as there are cores, they wait for each other."""
    if processes := getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """PyTorch draws the same in each test, whichever went before: it begins each process with a seed of chance."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> Path:
    """The trained sample: images `image` (batch, 1, 8, 8) to `logits` (batch, 10), with 8 BatchNorms."""
    return DIGITS / "digits.onnx"


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the stages of ONNX models run from now on, by the operators' first outputs, as often as it stands in one."""
    from bnfold.backends.onnx.recalibration import stage as lockstep_stage

    seen: list[str] = []
    make = lockstep_stage._proto

    def spy(*args: Any) -> Any:
        proto, lent = make(*args)
        seen.extend(node.output[0] for node in proto.graph.node)
        return proto, lent

    monkeypatch.setattr(lockstep_stage, "_proto", spy)
    return seen


@pytest.fixture(scope="session")
def small() -> Callable[..., onnx.ModelProto]:
    """Makes small models, see `small_model`."""
    return small_model


def small_model(*, fold: str = "all", seed: int = 0, batch: int | str = "batch") -> onnx.ModelProto:
    """x (batch, 3, 8, 8) -> Conv -> BatchNorm -> y (batch, 4, 6, 6).

    fold: "all" folds; "none" does, for a Sigmoid stands between the two; "gone" has a Relu in place of the BatchNorm.
    """
    rng = np.random.default_rng(seed)
    arrays = {
        "weight": rng.standard_normal((4, 3, 3, 3)),
        "bias": rng.standard_normal(4),
        "gamma": rng.uniform(0.5, 1.5, 4),
        "beta": rng.standard_normal(4),
        "mean": rng.standard_normal(4),
        "var": rng.uniform(0.5, 1.5, 4),
    }
    nodes = [helper.make_node("Conv", ["x", "weight", "bias"], ["c"], name="conv")]
    if fold == "none":
        nodes.append(helper.make_node("Sigmoid", ["c"], ["s"], name="sigmoid"))
    if fold == "gone":
        nodes.append(helper.make_node("Relu", ["c"], ["y"], name="relu"))
        arrays = {name: arrays[name] for name in ("weight", "bias")}
    else:
        nodes.append(helper.make_node("BatchNormalization", [nodes[-1].output[0], "gamma", "beta", "mean", "var"], ["y"], name="bn"))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [batch, 4, 6, 6])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


@pytest.fixture(autouse=True)
def _no_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output is the same on GitHub as anywhere else."""
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Callable[..., onnx.ModelProto]) -> Path:
    """A folder with models (model, none, gone and another .onnx) and data, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    onnx.save(small(), "model.onnx")
    onnx.save(small(fold="none"), "none.onnx")
    onnx.save(small(fold="gone"), "gone.onnx")
    onnx.save(small(seed=1), "another.onnx")
    rng = np.random.default_rng(0)
    np.save("x.npy", rng.standard_normal((24, 3, 8, 8)).astype(np.float32))
    return tmp_path
