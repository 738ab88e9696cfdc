"""RNN, GRU and LSTM of the float64 oracle, with all their attributes (docs/Operators.md of the onnx repository, "Equations").

The reference evaluator's own ignore the activations, clipping, sequence lengths and coupled gates. Here X is [T, N, I],
W [D, G*H, I], R [D, G*H, H] and B [D, 2*G*H] (input biases, then recurrent ones), with D directions, G gates and H hidden units.
`layout = 1` puts the batch first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .registry import Array, Function, operator

Activation = Callable[[Array], Array]
Cell = Callable[[Array, tuple[Array, ...]], tuple[Array, ...]]  # (x W^T of all gates, state) -> state; the hidden state comes first

# name: (function of x, alpha, beta; default alpha; default beta)
_ACTIVATIONS: dict[str, tuple[Callable[[Array, float, float], Array], float, float]] = {
    "relu": (lambda x, a, b: np.maximum(x, 0), 0, 0),
    "tanh": (lambda x, a, b: np.tanh(x), 0, 0),
    "sigmoid": (lambda x, a, b: np.exp(-np.logaddexp(0, -x)), 0, 0),
    "affine": (lambda x, a, b: a * x + b, 1, 0),
    "leakyrelu": (lambda x, a, b: np.where(x >= 0, x, a * x), 0.01, 0),
    "thresholdedrelu": (lambda x, a, b: np.where(x >= a, x, 0), 1, 0),
    "scaledtanh": (lambda x, a, b: a * np.tanh(b * x), 1, 1),
    "hardsigmoid": (lambda x, a, b: np.clip(a * x + b, 0, 1), 0.2, 0.5),
    "elu": (lambda x, a, b: np.where(x >= 0, x, a * np.expm1(np.minimum(x, 0))), 1, 0),
    "softsign": (lambda x, a, b: x / (1 + np.abs(x)), 0, 0),
    "softplus": (lambda x, a, b: np.logaddexp(x, 0), 0, 0),
}
_TAKES = {"affine": 2, "leakyrelu": 1, "thresholdedrelu": 1, "scaledtanh": 2, "hardsigmoid": 2, "elu": 1}


def _activations(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None, clip: float | None, directions: int
) -> list[list[Activation]]:
    """Per direction, each with the next alpha and beta of the lists if it takes one; the clip bounds what goes into those of the gates.

    What goes into the last of LSTM's three, the cell state, ONNX Runtime doesn't clip; the specification leaves it open.
    """
    alpha, beta = iter(alphas or ()), iter(betas or ())
    made: list[Activation] = []
    each = len(names) // directions
    for i, name in enumerate(names):
        function, a, b = _ACTIVATIONS[name.lower()]
        takes = _TAKES.get(name.lower(), 0)
        a = float(next(alpha, a)) if takes else a
        b = float(next(beta, b)) if takes == 2 else b
        bound = math.inf if clip is None or i % each == 2 else clip
        made.append(_activation(function, a, b, bound))
    return [made[i * each : (i + 1) * each] for i in range(directions)]


def _activation(function: Callable[[Array, float, float], Array], alpha: float, beta: float, bound: float) -> Activation:
    return lambda x: function(np.clip(x, -bound, bound), alpha, beta)


def _run(
    x: Array, w: Array, lengths: Array | None, direction: str, start: tuple[Array, ...], cells: list[Cell], layout: int
) -> tuple[Array, ...]:
    """Walk each direction. Behind the end of a sequence the output is 0 and the state stays."""
    steps, batch = x.shape[:2]
    lengths = np.full(batch, steps) if lengths is None else lengths
    hidden = start[0].shape[2]
    y = np.zeros((steps, len(cells), batch, hidden))
    last: list[tuple[Array, ...]] = []
    for d, cell in enumerate(cells):
        backwards = direction == "reverse" or d == 1
        state = tuple(s[d] for s in start)
        gates = x @ w[d].T
        for t in range(steps):
            # Each sequence runs backwards from its own end.
            rows = np.where(t < lengths, lengths - 1 - t, 0) if backwards else np.full(batch, t)
            going = (t < lengths)[:, None]
            new = cell(gates[rows, np.arange(batch)], state)
            state = tuple(np.where(going, n, s) for n, s in zip(new, state, strict=True))
            live = np.nonzero(going[:, 0])[0]
            y[rows[live], d, live] = new[0][live]
        last.append(state)
    final = [np.stack(parts) for parts in zip(*last, strict=True)]
    if layout:
        return y.transpose(2, 0, 1, 3), *(s.swapaxes(0, 1) for s in final)
    return y, *final


def _begin(
    x: Array, w: Array, r: Array, b: Array | None, states: Sequence[Array | None], layout: int, direction: str, gates: int
) -> tuple[Array, Array, tuple[Array, ...], int]:
    """Time first, zeros for what is omitted: (X, B [D, 2, G, H], first states [D, N, H], directions)."""
    directions, hidden = w.shape[0], r.shape[2]
    if directions != (2 if direction == "bidirectional" else 1):
        raise ValueError(f"direction {direction} doesn't go with weights for {directions}")
    x = x.swapaxes(0, 1) if layout else x
    bias = np.zeros((directions, 2, gates, hidden)) if b is None else b.reshape(directions, 2, gates, hidden)
    zero = np.zeros((directions, x.shape[1], hidden))
    return x, bias, tuple(zero if s is None else s.swapaxes(0, 1) if layout else s for s in states), directions


def _recurrent(gates: int, usual: Sequence[str], cell: Callable[..., Cell], states: int = 1) -> Function:
    """An operator that walks through sequences. usual: its activations, where none are stated. cell: makes one direction's of these, of its
    recurrent weights, its bias [2, gates, H], what more it is given, and what else is stated.
    """

    def run(
        x: Array,
        w: Array,
        r: Array,
        b: Array | None = None,
        lengths: Array | None = None,
        *more: Array | None,
        activations: Sequence[str] | None = None,
        activation_alpha: Sequence[float] | None = None,
        activation_beta: Sequence[float] | None = None,
        clip: float | None = None,
        direction: str = "forward",
        layout: int = 0,
        **stated: Any,
    ) -> tuple[Array, ...]:
        first = (*more, *(None,) * states)[:states]
        x, bias, start, directions = _begin(x, w, r, b, first, layout, direction, gates)
        acts = _activations(activations or [*usual] * directions, activation_alpha, activation_beta, clip, directions)
        rest = [each for each in more[states:] if each is not None]
        cells = [cell(acts[d], r[d], bias[d], *(each[d] for each in rest), **stated) for d in range(directions)]
        return _run(x, w, lengths, direction, start, cells, layout)

    return run


def _rnn(acts: Sequence[Activation], r: Array, bias: Array, **_: Any) -> Cell:
    (f,), constant = acts, bias.sum(0)[0]
    return lambda gates, state: (f(gates + state[0] @ r.T + constant),)


def _gru(acts: Sequence[Activation], r: Array, bias: Array, *, linear_before_reset: int = 0, **_: Any) -> Cell:
    """Gates z, r, h."""
    f, g = acts
    rz, rr, rh = np.split(r, 3)
    (wz, wr, wh), (bz, br, bh) = bias

    def step(gates: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        (h,) = state
        xz, xr, xh = np.split(gates, 3, axis=1)
        update = f(xz + h @ rz.T + wz + bz)
        reset = f(xr + h @ rr.T + wr + br)
        new = g(xh + wh + (reset * (h @ rh.T + bh) if linear_before_reset else (reset * h) @ rh.T + bh))
        return ((1 - update) * new + update * h,)

    return step


def _lstm(acts: Sequence[Activation], r: Array, bias: Array, p: Array | None = None, *, input_forget: int = 0, **_: Any) -> Cell:
    """Gates i, o, f, c; peepholes P [3*H] in the order i, o, f."""
    f, g, h = acts
    constant, hidden = bias.sum(0).ravel(), r.shape[1]
    pi, po, pf = np.zeros((3, hidden)) if p is None else p.reshape(3, hidden)

    def step(gates: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        before, memory = state
        xi, xo, xf, xc = np.split(gates + before @ r.T + constant, 4, axis=1)
        enter = f(xi + pi * memory)
        forget = 1 - enter if input_forget else f(xf + pf * memory)
        new = forget * memory + enter * g(xc)
        return f(xo + po * new) * h(new), new

    return step


operator("RNN")(_recurrent(1, ("Tanh",), _rnn))
operator("GRU")(_recurrent(3, ("Sigmoid", "Tanh"), _gru))
operator("LSTM")(_recurrent(4, ("Sigmoid", "Tanh", "Tanh"), _lstm, states=2))  # the hidden state and the memory
