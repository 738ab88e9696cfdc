"""Whether each operator of a proto is what its specification says, as far as all later code takes it for granted.

ONNX's own schemas know how many inputs and outputs an operator has, which may be left out, and the types of its attributes. Real files are
sloppy, so what nobody reads may be odd: an attribute that this version of an operator has no more, an operator that is in no schema.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, defs

from bnfold.errors import ModelError, UnsupportedError

from ..graph.walk import ALIKE, MICROSOFT
from .parameters import Dims, troubles
from .validate import domain_of, inner_graphs, label, nodes

OPTION = defs.OpSchema.FormalParameterOption
MOST_CALLED = 200_000  # operators that calls of functions may come to
MOST_SEEN = 1 << 26  # values that graphs inside of operators may read: inference copies what stands around each
DEEPEST_CALL = 100  # of functions that call each other: onnx puts no deeper ones in the places of their calls
# Operators that ONNX Runtime adds, by those of the standard whose settings they have.
LIKE = {"FusedConv": "Conv", "NhwcFusedConv": "Conv", "FusedGemm": "Gemm", **{name: name for name in ALIKE}}
KINDS = {value: name.lower() for name, value in AttributeProto.AttributeType.items()}
CHOICES = {  # of attributes that are one of a few words
    "auto_pad": {"", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"},
    "direction": {"forward", "reverse", "bidirectional"},
    "BitShift direction": {"LEFT", "RIGHT"},
}


def check_operators(proto: ModelProto) -> None:
    """Raises ModelError for a node, a function or an input that makes no sense, UnsupportedError for operators newer than is known."""
    opsets = _opsets(proto, "the model")
    for function in proto.functions:
        _Scope(_opsets(function, f"function {_name(function)}"), True).check(function.node, {})
    _check_calls(proto, opsets)
    _Scope(opsets, False).check_graph(proto.graph, {})
    inputs = {info.name: info for info in proto.graph.input}
    for info in proto.graph.output:
        if info.name in inputs and info.type != inputs[info.name].type:
            raise ModelError(f"value '{info.name}' is an input and an output, of different types or shapes; export the model again")


def _opsets(proto: ModelProto | FunctionProto, where: str) -> dict[str, int]:
    opsets = {domain_of(entry.domain): entry.version for entry in proto.opset_import}
    version, newest = opsets.get("", 1), defs.onnx_opset_version()
    if version < 1:
        raise ModelError(f"{where} says that it uses opset {version}, which there is none of; export it again")
    if version > newest:
        raise UnsupportedError(
            f"{where} uses opset {version}, and onnx {onnx.__version__} knows none beyond {newest}; install a newer onnx"
        )
    return opsets


class _Scope:
    """The nodes that share their operator sets: those of the model, or those of a function."""

    def __init__(self, opsets: Mapping[str, int], in_function: bool) -> None:
        self.opsets, self.in_function = opsets, in_function

    def check_graph(self, graph: GraphProto, outer: Mapping[str, Dims]) -> None:
        self.check(graph.node, {**outer, **{t.name: tuple(t.dims) for t in graph.initializer}})

    def check(self, nodes: Any, shapes: dict[str, Dims]) -> None:
        """shapes: of the constants that are known by now, by name."""
        for node in nodes:
            texts = (node.op_type, node.domain, node.name, *node.input, *node.output, *(a.name for a in node.attribute))
            if not all(isinstance(text, str) for text in texts):  # protocol buffers give bytes for what is no UTF-8
                raise ModelError(f"a name of {label(node)} is no text; the file is damaged, get it again")
            attributes = {a.name: a for a in node.attribute}
            if len(attributes) < len(node.attribute):
                name = Counter(a.name for a in node.attribute).most_common(1)[0][0]
                raise ModelError(f"{label(node)} has its attribute '{name}' twice; export the model again")
            if not self.in_function and (reference := next((a for a in node.attribute if a.ref_attr_name), None)):
                raise ModelError(
                    f"{label(node)} takes its attribute '{reference.name}' from a function, and is in none; export the model again"
                )
            if domain_of(node.domain) == "":
                self._check_standard(node, attributes, shapes)
            elif node.domain == MICROSOFT and node.op_type in LIKE:
                _check_types(node, attributes, _types(LIKE[node.op_type], self.opsets.get("", 1)))
            for inner in inner_graphs(node):
                self.check_graph(inner, shapes)

    def _check_standard(self, node: NodeProto, attributes: dict[str, AttributeProto], shapes: dict[str, Dims]) -> None:
        if "" not in self.opsets and node.op_type != "Constant":
            raise ModelError(f"{label(node)} is of the standard operators, whose version nothing states; export the model again")
        version = self.opsets.get("", 1)
        schema = _schema(node.op_type, version)
        if schema is not None:
            _check_arity(node, schema, version)
        _check_types(node, attributes, _types(node.op_type, version))
        if schema is not None:
            for name, each in schema.attributes.items():
                if each.required and name not in attributes:
                    raise _wrong(node, f"its attribute '{name}' is missing, which opset {version} requires")
        if node.op_type == "Constant":
            _check_constant(node, shapes)
        elif not any(a.ref_attr_name for a in attributes.values()):  # of which only the call knows the values
            values = {name: _value(a) for name, a in attributes.items()}
            dims = [shapes.get(name) if name else None for name in node.input]
            if trouble := next(troubles(node.op_type, values, dims, version), None):
                raise _wrong(node, trouble)


@cache
def _schema(op_type: str, version: int) -> Any:
    """The specification of a standard operator; None where there is none."""
    try:
        return defs.get_schema(op_type, version, "")
    except defs.SchemaError:
        return None


@cache
def _history() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain == "":
            found.setdefault(schema.name, []).append(schema)
    return found


@cache
def _types(op_type: str, version: int) -> dict[str, tuple[int, ...]]:
    """The types of an operator's attributes; of those that this version lacks, the types in others, since later code may read them."""
    found: dict[str, set[int]] = {}
    for schema in _history().get(op_type, ()):
        for name, each in schema.attributes.items():
            found.setdefault(name, set()).add(int(each.type.value))
    schema = _schema(op_type, version)
    own = {} if schema is None else {name: {int(each.type.value)} for name, each in schema.attributes.items()}
    return {name: tuple(sorted(kinds)) for name, kinds in (found | own).items()}


def _check_arity(node: NodeProto, schema: Any, version: int) -> None:
    for what, given, low, high, formal in (
        ("input", node.input, schema.min_input, schema.max_input, schema.inputs),
        ("output", node.output, schema.min_output, schema.max_output, schema.outputs),
    ):
        if not low <= len(given) <= high:
            asked = f"{low}" if low == high else f"at least {low}" if len(given) < low else f"at most {high}"
            raise _wrong(node, f"it has {len(given)} {what}s, and opset {version} asks for {asked}")
        for i, name in enumerate(given):
            asked_for = formal[min(i, len(formal) - 1)]
            if not name and (
                asked_for.option == OPTION.Single or (what == "input" and asked_for.option == OPTION.Variadic and asked_for.is_homogeneous)
            ):
                raise _wrong(node, f"its {what} {asked_for.name} (number {i}) is left out, which opset {version} requires")


def _check_types(node: NodeProto, attributes: dict[str, AttributeProto], types: dict[str, tuple[int, ...]]) -> None:
    for name, attribute in attributes.items():
        if name in types and attribute.type not in types[name]:
            asked = " or ".join(KINDS[kind] for kind in types[name])
            raise _wrong(node, f"its attribute '{name}' is of type {KINDS.get(attribute.type, '?')}, not {asked}")
        if attribute.type == AttributeProto.STRING and not attribute.ref_attr_name:
            _check_word(node, name, attribute.s)


def _check_word(node: NodeProto, name: str, word: bytes) -> None:
    try:
        text = word.decode("utf-8")
    except UnicodeDecodeError:
        raise _wrong(node, f"its attribute '{name}' is no text") from None
    choices = CHOICES.get(f"{node.op_type} {name}", CHOICES.get(name, {text}))
    if text not in choices:
        raise _wrong(node, f"its attribute '{name}' is '{text[:40]}', which is none of {', '.join(sorted(choices - {''}))}")


def _check_constant(node: NodeProto, shapes: dict[str, Dims]) -> None:
    values = [a for a in node.attribute if a.name == "sparse_value" or a.name.startswith("value")]
    if len(values) != 1:
        raise _wrong(node, f"it states {len(values)} values, where it must be one")
    if values[0].name == "value" and node.output and not values[0].ref_attr_name:
        shapes[node.output[0]] = tuple(values[0].t.dims)


def _extent(nodes: Collection[NodeProto]) -> tuple[int, int]:
    """How many operators these are, with those in graphs inside of them, and how many such graphs."""
    inner = [graph for node in nodes for graph in inner_graphs(node)]
    return _added((len(nodes), len(inner)), [(_extent(graph.node), 1) for graph in inner])


def _added(own: tuple[int, int], others: Iterable[tuple[tuple[int, int], int]]) -> tuple[int, int]:
    """The sums. others: each with how often it counts."""
    for (operators, graphs), times in others:
        own = own[0] + times * operators, own[1] + times * graphs
    return own


def _check_calls(proto: ModelProto, opsets: Mapping[str, int]) -> None:
    """Functions that call themselves, or are called with more than they take."""
    by_name = {(domain_of(f.domain), f.name, f.overload): i for i, f in enumerate(proto.functions)}

    def calls(nodes: Any) -> Iterator[int]:
        for node in nodes:
            index = by_name.get((domain_of(node.domain), node.op_type, node.overload))
            if index is not None:
                callee = proto.functions[index]
                for what, given, takes in (("inputs", node.input, callee.input), ("outputs", node.output, callee.output)):
                    if len(given) > len(takes):
                        raise _wrong(node, f"it has {len(given)} {what}, and the function that it calls {len(takes)}")
                yield index
            for inner in inner_graphs(node):
                yield from calls(inner.node)

    callees = [Counter(calls(function.node)) for function in proto.functions]
    left = set(range(len(callees)))
    deep = 0
    comes_to: dict[int, tuple[int, int]] = {}  # operators and graphs inside of them, with those of the functions that it calls
    while ready := {i for i in left if not callees[i].keys() & left}:
        comes_to |= {i: _added(_extent(proto.functions[i].node), [(comes_to[k], n) for k, n in callees[i].items()]) for i in ready}
        left -= ready
        deep += 1
    if left:
        circle = ", ".join(sorted(_name(proto.functions[i]) for i in left)[:3])
        raise ModelError(f"functions call each other in a circle ({circle}); export the model again")
    if deep > DEEPEST_CALL:
        raise ModelError(f"its functions call each other {deep:,} deep, more than {DEEPEST_CALL}; export the model without functions")
    called = [*calls(proto.graph.node)]
    total, _ = _added((0, 0), [(comes_to[i], 1) for i in called])
    if total > MOST_CALLED:
        raise ModelError(f"its functions come to {total:,} operators, more than {MOST_CALLED:,}; export the model without functions")
    operators, inner = _added(_extent(proto.graph.node), [(comes_to[i], 1) for i in called])
    if operators * inner > MOST_SEEN:
        raise ModelError(f"it holds {inner:,} graphs inside of {operators:,} operators, too many to be followed; don't use this file")
    seen = set(called)
    while called:
        function = proto.functions[index := called.pop()]
        for entry in function.opset_import:
            domain = domain_of(entry.domain)
            if opsets.get(domain, entry.version) != entry.version:
                raise UnsupportedError(
                    f"function {_name(function)} uses version {entry.version} of the operators '{domain or 'ai.onnx'}', and the model "
                    f"{opsets[domain]}; export the model with one version"
                )
        called += callees[index].keys() - seen
        seen |= callees[index].keys()


def forget_unknown(proto: ModelProto) -> None:
    """Take out the attributes that no version of a standard operator has, which mean nothing."""
    for node in nodes(proto):
        schemas = _history().get(node.op_type) if domain_of(node.domain) == "" else None
        known = {name for schema in schemas or () for name in schema.attributes}
        if schemas is not None and not known.issuperset(attribute.name for attribute in node.attribute):
            kept = [attribute for attribute in node.attribute if attribute.name in known]
            del node.attribute[:]
            node.attribute.extend(kept)


def _value(attribute: AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _name(function: FunctionProto) -> str:
    return f"{function.domain}::{function.name}"


def _wrong(node: NodeProto, what: str) -> ModelError:
    return ModelError(f"{label(node)} is not valid: {what}; export the model again")
