"""The planner: for every site, push its map through the graph until weights absorb it, or say why that can't be.

Nothing changes until all of a site fits: a push works on a draft, and a refusal drops the draft and keeps the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Affine, Blocked, NoBias
from bnfold.algebra.graph import Graph, Node, Site
from bnfold.algebra.rule import Step, identity
from bnfold.algebra.rules import rule_of

from .demands import demanded
from .duplicate import Clones, Shared
from .feasible import Draft, checked
from .ways import Maps, State, named, search


@dataclass(frozen=True)
class Outcome:
    """What became of a site. into: the nodes that absorbed it; reason: why it doesn't fold; lowered: what it is written as instead."""

    site: Site
    folded: bool
    into: tuple[Node, ...] = ()
    reason: str = ""
    note: str = ""
    lowered: str = ""

    @property
    def verdict(self) -> Literal["folded", "lowered", "kept"]:
        return "folded" if self.folded else "lowered" if self.lowered else "kept"


def fold(graph: Graph, *, clone: bool = False) -> list[Outcome]:
    """Fold every site that can be, in topological order, and again until nothing more moves.

    The updates are left in the graph's parameters, and the folded affine nodes are taken out of it. clone: whether an operator
    whose output has other users too may be doubled for a site's sake.
    """
    done: dict[int, list[Outcome]] = {}
    waiting = sorted(enumerate(graph.sites), key=lambda each: _does_nothing(each[1]))
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


def _does_nothing(site: Site) -> bool:
    """Whether it is a Mul or an Add that changes nothing, as an untrained bias: as long as it is there, it may take the map of another."""
    return not site.is_batchnorm and site.refusal is None and all(coefficients(node).is_identity for node in site.nodes)


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
    reasons, shift_alone = [], False
    for push, where in ((_push_up, "before it"), (push_down, "behind it")):
        if where == "behind it" and not _may_go_down(site):
            continue
        try:
            return commit(graph, site, push(graph, site))
        except Blocked as blocked:
            reasons.append(f"{where}: {blocked}")
            shift_alone |= isinstance(blocked, NoBias) and where == "before it"
    if (divided := _both_ways(graph, site)) is not None:
        return commit(graph, site, divided)
    if clone and (found := _with_clones(graph, site)) is not None:
        return found
    if site.holds_shift and shift_alone:
        try:
            if draft := _push_up(graph, site, scale_alone=True):
                return _leave_shift(graph, site, draft)
        except Blocked:
            pass
    return Outcome(site, False, reason="; ".join(reasons))


def _both_ways(graph: Graph, site: Site) -> Draft | None:
    """Of a site whose calls go together or not at all, some upwards and the others downwards, into different operators."""

    def push(way: Callable[[Graph, Site], Draft], nodes: list[Node]) -> Draft | None:
        with contextlib.suppress(Blocked):
            return way(graph, Site(site.name, nodes, site.channels, site.is_batchnorm))
        return None

    up = [node for node in site.nodes if not site.separable and push(_push_up, [node]) is not None]
    down = [node for node in site.nodes if node not in up]
    one, other = (push(_push_up, up), push(push_down, down)) if up and down else (None, None)
    if one is None or other is None:
        return None
    changed = [*site.nodes, *{node for node, _ in one}, *{node for node, _ in other}]
    return one | other if len(set(changed)) == len(changed) else None


def commit(graph: Graph, site: Site, draft: Draft, note: str = "") -> Outcome:
    into = apply(draft)
    for node in site.nodes:
        graph.bypass(node)
    return Outcome(site, True, into, note=note)


def apply(draft: Draft) -> tuple[Node, ...]:
    """Let the parameters await their updates; whose they are."""
    for (node, role), update in draft.items():
        node.params[role].update = node.params[role].updated(update)
    return tuple(sorted({node for node, _ in draft}, key=lambda node: node.index))


def _leave_shift(graph: Graph, site: Site, draft: Draft) -> Outcome:
    """Let the scale of a site go, and its calls add their shift."""
    into = apply(draft)
    for node in site.nodes:
        shift = coefficients(node).shift
        for role, param in node.params.items():
            if param.tensor is not None:
                param.tensor.users.remove((node, role))
        node.params = {}
        node.attrs.update(gain=1.0, mean=0.0, shift=shift)
    site.note = ""
    note = f"its call stays in the forward, where it now adds its shift alone, for which {into[0].name} has no place"
    return Outcome(site, True, into, note=note)


def _with_clones(graph: Graph, site: Site) -> Outcome | None:
    """Upwards once more, doubling whatever has another user; None, and everything as it was, where that doesn't do it."""
    clones = Clones(graph)
    while True:
        try:
            outcome = commit(graph, site, _push_up(graph, site), clones.note)
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
    """A constant Mul or Add goes down only as preprocessing: elsewhere it may belong to a layer normalisation, which must stay whole."""
    return site.is_batchnorm or all(node.inputs[0].producer is None for node in site.nodes)


# --- one push, either way ---------------------------------------------------------------------------------------------------------


def _push(
    graph: Graph, site: Site, sign: int, ways: Callable[[Node, Maps], list[Step]], hand_on: Callable[[State, Node, list[Affine]], None]
) -> Draft:
    """What the first way makes of parameters that can be written. ways: the options that a node has for the maps that reached it.
    hand_on: takes the maps of one to the nodes that they reach."""
    start = State()
    for node in site.nodes:
        start.visit(node, sign)

    def advance(state: State) -> list[State]:
        node = state.next()
        try:
            steps = ways(node, state.maps)
        except Blocked as blocked:
            raise named(node, blocked) from None
        states = [each.take(node, step) for each, step in zip([*(state.copy() for _ in steps[1:]), state], steps, strict=True)]
        for each, step in zip(states, steps, strict=True):
            hand_on(each, node, step.maps)
        return states

    return search(start, advance, lambda state: checked(graph, site, state.draft))


def _push_up(graph: Graph, site: Site, *, scale_alone: bool = False) -> Draft:
    """Backwards: every user of a value states the map that it wants, and all of them must agree. scale_alone: the site keeps its shift."""

    def ways(node: Node, demands: Maps) -> list[Step]:
        wanted, *others = (demanded(value, demands) for value in node.outputs)
        if not all(a.is_identity for a in others):
            raise Blocked("only its first output may carry a map")
        if node in site.nodes and scale_alone:
            if not wanted.is_identity:
                raise Blocked("another of its calls stands behind it")
            return [Step([coefficients(node).linear])]
        if node in site.nodes:
            return [Step([wanted.after(coefficients(node))])]
        return [Step([])] if wanted.is_identity else rule_of(node).up(node, wanted)

    def demand(state: State, node: Node, maps: list[Affine]) -> None:
        for i, a in enumerate(maps):
            if a.is_identity:
                continue
            if (producer := node.inputs[i].producer) is None:
                state.fail = state.fail or Blocked(f"{node.inputs[i].name} is an input of the model")
                continue
            state.maps[node, i] = a
            state.visit(producer, -1)

    return _push(graph, site, -1, ways, demand)


def push_down(graph: Graph, site: Site) -> Draft:
    """Forwards: whatever comes out of a node goes into all of its users, and none of it may reach an output."""

    def ways(node: Node, carried: Maps) -> list[Step]:
        maps = [carried.get(value, identity(value)) for value in node.inputs]
        return [Step([coefficients(node).after(maps[0])])] if node in site.nodes else rule_of(node).down(node, maps)

    return _push(graph, site, 1, ways, _release)


def taken_up(graph: Graph, site: Site, a: Affine) -> Draft:
    """What becomes of parameters where the first input of a site's operator is mapped, as it alone reads it: of its own, and of those
    behind it."""

    def ways(each: Node, carried: Maps) -> list[Step]:
        first = [a] if each in site.nodes else []
        return rule_of(each).down(each, first + [carried.get(value, identity(value)) for value in each.inputs[len(first) :]])

    return _push(graph, site, 1, ways, _release)


def _release(state: State, node: Node, maps: list[Affine]) -> None:
    """Let what comes out of an operator go into all that reads it."""
    if maps[0].is_identity:
        return
    value = node.output
    if value.is_output:
        state.fail = state.fail or Blocked(f"{value.name} is an output of the model")
    if len(node.outputs) > 1:
        state.fail = state.fail or Blocked(f"{node.name} has several outputs")
    state.maps[value] = maps[0]
    for user, _ in value.users:
        state.visit(user, 1)
