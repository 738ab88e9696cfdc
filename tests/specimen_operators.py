"""What operators compute, in numpy, for the specimens: statements that know nothing of the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Array = np.ndarray
Run = Callable[[dict[str, Array], list[Array]], Array]


def unary(f: Callable[[Array], Array]) -> Run:
    return lambda _, xs: f(xs[0])


def clamp(params: dict[str, Array], xs: list[Array]) -> Array:
    """What lies outside of two bounds becomes the nearer one."""
    ends = params["low"], params["high"]
    return np.minimum(np.maximum(xs[0], np.minimum(*ends)), np.maximum(*ends))


def windows(x: Array, *kernel: int) -> Array:
    """Windows over the last axes, one after the other: [..., *positions, *kernel]."""
    axes = tuple(range(x.ndim - len(kernel), x.ndim))
    return sliding_window_view(x, kernel, axes)


def conv(groups: int, dims: int, *, pad: int = 0, stride: int = 1) -> Run:
    """Convolution with weight [out, in/g, *kernel]."""
    letters = "hw"[:dims]
    taps = "pq"[:dims]

    def run(params: dict[str, Array], xs: list[Array]) -> Array:
        w, b, x = params["weight"], params["bias"], xs[0]
        x = np.pad(x, [(0, 0), (0, 0)] + [(pad, pad)] * dims)
        steps = (slice(None), slice(None), *(slice(None, None, stride),) * dims)
        parts = []
        for xg, wg in zip(np.split(x, groups, 1), np.split(w, groups, 0), strict=True):
            parts.append(np.einsum(f"nc{letters}{taps},oc{taps}->no{letters}", windows(xg, *w.shape[2:])[steps], wg))
        return np.concatenate(parts, 1) + np.reshape(b, (-1, *(1,) * dims))

    return run


def weighed_conv() -> Run:
    """A convolution in two dimensions whose taps count as much as a second input [n, h, w, p, q] says, some not at all."""

    def run(params: dict[str, Array], xs: list[Array]) -> Array:
        seen = windows(xs[0], *params["weight"].shape[2:])
        return np.einsum("nchwpq,nhwpq,ocpq->nohw", seen, np.maximum(xs[1], 0), params["weight"]) + np.reshape(params["bias"], (-1, 1, 1))

    return run


def conv_transpose(groups: int, stride: int) -> Run:
    """Transposed convolution in one dimension, its weight in the canonical layout [out, in/g, k]."""

    def run(params: dict[str, Array], xs: list[Array]) -> Array:
        w, x = params["weight"], xs[0]
        n, _, length = x.shape
        out, _, k = w.shape
        y = np.zeros((n, out, stride * (length - 1) + k))
        for i in range(length):
            columns = [
                np.einsum("nc,ock->nok", xg[..., i], wg) for xg, wg in zip(np.split(x, groups, 1), np.split(w, groups, 0), strict=True)
            ]
            y[..., stride * i : stride * i + k] += np.concatenate(columns, 1)
        return y + np.reshape(params["bias"], (-1, 1))

    return run


def contraction(equation: str) -> Run:
    return lambda params, xs: np.einsum(equation, xs[0], params["weight"]) + params.get("bias", 0.0)


def letters(equation: str) -> dict[str, Any]:
    x, rest = equation.split(",")
    w, y = rest.split("->")
    return {"x": x, "w": w, "y": y}


def affine(gain: float | Array = 1.0, mean: float | Array = 0.0) -> Run:
    return lambda params, xs: params.get("gamma", 1.0) * gain * (xs[0] - mean) + params.get("beta", 0.0)


def normalised(axes: tuple[int, ...]) -> Run:
    def run(params: dict[str, Array], xs: list[Array]) -> Array:
        x = xs[0]
        centred = x - x.mean(axes, keepdims=True)
        return params["gamma"] * centred / np.sqrt(x.var(axes, keepdims=True) + 0.1) + params["beta"]

    return run


def recurrent(params: dict[str, Array], xs: list[Array]) -> Array:
    """A plain RNN of one direction: h' = tanh(W x + R h + Wb + Rb), R a rotation of the hidden state; x is [time, batch, features]."""
    w, (bw, br) = params["weight"][0], np.split(params["bias"][0], 2)
    h = np.zeros((xs[0].shape[1], w.shape[0])) if len(xs) == 1 else xs[1][0]
    states = []
    for x in xs[0]:
        h = np.tanh(x @ w.T + np.roll(h, 1, axis=1) + bw + br)
        states.append(h)
    return np.stack(states)[:, None]


def interpolated(x: Array) -> Array:
    """Linear interpolation to twice the length along the last axis, its ends repeated."""
    n = x.shape[-1]
    at = np.clip((np.arange(2 * n) + 0.5) / 2 - 0.5, 0, n - 1)
    low = np.floor(at).astype(int)
    part = at - low
    return x[..., low] * (1 - part) + x[..., np.minimum(low + 1, n - 1)] * part


def halves(x: Array) -> Array:
    return windows(x, 2, 2)[..., ::2, ::2, :, :]
