"""The table of this front-end: each ONNX operator in the terms of the rules.

Every function lowers one node, or raises `Blocked` with the clause that says why no map may cross it. What isn't in the
table is a barrier. Specification: https://onnx.ai/onnx/operators, all opsets from 6.
"""

from __future__ import annotations

import onnx_ir as ir

from bnfold.algebra import weights
from bnfold.algebra.graph import Graph

from . import absorbing, affine, commuting
from .absorbing import FUSED
from .commuting import elementwise, reduced, several, windowed
from .lowering import Lower, OnnxLowering, by_first
from .movement import MOVES, sequence, taken
from .settings import settings

OPERATORS: dict[str, Lower] = {
    # the sites
    "BatchNormalization": affine.batchnorm,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), affine.arithmetic),
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
    # maps that keep the order
    **dict.fromkeys(("MaxPool", "GlobalMaxPool"), windowed("Max")),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), reduced("Max")),
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
    **dict.fromkeys(("SequenceAt", "ConcatFromSequence"), taken),
    **MOVES,
}


def lowering(model: ir.Model) -> OnnxLowering:
    """The lowering of a model. Functions are a barrier; `write.inlined` puts their bodies in the calls' places first."""
    return OnnxLowering(model, {**OPERATORS, **FUSED}, settings)


def lower(model: ir.Model) -> Graph:
    """The neutral graph of a model, its operators in topological order, those of subgraphs before the node that holds them."""
    return lowering(model).graph()
