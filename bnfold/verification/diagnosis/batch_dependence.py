"""Whether a value depends on the other samples in its batch, as in training mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bnfold.algebra.graph import Value
from bnfold.errors import BnfoldError

from ..normal_form import Normal
from ..pairing import Pair

if TYPE_CHECKING:
    from bnfold.data import Batch

    from .localise import Sides

MOVED = 1e3  # units of roundoff of the largest number


def depends_on_the_batch(sides: Sides, pair: Pair, feeds: Batch | None) -> bool:
    """Whether the candidate's value for the first sample changes with the rest of the batch, and the reference's doesn't."""
    if feeds is None:
        return False
    return _mixes(sides, sides.candidate, pair.candidate, feeds) and not _mixes(sides, sides.reference, pair.reference, feeds)


def _mixes(sides: Sides, side: Normal, value: Value, feeds: Batch) -> bool:
    name = side.stands.get(value)
    batch = {key: array for key, array in feeds.items() if array.ndim}
    if name is None or len(batch) < len(feeds) or not batch:
        return False
    if min(len(a) for a in batch.values()) < 2:
        batch = {key: np.concatenate([a, (a * a.dtype.type(0.5)).astype(a.dtype)]) for key, a in batch.items()}
    try:
        whole, alone = (
            next(array for _, array in side.stream(fed, [name], exact=sides.exact))
            for fed in (batch, {key: np.concatenate([a[:1], a[:1]]) for key, a in batch.items()})
        )
    except (BnfoldError, StopIteration):
        return False
    if whole.ndim != alone.ndim or whole.shape[1:] != alone.shape[1:] or not whole[:1].size or not whole.ndim:
        return False
    size = float(np.abs(whole[:1]).max(initial=0.0))
    return bool(np.abs(whole[:1] - alone[:1]).max() > MOVED * sides.unit * size)
