"""torch.ao's layers that simulate a fold while they train: ConvBn2d, ConvBnReLU2d, LinearBn1d and their like.

In evaluation such a layer rounds W*s, with s = gamma/sqrt(var + epsilon), divides by s what comes out, adds its bias and calls its
BatchNorm: which is a layer with the weight W*s, the same fake quantiser, and the bias s*(b - mean) + beta (Krishnamoorthi 2018,
"Quantizing deep convolutional networks for efficient inference: a whitepaper", section 3.2.2). It becomes just that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..export.constants import ProgramConstants
from ..export.observers import is_fake_quantiser, per_channel, rounded
from ..export.walk import arguments, is_batchnorm, set_argument
from .editor import ProgramEditor

PACKAGE = "torch.ao.nn.intrinsic.qat"


def simulating(module: nn.Module, *, evaluation: bool = False) -> dict[str, Any]:
    """Such layers by their names, but for those with a BatchNorm whose numbers are unusable.

    evaluation: also those in training mode, as which they are in evaluation.
    """
    layers = ((path, each) for path, each in module.named_modules() if _simulates(each))
    return {path: each for path, each in layers if _is_usable(each) and (evaluation or not (each.training or each.bn.training))}


def _simulates(module: Any) -> bool:
    batchnorm = getattr(module, "bn", None)
    known = type(module).__module__.startswith(PACKAGE) and isinstance(batchnorm, nn.modules.batchnorm._BatchNorm)
    return known and is_fake_quantiser(module.weight_fake_quant)


def _is_usable(module: Any) -> bool:
    if module.bn.running_var is None:
        return False
    scale = factor(module)
    return bool(scale.isfinite().all() and (scale != 0).all())


def factor(module: Any) -> Tensor:
    """s of the layer, in its own arithmetic, [channels]."""
    with torch.no_grad():
        found: Tensor = module.bn.weight / torch.sqrt(module.bn.running_var + module.bn.eps)
    return found


def scaled_weight(module: Any) -> Tensor:
    """What the layer rounds, in its own arithmetic."""
    with torch.no_grad():
        found: Tensor = module.weight * factor(module).reshape(-1, *(1,) * (module.weight.ndim - 1))
    return found


def simulated(module: Any) -> nn.Module:
    """The layer that such a layer simulates, with the settings, fake quantisers and hooks of that."""
    import torch.ao.nn.intrinsic.qat as fused
    import torch.ao.nn.qat as plain

    name = type(module).__name__.replace("Bn", "")
    kind: Any = plain.Linear if name.startswith("Linear") else getattr(fused if "ReLU" in name else plain, name)
    settings = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    names = ("in_features", "out_features") if kind is plain.Linear else settings
    made = kind(**{each: getattr(module, each) for each in names}, bias=True, qconfig=module.qconfig)
    made.weight = nn.Parameter(scaled_weight(module), module.weight.requires_grad)
    made.bias = nn.Parameter(_bias(module), module.weight.requires_grad)
    for child, each in module.named_children():
        if child != "bn":
            made.add_module(child, each)
    made.train(module.training)
    layer: nn.Module = made
    return layer


def _bias(module: Any) -> Tensor:
    """s*(b - mean) + beta, rounded once."""
    batchnorm = module.bn
    with torch.no_grad():
        gamma, beta, mean, var = (t.double() for t in (batchnorm.weight, batchnorm.bias, batchnorm.running_mean, batchnorm.running_var))
        own = torch.zeros_like(mean) if module.bias is None else module.bias.double()
        found: Tensor = ((own - mean) * gamma / torch.sqrt(var + batchnorm.eps) + beta).to(module.weight.dtype)
        return found


def keep_codes(layer: Any, before: Any) -> None:
    """Let a layer that got other statistics round to the codes to which it rounded before: its scales follow s, and its observer is off."""
    quantiser = layer.weight_fake_quant
    observer = quantiser.activation_post_process
    with torch.no_grad():
        ratio = factor(layer).double() / factor(before).double()
        if not quantiser.is_per_channel:
            per_channel(quantiser, 0)
        quantiser.disable_observer()
        for holder, name in ((quantiser, "scale"), (observer, "min_val"), (observer, "max_val")):
            if (old := getattr(holder, name)).numel():
                holder._buffers[name] = (old.double() * ratio).to(old.dtype)
        quantiser._buffers["zero_point"] = quantiser.zero_point.expand(ratio.shape).clone()
        shape = [-1, *(1,) * (layer.weight.ndim - 1)]
        want, scale, zero = _codes(before), quantiser.scale.reshape(shape), quantiser.zero_point.reshape(shape)
        middle = (want - zero) * scale / factor(layer).reshape(shape)
        layer.weight.copy_(torch.where(_codes(layer) == want, layer.weight, middle))  # some lie near a step


def _codes(layer: Any) -> Tensor:
    quantiser, shape = layer.weight_fake_quant, [-1, *(1,) * (layer.weight.ndim - 1)]
    scale, zero = (each.reshape(shape if each.numel() > 1 else [1] * len(shape)) for each in (quantiser.scale, quantiser.zero_point))
    found: Tensor = (rounded(quantiser, scaled_weight(layer)) / scale + zero).round()
    return found


def rounded_with(constants: ProgramConstants, target: str) -> bool:
    """Whether a stored tensor takes part in what a quantiser rounds."""
    ends = (end for op in constants.named(target) for end in constants.ends(op))
    return any(constants.is_quantised(read) for _, read in ends)


def with_statistics(program: ExportedProgram, constants: ProgramConstants, new: Mapping[str, Tensor]) -> ExportedProgram:
    """A program with new statistics, which may change it: in their places, but where what is rounded is computed from the old ones too.

    constants: of the program, or of the same in another form.
    """
    apart = sorted(name for name in new if rounded_with(constants, name))
    for name in new.keys() - set(apart):
        holder = program.state_dict if name in program.state_dict else program.constants
        holder[name] = new[name].to(holder[name].device)
    if not apart:
        return program
    editor = ProgramEditor(program)
    places = {spec.target: spec.arg.name for spec in program.graph_signature.input_specs}
    made = {places[name]: editor.store(editor.new_name(name), new[name], InputKind.BUFFER) for name in apart}
    for op in filter(is_batchnorm, editor.graph.nodes):
        for role in ("running_mean", "running_var"):
            if (given := arguments(op).get(role)) is not None and given.name in made:
                set_argument(op, role, made[given.name])
    return editor.finish()


def note(layer: nn.Module) -> str:
    """What becomes of a layer, in plain words."""
    return f"{type(layer).__name__} simulates the fold, and becomes the layer that it simulates"
