"""What an ATen operator is set to (see `bnfold.algebra.settings`), and the same in ONNX's terms where ONNX has the operator."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node as Op

from bnfold.algebra.quantised import steps
from bnfold.algebra.settings import Common, Settings, clip, counted, reduction
from bnfold.algebra.weights import same_padding

from ..export.quantisers import quantiser
from ..export.walk import arguments, is_tensor, operator_name
from .lowering import TorchLowering
from .places import Slot, TorchNative

# They say nothing about the function: where and how a tensor is held, how something is computed, and what counts in training.
IDLE = {"device", "layout", "memory_format", "pin_memory", "non_blocking", "copy", "inplace", "generator", "cudnn_enable", "cudnn_enabled"}
IDLE |= {"benchmark", "deterministic", "allow_tf32", "implicit", "requires_grad", "momentum", "sparse", "scale_grad_by_freq"}
IDLE |= {"padding_idx", "out_int32", "enable_gqa"}
DIMS = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "axis"}
SIZED = {"stride", "padding", "dilation", "kernel_size", "output_padding"}


class _Unread(Exception):
    """An argument that can't be read; the text names it."""


def settings(ctx: TorchLowering, op: Op, native: TorchNative, slots: Collection[Slot | None]) -> Settings:
    """slots: of the arguments that are coefficients. What else goes in, and is no activation, is a setting."""
    name, coefficients = _name(op), {slot.argument for slot in slots if slot is not None}
    outputs = {ctx.value(item): i for i, item in ctx.items(op).items()}
    flowing: list[Any] = []
    try:
        values = (
            _stated(ctx, op, native.operands, coefficients, flowing) if isinstance(op.target, torch._ops.OpOverload) else _graphs(ctx, op)
        )
    except _Unread as argument:
        return Settings(name, places=outputs, kind="torch", unread=f"{name} {op.name}, its {argument} can't be read")
    if (rounding := quantiser(op)) is not None:
        zeros = [values.pop(key) for key in ("zero_point", "zero_points") if key in values]
        if zeros or rounding.zero is None:
            values |= steps(zeros[0] if zeros and zeros[0] is not None else 0, rounding.bounds)
            values = {key: value for key, value in values.items() if key not in ("quant_min", "quant_max")}
    if name in ("max_pool", "avg_pool") and not values.get("stride"):
        values["stride"] = values["kernel_size"]
    if name == "conv" and isinstance(word := values["padding"], str):
        kernel = ctx.shape(arguments(op)["weight"])[2:]
        widths = same_padding(kernel, values["dilation"]) if word == "same" else [(0, 0)] * len(kernel)
        if all(before == after for before, after in widths):
            values["padding"] = tuple(before for before, _ in widths)
    return Settings(name, values, _in_onnx(ctx, op, name, values), outputs, tuple(flowing), kind="torch")


def _stated(ctx: TorchLowering, op: Op, activations: Collection[Op], coefficients: Collection[str], flowing: list[Any]) -> dict[str, Any]:
    """What an operator's arguments state. flowing: gets the names of those that are activations."""
    values = {}
    for key, given in arguments(op).items():
        if key in IDLE or key in coefficients:
            continue
        if isinstance(given, Op) and given in activations:
            flowing.append(key)
            continue
        if isinstance(given, (list, tuple)):
            flows = [isinstance(each, Op) and each in activations and not ctx.is_constant(each) for each in given]
            flowing += [(key, i) for i, flow in enumerate(flows) if flow]
            given = [each for i, (each, flow) in enumerate(zip(given, flows, strict=True)) if not flow and f"{key}.{i}" not in coefficients]
        values[key] = _counted(ctx, op, key, _plain(ctx, given, key))
    return values


def _graphs(ctx: TorchLowering, op: Op) -> dict[str, Any]:
    """A higher-order operator's graphs, as one text each, and its constants."""
    values: dict[str, Any] = {}
    every: tuple[Any, ...] = (*op.args, *op.kwargs.values())
    for i, given in enumerate(every):
        if isinstance(given, Op) and given.op == "get_attr":
            module = getattr(ctx.program.graph_module, str(given.target), None)
            if isinstance(module, GraphModule):
                values[f"graph {i}"] = _text(module)
            continue
        listed = isinstance(given, (list, tuple))
        for k, each in enumerate(given if listed else [given]):
            if not (is_tensor(each) and ctx.is_activation(each)):
                values[f"argument {i}.{k}" if listed else f"argument {i}"] = _plain(ctx, each, f"argument {i}")
    return values


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


def _plain(ctx: TorchLowering, given: Any, key: str) -> Any:
    """An argument as numbers, words and arrays."""
    found: Any = given
    if ctx.is_constant(given):
        found = ctx.const(given)
        known = found is not None
    elif isinstance(given, (list, tuple)):
        return tuple(_plain(ctx, each, key) for each in given)
    elif isinstance(given, (Op, torch.SymInt, torch.SymFloat, torch.SymBool)) and not is_tensor(given):
        probes = ctx.sizes.values(given)
        found, known = tuple(probes) if len(set(map(str, probes))) > 1 else probes[0], None not in probes
    elif isinstance(given, torch.dtype):
        return str(given)
    else:
        known = given is None or isinstance(given, (bool, int, float, complex, str))
    if not known:
        raise _Unread(key)
    return found


def _counted(ctx: TorchLowering, op: Op, key: str, value: Any) -> Any:
    """Axes from the front, and windows with a size for every dimension."""
    first = next((given for given in arguments(op).values() if isinstance(given, Op) and is_tensor(given)), None)
    rank = 0 if first is None else ctx.rank(first)
    if key in DIMS and rank:
        rank += operator_name(op) in ("unsqueeze", "stack")
        return counted(value, rank) if isinstance(value, (int, tuple)) else value
    count = next((n for n in (1, 2, 3) if f"{n}d" in operator_name(op)), rank - 2 if operator_name(op) == "convolution" else 0)
    if key in SIZED and count:
        if isinstance(value, int):
            return (value,) * count
        if isinstance(value, tuple) and len(value) == 1:
            return value * count
    return value


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

# Operators without settings, which ONNX writes with a capital.
CAPITALISED = ("relu", "sigmoid", "tanh", "abs", "exp", "log", "sqrt", "erf", "floor", "ceil", "sin", "cos", "reciprocal", "softsign")
PLAIN = {name: name.capitalize() for name in (*CAPITALISED, "mish", "mul", "div", "where")}
PLAIN |= {"hardswish": "HardSwish", "maximum": "Max", "minimum": "Min", **dict.fromkeys(("matmul", "mm", "bmm"), "MatMul")}


def _in_onnx(ctx: TorchLowering, op: Op, name: str, values: dict[str, Any]) -> Common | None:
    if name in PLAIN and all(value is None for value in values.values()):
        return PLAIN[name], {}
    made = TERMS.get(name)
    return None if made is None else made(ctx, op, values)


def _sum(operator: str, ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
    return (operator, {}) if set(values) == {"alpha"} and float(values["alpha"]) == 1 else None


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


def _global(operator: str, ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
    rank, size = ctx.rank(arguments(op)["self"]), np.ravel(values["output_size"])
    axes = range(rank - size.size if size.size > 1 else 2, rank)
    return reduction(operator, axes, rank) if set(size.tolist()) == {1} else None


def _reduced(operator: str, ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
    found = reduction(operator, values.get("dim"), ctx.rank(arguments(op)["self"]), keeps=values.get("keepdim", False))
    return found if values.get("dtype") is None else None


def _clip(ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
    bounds: list[Any] = [values.get(name, values.get(f"{name}_val")) for name in ("min", "max")]
    return clip(*bounds) if all(np.size(each) == 1 for each in bounds) else None


def _normalised(operator: str, ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
    if operator == "LayerNormalization":
        return operator, {"epsilon": values["eps"], "axis": ctx.rank(arguments(op)["input"]) - len(values["normalized_shape"])}
    return operator, {"epsilon": values["eps"]} | ({"num_groups": values["num_groups"]} if "num_groups" in values else {})


def _flatten(ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
    rank = ctx.rank(arguments(op)["self"])
    return ("Flatten", {"axis": 1}) if values["start_dim"] == 1 and values["end_dim"] == rank - 1 else None


def _transpose(ctx: TorchLowering, op: Op, values: dict[str, Any]) -> Common | None:
    order = list(values.get("dims", range(ctx.rank(op))))
    if "dims" not in values:
        one, other = values["dim0"], values["dim1"]
        order[one], order[other] = order[other], order[one]
    return "Transpose", {"perm": tuple(order)}


def _as(operator: str, **names: str) -> Callable[[Any, Op, dict[str, Any]], Common]:
    """The same settings by ONNX's names."""
    return lambda ctx, op, values: (operator, {name: values[own] for name, own in names.items()})


TERMS: dict[str, Callable[[Any, Op, dict[str, Any]], Common | None]] = {
    **dict.fromkeys(("conv", "conv_transpose"), _conv),
    **dict.fromkeys(("max_pool", "avg_pool"), _pool),
    **{f"adaptive_avg_pool{n}d": partial(_global, "ReduceMean") for n in (1, 2, 3)},
    "adaptive_max_pool2d": partial(_global, "ReduceMax"),
    "mean": partial(_reduced, "ReduceMean"),
    "sum": partial(_reduced, "ReduceSum"),
    "amax": partial(_reduced, "ReduceMax"),
    "amin": partial(_reduced, "ReduceMin"),
    "flatten": _flatten,
    **dict.fromkeys(("permute", "transpose"), _transpose),
    "cat": _as("Concat", axis="dim"),
    "unsqueeze": lambda ctx, op, values: ("Unsqueeze", {"axes": (values["dim"],)}),
    "softmax": _as("Softmax", axis="dim"),
    "log_softmax": _as("LogSoftmax", axis="dim"),
    **dict.fromkeys(("clamp", "hardtanh", "clamp_min"), _clip),
    "add": partial(_sum, "Add"),
    "sub": partial(_sum, "Sub"),
    "leaky_relu": _as("LeakyRelu", alpha="negative_slope"),
    "gelu": _as("Gelu", approximate="approximate"),
    "layer_norm": partial(_normalised, "LayerNormalization"),
    "group_norm": partial(_normalised, "GroupNormalization"),
    "instance_norm": partial(_normalised, "InstanceNormalization"),
}
