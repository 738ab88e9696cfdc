"""What is folded on the paths through a module, which has one code and one set of weights for all of them.

A BatchNorm may go, and a weight may change, if that is so on every path that comes by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from bnfold.algebra.graph import Node
from bnfold.folding.options import FoldOptions
from bnfold.folding.plan import Planned, plan
from bnfold.folding.search import Outcome

from ..export.trace import Traced
from ..export.walk import frame
from ..lowering.module_host import ModuleHost
from ..lowering.places import Place
from ..lowering.table import lowering
from .module import Fold
from .removal import may_merge, removals

ALIKE = 1e-9  # relative; what two paths make of one weight comes from the same numbers

Key = tuple[Literal["tensor", "layer", "module"], str]  # a tensor that is there; one that a layer's call makes; a module that goes


@dataclass(frozen=True, eq=False)
class Edit:
    """What changes at one place. sites: the names of those for whose sake alone; none for a merge of branches and for equalised ranges."""

    value: object
    sites: frozenset[str]


@dataclass(frozen=True, eq=False)
class Path:
    """One path through a module, planned. text: which it is."""

    text: str
    planned: Planned
    fold: Fold

    @property
    def host(self) -> ModuleHost:
        host = self.fold.ctx.host
        assert isinstance(host, ModuleHost)
        return host

    @cached_property
    def edits(self) -> dict[Key, Edit]:
        """What is changed in the module, by its place."""
        into: dict[Node, set[str]] = {}
        for outcome in self.planned.outcomes:
            for node in outcome.into if outcome.folded else ():
                into.setdefault(node, set()).add(plain_name(outcome.site.name))
        merged = {m.host for m in self.planned.merges} | {*self.planned.scaled, *self.planned.fewer.nodes, *self.planned.chains.hosts}
        found: dict[Key, Edit] = {}
        for update in self.fold.updates():
            there = not update.grows and update.place.how == "stored"
            sites = into.get(update.node, set()) if update.node not in merged else set()
            found["tensor" if there else "layer", update.place.target] = Edit(update.exact, frozenset(sites))
        for site, removal in self.fold.removed.items():
            edit = Edit(removal.kept, frozenset({plain_name(site.name)}))
            if removal.path is not None:
                found["module", self.host.canonical(removal.path)] = edit
            for name in self.fold.made_identity(removal):
                found["tensor", name] = Edit(self.fold.left(site), edit.sites)
        for path, written in self.fold.written.items():
            sites = into.get(written.node, {plain_name(s.name) for s in self.fold.removed if written.node in s.nodes})
            numbers = np.concatenate([array.ravel() for array in written.constants.values()])
            found["module", self.host.canonical(path)] = Edit(numbers, frozenset(sites))
        for m in self.planned.merges:
            if m.branch is not None:
                found["module", self.host.canonical(frame(m.branch.native.op))] = Edit("merged", frozenset())
        for node in self.planned.chains.into:
            found["module", self.host.canonical(frame(node.native.op))] = Edit("joined", frozenset())
        return found

    def comes_by(self, key: Key) -> bool:
        kind, name = key
        if kind == "tensor":
            return name in self._read
        return bool(self.host.inside(name if kind == "module" else Place(name).owner))

    @cached_property
    def _read(self) -> set[str]:
        """The tensors of the module that somebody reads, by the names under which they would be written."""
        found = set()
        for op in self.fold.ctx.program.graph.nodes:
            for source in op.all_input_nodes if op.op == "call_function" else ():
                stored = self.fold.ctx.constants.stored(source)
                if stored is not None:
                    place = self.host.weight(op, source)
                    found |= {stored.target, place.target if isinstance(place, Place) else stored.target}
        return found

    def outcome(self, site: str) -> Outcome | None:
        return next((each for each in self.planned.outcomes if plain_name(each.site.name) == site), None)


class Allowed(NamedTuple):
    """Whether parallel branches may merge, and with what options sites are folded."""

    merging: bool
    options: FoldOptions


@dataclass(frozen=True)
class Conflict:
    """Two paths that don't fold alike: sites that may not fold then, each with the reason; none where it is what else is done."""

    refused: Mapping[str, str]


def path_of(text: str, traced: Traced, refused: Mapping[str, str], allowed: Allowed) -> Path:
    """The plan for one path. refused: sites that may not fold, and why."""
    ctx = lowering(traced)
    graph = ctx.graph()
    ways = removals(ctx, graph.sites)
    for site in graph.sites:
        site.refusal = site.refusal or refused.get(plain_name(site.name))
    for node in (node for site, way in ways.items() if way.path is None for node in site.nodes):
        node.output.is_sized = True  # its call stays, with as many channels as its parameters have
    may = may_merge(ctx, {site: way for site, way in ways.items() if site.refusal is None}) if allowed.merging else None
    modules = {node: site for site, way in ways.items() if way.path is not None for node in site.nodes}
    planned = plan(graph, allowed.options, may, lambda site: {*site.nodes} == {*modules.get(site.nodes[0], site).nodes} & {*modules})
    for outcome in planned.outcomes:
        if not outcome.folded and (way := ways.get(outcome.site)) is not None and way.path is None:
            outcome.site.note = ""  # on what its call does once it is folded
    way_of = {node: (site, way) for site, way in ways.items() for node in site.nodes}  # a site that folds at last is another object
    firsts = (outcome.site.nodes[0] for outcome in planned.outcomes if outcome.folded)
    removed = dict(way_of[node] for node in firsts if node in way_of)
    lowered = {modules[each.node] for each in planned.written if each.node in modules}
    removed |= {site: ways[site] for site in lowered}
    places = [ways[modules[each.node]].path if each.node in modules else frame(each.node.native.op) for each in planned.written]
    written = {path: each for path, each in zip(places, planned.written, strict=True) if path}
    return Path(text, planned, Fold(ctx, graph, removed, planned, written))


def conflict(paths: list[Path]) -> Conflict | None:
    """What two of the paths don't agree on; None where they do."""
    refused: dict[str, str] = {}
    for one, other, key in _differing(paths):
        mine, theirs = one.edits[key], other.edits.get(key)
        sites = mine.sites | (theirs.sites if theirs is not None else frozenset())
        if not sites:
            return Conflict({})
        for site in sites:
            seen, stated = (one, other) if site in mine.sites else (other, one)
            where = f"with {seen.text} it folds, and with {stated.text} {_why(site, key, stated)}"
            refused.setdefault(site, f"it doesn't fold alike on all paths of the code: {where}")
    return Conflict(refused) if refused else None


def _differing(paths: list[Path]) -> Iterator[tuple[Path, Path, Key]]:
    for one in paths:
        for other in paths:
            for key, edit in one.edits.items() if other is not one else ():
                theirs = other.edits.get(key)
                if other.comes_by(key) and (theirs is None or not _same(edit.value, theirs.value)):
                    yield one, other, key


def _same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and np.allclose(one, other, rtol=ALIKE, atol=ALIKE * float(np.abs(one).max(initial=0.0)))
    return type(one) is type(other) and one == other


def _why(site: str, key: Key, path: Path) -> str:
    """What becomes of a site on the path on which it can't be as on another."""
    outcome = path.outcome(site)
    if outcome is None:
        name = key[1] if key[0] == "module" else Place(key[1]).owner
        return f"{name or key[1]} is used without it"
    if not outcome.folded:
        return f"it stays, since {outcome.reason}"
    return f"it would fold into {', '.join(dict.fromkeys(node.name for node in outcome.into))}"


def plain_name(name: str) -> str:
    """A site's name without the number of its call."""
    return name.partition(", call ")[0]
