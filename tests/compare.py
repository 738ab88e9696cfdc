"""Helpers that compare two ONNX models: what they hold, what they show to a caller, and what they compute."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import helper

SIZES = {"N": 3, "H": 9, "W": 7, "L": 6, "K": 6, "flag": 1}  # of dynamic axes, by name, and the value of every boolean input
OTHER_SIZES = {"N": 1, "H": 10, "W": 8, "L": 5, "K": 6, "flag": 0}
TESTED = (1, 31)  # the release of ONNX Runtime that runs all models of the tests, and what older ones say of those that they can't
TOO_OLD = (
    r"opset \d+ is under development|max supported IR version|only \*guarantees\* support|Could not find an implementation for"
    r"|Einsum op: The candidate output does not match"  # 1.20, where an operand is summed and turned
)
Feeds = dict[str, np.ndarray]


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every operator, those of subgraphs and local functions too."""

    def walk(some: Iterator[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        for node in some:
            yield node
            for attr in node.attribute:
                for graph in [attr.g] if attr.type == onnx.AttributeProto.GRAPH else attr.graphs:
                    yield from walk(graph.node)

    yield from walk(iter(model.graph.node))
    for function in model.functions:
        yield from walk(iter(function.node))


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in nodes(model) if node.domain in ("", "ai.onnx"))


def batchnorms(model: onnx.ModelProto) -> int:
    return operators(model)["BatchNormalization"]


def true_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller must give, in order."""
    initialised = {t.name for t in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in initialised]


def interface(model: onnx.ModelProto) -> dict[str, object]:
    """All that a caller may lean on but bnfold's certificate. Below IR 4 every initializer is listed as an input; those don't count."""
    inputs = true_inputs(model) if model.ir_version < 4 else model.graph.input
    return {
        "inputs": [i.SerializeToString(deterministic=True) for i in inputs],
        "outputs": [o.SerializeToString(deterministic=True) for o in model.graph.output],
        "opsets": {o.domain: o.version for o in model.opset_import},
        "ir": model.ir_version,
        "producer": (model.producer_name, model.producer_version, model.domain, model.model_version, model.doc_string),
        "metadata": {p.key: p.value for p in model.metadata_props if not p.key.startswith("bnfold.")},
        "graph": model.graph.name,
    }


def defaults(model: onnx.ModelProto) -> dict[str, bytes]:
    """The initializers that callers may override (IR 4 and later), by name."""
    if model.ir_version < 4:
        return {}
    listed = {i.name for i in model.graph.input}
    return {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in model.graph.initializer if t.name in listed}


def is_valid(model: onnx.ModelProto, *, full: bool) -> bool:
    try:
        onnx.checker.check_model(model, full_check=full)
    except Exception:
        return False
    return True


def feeds(model: onnx.ModelProto, sizes: dict[str, int] = SIZES, *, below: int = 4, seed: int = 0) -> Feeds:
    """Random data for the true inputs: normal floats, integers below `below`; booleans are all as `sizes` says."""
    made = {}
    for info in true_inputs(model):
        tensor = info.type.tensor_type
        shape = [d.dim_value or sizes.get(d.dim_param, 5) for d in tensor.shape.dim]
        rng = np.random.default_rng((zlib.crc32(info.name.encode()), seed))
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype == np.bool_:
            made[info.name] = np.full(shape, bool(sizes["flag"]))
        elif np.issubdtype(dtype, np.integer):
            made[info.name] = np.asarray(rng.integers(0, below, shape), dtype)
        else:
            made[info.name] = rng.normal(0.1, 1.0, shape).astype(dtype)
    return made


def run_double(model: onnx.ModelProto, data: Feeds) -> dict[str, np.ndarray]:
    """The model in float64, its weights as they are stored."""
    import onnx_ir

    from bnfold.backends.onnx.oracle.evaluator import Oracle

    return Oracle(onnx_ir.from_proto(model)).run(data)


def run_stored(model: onnx.ModelProto, data: Feeds) -> dict[str, np.ndarray]:
    """The model in ONNX Runtime on the CPU, its graph optimisation off."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run(None, data)
    except Exception as error:
        if tuple(map(int, ort.__version__.split(".")[:2])) < TESTED and re.search(TOO_OLD, str(error)):
            pytest.skip(f"ONNX Runtime {ort.__version__} is too old for this model")
        raise
    return dict(zip([o.name for o in session.get_outputs()], found, strict=True))


def difference(reference: dict[str, np.ndarray], candidate: dict[str, np.ndarray]) -> float:
    """The largest difference of any output, over the largest magnitude of that output; infinity where NaNs or shapes differ."""
    assert list(reference) == list(candidate)
    worst = 0.0
    for name, expected in reference.items():
        want, got = np.asarray(expected, np.float64), np.asarray(candidate[name], np.float64)
        if want.shape != got.shape or (np.isnan(want) != np.isnan(got)).any():
            return np.inf
        if want.size:
            scale = np.nanmax(np.abs(want), initial=0.0)
            worst = max(worst, float(np.nanmax(np.abs(want - got), initial=0.0) / (scale or 1.0)))
    return worst


def roundoff(model: onnx.ModelProto) -> float:
    """The unit roundoff of the coarsest floating-point type among the weights and inputs: half the distance from 1 to the next number."""
    units = {
        onnx.TensorProto.FLOAT16: 2.0**-11,
        onnx.TensorProto.BFLOAT16: 2.0**-8,
        onnx.TensorProto.FLOAT: 2.0**-24,
        onnx.TensorProto.DOUBLE: 2.0**-53,
    }
    kinds = {t.data_type for t in model.graph.initializer} | {i.type.tensor_type.elem_type for i in model.graph.input}
    return max((units[k] for k in kinds if k in units), default=2.0**-24)
