"""What an ONNX operator is set to (see `bnfold.algebra.settings`), in one form for all opsets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from bnfold.algebra.quantised import steps
from bnfold.algebra.settings import Body, Common, Settings, bound, clip, counted, reduction

from ..graph.codes import FLOATING, WHOLE, bounds
from ..graph.constants import FLOATS
from ..graph.walk import arg, attribute, is_standard
from .lowering import SHAPES, OnnxLowering, OnnxNative

# They say nothing about the function: of training, of what else is stated, or of how precisely it is computed.
IDLE = {"consumed_inputs", "momentum", "stash_type", "ratio", "seed", "is_test", "broadcast", "saturate"}
RENAMED = {"K": "k", "constant_value": "value", "min_val": "min", "max_val": "max"}
WINDOWED = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "ConvInteger", "QLinearConv", "DeformConv"}
FUSED = {"FusedConv", "FusedGemm", "FusedMatMul"}  # ONNX Runtime's own; what they put behind is a node of its own
PARAMETERS = {"Clip": ("min", "max"), "LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta")}
ALIKE = {"Sum": "Add", "CastLike": "Cast"}
GLOBAL = {"GlobalAveragePool": "ReduceMean", "GlobalMaxPool": "ReduceMax"}
FLATTENING = {"Softmax", "LogSoftmax", "Hardmax"}  # before opset 13
MODES = {"bilinear": "linear", "bicubic": "cubic"}  # of GridSample, whose words have changed


def settings(ctx: OnnxLowering, node: ir.Node, native: OnnxNative, slots: Collection[Any]) -> Settings:
    """slots: which inputs are coefficients. What else goes in, and is no activation, is a setting."""
    activations = native.positions
    op, standard = (node.op_type, is_standard(node)) if node.op_type not in FUSED else (node.op_type.removeprefix("Fused"), True)
    values, bodies = _attributes(ctx, node, op, standard=standard)
    of_sizes = node.op_type in SHAPES and is_standard(node)
    names = _input_names(ctx, node)
    flows = {}
    for i, v in enumerate(node.inputs):
        if v is None or i in slots or of_sizes or (not v.name and v.producer() is None) or (i == 3 and node.op_type == "FusedConv"):
            continue
        if i in activations and not (ctx.is_constant(v) and ctx.tensor(v) is None):
            continue
        array = ctx.const(v)
        name = names[i] if i < len(names) else f"input {i}"
        if array is None:
            flows[name] = ctx.value(v)
        elif array.size or node.op_type != "Resize":  # there an empty one stands for none
            values[RENAMED.get(name, name)] = array
    if standard:
        _settle(ctx, node, op, values)
    given = [v for v in node.outputs if v.name]
    places = {ctx.value(v): node.outputs.index(v) for v in given} if len(given) > 1 else {}
    source = node.inputs[0] if of_sizes and node.inputs else None
    shape_of = None if source is None or ctx.is_constant(source) else ctx.value(source)
    operator = ALIKE.get(op, op) if standard else f"{node.domain}::{op}"
    rank = ctx.value(node.inputs[0]).rank if node.inputs and node.inputs[0] is not None else None
    common: Common = (operator, values)
    if operator in GLOBAL and rank is not None and is_standard(node):
        common = reduction(GLOBAL[operator], range(2, rank), rank)
    elif operator == "Clip":
        common = clip(values.get("min"), values.get("max"))
    elif operator == "Max" and len(values) == 1 and values.keys() <= {"data_0", "data_0 1"} and not np.any(next(iter(values.values()))):
        common = "Relu", {}
    return Settings(*common, common if standard else None, places, tuple(activations), shape_of, flows, bodies, "onnx")


def fused(node: ir.Node, operator: str) -> Settings:
    """Those of what ONNX Runtime puts behind a linear operator: an activation, or "Add"."""
    given = wholly(node, "activation_params")
    values: Mapping[str, Any] = dict(zip(PARAMETERS.get(operator, ()), given, strict=False))
    if operator == "Clip":
        values = {"min": bound(values.get("min"), -np.inf), "max": bound(values.get("max"), np.inf)}
    return Settings(operator, values, (operator, values), activations=(0,), kind="onnx")


def wholly(node: ir.Node, name: str) -> tuple[float, ...]:
    """An attribute that is a list of numbers, an empty one where it isn't there."""
    found: Any = attribute(node, name, ())
    return tuple(float(n) for n in found or ())


def _attributes(ctx: OnnxLowering, node: ir.Node, op: str, *, standard: bool) -> tuple[dict[str, Any], tuple[Body, ...]]:
    values: dict[str, Any] = dict(_defaults(op, ctx.opset)) if standard else {}
    bodies = []
    for name, given in node.attributes.items():
        if given.type == ir.AttributeType.GRAPH:
            bodies.append(_body(ctx, name, given.as_graph()))
        elif given.type == ir.AttributeType.GRAPHS:
            bodies += [_body(ctx, f"{name} {i}", graph) for i, graph in enumerate(given.as_graphs())]
        elif given.type == ir.AttributeType.TENSOR:
            values[name] = given.as_tensor().numpy()
        elif given.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
            values[name] = tuple(given.value)
        elif given.type in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
            values[name] = given.value
        else:
            values[name] = ir.to_proto(given).SerializeToString(deterministic=True)
    return {name: value for name, value in values.items() if name not in IDLE}, tuple(sorted(bodies, key=lambda body: body.name))


def _body(ctx: OnnxLowering, name: str, graph: ir.Graph) -> Body:
    outputs: list[Any] = []
    for v in graph.outputs:
        array = ctx.const(v)
        outputs.append(ctx.value(v) if array is None else array)
    return Body(name, tuple(ctx.value(v) for v in graph.inputs), tuple(outputs))


@lru_cache(maxsize=1024)
def _defaults(op_type: str, opset: int) -> dict[str, Any]:
    """The values of the attributes that aren't written. What came with a later version stands for what had always been so."""
    found: dict[str, Any] = {}
    for version in (onnx.defs.onnx_opset_version(), opset):
        try:
            schema = onnx.defs.get_schema(op_type, version, "")
        except onnx.defs.SchemaError:
            continue
        for name, each in schema.attributes.items():
            if each.default_value.type:
                value = onnx.helper.get_attribute_value(each.default_value)
                value = value.decode() if isinstance(value, bytes) else value
                found[name] = tuple(value) if isinstance(value, list) else value
    return found


def _input_names(ctx: OnnxLowering, node: ir.Node) -> list[str]:
    try:
        schema = onnx.defs.get_schema(node.op_type, ctx.opset, "" if is_standard(node) else node.domain)
    except onnx.defs.SchemaError:
        return []
    names = [each.name for each in schema.inputs]
    return names + [f"{names[-1]} {i}" for i in range(1, len(node.inputs) - len(names) + 1)] if names else []


# --- one form -------------------------------------------------------------------------------------------------------------------------


def _settle(ctx: OnnxLowering, node: ir.Node, op: str, values: dict[str, Any]) -> None:
    """Put what is said in several ways in one of them."""
    values.pop("activation", None)
    values.pop("activation_params", None)
    first = next((v for v in node.inputs if v is not None), None)
    rank = None if first is None else ctx.value(first).rank
    if op in WINDOWED:
        _window(ctx, node, values)
    if op in ("QuantizeLinear", "DequantizeLinear"):
        _codes(ctx, node, values)
    if op in FLATTENING and ctx.opset < 13:
        axis = int(values["axis"])
        last = rank is not None and axis % rank == rank - 1
        values["axis"] = -1 if last else f"{axis} and all behind it"
    if op == "Pad":
        values["pads"] = values.pop("paddings", values.get("pads"))
        if values.get("mode", "constant") == "constant":
            values["value"] = values.get("value", 0.0)
        else:
            values.pop("value", None)
        _spread(values, rank)
    if op in ("Resize", "Upsample"):
        _resize(ctx, values)
    if op == "MaxPool" and len(node.outputs) < 2:
        values.pop("storage_order", None)  # of the indices
    if op == "GridSample":
        values["mode"] = MODES.get(values["mode"], values["mode"])
    if op.startswith("Reduce"):
        _reduction(values, rank)
    if op == "AveragePool" and not any(values.get("pads", ())) and values.get("auto_pad", "NOTSET") in ("NOTSET", "VALID"):
        values["count_include_pad"] = 0 if not values.get("ceil_mode") else values.get("count_include_pad", 0)
    if op == "LayerNormalization" and rank is not None:
        values["axis"] = int(values["axis"]) % rank
    for name in ("axis", "axes"):
        if rank is not None and rank > 0 and name in values and np.asarray(values[name]).dtype.kind == "i":
            new = 1 if op == "OneHot" else np.size(values[name]) if op == "Unsqueeze" else 0
            values[name] = counted(values[name], rank + new)
    floats = [ctx.shapes.dtype(v) for v in node.outputs if ctx.shapes.dtype(v) in FLOATS]
    if op == "Cast" and floats:
        values.pop("to", None)  # a float's precision is compared apart


def _codes(ctx: OnnxLowering, node: ir.Node, values: dict[str, Any]) -> None:
    """Codes and their zero point by how far they reach."""
    kind = ctx.dtype(node.outputs[0] if node.op_type == "QuantizeLinear" else arg(node))
    name = next((name for name in ("y_zero_point", "x_zero_point") if name in values), "")
    if kind is not None and kind.numpy() in FLOATING | WHOLE and (name or len(node.inputs) < 3):
        values |= steps(values.pop(name, 0), bounds(kind.numpy()))


def _reduction(values: dict[str, Any], rank: int | None) -> None:
    axes = np.ravel(values.get("axes", ()))
    none = not axes.size
    if none and values.pop("noop_with_empty_axes", 0):
        values["axes"] = "none"
    elif none:
        values["axes"] = "all" if rank is None else tuple(range(rank))
    else:
        values["axes"] = tuple(sorted(counted(axes, rank))) if rank else tuple(axes.tolist())
    values.pop("noop_with_empty_axes", None)


def _spread(values: dict[str, Any], rank: int | None) -> None:
    """Widths for every axis, where only some are named."""
    axes = values.pop("axes", None)
    if axes is None or rank is None or values.get("pads") is None:
        return
    widths, pads, half = [0] * (2 * rank), np.ravel(values["pads"]), np.size(values["pads"]) // 2
    for axis, low, high in zip(counted(np.ravel(axes), rank), pads[:half], pads[half:], strict=True):
        widths[axis], widths[rank + axis] = int(low), int(high)
    values["pads"] = tuple(widths)


def _resize(ctx: OnnxLowering, values: dict[str, Any]) -> None:
    if ctx.opset < 11:  # there was no word for it yet
        values.update(coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    if values.get("mode") != "nearest":
        values.pop("nearest_mode", None)
    if values.get("mode") != "cubic":
        values.pop("cubic_coeff_a", None)
        values.pop("exclude_outside", None)
    if values.get("coordinate_transformation_mode") != "tf_crop_and_resize":
        values.pop("extrapolation_value", None)
        values.pop("roi", None)


def _window(ctx: OnnxLowering, node: ir.Node, values: dict[str, Any]) -> None:
    """Strides, dilations and padding of every axis; SAME as the widths that it comes to, where the sizes are known."""
    weight = ctx.const(node.inputs[1]) if "Conv" in node.op_type and len(node.inputs) > 1 else None
    kernel = tuple(values.get("kernel_shape") or (() if weight is None else weight.shape[2:]))
    count = len(kernel)
    if weight is not None:
        values.pop("kernel_shape", None)
    if not count:
        return
    ones = (1,) * count
    for name in ("strides", "dilations"):
        values[name] = tuple(values.get(name) or ones)
    if node.op_type == "ConvTranspose":
        values["output_padding"] = tuple(values.get("output_padding") or (0,) * count)
    mode = values.pop("auto_pad", "NOTSET") or "NOTSET"
    if mode in ("NOTSET", "VALID"):
        values["pads"] = tuple((values.get("pads") if mode == "NOTSET" else None) or (0,) * (2 * count))
        return
    values["pads"] = _same(ctx, node, values, kernel, lower=mode == "SAME_LOWER") or mode


def _same(ctx: OnnxLowering, node: ir.Node, values: dict[str, Any], kernel: tuple[int, ...], *, lower: bool) -> tuple[int, ...] | None:
    """What SAME pads, None where it depends on sizes that aren't known."""
    source = node.inputs[0]
    probes = None if source is None else ctx.value(source).probes
    if not probes or node.op_type == "ConvTranspose":
        return None
    found = set()
    for sizes in probes:
        before, after = [], []
        for n, k, stride, dilation in zip(sizes[2:], kernel, values["strides"], values["dilations"], strict=False):
            if stride != 1 and (n is None or len({tuple(each[2:]) for each in probes}) > 1):
                return None
            left = n if n is not None else 0
            total = max((-(-left // stride) - 1) * stride + (k - 1) * dilation + 1 - left, 0) if n is not None else (k - 1) * dilation
            before.append((total + 1) // 2 if lower else total // 2)
            after.append(total - before[-1])
        found.add((*before, *after))
    return found.pop() if len(found) == 1 else None
