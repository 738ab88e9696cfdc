"""What becomes of a network's BatchNorms: fold, then merge parallel branches, then fold what was in their way; and the report of it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Graph, Node, Site, Value
from bnfold.report import Counts, Equalised, FuseReport, Layer, Merged

from .branches import May, Merge, always, merge
from .clamps import clamped, free, joined
from .dead import Narrowed, drop, narrowed
from .equalise import equalise
from .linear import Chains, Magnitudes, join
from .lower import Written, lower, work
from .norms import move
from .options import PLAIN, FoldOptions
from .ranges import in_target, weight_ranges
from .search import Outcome, fold


@dataclass(frozen=True)
class Planned:
    """A decided plan, whose updates are in the graph. removed: the affine nodes that go, those apart that merged into another branch, and
    all that became part of the linear operator before or behind it (chains).

    equalised: what became of ranges; scaled: the operators whose weights that, or the scale of a normalisation, changed. said: what of
    normalisations stays. work: multiply-adds for a sample, before and after. written: operators in the place of others. fewer: what goes.
    clamped: the names of those that clip by channel now.
    """

    outcomes: tuple[Outcome, ...]
    merges: tuple[Merge, ...]
    removed: tuple[Node, ...]
    equalised: tuple[Equalised, ...] = ()
    scaled: tuple[Node, ...] = ()
    written: tuple[Written, ...] = ()
    said: tuple[str, ...] = ()
    work: tuple[int | None, int | None] = (None, None)
    fewer: Narrowed = field(default_factory=Narrowed)
    clamped: tuple[str, ...] = ()
    chains: Chains = field(default_factory=Chains)

    @property
    def changes(self) -> bool:
        others = self.scaled or self.merges or self.written or self.fewer.nodes or self.chains.removed or self.chains.behind
        return bool(others) or any(outcome.folded for outcome in self.outcomes)

    def report(
        self, notes: Mapping[Node, str], *, bytes_added: int, others: Iterable[Layer] = (), said: tuple[str, ...] = ()
    ) -> FuseReport:
        """The report, with all BatchNorms that the model holds, and calls of them before and after.

        notes: on nodes that absorbed something. others: the model's BatchNorms that the plan didn't see. said: the report's notes.
        """
        others, (before, after) = tuple(others), self.work
        layers = (*(_layer(o, notes) for o in self.outcomes if o.site.is_batchnorm or o.folded), *others)
        calls = [(len(o.site.nodes), o.verdict) for o in self.outcomes if o.site.is_batchnorm]
        calls += [(1, layer.verdict) for layer in others]
        counts = Counts(sum(n for n, _ in calls), sum(n for n, verdict in calls if verdict == "kept"))
        merged = tuple(Merged(host.name, branches) for host, branches in _by_host(self.merges).items())
        changed = {node for outcome in self.outcomes if outcome.folded for node in outcome.into}
        hosts, gone = {m.host for m in self.merges}, {m.branch for m in self.merges} | {*self.chains.into}
        ranges = weight_ranges(sorted((changed | hosts | {*self.scaled}) - gone, key=lambda node: node.index), hosts)
        return FuseReport(
            batchnorms=counts,
            lowered=sum(n for n, verdict in calls if verdict == "lowered"),
            layers=layers,
            merged=merged,
            equalised=self.equalised,
            composed=self.chains.composed,
            dropped=self.fewer.dropped,
            clamped=self.clamped,
            ranges=ranges,
            bytes_added=bytes_added,
            multiply_adds=None if before is None or after is None else Counts(before, after),
            notes=(*said, *self.said),
        )


@dataclass(frozen=True)
class NormalForm:
    """A model of which all is planned that can be folded; nothing is written.

    outputs: those of the model, by name. inputs: the values that a caller feeds. constants: outputs that are the same whatever goes in,
    and what inputs are where nobody feeds them. narrowest: the largest number of the narrowest floating-point type in which it computes,
    and the operator that gives it. hosts: the operators that hold others before or behind them (see `linear.Chains`).
    """

    graph: Graph
    outputs: Mapping[str, Value]
    outcomes: tuple[Outcome, ...]
    merges: tuple[Merge, ...] = ()
    inputs: frozenset[Value] = frozenset()
    constants: Mapping[str, Array] = field(default_factory=dict)
    narrowest: tuple[float, str] = (np.inf, "")
    hosts: Mapping[Node, Magnitudes] = field(default_factory=dict)

    def renamed(self, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> NormalForm:
        """The same under other names, by those that it has."""
        for value in {*self.inputs, *self.outputs.values(), *(v for node in self.graph.nodes for v in node.inputs)}:
            if value.producer is None:
                value.name = inputs.get(value.name, value.name)
        constants = {
            f"output {outputs.get(name[7:], name[7:])}" if name.startswith("output ") else name: array
            for name, array in self.constants.items()
        }
        return replace(self, outputs={outputs.get(name, name): value for name, value in self.outputs.items()}, constants=constants)


# --- every BatchNorm that a model holds, so that no report tells of fewer -------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """A BatchNorm in a model. key: what the back-end knows it by; why: the reason why nobody could meet it, or didn't."""

    key: Any
    name: str
    channels: int
    why: str


def missed(listed: Iterable[Listed], met: Container[Any]) -> list[Listed]:
    """Those of the model's BatchNorms that were not met."""
    return [each for each in listed if each.key not in met]


def kept(listed: Iterable[Listed], met: Container[Any]) -> list[Layer]:
    """The same, as layers that stay."""
    return [Layer(each.name, each.channels, "kept", (), each.why) for each in missed(listed, met)]


# --- the plan ------------------------------------------------------------------------------------------------------------------------


def plan(
    graph: Graph, options: FoldOptions = PLAIN, may: May | None = always, replaceable: Callable[[Site], bool] = lambda site: True
) -> Planned:
    """Decide what folds, and what becomes of the rest. may: which branches may merge, if any. replaceable: whether the front-end can put
    other operators in the place of a site's."""
    graph.one_scale = "--keep-per-tensor leaves it one" if options.keep_per_tensor else ""
    affine = [node for site in graph.sites for node in site.nodes]
    before = work(graph)
    if options.clamps:
        free(graph)
    outcomes = fold(graph, clone=options.clone)
    merges: list[Merge] = []
    while may is not None and (more := merge(graph, may, merges)):
        merges += more
        numbers = _numbers_behind(graph, [m.host for m in more], {node for o in outcomes for node in o.site.nodes})
        affine += numbers
        outcomes += [Outcome(Site(node.name, [node], 1, is_batchnorm=False), False) for node in numbers if node in graph.nodes]
        outcomes = _after_merging(graph, outcomes, {m.branch: m.host for m in more if m.branch is not None}, options.clone)
    moved: list[Node] = []
    said: list[str] = []
    if options.norm_affine:
        outcomes, moved, said = move(graph, outcomes)
    barred = set() if graph.copies_weights else {m.host for m in merges}
    fewer = drop(graph, barred) if options.drop_dead else Narrowed()
    merges = [narrowed(m, fewer) for m in merges]
    chains = join(graph, barred) if options.merge_linear else Chains()
    if chains.removed:
        outcomes = _after_merging(graph, chains.outcomes(outcomes), {}, options.clone)
    stays = {*graph.nodes, *(m.branch for m in merges)}  # or is taken out as a branch
    removed = [node for node in affine if node not in stays]
    # A module's code goes on adding the value itself, by which the host's weight is less than the one that is planned.
    added = {m.host: "its input is added to what it gives" for m in merges if m.branch is None and not graph.copies_weights}
    equalised, scaled = equalise(graph, added) if options.equalise else ([], [])
    written = list(clamped(graph))
    clips = tuple(each.node.name for each in written)
    if options.lower is not None:
        outcomes, lowered = lower(graph, outcomes, options.lower, replaceable)
        written += lowered
    if options.flush_subnormals:
        written = [replace(each, flush=True) for each in written]
        for _, _, param in graph.updates():
            param.flush = True
    said += in_target(graph, written, options.target) if options.target is not None else []
    return Planned(
        tuple(outcomes),
        tuple(merges),
        tuple(dict.fromkeys([*removed, *chains.removed])),
        tuple(equalised),
        (*moved, *scaled),
        tuple(written),
        tuple(said),
        (before, work(graph, written)),
        fewer,
        clips,
        chains,
    )


def normal_form(
    graph: Graph,
    outputs: Mapping[str, Value],
    options: FoldOptions = PLAIN,
    *,
    inputs: Iterable[Value] = (),
    constants: Mapping[str, Array] = MappingProxyType({}),
) -> NormalForm:
    """A graph with all planned that can be folded, for `verify`: without operators that do nothing, which other tools take out.

    outputs: the values that a caller gets, by name. inputs, constants: see `NormalForm`.
    """
    limits = [(float(node.attrs["limit"]), f"{node.label} {node.name}") for node in graph.nodes if "limit" in node.attrs and node.inputs]
    for node in [n for n in graph.nodes if n.op == "Identity" and len(n.inputs) == len(n.outputs) == 1]:
        graph.bypass(node)  # it may stand in the way of a merge
    planned = plan(graph, options)
    if options.clamps:
        joined(graph)
    left = set(graph.nodes)
    ends = {name: graph.end(value, left) for name, value in outputs.items()}
    narrowest = min(limits, key=lambda each: each[0], default=(np.inf, ""))
    return NormalForm(graph, ends, planned.outcomes, planned.merges, frozenset(inputs), constants, narrowest, planned.chains.hosts)


def _after_merging(graph: Graph, outcomes: list[Outcome], into_host: Mapping[Node, Node], clone: bool) -> list[Outcome]:
    """The outcomes, now that some BatchNorms went into the host of their branch, and some sums that were in the way are gone."""
    found: list[Outcome] = []
    for outcome in outcomes:
        site = outcome.site
        if outcome.folded or site.refusal is not None:
            found.append(outcome)
            continue
        left = [node for node in site.nodes if node not in into_host]
        for node in (node for node in site.nodes if node in into_host):
            found.append(Outcome(Site(node.name, [node], site.channels, site.is_batchnorm, note=site.note), True, (into_host[node],)))
        if left:
            name = site.name if len(left) == len(site.nodes) else left[0].name
            graph.sites = [Site(name, left, site.channels, site.is_batchnorm, site.separable, note=site.note)]
            found += fold(graph, clone=clone)
    return found


def _numbers_behind(graph: Graph, hosts: Iterable[Node], known: set[Node]) -> list[Node]:
    """Numbers by which a merged sum is multiplied, or that are added to it: no sites before. One that does nothing (the 0 with which a
    loop over branches begins) is taken out."""
    found: list[Node] = []
    left = {*graph.nodes} if graph.copies_weights else ()  # a module's code stays
    for host in dict.fromkeys(host for host in hosts if host in left):
        value = host.output
        while len(value.users) == 1 and not value.is_output and (node := value.users[0][0]).op == "Affine" and node not in known:
            if coefficients(node).is_identity:
                graph.bypass(node)
            else:
                value = node.output
            found.append(node)
    return found


def _by_host(merges: Iterable[Merge]) -> dict[Node, tuple[str, ...]]:
    """For each operator that is left, the names of all branches that ended in it."""
    into: dict[Node, list[str]] = {}
    for m in merges:
        names = into.pop(m.branch, []) if m.branch is not None else []
        into.setdefault(m.host, [m.host.name]).extend([m.branch.name if m.branch is not None else "identity", *names[1:]])
    return {host: tuple(names) for host, names in into.items()}


def _layer(outcome: Outcome, notes: Mapping[Node, str]) -> Layer:
    site = outcome.site
    said = [notes[node] for node in (outcome.into if outcome.folded else site.nodes) if node in notes]
    if dead := site.nodes[0].attrs.get("dead"):
        said.append(f"{dead} of its {site.channels} channels {'is' if dead == 1 else 'are'} dead (gamma is 0)")
    if len(site.nodes) > 1:
        said.append(f"called {len(site.nodes)} times")
    if (norm := site.nodes[0].attrs.get("norm")) is not None and (odd := norm.unmeasured):
        said.append(odd)
    if site.note:
        said.append(site.note)
    if outcome.note:
        said.append(outcome.note)
    if not site.is_batchnorm and not outcome.note:
        said.append(f"a constant {site.nodes[0].label}, not a BatchNorm")
    into = tuple(dict.fromkeys(node.name for node in outcome.into))
    if outcome.lowered:
        said.append(outcome.lowered)
    reason = "" if outcome.folded else outcome.reason
    return Layer(site.name, site.channels, outcome.verdict, into, reason, tuple(said), site.is_batchnorm)
