"""Which of a model's stored numbers are weights: those that a rounding could have touched, and that the yardstick moves.

These are the coefficients of linear operators, affine constants and the parameters of normalisations, wherever they are stored: a weight
may be cast, laid out anew or computed before it is used. An exponent, a limit, an epsilon or a size is none: moved by half a unit in its
last place, it makes another function.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import onnx
from onnx import TensorProto

from ..oracle.widen import FLOATS, FORMATS, all_graphs, all_nodes, narrower
from .walk import is_standard

Shape = tuple[int, ...]

# Of each operator, the inputs that are weights.
_WEIGHTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "FusedConv", "NhwcFusedConv", "InstanceNormalization"), (1, 2)),
    **dict.fromkeys(("LayerNormalization", "GroupNormalization", "SimplifiedLayerNormalization", "RMSNormalization"), (1, 2)),
    "DeformConv": (1, 3),
    **dict.fromkeys(("Gemm", "FusedGemm"), (0, 1, 2)),
    **dict.fromkeys(("MatMul", "FusedMatMul", "Einsum"), (0, 1)),
    "LSTM": (1, 2, 3, 7),
    **dict.fromkeys(("GRU", "RNN"), (1, 2, 3)),
    "BatchNormalization": (1, 2, 3, 4),
}
_TABLES = {"Gather": (0,)}  # of rows: a list of numbers to choose from may be anything
_ARRAYS = {**dict.fromkeys(("Add", "Sub", "Mul", "Div"), (0, 1)), "Concat": None, "Sum": None}  # not a lone number, which may be a setting

# How a weight may be computed: from these inputs of an operator; from the first of any other.
_SOURCES: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "MatMul", "Gemm", "Einsum", "DequantizeLinear"), (0, 1)),
    **dict.fromkeys(("Concat", "Sum"), None),
    "Where": (1, 2),
    "QuantizeLinear": (),  # its integers don't move by half a unit
    "Shape": (),
}

# From which input on an operator is steered. 0: altogether.
_STEERED = {"Resize": 1, "Upsample": 1, "Pad": 1, "Clip": 1, "OneHot": 1, "Range": 0, "Floor": 0, "Ceil": 0, "Round": 0, "Mod": 0, "Pow": 1}
_STEERED |= {"Less": 0, "LessOrEqual": 0, "Greater": 0, "GreaterOrEqual": 0, "Equal": 0, "QuantizeLinear": 1, "NonMaxSuppression": 2}
_SHAPE_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Neg", "Cast", "Concat", "Identity", "Gather", "Slice", "Squeeze", "Unsqueeze", "Reshape"}
_SHAPE_ARITHMETIC |= {"Floor", "Ceil", "Round", "Min", "Max", "Reciprocal", "Sqrt", "Pow", "ReduceProd", "Where", "Expand"}
MOST_CONTROLS = 16  # elements; a larger array behind an Add is a weight, whatever is computed from the sum


def weights(graph: onnx.GraphProto, held: Mapping[str, Shape]) -> dict[str, int]:
    """The stored arrays that are weights, in subgraphs too, with the narrowest floating-point type to which each is cast on its way.

    held: the shapes of those that aren't in the graph itself. The type is 0 where it is cast to none.
    """
    shapes = {**held, **dict(_stored(graph))}
    producer = {name: node for node in all_nodes(graph) for name in node.output if name}
    constant = constants(graph, shapes)
    steering = _steering(graph, producer)
    found: dict[str, int] = {}
    queue = [(name, least, rank, 0) for node in all_nodes(graph) for name, least, rank in _read(node) if name in constant]
    seen = set()
    while queue:
        name, least, rank, kind = queue.pop()
        if (name, least, rank, kind) in seen:
            continue
        seen.add((name, least, rank, kind))
        if name in shapes:
            size = math.prod(shapes[name])
            if size >= least and len(shapes[name]) >= rank and not (name in steering and size <= MOST_CONTROLS):
                found[name] = narrower(kind, found.get(name, 0))
        elif (node := producer.get(name)) is not None:
            sources = _SOURCES.get(node.op_type, (0,))
            least = 2 if node.op_type in _ARRAYS else least
            rank = 2 if node.op_type in _TABLES else rank
            kind = narrower(kind, cast_to(node))
            queue.extend((each, least, rank, kind) for each in _inputs(node, sources))
    return found


def cast_to(node: onnx.NodeProto) -> int:
    """The floating-point type to which a node casts, 0 for none."""
    return next((int(a.i) for a in node.attribute if node.op_type == "Cast" and a.name == "to" and a.i in FORMATS), 0)


def computed_in(graph: onnx.GraphProto, stored: Iterable[str]) -> set[int]:
    """The floating-point types to which values are cast that aren't constant."""
    fixed = constants(graph, stored)
    return {kind for node in all_nodes(graph) if (kind := cast_to(node)) and node.input[0] not in fixed}


def _read(node: onnx.NodeProto) -> Iterator[tuple[str, int, int]]:
    """What a node reads as weights, each with the least number of elements and of axes that an array must have for it."""
    if node.op_type in _WEIGHTS:
        yield from ((name, 1, 0) for name in _inputs(node, _WEIGHTS[node.op_type]))
    elif node.op_type in _TABLES:
        yield from ((name, 2, 2) for name in _inputs(node, _TABLES[node.op_type]))
    elif node.op_type in _ARRAYS:
        yield from ((name, 2, 0) for name in _inputs(node, _ARRAYS[node.op_type]))
    elif not is_standard(node):  # an operator that we don't know: its matrices, most likely
        yield from ((name, 2, 2) for name in _inputs(node, None))


def _inputs(node: onnx.NodeProto, wanted: tuple[int, ...] | None) -> list[str]:
    return [name for i, name in enumerate(node.input) if name and (wanted is None or i in wanted)]


def _stored(graph: onnx.GraphProto) -> Iterator[tuple[str, Shape]]:
    """Every array inside a graph and its subgraphs."""
    for each in all_graphs(graph):
        yield from ((tensor.name, tuple(tensor.dims)) for tensor in each.initializer)
        yield from ((sparse.values.name, tuple(sparse.dims)) for sparse in each.sparse_initializer)
        for node in each.node:
            if node.op_type == "ConstantOfShape":
                yield node.output[0], (MOST_CONTROLS + 1, 1)  # of any size; its one number moves
            if node.op_type != "Constant":
                continue
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], tuple(attribute.t.dims)
                elif attribute.name == "value_floats":
                    yield node.output[0], (len(attribute.floats),)
                else:
                    yield node.output[0], ()


def constants(graph: onnx.GraphProto, stored: Iterable[str]) -> set[str]:
    """The values that are stored, or computed from such alone."""
    found = set(stored)
    for node in all_nodes(graph):  # in topological order
        names = [name for name in node.input if name]
        if (
            (names or node.op_type == "Constant")
            and all(name in found for name in names)
            and not any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute)
        ):
            found.update(name for name in node.output if name)
    return found


def _steering(graph: onnx.GraphProto, producer: Mapping[str, onnx.NodeProto]) -> set[str]:
    """Values that steer rather than weigh: sizes, scales of resizing, limits, exponents, and what these are computed from.

    The walk goes back from the steering inputs through operators that compute with shapes, and through rounding: 7 elements scaled by
    1.9999999 are 13.
    """
    found: set[str] = set()
    queue: list[str] = []
    for node in all_nodes(graph):
        first = _STEERED.get(node.op_type)
        if first is not None:
            queue.extend(node.input[first:])
        elif node.op_type in ("Cast", "CastLike") and not _casts_to_float(node):
            queue.extend(node.input[:1])
    while queue:
        name = queue.pop()
        if not name or name in found:
            continue
        found.add(name)
        source = producer.get(name)
        if source is not None and source.op_type in _SHAPE_ARITHMETIC:
            queue.extend(source.input)
    return found


def _casts_to_float(node: onnx.NodeProto) -> bool:
    return node.op_type == "CastLike" or any(a.name == "to" and a.i in FLOATS | {TensorProto.DOUBLE} for a in node.attribute)
