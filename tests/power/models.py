"""The networks, and what bnfold and other tools make of them."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from architectures.list import OWN, lively, make, measured
from torch import nn

from bnfold.backends.onnx.files.load import from_proto
from bnfold.backends.onnx.model import OnnxModel
from bnfold.backends.torch.export.trace import trace
from bnfold.backends.torch.model import TorchModel
from bnfold.capture import quiet
from bnfold.running import Runner
from tests.rivals.tools import by_fx, by_onnxsim, by_onnxslim, by_runtime, own, silent

OPSET = 18


def grouped() -> nn.Module:
    """Xie et al. 2017 in the smallest: a block with a grouped convolution, for the ordinary tests."""
    narrow = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    wide = [nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    last = [nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*narrow, *wide, *last)


def network(name: str, seed: int, dtype: torch.dtype) -> tuple[nn.Module, tuple[int, ...]]:
    if name == "grouped":
        torch.manual_seed(seed)
        return lively(grouped(), seed).eval().to(dtype), (3, 12, 12)
    module, shape = make(name, seed)
    if name not in OWN:  # with random statistics, the signal fades in the deep ones
        module = measured(module, shape)
    return module.to(dtype), shape


def exported(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> onnx.ModelProto:
    """As ONNX, with its BatchNorms, the batch left open."""
    buffer = io.BytesIO()
    with quiet():
        torch.onnx.export(
            module,
            (torch.randn(2, *shape, dtype=dtype),),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
            input_names=["x"],
            output_names=["y"],
        )
    return onnx.load_from_string(buffer.getvalue())


def light(name: str) -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """A file of the onnx package, its input and output called x and y, and the shape of a sample."""
    model = onnx.load(Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"{name}.onnx")
    held = {tensor.name for tensor in model.graph.initializer}
    fed = next(value for value in model.graph.input if value.name not in held)
    model.ir_version = 8  # from 4 on, initializers need not be inputs, which what ONNX Runtime writes wouldn't have any more
    del model.graph.input[:]
    model.graph.input.append(fed)
    fed = model.graph.input[0]
    names = {fed.name: "x", model.graph.output[0].name: "y"}
    for node in model.graph.node:
        for places in (node.input, node.output):
            places[:] = [names.get(each, each) for each in places]
    fed.name, model.graph.output[0].name = "x", "y"
    return model, tuple(d.dim_value for d in fed.type.tensor_type.shape.dim[1:])


# --- folds ----------------------------------------------------------------------------------------------------------------------


ONNX_FOLDS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "bnfold": own,
    "onnxsim": silent()(by_onnxsim),
    "onnxslim": silent()(by_onnxslim),
    "ONNX Runtime, basic": by_runtime("BASIC"),
    "ONNX Runtime, extended": by_runtime("EXTENDED"),
}
TORCH_FOLDS: dict[str, Callable[..., nn.Module]] = {"bnfold": own, "torch.fx": by_fx}


# --- subjects -------------------------------------------------------------------------------------------------------------------


class _Remembering:
    """A subject that is compared with many: what its oracles answered to the same data is kept. All else it does as any subject."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.answers: dict[tuple[Any, ...], Any] = {}

    def oracle(self, *, jitter: int | None = None, outputs: Iterable[str] = ()) -> Runner:
        wanted = tuple(outputs)
        made = functools.cache(lambda: super(_Remembering, self).oracle(jitter=jitter, outputs=wanted))
        return _Recalled(self.answers, (jitter, wanted), made)


@dataclass(frozen=True)
class _Recalled:
    """An oracle that is made and runs only where it wasn't asked before. what: tells it from the model's others."""

    answers: dict[tuple[Any, ...], Any]
    what: tuple[Any, ...]
    made: Callable[[], Runner]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        key = (*self.what, *((name, array.shape, array.tobytes()) for name, array in sorted(feeds.items())))
        if key not in self.answers:
            self.answers[key] = self.made().run(feeds)
        return self.answers[key]


class RememberedOnnx(_Remembering, OnnxModel):
    """Of an `onnx_ir.Model`."""

    def beside(self, model: onnx.ModelProto) -> OnnxModel:
        """What `verify` makes of a model that is held against this one."""
        return OnnxModel(from_proto(model))


class RememberedTorch(_Remembering, TorchModel):
    """Of a traced module."""

    def beside(self, module: nn.Module) -> TorchModel:
        """The same; given a subject and a module, `verify` would take them for models of two frameworks."""
        return TorchModel(trace(module, self.traced))
