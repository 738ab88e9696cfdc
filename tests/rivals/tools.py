"""The tools that fold BatchNorms, each as its documentation calls it, on one network after the other.

python -m tests.rivals.tools TOOL NETWORK... prints a line of JSON for each network: `case:NAME`, an ONNX file, or an architecture's name.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import onnx

import bnfold
from bnfold.capture import quiet
from bnfold.errors import NothingToDoError

Fold = Callable[..., Any]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), quiet():
        yield


# --- of ONNX models ------------------------------------------------------------------------------------------------------------------


def own(model: Any, example: Any = None) -> Any:
    try:
        return bnfold.fuse(model, example=example, check=False)[0]
    except NothingToDoError:
        return model


def by_onnxsim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxsim

    made, right = onnxsim.simplify(copy.deepcopy(model))
    assert right
    return made


def by_onnxslim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    return onnxslim.slim(copy.deepcopy(model))


def by_onnxscript(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxscript.optimizer
    import onnxscript.rewriter

    return onnxscript.rewriter.rewrite(onnxscript.optimizer.optimize(copy.deepcopy(model)))


def by_onnxoptimizer(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxoptimizer

    return onnxoptimizer.optimize(model, onnxoptimizer.get_fuse_and_elimination_passes())


def by_runtime(level: str) -> Fold:
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


def by_aimet_onnx(model: onnx.ModelProto) -> onnx.ModelProto:
    from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight

    made = copy.deepcopy(model)
    fold_all_batch_norms_to_weight(made)
    return made


# --- of modules ----------------------------------------------------------------------------------------------------------------------


def by_fx(module: Any, example: Any = None) -> Any:
    from torch.fx.experimental import optimization

    return optimization.fuse(module)


def by_ao(module: Any, example: Any) -> Any:
    from torch.ao.quantization.quantize_fx import fuse_fx

    return fuse_fx(copy.deepcopy(module))


def by_aimet_torch(module: Any, example: Any) -> Any:
    from aimet_torch.batch_norm_fold import fold_all_batch_norms

    made = copy.deepcopy(module)
    fold_all_batch_norms(made, None, dummy_input=example)
    return made


def by_nncf(module: Any, example: Any) -> Any:
    import torch
    from nncf.experimental.torch.fx.transformations import apply_quantization_transformations

    made = torch.export.export(module, example).module()
    apply_quantization_transformations(made)
    return made


class Tool(NamedTuple):
    package: str
    fold: Fold
    of_modules: bool = False


TOOLS = {
    "bnfold": Tool("bnfold", own),
    "onnxsim": Tool("onnxsim", by_onnxsim),
    "onnxslim": Tool("onnxslim", by_onnxslim),
    "onnxscript": Tool("onnxscript", by_onnxscript),
    "onnxoptimizer": Tool("onnxoptimizer", by_onnxoptimizer),
    "ONNX Runtime": Tool("onnxruntime", by_runtime("EXTENDED")),
    "AIMET (ONNX)": Tool("aimet_onnx", by_aimet_onnx),
    "bnfold (module)": Tool("torch", own, True),
    "torch.fx": Tool("torch", by_fx, True),
    "torch.ao": Tool("torch", by_ao, True),
    "AIMET (module)": Tool("aimet_torch", by_aimet_torch, True),
    "NNCF": Tool("torchao", by_nncf, True),
}


def main(tool: str, *networks: str) -> None:
    from .judge import judge_module, judge_onnx, network, peak

    fold, of_modules = TOOLS[tool].fold, TOOLS[tool].of_modules
    for name in networks:
        found: dict[str, Any] = {"tool": tool, "name": name}
        model, example, limit = network(name, of_modules)
        start = time.process_time()
        try:
            with silent():
                made = fold(model, example) if of_modules else fold(model)
        except Exception as error:
            made, found["crashed"] = None, f"{type(error).__name__}: {error}"[:200]
        found |= {"seconds": time.process_time() - start, "megabytes": peak() / 1e6}
        judge = judge_module if of_modules else judge_onnx
        print(json.dumps(found | judge(model, made, example, limit)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
