"""Which of a model's stored numbers are weights: those that a rounding could have touched, and that the yardstick moves.

These are the coefficients of linear operators, affine constants and the parameters of normalisations, wherever they are stored: a weight
may be cast, laid out anew or computed before it is used. An exponent, a limit, an epsilon or a size is none: moved by half a unit in its
last place, it makes another function.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch.export import ExportedProgram
from torch.fx import Node as Op

from .constants import ProgramConstants
from .quantisers import quantiser
from .walk import is_float, operator_name

_LINEAR = re.compile(
    r"_?conv(olution|_transpose)?(\d?d)?|linear|bilinear|addmm|addmv|addr|addbmm|baddbmm|matmul|mm|bmm|mv|dot|einsum|embedding(_bag)?"
    r"|.*(batch|layer|group|instance|rms)_norm.*|lstm|gru|rnn_(tanh|relu)|(lstm|gru|rnn_tanh|rnn_relu)_cell"
)
_ARITHMETIC = {"add", "sub", "mul", "div", "rsub", "cat", "stack"}  # with an array: a lone number may be a setting
_ALL = {"where", "_weight_norm_interface", "_weight_norm"}  # a weight computed by another operator comes from the first of its inputs
_STEERED = {"pow", "clamp", "clamp_min", "clamp_max", "lt", "le", "gt", "ge", "eq", "ne", "floor_divide", "remainder", "fmod", "bucketize"}
MOST_CONTROLS = 16  # elements; a larger array is a weight, whoever else reads it


def weights(program: ExportedProgram) -> frozenset[str]:
    """The qualified names of the stored tensors that are weights."""
    constants = ProgramConstants(program)
    steering = {source for op in program.graph.nodes if operator_name(op) in _STEERED for source in op.all_input_nodes[1:]}
    queue = [(source, least, rank) for op in program.graph.nodes for source, least, rank in _read(op) if constants.is_constant(source)]
    found, seen = set(), set()
    while queue:
        source, least, rank = queue.pop()
        if (source, least, rank) in seen:
            continue
        seen.add((source, least, rank))
        stored = constants.stored(source)
        if stored is not None:
            tensor = stored.tensor
            steers = source in steering and tensor.numel() <= MOST_CONTROLS
            if tensor.is_floating_point() and tensor.numel() >= least and tensor.ndim >= rank and not steers:
                found.add(stored.target)
            continue
        name, rounding = operator_name(source), quantiser(source)
        if rounding is not None:  # the codes don't move by half a unit
            queue.extend((each, 1, 0) for each in [rounding.scale] if isinstance(each, Op) and constants.is_constant(each))
            continue
        inputs = source.all_input_nodes
        every = name in _ARITHMETIC or name in _ALL or _LINEAR.fullmatch(name)
        queue.extend((each, 2 if name in _ARITHMETIC else least, rank) for each in (inputs if every else inputs[:1]))
    return frozenset(found)


def _read(op: Op) -> Iterator[tuple[Op, int, int]]:
    """What an operator reads as weights, each with the least number of elements and of axes that a tensor must have for it."""
    if op.op != "call_function":
        return
    name = operator_name(op)
    if name and _LINEAR.fullmatch(name):
        least, rank = 1, 0
    elif name in _ARITHMETIC:
        least, rank = 2, 0
    elif name or getattr(op.target, "__name__", "") == "getitem":
        return
    elif isinstance(op.target, torch._ops.HigherOrderOperator):  # what it does with them stands in a graph of its own
        least, rank = 2, 0
    else:  # an operator that we don't know: its matrices, most likely
        least, rank = 2, 2
    yield from ((source, least, rank) for source in op.all_input_nodes if is_float(source))
