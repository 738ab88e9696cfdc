"""Operators of com.microsoft that ONNX Runtime writes where it optimises, for the float64 oracle (its docs/ContribOperators.md)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..graph.walk import MICROSOFT
from .activation import gelu, sigmoid
from .arithmetic import gemm
from .convolution import conv
from .registry import Array, operator


def _activated(x: Array, name: str, params: Any) -> Array:
    alpha, beta = [*(params or ()), None, None][:2]
    made: Array = x
    if name == "Relu":
        made = np.maximum(x, 0)
    elif name == "LeakyRelu":
        made = np.where(x < 0, (0.01 if alpha is None else alpha) * x, x)
    elif name == "Tanh":
        made = np.tanh(x)
    elif name == "Sigmoid":
        made = sigmoid(x)[0]
    elif name == "Clip":
        made = np.clip(x, alpha, beta)
    elif name == "HardSigmoid":
        made = np.clip((0.2 if alpha is None else alpha) * x + (0.5 if beta is None else beta), 0, 1)
    elif name:
        raise NotImplementedError(f"the activation {name}")
    return made


@operator("FusedConv", domain=MICROSOFT)
def fused_conv(
    x: Array,
    w: Array,
    b: Array | None = None,
    z: Array | None = None,
    *,
    activation: str = "",
    activation_params: Any = None,
    **settings: Any,
) -> tuple[Array, ...]:
    y = conv(x, w, b, **settings)[0]
    return (_activated(y if z is None else y + z, activation, activation_params),)


@operator("FusedGemm", domain=MICROSOFT)
def fused_gemm(
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    **settings: Any,
) -> tuple[Array, ...]:
    if activation_gamma is not None:
        raise NotImplementedError(f"the activation {activation} with three settings")
    return (_activated(gemm(a, b, c, **settings)[0], activation, (activation_alpha, activation_beta)),)


@operator("FusedMatMul", domain=MICROSOFT)
def fused_matmul(
    a: Array, b: Array, *, alpha: float = 1.0, transA: int = 0, transB: int = 0, transBatchA: int = 0, transBatchB: int = 0
) -> tuple[Array, ...]:
    if transBatchA or transBatchB:
        raise NotImplementedError("batch axes that move")
    return (alpha * np.matmul(a.swapaxes(-1, -2) if transA else a, b.swapaxes(-1, -2) if transB else b),)


@operator("Gelu", domain=MICROSOFT)
def plain_gelu(x: Array) -> tuple[Array, ...]:
    return gelu(x)


@operator("BiasGelu", domain=MICROSOFT)
def bias_gelu(x: Array, bias: Array) -> tuple[Array, ...]:
    return gelu(x + bias)


@operator("FastGelu", domain=MICROSOFT)
def fast_gelu(x: Array, bias: Array | None = None) -> tuple[Array, ...]:
    return gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain=MICROSOFT)
def quick_gelu(x: Array, *, alpha: float = 1.702) -> tuple[Array, ...]:
    return (x * sigmoid(alpha * x)[0],)
