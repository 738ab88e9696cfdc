"""Models of a few operators, run by the oracle and by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper

from bnfold.backends.onnx.oracle.evaluator import Oracle

Array = np.ndarray


def model(nodes, feeds, outputs=("y",), weights=None, opset=17, functions=(), opsets=(), output_types=None) -> ir.Model:
    """An ONNX model of these nodes; inputs are typed by example, outputs have no shape."""
    weights = weights or {}
    types = output_types or {}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()],
        [helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), None) for name in outputs],
        [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in opsets)]
    ir_version = 3 if opset < 9 else 10
    if ir_version == 3:  # which wants initializers among the inputs
        graph.input.extend(helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in weights.items())
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=functions))


def one(op, arrays, opset=17, outputs=1, jitter=None, inner=(), **attributes):
    """The outputs of a single operator whose inputs are fed; None is an omitted input."""
    feeds = {f"x{i}": a for i, a in enumerate(arrays) if a is not None}
    names = tuple(f"y{i}" for i in range(outputs))
    node = helper.make_node(op, ["" if a is None else f"x{i}" for i, a in enumerate(arrays)], names, **attributes)
    found = Oracle(model([node], feeds, names, opset=opset), jitter=jitter, outputs=inner).run(feeds)
    return found["y0"] if outputs == 1 else tuple(found.values())


def on_ort(op, arrays, opset=17, outputs=1, **attributes):
    feeds = {f"x{i}": a for i, a in enumerate(arrays) if a is not None}
    names = tuple(f"y{i}" for i in range(outputs))
    node = helper.make_node(op, ["" if a is None else f"x{i}" for i, a in enumerate(arrays)], names, **attributes)
    proto = ir.to_proto(model([node], feeds, names, opset=opset))
    for info in proto.graph.output:
        info.ClearField("type")
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, feeds)
    return found[0] if outputs == 1 else tuple(found)


def normal(*shape, seed=0, dtype=np.float64) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def close(a, b, rtol=1e-12):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1.0, float(np.abs(b).max(initial=0))))
