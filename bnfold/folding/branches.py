"""Parallel linear branches become one convolution: the deploy form of RepVGG, MobileOne and their kin, for any graph.

Two branches of one Add that read the same value x are one operator where both are linear maps of the same neighbourhood:

    W1*x + b1 + W2*x + b2 = (W1 + W2)*x + (b1 + b2)          (and W1 - W2 for a difference)

A constant affine map, a BatchNorm say, is the convolution with the diagonal unit kernel, and x itself is the one with ones on it. One of
the two must be a convolution whose kernel covers the other's (the host), so that merging never adds work. Two products by constants over
the same axes are one in the same way: the two classifiers of a distilled network, say.
(Ding et al. 2021, RepVGG, section 3.3, for the kernels of one block; nothing here depends on that block.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Affine, Array, Blocked
from bnfold.algebra.graph import Graph, Node, Value, Window

from .feasible import fits_type


@dataclass(frozen=True)
class Merge:
    """branch went into host, and add went away. delta: what the branch added to the host's weight, its sign apart.

    summands: the sum of the magnitudes of all the weights that are in the host's by now, where they may cancel; scale: the factors by
    which the host's stored weight is multiplied by now.
    """

    add: Node
    host: Node
    branch: Node | None  # None: the value itself
    kept_input: int  # which input of the Add is the host's
    delta: Array
    summands: Array
    scale: Array

    @property
    def summands_now(self) -> Array:
        """The magnitudes, now that more maps may have folded into the host."""
        update = self.host.params["weight"].update
        with np.errstate(all="ignore"):
            later: Array = np.abs(np.ones(()) if update is None else update.scale / self.scale)
        return self.summands * np.asarray(np.nan_to_num(later, nan=1.0, posinf=1.0))


@dataclass(frozen=True)
class _Branch:
    node: Node | None
    source: Value
    window: Window | None  # None: a kernel of ones slides like any other of stride 1

    def kernel(self) -> tuple[int, ...]:
        return () if self.node is None or self.node.op != "Conv" else self.node.params["weight"].shape[2:]


May = Callable[[Node, "Node | None", int], bool]


def always(add: Node, branch: Node | None, kept: int) -> bool:
    return True


def merge(graph: Graph, may: May = always, earlier: Iterable[Merge] = ()) -> list[Merge]:
    """Merge all that can be, in topological order, inner sums first. Merged nodes leave the graph.

    may: whether the front-end can take a branch (None: the value itself) out of a sum, whose input `kept` is the host's. earlier: what was
    merged before, since when some maps may have folded into the hosts.
    """
    done: list[Merge] = []
    summands = {m.host: m.summands_now for m in earlier}
    for add in [node for node in graph.nodes if node.op == "Add" and len(node.inputs) == 2 and node.inputs[0] is not node.inputs[1]]:
        if not add.output.users and not add.output.is_output:
            continue
        multiples = add.attrs.get("multiples", (1, 1))
        for host, branch, kept in _pairings(add):
            delta = _as_kernel_of(graph, host, branch, summands)
            if delta is None or host.node is None or not multiples[kept] or not may(add, branch.node, kept):
                continue
            changes = _changes(host.node, delta, multiples[kept], multiples[1 - kept])
            if changes is None:
                continue
            weight = host.node.params["weight"]
            summands[host.node] = summands.get(host.node, np.abs(weight.read())) + delta.summands
            for role, change in changes.items():
                host.node.params[role].update = host.node.params[role].updated(change)
            scale = np.ones(()) if weight.update is None else weight.update.scale
            done.append(Merge(add, host.node, branch.node, kept, delta.weight, summands[host.node], scale))
            _rewire(graph, add, host.node, branch.node)
            break
    return done


def _changes(host: Node, delta: _Delta, own: float, other: float) -> dict[str, Affine] | None:
    """What becomes of the host's parameters; None where one would overflow its stored type."""
    changes = {}
    for role, array in (("weight", delta.weight), ("bias", delta.bias)):
        param = host.params.get(role)
        if array.any() and (param is None or param.refusal or ("grows_add" in host.attrs and param.tensor is None and not param.update)):
            return None
        if param is None:
            continue
        if param.tensor is not None or param.update is not None or array.any():
            changes[role] = Affine(np.asarray(float(own)), other * array)
    try:
        for role, change in changes.items():
            fits_type(host, role, host.params[role], change)
    except Blocked:
        return None
    return changes


def _pairings(add: Node) -> list[tuple[_Branch, _Branch, int]]:
    """(host, branch) both ways, where the two read the same value. One of the operands may be that value itself."""
    one, other = (_branch(v) for v in add.inputs)
    itself = [_Branch(None, v, None) for v in add.inputs]
    pairs = []
    for first, second in ((one, other), (one, itself[1]), (itself[0], other)):
        if first is not None and second is not None and first.source is second.source:
            pairs += [(first, second, 0), (second, first, 1)]
    return [(host, branch, kept) for host, branch, kept in pairs if host.node is not None and host.node.op != "Affine"]


def _branch(value: Value) -> _Branch | None:
    """The linear operator that makes a value that nothing but the Add reads."""
    node = value.producer
    if node is None or value.is_output or len(value.users) != 1:
        return None
    if node.op == "Conv" and isinstance(node.attrs.get("window"), Window):
        return _Branch(node, node.inputs[0], node.attrs["window"])
    if node.op in ("Affine", "Contraction"):
        return _Branch(node, node.inputs[0], None)
    return None


class _Delta(NamedTuple):
    """What a branch adds to the host's weight and bias. summands: the magnitudes of the weights that are in the branch's."""

    weight: Array
    bias: Array
    summands: Array


def _as_kernel_of(graph: Graph, host: _Branch, branch: _Branch, summands: Mapping[Node, Array]) -> _Delta | None:
    """The branch as a part of the host; None where it isn't a convolution with the host's window. summands: of what was merged before."""
    assert host.node is not None
    if any(_is_quantised(node) for node in (host.node, branch.node)):  # the sum of two codes is no code
        return None
    if not graph.copies_weights and any(p.tensor is not None and len(p.tensor.users) > 1 for p in host.node.params.values()):
        return None
    if host.window is None:
        return _as_product_of(host.node, branch.node, summands)
    weight, groups = host.node.params["weight"], host.node.attrs["groups"]
    out, fan_in, *size = weight.shape
    if branch.node is not None and branch.node.op == "Conv":
        other = branch.node.params["weight"]
        offset = _offset(host.window, tuple(size), branch.window, branch.kernel())
        if offset is None or other.shape[0] != out or branch.node.attrs["groups"] != groups or other.shape[1] != fan_in:
            return None
        delta = np.zeros(weight.shape)
        inside = [slice(None)] * 2 + [slice(o, o + k) for o, k in zip(offset, branch.kernel(), strict=True)]
        own, sizes = other.read(), np.zeros(weight.shape)
        delta[tuple(inside)], sizes[tuple(inside)] = own, summands.get(branch.node, np.abs(own))
        return _Delta(delta, branch.node.params["bias"].read(), sizes)
    if branch.node is not None and branch.node.op != "Affine":
        return None
    rank = len(size) + 2
    a = Affine.identity(rank) if branch.node is None else coefficients(branch.node)
    ones = (1,) * len(size)
    still = Window(ones, host.window.dilation, (0,) * len(size), (0,) * len(size))
    offset = _offset(host.window, tuple(size), still, ones)
    if offset is None or out != groups * fan_in or a.rank != rank or any(axis != 1 for axis in a.varying):
        return None
    s, t = a.along(1, out)
    delta = np.zeros(weight.shape)
    channel = np.arange(out)
    place: tuple[Any, ...] = (channel, channel % fan_in, *offset)  # output channel o is input o % (in/g) of its own group
    delta[place] = s
    return _Delta(delta, t, np.abs(delta))


def _as_product_of(host: Node, branch: Node | None, summands: Mapping[Node, Array]) -> _Delta | None:
    """The same of two products by constants; None where they aren't over the same axes."""
    if branch is None or branch.op != "Contraction" or any(host.attrs[term] != branch.attrs[term] for term in "xwy"):
        return None
    biases = [node.params["bias"].read() if "bias" in node.params else np.zeros(()) for node in (host, branch)]
    own, added = branch.params["weight"].read(), biases[1]
    if own.shape != host.params["weight"].shape or (added.any() and added.shape != biases[0].shape):
        return None
    return _Delta(own, added, summands.get(branch, np.abs(own)))


def _is_quantised(node: Node | None) -> bool:
    tensors = () if node is None else [param.tensor for param in node.params.values() if param.tensor is not None]
    return any(t.quantised is not None and not t.quantised.small for t in tensors)


def _offset(host: Window, size: tuple[int, ...], branch: Window | None, kernel: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where the branch's kernel begins inside the host's; None where they don't see the same places for every input size."""
    assert branch is not None
    offsets = []
    for i, (n, k) in enumerate(zip(size, kernel, strict=True)):
        dilation = host.dilation[i]
        if host.stride[i] != branch.stride[i] or (k > 1 and branch.dilation[i] != dilation):
            return None
        reach = [w.before[i] + w.after[i] - (length - 1) * dilation for w, length in ((host, n), (branch, k))]
        offset, odd = divmod(host.before[i] - branch.before[i], dilation)
        if reach[0] != reach[1] or odd or offset < 0 or offset + k > n:
            return None
        offsets.append(offset)
    return tuple(offsets)


def _rewire(graph: Graph, add: Node, host: Node, branch: Node | None) -> None:
    """Let the host's output stand where the sum stood, and take the branch out."""
    for value in add.inputs:
        value.users = [(user, i) for user, i in value.users if user is not add]
    if branch is not None:
        for value in branch.inputs:
            value.users = [(user, i) for user, i in value.users if user is not branch]
        graph.take_out(branch)
    add.inputs = [host.output]
    host.output.users.append((add, 0))
    graph.bypass(add)
