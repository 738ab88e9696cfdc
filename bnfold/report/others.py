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
class ExplainReport(Report):
    """What there is to say of a rule, an operator or a BatchNorm, line by line."""

    schema = "bnfold.explain/1"
    what: str
    text: tuple[str, ...]


@dataclass(frozen=True)
class Latency:
    """How long calls took, in seconds: the median, and what one in twenty and one in a hundred passes. throughput: samples per second."""

    p50: float
    p95: float
    p99: float
    throughput: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of one batch size: medians over interleaved rounds, in seconds per call; ratio: candidate / reference of these, with its 95 %
    interval by a bootstrap over the rounds, each of which has both. latencies: of the reference's and the candidate's single calls.
    """

    batch_size: int
    reference: float
    candidate: float
    ratio: float
    ratio_low: float
    ratio_high: float
    latencies: tuple[Latency, ...] = ()

    @property
    def faster(self) -> str:
        """Which one is, "reference" or "candidate"; empty where the interval holds 1: then these rounds don't tell."""
        return "candidate" if self.ratio_high < 1 else "reference" if self.ratio_low > 1 else ""


@dataclass(frozen=True, kw_only=True)
class BenchReport(Timing, Report):
    """The first batch size, and under `timings` all of them."""

    schema = "bnfold.bench/1"
    provider: str
    rounds: int
    optimisation: str = "on"  # ONNX Runtime's own: "off" or "on"
    threads: int | None = None  # that one operator may use; None is the runtime's choice
    timings: tuple[Timing, ...] = ()
