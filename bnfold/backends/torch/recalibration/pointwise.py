"""Pointwise convolutions, whose moments are known without running them (see `bnfold.recalibration.moments.Pointwise`)."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node as Op

from bnfold.recalibration.moments import Pointwise

from ..export.walk import arguments, elements, operator_name
from .stage import Held

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")


def passes(op: Op, held: Held) -> bool:
    """Whether an operator is a pointwise convolution that is better not run for its moments.

    On a CPU alone: most GPUs are slow in float64. Not in half precision, where the rounding of an output tells in its moments.
    """
    if operator_name(op) not in CONVOLUTIONS or held.device.type != "cpu":
        return False
    given = arguments(op)
    source, weight = given["input"], given["weight"]
    if not all(held.is_held(each) for each in (weight, given["bias"]) if each is not None):
        return False
    (out, into, *kernel), kind = weight.meta["val"].shape, op.meta["val"].dtype
    plain = given["groups"] == 1 and not given.get("transposed", False) and _all(given["stride"], 1)
    if not plain or any(n != 1 for n in kernel) or source.meta["val"].ndim != 2 + len(kernel):
        return False
    if given["padding"] not in ("same", "valid") and not _all(given["padding"], 0):
        return False
    size = elements(source, 2)
    return size is not None and kind in (torch.float32, torch.float64) and Pointwise.pays(into, out, size)


def read(op: Op, held: Held) -> Pointwise:
    given = arguments(op)
    weight, bias = (None if given[name] is None else held.value(given[name]).to(torch.float64) for name in ("weight", "bias"))
    assert weight is not None
    return Pointwise(weight.flatten(1), bias)


def _all(sizes: Any, wanted: int) -> bool:
    return all(n == wanted for n in (sizes if isinstance(sizes, (list, tuple)) else [sizes]))
