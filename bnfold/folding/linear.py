"""Linear operators in a row become one (see `algebra.composition`) where that takes fewer multiply-adds, or as many and an operator less.

Between them may stand what does nothing, and constants that are added or multiplied: the second operator takes these up with the bias of
the first, by the rule for maps that come from before. Averages may stand there too, and moves of whole channels: the mean of what a kernel
of 1 makes is what it makes of the mean, so that a classifier takes up the convolution before a global average. A convolution takes up an
average over windows behind it, which multiplies nothing, where its stride makes fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Affine, Array, Blocked
from bnfold.algebra.composition import Composition, carried, composition, mixed_axis
from bnfold.algebra.graph import Graph, Node, Param, Site, Tensor, Value, Window
from bnfold.algebra.layouts import Layout
from bnfold.algebra.rules import rule_of
from bnfold.algebra.settings import restated
from bnfold.report import Composed, Counts

from .averages import defer
from .constant import LINEAR
from .duplicate import multiply_adds
from .feasible import Draft, fits_type
from .search import Outcome, apply, taken_up

CARRIERS = {"Average", "Move"}  # what may do the same to all channels
Magnitudes = tuple[Callable[[], Array], Array]  # of what the numbers of a weight are sums of, and of what those of a bias are


@dataclass(frozen=True)
class Chains:
    """composed: what became of linear operators in a row; removed: the operators that are gone; into: for each of the linear ones its host;
    hosts: the operators that hold others, with the magnitudes of what they were made of; sizes: of values between that have other channels
    now, an axis and how many; behind: convolutions that stand behind averages now, each with its average; ends: of what went into them,
    those that stood behind their hosts."""

    composed: tuple[Composed, ...] = ()
    removed: tuple[Node, ...] = ()
    into: Mapping[Node, Node] = field(default_factory=dict)
    hosts: Mapping[Node, Magnitudes] = field(default_factory=dict)
    sizes: Mapping[Value, tuple[int, int]] = field(default_factory=dict)
    behind: tuple[tuple[Node, Node], ...] = ()
    ends: tuple[Node, ...] = ()

    def outcomes(self, found: Iterable[Outcome]) -> list[Outcome]:
        """With the hosts in the places of what went into them, and without constants that did."""
        left = [each for each in found if each.folded or not {*each.site.nodes} & {*self.removed}]
        return [replace(each, into=tuple(dict.fromkeys(map(self._last, each.into)))) for each in left]

    def _last(self, node: Node) -> Node:
        return self._last(self.into[node]) if node in self.into else node


def join(graph: Graph, fixed: Iterable[Node] = ()) -> Chains:
    """Let linear operators in a row be one. What becomes of them is left in the graph's parameters. fixed: those that stay as they are."""
    joining = _Joining(graph, set(fixed))
    while joining.go():
        pass
    behind, deferred = defer(graph, joining.fixed) if graph.copies_weights else ([], [])  # a module's code has its order
    rows = (*joining.joined.values(), *deferred, *joining.apart)
    return Chains(rows, tuple(joining.removed), joining.into, joining.hosts, joining.sizes, tuple(behind), tuple(joining.ends))


@dataclass(frozen=True)
class _Pair:
    """Two operators that can be one. between: what stands between them; draft: what becomes of other parameters than the host's weight."""

    found: Composition
    between: tuple[Node, ...]
    draft: Draft
    params: Mapping[str, Param]
    added: Array


class _Joining:
    def __init__(self, graph: Graph, fixed: set[Node]) -> None:
        self._graph, self.fixed = graph, fixed
        self.joined: dict[Node, Composed] = {}
        self.apart: list[Composed] = []
        self.removed: list[Node] = []
        self.into: dict[Node, Node] = {}
        self.ends: list[Node] = []
        self.hosts: dict[Node, Magnitudes] = {}
        self.sizes: dict[Value, tuple[int, int]] = {}

    def go(self) -> bool:
        """Look at all linear operators, once; whether something has changed."""
        before, self.apart = len(self.into), []
        for second in [node for node in self._graph.nodes if node.op in LINEAR or (node.op == "Average" and "window" in node.attrs)]:
            while second not in self.into and self._joins(second):
                pass
        return len(self.into) > before

    def _joins(self, second: Node) -> bool:
        """Whether an operator became one with the linear one before it."""
        between, first = _before(second)
        if first is None or (second.op == "Average" and not self._may_average(first, between)):
            return False
        rows = [self.joined.get(node, Composed((node.name,), "", "", _work(node))) for node in (first, second)]
        names, work = rows[0].layers + rows[1].layers, [row.multiply_adds for row in rows]
        try:
            pair = self._pair(first, between, second)
        except Blocked as blocked:
            self.apart.append(Composed(names, "", str(blocked)))
            return False
        self._commit(pair)
        host, counts = pair.found.host, _work(pair.found.host)
        for node in (first, second):
            self.joined.pop(node, None)
        known = None not in work and counts is not None
        total = Counts(sum(each.before for each in work if each is not None), counts.after) if known and counts is not None else None
        self.joined[host] = Composed(names, host.name, "", total)
        return True

    def _may_average(self, first: Node, between: tuple[Node, ...]) -> bool:
        """What only mixes channels goes behind an average instead (see `averages`)."""
        return not between and isinstance(first.attrs.get("window"), Window) and not (self._graph.copies_weights and mixed_axis(first) == 1)

    def _pair(self, first: Node, between: tuple[Node, ...], second: Node) -> _Pair:
        """Raises `Blocked` where the two stay two."""
        for value, reader in zip([first.output, *(node.output for node in between)], [*between, second], strict=True):
            others = [user for user, _ in value.users if user is not reader]
            if others or len(value.users) > 1 or value.is_output or value.is_sized:
                by = f"read by {others[0].name}" if others else "an output of the model" if value.is_output else "read in another way"
                raise Blocked(f"{value.name} is also {by}")
        nodes = first, *between, second
        if len({(node.attrs["limit"], node.attrs.get("scope")) for node in nodes}) > 1:
            raise Blocked("they compute in different types, or stand in different graphs")
        carriers = [node for node in between if node.op in CARRIERS]
        for node in carriers if self._graph.copies_weights else nodes:
            if why := self._graph.rigid(node):
                raise Blocked(f"of {node.label} {node.name}: {why}")
            if not self._graph.copies_weights and any(param.tensor and len(param.tensor.users) > 1 for param in node.params.values()):
                raise Blocked(f"{node.label} {node.name} shares its weights")
        a = _bias(first)
        for node in between:
            a = coefficients(node).after(a) if node.op == "Affine" else rule_of(node).down(node, [a])[0].maps[0]
        if a.shift.any() and not second.attrs.get("uniform", True):
            raise Blocked(f"of {second.name}: {second.attrs['uneven']}, and what is added before it would be missing there")
        draft = {}
        if not a.is_identity and second.op != "Average":
            draft = taken_up(self._graph, Site(second.name, [second], 0), a)
        grows = any(node.attrs.get("grows_add") and role == "bias" and node.params[role].tensor is None for node, role in draft)
        weights = [node.params["weight"] for node in (first, second) if node.op in LINEAR]
        if (update := draft.pop((second, "weight"), None)) is not None:
            weights[1] = replace(weights[1], update=weights[1].updated(update))
        found = composition(first, second, weights, onto_first=grows and not first.attrs.get("grows_add"), carriers=carriers)
        host = found.host
        _is_less(found, strictly=grows and host is second)
        goes = [node for node in nodes if node is not host and node not in carriers]
        stays = [node for node in goes if not (node.attrs.get("cloneable") if self._graph.copies_weights else node.op != "Affine")]
        if held := stays + [node for node in nodes if node in self.fixed]:
            raise Blocked(f"{held[0].label} {held[0].name} stays")
        params = {"weight": _product(host.params["weight"], found)}
        fits_type(host, "weight", params["weight"], Affine.identity(len(found.shape)))
        added = 0.0
        if host is first and second.op in LINEAR:
            params |= _bias_behind(found, draft)
        if a.shift.any() and second.op in LINEAR:
            added = np.abs(a.shift).max(initial=0.0) * np.abs(weights[1].read()).sum(axis=_summed(second)).max(initial=0.0)
        return _Pair(found, between, draft, params, np.asarray(added))

    def _commit(self, pair: _Pair) -> None:
        found, graph = pair.found, self._graph
        host, gone = found.host, found.second if found.host is found.first else found.first
        apply(pair.draft)
        probes = found.second.output.probes
        host.params |= pair.params
        if host.op == "Conv":
            _reset(host, found)
        carriers = [node for node in pair.between if node.op in CARRIERS]
        axis = mixed_axis(found.first) if carriers else None
        for node in carriers:
            assert axis is not None
            axis = carried(node, axis)
            assert axis is not None
            self.sizes[node.output] = axis, found.read
            node.output.probes = tuple((*each[:axis], found.read, *each[axis + 1 :]) for each in node.output.probes or ()) or None
            node.attrs.pop("reads", None)
        removed = [node for node in (*pair.between, gone) if node not in carriers]
        for node in removed:
            for role, param in node.params.items():
                if param.tensor is not None:
                    param.tensor.users.remove((node, role))
            graph.bypass(node)
        host.output.probes = probes
        self.removed += removed
        self.into[gone] = host
        if gone.index > host.index:  # which later numbers don't tell of what is gone
            self.ends.append(gone)
        self.hosts.pop(gone, None)
        self.hosts[host] = cache(found.magnitudes), pair.added


def _reset(host: Node, found: Composition) -> None:
    """Let a convolution have the groups and the window of two."""
    host.attrs["groups"] = found.groups
    changes: dict[str, object] = {"group": found.groups, "groups": found.groups}
    if (window := found.window) is not None:
        host.attrs |= {"window": window, "uniform": not any((*window.before, *window.after))}
        changes |= dict.fromkeys(("stride", "strides"), window.stride) | dict.fromkeys(("dilation", "dilations"), window.dilation)
        changes |= {"padding": window.before, "pads": (*window.before, *window.after)}
    if (stated := host.attrs.get("settings")) is not None:
        host.attrs["settings"] = lambda: restated(stated(), changes)


def _before(second: Node) -> tuple[tuple[Node, ...], Node | None]:
    """What stands between an operator and the linear one before it, and that; None where something else stands there."""
    between: list[Node] = []
    value = second.inputs[0]
    while (node := value.producer) is not None and node.op in {"Affine", "Identity"} | CARRIERS and len(node.inputs) == 1:
        if "norm" in node.attrs or (node.op == "Affine" and node.inputs[0].probes != value.probes):
            return (), None
        between.insert(0, node)
        value = node.inputs[0]
    return tuple(between), node if node is not None and node.op in LINEAR and value is node.output else None


def _bias(node: Node) -> Affine:
    """What an operator adds, as a map of its output."""
    rank, param = node.output.rank or 0, node.params.get("bias")
    if param is None:
        return Affine.identity(rank)
    bias = param.read()
    return Affine.shifting(
        bias.reshape(1, -1, *(1,) * (rank - 2)) if node.op == "Conv" else bias.reshape((1,) * (rank - bias.ndim) + bias.shape)
    )


def _summed(node: Node) -> tuple[int, ...]:
    return tuple(axis for axis in range(len(node.params["weight"].shape)) if axis not in node.output_axes)


def _work(node: Node) -> Counts | None:
    count = multiply_adds(node)
    return None if count is None else Counts(count, count)


def _is_less(found: Composition, *, strictly: bool) -> None:
    """Raises `Blocked` where one operator takes more than the two, at some size, or may; as many (strictly), too."""
    for probe in range(len(found.second.output.probes or ()) or 1):
        apart = [multiply_adds(node, probe) if node.output.probes else None for node in (found.first, found.second)]
        whole = None
        if None not in apart:
            whole = multiply_adds(found.host, probe, shape=found.shape, groups=found.groups, output=found.second.output)
        if whole is None:
            raise Blocked("how many multiply-adds they take isn't known")
        before = sum(n for n in apart if n is not None)
        if whole > before or (strictly and whole == before):
            raise Blocked(f"as one they would take {whole:,} multiply-adds, and now take {before:,}")


def _product(own: Param, found: Composition) -> Param:
    """The weight of both as a parameter of the host."""
    assert own.tensor is not None
    old = own.tensor
    made = Tensor(old.name, cache(found.weight), found.shape, old.limit, old.native, old.dtype, old.users)
    return Param(made, found.shape, found.layout(), slot=own.slot, remade=True)


def _bias_behind(found: Composition, draft: Draft) -> dict[str, Param]:
    """The bias of the first operator, where it takes the place of the second one; out of the draft."""
    first, second = found.first, found.second
    own, theirs, update = first.params.get("bias"), second.params.get("bias"), draft.pop((second, "bias"), None)
    total = np.zeros(()) if theirs is None else (theirs if update is None else replace(theirs, update=theirs.updated(update))).read()
    there = own is not None and (own.tensor is not None or own.update is not None)
    if total.any() and not there and (own is None or own.refusal or first.attrs.get("grows_add")):
        raise Blocked(f"{first.name} has no place for a bias")
    if own is None:
        return {}
    size = found.channels if first.op == "Conv" else [found.channels if i == found.axis else 1 for i in range(first.output.rank or 0)]
    total = total.reshape(-1) if first.op == "Conv" else total
    total = np.broadcast_to(total, np.broadcast_shapes(total.shape, size))
    layout = Layout("a new bias", lambda c: c, lambda c: c.reshape(-1) if c.size == found.channels else c)
    made = Param(None, total.shape, layout, slot=own.slot, refusal=own.refusal)
    if there or total.any():
        fits_type(first, "bias", made, Affine.shifting(total))
        made.update = Affine.shifting(total)
    return {"bias": made}
