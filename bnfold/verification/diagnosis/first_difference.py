"""The first layer at which two models part.

Where both can be seen into, `localise` says where and why. A subject of another kind may only know its inner values by name, so there the
first of those that both models have is looked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bnfold.errors import BnfoldError
from bnfold.model import Model

from ..comparison import Comparison
from ..inner_values import chunks, only
from ..verdict import Findings
from ..yardstick import FUNCTION_LIMIT, Truth, function_ratio
from .localise import Located, localise, localise_runtime

if TYPE_CHECKING:
    from bnfold.data import Batch


def first_difference(both: Comparison, found: Findings) -> tuple[str | None, Located | None]:
    """The name of the layer, and all that is known of the place; None for what isn't."""
    if (parted := _located(both, found)) is not None:
        return parted.difference.layer, parted
    return _by_name(both, found), None


def _located(both: Comparison, found: Findings) -> Located | None:
    """By the models' normal forms."""
    both.progress("first difference", 0, None)
    feeds = found.truth.feeds[0] if found.truth is not None and found.truth.feeds else None
    differ = found.function.verdict == "different", found.coefficients.verdict == "different"
    try:
        if any(differ):
            return localise(both.reference, both.candidate, feeds, found.correspondence, values=differ[0], coefficients=differ[1])
        wrong = {row.optimisation: row.provider for row in found.rows if row.verdict == "different"}
        if set(wrong) == {"on"} and feeds is not None:
            return localise_runtime(both.reference, both.candidate, feeds, wrong["on"])
    except BnfoldError:
        pass
    return None


def _by_name(both: Comparison, found: Findings) -> str | None:
    """By what level 1 found, and by the names of inner values."""
    seen = []
    if found.correspondence is not None and found.correspondence.mismatches and found.coefficients.verdict == "different":
        seen.append(found.correspondence.mismatches[0].node.name)
    if found.function.verdict == "different" and found.measured and found.truth is not None and found.truth.feeds:
        try:
            inner = _first_value(both, found.truth.feeds[0])
        except BnfoldError:
            inner = None
        seen += [] if inner is None else [inner]
    places = list(both.reference.layers().values())
    return min(seen, key=lambda name: places.index(name) if name in places else len(places), default=None)


def _first_value(both: Comparison, feeds: Batch) -> str | None:
    """The layer of the first value that differs. A value may also be what it becomes where the reference is folded."""
    reference, candidate = both.reference, both.candidate
    layers, shared = reference.layers(), candidate.layers().keys()
    names = [name for name in layers if name in shared]
    folded, also = _folded(reference)
    done = 0
    for chunk in chunks(names):
        both.progress("first difference", done, len(names))
        done += len(chunk)
        truth = Truth(only(reference, chunk), [feeds], most_bytes=1 << 62)
        truth.measure(lambda seed, chunk=chunk: only(reference, chunk, jitter=seed + 1), least=1, most=1)  # type: ignore[misc]
        tallies = truth.compare(only(candidate, chunk))
        known = [name for name in chunk if name in also]
        right = only(folded, known)(feeds) if folded is not None and known else {}
        theirs = only(candidate, known)(feeds) if known else {}
        for name in chunk:
            scale = truth.scale(name, both.unit)
            if not tallies[name].problem and function_ratio(tallies[name], truth.noise[name], scale) <= FUNCTION_LIMIT:
                continue
            if name in right and right[name].shape == theirs[name].shape and right[name].dtype.kind == "f":
                off = np.abs(right[name] - theirs[name]).max(initial=0.0)
                if off <= FUNCTION_LIMIT * max(truth.noise[name].peak, scale.floor):
                    continue
            return layers[name]
    return None


def _folded(model: Model) -> tuple[Model | None, dict[str, str]]:
    """The model with its BatchNorms folded, and its inner values; none where that can't be."""
    try:
        folded, report = model.folded()
        return (folded, folded.layers()) if any(layer.verdict == "folded" for layer in report.layers) else (None, {})
    except BnfoldError:
        return None, {}
