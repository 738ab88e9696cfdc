"""An ONNX model as the neutral graph that the rules see. The operators themselves are in `table`, the table of this front-end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bnfold.algebra.affine import Array, Blocked
from bnfold.algebra.graph import Elementwise, Graph, Node, Param, Tensor, Value
from bnfold.algebra.layouts import AS_STORED, Layout, new, scaled
from bnfold.algebra.lowering import Lowering
from bnfold.algebra.quantised import Quantised
from bnfold.algebra.rounding import limits, roundoff
from bnfold.algebra.settings import Settings

from ..files.load import Stored
from ..graph.constants import CONTROL, FLOATS, Constants, is_made
from ..graph.quantised import dequantised, dequantises, makes_whole, quantised, relaid, rounding, stored_name
from ..graph.sequences import Sequences, without_sequences
from ..graph.shapes import Shapes
from ..graph.walk import all_graphs, all_nodes, arg, attribute, behind_identity, is_standard, name_of, subgraphs
from . import narrowing

COPIES = {"Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"}
SHAPES = ("Shape", "Size")


@dataclass(eq=False)
class OnnxNative:
    """A neutral node's ONNX node. dtype: the type that a parameter without a tensor gets; limit: its largest number."""

    node: ir.Node
    dtype: ir.DataType | None = None
    positions: list[int] = field(default_factory=list)  # for each activation, which of the node's inputs it is
    limit: float = np.inf
    cloneable: bool = False
    reset: dict[str, ir.Attr] = field(default_factory=dict)  # attributes to set once the bias is rewritten (Gemm's beta)
    clone_of: OnnxNative | None = None  # the original, where the ONNX node has still to be made
    readers: list[tuple[OnnxNative, int]] = field(default_factory=list)  # (who, which activation) reads the clone instead


Lower = Callable[["OnnxLowering", ir.Node], object]


class OnnxLowering(Lowering):
    """The lowering of a model. An argument goes by its number; a parameter's slot may also be an attribute, or "Add" where one has to grow.

    computed: BatchNorms of constants (weight standardisation).
    """

    constants: Constants

    def __init__(self, model: ir.Model, operators: Mapping[str, Lower], settings: Callable[..., Settings]) -> None:
        super().__init__(operators, settings)
        self.model = model
        self.opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
        self.shapes = Shapes(model)
        self.constants = Constants(model, self.shapes)
        self.sequences = Sequences(model, self.constants, self.shapes)
        computed, taken = self._computed_settings(), self.sequences.taken
        if computed or taken:
            self.shapes = Shapes(model, computed, lambda graph: without_sequences(graph, taken, self.opset))
            self.constants = Constants(model, self.shapes)
            self.sequences = Sequences(model, self.constants, self.shapes)
        self.computed: list[ir.Node] = []
        self._known: dict[ir.Node, Quantised | str] = {}

    def _computed_settings(self) -> dict[str, npt.NDArray[Any]]:
        """The small integers that the graph computes from constants and that decide a size which isn't known yet."""
        found = {}
        for node in self.model.graph:
            if node.op_type in CONTROL or not self.shapes.uncertain(node):
                continue
            for v in node.inputs:
                if v is not None and v.producer() is not None and self.constants.is_constant(v) and self.constants.stored(v) is None:
                    array = self.constants.get(v)
                    if array is not None and v.name and array.dtype == np.int64 and array.size <= 64:
                        found[v.name] = array
        return found

    def graph(self) -> Graph:
        self._walk(self.model.graph)
        for graph in all_graphs(self.model.graph):
            for output in graph.outputs:
                self.value(output).is_output = True
        for node in all_nodes(self.model.graph):
            if node.op_type in SHAPES and is_standard(node) and node.inputs[0] is not None and narrowing.reads_channels(node):
                self.value(node.inputs[0]).is_sized = True
        return self.finished()

    def _walk(self, graph: ir.Graph) -> None:
        for node in graph:
            for _, inner in subgraphs(node):
                self._walk(inner)
            if node.outputs and all(self.constants.is_constant(v) for v in node.outputs):
                if node.op_type == "BatchNormalization" and is_standard(node):
                    self.computed.append(node)
                continue  # constants are parameters of those who read them
            kinds = [self.shapes.dtype(v) for v in node.outputs]
            numbers = bool(kinds) and all(kind is not None and kind not in FLOATS for kind in kinds)
            name = node.op_type if is_standard(node) else f"{node.domain}::{node.op_type}"
            start = len(self.nodes)
            self.lower(node, name, rounding(name) or ("it isn't floating point" if numbers else ""))
            for made in self.nodes[start:]:
                made.attrs["scope"] = id(graph)

    # --- see `Lowering` --------------------------------------------------------------------------------------------------------------

    def arg(self, op: ir.Node, key: int) -> ir.Value | None:
        return given(op, key)

    def keys(self, op: ir.Node, refs: Iterable[ir.Value]) -> list[int]:
        places: dict[ir.Value | None, list[int]] = {}
        for i, v in enumerate(op.inputs):  # a value may stand twice
            places.setdefault(v, []).append(i)
        return [places[v].pop(0) for v in refs]

    def outputs(self, op: ir.Node) -> dict[int, ir.Value]:
        return dict(enumerate(op.outputs))

    def ends(self, op: ir.Node) -> tuple[list[ir.Value], list[Value]]:
        shape_only = op.op_type in SHAPES and is_standard(op)  # shapes alone are no use of a value
        inputs = [v for v in op.inputs if v is not None and not self.constants.is_constant(v) and not shape_only]
        return inputs, [self.value(v) for v in op.outputs]

    def new_value(self, ref: ir.Value) -> Value:
        probes = self.shapes.probes(ref)
        return Value(ref.name or "", probes, None if probes is None else len(probes[0]))

    def shape(self, ref: ir.Value) -> tuple[int, ...]:
        stored = self.constants.stored(ref)
        return tuple(stored.shape.numpy()) if stored is not None else self._get(ref).shape

    def dtype(self, ref: ir.Value) -> ir.DataType | None:
        return self.constants.dtype(ref) if self.constants.is_constant(ref) else self.shapes.dtype(ref)

    def name(self, op: ir.Node) -> str:
        return name_of(op)

    def label(self, op: ir.Node) -> str:
        return op.op_type

    def native(self, op: ir.Node, inputs: list[ir.Value], keys: list[int], output: ir.Value | None) -> OnnxNative:
        kinds = (self.dtype(v) for v in (output, *inputs, *op.inputs) if v is not None)  # weights tell where inference finds nothing
        dtype = next((kind for kind in kinds if kind in FLOATS), None)
        return OnnxNative(op, dtype, keys, largest(dtype), len(op.outputs) == 1)

    def param(
        self, op: ir.Node, key: int, shape: tuple[int, ...] | None = None, layout: Layout | None = None, *, role: str = "weight"
    ) -> Param:
        v = given(op, key)
        tensor = None if v is None else self.tensor(v)
        if v is None or tensor is None or (role == "constant" and tensor.quantised is not None and not tensor.quantised.small):
            raise Blocked(f"its {role} {self._untouchable(v)}")
        if tensor.quantised is None or not (between := dequantised(v)[1]):
            stored, made = AS_STORED, tensor.shape
        else:
            stored, made = relaid(between, self.shape), self.shape(v)
        shape = made if shape is None else shape
        return Param(tensor, shape, (scaled(shape, made) if layout is None else layout).after(stored), slot=key)

    def bias(self, op: ir.Node, key: int, weight: Param, shape: tuple[int, ...], stored: tuple[int, ...] | None = None) -> Param:
        if given(op, key) is not None:
            return self.param(op, key, shape, role="bias")
        return Param(None, shape, AS_STORED if stored is None else new(shape, stored), slot=key)

    def slot_behind(self, op: ir.Node) -> str:
        return "Add"

    def elementwise(self, node: Node) -> Elementwise | None:
        return narrowing.elementwise(self.constants, self.opset, node)

    def rigid(self, node: Node) -> str:
        return narrowing.rigid(self.constants, node)

    # --- what the operators' functions use -------------------------------------------------------------------------------------------

    @contextmanager
    def standing_in(self, v: ir.Value, value: Value) -> Iterator[None]:
        """For a while, take another value for an ONNX one: what an operator makes on the way."""
        own = self.value(v)
        self._values[v] = value
        try:
            yield
        finally:
            self._values[v] = own

    def static(self, node: ir.Node, name: str, index: int, default: Any = None) -> Any:
        """A setting that is an attribute in old opsets and a constant input in new ones, as a list; None where it is computed."""
        if name in node.attributes:
            found = attribute(node, name)
            return list(found) if isinstance(found, (list, tuple)) else [found]
        if given(node, index) is None:
            return default
        array = self.const(given(node, index))
        return None if array is None else array.ravel().tolist()

    # --- constants that may be rewritten ---------------------------------------------------------------------------------------------

    def tensor(self, v: ir.Value) -> Tensor | None:
        """The constant as a tensor that may be rewritten, or the quantised one that it is a copy of; None where it is no float constant,
        or stored in a way that can't change."""
        if not self.is_constant(v) or self.constants.dtype(v) not in FLOATS:
            return None
        how = self._quantised(v)
        if isinstance(how, str):
            return None
        v = behind_identity(v) if how is None else self._stored_at(v)
        if v not in self._tensors:
            shape, dtype = self.shape(v) if how is None else how.shape, self.constants.dtype(v)
            read = partial(self._get, v) if how is None else how.array
            made = self._tensors[v] = Tensor(stored_name(v), read, shape, largest(dtype), v, dtype, quantised=how)
            made.cast_from = self._cast_from(v)
            made.raw = partial(self._raw, v) if how is None else None
            made.integers = how is None and is_made(v, lambda node: makes_whole(node) or dequantises(node))
        return self._tensors[v]

    @staticmethod
    def _stored_at(v: ir.Value) -> ir.Value:
        """The output of the DequantizeLinear that a constant is a copy of."""
        node, _ = dequantised(v)
        assert node is not None
        return node.outputs[0]

    def _quantised(self, v: ir.Value) -> Quantised | str | None:
        """How a constant is quantised, if it is; a clause where it therefore can't change."""
        node, between = dequantised(v)
        if len(self.shape(v)) < 2 and (node is None or between or node.op_type == "Mul"):
            return None  # a bias is small enough to become floats
        if node is None:
            return None
        if node not in self._known:
            self._known[node] = quantised(self.constants, self.opset, node)
        how = self._known[node]
        return None if not how or (isinstance(how, Quantised) and how.small and between) else how

    def _untouchable(self, v: ir.Value | None) -> str:
        """Why an input can't be rewritten, in words that follow what it is."""
        if v is None or self.is_constant(v):
            how = None if v is None else self._quantised(v)
            return how if isinstance(how, str) else "is not of floating-point numbers" if how is None else "is quantised"
        source, (node, _) = behind_identity(v), dequantised(v)
        if source.is_graph_input():
            return "is a default that callers may override" if source.is_initializer() else "is given by the caller"
        scaled = node is not None and any(self.is_constant(each) for each in node.inputs)
        return "is quantised, and its scales are computed when the model runs" if scaled else "is computed when the model runs"

    def _cast_from(self, v: ir.Value) -> float | None:
        """The largest number of the narrowest float type that a constant has or is a copy of, where it is cast."""
        dtypes = [self.constants.dtype(v)]
        while (node := v.producer()) is not None and node.op_type in COPIES and is_standard(node) and node.inputs[0] is not None:
            v = node.inputs[0]
            dtypes.append(self.constants.dtype(v))
        if node is not None and node.op_type == "DequantizeLinear" and is_standard(node):  # its scales may have another type
            dtypes += [self.constants.dtype(scale) for scale in node.inputs[1:2] if scale is not None]
        floats = [dtype for dtype in dtypes if dtype in FLOATS]
        return largest(max(floats, key=lambda dtype: roundoff(dtype.numpy()))) if floats else None

    def _get(self, v: ir.Value) -> Array:
        array = self.constants.get(v)
        assert array is not None
        return array

    def _raw(self, v: ir.Value) -> npt.NDArray[Any]:
        stored = self.constants.stored(v)
        if stored is None:
            return self._get(v)
        return stored.as_stored() if isinstance(stored, Stored) else stored.numpy()


def by_first(shared: Callable[..., object], **settings: Any) -> Lower:
    """An operator of which its first input and its settings say all."""
    return lambda ctx, node: shared(ctx, node, arg(node), **settings)


def given(node: ir.Node, index: int) -> ir.Value | None:
    """An input, or None where it is absent or the empty string."""
    v = node.inputs[index] if index < len(node.inputs) else None
    return None if v is None or (v.name == "" and v.producer() is None) else v


def largest(dtype: ir.DataType | None) -> float:
    """The largest finite number of a float type (float32 where it isn't known)."""
    kind = dtype.numpy() if dtype is not None and dtype in FLOATS else np.dtype(np.float32)
    return float(limits(kind).max)
