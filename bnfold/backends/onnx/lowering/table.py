"""The table of this front-end: each ONNX operator in the terms of the rules.

Every function lowers one node, or raises `Blocked` with the clause that says why no map may cross it. What isn't in the
table is a barrier. Specification: https://onnx.ai/onnx/operators, all opsets from 6. The operators of com.microsoft are those that ONNX
Runtime writes where it optimises: one of the standard's linear operators, and what it fused in.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx_ir as ir

from bnfold.algebra import weights
from bnfold.algebra.graph import Graph, Value
from bnfold.algebra.lowering import NO_RULE

from ..graph.walk import MICROSOFT, arg, attribute
from . import absorbing, commuting
from .commuting import elementwise, reduced, several, windowed
from .lowering import Lower, OnnxLowering, OnnxNative, by_first, given
from .movement import MOVES, from_sequence, sequence
from .settings import fused, settings

OPERATORS: dict[str, Lower] = {
    # the sites
    "BatchNormalization": absorbing.batchnorm,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), absorbing.arithmetic),
    "Neg": by_first(weights.negation),
    # maps end here
    **dict.fromkeys(("Conv", "ConvTranspose", "DeformConv"), absorbing.conv),
    "Gemm": absorbing.gemm,
    "MatMul": absorbing.matmul,
    "Einsum": absorbing.einsum,
    "Gather": absorbing.gather,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), absorbing.recurrent),
    **dict.fromkeys(("InstanceNormalization", "LayerNormalization", "GroupNormalization"), absorbing.normalisation),
    # several activations
    "Sum": several("Add"),
    "Mean": several("Mean"),
    **dict.fromkeys(("Max", "Min"), commuting.maximum),
    "Where": commuting.where,
    # any map crosses
    "Identity": commuting.identity,
    "Dropout": commuting.dropout,
    **dict.fromkeys(("Cast", "CastLike"), commuting.cast),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool"), windowed("Average")),
    "ReduceMean": reduced("Average"),
    "ReduceSum": reduced("Sum"),
    **dict.fromkeys(("Resize", "Upsample"), commuting.resize),
    "GridSample": commuting.sample,
    # maps that keep the order
    **dict.fromkeys(("MaxPool", "GlobalMaxPool"), windowed("Max")),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), reduced("Max")),
    # scalings
    **dict.fromkeys(("ScatterElements", "ScatterND"), commuting.scatter),
    # stretchings
    "Relu": commuting.relu,
    **dict.fromkeys(("LeakyRelu", "Abs"), elementwise("Relu")),
    "PRelu": commuting.prelu,
    "Clip": commuting.clip,
    **dict.fromkeys(("LpPool", "GlobalLpPool"), windowed("Relu")),
    **dict.fromkeys(("ReduceL1", "ReduceL2"), reduced("Relu")),
    # the rest
    "Pad": commuting.pad,
    **dict.fromkeys(("SplitToSequence", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase"), sequence),
    **dict.fromkeys(("SequenceAt", "ConcatFromSequence"), from_sequence),
    **MOVES,
}


# --- what ONNX Runtime fuses ------------------------------------------------------------------------------------------------------------

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
    bounds: Any = attribute(node, "activation_params", None)
    if name in STRETCHING or (name == "Clip" and bounds is not None and bounds[0] == 0 and bounds[1] >= 3.4e38):
        return "Relu", ""
    return "Barrier", "it clips at a bound other than zero" if name == "Clip" else NO_RULE


FUSED: dict[str, Lower] = {
    f"{MICROSOFT}::FusedConv": activated(absorbing.conv),
    f"{MICROSOFT}::FusedGemm": activated(absorbing.gemm),
    f"{MICROSOFT}::FusedMatMul": absorbing.matmul,
}


def lowering(model: ir.Model) -> OnnxLowering:
    """The lowering of a model. Functions are a barrier; `write.inlined` puts their bodies in the calls' places first."""
    return OnnxLowering(model, {**OPERATORS, **FUSED}, settings)


def lower(model: ir.Model) -> Graph:
    """The neutral graph of a model, its operators in topological order, those of subgraphs before the node that holds them."""
    return lowering(model).graph()
