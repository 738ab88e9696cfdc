"""Whether the operators of a proto fit each other, and whether what they make is in proportion to what the file holds."""

from __future__ import annotations

import math

import onnx
import onnx_ir as ir
from onnx import AttributeProto, ModelProto, TensorProto

from bnfold.errors import ModelError, UnsupportedError

from .validate import domain_of

FIELDS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data")
SMALL = 128  # numbers: larger weights are no sizes or axes
# What ONNX Runtime says of a model whose operators or versions it doesn't have, which tells nothing of the model.
LACKS = ("No Op registered", "is not a registered", "opset", "IR version", "mport domain", "can't be loaded")
LARGEST = 1 << 30  # numbers that an input may hold by the sizes that it states
MOST_SIZES = 1 << 20  # numbers of a list of sizes or axes that is computed: inference follows each of them


def most_elements(stored: int) -> int:
    """How many numbers a value may have in a model whose weights and inputs have so many. Networks from noise to pictures make 1e5 of 1."""
    return max(1 << 28, 1024 * stored)


def misfit(proto: ModelProto) -> str:
    """Why operators don't fit each other, by ONNX's own inference of types and shapes; "" if they do.

    What the file says of inner values is not asked. Large weights tell their types and shapes alone. Raises ModelError where small weights
    make a value that memory may not hold.
    """
    graph = proto.graph
    for info in graph.input:
        dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim if dim.dim_value > 0]
        if math.prod(dims) > LARGEST:  # no machine holds it: whoever feeds it would run out of memory
            raise ModelError(
                f"input '{info.name}' states the sizes {dims}, more than {LARGEST:,} numbers; export the model with its true ones"
            )
    skeleton = ModelProto(ir_version=max(proto.ir_version, 4), opset_import=proto.opset_import, functions=proto.functions)
    skeleton.graph.node.extend(graph.node)
    skeleton.graph.input.extend(graph.input)
    stated = {info.name for info in graph.input}
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= SMALL and any(tensor.HasField("raw_data") or getattr(tensor, field) for field in FIELDS):
            skeleton.graph.initializer.append(tensor)
        elif tensor.name not in stated:
            skeleton.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    own = {name for node in graph.node if domain_of(node.domain) for name in node.output}
    skeleton.graph.value_info.extend(info for info in graph.value_info if info.name in own)
    for info in graph.output:
        made = skeleton.graph.output.add()
        made.CopyFrom(info)
        if info.name not in own:
            made.type.tensor_type.ClearField("shape")
    _check_extent(skeleton, {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer})
    try:
        onnx.shape_inference.infer_shapes(skeleton, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # it raises its own kind, and others for what it can't read
        return " ".join(str(error).split()).removeprefix("[ShapeInferenceError] ")[:300]
    return ""


def refused(model: ir.Model) -> bool:
    """Whether ONNX Runtime refuses a model for what it is, not because it lacks an operator or a version."""
    from ..runtime.session import Session

    try:
        Session(model)
    except UnsupportedError as error:
        return not any(text in str(error) for text in LACKS)
    except Exception:
        return False
    return False


def _check_extent(skeleton: ModelProto, weights: dict[str, int]) -> None:
    """skeleton: what goes to the inference. weights: how many numbers each holds."""
    graph = skeleton.graph
    try:  # without following the values of lists of sizes, which may grow in it without end
        inferred = onnx.shape_inference.infer_shapes(skeleton, check_type=False, strict_mode=False, data_prop=False).graph
    except Exception:  # what it can't read is for the inference to say that looks closer
        return
    kinds = {info.name: info.type.tensor_type for info in (*inferred.value_info, *inferred.output, *graph.input)}
    sizes = {name: math.prod(d.dim_value or 1 for d in kind.shape.dim) for name, kind in kinds.items() if kind.HasField("shape")}
    stored = sum(weights.values()) + sum(sizes.get(info.name, 0) for info in graph.input if info.name not in weights)
    followed = set(weights)
    for node in graph.node:
        if (node.op_type == "Shape" or followed.issuperset(node.input)) and not any(a.type == AttributeProto.GRAPH for a in node.attribute):
            followed.update(node.output)
        for name in node.output:
            listed = name in followed and name in kinds and kinds[name].elem_type in (TensorProto.INT64, TensorProto.INT32)
            listed = listed and len(kinds[name].shape.dim) < 2
            if sizes.get(name, 0) > (max(MOST_SIZES, stored) if listed else most_elements(stored)):
                raise ModelError(
                    f"value '{name}' would have {sizes[name]:,} numbers, and weights and inputs have {stored:,}; don't use this file"
                )
