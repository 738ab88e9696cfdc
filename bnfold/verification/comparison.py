"""Two models, and how they are held against each other: what every level of `verify` goes by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from bnfold.errors import UnsupportedError
from bnfold.model import Model

if TYPE_CHECKING:
    from bnfold.recalibration.protocol import Progress


@dataclass(frozen=True)
class Comparison:
    """One verification. made_up: whether the data are random, so that it isn't the models' fault if they don't fit.

    thorough: with several runs for the yardstick, and a look at whether the reference is a function of its inputs at all.
    """

    reference: Model
    candidate: Model
    progress: Progress
    made_up: bool
    thorough: bool = True

    @property
    def unit(self) -> float:
        """Unit roundoff of the coarser of their types."""
        return max(self.reference.roundoff, self.candidate.roundoff)

    @cached_property
    def depth(self) -> int:
        """How many linear operators of the reference stand behind each other; 1 where that can't be told."""
        try:
            return max(self.reference.plan().graph.depth(), 1)
        except UnsupportedError:
            return 1
