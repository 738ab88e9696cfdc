"""Whether a model gives one answer when it is asked twice: one with a random operator, or with dropout in training mode, doesn't."""

from __future__ import annotations

from bnfold.errors import UnsupportedError
from bnfold.model import Model

from .yardstick import Run, Truth

EXACT = 1e-9  # of the largest number: within this two runs in float64 agree


def unsteady(first: Run, second: Run, truth: Truth, slack: float) -> str:
    """How two runs of the reference differ, "" where they don't. slack: what may differ, relatively to the largest number."""
    for name, tally in Truth(first, truth.feeds[:1]).compare(second).items():
        if tally.problem or tally.peak > slack * (truth.scale(name, 0.0).largest or 1.0):
            return f"the reference differs from itself between two runs, in output {name}"
    return ""


def unsteady_oracle(reference: Model, truth: Truth) -> str:
    """The same of the reference in float64, made anew for each run."""
    try:
        return unsteady(reference.exact().run, reference.exact().run, truth, EXACT)
    except UnsupportedError:
        return ""
