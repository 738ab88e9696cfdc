"""Quantisers that observe their input and set themselves anew in each call: torch.ao's and torchao's, as modules and as operators.

A quantiser is read as what it is set to now. What it observes is no part of the function, and is left out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.fx import Node as Op

from .functional import graph_copy, with_graph
from .walk import arguments, is_tensor, tensor_named

OBSERVING = re.compile(r"aten::_?fused_moving_avg_obs")
SETTINGS = ("fake_quant_enabled", "observer_enabled", "scale", "zero_point", "activation_post_process", "is_per_channel", "qscheme")
OBSERVED_INTO = ("running_min", "running_max", "scale", "zero_point")
THEIRS = ("torch.ao.", "torchao.")  # of a class with another forward nobody knows what it does
PASSED_OVER = "its observers were passed over, and what they saw is of the network as it was: calibrate a folded copy anew"
OBSERVED = "the observers of {} fake quantisers are on; it was read with the scales that they have now"


def fake_quantisers(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that quantise and dequantise as torch.ao's and torchao's do, by their names."""
    return {path: each for path, each in module.named_modules() if is_fake_quantiser(each)}


def observers(module: nn.Module) -> list[nn.Module]:
    """The modules that only observe what comes by, as before a network is quantised without training."""
    known = (each for each in module.modules() if hasattr(each, "calculate_qparams") and not hasattr(each, "fake_quant_enabled"))
    return [each for each in known if type(each).forward.__module__.startswith(THEIRS)]


def note_on(module: nn.Module) -> str:
    """What is to be said of a module's observers; "" where they are off, or it has none."""
    if on := sum(is_on(each, "observer_enabled") for each in fake_quantisers(module).values()):
        return OBSERVED.format(on)
    inside = {id(each.activation_post_process) for each in fake_quantisers(module).values()}
    return PASSED_OVER if any(id(each) not in inside for each in observers(module)) else ""


def is_fake_quantiser(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in SETTINGS) and type(module).forward.__module__.startswith(THEIRS)


def is_symmetric(quantiser: Any) -> bool:
    return quantiser.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)


def per_channel(quantiser: Any, axis: int) -> None:
    """Let a fake quantiser that has one scale have one for each channel along an axis."""
    scheme = torch.per_channel_symmetric if is_symmetric(quantiser) else torch.per_channel_affine
    for each in (quantiser, quantiser.activation_post_process):
        each.qscheme, each.ch_axis = scheme, axis
    quantiser.is_per_channel = True


def fit_quantisers(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let fake quantisers hold as many scales as a state dict has for them: one, or one for each output channel."""
    for path, each in fake_quantisers(module).items():
        owners: tuple[Any, ...] = (each, each.activation_post_process)
        for owner, name in ((owners[0], "scale"), (owners[0], "zero_point"), (owners[1], "min_val"), (owners[1], "max_val")):
            inner = "" if owner is each else "activation_post_process."
            given, own = state.get(f"{path}.{inner}{name}"), getattr(owner, name, None)
            if given is not None and isinstance(own, Tensor) and given.shape != own.shape:
                owner._buffers[name] = own.new_empty(given.shape)
        if owners[0].scale.numel() > 1 and not owners[0].is_per_channel:
            per_channel(each, 0)


def is_on(module: nn.Module, switch: str) -> bool:
    return bool(getattr(module, switch).flatten()[:1].any())


def settled_quantisers(module: nn.Module) -> nn.Module:
    """The same module, whose observers and fake quantisers observe nothing from now on, and read none of their switches."""
    for each in observers(module):
        each.forward = MethodType(_unrounded, each)
    for each in fake_quantisers(module).values():
        each.forward = MethodType(rounded if is_on(each, "fake_quant_enabled") else _unrounded, each)
    return module


def _unrounded(self: Any, X: Tensor) -> Tensor:
    return X


def rounded(self: Any, X: Tensor) -> Tensor:
    """What a fake quantiser gives that observes nothing."""
    ends = self.activation_post_process.quant_min, self.activation_post_process.quant_max
    if self.is_per_channel:
        return torch.fake_quantize_per_channel_affine(X, self.scale, self.zero_point, self.ch_axis, *ends)
    return torch.fake_quantize_per_tensor_affine(X, self.scale, self.zero_point, *ends)


def without_observers(program: ExportedProgram) -> tuple[ExportedProgram, str]:
    """The same program, whose operators that observe and quantise do the latter alone, and what is to be said of it."""
    if not any(map(_observes, program.graph.nodes)):
        return program, ""
    module, _ = graph_copy(program)
    stored = {spec.arg.name: tensor_named(program, spec.target or "") for spec in program.graph_signature.input_specs}
    on = 0
    for op in list(module.graph.nodes):
        if not _observes(op):
            continue
        given = arguments(op)
        observing, rounding = (stored.get(given[name].name) for name in ("observer_on", "fake_quant_on"))
        on += observing is None or bool(observing.any())
        with module.graph.inserting_before(op):
            made = given["self"] if rounding is not None and not rounding.any() else _quantising(module.graph, given)
        if is_tensor(op):
            op.replace_all_uses_with(made)
        for item in [] if is_tensor(op) else list(op.users):  # behind its output and the mask come those numbers that it sets
            item.replace_all_uses_with({0: made, **{2 + i: given[name] for i, name in enumerate(OBSERVED_INTO)}}[item.args[1]])
            module.graph.erase_node(item)
        module.graph.erase_node(op)
    return with_graph(program, module, _without_updates(module, program)), OBSERVED.format(on) if on else ""


def _observes(op: Op) -> bool:
    return op.op == "call_function" and isinstance(op.target, torch._ops.OpOverload) and bool(OBSERVING.match(op.target._schema.name))


def _quantising(graph: torch.fx.Graph, given: dict[str, Any]) -> Op:
    ends = (given["quant_min"], given["quant_max"])
    args: tuple[Any, ...] = (given["self"], given["scale"], given["zero_point"])
    if given["per_row_fake_quant"]:
        made = graph.call_function(torch.ops.aten.fake_quantize_per_channel_affine.default, (*args, given["ch_axis"], *ends))
    else:
        made = graph.call_function(torch.ops.aten.fake_quantize_per_tensor_affine.tensor_qparams, (*args, *ends))
    made.meta = dict(given["self"].meta)
    return made


def _without_updates(module: torch.fx.GraphModule, program: ExportedProgram) -> Any:
    """The signature of a graph that no longer gives new numbers for the buffers that nothing writes into any more; others may give what
    those gave that did."""
    signature = copy.deepcopy(program.graph_signature)
    output = next(op for op in reversed(module.graph.nodes) if op.op == "output")
    inputs = {spec.arg.name for spec in signature.input_specs}
    given = list(zip(signature.output_specs, output.args[0], strict=True))
    kept = [(s, v) for s, v in given if not (s.kind == OutputKind.BUFFER_MUTATION and isinstance(v, Op) and v.name in inputs)]
    for spec, value in kept:
        if isinstance(value, Op) and isinstance(spec.arg, TensorArgument):
            spec.arg = TensorArgument(value.name)
    signature.output_specs = [spec for spec, _ in kept]
    output.args = (tuple(value for _, value in kept),)
    return signature
