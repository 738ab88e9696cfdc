"""The ranks that operators tell of their inputs, where the file states none.

ONNX's shape inference only goes forwards, from inputs whose rank is stated. But a convolution whose weight has five axes takes five, and
what an operator before it gives, that one takes too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx

from .walk import MICROSOFT, is_standard

# Operators that give as many axes as they take.
ALIKE = {
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Bernoulli", "Cast", "CastLike", "Ceil", "Celu", "Clip",
    "Cos", "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Hardmax", "Identity",
    "LeakyRelu", "Log", "LogSoftmax", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid",
    "Sign", "Sin", "Sinh", "Softmax", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
    "IsInf", "IsNaN", "PRelu", "QuantizeLinear", "DequantizeLinear", "Trilu", "CumSum", "ReverseSequence",
    "BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization",
    "MeanVarianceNormalization", "LpNormalization", "LRN", "Conv", "ConvTranspose", "DeformConv", "MaxPool",
    "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "Resize", "Upsample", "Pad", "Slice",
    "Split", "Transpose", "DepthToSpace", "SpaceToDepth", "Tile", "ScatterElements", "Scatter", "ScatterND", "Concat",
}  # fmt: skip
FUSED = {"FusedConv", "NhwcFusedConv", "FusedGemm", "FastGelu", "QuickGelu", "BiasGelu"}  # ONNX Runtime's own
ALIKE |= FUSED - {"FusedGemm"}
BROADCAST = {"Add", "Sub", "Mul", "Div", "Pow", "Sum", "Mean", "Max", "Min", "Where", "PRelu"}
GROWS = {"Squeeze": 1, "Unsqueeze": -1}  # how many axes of the input each axis that is named stands for
FIXED = {"DepthToSpace": 4, "SpaceToDepth": 4, "Gemm": 2, "FusedGemm": 2, "LSTM": 3, "GRU": 3, "RNN": 3}

Ranks = dict[str, int]
Settings = dict[str, onnx.AttributeProto]


def _known(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The operators that are what their names say here."""
    return (node for node in graph.node if is_standard(node) or (node.domain == MICROSOFT and node.op_type in FUSED))


def channels(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> Ranks:
    """How many channels values have, along axis 1, by the weights of the operators around them. shapes: of the weights."""
    found: Ranks = {}
    for node in _known(graph):
        weight = shapes.get(node.input[1], ()) if len(node.input) > 1 else ()
        if node.op_type in ("BatchNormalization", "InstanceNormalization") and len(weight) == 1:
            found |= dict.fromkeys((node.input[0], node.output[0]), weight[0])
        elif node.op_type == "Conv" and len(weight) > 2:
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            found |= {node.input[0]: weight[1] * groups, node.output[0]: weight[0]}
    return found


def told(graph: onnx.GraphProto, known: Ranks) -> Ranks:
    """Ranks that the operators tell beside the known ones."""
    lengths = {t.name: t.dims[0] for t in graph.initializer if len(t.dims) == 1}
    lengths |= {
        node.output[0]: a.t.dims[0] for node in graph.node if node.op_type == "Constant" for a in node.attribute if len(a.t.dims) == 1
    }
    nodes = [(node, {a.name: a for a in node.attribute}) for node in _known(graph) if node.input and node.output]
    found: Ranks = {}
    ranks = dict(known)
    while True:
        news = 0
        for node, settings in (*reversed(nodes), *nodes):
            for name, rank in _of(node, settings, ranks, lengths):
                if name and rank >= 0 and name not in ranks:
                    ranks[name] = found[name] = rank
                    news += 1
        if not news:
            return found


def write_ranks(graph: onnx.GraphProto, ranks: Mapping[str, int]) -> None:
    """State these ranks, and no size but that of the channels where a weight tells it."""
    infos = {info.name: info for info in (*graph.input, *graph.output, *graph.value_info)}
    weights = {t.name: list(t.dims) for t in graph.initializer}
    weights |= {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in graph.input}
    wide = channels(graph, weights)
    for name, rank in ranks.items():
        info = infos[name] if name in infos else graph.value_info.add(name=name)
        shape = info.type.tensor_type.shape
        shape.SetInParent()
        for axis in range(rank):
            shape.dim.add(**({"dim_value": wide[name]} if axis == 1 and wide.get(name) else {}))


def _of(node: onnx.NodeProto, settings: Settings, ranks: Ranks, lengths: Ranks) -> Iterator[tuple[str, int]]:
    op, x, y = node.op_type, node.input[0], node.output[0]
    if op in FIXED:
        yield x, FIXED[op]
    if op in ALIKE:
        around = [*(node.input if op == "Concat" else [x]), *(node.output if op == "Split" else [y])]
        rank = next((ranks[name] for name in around if name in ranks), _own(node, settings, ranks, lengths))
        if rank is not None:
            yield from ((name, rank) for name in around)
    known = ranks.get(y)
    if known is None:
        return
    if op in BROADCAST:
        others = [name for name in node.input if name not in ranks]
        if len(others) == 1 and all(ranks[name] < known for name in node.input if name in ranks):
            yield others[0], known
    elif op in GROWS:
        if (count := _axes(node, settings, lengths)) is not None:
            yield x, known + GROWS[op] * count
    elif op.startswith("Reduce") or op in ("ArgMax", "ArgMin"):
        count = 1 if op.startswith("Arg") else _axes(node, settings, lengths)
        if "keepdims" not in settings or settings["keepdims"].i:
            yield x, known
        elif count is not None:
            yield x, known + count
    elif op == "Gather" and node.input[1] in ranks:
        yield x, known + 1 - ranks[node.input[1]]
    elif op == "MatMul" and known >= 2:
        for one, other in ((x, node.input[1]), (node.input[1], x)):
            if other in ranks and (2 <= ranks[other] < known or ranks[other] == known == 2):
                yield one, known


def _own(node: onnx.NodeProto, settings: Settings, ranks: Ranks, lengths: Ranks) -> int | None:
    """The rank that an operator's settings and weights tell."""
    op, inputs = node.op_type, list(node.input)
    if op in ("Conv", "ConvTranspose", "DeformConv", "FusedConv", "NhwcFusedConv"):
        return ranks.get(inputs[1])
    for name, extra in (("kernel_shape", 2), ("perm", 0)):
        if name in settings:
            return len(settings[name].ints) + extra
    if "axes" in settings or (op == "Pad" and len(inputs) > 3):
        return None  # they name some axes alone
    if op == "Pad":
        length = len(settings["pads"].ints) if "pads" in settings else lengths.get(inputs[1], 0)
        return length // 2 or None
    if op == "Upsample" and "scales" in settings:
        return len(settings["scales"].floats)
    if op in ("Resize", "Upsample", "Tile"):
        first = 2 if op == "Resize" and len(inputs) > 2 else 1  # the region of interest comes before
        return next((n for name in inputs[first:] if (n := lengths.get(name))), None)
    return None


def _axes(node: onnx.NodeProto, settings: Settings, lengths: Ranks) -> int | None:
    """How many axes an operator names."""
    if "axes" in settings:
        return len(settings["axes"].ints)
    return lengths.get(node.input[1]) if len(node.input) > 1 else None
