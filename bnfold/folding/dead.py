"""Channels that nobody needs, taken out of the layers that make them and of those that read them.

Where gamma is 0 a channel is a constant (see `constant`), which the next layers take up: W*x = W'*x' + W*c, without the channel. What is
needed is asked from behind: an output of the model is, a linear operator needs what isn't constant or what it can't take up, and what works
channel by channel needs of its inputs what is needed of its output. All that such operators connect loses the same channels. What is left
is the least that answers to all of that. (Channels whose gamma is 0: Liu et al. 2017, Learning Efficient Convolutional Networks through
Network Slimming, section 3.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from bnfold.algebra.affine import Affine, Blocked
from bnfold.algebra.graph import Graph, Node, Site, Value
from bnfold.algebra.layouts import Places, taken
from bnfold.algebra.movement import move_down, move_up
from bnfold.algebra.rules import rule_of
from bnfold.algebra.settings import restated
from bnfold.report import Dropped

from .branches import Merge
from .constant import CROSSED, LINEAR, channel_axes, constants
from .search import apply, taken_up

Mask = npt.NDArray[np.bool_]  # of a value's rank, with the size 1 along axes on which nothing varies
ALL, ZEROS, NONE = range(3)  # which constants an operator takes up
UNKNOWN = "what the operators behind make of it, and of what else they read, isn't known to be constant"
ONE_STAYS = "a layer keeps one channel"


@dataclass(frozen=True)
class Narrowed:
    """What has lost channels. kept: of each value the axis, and the places on it that are left. nodes: that make or read such values."""

    dropped: tuple[Dropped, ...] = ()
    kept: Mapping[Value, tuple[int, Places]] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()

    @property
    def sizes(self) -> dict[Value, tuple[int, int]]:
        """Of each of the values the axis, and how many places are left on it."""
        return {value: (axis, len(places)) for value, (axis, places) in self.kept.items()}


def drop(graph: Graph, barred: Iterable[Node] = ()) -> Narrowed:
    """Take all channels out that nobody needs. The updates are left in the graph's parameters, and its values have their new sizes.

    barred: operators that may not change.
    """
    known = constants(graph)
    if not known:
        return Narrowed()
    whole = dict.fromkeys(barred, "a branch of its sum stays in the code") | {n: text for n in graph.nodes if (text := _rigid(graph, n))}
    takes: dict[Node, int] = {}
    why: dict[Node, str] = {}
    while True:
        needs, drafts, before = _Needs(graph, known, whole, takes, why), [], dict(takes)
        for node in graph.nodes:
            mask = needs.masks[node.inputs[0]] if node.op in LINEAR and node not in whole else None
            if mask is None or mask.all() or node.attrs.get("groups", 1) > 1:
                continue
            dead = known.get(node.inputs[0], Affine.identity(mask.ndim))
            try:
                site = Site(node.name, [node], 0, is_batchnorm=False)
                drafts.append(taken_up(graph, site, Affine(mask.astype(np.float64), np.where(mask, 0.0, dead.shift))))
            except Blocked as blocked:
                takes[node] = takes.get(node, ALL) + 1
                why.setdefault(node, str(blocked))
        if takes == before:
            break
    for each in drafts:
        apply(each)
    kept = {}
    for value, mask in needs.masks.items():
        if not mask.all():
            axis = next(axis for axis in range(mask.ndim) if mask.shape[axis] > 1)
            kept[value] = axis, np.flatnonzero(mask)
    dropped = tuple(_dropped(node, known.get(node.output), needs) for node in graph.nodes if node.op in LINEAR)
    nodes = tuple(node for node in graph.nodes if any(value in kept for value in (*node.inputs, *node.outputs)))
    for node in nodes:
        _narrow(node, kept)
    for value, (axis, places) in kept.items():
        value.probes = value.probes and tuple((*sizes[:axis], len(places), *sizes[axis + 1 :]) for sizes in value.probes)
    return Narrowed(tuple(each for each in dropped if each is not None), kept, nodes)


def narrowed(merge: Merge, found: Narrowed) -> Merge:
    """A merge whose host has lost channels."""
    kept = _of_weight(merge.host, found.kept)
    delta, summands, scale = (taken(each, kept, merge.delta.ndim) for each in (merge.delta, merge.summands, merge.scale))
    return replace(merge, delta=delta, summands=summands, scale=scale)


def _rigid(graph: Graph, node: Node) -> str:
    """Why an operator can't take or give fewer channels; "" where it can."""
    name = f"{node.label} {node.name}"
    if why := graph.rigid(node) if node.native is not None else "":
        return f"{name}, {why}"
    if len(node.outputs) != 1 or any(value.rank is None for value in (*node.inputs, node.output)):
        return f"{name} has several outputs, or one of unknown rank"
    if node.op in LINEAR:
        tensors = [param.tensor for param in node.params.values() if param.tensor is not None]
        if any(tensor.quantised is not None and not tensor.quantised.small for tensor in tensors):
            return f"{name} has integers for weights"
        if not graph.copies_weights and any(len(tensor.users) > 1 for tensor in tensors):
            return f"{name} shares its weights"
        axes = channel_axes(node)
        return "" if axes is not None else f"{name} multiplies along several axes"
    if node.op in CROSSED or node.op in ("Identity", "Clamp"):
        return ""
    if node.op == "Affine":
        return "" if all(np.size(node.attrs.get(key, 0.0)) == 1 for key in ("gain", "mean", "shift")) else f"{name} stays"
    fixed = any(value.fixed or (value.producer is not None and value.producer.op == "Constant") for value in node.inputs)
    return f"{name} mixes channels, or isn't known" if fixed or graph.elementwise(node) is None else ""


class _Needs:
    """Which channels of each value are needed, by `masks`. why: the first reason why a constant one is.

    takes: what linear operators take up, by default all constants; reasons: why not more.
    """

    def __init__(
        self, graph: Graph, known: Mapping[Value, Affine], whole: Mapping[Node, str], takes: Mapping[Node, int], reasons: Mapping[Node, str]
    ) -> None:
        self._known, self._whole, self._takes, self._reasons = known, whole, takes, reasons
        values = dict.fromkeys(value for node in graph.nodes for value in (*node.inputs, *node.outputs))
        self.masks: dict[Value, Mask] = {value: np.zeros((1,) * (value.rank or 0), bool) for value in values}
        self.why: dict[Value, str] = {}
        self._agenda = dict.fromkeys(reversed(graph.nodes))
        for value in values:
            if value.is_output or value.is_sized:
                why = f"{value.name} is an output of the model" if value.is_output else f"the sizes of {value.name} are read"
                self._need_all(value, why)
            elif value.producer is None or not value.users or not value.rank:
                self._need_all(value, f"nobody reads {value.name}")
        while self._agenda:
            node = next(iter(self._agenda))
            del self._agenda[node]
            self._ask(node)

    def _need(self, value: Value, mask: Mask, why: str) -> None:
        old = self.masks[value]
        new = old | mask
        varying = [axis for axis in range(new.ndim) if (new != new.take([0], axis)).any()][:1]
        if varying == [0]:
            varying, new = [], np.ones_like(new)  # samples are no channels
        new = np.asarray(new.any(axis=tuple(axis for axis in range(new.ndim) if axis not in varying), keepdims=True))
        if new.shape == old.shape and (new == old).all():
            return
        self.masks[value] = new
        dead = self._known.get(value)
        if dead is not None and ((dead.scale == 0) & new & ~old).any():
            self.why.setdefault(value, why)
        self._agenda.update(dict.fromkeys(node for node in (value.producer, *(user for user, _ in value.users)) if node is not None))

    def _need_all(self, value: Value, why: str) -> None:
        self._need(value, np.ones((1,) * (value.rank or 0), bool), why)

    def _ask(self, node: Node) -> None:
        """Let an operator say what it needs, and what it must give."""
        if node in self._whole:
            for value in (*node.inputs, *node.outputs):
                self._need_all(value, self._whole[node])
        elif node.op in LINEAR:
            self._linear(node)
        elif node.op in CROSSED:
            self._crossed(node)
        else:
            values = (node.output, *node.inputs)
            mask = np.zeros((1,) * (node.output.rank or 0), bool)
            for value in values:
                mask = mask | self.masks[value]
            for value in values:
                lead = mask.ndim - (value.rank or 0)
                if any(n > 1 for n in mask.shape[:lead]):
                    self._need_all(value, self._reason(values))
                else:
                    self._need(value, mask.reshape(mask.shape[lead:]), self._reason(values))

    def _reason(self, values: Iterable[Value]) -> str:
        return next((self.why[value] for value in values if value in self.why), UNKNOWN)

    def _crossed(self, node: Node) -> None:
        """By the rules: a mask is a map that scales by 0 and 1."""
        x, y = node.inputs, node.output
        try:
            up = move_up(node, _as_map(self.masks[y])) if node.op == "Move" else rule_of(node).up(node, _as_map(self.masks[y]))[0].maps
            for value, a in zip(x, up, strict=True):
                self._need(value, np.nan_to_num(a.scale) != 0, self._reason([y]))
            maps = [_as_map(self.masks[value]) for value in x]
            down = move_down(node, maps) if node.op == "Move" else rule_of(node).down(node, maps)[0].maps[0]
            self._need(y, down.scale != 0, self._reason(x))
        except Blocked as blocked:
            for value in (*x, y):
                self._need_all(value, f"{node.label} {node.name} blocks, {blocked}")

    def _linear(self, node: Node) -> None:
        x, y, shape, name = node.inputs[0], node.output, node.params["weight"].shape, f"{node.label} {node.name}"
        axes, groups = channel_axes(node), node.attrs.get("groups", 1)
        assert axes is not None
        for value, axis in ((y, axes[0]), (x, axes[1])):
            if any(n > 1 for i, n in enumerate(self.masks[value].shape) if i != axis):
                self._need_all(value, f"{name} needs whole channels")
        if groups > 1:  # they stay or leave as a whole
            sides = ((y, axes[0], shape[0] // groups), (x, axes[1], shape[1]))
            by_group = [np.asarray(np.broadcast_to(self.masks[v].ravel(), groups * n).reshape(groups, n).any(axis=1)) for v, _, n in sides]
            stays = _one_at_least(np.logical_or(*by_group))
            for value, axis, n in sides:
                self._need(value, _shaped(np.repeat(stays, n), axis, value), self._reason([y, x]))
            return
        rows, columns = (shape[0], shape[1]) if node.op == "Conv" else (shape[_letter(node, role)] for role in "yx")
        made = np.broadcast_to(self.masks[y].ravel(), rows)
        self._need(y, _shaped(_one_at_least(made), axes[0], y), ONE_STAYS)
        dead, takes = self._known.get(x), self._takes.get(node, ALL)
        needed = np.ones(columns, bool)
        if dead is not None and takes != NONE and dead.scale.size in (1, columns) and dead.scale.shape[axes[1]] == dead.scale.size:
            stays = (dead.scale != 0) | ((dead.shift != 0) if takes == ZEROS else False)
            needed = np.broadcast_to(stays.ravel(), columns)
        why = self._reasons.get(node, "") if needed.any() else ONE_STAYS
        if not self.masks[x].any():
            needed = _one_at_least(needed)
        self._need(x, _shaped(needed, axes[1], x), why)


def _one_at_least(mask: Mask) -> Mask:
    return mask if mask.any() else np.arange(mask.size) == 0


def _shaped(mask: Mask, axis: int, value: Value) -> Mask:
    return mask.reshape([-1 if i == axis else 1 for i in range(value.rank or 0)])


def _as_map(mask: Mask) -> Affine:
    return Affine(mask.astype(np.float64), np.zeros(()))


def _letter(node: Node, side: str) -> int:
    """The axis of a product's weight along which its input's ("x") or its output's ("y") channels lie."""
    axes = channel_axes(node)
    assert axes is not None
    return int(node.attrs["w"].index(node.attrs[side][axes[0 if side == "y" else 1]]))


# --- what becomes of the graph -------------------------------------------------------------------------------------------------------


def _dropped(node: Node, known: Affine | None, needs: _Needs) -> Dropped | None:
    """What a layer loses of its channels, or why it doesn't; None where there is nothing to say."""
    axes = channel_axes(node)
    if axes is None:
        return None
    size = node.params["weight"].shape[0 if node.op == "Conv" else _letter(node, "y")]
    mask = np.broadcast_to(needs.masks[node.output].ravel(), size)
    by_channel = known is not None and known.scale.shape[axes[0]] == known.scale.size
    dead = np.broadcast_to(known.scale.ravel() == 0, size) if known is not None and by_channel else np.zeros(size, bool)
    if not dead.any() and mask.all():
        return None
    return Dropped(node.name, size, int((~mask).sum()), int(dead.sum()), needs.why.get(node.output, "") if (dead & mask).any() else "")


def _of_weight(node: Node, kept: Mapping[Value, tuple[int, Places]]) -> dict[int, Places]:
    """What is left of a linear operator's weight, by axis."""
    found = {}
    for value, side in ((node.output, "y"), (node.inputs[0], "x")):
        if value in kept and not (side == "x" and node.attrs.get("groups", 1) > 1):
            found[(0 if side == "y" else 1) if node.op == "Conv" else _letter(node, side)] = kept[value][1]
    return found


def _narrow(node: Node, kept: Mapping[Value, tuple[int, Places]]) -> None:
    """Let an operator have the parameters of the channels that are left."""
    made = kept.get(node.output)
    if node.op in LINEAR:
        of_weight = _of_weight(node, kept)
        if (groups := node.attrs.get("groups", 1)) > 1 and made is not None:
            node.attrs["groups"] = left = groups * len(made[1]) // node.params["weight"].shape[0]
            if (stated := node.attrs.get("settings")) is not None:
                node.attrs["settings"] = lambda: restated(stated(), {"group": left, "groups": left})
        node.params["weight"].narrow(of_weight)
    for role, param in node.params.items():
        if made is not None and role != "weight":
            axis, places = made
            param.narrow({0 if node.op == "Conv" else axis - (node.output.rank or 0) + len(param.shape): places})
    node.attrs.pop("reads", None)
