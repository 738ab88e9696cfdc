"""What an ATen operator is set to (see `bnfold.algebra.settings`), and the same in ONNX's terms where ONNX has the operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node as Op

from bnfold.algebra.settings import Settings

from ..export.walk import FLOATS, arguments, dtype_of, is_tensor, operator_name, value_of
from .lowering import Slot, TorchLowering, TorchNative

# They say nothing about the function: where and how a tensor is held, how something is computed, and what counts in training.
IDLE = {"device", "layout", "memory_format", "pin_memory", "non_blocking", "copy", "inplace", "generator", "cudnn_enable", "cudnn_enabled"}
IDLE |= {"benchmark", "deterministic", "allow_tf32", "implicit", "requires_grad", "momentum", "sparse", "scale_grad_by_freq"}
IDLE |= {"padding_idx", "out_int32", "enable_gqa"}
DIMS = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "axis"}
SIZED = {"stride", "padding", "dilation", "kernel_size", "output_padding"}
TYPES = {kind: str(kind).removeprefix("torch.") for kind in FLOATS}


def settings(ctx: TorchLowering, op: Op, native: TorchNative, slots: Collection[Slot | None]) -> Settings:
    """slots: of the arguments that are coefficients. What else goes in, and is no activation, is a setting."""
    activations, held = native.operands, {slot.argument for slot in slots if slot is not None}
    outputs = {ctx.value(item): i for i, item in ctx.items(op).items()}
    name = _name(op)
    if not isinstance(op.target, torch._ops.OpOverload):
        values, unread = _held_graphs(ctx, op)
        return Settings(name, values, places=outputs, kind="torch", unread=unread)
    values = {}
    flowing: list[Any] = []
    for key, given in arguments(op).items():
        if key in IDLE or key in held:
            continue
        if isinstance(given, Op) and given in activations:
            flowing.append(key)
            continue
        if isinstance(given, (list, tuple)):
            flows = [isinstance(each, Op) and each in activations and not ctx.constants.is_constant(each) for each in given]
            flowing += [(key, i) for i, flow in enumerate(flows) if flow]
            given = [each for i, (each, flow) in enumerate(zip(given, flows, strict=True)) if not flow and f"{key}.{i}" not in held]
        found, known = _plain(ctx, given)
        if not known:
            return Settings(name, places=outputs, kind="torch", unread=f"{name} {op.name}, its {key} can't be read")
        values[key] = _counted(ctx, op, key, found)
    if name in ("max_pool", "avg_pool") and not values.get("stride"):
        values["stride"] = values["kernel_size"]
    common = _in_onnx(ctx, op, name, values)
    return Settings(name, values, common, outputs, tuple(flowing), kind="torch")


def _name(op: Op) -> str:
    """The operator, however it is called: with its indices or without, in place or not, for one, two or three dimensions."""
    name = operator_name(op) or str(op.target)
    name = name.removeprefix("native_").removesuffix("_with_indices").removeprefix("_adaptive")
    name = {"_softmax": "softmax", "_log_softmax": "log_softmax", "_prelu_kernel": "prelu", "_to_copy": "to", "convolution": "conv"}.get(
        name, name
    )
    for ending in ("1d", "2d", "3d"):
        if name in {f"conv{ending}", f"conv_transpose{ending}", f"max_pool{ending}", f"avg_pool{ending}"}:
            return name.removesuffix(ending)
    return name


def _plain(ctx: TorchLowering, given: Any) -> tuple[Any, bool]:
    """An argument as numbers, words and arrays, and whether that says all of it."""
    if isinstance(given, Op):
        if ctx.constants.is_constant(given):
            array = ctx.const(given)
            return array, array is not None
        if is_tensor(given):
            return None, False
    if isinstance(given, (list, tuple)):
        found = [_plain(ctx, each) for each in given]
        return tuple(each for each, _ in found), all(known for _, known in found)
    if isinstance(given, (Op, torch.SymInt, torch.SymFloat, torch.SymBool)):
        probes = ctx.sizes.values(given)
        return tuple(probes) if len(set(map(str, probes))) > 1 else probes[0], None not in probes
    if isinstance(given, torch.dtype):
        return str(given), True
    return given, given is None or isinstance(given, (bool, int, float, complex, str))


def _counted(ctx: TorchLowering, op: Op, key: str, value: Any) -> Any:
    """Axes from the front, and windows with a size for every dimension."""
    first = next((given for given in arguments(op).values() if isinstance(given, Op) and is_tensor(given)), None)
    rank = 0 if first is None else ctx.rank(first)
    if key in DIMS and rank:
        rank += operator_name(op) in ("unsqueeze", "stack")
        if isinstance(value, tuple):
            return tuple(int(axis) % rank for axis in value)
        return int(value) % rank if isinstance(value, int) else value
    count = next((n for n in (1, 2, 3) if f"{n}d" in operator_name(op)), rank - 2 if operator_name(op) == "convolution" else 0)
    if key in SIZED and count:
        if isinstance(value, int):
            return (value,) * count
        if isinstance(value, tuple) and len(value) == 1:
            return value * count
    return value


def _held_graphs(ctx: TorchLowering, op: Op) -> tuple[dict[str, Any], str]:
    """A higher-order operator's graphs, as one text each, and its constants."""
    values: dict[str, Any] = {}
    for i, given in enumerate((*op.args, *op.kwargs.values())):
        if isinstance(given, Op) and given.op == "get_attr":
            module = getattr(ctx.program.graph_module, str(given.target), None)
            if isinstance(module, GraphModule):
                values[f"graph {i}"] = _text(module)
                continue
        if isinstance(given, Op) and is_tensor(given) and not ctx.constants.is_constant(given):
            continue
        if isinstance(given, (list, tuple)):
            for k, each in enumerate(given):
                if not (isinstance(each, Op) and is_tensor(each) and not ctx.constants.is_constant(each)):
                    found, known = _plain(ctx, each)
                    if not known:
                        return {}, f"{op.target} {op.name}, its argument {i} can't be read"
                    values[f"argument {i}.{k}"] = found
            continue
        found, known = _plain(ctx, given)
        if not known:
            return {}, f"{op.target} {op.name}, its argument {i} can't be read"
        values[f"argument {i}"] = found
    return values, ""


def _text(module: GraphModule) -> str:
    """A graph by its operators and what they are called with, whatever its values are called."""
    number = {node: i for i, node in enumerate(module.graph.nodes)}
    lines = []
    for node in module.graph.nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: f"%{number[source]}")
        target = node.target if node.op == "call_function" else ""
        if node.op == "get_attr":
            found = getattr(module, str(node.target), None)
            if isinstance(found, GraphModule):
                target = _text(found)
            elif isinstance(found, Tensor):
                target = str((found.dtype, found.detach().cpu().tolist()))
        lines.append(f"{node.op} {target} {args} {kwargs}")
    return "\n".join(lines)


# --- in ONNX's terms --------------------------------------------------------------------------------------------------------------------

Common = tuple[str, Mapping[str, Any]]
PLAIN = {  # operators without settings
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "abs": "Abs",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "erf": "Erf",
    "floor": "Floor",
    "ceil": "Ceil",
    "sin": "Sin",
    "cos": "Cos",
    "reciprocal": "Reciprocal",
    "softsign": "Softsign",
    "mish": "Mish",
    "hardswish": "HardSwish",
    "matmul": "MatMul",
    "mm": "MatMul",
    "bmm": "MatMul",
    "mul": "Mul",
    "div": "Div",
    "where": "Where",
    "maximum": "Max",
    "minimum": "Min",
}


def _in_onnx(ctx: TorchLowering, op: Op, name: str, values: dict[str, Any]) -> Common | None:
    if name in PLAIN and not {key for key, value in values.items() if value is not None}:
        return PLAIN[name], {}
    made = TERMS.get(name)
    return None if made is None else made(ctx, op, values)


def _sum(operator: str) -> Callable[[Any, Op, dict[str, Any]], Common | None]:
    return lambda ctx, op, values: (operator, {}) if set(values) == {"alpha"} and float(values["alpha"]) == 1 else None


def _conv(ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
    padding, transposed = values["padding"], values.get("transposed", "transpose" in operator_name(op))
    if isinstance(padding, str):
        return None
    found = {"group": values["groups"], "strides": values["stride"], "dilations": values["dilation"], "pads": (*padding, *padding)}
    return ("ConvTranspose", {**found, "output_padding": values["output_padding"]}) if transposed else ("Conv", found)


def _pool(ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
    pads = (*values["padding"], *values["padding"])
    found = {"kernel_shape": values["kernel_size"], "strides": values["stride"], "pads": pads, "ceil_mode": int(values["ceil_mode"])}
    count = len(values["kernel_size"])
    if "dilation" in values:
        return "MaxPool", {**found, "dilations": values["dilation"]}
    if values.get("divisor_override") is not None:
        return None
    counted = int(bool(values["count_include_pad"]) and (any(pads) or bool(values["ceil_mode"])))
    return "AveragePool", {**found, "dilations": (1,) * count, "count_include_pad": counted}


def _global(operator: str) -> Callable[[Any, Op, dict[str, Any]], Common | None]:
    def of(ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
        rank, size = ctx.rank(arguments(op)["self"]), np.ravel(values["output_size"])
        axes = tuple(range(rank - size.size if size.size > 1 else 2, rank))
        return (operator, {"axes": axes, "keepdims": 1}) if set(size.tolist()) == {1} else None

    return of


def _reduced(operator: str) -> Callable[[Any, Op, dict[str, Any]], Common | None]:
    def of(ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
        rank, dim = ctx.rank(arguments(op)["self"]), values.get("dim")
        axes = range(rank) if dim is None or dim == () else dim if isinstance(dim, tuple) else (dim,)
        if values.get("dtype") is not None:
            return None
        return operator, {"axes": tuple(sorted(axes)), "keepdims": int(bool(values.get("keepdim", False)))}

    return of


def _softmax(operator: str) -> Callable[[Any, Op, dict[str, Any]], Common | None]:
    return lambda ctx, op, values: (operator, {"axis": values["dim"]})


def _clip(ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
    low, high = (values.get(name, values.get(f"{name}_val")) for name in ("min", "max"))
    if low == 0 and (high is None or high == math.inf):
        return "Relu", {}
    return "Clip", {"min": -math.inf if low is None else float(low), "max": math.inf if high is None else float(high)}


def _normalised(operator: str) -> Callable[[Any, Op, dict[str, Any]], Common | None]:
    def of(ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
        if operator == "LayerNormalization":
            return operator, {"epsilon": values["eps"], "axis": ctx.rank(arguments(op)["input"]) - len(values["normalized_shape"])}
        return operator, {"epsilon": values["eps"]} | ({"num_groups": values["num_groups"]} if "num_groups" in values else {})

    return of


def _flatten(ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
    rank = ctx.rank(arguments(op)["self"])
    return ("Flatten", {"axis": 1}) if values["start_dim"] == 1 and values["end_dim"] == rank - 1 else None


def _transpose(ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
    if "dims" in values:
        return "Transpose", {"perm": values["dims"]}
    order = list(range(ctx.rank(op)))
    one, other = values["dim0"], values["dim1"]
    order[one], order[other] = order[other], order[one]
    return "Transpose", {"perm": tuple(order)}


TERMS: dict[str, Callable[[Any, Op, dict[str, Any]], Common | None]] = {
    "conv": _conv,
    "conv_transpose": _conv,
    "max_pool": _pool,
    "avg_pool": _pool,
    "adaptive_avg_pool1d": _global("ReduceMean"),
    "adaptive_avg_pool2d": _global("ReduceMean"),
    "adaptive_avg_pool3d": _global("ReduceMean"),
    "adaptive_max_pool2d": _global("ReduceMax"),
    "mean": _reduced("ReduceMean"),
    "sum": _reduced("ReduceSum"),
    "amax": _reduced("ReduceMax"),
    "amin": _reduced("ReduceMin"),
    "flatten": _flatten,
    "permute": _transpose,
    "transpose": _transpose,
    "cat": lambda ctx, op, values: ("Concat", {"axis": values["dim"]}),
    "unsqueeze": lambda ctx, op, values: ("Unsqueeze", {"axes": (values["dim"],)}),
    "softmax": _softmax("Softmax"),
    "log_softmax": _softmax("LogSoftmax"),
    "clamp": _clip,
    "hardtanh": _clip,
    "clamp_min": _clip,
    "add": _sum("Add"),
    "sub": _sum("Sub"),
    "leaky_relu": lambda ctx, op, values: ("LeakyRelu", {"alpha": values["negative_slope"]}),
    "gelu": lambda ctx, op, values: ("Gelu", {"approximate": values["approximate"]}),
    "layer_norm": _normalised("LayerNormalization"),
    "group_norm": _normalised("GroupNormalization"),
    "instance_norm": _normalised("InstanceNormalization"),
}


def type_of(op: Any) -> str:
    """The floating-point type in which an operator gives its result, "" of another one."""
    kind = dtype_of(op) if isinstance(value_of(op), Tensor) else None
    return TYPES.get(kind, "") if kind is not None else ""
