"""The matrix of cases: every situation of the catalogue, by theme. `ALL` holds them in the order of the files."""

from __future__ import annotations

from . import (
    channels,
    convolutions,
    forms,
    forward,
    health,
    linear,
    moves,
    norms,
    operators,
    pools,
    precision,
    quantised,
    scopes,
    sharing,
    sums,
)
from .builder import Net
from .case import Case

ALL: list[Case] = [
    *convolutions.CASES,
    *linear.CASES,
    *moves.CASES,
    *channels.CASES,
    *pools.CASES,
    *sums.CASES,
    *forward.CASES,
    *norms.CASES,
    *sharing.CASES,
    *scopes.CASES,
    *precision.CASES,
    *health.CASES,
    *quantised.CASES,
    *forms.CASES,
    *operators.CASES,
]

__all__ = ["ALL", "Case", "Net"]
