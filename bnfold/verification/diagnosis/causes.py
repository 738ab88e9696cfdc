"""Why a layer differs, decided by trying: its coefficients are folded again with each mistake that is known to be made, and the one that
gives what the candidate holds, to rounding, is named. What nothing explains is called that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bnfold.algebra.graph import Node

from ..pairing import Pair
from .batch_dependence import depends_on_the_batch
from .channel_order import orders
from .fold_mistakes import mistakes
from .furthest import Coefficient, channels_off, furthest
from .held import both_held
from .other_statistics import other_statistics
from .settings import another_operator, at_the_border, narrower, normaliser, not_finite, other_settings, refused

if TYPE_CHECKING:
    from bnfold.data import Batch

    from .localise import Compared, Sides

UNEXPLAINED = "nothing that was tried explains it"


@dataclass(frozen=True)
class Cause:
    """In words, the name of the BatchNorm whose fold is in question, and the coefficient that is furthest off."""

    text: str
    batchnorm: str
    furthest: Coefficient


def cause_of(sides: Sides, pair: Pair | None, compared: Compared | None, feeds: Batch | None) -> Cause:
    """What explains the difference at a pair of operators. compared: their values, where these differ."""
    if pair is None:
        return Cause(UNEXPLAINED, "", Coefficient())
    p, q = pair.node, pair.other
    if q is None:
        return Cause(f"the candidate has nothing in the place of {p.label} {p.name}", "", Coefficient())
    sites = [node for node in sides.reference.sites.get(p, []) if "norm" in node.attrs] or ([p] if "norm" in p.attrs else [])
    batchnorm = sites[0] if sites else normaliser(p)
    name = "" if batchnorm is None else sides.reference.name_of(batchnorm)
    text = next(_explanations(sides, pair, q, compared, feeds, sites, name), None)
    return Cause(text or UNEXPLAINED + channels_off(p, q), name, furthest(p, q))


def _explanations(
    sides: Sides, pair: Pair, q: Node, compared: Compared | None, feeds: Batch | None, sites: list[Node], name: str
) -> Iterator[str]:
    """The likeliest first. q: the candidate's operator; sites: the BatchNorms that went into the reference's; name: of the first."""
    p = pair.node
    mixes = partial(depends_on_the_batch, sides, pair, feeds)
    yield from refused(sides.candidate, p, q, mixes)
    yield from not_finite(p, q)
    if compared is not None and compared.border:
        yield from at_the_border(p, name)
    yield from another_operator(p, q)
    if (both := both_held(p, q)) is not None:
        want, have = both
        if len(sites) == 1:
            kept = any("norm" in node.attrs for node in (q, *sides.candidate.sites.get(q, [])))
            yield from mistakes(name, sites[0], p, want, have, folded=not kept)
        yield from orders(want, have, int(p.attrs.get("groups", 1)), sites)
        if len(sites) == 1 and sites[0].index >= p.index:
            yield from other_statistics(name, sites[0], want, have)
    yield from other_settings(p, q)
    if compared is not None and mixes():
        yield "training mode: the candidate's output for one sample depends on the others in its batch"
    yield from narrower(sides.reference, sides.candidate)


def is_right(pair: Pair) -> bool:
    """Whether an operator's coefficients and settings are the reference's: then its value differs for another's sake."""
    p, q = pair.node, pair.other
    if q is None or p.op != q.op or any(True for _ in other_settings(p, q)) or (both := both_held(p, q)) is None:
        return False
    want, have = both
    return have.is_explained(want.weight, want.bias, np.full_like(want.bias, np.abs(want.bias).max(initial=0.0)))
