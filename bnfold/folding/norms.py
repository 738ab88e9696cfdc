"""The constant scale and shift of a layer, group, instance or RMS normalisation, moved into all that reads it.

    W*(g*n(x) + b) + c = (W*g)*n(x) + (W*b + c)

where n(x) has no coefficients. Rotations of the activations between (Ashkboos et al. 2024, QuaRot, section 3) ask for that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Affine, Blocked
from bnfold.algebra.graph import Graph, Node, Site

from .feasible import checked
from .search import Outcome, apply, commit, push_down


def move(graph: Graph, outcomes: Iterable[Outcome]) -> tuple[list[Outcome], list[Node], list[str]]:
    """The outcomes, with those of normalisations; the operators that changed; and what stays, in a sentence each.

    A scale or shift that a graph has as an operator of its own goes. Where a module's code holds it, it becomes ones or zeros.
    """
    found: list[Outcome] = []
    changed: list[Node] = []
    for outcome in outcomes:
        site = outcome.site
        if not outcome.folded and not site.is_batchnorm and site.refusal is None and _behind(site.nodes):
            try:
                outcome = commit(graph, site, push_down(graph, replace(site, is_batchnorm=True)))  # as worth a copy as that
                changed += outcome.into
            except Blocked:
                pass
        found.append(outcome)
    said = []
    in_sites = {node for outcome in found for node in outcome.site.nodes}
    for node in [node for node in graph.nodes if node not in in_sites and _holds(graph, node)]:
        name, size = node.name.partition(", call ")[0], max(param.read().size for param in node.params.values())
        site = Site(name, [node], size)
        neutral = {"gamma": Affine(np.zeros(()), np.ones(())), "beta": Affine(np.zeros(()), np.zeros(()))}
        try:
            draft = push_down(graph, site) | {(node, role): neutral[role] for role in node.params}
            into = tuple(each for each in apply(checked(graph, site, draft)) if each is not node)
        except Blocked as blocked:
            said.append(f"the scale and shift of {node.label} {name} stay: {blocked}")
            continue
        changed += [node, *into]
        note = f"the scale and shift of a {node.label}, which are ones and zeros now"
        found.append(Outcome(replace(site, is_batchnorm=False), True, into, note=note))
    return found, changed, said


def _holds(graph: Graph, node: Node) -> bool:
    """Whether a normalisation, or a constant in a module's code behind one, has coefficients that do something."""
    if not node.params or (node.op != "Normalisation" and graph.copies_weights):
        return False
    constant = node.op == "Affine" and "norm" not in node.attrs and node.attrs.get("gain") == 1.0 and _behind([node])
    vector = any(len(param.shape) > param.shape.count(1) for param in node.params.values())
    return (node.op == "Normalisation" or (constant and vector)) and not coefficients(node).is_identity


def _behind(nodes: Iterable[Node]) -> bool:
    """Whether all of them take what an operator gives: constants at the input of a model are no part of a normalisation."""
    for node in nodes:
        while (maker := node.inputs[0].producer) is not None and maker.op == "Affine":
            node = maker
        if maker is None:
            return False
    return True
