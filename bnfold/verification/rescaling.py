"""Level 1 of `verify` where scales were moved from layer to layer, as equalising ranges does it: they must cancel, to rounding.

Scaling a channel of a layer, and undoing it in all that read the channel, leaves the function as it is and changes nearly every
coefficient. So what the candidate did is done to the reference, channel by channel, as far as the rules allow it; then their coefficients
are comparable as ever. A factor is the ratio of sums over all weights of a channel, in which their rounding averages out, however deep the
network is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from bnfold.algebra.affine import Affine, Array, Blocked
from bnfold.algebra.graph import Node
from bnfold.folding.plan import NormalForm
from bnfold.folding.scales import ScaleGroup, groups

from .structure import ParameterPair, order_of_axes


@contextmanager
def rescaled(reference: NormalForm, pairs: Iterable[ParameterPair]) -> Iterator[dict[Node, Array]]:
    """While this lasts, the reference's normal form has the scales of the candidate's; those of each bias.

    pairs: parameters that correspond.
    """
    weights = {pair.reference: pair for pair in pairs if pair.role == "weight"}
    before: dict[tuple[Node, str], Affine | None] = {}
    biases: dict[Node, Array] = {}
    try:
        for node, group in list(groups(reference.graph)):
            if isinstance(group, str) or (pair := weights.get(node)) is None:
                continue
            try:
                draft = group.scaled(_factors(group, pair)).draft
            except Blocked:
                continue
            for (each, role), update in draft.items():
                param = each.params[role]
                before.setdefault((each, role), param.update)
                param.update = param.updated(update)
                if role == "bias":
                    biases[each] = update.scale.ravel()
        yield biases
    finally:
        for (each, role), old in before.items():
            each.params[role].update = old


def _factors(group: ScaleGroup, pair: ParameterPair) -> Array:
    """By what the candidate multiplied each channel that a layer makes; 1 where nothing says so."""
    p, q = pair.reference, pair.candidate
    want, have = p.params["weight"].read(), q.params[pair.its_role].read()
    axis = 0
    if p.op == "Contraction":
        axis = p.attrs["w"].index(p.attrs["y"][group.axis])
        order = order_of_axes(p, q) if q.op == "Contraction" else None
        have = have if order is None else have.transpose(order)
    others = tuple(i for i in range(want.ndim) if i != axis)
    with np.errstate(all="ignore"):
        factors = np.abs(have).sum(axis=others) / np.abs(want).sum(axis=others)
    if factors.shape != (group.size,):
        return np.ones(group.size)
    return np.where(np.isfinite(factors) & (factors > 0), factors, 1.0)
