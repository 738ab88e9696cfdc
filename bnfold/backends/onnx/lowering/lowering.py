"""An ONNX model as the neutral graph that the rules see. The operators themselves are in `table`, the table of this front-end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bnfold.algebra.graph import AS_STORED, Graph, Layout, Node, Param, Quantised, Site, Tensor, Value
from bnfold.algebra.settings import Settings

from ..graph.constants import CONTROL, FLOATS, Constants, value_inputs
from ..graph.sequences import Part, Sequences, without_sequences
from ..graph.shapes import Shapes
from ..graph.walk import all_graphs, attribute, behind_identity, is_standard, name_of, subgraphs, whole

COPIES = {"Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"}


@dataclass(eq=False)
class OnnxNative:
    """Where a neutral node's parameters live in its ONNX node: by role, the input's index or the attribute's name."""

    node: ir.Node
    slots: dict[str, int | str] = field(default_factory=dict)
    dtype: ir.DataType | None = None  # the type that a parameter without a tensor gets
    reset: dict[str, ir.Attr] = field(default_factory=dict)  # attributes to set once the bias is rewritten (Gemm's beta)
    positions: list[int] = field(default_factory=list)  # for each activation, which of the node's inputs it is
    clone_of: OnnxNative | None = None  # the original, where the ONNX node has still to be made
    readers: list[tuple[OnnxNative, int]] = field(default_factory=list)  # (who, which activation) reads the clone instead


Lower = Callable[["OnnxLowering", ir.Node], "str | None"]


class OnnxLowering:
    """The state of one lowering. operators: the function of each, by name; settings: what verify's first level compares."""

    def __init__(self, model: ir.Model, operators: Mapping[str, Lower], settings: Callable[..., Settings]) -> None:
        self.model, self._operators, self._settings = model, operators, settings
        self.opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
        self.shapes = Shapes(model)
        self.constants = Constants(model, self.shapes)
        self.sequences = Sequences(model, self.constants, self.shapes)
        computed, taken = self._computed_settings(), self.sequences.taken
        if computed or taken:
            self.shapes = Shapes(model, computed, lambda graph: without_sequences(graph, taken, self.opset))
            self.constants = Constants(model, self.shapes)
            self.sequences = Sequences(model, self.constants, self.shapes)
        self.nodes: list[Node] = []
        self.sites: dict[Any, Site] = {}
        self.computed: list[ir.Node] = []  # BatchNorms of constants (weight standardisation)
        self._values: dict[ir.Value, Value] = {}
        self._tensors: dict[Any, Tensor] = {}
        self._ranks: dict[ir.Value, int] = {}  # where the shape inference knows nothing but the operator does

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
        self._lower(self.model.graph)
        for graph in all_graphs(self.model.graph):
            for output in graph.outputs:
                self.value(output).is_output = True
        nodes = [node for node in self.nodes if node.op != "Constant" or node.outputs[0].users]
        return Graph(nodes, list(self.sites.values()))

    def _lower(self, graph: ir.Graph) -> None:
        for node in graph:
            for _, inner in subgraphs(node):
                self._lower(inner)
            if node.outputs and all(self.constants.is_constant(v) for v in node.outputs):
                if node.op_type == "BatchNormalization" and is_standard(node):
                    self.computed.append(node)
                continue  # constants are parameters of those who read them
            kinds = [self.shapes.dtype(v) for v in node.outputs]
            if kinds and all(kind is not None and kind not in FLOATS for kind in kinds):
                self.barrier(node, "it isn't floating point")
                continue
            lower = self._operators.get(node.op_type if is_standard(node) else f"{node.domain}::{node.op_type}")
            why = "no rule lets a map cross it" if lower is None else lower(self, node)
            if why is not None:
                self.barrier(node, why)

    # --- what the operators' functions use ---------------------------------------------------------------------------------

    def value(self, v: ir.Value) -> Value:
        if v not in self._values:
            probes = self.shapes.probes(v)
            rank = len(probes[0]) if probes is not None else self._ranks.get(v)
            self._values[v] = Value(v.name or "", probes, rank)
        return self._values[v]

    @contextmanager
    def standing_in(self, v: ir.Value, value: Value) -> Iterator[None]:
        """For a while, take another value for an ONNX one: what an operator makes on the way."""
        own = self.value(v)
        self._values[v] = value
        try:
            yield
        finally:
            self._values[v] = own

    def rank(self, v: ir.Value) -> int | None:
        return self.value(v).rank

    def set_rank(self, v: ir.Value, rank: int | None) -> None:
        """Tell a rank that the shape inference didn't find."""
        if rank is not None and self.value(v).rank is None:
            self.value(v).rank = rank

    def const(self, node: ir.Node, index: int) -> npt.NDArray[Any] | None:
        """The constant at an input, or None where there is none or it isn't constant."""
        return self.constants.get(given(node, index))

    def is_const(self, node: ir.Node, index: int) -> bool:
        return self.constants.is_constant(given(node, index))

    def static(self, node: ir.Node, name: str, index: int, default: Any = None) -> Any:
        """A setting that is an attribute in old opsets and a constant input in new ones, as a list; None where it is computed."""
        if name in node.attributes:
            found = attribute(node, name)
            return list(found) if isinstance(found, (list, tuple)) else [found]
        if given(node, index) is None:
            return default
        array = self.const(node, index)
        return None if array is None else array.ravel().tolist()

    def floating(self, v: ir.Value) -> bool:
        kind = self.constants.dtype(v) if self.constants.is_constant(v) else self.shapes.dtype(v)
        return kind is None or kind in FLOATS

    def tensor(self, v: ir.Value) -> Tensor | None:
        """The constant as a tensor that may be rewritten; None where it is not a float constant or is stored quantised."""
        v = behind_identity(v)
        if v not in self._tensors:
            dtype = self.constants.dtype(v) if self.constants.is_constant(v) else None
            quantised = None
            if dtype not in FLOATS:
                return None
            if self._makers(v, "DequantizeLinear") and len(self._get(v).shape) > 1:  # a bias is small enough to become floats
                found = self._integers(v)
                if isinstance(found, str):
                    return None
                quantised = found
            stored = self.constants.stored(v)
            shape = tuple(stored.shape.numpy()) if stored is not None else self._get(v).shape
            made = Tensor(v.name or "", lambda v=v: self._get(v), shape, largest(dtype), v, dtype, quantised=quantised)  # type: ignore[misc]
            made.cast_from = self._cast_from(v)
            self._tensors[v] = made
        return self._tensors[v]

    def _cast_from(self, v: ir.Value) -> float | None:
        """The largest number of the narrowest float type that a constant has or is a copy of, where it is cast."""
        dtypes = [self.constants.dtype(v)]
        while (node := v.producer()) is not None and node.op_type in COPIES and is_standard(node) and node.inputs[0] is not None:
            v = node.inputs[0]
            dtypes.append(self.constants.dtype(v))
        floats = [dtype for dtype in dtypes if dtype in FLOATS]
        return largest(max(floats, key=lambda dtype: float(ml_dtypes.finfo(dtype.numpy()).eps))) if floats else None  # type: ignore[no-untyped-call]

    def _get(self, v: ir.Value) -> npt.NDArray[np.float64]:
        array = self.constants.get(v)
        assert array is not None
        return array

    def _integers(self, v: ir.Value) -> Quantised | str:
        """How a weight behind DequantizeLinear may change; a clause that says why not where it may not."""
        node = v.producer()
        if self._makers(v, "QuantizeLinear"):
            return "is rounded by QuantizeLinear"
        if node is None or node.op_type != "DequantizeLinear":
            return "is quantised, and computed further behind DequantizeLinear"
        if self.opset < 13:
            return f"is quantised, and opset {self.opset} has no scale for each channel"
        if attribute(node, "block_size", 0):
            return "is quantised in blocks"
        q, scale = self.const(node, 0), self.const(node, 1)
        if q is None or scale is None or any(x is not None and self.constants.stored(x) is None for x in node.inputs):
            return "is quantised, and its integers or their scales are computed"
        if q.dtype not in (np.int8, np.uint8, np.int16, np.uint16):
            return f"is quantised as {q.dtype}, whose scales aren't changed"
        zero = self.const(node, 2)
        axis = whole(node, "axis", 1) % q.ndim if max(scale.size, 1 if zero is None else zero.size) > 1 else None

        def negatable(along: int) -> tuple[bool, ...]:
            middle = 0 if zero is None else zero.astype(np.int64).reshape([-1 if i == axis else 1 for i in range(q.ndim)])
            mirrored, kind = 2 * middle - q.astype(np.int64), np.iinfo(q.dtype)
            stuck = np.argwhere((mirrored < kind.min) | (mirrored > kind.max))[:, along]
            return tuple(k not in stuck for k in range(q.shape[along]))

        return Quantised(axis, negatable)

    def no_tensor(self, node: ir.Node, index: int, role: str) -> str:
        """Why an input can't be rewritten, where `param` gave none."""
        v = given(node, index)
        if v is not None and self.constants.is_constant(v) and self._makers(v, "DequantizeLinear"):
            how = self._integers(behind_identity(v))
            return f"its {role} {how if isinstance(how, str) else 'is quantised'}"
        return f"its {role} is not a float constant, or callers may override it"

    def _makers(self, v: ir.Value, op_type: str) -> bool:
        """Whether an operator of this type takes part in the making of a constant."""
        stack, seen = [v], {v}
        while stack:
            node = stack.pop().producer()
            if node is None:
                continue
            if node.op_type == op_type and is_standard(node):
                return True
            for x in value_inputs(node):
                if x is not None and x not in seen:
                    seen.add(x)
                    stack.append(x)
        return False

    def param(self, node: ir.Node, index: int, shape: tuple[int, ...] | None = None, layout: Layout | None = None) -> Param | None:
        """A constant input as a parameter in its canonical shape; None where it can't be one."""
        v = given(node, index)
        tensor = None if v is None else self.tensor(v)
        if tensor is None:
            return None
        shape = tensor.shape if shape is None else shape
        if layout is None:
            stored_shape = tensor.shape
            layout = AS_STORED if shape == stored_shape else reshaped(shape, stored_shape)
        return Param(tensor, shape, layout)

    def emit(
        self,
        op: str,
        node: ir.Node,
        inputs: list[ir.Value],
        attrs: dict[str, Any] | None = None,
        params: dict[str, Param] | None = None,
        slots: dict[str, int | str] | None = None,
        output: ir.Value | None = None,
        reset: dict[str, ir.Attr] | None = None,
    ) -> Node:
        """Add a neutral node with one output (the node's first unless told otherwise)."""
        out = node.outputs[0] if output is None else output
        dtype = self.shapes.dtype(out)
        if dtype not in FLOATS and inputs:
            dtype = self.shapes.dtype(inputs[0])
        attrs = {"limit": largest(dtype), "cloneable": len(node.outputs) == 1, **(attrs or {})}
        positions: list[int] = []
        for v in inputs:  # a value may stand twice
            positions.append(next(i for i, x in enumerate(node.inputs) if x is v and i not in positions))
        native = OnnxNative(node, slots or {}, dtype, reset or {}, positions)
        sources = [self._operand(node, v, i) for v, i in zip(inputs, positions, strict=True)]
        made = Node(op, name_of(node), sources, [self.value(out)], attrs, params or {}, native, label=node.op_type)
        held = {i for role, i in native.slots.items() if isinstance(i, int) and role != "fill"}
        made.attrs["settings"] = partial(self._settings, self, node, positions, held)
        self.nodes.append(made)
        return made

    def emit_parts(self, node: ir.Node, parts: tuple[Part, ...], attrs: dict[str, Any]) -> None:
        """Add a move of tensors that come in a sequence. It can't be doubled, nor read a double: its inputs are another operator's."""
        sources = [self._operand(part.node, part.source, part.index) for part in parts]
        native = OnnxNative(node, dtype=self.shapes.dtype(node.outputs[0]), positions=[part.index for part in parts])
        attrs = {"limit": largest(native.dtype), "cloneable": False, **attrs}
        self.nodes.append(Node("Move", name_of(node), sources, [self.value(node.outputs[0])], attrs, {}, native, label=node.op_type))

    def _operand(self, node: ir.Node, v: ir.Value, index: int) -> Value:
        """An activation; a constant operand becomes a node of its own, which can absorb a map."""
        if not self.constants.is_constant(v):
            return self.value(v)
        tensor = self.tensor(v)
        shape = self.constants.get(v).shape if tensor is None else tensor.shape  # type: ignore[union-attr]
        value = Value(v.name or "", (shape,), len(shape), fixed=tensor is None)
        if tensor is not None:
            native = OnnxNative(node, {"value": index}, self.constants.dtype(v))
            self.nodes.append(
                Node(
                    "Constant",
                    name_of(node),
                    [],
                    [value],
                    {"limit": tensor.limit},
                    {"value": Param(tensor, shape)},
                    native,
                    label="Constant",
                )
            )
        return value

    def barrier(self, node: ir.Node, why: str) -> None:
        """A node that no map crosses. It uses all its activations, and shapes alone are no use of a value."""
        shape_only = node.op_type in ("Shape", "Size") and is_standard(node)
        positions = [i for i, v in enumerate(node.inputs) if v is not None and not self.constants.is_constant(v) and not shape_only]
        inputs = [self.value(v) for i, v in enumerate(node.inputs) if i in positions and v is not None]
        outputs = [self.value(v) for v in node.outputs]
        if outputs:
            attrs = {"why": why, "settings": partial(self._settings, self, node, positions, set())}
            native = OnnxNative(node, positions=positions)
            self.nodes.append(Node("Barrier", name_of(node), inputs, outputs, attrs, native=native, label=node.op_type))

    def site(self, key: Any, node: Node, channels: int, *, is_batchnorm: bool, refusal: str | None = None, note: str = "") -> None:
        """Register an affine node as something to fold; nodes with the same key are calls of one layer."""
        if key in self.sites and self.sites[key].refusal == refusal:
            self.sites[key].nodes.append(node)
            return
        if key in self.sites:
            key = node
        self.sites[key] = Site(node.name, [node], channels, is_batchnorm, refusal=refusal, note=note)


def given(node: ir.Node, index: int) -> ir.Value | None:
    """An input, or None where it is absent or the empty string."""
    v = node.inputs[index] if index < len(node.inputs) else None
    return None if v is None or (v.name == "" and v.producer() is None) else v


def reshaped(canonical: tuple[int, ...], stored: tuple[int, ...]) -> Layout:
    """A layout that differs in its shape alone. An array that grew is stored in the canonical rank, which broadcasts alike."""

    def back(w: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return w.reshape(stored) if w.shape == canonical else w

    return Layout(f"as {canonical}", lambda w: w.reshape(canonical), back)


def largest(dtype: ir.DataType | None) -> float:
    """The largest finite number of a float type (float32 where it isn't known)."""
    kind = dtype.numpy() if dtype is not None and dtype in FLOATS else np.dtype(np.float32)
    return float(ml_dtypes.finfo(kind).max)  # type: ignore[no-untyped-call]
