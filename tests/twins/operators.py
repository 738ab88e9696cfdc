"""The operators, each from a node to what it does in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convert import NotInTorchError, Op, Step, tensor

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def apply(op: Op, run: Callable[..., Tensor], count: int | None = None) -> Step:
    """A function of the node's first inputs."""
    names = op.inputs[: len(op.inputs) if count is None else count]
    for name in names:
        if name in op.twin.constants and op.twin.constants[name].dtype.kind == "f":
            op.twin.parameter(name)  # now, not when the network is traced

    def step(env: dict[str, Any]) -> None:
        env[op.outputs[0]] = run(*(op.twin.value(env, name) for name in names if name))

    return step


def unary(run: Callable[[Tensor], Tensor]) -> Callable[[Op], Step]:
    return lambda op: apply(op, run, 1)


def needs_weight(op: Op, index: int = 1) -> np.ndarray:
    array = op.const(index)
    if array is None:
        raise NotInTorchError("its weight is computed")
    return array


def padding(op: Op, kernel: tuple[int, ...], stride: list[int]) -> tuple[Any, list[int] | None]:
    """For a layer of torch; and what must be padded before it, where the sides differ."""
    mode = op.get("auto_pad", "NOTSET") or "NOTSET"
    if mode == "VALID":
        return 0, None
    if mode.startswith("SAME"):
        if any(s != 1 for s in stride) or (mode == "SAME_LOWER" and any(k % 2 == 0 for k in kernel)):
            raise NotInTorchError("torch has no such padding by the size of the input")
        return "same", None
    pads = list(op.get("pads", [])) or [0] * (2 * len(kernel))
    before, after = pads[: len(kernel)], pads[len(kernel) :]
    if before == after:
        return tuple(before), None
    return 0, [n for pair in reversed(list(zip(before, after, strict=True))) for n in pair]


def conv(op: Op) -> Step:
    weight = needs_weight(op)
    kernel, transposed = weight.shape[2:], op.node.op_type == "ConvTranspose"
    ones = [1] * len(kernel)
    stride, dilation, groups = list(op.get("strides", ones)), list(op.get("dilations", ones)), int(op.get("group", 1))
    if transposed and (op.get("output_shape") or (op.get("auto_pad", "NOTSET") or "NOTSET") != "NOTSET"):
        raise NotInTorchError("torch has no such output shape")
    pad, before = padding(op, kernel, stride)
    if (transposed and before is not None) or op.rank() != weight.ndim or (op.has(2) and op.const(2) is None):
        raise NotInTorchError("torch has no such padding, rank or bias")
    settings: dict[str, Any] = {"stride": stride, "padding": pad, "dilation": dilation, "groups": groups}
    into, out = (weight.shape[0], weight.shape[1] * groups) if transposed else (weight.shape[1] * groups, weight.shape[0])
    if transposed:
        settings["output_padding"] = list(op.get("output_padding", [0] * len(kernel)))

    def make() -> nn.Module:
        kind: Any = (TRANSPOSED if transposed else CONVOLUTIONS)[len(kernel)]
        layer = kind(into, out, kernel, bias=op.has(2), **settings).double()
        layer.weight = op.parameter(1)
        if op.has(2):
            layer.bias = op.parameter(2)
        return layer

    layer = op.twin.layer(op, ("conv", *op.inputs[1:3], str(settings)), make)
    return apply(op, lambda x: layer(x if before is None else F.pad(x, before)), 1)


def batchnorm(op: Op) -> Step:
    arrays = [op.const(i) for i in range(1, 5)]
    if any(a is None for a in arrays) or any(op.outputs[1:]):
        raise NotInTorchError("its parameters are computed, or it gives statistics")
    if op.get("training_mode", 0) or (op.twin.opset < 7 and not op.get("is_test", 0)):
        raise NotInTorchError("a layer in training mode is another test")
    if any(a is not None and a.ndim != 1 for a in arrays) or op.rank() not in NORMS:
        raise NotInTorchError("torch has no such parameters")

    def make() -> nn.Module:
        gamma, beta, mean, var = (tensor(a) for a in arrays if a is not None)
        layer = NORMS[op.rank()](len(gamma), eps=float(op.get("epsilon", 1e-5))).double()
        layer.weight, layer.bias = nn.Parameter(gamma), nn.Parameter(beta)
        layer.running_mean, layer.running_var = mean, var
        return layer.eval()

    layer = op.twin.layer(op, ("norm", *op.inputs[1:5], op.get("epsilon", 1e-5)), make)
    return apply(op, layer, 1)


def gemm(op: Op) -> Step:
    alpha, beta = float(op.get("alpha", 1.0)), float(op.get("beta", 1.0))
    weight, bias = op.const(1), op.const(2)
    if op.has(2) and bias is None:
        raise NotInTorchError("its bias is computed")
    rows = None if weight is None else weight.shape[not op.get("transB", 0)]
    vector = bias is None or bias.shape == (rows,)
    if weight is not None and alpha == beta == 1 and not op.get("transA", 0) and vector:
        stored = weight if op.get("transB", 0) else weight.T

        def make() -> nn.Module:
            layer = nn.Linear(stored.shape[1], stored.shape[0], bias=op.has(2)).double()
            layer.weight = op.parameter(1) if op.get("transB", 0) else nn.Parameter(tensor(np.ascontiguousarray(stored)))
            if op.has(2):
                layer.bias = op.parameter(2)
            return layer

        layer = op.twin.layer(op, ("linear", *op.inputs[1:3], op.get("transB", 0)), make)
        return apply(op, layer, 1)

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if op.get("transA", 0) else a, b.t() if op.get("transB", 0) else b
        return alpha * (a @ b) if c is None else torch.addmm(c, a, b, beta=beta, alpha=alpha)

    if op.get("transB", 0) or (op.get("transA", 0) and op.const(0) is not None) or (bias is None and alpha != 1):
        raise NotInTorchError("its weight is transposed or multiplied in the call")
    return apply(op, run)


def arithmetic(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Op], Step]:
    def make(op: Op) -> Step:
        if op.twin.opset < 7 and op.get("broadcast", 0):
            raise NotInTorchError("it broadcasts in the way of opset 6")
        return apply(op, run)

    return make


def reshape(op: Op) -> Step:
    sizes = op.ints("shape", 1)
    if op.get("allowzero", 0):
        raise NotInTorchError("it may make an empty tensor")
    return apply(op, lambda x: x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]), 1)


def flatten(op: Op) -> Step:
    axis, rank = int(op.get("axis", 1)), op.rank()
    axis = axis % rank if axis < rank else axis
    if axis != 1:
        raise NotInTorchError("torch's flatten keeps the axes before")
    return apply(op, lambda x: x.flatten(1), 1)


def transpose(op: Op) -> Step:
    order = list(op.get("perm", [])) or list(range(op.rank()))[::-1]
    return apply(op, lambda x: x.permute(order), 1)


def squeeze(op: Op) -> Step:
    axes = op.ints("axes", 1, [])
    return apply(op, lambda x: x.squeeze(tuple(int(a) for a in axes)) if axes else x.squeeze(), 1)


def unsqueeze(op: Op) -> Step:
    axes = sorted(int(a) % (op.rank() + len(op.ints("axes", 1))) for a in op.ints("axes", 1))

    def run(x: Tensor) -> Tensor:
        for axis in axes:
            x = x.unsqueeze(axis)
        return x

    return apply(op, run, 1)


def concat(op: Op) -> Step:
    return apply(op, lambda *xs: torch.cat(xs, int(op.get("axis", 1))))


def cut(op: Op) -> Step:
    starts, ends = op.ints("starts", 1), op.ints("ends", 2)
    axes = op.ints("axes", 3, list(range(len(starts))))
    steps = op.ints("steps", 4, [1] * len(starts))
    if any(s < 1 for s in steps):
        raise NotInTorchError("torch doesn't slice backwards")

    def run(x: Tensor) -> Tensor:
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            where: list[Any] = [slice(None)] * x.ndim
            where[axis] = slice(start, end if end < 2**31 - 1 else None, step)
            x = x[tuple(where)]
        return x

    return apply(op, run, 1)


def split(op: Op) -> Step:
    axis, sizes = int(op.get("axis", 0)), op.ints("split", 1, [])

    def step(env: dict[str, Any]) -> None:
        x = op.twin.value(env, op.inputs[0])
        parts = x.split(sizes, axis) if sizes else x.chunk(len(op.outputs), axis)
        env.update(zip(op.outputs, parts, strict=True))

    return step


def pieces(op: Op) -> Step:
    """A sequence is a list."""
    axis, sizes, x = int(op.get("axis", 0)), op.const(1), op.inputs[0]
    if op.has(1) and sizes is None:
        raise NotInTorchError("its sizes are computed")

    def step(env: dict[str, Any]) -> None:
        value = op.twin.value(env, x)
        if sizes is None:
            parts = value.split(1, axis) if op.get("keepdims", 1) else value.unbind(axis)
        else:
            parts = value.split(sizes.tolist(), axis)
        env[op.outputs[0]] = list(parts)

    return step


def collection(op: Op) -> Step:
    def step(env: dict[str, Any]) -> None:
        env[op.outputs[0]] = [op.twin.value(env, name) for name in op.inputs]

    return step


def piece(op: Op) -> Step:
    place = op.const(1)
    if place is None:
        raise NotInTorchError("its place is computed")

    def step(env: dict[str, Any]) -> None:
        env[op.outputs[0]] = env[op.inputs[0]][int(place)]

    return step


def joined(op: Op) -> Step:
    run: Any = torch.stack if op.get("new_axis", 0) else torch.cat

    def step(env: dict[str, Any]) -> None:
        env[op.outputs[0]] = run(env[op.inputs[0]], int(op.get("axis")))

    return step


def gather(op: Op) -> Step:
    axis = int(op.get("axis", 0))
    table, places = op.const(0), op.const(1)
    if table is not None:
        if axis or table.ndim != 2:
            raise NotInTorchError("torch's embedding is a matrix of rows")

        def make() -> nn.Module:
            layer = nn.Embedding(*table.shape).double()
            layer.weight = op.parameter(0)
            return layer

        layer = op.twin.layer(op, ("table", op.inputs[0]), make)

        def look(env: dict[str, Any]) -> None:
            env[op.outputs[0]] = layer(op.twin.value(env, op.inputs[1]))

        return look
    if places is None:
        return apply(op, lambda x, i: x[(*(slice(None),) * (axis % x.ndim), i)])
    if places.ndim == 0:
        return apply(op, lambda x: x.select(axis, int(places)), 1)
    if places.ndim != 1:
        raise NotInTorchError("torch selects by a vector of places")
    where = torch.from_numpy(np.array(places % 2**62 if (places >= 0).all() else places))
    if (places < 0).any():
        raise NotInTorchError("torch selects no negative places")
    return apply(op, lambda x: x.index_select(axis, where), 1)


def pad(op: Op) -> Step:
    mode = op.get("mode", "constant")
    name = "pads" if "pads" in op.attributes or op.has(1) else "paddings"
    pads, rank = op.ints(name, 1), op.rank()
    if op.has(3) or (op.has(2) and op.const(2) is None):
        raise NotInTorchError("its axes or its fill are given in another way")
    fill = op.const(2)
    value = float(op.get("value", 0.0)) if fill is None else float(fill.ravel()[0])
    pairs = list(zip(pads[:rank], pads[rank:], strict=True))
    while pairs and pairs[0] == (0, 0):
        pairs.pop(0)
    flat = [n for pair in reversed(pairs) for n in pair]
    if mode != "constant" and (len(pairs) != rank - 2 or min(flat, default=0) < 0):
        raise NotInTorchError("torch pads the spatial axes in this mode")
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    return apply(op, lambda x: F.pad(x, flat, modes[mode], value if mode == "constant" else None), 1)


def pool(kind: str) -> Callable[[Op], Step]:
    def make(op: Op) -> Step:
        kernel = list(op.get("kernel_shape"))
        ones = [1] * len(kernel)
        stride = list(op.get("strides", ones))
        padded, before = padding(op, tuple(kernel), stride)
        if padded == "same" or before is not None or len(op.outputs) > 1:
            raise NotInTorchError("torch has no such padding for a pool")
        ceil = bool(op.get("ceil_mode", 0))
        if kind == "max":
            settings = {"dilation": list(op.get("dilations", ones)), "ceil_mode": ceil}
            layer: Any = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[len(kernel)]
            made = layer(kernel, stride, padded, **settings)
        else:
            if list(op.get("dilations", ones)) != ones or ceil:
                raise NotInTorchError("torch's average has no dilation, and counts otherwise past the border")
            layer = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[len(kernel)]
            made = layer(kernel, stride, padded, count_include_pad=bool(op.get("count_include_pad", 0)))
        return apply(op, made, 1)

    return make


def lp_pool(op: Op) -> Step:
    raise NotInTorchError("torch's own is made of other operators")


def overall(kind: str) -> Callable[[Op], Step]:
    def make(op: Op) -> Step:
        axes = tuple(range(2, op.rank()))
        return apply(op, lambda x: x.mean(axes, keepdim=True) if kind == "mean" else x.amax(axes, keepdim=True), 1)

    return make


def reduce(run: Callable[..., Tensor]) -> Callable[[Op], Step]:
    def make(op: Op) -> Step:
        axes = [int(a) for a in op.ints("axes", 1, [])]
        if not axes and op.get("noop_with_empty_axes", 0):
            return apply(op, lambda x: x.clone(), 1)
        keep, every = bool(op.get("keepdims", 1)), list(range(op.rank()))
        return apply(op, lambda x: run(x, axes or every, keep), 1)

    return make


def resize(op: Op) -> Step:
    mode = op.get("mode", "nearest")
    transform = op.get("coordinate_transformation_mode", "half_pixel" if op.twin.opset >= 11 else "asymmetric")
    scales = op.ints("scales", 1 if op.node.op_type == "Upsample" or op.twin.opset < 11 else 2, [])
    if not scales or any(s != 1 for s in scales[:2]) or op.get("antialias", 0) or op.get("axes") or op.get("exclude_outside", 0):
        raise NotInTorchError("torch interpolates the spatial axes, by scales")
    dims = len(scales) - 2
    kinds = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}.get(dims), "nearest": "nearest", "cubic": "bicubic"}
    if mode == "nearest" and not (transform == "asymmetric" and op.get("nearest_mode", "floor") == "floor"):
        raise NotInTorchError("torch's nearest is the asymmetric one, rounded down")
    if mode != "nearest" and transform not in ("half_pixel", "align_corners"):
        raise NotInTorchError("torch has no such coordinates")
    if mode == "cubic" and dims != 2:
        raise NotInTorchError("torch's cubic is two-dimensional")
    corners = None if mode == "nearest" else transform == "align_corners"
    return apply(op, lambda x: F.interpolate(x, scale_factor=tuple(scales[2:]), mode=kinds[mode], align_corners=corners), 1)


def depth_to_space(op: Op) -> Step:
    if op.get("mode", "DCR") != "CRD":
        raise NotInTorchError("torch's pixel shuffle is the other one")
    return apply(op, nn.PixelShuffle(int(op.get("blocksize"))), 1)


def expand(op: Op) -> Step:
    sizes = op.ints("shape", 1)

    def run(x: Tensor) -> Tensor:
        rank = max(len(sizes), x.ndim)
        own = [1] * (rank - x.ndim) + list(x.shape)
        want = [1] * (rank - len(sizes)) + sizes
        return x.expand([n if w == 1 else w for n, w in zip(own, want, strict=True)])

    return apply(op, run, 1)


def tile(op: Op) -> Step:
    repeats = op.ints("repeats", 1)
    return apply(op, lambda x: x.repeat(repeats), 1)


def clip(op: Op) -> Step:
    low, high = (op.ints(name, i, [None])[0] for name, i in (("min", 1), ("max", 2)))
    high = None if high is not None and high > 3e38 else high
    return apply(op, lambda x: x.clamp(low, high), 1)


def prelu(op: Op) -> Step:
    slope = needs_weight(op)
    layer = nn.PReLU(slope.size).double()
    layer.weight = nn.Parameter(tensor(slope.reshape(-1)))
    return apply(op, op.twin.layer(op, ("prelu", op.inputs[1]), lambda: layer), 1)


def dropout(op: Op) -> Step:
    mode = op.const(2)
    if (op.has(2) and (mode is None or bool(mode.any()))) or (op.twin.opset < 7 and not op.get("is_test", 0)) or any(op.outputs[1:]):
        raise NotInTorchError("a layer in training mode is another test")
    return apply(op, nn.Dropout(0.5).eval(), 1)


def normalisation(op: Op) -> Step:
    scale = needs_weight(op)
    kind, epsilon = op.node.op_type, float(op.get("epsilon", 1e-5))
    if (op.has(2) and op.const(2) is None) or any(op.outputs[1:]):
        raise NotInTorchError("its bias is computed, or it gives statistics")

    def make() -> nn.Module:
        if kind == "InstanceNormalization":
            classes: Any = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
            layer = classes[op.rank()](scale.size, eps=epsilon, affine=True).double()
        elif kind == "LayerNormalization":
            layer = nn.LayerNorm(scale.shape, eps=epsilon, bias=op.has(2)).double()
        else:
            layer = nn.GroupNorm(int(op.get("num_groups")), scale.size, eps=epsilon).double()
        layer.weight = op.parameter(1)
        if op.has(2):
            layer.bias = op.parameter(2)
        return layer

    if kind == "LayerNormalization" and int(op.get("axis", -1)) % op.rank() != op.rank() - scale.ndim:
        raise NotInTorchError("it normalises other axes")
    if kind == "GroupNormalization" and op.twin.opset < 21:
        raise NotInTorchError("its scale is per group")
    return apply(op, op.twin.layer(op, (kind, *op.inputs[1:3]), make), 1)


def einsum(op: Op) -> Step:
    equation = str(op.get("equation"))
    return apply(op, lambda *xs: torch.einsum(equation, *xs))


def leaky(op: Op) -> Step:
    slope = float(op.get("alpha", 0.01))
    return apply(op, lambda x: F.leaky_relu(x, slope), 1)


def folded(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Op], Step]:
    """Of any number of inputs, from left to right."""

    def make(op: Op) -> Step:
        def every(first: Tensor, *others: Tensor) -> Tensor:
            for other in others:
                first = run(first, other)
            return first

        return apply(op, every)

    return make


def compare(op: Op) -> Step:
    return apply(op, torch.gt)


def size_of(op: Op) -> Step:
    raise NotInTorchError("sizes are numbers in torch, not tensors")


def norm(order: int) -> Callable[[Op], Step]:
    return reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, order, axes, keep))


OPERATORS: dict[str, Callable[[Op], Step]] = {
    "BatchNormalization": batchnorm,
    "Conv": conv,
    "ConvTranspose": conv,
    "Gemm": gemm,
    "MatMul": lambda op: apply(op, torch.matmul),
    "Einsum": einsum,
    "Gather": gather,
    "GatherElements": lambda op: apply(
        op, lambda x, i: x.gather(a := int(op.get("axis", 0)), i % x.shape[a])
    ),  # torch has no negative ones
    "Add": arithmetic(torch.add),
    "Sub": arithmetic(torch.sub),
    "Mul": arithmetic(torch.mul),
    "Div": arithmetic(torch.div),
    "Neg": unary(torch.neg),
    "Sum": folded(torch.add),
    "Max": folded(torch.maximum),
    "Min": folded(torch.minimum),
    "Relu": unary(torch.relu),
    "LeakyRelu": leaky,
    "PRelu": prelu,
    "Sigmoid": unary(torch.sigmoid),
    "Tanh": unary(torch.tanh),
    "Exp": unary(torch.exp),
    "Abs": unary(torch.abs),
    "Sqrt": unary(torch.sqrt),
    "HardSwish": unary(F.hardswish),
    "Clip": clip,
    "Dropout": dropout,
    "Identity": unary(lambda x: x.clone()),
    "Transpose": transpose,
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Concat": concat,
    "Slice": cut,
    "Split": split,
    "SplitToSequence": pieces,
    "SequenceConstruct": collection,
    "SequenceAt": piece,
    "ConcatFromSequence": joined,
    "Pad": pad,
    "Expand": expand,
    "Tile": tile,
    "DepthToSpace": depth_to_space,
    "MaxPool": pool("max"),
    "AveragePool": pool("mean"),
    "LpPool": lp_pool,
    "GlobalAveragePool": overall("mean"),
    "GlobalMaxPool": overall("max"),
    "ReduceMean": reduce(torch.mean),
    "ReduceSum": reduce(torch.sum),
    "ReduceMax": reduce(torch.amax),
    "ReduceMin": reduce(torch.amin),
    "ReduceL1": norm(1),
    "ReduceL2": norm(2),
    "Resize": resize,
    "Upsample": resize,
    "InstanceNormalization": normalisation,
    "LayerNormalization": normalisation,
    "GroupNormalization": normalisation,
    "Where": lambda op: apply(op, torch.where),
    "Greater": compare,
    "Shape": size_of,
}
