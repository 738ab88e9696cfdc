"""Operators with constants, in the place of another one (see `folding.lower`), and operators that are set otherwise: that have lost
channels, or hold others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Window
from bnfold.folding.linear import Chains
from bnfold.folding.lower import Written
from bnfold.folding.plan import Planned

from .graph.constants import Constants
from .graph.walk import name_of
from .lowering.lowering import OnnxNative

ALIGNS = 7  # from this opset on, a constant aligns with the last axes by itself

Named = Callable[[str, str], tuple[str, str]]


def put(
    written: Written,
    opset: int,
    initializer: Callable[[str, Array], ir.Value],
    named: Named,
    casts: tuple[ir.DataType | None, ir.DataType | None] | None = None,
) -> ir.Value:
    """Put the operators before the one whose place they take, and give what comes out of them.

    initializer: makes a constant of a name and exact numbers. named: makes unused names of those for a node and its output.
    casts: to what type the tensor is cast for the operators, and to what behind them; None where they take it as it is.
    """
    native: OnnxNative = written.node.native
    old = native.node
    graph, value = old.graph, old.inputs[native.positions[0]]
    assert graph is not None
    assert value is not None
    if "weight" in written.constants:
        steps = [("Conv", [initializer(f"{name_of(old)}.{role}", written.constants[role]) for role in ("weight", "bias")])]
    else:
        rank = written.node.output.rank or 0
        arrays = {kind: _stored(array, rank, opset) for kind, array in written.constants.items()}
        steps = [(kind, [initializer(f"{name_of(old)}.{kind.lower()}", array)]) for kind, array in arrays.items()]
    settings = [_settings(written, kind, opset) for kind, _ in steps]
    if casts is not None:
        steps = [("Cast", []), *steps, ("Cast", [])]
        settings = [_cast(casts[0]), *settings, _cast(casts[1])]
    for (kind, constants), attributes in zip(steps, settings, strict=True):
        name, output = named(f"{name_of(old)}.{kind.lower()}", f"{value.name}.{kind.lower()}")
        node = ir.Node("", kind, [value, *constants], attributes, num_outputs=1, name=name)
        made = node.outputs[0]
        made.name, made.type, made.shape = output, old.outputs[0].type or value.type, old.outputs[0].shape
        if casts is not None and attributes is not settings[-1]:
            made.type = None if casts[0] is None else ir.TensorType(casts[0])
        graph.insert_before(old, node)
        value = made
    return value


def _stored(array: Array, rank: int, opset: int) -> Array:
    """A constant of the tensor's rank without the ones in front, which broadcasting adds; before opset 7 without those behind too."""
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    first = next((axis for axis, n in enumerate(array.shape) if n != 1), rank)
    last = max((axis + 1 for axis, n in enumerate(array.shape) if n != 1), default=rank) if opset < ALIGNS else rank
    return array.reshape(array.shape[first:last])


def _cast(dtype: ir.DataType | None) -> list[ir.Attr]:
    return [ir.AttrInt64("to", int(dtype or ir.DataType.FLOAT))]


def _settings(written: Written, kind: str, opset: int) -> list[ir.Attr]:
    if kind == "Conv":
        weight = written.constants["weight"]
        return [ir.AttrInt64("group", len(weight)), ir.AttrInt64s("kernel_shape", [1] * (weight.ndim - 2))]
    if opset >= ALIGNS:
        return []
    axis = next((axis for axis, n in enumerate(np.shape(written.constants[kind])) if n != 1), None)
    return [ir.AttrInt64("broadcast", 1)] + ([] if axis is None else [ir.AttrInt64("axis", axis)])


def add_behind(node: ir.Node, constant: ir.Value, opset: int, named: Named) -> None:
    """An Add of a constant behind a node; a model output keeps its name."""
    old, graph = node.outputs[0], node.graph
    assert graph is not None
    output, before = old.is_graph_output(), old.name or ""
    name, free = named(f"{node.name}.bias" if node.name else "", f"{before}.product" if output else f"{before}.biased")
    settings = [] if opset >= ALIGNS else [ir.AttrInt64("broadcast", 1)]
    add = ir.Node("", "Add", [None, constant], settings, num_outputs=1, name=name or None)
    new = add.outputs[0]
    new.type, new.shape = old.type, None if old.shape is None else old.shape.copy()
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    add.replace_input_with(0, old)
    graph.insert_after(node, add)
    new.name = free
    if output:
        old.name, new.name = free, before


def multiply(value: ir.Value, factor: ir.Value, named: Named) -> ir.Value:
    """A constant that an operator makes, times another one."""
    maker = value.producer()
    assert maker is not None
    assert maker.graph is not None
    name, output = named(f"{maker.name}.scaled" if maker.name else "", f"{value.name}.scaled")
    node = ir.Node("", "Mul", [value, factor], num_outputs=1, name=name or None)
    made = node.outputs[0]
    made.name, made.type, made.shape = output, value.type, value.shape
    maker.graph.insert_after(maker, node)
    return made


def reset(chains: Chains) -> None:
    """State the sizes of what operators give that hold others behind them, and the groups and windows of convolutions that hold any; let
    those stand behind their averages that do."""
    for gone in chains.ends:
        chains.into[gone].native.node.outputs[0].shape = gone.native.node.outputs[0].shape
    for host in (host for host in chains.hosts if host.op == "Conv"):
        attributes, window = host.native.node.attributes, host.attrs.get("window")
        attributes["group"] = ir.AttrInt64("group", host.attrs["groups"])
        if isinstance(window, Window):
            attributes.pop("auto_pad", None)
            kernel, pads = host.params["weight"].shape[2:], (*window.before, *window.after)
            stated = {"kernel_shape": kernel, "strides": window.stride, "dilations": window.dilation, "pads": pads}
            attributes.update({name: ir.AttrInt64s(name, value) for name, value in stated.items()})
    for node, average in chains.behind:
        _swap(node.native.node, average.native.node, node.params["weight"].shape[1] * node.attrs["groups"])


def _swap(first: ir.Node, second: ir.Node, channels: int) -> None:
    """Let two operators stand in the other order; the values between and behind keep their names. channels: of what the first reads."""
    inner, outer, graph = first.outputs[0], second.outputs[0], first.graph
    assert graph is not None
    ir.convenience.replace_all_uses_with(outer, inner, replace_graph_outputs=True)
    second.replace_input_with(0, first.inputs[0])
    first.replace_input_with(0, outer)
    names = inner.name, outer.name
    inner.name, outer.name = names[::-1]
    inner.type, inner.shape = outer.type, outer.shape
    outer.shape = None if outer.shape is None else ir.Shape(channels if i == 1 else n for i, n in enumerate(outer.shape))
    graph.remove(first)
    graph.insert_after(second, first)


def narrow(planned: Planned, constants: Constants, initializer: Callable[[str, ir.TensorProtocol], ir.Value]) -> None:
    """State the groups of what has lost channels, and the sizes of all that has others."""
    for op, groups in ((node.native.node, node.attrs["groups"]) for node in planned.fewer.nodes if node.op == "Conv"):
        if "group" in op.attributes:
            op.attributes["group"] = ir.AttrInt64("group", groups)
    for value, (axis, size) in {**planned.fewer.sizes, **planned.chains.sizes}.items():
        if (node := value.producer) is None:
            continue
        op = node.native.node
        if op.outputs[0].shape is not None:
            op.outputs[0].shape = ir.Shape(size if i == axis else n for i, n in enumerate(op.outputs[0].shape))
        if op.op_type == "Reshape" and (stored := None if op.inputs[1] is None else constants.stored(op.inputs[1])) is not None:
            stated = stored.numpy().copy()
            if stated[axis] > 0:
                stated[axis] = size
                op.replace_input_with(1, initializer(f"{node.name}.shape", ir.Tensor(stated)))
