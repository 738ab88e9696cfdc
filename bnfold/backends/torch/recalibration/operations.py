"""What the operators of an exported program read, make and cost (see `bnfold.recalibration.schedule`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node as Op

from bnfold.recalibration.moments import Pointwise
from bnfold.recalibration.schedule import Cut, NormCall, Operation

from ..export.walk import arguments, elements, is_tensor, items, operator_name
from .stage import StoredTensors

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
PRODUCTS = (*CONVOLUTIONS, *(f"conv_transpose{n}d" for n in (1, 2, 3)), "linear")
SMALLER = ("mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin")

TorchCall = NormCall[Op, Op]
TorchCut = Cut[Op, Op]
TorchOperation = Operation[Op, Op]


def operations(graph: torch.fx.Graph, stored: StoredTensors) -> Iterator[TorchOperation]:
    """All whose outcome depends on the data."""
    made: set[Op] = set()
    for op in graph.nodes:
        if op.op != "call_function" or is_fixed(op, stored) or op in made:
            continue
        reads = tuple(source for source in op.all_input_nodes if not is_fixed(source, stored))
        name = operator_name(op)
        whole = "pool" in name and is_tensor(op) and all(n == 1 for n in op.meta["val"].shape[2:])
        shrinks = 2 if whole or name == "sym_size" else 1 if "pool" in name or name in SMALLER else 0
        pieces = items(op)
        made.update(pieces)
        short = len(op.users) == 1 and _is_pointwise(op, stored)
        yield Operation(op, reads, tuple(pieces) or (op,), shrinks, _work(op, stored), short)


def is_fixed(op: Op, stored: StoredTensors) -> bool:
    """Whether a value is the same for all data: a constant, or a size, which the micro-batch's inputs tell."""
    return stored.is_constant(op) or isinstance(op.meta.get("val"), (int, torch.SymInt))


def nbytes(op: Op) -> int | None:
    """Of a tensor, at the example's sizes."""
    count = elements(op) if is_tensor(op) else None
    return None if count is None else count * int(op.meta["val"].element_size())


def _work(op: Op, stored: StoredTensors) -> int | None:
    """The multiply-adds of a convolution or a product with stored weights, and of what only copies."""
    name = operator_name(op)
    if name == "cat":
        return 0
    if name not in PRODUCTS or not _has_stored_weights(op, stored):
        return None
    given = arguments(op)
    turned = "transpose" in name or given.get("transposed", False)
    counted = elements(given["input"] if turned else op)
    return None if counted is None else counted * math.prod(given["weight"].meta["val"].shape[1:])


def _is_pointwise(op: Op, stored: StoredTensors) -> bool:
    """Whether an operator is a pointwise convolution that is better not run for its moments.

    On a CPU alone: most GPUs are slow in float64. Not in half precision, where the rounding of an output tells in its moments.
    """
    if operator_name(op) not in CONVOLUTIONS or stored.device.type != "cpu" or not _has_stored_weights(op, stored):
        return False
    given = arguments(op)
    (out, into, *kernel), kind = given["weight"].meta["val"].shape, op.meta["val"].dtype
    plain = given["groups"] == 1 and not given.get("transposed", False) and _all(given["stride"], 1)
    padded = given["padding"] not in ("same", "valid") and not _all(given["padding"], 0)
    if not plain or padded or any(n != 1 for n in kernel) or given["input"].meta["val"].ndim != 2 + len(kernel):
        return False
    size = elements(given["input"], 2)
    return size is not None and kind in (torch.float32, torch.float64) and Pointwise.pays(into, out, size)


def pointwise(op: Op, stored: StoredTensors) -> Pointwise:
    given = arguments(op)
    weight, bias = (None if given[name] is None else stored.value(given[name]).to(torch.float64) for name in ("weight", "bias"))
    assert weight is not None
    return Pointwise(weight.flatten(1), bias)


def _has_stored_weights(op: Op, stored: StoredTensors) -> bool:
    given = arguments(op)
    return all(stored.is_stored(given[name]) for name in ("weight", "bias") if given[name] is not None)


def _all(sizes: Any, wanted: int) -> bool:
    return all(n == wanted for n in (sizes if isinstance(sizes, (list, tuple)) else [sizes]))
