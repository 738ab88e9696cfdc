"""torch.ao's layers that simulate a fold while they train: ConvBn2d, ConvBnReLU2d, LinearBn1d and their like.

In evaluation such a layer rounds W*s, with s = gamma/sqrt(var + epsilon), divides by s what comes out, adds its bias and calls its
BatchNorm: which is a layer with the weight W*s, the same fake quantiser, and the bias s*(b - mean) + beta (Krishnamoorthi 2018,
"Quantizing deep convolutional networks for efficient inference: a whitepaper", section 3.2.2). It becomes just that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..export.observers import is_fake_quantiser

PACKAGE = "torch.ao.nn.intrinsic.qat"


def simulating(module: nn.Module) -> dict[str, Any]:
    """Such layers in evaluation mode, by their names, but for those with a BatchNorm whose numbers are unusable."""
    return {path: each for path, each in module.named_modules() if _simulates(each) and _is_usable(each)}


def _simulates(module: Any) -> bool:
    batchnorm = getattr(module, "bn", None)
    known = type(module).__module__.startswith(PACKAGE) and isinstance(batchnorm, nn.modules.batchnorm._BatchNorm)
    return known and is_fake_quantiser(module.weight_fake_quant)


def _is_usable(module: Any) -> bool:
    if module.training or module.bn.training or module.bn.running_var is None:
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
    return made


def _bias(module: Any) -> Tensor:
    """s*(b - mean) + beta, rounded once."""
    batchnorm = module.bn
    with torch.no_grad():
        gamma, beta, mean, var = (t.double() for t in (batchnorm.weight, batchnorm.bias, batchnorm.running_mean, batchnorm.running_var))
        own = torch.zeros_like(mean) if module.bias is None else module.bias.double()
        found: Tensor = ((own - mean) * gamma / torch.sqrt(var + batchnorm.eps) + beta).to(module.weight.dtype)
        return found


def note(layer: nn.Module) -> str:
    """What becomes of a layer, in plain words."""
    return f"{type(layer).__name__} simulates the fold, and becomes the layer that it simulates"
