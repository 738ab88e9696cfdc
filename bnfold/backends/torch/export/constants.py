"""What is constant in an exported program, and its value in float64; and which of what it stores are weights.

A constant is a parameter, a buffer that nothing writes to, a lifted tensor, or anything deterministic computed from these alone (weight
normalisation, weight standardisation, a scale made of frozen statistics). Computed ones are evaluated in float64, so that what is folded
is the function that the model states, not its rounding on the way.

Weights are the stored numbers that a rounding could have touched, and that the yardstick moves: the coefficients of linear operators,
affine constants and the parameters of normalisations, wherever they are stored: a weight may be cast, laid out anew or computed before it
is used. An exponent, a limit, an epsilon or a size is none: moved by half a unit in its last place, it makes another function.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node, map_arg
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bnfold.algebra.graph import reachable

from ..runtime.widen import call, widened
from .quantisers import ROUND, quantiser
from .walk import RANDOM, frame, function, is_float, is_item, mutates, operator_name, overload, tensor_named, value_of, written

PART = torch.ops.export.access_subclass_inner_tensor.default  # one of the tensors that a tensor is made of, as torchao's are
MADE = {"to", "_to_copy", "type_as", "mul", "div", "add", "sub"}  # which give floats where one of several operands has some
KINDS = ("PARAMETER", "BUFFER", "CONSTANT_TENSOR")


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that the program holds. target: its qualified name; kind: PARAMETER, BUFFER or CONSTANT_TENSOR."""

    target: str
    kind: str
    tensor: Tensor


class ProgramConstants:
    """written_to: whether what somebody writes into, without storing it, is no constant."""

    def __init__(self, program: ExportedProgram, *, written_to: bool = True) -> None:
        self._program = program
        touched = {node for each in program.graph.nodes if mutates(each) for node in written(each)} if written_to else set()
        changed = set(program.graph_signature.buffers_to_mutate.values())
        self._stored: dict[str, Stored] = {}
        for spec in program.graph_signature.input_specs:
            target = spec.target
            if spec.kind.name not in KINDS or target is None or target in changed:
                continue
            if isinstance(tensor := tensor_named(program, target), Tensor):
                self._stored[spec.arg.name] = Stored(target, spec.kind.name, tensor)
        self._known: dict[Node, bool] = {}
        for node in program.graph.nodes:
            self._known[node] = node not in touched and self._decide(node)
        self._values: dict[Node, Any] = {}

    def _decide(self, node: Node) -> bool:
        if node.op == "placeholder":
            return node.name in self._stored
        if node.op == "get_attr":
            return isinstance(self._attribute(node), Tensor)
        if node.op != "call_function" or mutates(node) or not isinstance(value_of(node), (Tensor, list, tuple)):
            return False
        name = operator_name(node)
        if not name and not is_item(node) and quantiser(node) is None and node.target is not PART:
            return False
        if RANDOM.search(name) or name.startswith(("empty", "new_empty")):
            return False
        sizes = value_of(node).shape if isinstance(value_of(node), Tensor) else ()
        if any(isinstance(n, torch.SymInt) for n in sizes):
            return False
        return all(self._known.get(source, False) for source in _read(node))

    def is_constant(self, node: Any) -> bool:
        return isinstance(node, Node) and self._known.get(node, False)

    def is_quantised(self, node: Any) -> bool:
        """Whether a constant is computed from what is quantised."""
        return any(quantiser(each) is not None for each in reachable([node], _read))

    def of_integers(self, node: Any) -> bool:
        """Whether a constant is computed from what operators round, or from stored integers that one makes floats."""
        behind = reachable([node], _read)
        made = (source for each in behind if operator_name(each) in MADE and is_float(each) for source in _read(each))
        whole = (root for each in made if not is_float(each) for root in self.roots(each))
        rounds = any(operator_name(each) in ROUND or quantiser(each) is not None for each in behind)
        return rounds or any(not is_float(root) for root in whole)

    def stored(self, node: Any) -> Stored | None:
        """The tensor of a constant that isn't computed."""
        return self._stored.get(node.name) if isinstance(node, Node) and self.is_constant(node) else None

    def owner(self, op: Node, stored: Stored) -> str:
        """The module to which a tensor belongs that an operator reads: of several names, that in whose forward the operator stands."""
        owner, _, attribute = stored.target.rpartition(".")
        own = tensor_named(self._program, f"{frame(op)}.{attribute}".lstrip("."))
        return frame(op) if isinstance(own, Tensor) and own.data_ptr() == stored.tensor.data_ptr() else owner

    def named(self, target: str) -> list[Node]:
        """The inputs of the graph for a stored tensor."""
        return [node for node in self._known if (each := self._stored.get(node.name)) is not None and each.target == target]

    def roots(self, node: Node) -> list[Node]:
        """The stored tensors that a constant is computed from."""
        return [each for each in reachable([node], _read) if self.stored(each) is not None]

    def ends(self, node: Node) -> list[tuple[Node, Node]]:
        """Who reads a constant, and what they read: the constant itself or what is computed from it alone."""
        inside = reachable([node], lambda each: filter(self.is_constant, each.users))
        return [(user, each) for each in inside for user in each.users if not self.is_constant(user)]

    def with_numbers(self, numbers: Mapping[Node, Tensor]) -> ProgramConstants:
        """The same, with other numbers in some of the stored tensors."""
        found = copy.copy(self)
        found._values = dict(numbers)
        return found

    def get(self, node: Any) -> npt.NDArray[Any] | None:
        """The constant's array, floats in float64; None for what isn't a constant tensor, or that can't be evaluated."""
        if not self.is_constant(node):
            return None
        tensor = self.tensor(node)
        return tensor.numpy() if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor) else None

    def tensor(self, node: Node) -> Any:
        """The same as a tensor on the CPU, or as the list or tuple that some operators give."""
        if node not in self._values:
            stored = self.stored(node)
            if stored is not None:
                return widened(stored.tensor)  # not kept: the weights of a large model would be held twice
            self._values[node] = widened(self._attribute(node)) if node.op == "get_attr" else self._computed(node)
        return self._values[node]

    def as_run(self, op: Node, value: Callable[[Node], Any]) -> Callable[[Node], Any]:
        """`value` for what an operator reads, but for constants that it rounds: these as they are computed when the model runs."""
        found = quantiser(op)
        source = found.source if found is not None else op.args[0] if operator_name(op) in ROUND else None
        if not self.is_constant(source) or self.stored(source) is not None:
            return value
        return lambda node: self._in_stored_types(node) if node is source else value(node)

    def _in_stored_types(self, node: Node) -> Any:
        if (stored := self.stored(node)) is not None:
            return self._values.get(node, stored.tensor).detach().cpu().to(stored.tensor.dtype)
        if node.op == "get_attr":
            return self._attribute(node)
        args, kwargs = map_arg((node.args, node.kwargs), self._in_stored_types)
        with torch.no_grad():
            return function(node)(*args, **kwargs)

    def _attribute(self, node: Node) -> Any:
        return attrgetter(str(node.target))(self._program.graph_module)

    def _computed(self, node: Node) -> Any:
        if len(_read(node)) < len(node.all_input_nodes):
            return self.tensor(_read(node)[0])
        try:
            return call(node, self.as_run(node, self.tensor))
        except Exception:  # operators raise what they like
            return None


def _read(node: Node) -> list[Node]:
    """The tensors whose numbers an operator reads: a cast to another tensor's type reads only what it casts."""
    cast = operator_name(node) == "type_as" or (operator_name(node) == "to" and overload(node) == "other")
    return node.all_input_nodes[:1] if cast else node.all_input_nodes


def as_float64(tensor: Tensor) -> npt.NDArray[np.float64]:
    """A stored tensor as an array."""
    array: npt.NDArray[np.float64] = widened(tensor).numpy()
    return array


# --- weights --------------------------------------------------------------------------------------------------------------------------


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
    queue = [
        (source, least, rank) for op in program.graph.nodes for source, least, rank in _read_as_weights(op) if constants.is_constant(source)
    ]
    found, seen = set(), set()
    while queue:
        source, least, rank = queue.pop()
        if (source, least, rank) in seen:
            continue
        seen.add((source, least, rank))
        stored = constants.stored(source)
        if stored is not None:
            tensor = stored.tensor
            none = (source in steering and tensor.numel() <= MOST_CONTROLS) or is_traceable_wrapper_subclass(tensor)
            if tensor.is_floating_point() and tensor.numel() >= least and tensor.ndim >= rank and not none:
                found.add(stored.target)
            continue
        name, rounding = operator_name(source), quantiser(source)
        if rounding is not None:  # the codes don't move by half a unit
            queue.extend((each, 1, 0) for each in [rounding.scale] if isinstance(each, Node) and constants.is_constant(each))
            continue
        inputs = source.all_input_nodes
        every = name in _ARITHMETIC or name in _ALL or _LINEAR.fullmatch(name)
        queue.extend((each, 2 if name in _ARITHMETIC else least, rank) for each in (inputs if every else inputs[:1]))
    return frozenset(found)


def _read_as_weights(op: Node) -> Iterator[tuple[Node, int, int]]:
    """What an operator reads as weights, each with the least number of elements and of axes that a tensor must have for it."""
    if op.op != "call_function":
        return
    name = operator_name(op)
    if name and _LINEAR.fullmatch(name):
        least, rank = 1, 0
    elif name in _ARITHMETIC:
        least, rank = 2, 0
    elif name or is_item(op):
        return
    elif isinstance(op.target, torch._ops.HigherOrderOperator):  # what it does with them stands in a graph of its own
        least, rank = 2, 0
    else:  # an operator that we don't know: its matrices, most likely
        least, rank = 2, 2
    yield from ((source, least, rank) for source in op.all_input_nodes if is_float(source))
