"""The table of this front-end: each ATen operator in the terms of the rules.

Every function lowers one operator, or raises `Blocked` with the clause that says why no map may cross it. What isn't in the table is a
barrier. It holds the operators that torch.export gives as well as the core ones into which they decompose; writing in place makes no
difference (`relu_` is `relu`). Reference: https://docs.pytorch.org/docs/stable/torch.compiler_ir.html
"""

from __future__ import annotations

from bnfold.algebra.graph import Graph

from ..export.trace import Traced
from ..export.walk import BATCHNORMS
from .absorbing import addmm, conv, deform_conv, einsum, embedding, linear, matmul, normalisation, recurrent
from .affine import arithmetic, batchnorm, negation, reversed_sub
from .chains import frozen
from .commuting import (
    cast,
    clamp,
    dropout,
    elementwise,
    maximum,
    norm,
    pad,
    prelu,
    reduced,
    resize,
    rrelu,
    threshold,
    where,
    windowed,
)
from .lowering import Lower, TorchLowering
from .movement import MOVES
from .settings import settings

DIMS = ("1d", "2d", "3d")

OPERATORS: dict[str, Lower] = {
    # the sites
    **dict.fromkeys(BATCHNORMS, batchnorm),
    "add": arithmetic,
    "sub": arithmetic,
    "mul": arithmetic,
    "div": arithmetic,
    "rsub": reversed_sub,
    "neg": negation,
    # maps end here
    **{f"conv{d}": conv for d in DIMS},
    **{f"conv_transpose{d}": conv for d in DIMS},
    "convolution": conv,
    "_convolution": conv,
    "torchvision::deform_conv2d": deform_conv,
    "linear": linear,
    "addmm": addmm,
    "matmul": matmul,
    "mm": matmul,
    "bmm": matmul,
    "einsum": einsum,
    "embedding": embedding,
    "layer_norm": normalisation,
    "native_layer_norm": normalisation,
    "group_norm": normalisation,
    "native_group_norm": normalisation,
    "instance_norm": normalisation,
    "lstm": recurrent,
    "gru": recurrent,
    "rnn_tanh": recurrent,
    "rnn_relu": recurrent,
    # any map crosses
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "lift_fresh_copy", "positive"), elementwise("Identity")),
    **dict.fromkeys(("to", "_to_copy", "type_as"), cast),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"), dropout),
    **{f"avg_pool{d}": windowed("Average") for d in DIMS},
    **{f"{under}adaptive_avg_pool{d}": windowed("Average") for d in DIMS for under in ("", "_")},
    "mean": reduced("Average"),
    "sum": reduced("Sum"),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d"), resize),
    **dict.fromkeys(("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d"), resize),
    **dict.fromkeys(("_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"), resize),
    # maps that keep the order
    **{f"max_pool{d}": windowed("Max") for d in DIMS},
    **{f"max_pool{d}_with_indices": windowed("Max") for d in DIMS},
    **{f"adaptive_max_pool{d}": windowed("Max") for d in DIMS},
    **dict.fromkeys(("amax", "amin", "max", "min"), reduced("Max")),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), maximum),
    # stretchings
    **dict.fromkeys(("relu", "leaky_relu", "abs"), elementwise("Relu")),
    **dict.fromkeys(("prelu", "_prelu_kernel"), prelu),
    "rrelu": rrelu,
    **dict.fromkeys(("clamp", "clamp_min", "hardtanh"), clamp),
    "threshold": threshold,
    **dict.fromkeys(("linalg_vector_norm", "norm"), norm),
    # the rest
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    "where": where,
    **MOVES,
}


def lowering(traced: Traced) -> TorchLowering:
    """The lowering of a model, each BatchNorm that is written out as one map."""
    found = TorchLowering(traced, OPERATORS, settings)
    frozen(found)
    return found


def lower(traced: Traced) -> Graph:
    """The neutral graph of a model, its operators in topological order."""
    return lowering(traced).graph()
