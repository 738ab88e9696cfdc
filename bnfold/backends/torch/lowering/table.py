"""The table of this front-end: each ATen operator in the terms of the rules.

Every function lowers one operator, or raises `Blocked` with the clause that says why no map may cross it. What isn't in the table is a
barrier. It holds the operators that torch.export gives as well as the core ones into which they decompose; writing in place makes no
difference (`relu_` is `relu`). Reference: https://docs.pytorch.org/docs/stable/torch.compiler_ir.html
"""

from __future__ import annotations

from bnfold.algebra import weights
from bnfold.algebra.graph import Graph

from ..export.trace import Traced
from ..export.walk import BATCHNORMS
from . import absorbing, commuting
from .chains import frozen
from .commuting import elementwise, reduced, windowed
from .lowering import Lower, TorchLowering, by_first
from .movement import MOVES
from .settings import settings

DIMS = ("1d", "2d", "3d")
INTERPOLATIONS = (
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa"),
    *("_upsample_bicubic2d_aa", *(f"upsample_nearest{d}" for d in DIMS), *(f"_upsample_nearest_exact{d}" for d in DIMS)),
)

OPERATORS: dict[str, Lower] = {
    # the sites
    **dict.fromkeys(BATCHNORMS, absorbing.batchnorm),
    **dict.fromkeys(("add", "sub", "mul", "div"), absorbing.arithmetic),
    "rsub": absorbing.reversed_sub,
    "neg": by_first(weights.negation),
    # maps end here
    **{f"conv{under}{d}": absorbing.conv for d in DIMS for under in ("", "_transpose")},
    **dict.fromkeys(("convolution", "_convolution"), absorbing.conv),
    "torchvision::deform_conv2d": absorbing.deform_conv,
    "linear": absorbing.linear,
    "addmm": absorbing.addmm,
    **dict.fromkeys(("matmul", "mm", "bmm"), absorbing.matmul),
    "einsum": absorbing.einsum,
    "embedding": absorbing.embedding,
    **dict.fromkeys(("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "instance_norm"), absorbing.normalisation),
    "rms_norm": absorbing.rms_norm,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), absorbing.recurrent),
    # any map crosses
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "lift_fresh_copy", "positive"), elementwise("Identity")),
    **dict.fromkeys(("to", "_to_copy", "type_as"), commuting.cast),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"), commuting.dropout),
    **{f"avg_pool{d}": windowed("Average") for d in DIMS},
    **{f"{under}adaptive_avg_pool{d}": windowed("Average") for d in DIMS for under in ("", "_")},
    "mean": reduced("Average"),
    "sum": reduced("Sum"),
    **dict.fromkeys(INTERPOLATIONS, commuting.resize),
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "_grid_sampler_2d_cpu_fallback"), commuting.sample),
    # maps that keep the order
    **{f"max_pool{d}": windowed("Max") for d in DIMS},
    **{f"max_pool{d}_with_indices": windowed("Max") for d in DIMS},
    **{f"adaptive_max_pool{d}": windowed("Max") for d in DIMS},
    **dict.fromkeys(("amax", "amin", "max", "min"), reduced("Max")),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), commuting.maximum),
    # scalings
    **dict.fromkeys(("scatter_add", "index_add", "scatter_reduce"), commuting.scatter),
    # stretchings
    "relu": commuting.relu,
    **dict.fromkeys(("leaky_relu", "abs"), elementwise("Relu")),
    **dict.fromkeys(("prelu", "_prelu_kernel"), commuting.prelu),
    "rrelu": commuting.rrelu,
    **dict.fromkeys(("clamp", "clamp_min", "hardtanh"), commuting.clamp),
    "threshold": commuting.threshold,
    **dict.fromkeys(("linalg_vector_norm", "norm"), commuting.norm),
    # the rest
    **dict.fromkeys(("pad", "constant_pad_nd"), commuting.pad),
    "where": commuting.where,
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
