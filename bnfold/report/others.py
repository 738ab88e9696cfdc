"""What the verbs report that are made of others, or stand beside them."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Report
from .fuse import FuseReport
from .recalibrate import RecalibrateReport, ScoredReport
from .verify import VerifyReport


@dataclass(frozen=True, kw_only=True)
class PipelineReport(ScoredReport):
    """What each step reported; None for a step that didn't run."""

    schema = "bnfold.pipeline/1"
    recalibrate: RecalibrateReport | None = None
    fuse: FuseReport | None = None
    verify: VerifyReport | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Medians over interleaved rounds, in seconds per call; ratio: candidate / reference, round by round, and its quartiles."""

    schema = "bnfold.bench/1"
    provider: str
    rounds: int
    batch_size: int
    reference: float
    candidate: float
    ratio: float
    ratio_low: float
    ratio_high: float
    optimisation: str = "on"  # ONNX Runtime's own: "off" or "on"
