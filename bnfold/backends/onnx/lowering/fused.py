"""Operators of com.microsoft that ONNX Runtime writes where it optimises: one of the standard's linear operators, and what it fused in."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from bnfold.algebra.graph import Value
from bnfold.algebra.lowering import NO_RULE

from ..graph.walk import MICROSOFT, arg, attribute
from .absorbing import conv, gemm, matmul
from .lowering import Lower, OnnxLowering, OnnxNative, given
from .settings import fused

STRETCHING = ("Relu", "LeakyRelu")


def activated(lower: Lower) -> Lower:
    """The linear operator, what is added to it, and the activation behind: each a node of its own to the rules, none of them to double."""

    def run(ctx: OnnxLowering, node: ir.Node) -> None:
        made = ctx.value(node.outputs[0])
        inner = Value(f"{made.name}:linear", made.probes, made.rank)
        with ctx.standing_in(node.outputs[0], inner):
            lower(ctx, node)
        linear = ctx.nodes[-1]
        linear.attrs["cloneable"] = False
        linear.attrs.pop("window", None)  # it doesn't merge with a branch beside it
        made.rank = inner.rank
        attrs = {"limit": linear.attrs["limit"], "cloneable": False}
        if node.op_type == "FusedConv" and given(node, 3) is not None:
            added = Value(f"{made.name}:sum", made.probes, made.rank)
            stated = {**attrs, "settings": partial(fused, node, "Add")}
            both = OnnxNative(node, positions=[0, 3])
            ctx.add("Add", node, [inner, ctx.value(arg(node, 3))], [added], stated, {}, both).label = "Add"
            inner = added
        kind, why = _activation(node)
        label = _name(node) or node.op_type
        attrs |= {"why": why, "settings": partial(fused, node, label)}
        ctx.add(kind, node, [inner], [made], attrs, {}, OnnxNative(node)).label = label

    return run


def _name(node: ir.Node) -> str:
    return str(attribute(node, "activation", "") or "")


def _activation(node: ir.Node) -> tuple[str, str]:
    """The row of the rules that an activation belongs to, and why no map crosses it where there is none."""
    name = _name(node)
    if not name:
        return "Identity", ""
    bounds = attribute(node, "activation_params", None)
    if name in STRETCHING or (name == "Clip" and bounds is not None and bounds[0] == 0 and bounds[1] >= 3.4e38):  # type: ignore[index]
        return "Relu", ""
    return "Barrier", "it clips at a bound other than zero" if name == "Clip" else NO_RULE


FUSED: dict[str, Lower] = {
    f"{MICROSOFT}::FusedConv": activated(conv),
    f"{MICROSOFT}::FusedGemm": activated(gemm),
    f"{MICROSOFT}::FusedMatMul": matmul,
}
