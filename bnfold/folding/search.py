"""The planner: for every site, push its map through the graph until weights absorb it, or say why that can't be.

Nothing changes until all of a site fits: a push works on a draft, and a refusal drops the draft and keeps the reason.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Affine, Array, Blocked
from bnfold.algebra.graph import Graph, Node, Param, Quantised, Site, Tensor, Value
from bnfold.algebra.movement import move_up
from bnfold.algebra.rule import Step
from bnfold.algebra.rules import rule_of

from .duplicate import Clones, Shared

Draft = dict[tuple[Node, str], Affine]
Maps = dict[Any, Affine]  # going up, what each (user, input) demands; going down, what each value carries

ATTEMPTS = 64  # how many ways through the sums and products of one network are tried for one site


@dataclass(frozen=True)
class Outcome:
    """What became of a site. into: the nodes that absorbed it; reason: why it stays."""

    site: Site
    folded: bool
    into: tuple[Node, ...] = ()
    reason: str = ""
    note: str = ""


def fold(graph: Graph, *, clone: bool = False) -> list[Outcome]:
    """Fold every site that can be, in topological order, and again until nothing more moves.

    The updates are left in the graph's parameters, and the folded affine nodes are taken out of it. clone: whether an operator
    whose output has other users too may be doubled for a site's sake.
    """
    done: dict[int, list[Outcome]] = {}
    waiting = list(enumerate(graph.sites))
    progress = True
    while waiting and progress:
        progress, still = False, []
        for order, site in waiting:
            outcomes = _fold_site(graph, site, clone)
            done[order] = outcomes
            progress |= any(o.folded for o in outcomes)
            if not any(o.folded for o in outcomes) and site.refusal is None:
                still.append((order, site))
        waiting = still
    return [outcome for order in sorted(done) for outcome in done[order]]


def _fold_site(graph: Graph, site: Site, clone: bool) -> list[Outcome]:
    """All calls together; where that can't be and they are separable, each for itself."""
    together = _attempt(graph, site, clone)
    if together.folded or len(site.nodes) == 1 or not site.separable or site.refusal:
        return [together]
    alone = [Site(node.name, [node], site.channels, site.is_batchnorm) for node in site.nodes]
    outcomes = [_attempt(graph, each, clone) for each in alone]
    return outcomes if any(o.folded for o in outcomes) else [together]


def _attempt(graph: Graph, site: Site, clone: bool) -> Outcome:
    if site.refusal is not None:
        return Outcome(site, False, reason=site.refusal)
    reasons = []
    for push, where in ((_push_up, "before it"), (_push_down, "behind it")):
        if where == "behind it" and not _may_go_down(site):
            continue
        try:
            draft = _checked(graph, site, push(site))
        except Blocked as blocked:
            reasons.append(f"{where}: {blocked}")
            continue
        return _commit(graph, site, draft)
    if clone and (found := _with_clones(graph, site)) is not None:
        return found
    return Outcome(site, False, reason="; ".join(reasons))


def _commit(graph: Graph, site: Site, draft: Draft, note: str = "") -> Outcome:
    for (node, role), update in draft.items():
        node.params[role].update = node.params[role].updated(update)
    for node in site.nodes:
        graph.bypass(node)
    into = sorted({node for node, _ in draft}, key=lambda node: node.index)
    return Outcome(site, True, tuple(into), note=note)


def _with_clones(graph: Graph, site: Site) -> Outcome | None:
    """Upwards once more, doubling whatever has another user; None, and everything as it was, where that doesn't do it."""
    clones = Clones(graph)
    while True:
        try:
            outcome = _commit(graph, site, _checked(graph, site, _push_up(site)), clones.note)
            graph.clones += [copy for _, copy in clones.made]
            return outcome
        except Shared as shared:
            if clones.add(shared):
                continue
        except Blocked:
            pass
        clones.undo()
        return None


def _may_go_down(site: Site) -> bool:
    """A constant Mul or Add that isn't a BatchNorm goes down only if it is preprocessing.

    Elsewhere it may belong to a pattern that runtimes know (a layer normalisation written out), which must stay whole.
    """
    return site.is_batchnorm or all(node.inputs[0].producer is None for node in site.nodes)


# --- the search: one state per choice, depth first -----------------------------------------------------------------------------


@dataclass
class _State:
    agenda: list[int] = field(default_factory=list)  # a heap of node keys, the next to visit first
    maps: Maps = field(default_factory=dict)
    draft: Draft = field(default_factory=dict)
    fail: Blocked | None = None

    def visit(self, key: int) -> None:
        if key not in self.agenda:
            heapq.heappush(self.agenda, key)

    def take(self, node: Node, step: Step) -> _State:
        return _State(list(self.agenda), dict(self.maps), self.draft | {(node, role): update for role, update in step.updates.items()})


def _search(start: _State, advance: Callable[[_State], list[_State]]) -> Draft:
    """The draft of the first way on which nothing is blocked; else the reason of the first way tried."""
    stack, first = [start], None
    for _ in range(ATTEMPTS):
        state = stack.pop()
        try:
            while state.agenda and state.fail is None:
                state, *others = advance(state)
                stack.extend(reversed(others))
            if state.fail is not None:
                raise state.fail
            return state.draft
        except Blocked as blocked:
            first = first or blocked
        except ValueError as error:  # of numpy: no input makes such a network run, whatever sizes its file leaves open
            first = first or Blocked(f"the sizes of its constants don't fit each other ({error})")
        if not stack:
            break
    assert first is not None
    raise first


def _named(node: Node, blocked: Blocked) -> Blocked:
    reason = f"{node.label} {node.name} blocks, {blocked}"
    return Shared(reason, blocked.value, blocked.uses) if isinstance(blocked, Shared) else Blocked(reason)


def _push_up(site: Site) -> Draft:
    """Backwards: every user of a value states the map that it wants, and all of them must agree."""
    nodes = {-node.index: node for node in site.nodes}
    start = _State()
    for key in nodes:
        start.visit(key)

    def advance(state: _State) -> list[_State]:
        node = nodes[heapq.heappop(state.agenda)]
        try:
            wanted, *others = (_wanted(value, state.maps) for value in node.outputs)
            if not all(a.is_identity for a in others):
                raise Blocked("only its first output may carry a map")
            if node in site.nodes:
                steps = [Step([wanted.after(coefficients(node))])]
            else:
                steps = [Step([])] if wanted.is_identity else rule_of(node).up(node, wanted)
        except Blocked as blocked:
            raise _named(node, blocked) from None
        return [demand(state.take(node, step), node, step.maps) for step in steps]

    def demand(state: _State, node: Node, maps: list[Affine]) -> _State:
        for i, a in enumerate(maps):
            if a.is_identity:
                continue
            if (producer := node.inputs[i].producer) is None:
                state.fail = state.fail or Blocked(f"{node.inputs[i].name} is an input of the model")
                continue
            state.maps[node, i] = a
            nodes[-producer.index] = producer
            state.visit(-producer.index)
        return state

    return _search(start, advance)


def _wanted(value: Value, demands: Maps) -> Affine:
    """What the users of a value, taken together, want to happen to it; elements that none of them reads are free."""
    wishes: list[tuple[str, Affine]] = []
    for user, i in value.users:
        if (user, i) in demands:
            wishes.append((f"is also used by {user.name}", demands[user, i]))
        else:
            wishes.append((f"is also used by {user.name}", _as_is(user, i, value)))
    if value.is_output:
        wishes.append(("is an output of the model", Affine.identity(value.rank or 0)))
    merged = None
    # those who want a map come first, so that a conflict names one who doesn't
    for clause, a in sorted(wishes, key=lambda wish: bool(np.nan_to_num(wish[1].scale, nan=1.0).min() == 1) and wish[1].is_identity):
        if merged is None:
            merged = a
            continue
        scales, shifts = np.broadcast_arrays(merged.scale, a.scale), np.broadcast_arrays(merged.shift, a.shift)
        for one, other in (scales, shifts):
            if ((one != other) & ~np.isnan(one) & ~np.isnan(other)).any():
                raise Shared(f"its output {clause}", value, [use for use in value.users if use in demands])
        merged = Affine(*(np.where(np.isnan(one), other, one) for one, other in (scales, shifts)))
    return Affine.identity(value.rank or 0) if merged is None else merged.settled()


def _as_is(user: Node, i: int, value: Value) -> Affine:
    """The identity on all that a user reads of a value; a move may leave some of it unread, and that is free."""
    if user.op == "Move" and user.output.rank is not None:
        if "reads" not in user.attrs:  # the same for every site: what an operator moves doesn't change
            try:
                user.attrs["reads"] = move_up(user, Affine.identity(user.output.rank), shrink=False)
            except Blocked:
                user.attrs["reads"] = None
        if user.attrs["reads"] is not None:
            return user.attrs["reads"][i]  # type: ignore[no-any-return]
    return Affine.identity(value.rank or 0)


def _push_down(site: Site) -> Draft:
    """Forwards: whatever comes out of a node goes into all of its users, and none of it may reach an output."""
    nodes = {node.index: node for node in site.nodes}
    start = _State()
    for key in nodes:
        start.visit(key)

    def advance(state: _State) -> list[_State]:
        node = nodes[heapq.heappop(state.agenda)]
        maps = [state.maps.get(value, Affine.identity(value.rank or 0)) for value in node.inputs]
        try:
            steps = [Step([coefficients(node).after(maps[0])])] if node in site.nodes else rule_of(node).down(node, maps)
        except Blocked as blocked:
            raise _named(node, blocked) from None
        return [release(state.take(node, step), node, step.maps[0]) for step in steps]

    def release(state: _State, node: Node, a: Affine) -> _State:
        if a.is_identity:
            return state
        value = node.output
        if value.is_output:
            state.fail = state.fail or Blocked(f"{value.name} is an output of the model")
        if len(node.outputs) > 1:
            state.fail = state.fail or Blocked(f"{node.name} has several outputs")
        state.maps[value] = a
        for user, _ in value.users:
            nodes[user.index] = user
            state.visit(user.index)
        return state

    return _search(start, advance)


# --- before a draft is committed -------------------------------------------------------------------------------------------------


def _checked(graph: Graph, site: Site, draft: Draft) -> Draft:
    """The draft without its empty updates; Blocked where it can't be written. The one place where sharing is decided.

    A weight that several operators use may change only if it changes alike for all of them, or if the front-end can give
    each its own copy.
    """
    draft = {key: update for key, update in draft.items() if not _is_empty(key[0].params[key[1]], update)}
    for (node, role), update in draft.items():
        param = node.params[role]
        if node.attrs.get("grows_add") and role == "bias" and param.tensor is None and not site.is_batchnorm:
            raise Blocked(f"{node.name} has no bias, and a constant operator isn't worth a new one")
        if param.tensor is None and role == "bias" and "no_bias" in node.attrs:
            raise Blocked(f"{node.name} has no bias, and {node.attrs['no_bias']}")
        if not graph.copies_weights:
            _fits_sharers(node, role, draft)
        if param.tensor is not None and param.tensor.quantised is not None:
            _fits_integers(param.tensor.name, param.tensor.quantised, param.rescaling(param.updated(update)))
        fits_type(node, role, param, update)
    return draft


def _fits_sharers(node: Node, role: str, draft: Draft) -> None:
    """Blocked unless all who read a parameter get it changed alike. One that isn't there yet is read wherever the layer's others are."""
    param, update = node.params[role], draft[node, role]
    if param.tensor is not None:
        name, uses = param.tensor.name, param.tensor.users
    else:
        name = f"the {role}"
        held = [(other, each.tensor) for other, each in node.params.items() if each.tensor is not None]
        uses = [(user, role) for other, tensor in held for user, theirs in tensor.users if theirs == other]
    for user, other in uses:
        twin = draft.get((user, other))
        if twin is None or user.params[other].layout.name != param.layout.name or not twin.same_as(update):
            raise Blocked(f"{name} of {node.name} is shared with {user.name}")


def _is_empty(param: Param, update: Affine) -> bool:
    if param.tensor is None and param.update is None:
        return bool((update(param.default) == param.default).all())
    return update.is_identity


def _fits_integers(name: str, stored: Quantised, rescaling: tuple[int, Array] | None) -> None:
    """Blocked unless a quantised weight stays what its integers say, up to a scale for each channel."""
    if rescaling is None:
        where = "any one axis" if stored.axis is None else f"axis {stored.axis}"
        raise Blocked(f"{name} is quantised, and can be scaled along {where} alone")
    axis, scales = rescaling
    if stuck := [k for k, (s, able) in enumerate(zip(scales, stored.negatable(axis), strict=True)) if s < 0 and not able]:
        raise Blocked(f"{name} is quantised, and channel {stuck[0]} would need the negative of an integer that has none")


def fits_type(node: Node, role: str, param: Param, update: Affine) -> None:
    """Blocked where a coefficient would overflow its stored type, or would be no number."""
    limit = node.attrs["limit"] if param.tensor is None else param.tensor.limit
    total = param.updated(update)
    if param.tensor is not None and param.layout.linear:
        bound = _magnitude(param.tensor) * param.layout.gain * np.abs(total.scale).max(initial=0) + np.abs(total.shift).max(initial=0)
        if bound < limit:
            return
    with np.errstate(all="ignore"):
        stored = param.layout.stored(total(_source(param)))
    bad = ~(np.abs(stored) <= limit)
    if bad.any():
        name = param.tensor.name if param.tensor is not None else f"the {role} of {node.name}"
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        value = stored[where]
        what = "would be no number" if np.isnan(value) else f"would be {value:.3g}, beyond the largest {limit:.3g} of its type"
        raise Blocked(f"element {list(where)} of {name} {what}")


def _source(param: Param) -> Array:
    return np.full(param.shape, param.default) if param.tensor is None else param.layout.canonical(param.tensor.read())


def _magnitude(tensor: Tensor) -> float:
    """The largest absolute value of a stored tensor, remembered; infinite where one is not finite."""
    if tensor.magnitude is None:
        array = tensor.read()
        largest = float(max(array.max(initial=0.0), -array.min(initial=0.0)))
        tensor.magnitude = largest if np.isfinite(largest) else float("inf")
    return tensor.magnitude
