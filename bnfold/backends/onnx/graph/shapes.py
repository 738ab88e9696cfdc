"""The shape of every value at the probe sizes of the model's dynamic axes, by ONNX's own shape inference.

Each symbol gets one size per probe, all different, so that a rule that holds at every probe doesn't lean on an equality by
chance. Where the inference knows nothing (an operator outside the standard), the shape written in the file serves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from ..files.save import bare
from ..files.validate import inner_graphs
from .integers import OPEN, Integers, Ints, is_open, settle, sized_by_data
from .ranks import told, write_ranks
from .walk import ALIKE, MICROSOFT, axes, nbytes, open_axes, subgraphs

SMALL = 1024  # bytes: larger weights go to the inference as inputs, so that it needs no copy of them
BATCH_SIZES = (2, 3)
TURNS = 8  # of the inference, forwards, and of what operators tell, backwards; what they leave open then stays so
OTHER_SIZES = (160, 224)  # a first guess for space and time: large enough for most networks, cheap since nothing runs

Dims = tuple["int | None", ...]


class Shapes:
    """probes(value): the shapes at each probe, None for what isn't known. rank(value). dtype(value).

    computed: small constants that the graph computes (by value name), which the inference can't work out by itself. plainly: writes
    operators in a way that the inference knows.
    """

    def __init__(
        self,
        model: ir.Model,
        computed: Mapping[str, npt.NDArray[Any]] | None = None,
        plainly: Callable[[onnx.GraphProto], None] = lambda graph: None,
    ) -> None:
        self._model = model
        self._probes: list[dict[ir.Value, Dims]] = []
        self._anyhow: dict[ir.Value, Dims] = {}  # whatever the sizes of open axes
        self._types: dict[ir.Value, int] = {}
        skeleton = _skeleton(model, computed or {})
        plainly(skeleton.graph)
        self._probes = [self._inferred(model, skeleton, sizes) for sizes in _probe_sizes(skeleton.graph)]
        self._consistent, self._by_data = False, set[str]()
        if any(self.rank(value) is None for node in model.graph for value in node.outputs if _is_read_tensor(value)):
            self._anyhow = self._without_sizes(model, skeleton)
            self._probes = [self._inferred(model, skeleton, sizes) for sizes in _probe_sizes(skeleton.graph)]
        made = [value for node in model.graph for value in node.outputs]
        if any(None in dims for value in made for dims in self.probes(value) or ()):
            self._consistent = not any(self._contradicts(value) for value in made)
            self._by_data = sized_by_data(skeleton.graph)

    def _inferred(self, model: ir.Model, skeleton: onnx.ModelProto, sizes: Mapping[tuple[str, int], int]) -> dict[ir.Value, Dims]:
        """The shapes at these sizes of the inputs' axes."""
        proto = onnx.ModelProto()
        proto.CopyFrom(skeleton)
        for info in proto.graph.input:
            for axis, dim in enumerate(info.type.tensor_type.shape.dim):
                if (size := sizes.get((info.name, axis))) is not None:
                    dim.dim_value = size
        found: dict[ir.Value, Dims] = {}
        self._collect(model.graph, _infer(proto, settle).graph, found)
        return found

    def _without_sizes(self, model: ir.Model, skeleton: onnx.ModelProto) -> dict[ir.Value, Dims]:
        """The shapes with every open axis left open, so that no two of them clash, and with the ranks that operators tell.

        These are written into the skeleton.
        """
        for _ in range(TURNS):
            inferred = _infer(skeleton, lambda proto, infer: infer(proto))
            infos = [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]
            known = {v.name: len(v.type.tensor_type.shape.dim) for v in infos if v.type.tensor_type.HasField("shape")}
            known |= {tensor.name: len(tensor.dims) for tensor in skeleton.graph.initializer}
            news = told(skeleton.graph, known)
            write_ranks(skeleton.graph, news)
            if not news:
                break
        found: dict[ir.Value, Dims] = {}
        self._collect(model.graph, inferred.graph, found)
        return found

    def _collect(self, graph: ir.Graph, proto: onnx.GraphProto, found: dict[ir.Value, Dims]) -> None:
        infos = {info.name: info.type for info in itertools.chain(proto.value_info, proto.output, proto.input)}
        values = itertools.chain(graph.inputs, *(node.outputs for node in graph))
        for value in values:
            kind = infos.get(value.name or "")
            if kind is None or not kind.HasField("tensor_type"):
                continue
            if kind.tensor_type.elem_type:
                self._types[value] = kind.tensor_type.elem_type
            if kind.tensor_type.HasField("shape"):
                dims = kind.tensor_type.shape.dim
                found[value] = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in dims)
        written = {node.output[0]: node for node in proto.node if node.output}
        for node in graph:
            found_node = written.get(node.outputs[0].name or "") if node.outputs else None
            inner = {} if found_node is None else {a.name: a for a in found_node.attribute}
            for name, subgraph in subgraphs(node):
                if name in inner and inner[name].HasField("g"):
                    self._collect(subgraph, inner[name].g, found)

    @cached_property
    def integers(self) -> Ints:
        """Those that are the same whatever the sizes of open axes, by name."""
        return proven(self._model)[0]

    def uncertain(self, node: ir.Node) -> bool:
        """Whether some size of the node's outputs isn't known."""
        found = [self.probes(v) for v in node.outputs]
        return any(probes is None or any(None in dims for dims in probes) for probes in found)

    def probes(self, value: ir.Value) -> tuple[Dims, ...] | None:
        if value.const_value is not None:
            return (tuple(value.const_value.shape.numpy()),) * len(self._probes)
        found = [dims for probe in self._probes if (dims := probe.get(value, self._anyhow.get(value))) is not None]
        stated = self._stated(value)
        if len(found) == len(self._probes) and len({len(dims) for dims in found}) == 1:
            if self._consistent and stated is not None and len(stated) == len(found[0]) and value.name not in self._by_data:
                return tuple(tuple(s if n is None else n for n, s in zip(dims, stated, strict=True)) for dims in found)
            return tuple(found)
        return None if stated is None else (stated,) * len(self._probes)

    def _stated(self, value: ir.Value) -> Dims | None:
        """The shape that the file states, without sizes where these may be those of one example alone."""
        stated = axes(value)
        if stated is None:
            return None
        dims = tuple(dim if isinstance(dim, int) else None for dim in stated)
        return (None,) * len(dims) if len(self._probes) > 1 and None not in dims else dims

    def _contradicts(self, value: ir.Value) -> bool:
        """Whether the file states another size of a value than the one that was inferred."""
        stated = self._stated(value)
        found = [dims for probe in self._probes if (dims := probe.get(value)) is not None]
        if stated is None or not found:
            return False
        pairs = [(n, s) for dims in found for n, s in zip(dims, stated, strict=False)]
        return any(len(dims) != len(stated) for dims in found) or any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def rank(self, value: ir.Value) -> int | None:
        found = self.probes(value)
        return None if found is None else len(found[0])

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        if value.const_value is not None:
            return value.const_value.dtype
        if value in self._types:
            return ir.DataType(self._types[value])
        return value.dtype


def _is_read_tensor(value: ir.Value) -> bool:
    return not isinstance(value.type, (ir.SequenceType, ir.OptionalType)) and bool(value.uses() or value.is_graph_output())


def _infer(proto: onnx.ModelProto, how: Callable[..., onnx.ModelProto]) -> onnx.ModelProto:
    try:
        return how(proto, partial(onnx.shape_inference.infer_shapes, check_type=False, strict_mode=False, data_prop=True))
    except Exception:  # a model that the inference gives up on still has the shapes written in it
        return proto


def _probe_sizes(graph: onnx.GraphProto) -> Iterator[dict[tuple[str, int], int]]:
    """For each probe, a size for every dynamic axis of every input."""
    dynamic = [
        (info.name, axis, dim.dim_param)
        for info in graph.input
        for axis, dim in enumerate(info.type.tensor_type.shape.dim)
        if not dim.HasField("dim_value")
    ]
    probes = range(2) if dynamic else range(1)
    for probe in probes:
        symbols: dict[str, int] = {}
        sizes = {}
        fresh = {True: BATCH_SIZES[probe], False: OTHER_SIZES[probe]}
        for name, axis, symbol in dynamic:
            key = symbol or f"{name}:{axis}"
            if key not in symbols:
                symbols[key] = fresh[axis == 0]
                fresh[axis == 0] += 2 if axis == 0 else 32
            sizes[name, axis] = symbols[key]
        yield sizes


def _skeleton(model: ir.Model, computed: Mapping[str, npt.NDArray[Any]], *, proven: bool = False) -> onnx.ModelProto:
    """The model without its large weights (these become inputs) and without the shapes that the inference can find itself.

    proven: also without what a file states of other operators, and the defaults of inputs.
    """
    proto = bare(model)
    graph, inputs = proto.graph, {info.name: info for info in proto.graph.input}
    for name, value in model.graph.initializers.items():
        if proven and value.is_graph_input() and model.ir_version >= 4:
            continue
        tensor = value.const_value
        if tensor is not None and nbytes(tensor) > SMALL:
            info = inputs[name] if name in inputs else graph.input.add()
            info.CopyFrom(onnx.helper.make_tensor_value_info(name, tensor.dtype.value, tensor.shape.numpy()))
        elif tensor is not None:
            graph.initializer.append(ir.serde.serialize_tensor(tensor))
            graph.initializer[-1].name = name
    graph.initializer.extend(onnx.numpy_helper.from_array(array, f"{name}.computed") for name, array in computed.items())
    for node in graph.node if computed else ():
        for i, name in enumerate(node.input):
            if name in computed:
                node.input[i] = f"{name}.computed"
    _forget_shapes(graph, every=proven)
    open_axes(graph)
    _unfuse(graph)
    return proto


def _unfuse(graph: onnx.GraphProto) -> None:
    """Write fused operators of ONNX Runtime as the standard's of the same shape, which the inference knows.

    A GroupNormalization, which it doesn't know, is an Identity by that.
    """
    for node in graph.node:
        if node.op_type == "GroupNormalization" and node.domain in ("", "ai.onnx"):
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
        if node.domain != MICROSOFT:
            continue
        settings = {a.name: a for a in node.attribute}
        if node.op_type in ("FusedConv", "FusedGemm"):
            node.op_type, node.domain = node.op_type.removeprefix("Fused"), ""
            del node.input[3:]
            kept = [a for name, a in settings.items() if not name.startswith("activation")]
            del node.attribute[:]
            node.attribute.extend(kept)
        elif node.op_type in ALIKE:
            node.domain = ""
        elif node.op_type == "FusedMatMul" and not any(f"transBatch{x}" in settings for x in "AB"):
            node.op_type, node.domain = "Einsum", ""
            left, right = (name in settings and settings[name].i for name in ("transA", "transB"))
            equation = f"{'...km' if left else '...mk'},{'...nk' if right else '...kn'}->...mn"
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("equation", equation))


def _forget_shapes(graph: onnx.GraphProto, *, every: bool) -> None:
    """Forget the shapes of what the standard's operators make, which the inference finds; every: of what others make, too."""
    made = {name for node in graph.node if every or node.domain in ("", "ai.onnx") for name in node.output}
    for info in (*graph.value_info, *graph.output):
        kind = info.type
        while (nested := kind.WhichOneof("value")) in ("sequence_type", "optional_type"):
            kind = getattr(kind, nested).elem_type
        if info.name in made and kind.HasField("tensor_type"):
            kind.tensor_type.ClearField("shape")
    for node in graph.node:
        for body in inner_graphs(node):
            _forget_shapes(body, every=every)


def proven(model: ir.Model) -> tuple[Ints, Ints, dict[str, Dims]]:
    """Integers that are the same whatever the sizes of open axes, by name, what Reshapes may take for their sizes, by what they give, and
    shapes: the inference leaves these axes open."""
    skeleton = _skeleton(model, {}, proven=True)
    inferred = _infer(skeleton, settle).graph
    integers = Integers(skeleton.graph)
    integers.follow(inferred)
    known = {name: array for name, array in integers.known.items() if not is_open(array).any()}
    shapes = {name: tuple(None if n <= OPEN else n for n in sizes) for name, sizes in integers.shapes.items()}
    given = [(node.output[0], name) for node in skeleton.graph.node if node.op_type == "Reshape" for name in node.input[1:]]
    targets = {output: known[name] for output, name in given if name in known}
    found = {name: np.array([-1 if n is None else n for n in dims], np.int64) for name, dims in shapes.items() if fixes(dims)}
    return known, found | targets, shapes


def fixes(dims: Dims) -> bool:
    """Whether a shape has but one size that isn't known, so that it follows from how many numbers there are."""
    return dims.count(None) <= 1 and all(n != 0 for n in dims)


def symbolic(model: ir.Model) -> dict[str, tuple[int | str | None, ...]]:
    """The shapes by name as the inference finds them with the symbols of open axes in them."""
    try:
        proto = onnx.shape_inference.infer_shapes(_skeleton(model, {}), data_prop=True)
    except Exception:  # it raises what it likes, and without it less is known
        return {}
    found: dict[str, tuple[int | str | None, ...]] = {}
    for info in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        if info.type.HasField("tensor_type") and info.type.tensor_type.HasField("shape"):
            dims = info.type.tensor_type.shape.dim
            found[info.name] = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims)
    return found
