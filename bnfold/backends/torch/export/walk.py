"""Reading a node of an exported graph: its operator's name, its arguments by name, the modules in whose forward it stands."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from bnfold.algebra.graph import reachable
from bnfold.report import Size

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RANDOM = re.compile(r"(rand|bernoulli|multinomial|normal$|dropout|poisson|exponential|uniform)")

OTHER_NAMES = {  # of operators that take the same arguments
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "true_divide": "div",
    "multiply": "mul",
    "negative": "neg",
    "subtract": "sub",
}

BATCHNORMS = {
    *("batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "native_batch_norm", "_batch_norm_impl_index", "_batch_norm_no_update"),
    *(f"_native_batch_norm_legit{how}" for how in ("", "_functional", "_no_training")),
    *(f"_batch_norm_with_update{how}" for how in ("", "_functional")),
}


def tensor_named(program: ExportedProgram, target: str) -> Any:
    """What a program stores under a qualified name."""
    found = program.state_dict.get(target)
    return program.constants.get(target) if found is None else found


def stored_targets(program: ExportedProgram) -> dict[str, str]:
    """The qualified names of what a program stores, by the names of its placeholders."""
    return {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}


def operator_name(node: Node) -> str:
    """ "relu" for aten.relu.default and for aten.relu_.default; "" for what is no ATen operator."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return ""
    name = node.target._schema.name.partition("::")[2]
    name = name.removesuffix("_") if node.target._schema.is_mutable and name.endswith("_") else name
    return OTHER_NAMES.get(name, name)


def is_item(node: Any) -> bool:
    """Whether it takes one of what an operator gives that gives several."""
    return isinstance(node, Node) and node.target is operator.getitem


def items(node: Node) -> list[Node]:
    """The users that take one each of what an operator gives that gives several."""
    return [user for user in node.users if is_item(user)]


def overload(node: Node) -> str:
    return node.target._overloadname if isinstance(node.target, torch._ops.OpOverload) else ""


def arguments(node: Node) -> dict[str, Any]:
    """All arguments by their names in the operator's schema, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            found[argument.name] = node.args[i]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value if argument.has_default_value() else None)
    return found


def set_argument(node: Node, name: str, value: Any) -> None:
    """Give a node another argument by its name in the schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name != name:
            continue
        if argument.kwarg_only or i > len(node.args):
            node.update_kwarg(name, value)
        elif i == len(node.args):
            node.args = (*node.args, value)
        else:
            node.update_arg(i, value)
        return
    raise RuntimeError(f"{node.target} has no argument {name}")


def value_of(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, Node) else None


def is_tensor(node: Any) -> bool:
    return isinstance(value_of(node), Tensor)


def elements(node: Node, start: int = 0) -> int | None:
    """How many elements a tensor has, at the example's sizes; None where the data decide. start: the first axis that counts."""
    found = 1
    for size in node.meta["val"].shape[start:]:
        known = size.node.hint if isinstance(size, torch.SymInt) else size
        if known is None:
            return None
        found *= int(known)
    return found


def multiple(given: dict[str, Any]) -> float | None:
    """The number by which an operator multiplies before it adds (0 is one too); None where it is complex, or computed."""
    alpha = given.get("alpha", 1)
    return float(alpha) if isinstance(alpha, (int, float)) else None


def float_types(program: ExportedProgram) -> set[torch.dtype]:
    """The floating types of what a program holds and takes."""
    stored = [*program.state_dict.values(), *program.constants.values()]
    stored += [op.meta["val"] for op in program.graph.nodes if op.op == "placeholder"]
    return {t.dtype for t in stored if isinstance(t, Tensor) and t.dtype in FLOATS}


def dtype_of(node: Any) -> torch.dtype | None:
    value = value_of(node)
    return value.dtype if isinstance(value, Tensor) else None


def is_float(node: Any) -> bool:
    return dtype_of(node) in FLOATS


def mutates(node: Node) -> bool:
    """Whether the operator writes into one of its arguments."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def written(node: Node) -> list[Node]:
    """The tensors that an operator writes into."""
    assert isinstance(node.target, torch._ops.OpOverload)
    by_name = arguments(node)
    found = [by_name[a.name] for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [each for each in found if isinstance(each, Node)]


# Operators that may hand on their input itself, although their schema doesn't say so.
SILENT_VIEWS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "reshape_as", "contiguous", "to", "type_as"}


def viewed(node: Node) -> Node | None:
    """The tensor whose storage the output shares, or may share."""
    if is_item(node):
        return node.args[0] if isinstance(node.args[0], Node) else None
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if operator_name(node) in SILENT_VIEWS or any(r.alias_info is not None for r in node.target._schema.returns):
        first = node.args[0] if node.args else None
        return first if isinstance(first, Node) else None
    return None


def writes_into_shared(old: Node, new: Node) -> bool:
    """Whether, once `new` stands in the place of its copy `old`, somebody writes into what others still read or the caller owns."""
    if not any(mutates(user) and view in written(user) for view in views(old) for user in view.users):
        return False
    root = storage_of(new)
    family = views(root)
    readers = {user for view in family for user in view.users if user is not old and user not in family}
    return root.op == "placeholder" or bool(readers)


def storage_of(node: Node) -> Node:
    """The tensor that the node is, or may be, a view of in the end."""
    while (source := viewed(node)) is not None:
        node = source
    return node


def views(root: Node) -> set[Node]:
    """All that shares a tensor's storage from there on, what is written in place included."""
    return set(reachable([root], lambda op: (user for user in op.users if viewed(user) is op)))


def is_batchnorm(node: Node) -> bool:
    return operator_name(node) in BATCHNORMS


def in_training(node: Node) -> bool:
    """Whether a BatchNorm normalises each batch by itself."""
    given = arguments(node)
    return bool(given.get("training", given.get("train", False))) or operator_name(node).startswith("_batch_norm_with_update")


def epsilon(given: dict[str, Any]) -> float:
    """That of a BatchNorm, by its arguments."""
    return float(given["eps"] if "eps" in given else given["epsilon"])


def frames(node: Node) -> list[str]:
    """The qualified names of the modules in whose forward the node stands, outermost first; "" is the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return [re.sub(r"@\d+", "", entry[0]) for entry in stack.values()]


def frame(node: Node) -> str:
    """The innermost module."""
    found = frames(node)
    return found[-1] if found else ""


def function(op: Node) -> Callable[..., Any]:
    """What a call_function node calls."""
    assert callable(op.target)
    return op.target


def size_of(program: ExportedProgram) -> Size:
    """Each stored tensor counts once."""
    operators = sum(op.op == "call_function" and not is_item(op) for op in program.graph.nodes)
    stored = {id(t): t for t in (*program.state_dict.values(), *program.constants.values()) if isinstance(t, Tensor)}
    parameters = sum(t.numel() for t in stored.values() if t.is_floating_point())
    return Size(operators, sum(t.nbytes for t in stored.values()), parameters)
