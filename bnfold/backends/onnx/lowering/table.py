"""The table of this front-end: each ONNX operator in the terms of the rules.

Every function lowers one node, or raises `Blocked` with the clause that says why no map may cross it. What isn't in the
table is a barrier. Specification: https://onnx.ai/onnx/operators, all opsets from 6.
"""

from __future__ import annotations

import onnx_ir as ir

from bnfold.algebra.graph import Graph

from ..graph.walk import MICROSOFT
from .absorbing import conv, einsum, gather, gemm, matmul, normalisation, recurrent
from .affine import arithmetic, batchnorm, negation
from .commuting import cast, clip, dropout, elementwise, identity, maximum, pad, prelu, reduced, resize, several, where, windowed
from .fused import FUSED
from .lowering import Lower, OnnxLowering
from .movement import MOVES, sequence, taken
from .settings import settings

OPERATORS: dict[str, Lower] = {
    "BatchNormalization": batchnorm,
    "Conv": conv,
    "ConvTranspose": conv,
    "DeformConv": conv,
    "Gemm": gemm,
    "MatMul": matmul,
    "Einsum": einsum,
    "Gather": gather,
    "LSTM": recurrent,
    "GRU": recurrent,
    "RNN": recurrent,
    "InstanceNormalization": normalisation,
    "LayerNormalization": normalisation,
    "GroupNormalization": normalisation,
    "Add": arithmetic,
    "Sub": arithmetic,
    "Mul": arithmetic,
    "Div": arithmetic,
    "Neg": negation,
    "Sum": several("Add"),
    "Mean": several("Mean"),
    "Max": maximum,
    "Min": several("Maximum"),
    "Where": where,
    "Identity": identity,
    "Dropout": dropout,
    "Cast": cast,
    "CastLike": cast,
    "Relu": elementwise("Relu"),
    "LeakyRelu": elementwise("Relu"),
    "PRelu": prelu,
    "Abs": elementwise("Relu"),
    "Clip": clip,
    "MaxPool": windowed("Max"),
    "GlobalMaxPool": windowed("Max"),
    "AveragePool": windowed("Average"),
    "GlobalAveragePool": windowed("Average"),
    "LpPool": windowed("Relu"),
    "GlobalLpPool": windowed("Relu"),
    "ReduceMean": reduced("Average"),
    "ReduceSum": reduced("Sum"),
    "ReduceMax": reduced("Max"),
    "ReduceMin": reduced("Max"),
    "ReduceL1": reduced("Relu"),
    "ReduceL2": reduced("Relu"),
    "Resize": resize,
    "Upsample": resize,
    "Pad": pad,
    "SplitToSequence": sequence,
    "SequenceConstruct": sequence,
    "SequenceEmpty": sequence,
    "SequenceInsert": sequence,
    "SequenceErase": sequence,
    "SequenceAt": taken,
    "ConcatFromSequence": taken,
    **MOVES,
}


def lowering(model: ir.Model) -> OnnxLowering:
    """The lowering of a model. Functions are a barrier; `write.inlined` puts their bodies in the calls' places first."""
    return OnnxLowering(model, {**OPERATORS, **{f"{MICROSOFT}::{name}": lower for name, lower in FUSED.items()}}, settings)


def lower(model: ir.Model) -> Graph:
    """The neutral graph of a model, its operators in topological order, those of subgraphs before the node that holds them."""
    return lowering(model).graph()
