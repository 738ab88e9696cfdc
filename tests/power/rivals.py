"""What others ask of two models' outputs, each as its defaults have it: True where it raises the alarm."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

Outputs = Mapping[str, np.ndarray]


def assert_close(want: Outputs, got: Outputs) -> bool:
    """torch.testing.assert_close on two dictionaries, with the tolerances of their type."""
    try:
        torch.testing.assert_close(*({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in each.items()} for each in (got, want)))
    except (AssertionError, ValueError):
        return True
    return False


def allclose(rtol: float = 1e-5, atol: float = 1e-8) -> Callable[[Outputs, Outputs], bool]:
    """numpy.allclose, output by output in their order."""

    def alarm(want: Outputs, got: Outputs) -> bool:
        return not all(
            a.shape == b.shape and np.allclose(b.astype(np.float64), a.astype(np.float64), rtol, atol)
            for a, b in zip(want.values(), got.values(), strict=False)
        )

    return alarm


def polygraphy(want: Outputs, got: Outputs, rtol: float = 1e-5, atol: float = 1e-5) -> bool:
    """`polygraphy run`: an element fails where its absolute and its relative error both do. An output without a counterpart by name or
    by place is not compared, and NaN exceeds nothing (CompareFunc.simple, check_error_stat "elemwise")."""
    for place, (name, a) in enumerate(want.items()):
        b = got.get(name)
        if b is None and place < len(got):
            b = list(got.values())[place]
        if b is None:
            continue
        if a.shape != b.shape:
            return True
        x, y = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(all="ignore"):
            off = np.abs(x - y)
            if ((off > atol) & (off / np.abs(x) > rtol)).any():
                return True
    return False


RIVALS: dict[str, Callable[[Outputs, Outputs], bool]] = {
    "assert_close": assert_close,
    "allclose 1e-3": allclose(1e-3, 1e-5),
    "allclose": allclose(),
    "Polygraphy": polygraphy,
}
