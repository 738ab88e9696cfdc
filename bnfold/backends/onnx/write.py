"""Write a plan back into an ONNX model: new initializers, BatchNorms taken out, everything else untouched."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bnfold.algebra import rounding
from bnfold.algebra.affine import Array
from bnfold.algebra.blocks import lost, stored
from bnfold.algebra.graph import Graph, Node, Param, Tensor
from bnfold.algebra.quantised import Quantised, Rescaled
from bnfold.folding.feasible import multiplied, rescaled, said_of_integers
from bnfold.folding.lower import Written
from bnfold.folding.plan import Planned
from bnfold.text import Notes, unused

from .folded import FoldedWeights, rounded
from .graph.constants import Constants, is_made
from .graph.edit import idle, inner_first, is_read
from .graph.quantised import dequantised, dequantises, remade
from .graph.quantised import quantised as stated
from .graph.tidy import tidy
from .graph.walk import all_graphs, nbytes, opset
from .lowering.lowering import SHAPES, OnnxNative
from .operators import ALIGNS, add_behind, multiply, narrow, put, reset

_unused = partial(unused, form="{}.{}")


def write(
    model: ir.Model,
    graph: Graph,
    planned: Planned,
    computed: Mapping[ir.Node, tuple[npt.NDArray[Any] | None, ir.DataType | None]] | None = None,
    *,
    constants: Constants,
) -> tuple[dict[Node, str], int]:
    """Apply a plan to the model that its graph was lowered from.

    computed: nodes to replace by the constants that they make. Returns a note for each node of whose weights there is something to say,
    and the bytes that copies of shared weights add. Raises RuntimeError on an update that nothing here can write: it must never be lost.
    """
    writer = _Writer(model, constants)
    writer.write(graph, planned)
    for node, (array, dtype) in (computed or {}).items():
        if array is not None:
            writer.compute(node, rounded(array, dtype))
    tidy(model, writer.initializer)
    writer.sweep()
    return writer.notes, writer.bytes_added


class _Writer:
    def __init__(self, model: ir.Model, constants: Constants) -> None:
        self.model, self.constants = model, constants
        graphs = list(all_graphs(model.graph))
        self.names = {v.name for g in graphs for v in chain(g.inputs, g.initializers.values(), *(n.outputs for n in g)) if v.name}
        self.node_names = {node.name for g in graphs for node in g if node.name}
        self.idle_nodes = idle(model.graph)
        self.idle_weights = {v for g in graphs for v in g.initializers.values() if not v.uses()}
        self.made: list[tuple[ir.Value, ir.Value]] = []  # (old, new)
        self.alike: dict[tuple[ir.Value, tuple[int, ...], bytes], ir.Value] = {}  # equal copies of one weight are one weight
        self.scaled: dict[tuple[ir.Value, bytes, bytes], ir.Value] = {}  # by old weight, codes and scales
        self.notes = Notes()
        self.weights = FoldedWeights()
        self.bytes_added = 0

    def write(self, graph: Graph, planned: Planned) -> None:
        self._make_clones(graph.clones)
        narrow(planned, self.constants, self.initializer)
        updates = list(graph.updates())
        for node, role, param in updates:
            if not isinstance(node.native, OnnxNative) or param.slot is None:
                raise RuntimeError(f"there is no way to write the {role} of {node.label} {node.name}")
        for node, role, param in updates:
            self._update(graph, node, role, param)
        for each in planned.written:
            self._write_in_place(each)
        for node in (*planned.removed, *(each.node for each in planned.written)):
            self._remove(node.native.node, node.native.positions[0])
        for m in planned.merges:
            self._remove(m.add.native.node, m.kept_input)
        reset(planned.chains)
        self.idle_nodes -= {m.branch.native.node for m in planned.merges if m.branch is not None}
        self.sweep()
        self._keep_names()

    def _update(self, graph: Graph, node: Node, role: str, param: Param) -> None:
        """Let an operator read a parameter with its update."""
        native: OnnxNative = node.native
        slot, tensor = param.slot, param.tensor
        if tensor is not None and (made := rescaled(graph, node, role)) is not None:
            value = self._requantised(native.node.inputs[slot], tensor, made)
            coded = any(each is not None and is_made(each, dequantises) for each in tensor.native.producer().inputs)
            self.notes.add(node, made.said(tensor.name, coded=coded))
        else:
            dtype = (native.dtype if tensor is None else tensor.dtype) or ir.DataType.FLOAT
            self._note_tiny(node, *lost(param, dtype.numpy()), dtype.numpy(), flush=param.flush)
            if isinstance(slot, str) and slot != "Add":
                native.node.attributes[slot] = ir.AttrFloat32(slot, float(stored(param, np.dtype(np.float64)).ravel()[0]))
                return
            value = self._folded(node, role, param, dtype)
        if slot == "Add":
            add_behind(native.node, value, opset(self.model), self._named)
            return
        assert isinstance(slot, int)
        if len(native.node.inputs) <= slot:
            native.node.resize_inputs(slot + 1)
        native.node.replace_input_with(slot, value)
        if role == "bias":
            native.node.attributes.update(native.reset)

    def _folded(self, node: Node, role: str, param: Param, dtype: ir.DataType) -> ir.Value:
        """A folded parameter as an initializer; equal copies of one weight are one."""
        by, tensor = multiplied(param) if opset(self.model) >= ALIGNS else None, param.tensor
        made = self.weights.tensor(param, dtype) if by is None else ir.Tensor(rounded(by, dtype))
        self.notes.add(node, said_of_integers(node, param, multiplied=by is not None))
        if tensor is None:
            return self.initializer(f"{node.name}.{role}", made)
        key = (tensor.native, tuple(made.shape.numpy()), sha256(made.tobytes()).digest() if len(tensor.users) > 1 else b"")
        if key not in self.alike:
            value = self.initializer(tensor.name or node.name, made)
            self.made.append((tensor.native, value))
            self.alike[key] = value if by is None else multiply(tensor.native, value, self._named)
        return self.alike[key]

    def _write_in_place(self, written: Written) -> None:
        """Put operators in the place of another one, which is still to be taken out."""
        native: OnnxNative = written.node.native
        dtype = written.node.attrs.get("mixed") or native.dtype

        def initializer(name: str, exact: Array) -> ir.Value:
            array = rounded(exact, dtype, flush=written.flush)
            self._note_tiny(written.node, rounding.lost(exact, array), array.size, array.dtype, flush=written.flush)
            return self.initializer(name, ir.Tensor(array))

        casts = None if dtype == native.dtype else (dtype, native.dtype)
        made = put(written, opset(self.model), initializer, self._named, casts)
        native.node.replace_input_with(native.positions[0], made)

    def _make_clones(self, clones: list[Node]) -> None:
        """Make the ONNX nodes of doubled operators, in the order in which they were doubled, and let those who want the copy read it."""
        for node in clones:
            native: OnnxNative = node.native
            assert native.clone_of is not None
            old = native.clone_of.node  # whose inputs are those that it had when it was doubled
            copy = ir.Node(
                old.domain,
                old.op_type,
                list(old.inputs),
                old.attributes.values(),
                num_outputs=1,
                name=_unused(node.name, self.node_names),
            )
            made, value = copy.outputs[0], old.outputs[0]
            made.name, made.type = _unused(f"{value.name}.clone", self.names), value.type
            made.shape = None if value.shape is None else value.shape.copy()
            assert old.graph is not None
            old.graph.insert_after(old, copy)
            native.node, native.clone_of = copy, None
            for reader, i in native.readers:  # perhaps through a BatchNorm that folded before and is still to be removed
                reader.node.replace_input_with(reader.positions[i], made)

    def _note_tiny(self, node: Node, count: int, of: int, dtype: np.dtype[Any], *, flush: bool) -> None:
        """Note weights that fall below the normal range of their type, where it keeps fewer bits of them, or none."""
        if count:
            self.notes.add(node, rounding.too_small(count, of, node.name, dtype, flush=flush))

    def _named(self, name: str, value: str) -> tuple[str, str]:
        """Unused names for a node and what it gives; a node without a name stays without."""
        return _unused(name, self.node_names) if name else "", _unused(value, self.names)

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        tensor.name = free = _unused(name, self.names)
        value = ir.Value(name=free, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
        self.model.graph.register_initializer(value)
        if (self.model.ir_version or 8) < 4:  # there, initializers must be listed as inputs too
            self.model.graph.inputs.append(value)
        return value

    def _requantised(self, given: ir.Value, tensor: Tensor, made: Rescaled) -> ir.Value:
        """What is read in the place of a quantised tensor: the same integers with other scales, laid out anew as they were."""
        assert tensor.quantised is not None
        codes = tensor.quantised.read() if made.codes is None else made.codes
        key = (tensor.native, codes.tobytes() if len(tensor.users) > 1 else b"", made.scale.tobytes() + made.zero.tobytes())
        if key not in self.scaled:

            def add(role: str, array: npt.NDArray[Any], former: ir.Value | None) -> ir.Value:
                value = self.initializer(f"{tensor.name or 'weight'}.{role}", ir.Tensor(array))
                self.made += [] if former is None else [(former, value)]
                return value

            node = remade(tensor.native.producer(), made, tensor.quantised.code, add, self._insert)
            now = stated(self.constants, opset(self.model), node)
            if not isinstance(now, Quantised) or not np.array_equal(now.read(), codes):
                raise RuntimeError(f"the integers of {tensor.name} would change")
            self.scaled[key] = node.outputs[0]
        value = self.scaled[key]
        for node in reversed(dequantised(given)[1]):
            value = self._insert(node, [value, *node.inputs[1:]], dict(node.attributes)).outputs[0]
        return value

    def _insert(self, old: ir.Node, inputs: list[ir.Value | None], attributes: Mapping[str, ir.Attr]) -> ir.Node:
        """A node like one, right behind it, that reads other values."""
        assert old.graph is not None
        name = _unused(old.name, self.node_names) if old.name else None
        copy = ir.Node(old.domain, old.op_type, inputs, attributes.values(), num_outputs=1, name=name)
        made, value = copy.outputs[0], old.outputs[0]
        self.made.append((value, made))
        made.name, made.type, made.shape = _unused(value.name or "weight", self.names), value.type, value.shape
        old.graph.insert_after(old, copy)
        return copy

    def _remove(self, node: ir.Node, kept: int) -> None:
        """Take a node out: its users read its input number `kept`. A graph output keeps its name."""
        source, output, graph = node.inputs[kept], node.outputs[0], node.graph
        assert graph is not None
        assert source is not None
        if output.is_graph_output():
            producer = source.producer()
            if producer is None or producer.graph is not graph or source.is_graph_output():
                self._make_identity(node, source)
                return
            name, output.name = output.name, _unused(f"{output.name}.removed", self.names)
            source.name, source.type, source.shape = name, output.type or source.type, output.shape or source.shape
        ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
        graph.remove(node, safe=True)

    @staticmethod
    def _make_identity(node: ir.Node, source: ir.Value) -> None:
        """What remains of an affine node between two values whose names must both stay."""
        for i in range(len(node.inputs)):
            node.replace_input_with(i, None)
        node.resize_inputs(1)
        node.replace_input_with(0, source)
        node.resize_outputs(1)
        node.op_type, node.domain = "Identity", ""
        node.attributes.clear()

    def compute(self, node: ir.Node, array: npt.NDArray[Any]) -> None:
        """Put a constant in the place of the node that computes it, if it is still there."""
        output = node.outputs[0]
        if node.graph is None or not output.uses() or output.is_graph_output():
            return
        value = self.initializer(output.name or node.op_type, ir.Tensor(array))
        ir.convenience.replace_all_uses_with(output, value)

    def sweep(self) -> None:
        """Drop what nobody reads any more, weights and the nodes that computed them; what nobody read before stays."""
        for graph in inner_first(self.model.graph):
            for node in reversed(graph):
                if node not in self.idle_nodes and not is_read(node):
                    graph.remove(node, safe=True)
        required = (self.model.ir_version or 8) < 4  # initializers are inputs because they must be, not for callers
        for graph in all_graphs(self.model.graph):
            for name, value in list(graph.initializers.items()):
                if value.uses() or value.is_graph_output() or value in self.idle_weights:
                    continue
                if value.is_graph_input():
                    if not required:
                        continue
                    graph.inputs.remove(value)
                del graph.initializers[name]

    def _keep_names(self) -> None:
        """What was rewritten for all of its users keeps its name; who reads only its shape reads the new one's."""
        claimed: set[str] = set()
        for old, new in self.made:
            graph, interface = old.graph, old.is_graph_input() or old.is_graph_output()
            if graph is not None and old.producer() is None and not interface and old.shape == new.shape:
                uses = old.uses()
                if all(user.op_type in SHAPES or (user.op_type == "CastLike" and i == 1) for user, i in uses):
                    ir.convenience.replace_all_uses_with(old, new)
                    del graph.initializers[old.name]  # type: ignore[arg-type]
            maker = old.producer()
            gone = not old.is_initializer() if maker is None else maker.graph is None
            self.bytes_added += _nbytes(new)
            if gone and old.name and old.name not in claimed:
                claimed.add(old.name)
                self.bytes_added -= _nbytes(new)  # it took the old one's place
                new.name = old.name
                if maker is not None and (copy := new.producer()) is not None:
                    copy.name = maker.name


def _nbytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else nbytes(value.const_value)
