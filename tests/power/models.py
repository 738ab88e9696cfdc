"""The networks, and what bnfold and other tools make of them."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

import bnfold
from bnfold.backends.onnx.load import from_proto
from bnfold.backends.onnx.subject import OnnxSubject
from bnfold.backends.torch.subject import TorchSubject
from bnfold.backends.torch.trace import quiet, trace

OPSET = 18


def grouped() -> nn.Module:
    """Xie et al. 2017 in the smallest: a block with a grouped convolution, for the ordinary tests."""
    narrow = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    wide = [nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    last = [nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*narrow, *wide, *last)


def network(name: str, seed: int, dtype: torch.dtype) -> tuple[nn.Module, tuple[int, ...]]:
    from architectures.list import OWN, lively, make, measured  # beside this package; `python -m tests.power` puts it on the path

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


# --- folds ----------------------------------------------------------------------------------------------------------------------


def own(model: Any, example: Any = None) -> Any:
    return bnfold.fuse(model, example=example, check=False)[0]


def by_onnxsim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxsim

    with _silent():
        made, right = onnxsim.simplify(copy.deepcopy(model))
    assert right
    return made


def by_onnxslim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    with _silent():
        return onnxslim.slim(copy.deepcopy(model))


def by_runtime(level: str) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """What ONNX Runtime writes as its optimised model."""

    def fold(model: onnx.ModelProto) -> onnx.ModelProto:
        import onnxruntime as ort

        with tempfile.TemporaryDirectory() as folder:
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
            options.optimized_model_filepath = str(Path(folder, "model.onnx"))
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return onnx.load(options.optimized_model_filepath)

    return fold


def by_fx(module: nn.Module, example: Any = None) -> nn.Module:
    from torch.fx.experimental import optimization

    return optimization.fuse(module)


ONNX_FOLDS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "bnfold": own,
    "onnxsim": by_onnxsim,
    "onnxslim": by_onnxslim,
    "ONNX Runtime, basic": by_runtime("BASIC"),
    "ONNX Runtime, extended": by_runtime("EXTENDED"),
}
TORCH_FOLDS: dict[str, Callable[..., nn.Module]] = {"bnfold": own, "torch.fx": by_fx}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), quiet():
        yield


# --- subjects -------------------------------------------------------------------------------------------------------------------


class _Memory:
    """Runs of a model that is compared with many, each kept: the same seeds meet the same data every time."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], Any] = {}

    def of(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        runner: list[Any] = []

        def run(feeds: Any) -> Any:
            full = (*key, *((name, array.shape, hash(array.tobytes())) for name, array in sorted(feeds.items())))
            if full not in self.kept:
                if not runner:
                    runner.append(make())
                self.kept[full] = runner[0].run(feeds)
            return self.kept[full]

        return _Runner(run)


class _Runner:
    def __init__(self, run: Callable[[Any], Any]) -> None:
        self.run = run


class RememberedOnnx(OnnxSubject):
    """Without names of inner layers: the sweep doesn't ask where two models part."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(from_proto(model))
        self.memory = _Memory()
        self.plans: dict[bool, Any] = {}

    def plan(self, *, clone: bool = False) -> Any:
        if clone not in self.plans:
            self.plans[clone] = super().plan(clone=clone)
        return self.plans[clone]

    def oracle(self, **kwargs: Any) -> Any:
        return self.memory.of(("oracle", *map(str, kwargs.items())), lambda: super(RememberedOnnx, self).oracle(**kwargs))

    def layers(self) -> dict[str, str]:
        return {}


class RememberedTorch(TorchSubject):
    def __init__(self, module: nn.Module, example: torch.Tensor) -> None:
        super().__init__(trace(module, example))
        self.memory = _Memory()
        self.plans: dict[bool, Any] = {}

    def plan(self, *, clone: bool = False) -> Any:
        if clone not in self.plans:
            self.plans[clone] = super().plan(clone=clone)
        return self.plans[clone]

    def oracle(self, **kwargs: Any) -> Any:
        return self.memory.of(("oracle", *map(str, kwargs.items())), lambda: super(RememberedTorch, self).oracle(**kwargs))

    def layers(self) -> dict[str, str]:
        return {}
