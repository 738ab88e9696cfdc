"""Which ATen operators can do with fewer channels, and what those that work element by element make of numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node as Op

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Elementwise, Node, Window
from bnfold.folding.constant import LINEAR
from bnfold.folding.plan import Planned

from ..export.constants import ProgramConstants
from ..export.walk import arguments, frame, operator_name
from ..runtime.widen import call
from .module_host import CONVOLUTIONS, ModuleHost, reads_bias
from .places import Host, Place

VIEWS = {"view", "reshape", "_unsafe_view", "view_copy"}
PRODUCTS = {"linear", "addmm", "matmul", "mm", "einsum", "convolution"}
PRODUCTS |= {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
MOVES = {"flatten", "cat", "permute", "transpose", "t", "squeeze", "unsqueeze", "permute_copy"}
ALONG = {"mean", "sum", "amax", "amin", "pad", "constant_pad_nd", "dropout", "feature_dropout", "contiguous", "clone", "to", "_to_copy"}
UNTAGGED = {"hardswish", "log_sigmoid", "hardshrink", "softshrink"}  # pointwise, though PyTorch doesn't say so
WINDOWS = ("avg_pool", "max_pool", "adaptive_", "_adaptive_", "upsample", "_upsample")


def elementwise(constants: ProgramConstants, node: Node) -> Elementwise | None:
    """See `Lowering.elementwise`."""
    op: Op = node.native.op
    others = [source for source in op.all_input_nodes if source not in node.native.operands]
    if node.native.group or not _is_pointwise(op) or any((c := constants.get(each)) is None or c.size > 1 for each in others):
        return None
    return partial(_evaluated, constants, node.native.operands, op)


def _is_pointwise(op: Op) -> bool:
    tagged = isinstance(op.target, torch._ops.OpOverload) and torch.Tag.pointwise in op.target.tags
    return tagged or operator_name(op) in UNTAGGED


def _evaluated(constants: ProgramConstants, operands: list[Op], op: Op, arrays: list[Array]) -> Array:
    given = {operand: torch.from_numpy(np.array(array)) for operand, array in zip(operands, arrays, strict=True)}

    def value(source: Op) -> Any:
        return given[source].clone() if source in given else constants.tensor(source)

    found = call(op, value)
    return np.asarray(found.numpy() if isinstance(found, Tensor) else np.nan, np.float64)


def rigid(host: Host, constants: ProgramConstants, node: Node) -> str:
    """See `Graph.rigid`."""
    op: Op = node.native.op
    name = operator_name(op)
    if node.params and isinstance(host, ModuleHost) and node.op != "Clamp" and not _is_layer(host, constants, node):
        return "it isn't a layer of PyTorch's own that is called once"
    if name in VIEWS:
        sizes = list(arguments(op).get("size") or arguments(op)["shape"])[1:]
        if any(n != -1 if isinstance(host, ModuleHost) else not isinstance(n, int) for n in sizes):
            return "the sizes that it gives are stated in the code" if isinstance(host, ModuleHost) else "its sizes are computed"
        return ""
    flexible = name in PRODUCTS | MOVES | ALONG or name.startswith(WINDOWS) or _is_pointwise(op)
    return "" if flexible else "its sizes or places are fixed"


def _is_layer(host: ModuleHost, constants: ProgramConstants, node: Node) -> bool:
    """Whether an operator is the whole of a layer whose tensors may get other sizes."""
    path = frame(node.native.op)
    layer = host.module(path)
    places = [param.slot.place for param in node.params.values() if param.slot is not None]
    aliases = host.aliases.values()
    own = all(isinstance(each, Place) and each.how == "stored" and each.owner == path and each.target not in aliases for each in places)
    called = [op for op in host.inside(path) if op.op == "call_function" and not constants.is_constant(op)]
    return own and called == [node.native.op] and isinstance(layer, (*CONVOLUTIONS, nn.Linear)) and reads_bias(layer)


def narrowed_layers(planned: Planned) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """A module's layers that have other channels, or hold other layers, with the shapes of their tensors, the number of groups under
    "groups", and what else they are set to."""
    hosts = planned.chains.hosts
    for node in dict.fromkeys((*hosts, *(node for node in planned.fewer.nodes if node.op in LINEAR))):
        stored = {param.slot.place.attribute: param for param in node.params.values() if param.tensor is not None}
        sizes = {name: [*param.layout.stored(param.read()).shape] for name, param in stored.items()}
        if isinstance(window := node.attrs.get("window"), Window) and node in hosts:
            sizes |= {"stride": [*window.stride], "padding": [*window.before], "dilation": [*window.dilation]}
        yield frame(node.native.op), {**sizes, "groups": [node.attrs.get("groups", 1)]}
