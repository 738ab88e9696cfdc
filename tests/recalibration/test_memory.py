"""A device with too little memory: micro-batches are halved, and the statistics stay those of all the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.capi.onnxruntime_inference_collection import Session
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException
from torch.utils.data import DataLoader

import bnfold
from bnfold.backends.onnx.recalibration import stage as onnx_stage
from bnfold.backends.open import open_model
from bnfold.backends.torch.export.call import Call
from bnfold.backends.torch.recalibration import stage as torch_stage
from bnfold.data.memory import out_of_memory
from bnfold.recalibration.scoring import score
from tests.recalibration.test_calibration import agree, statistics
from tests.recalibration.test_resume import X, module, residual

ONNX_SAYS = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc:359 Failed to allocate memory for requested buffer of size 1638400"
TORCH_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB"


@pytest.fixture(params=["onnx", "torch"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model, and a switch: `holds(samples, behind)` lets its stages run so many samples, once `behind` micro-batches have run."""
    most, left = 0, 0

    def allocated(size: int, error: Exception) -> None:
        nonlocal left
        left -= 1
        if most and left < 0 and size > most:
            raise error

    run, called = onnx_stage._Session.__call__, torch_stage.called

    def onnx_run(self: Any, feeds: Any) -> Any:
        allocated(max(len(array) for array in feeds.values()), RuntimeException(ONNX_SAYS))
        return run(self, feeds)

    def torch_called(op: Any, value: Any, *args: Any) -> Any:
        if op.name == "conv2d" or op.name.startswith("mean"):
            size = len(value(op.args[0]))
            allocated(size, torch.OutOfMemoryError(TORCH_SAYS))
        return called(op, value, *args)

    monkeypatch.setattr(onnx_stage._Session, "__call__", onnx_run)
    monkeypatch.setattr(torch_stage, "called", torch_called)

    def holds(samples: int, behind: int = 0) -> None:
        nonlocal most, left
        most, left = samples, behind

    return (residual() if request.param == "onnx" else module()), holds


@pytest.mark.parametrize(("form", "behind"), [("array", 5), ("loader", 0)])
def test_micro_batches_are_halved_until_they_fit(device: Any, form: str, behind: int) -> None:
    """From 64 by halves to 8, at the first batch or in a later stage; nothing is counted twice, or left out."""
    model, holds = device
    batches: Any = X if form == "array" else DataLoader(list(X), batch_size=64)
    wanted, plain = bnfold.recalibrate(model, X, batch_size=64)
    holds(8, behind)
    made, report = bnfold.recalibrate(model, batches, batch_size=64 if form == "array" else None)
    agree(statistics(made), statistics(wanted))
    assert [layer.count for layer in report.layers] == [layer.count for layer in plain.layers]
    assert report.samples == 300
    assert "not enough memory for 16 samples at a time: went on with 8" in report.notes


def test_where_halving_does_not_help_a_line_says_so(device: Any) -> None:
    model, holds = device
    holds(1)
    with pytest.raises(bnfold.OutOfMemoryError, match=r"not enough memory for 32 samples at a time \(.*\): give a smaller batch_size or "):
        bnfold.recalibrate(model, X, method="precise", batch_size=32)  # whose statistics depend on it
    with pytest.raises(bnfold.OutOfMemoryError, match="for 30 samples at a time"):
        bnfold.recalibrate(model, iter([X[:30], X[30:60]]))  # which can't be read again
    holds(-1)
    with pytest.raises(bnfold.DeviceError, match="not enough memory for 1 sample at a time"):
        bnfold.recalibrate(model, X)


def test_a_model_of_one_batch_size_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    monkeypatch.setattr(onnx_stage._Session, "__call__", raising(RuntimeException(ONNX_SAYS)))
    with pytest.raises(bnfold.OutOfMemoryError, match="not enough memory for 4 samples at a time"):
        bnfold.recalibrate(model, X)


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeException("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code: std::bad_alloc"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeException("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0"), True),
        (MemoryError(), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
)
def test_how_runtimes_say_it(error: Exception, short: bool) -> None:
    assert out_of_memory(error) == short


def raising(error: Exception) -> Any:
    def run(*_: Any, **__: Any) -> Any:
        raise error

    return run


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_verify_and_scores_halve_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = residual() if kind == "onnx" else module()
    fused, _ = bnfold.fuse(model, example=X[:2])
    run, called = Session.run, Call.on

    def onnx_run(self: Any, names: Any, feeds: Any, options: Any = None) -> Any:
        if len(feeds["x"]) > 3:
            raise RuntimeException(ONNX_SAYS)
        return run(self, names, feeds, options)

    def torch_run(self: Any, network: Any) -> Any:
        if len(self.args[0]) > 3:
            raise torch.OutOfMemoryError(TORCH_SAYS)
        return called(self, network)

    monkeypatch.setattr(Session, "run", onnx_run)
    monkeypatch.setattr(Call, "on", torch_run)
    report = bnfold.verify(model, fused, X[:16])
    assert report.verdict == "equivalent"
    assert report.samples == 16
    assert "not enough memory for 4 samples at a time: went on with 2" in report.notes
    with pytest.raises(bnfold.OutOfMemoryError, match="not enough memory for 16 samples"):
        bnfold.bench(model, fused, [X[:16]], rounds=2)  # which times the batch that it is given
    scored = score(open_model(model, X[:2]), (X, np.arange(300) % 4))
    assert scored is not None
    assert len(scored.right) == 300
