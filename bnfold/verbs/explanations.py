"""What the rules say in words: which maps may cross an operator, why a BatchNorm stays, and what would let it go."""

from __future__ import annotations

import re
import time
from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Any

from bnfold.algebra.rules import RULES
from bnfold.backends.open import open_model
from bnfold.certificates import certificate
from bnfold.errors import UsageError
from bnfold.folding.options import FoldOptions
from bnfold.model import Model
from bnfold.report import ExplainReport, FuseReport
from bnfold.report.words import CLIPS
from bnfold.text import counted, listed, meant, some

ANY, ORDERED, SCALES = "any map crosses", "maps cross whose scales aren't negative", "pure scalings cross, whose scales aren't negative"
# Of each rule: which maps cross, the equation of which it is the proof, and operators that it is for.
WORDS: dict[str, tuple[str, str, str]] = {
    "Identity": (ANY, "a(x) = a(x)", "Identity Dropout Cast contiguous clone dropout"),
    "Average": (ANY, "mean(s*x + t) = s*mean(x) + t", "GlobalAveragePool AveragePool ReduceMean adaptive_avg_pool2d avg_pool2d mean"),
    "Resize": (ANY, "weights that sum to 1 are a mean", "Resize Upsample GridSample interpolate grid_sampler upsample_nearest2d"),
    "Crop": (ANY, "a slice by computed bounds", "Slice CenterCropPad"),
    "Lookup": (f"{ANY} that doesn't vary along the axis", "a(x[i]) = a(x)[i]", "Gather GatherElements index_select gather"),
    "Move": (
        f"{ANY}; its coefficients move as the data do",
        "out[i] = in[source(i)]",
        "Reshape Flatten Transpose Concat Split Slice view cat",
    ),
    "Max": (ORDERED, "max(s*x + t) = s*max(x) + t if s >= 0", "MaxPool GlobalMaxPool ReduceMax max_pool2d amax"),
    "Scatter": ("pure scalings cross", "f(s*x) = s*f(x)", "ScatterElements ScatterND scatter_add index_add"),
    "Relu": (SCALES, "relu(s*x) = s*relu(x) if s >= 0", "Relu LeakyRelu PRelu Abs relu leaky_relu prelu"),
    "Clamp": (
        f"with --clamps {ANY}; without, none",
        "a(clamp(x; l, h)) = clamp(a(x); a(l), a(h)), the bounds swapped if s < 0",
        "Clip relu6 hardtanh clamp",
    ),
    "Pad": ("maps cross that keep what it fills with", "a(pad(x, v)) = pad(a(x), a(v)), so t = 0 for zeros", "Pad constant_pad_nd pad"),
    "Sum": (ANY, "s*sum(x) + t = sum(s*x + t/n)", "ReduceSum sum"),
    "Add": ("any map, with its shift into one branch; downwards shifts alone", "s*(x + y) + t = (s*x + t) + s*y", "Add Sub add sub"),
    "Mul": ("pure scalings, into one factor", "s*(x*y) = (s*x)*y", "Mul mul"),
    "MatMul": ("pure scalings, into one factor", "s*(x@y) = (s*x)@y", "MatMul matmul bmm"),
    "Mean": (f"{ANY}, the same for all branches", "mean(a(x), a(y)) = a(mean(x, y))", "Mean"),
    "Where": (f"{ANY}, the same for both branches", "c ? a(x) : a(y) = a(c ? x : y)", "Where where"),
    "Maximum": (f"{ORDERED}, the same for both branches", "max(a(x), a(y)) = a(max(x, y))", "Max Min maximum minimum"),
    "Conv": (
        "a map ends here; upwards any, downwards with a shift only if every output sees every tap",
        "W*(s*x)",
        "Conv ConvTranspose conv2d",
    ),
    "Contraction": ("a map ends here", "(s*W)x + (s*b + t)", "Gemm MatMul Einsum linear addmm"),
    "Affine": ("a map ends here", "s*(s'*x + t') + t", "BatchNormalization Mul Add batch_norm"),
    "Normalisation": (
        "a map ends here, upwards",
        "s*(gamma*n(x) + beta) + t",
        "LayerNormalization InstanceNormalization GroupNormalization layer_norm",
    ),
    "Table": ("a map ends here, upwards", "s*W[i] + t = (s*W + t)[i]", "Gather embedding"),
    "Constant": ("a map ends here, upwards", "a(c) is a constant", "Constant"),
    "Recurrent": ("a map ends here, downwards, in its input weights", "W(s*x + t) = (W*s)x + W*t", "LSTM GRU RNN lstm gru"),
}
# The other operators of a rule, which aren't shown.
MORE = {
    "Identity": "CastLike alias detach lift_fresh_copy positive to to_copy type_as feature_dropout alpha_dropout feature_alpha_dropout "
    "native_dropout",
    "Resize": "upsample_linear upsample_bilinear upsample_trilinear upsample_bicubic upsample_bilinear_aa upsample_bicubic_aa "
    "upsample_nearest_exact grid_sampler_cpu_fallback",
    "Crop": "ReverseSequence",
    "Move": "Squeeze Unsqueeze GatherND Compress Expand Tile DepthToSpace SpaceToDepth SplitToSequence SequenceConstruct SequenceEmpty "
    "SequenceInsert SequenceErase SequenceAt ConcatFromSequence unsafe_view unflatten view_as reshape_as reshape_alias view_copy permute t "
    "numpy_T mT swapaxes swapdims movedim moveaxis permute_copy concatenate stack narrow select split_with_sizes chunk tensor_split unbind "
    "unsafe_split unsafe_chunk hsplit vsplit dsplit unsafe_split_with_sizes expand_as broadcast_to repeat repeat_interleave index "
    "take_along_dim flip roll pixel_shuffle pixel_unshuffle unfold im2col channel_shuffle native_channel_shuffle reflection_pad "
    "replication_pad",
    "Max": "ReduceMin max_pool_with_indices adaptive_max_pool amin",
    "Scatter": "scatter_reduce",
    "Relu": "LpPool GlobalLpPool ReduceL1 ReduceL2 prelu_kernel rrelu clamp_min threshold linalg_vector_norm norm",
    "Maximum": "fmax fmin",
    "Conv": "DeformConv convolution deform_conv",
    "Contraction": "mm",
    "Affine": "Div Neg rsub batch_norm_impl_index native_batch_norm_legit_no_training miopen_batch_norm native_batch_norm_legit "
    "batch_norm_no_update native_batch_norm_legit_functional batch_norm_with_update_functional native_batch_norm batch_norm_with_update "
    "cudnn_batch_norm",
    "Normalisation": "native_layer_norm group_norm native_group_norm instance_norm rms_norm",
    "Recurrent": "rnn_tanh rnn_relu",
}
# What would let a BatchNorm go, by what its reason says; all that fit are told.
ADVICE = (
    (r"training mode", "export the model in evaluation mode (model.eval()), or give it statistics by `bnfold recalibrate --freeze`"),
    (r"no running statistics|track_running_stats", "give it statistics by `bnfold recalibrate --freeze`"),
    (r"is an output of the model", "a value that callers see mustn't change; take that output away where nobody needs it"),
    (
        r"scales (is|are) negative",
        "the gammas that are negative can't cross a maximum or a Relu; retrain with gamma >= 0, or move the BatchNorm",
    ),
    (
        r"pads with zeros|same taps",
        "what pads with zeros must not see a shift: pad with edges or mirrored, or pad in front of the BatchNorm",
    ),
    (
        r"no rule lets a map cross|blocks, its shift is not zero",
        "a non-linearity stands between it and the weights; in a block as conv, BatchNorm, activation it would fold",
    ),
    (r"is quantised|QuantizeLinear|QLinear", "fold before quantising"),
    (r"is (nan|inf)|no number", "its statistics or weights are damaged: `bnfold recalibrate` measures them afresh"),
    (r"isn't known|isn't certain|dynamic", "state the shape of the input (--input-shape, or fixed axes in the export)"),
)

# What a certificate lists by name.
CERTIFIED = {
    "folded": "it was folded",
    "lowered": "it was written as other operators",
    "constants": "it was a constant operator, and was folded",
    "merged": "it was merged from parallel branches",
    "composed": "it was made of linear layers in a row",
    "dropped": "it lost channels that held one number whatever went in",
    "clamped": "it clips with bounds for each channel, since a map passed it",
    "equalised": "its channel ranges were made to match those of the layers that read it",
}


def explain(what: str, model: Any = None, *, example: Any = None, **options: Any) -> ExplainReport:
    """What can cross an operator (the name of a rule, or of an operator of ONNX's or PyTorch's; "" for all rules), or, of a model, what
    becomes of a layer: why a BatchNorm stays and which options of a fold would let it go, and what leaves, is clamped or equalised.

    example, options: as for `fuse`. Raises UsageError where there is nothing of that name.
    """
    start = time.perf_counter()
    if model is None:
        found, names = list(_rules(what)), [*RULES, *(name for rule in WORDS for name in _operators(rule))]
        if not found:
            raise UsageError(f"no rule and no operator is called {what!r}: nothing crosses what isn't in the table{meant(what, names)}")
        return ExplainReport(what=what or "the rules, by operators", text=tuple(found), seconds=time.perf_counter() - start)
    opened = open_model(model, example)
    return ExplainReport(what=what, text=tuple(_layer(what, opened, FoldOptions(**options))), seconds=time.perf_counter() - start)


def _rules(what: str) -> Iterator[str]:
    for name, (crosses, equation, operators) in WORDS.items():
        if not what or _plain(what) in map(_plain, (name, *_operators(name))):
            yield f"{name}: {crosses}; {equation}"
            yield f"  such as {', '.join(operators.split())}"


def _operators(rule: str) -> list[str]:
    """Of a rule, those that are shown first."""
    return f"{WORDS[rule][2]} {MORE.get(rule, '')}".split()


def _plain(name: str) -> str:
    """`nn.MaxPool2d`, `max_pool2d` and `MaxPool` alike."""
    return re.sub(r"_|[123]d(?=_|$)", "", re.split(r"[.:]", name.lower())[-1])


def _layer(name: str, model: Model, options: FoldOptions) -> Iterator[str]:
    """What becomes of a BatchNorm, or of another layer that a fold changes."""
    report = model.folded(options)[1]
    layer = next((layer for layer in report.layers if layer.name == name), None)
    if layer is None:
        held = [layer.name for layer in report.layers if name in layer.into]
        found = [*([f"it takes up {listed(held)}"] if held else []), *_changes(report, {name})] or [*_certified(name, model)]
        if not found:
            names = [layer.name for layer in report.layers]
            raise UsageError(
                f"no BatchNorm is called {name!r}, nor anything that takes one up; there are {some(names)}{meant(name, names)}"
            )
        yield from found
        return
    if layer.verdict == "folded":
        yield f"it folds into {listed(layer.into) or 'nothing: it changes nothing'}"
    else:
        yield f"it is lowered, and stays otherwise: {layer.reason}" if layer.verdict == "lowered" else f"it stays: {layer.reason}"
        for option, other in _more(options, "clone", "clamps"):
            tried = next((each for each in model.folded(other)[1].layers if each.name == name), None)
            if tried is not None and tried.verdict == "folded":
                yield f"what would let it go: {option}, with which it folds into {listed(tried.into) or 'nothing'}"
        yield from (f"what would let it go: {advice}" for pattern, advice in ADVICE if re.search(pattern, layer.reason))
    yield from layer.notes
    here = {name, *layer.into}
    yield from _changes(report, here)
    if any("gamma is 0" in note for note in layer.notes):
        for option, other in _more(options, "drop_dead"):
            yield from (f"with {option}: {text}" for text in _changes(model.folded(other)[1], here))


def _more(options: FoldOptions, *names: str) -> Iterator[tuple[str, FoldOptions]]:
    """The options with one of these more, which isn't asked for; its name on the command line."""
    for name in names:
        if not getattr(options, name):
            more: Any = {name: True}
            yield f"--{name.replace('_', '-')}", replace(options, **more)


def _changes(report: FuseReport, names: Container[str]) -> Iterator[str]:
    """What leaves layers of these names, and why some of it stays; what is clamped, joined, or made to match in its ranges."""
    for d in (each for each in report.dropped if each.name in names):
        holds = f"{counted(d.dead, 'channel')} of the {d.channels} of {d.name} hold{'s' if d.dead == 1 else ''} one number whatever goes in"
        what = f"{d.dropped or 'none'} of these can be taken out" if d.dead > 1 else f"it {'can' if d.dropped else 'can not'} be taken out"
        yield f"{holds}; {what}" + (f": {d.reason}" if d.reason else "")
    yield from (f"{each} {CLIPS}" for each in report.clamped if each in names)
    for c in report.composed:
        if any(each in names for each in (*c.layers, c.into)):
            made = f"stands behind the average {c.behind}" if c.behind else f"become one, {c.into}"
            yield f"{listed(c.layers)} {f'stay as they are: {c.reason}' if c.reason else made}"
    for e in report.equalised:
        if any(each in names for each in (*e.layers, *e.into)):
            made = f"match, by factors up to {e.factor:.3g}, those of {listed(e.into)}"
            yield f"the channel ranges of {listed(e.layers)} {f'stay: {e.reason}' if e.reason else made}"


def _certified(name: str, model: Model) -> Iterator[str]:
    """What the certificate of a folded model states of a layer."""
    stated = certificate(model.source) or {}
    for key in CERTIFIED:
        if isinstance(names := stated.get(key), (list, dict)) and name in names:
            yield f"{CERTIFIED[key]}, as the model's certificate states"
