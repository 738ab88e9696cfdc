"""What `verify` reports: three levels, and the verdict that they come to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .base import Report

Verdict = Literal["equivalent", "different", "inconclusive"]


@dataclass(frozen=True)
class Coefficients:
    """Level 1. worst: the largest error of a stored coefficient, in unit roundoffs of its type; checked: how many arrays.

    certified: of so many of the reference's batchnorms all coefficients were found, and found right. uncertified: the names of the others.
    """

    verdict: Literal["equivalent", "different", "skipped"]
    checked: int = 0
    worst: float = 0.0
    reason: str = ""
    certified: int = 0
    batchnorms: int = 0
    uncertified: tuple[str, ...] = ()


@dataclass(frozen=True)
class Function:
    """Level 2. error: largest relative difference of the two in float64; yardstick: what rounded weights explain. before_rounding: of both
    without the rounding of activations to integers, across whose steps a right fold may move some."""

    verdict: Literal["equivalent", "different", "inconclusive", "skipped"]
    error: float = 0.0
    yardstick: float = 0.0
    reason: str = ""
    before_rounding: bool = False


@dataclass(frozen=True)
class Deployment:
    """Level 3, one row per provider, precision and optimisation level. ratio: the candidate's error over the reference's own.

    precision: "full", with float32 in full, or "as deployed", with what the provider does by itself (TF32); where there are both, the
    first decides. share: of the candidate's nodes, those that ran on the provider, `nodes` of `of`; None where nobody can say. counted:
    by the runtime's own record ("session"), the profile of a run ("profile") or the operators that a run called ("operators"). limit: the
    ratio up to which a candidate is right.
    """

    provider: str
    optimisation: str  # "off" or "on"
    ratio: float
    verdict: Literal["equivalent", "different", "inconclusive", "skipped"] = "equivalent"
    reason: str = ""
    precision: str = "full"
    share: float | None = None
    nodes: int = 0
    of: int = 0
    counted: str = ""
    limit: float = 2.0

    @property
    def name(self) -> str:
        return f"{self.provider}{'' if self.precision == 'full' else f' {self.precision}'}, optimisation {self.optimisation}"

    @property
    def placed(self) -> str:
        """Which nodes ran there, in words; empty where it goes without saying."""
        if self.share is None or self.provider == "cpu":
            return ""
        what = {"session": "nodes", "profile": "nodes (by a profile)", "operators": "operators"}[self.counted]
        return f"{self.nodes:,} of {self.of:,} {what} on {self.provider.partition(':')[0]}"


@dataclass(frozen=True)
class Levels:
    coefficients: Coefficients
    function: Function
    deployment: tuple[Deployment, ...]


@dataclass(frozen=True)
class OutputError:
    """One output. max_abs, max_rel: the largest difference, and that over the output's own largest magnitude;
    error_ratio: the candidate's error against the float64 oracle over the reference's own, in the stored type."""

    name: str
    max_abs: float
    max_rel: float
    error_ratio: float


@dataclass(frozen=True)
class Certified:
    """Of `verify --against`: the verdict that the certificate states, and whether it holds."""

    stated: str | None
    holds: bool
    reason: str


@dataclass(frozen=True)
class Difference:
    """The first layer at which two models part, and the worst place in it.

    what: "output", or the coefficient ("weight", "bias", ...) where no output shows it; position: its element, in the first batch that was
    fed; expected, found: the numbers there. cause: what explains it, in words; batchnorm: the one whose fold is in question.
    """

    layer: str
    channel: int | None
    position: tuple[int, ...]
    expected: float | None
    found: float | None
    cause: str
    what: str = "output"
    batchnorm: str = ""


@dataclass(frozen=True)
class LayerError:
    """How far one layer's values are off, in their stored types, those of the same layer of the reference in float64: the root mean square
    of the error over that of the values. reference: of the reference itself, whose rounding it is; candidate: of the candidate.
    """

    name: str
    operator: str
    reference: float
    candidate: float


Mark = Literal["same", "holds", "folded", "merged", "lowered", "differs", "gone", "new"]


@dataclass(frozen=True)
class PairedOperator:
    """Two operators that stand at the same place of two networks; one of them is None where only the other network has it.

    mark: what became of it. holds: the candidate's has taken something up; folded, merged: it is gone into another; lowered:
    a BatchNorm that other operators stand for; gone, new: without a
    counterpart. note: what it was folded or merged into, or what it holds. reads: the rows of the operators whose outputs the reference's
    reads; candidate_reads: the candidate's likewise.
    """

    reference: str | None
    candidate: str | None
    operator: str
    mark: Mark
    note: str = ""
    reads: tuple[int, ...] = ()
    candidate_reads: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VerifyReport(Report):
    """samples: how many were compared, 0 where neither model was run; data: where they come from, "" where nobody said.

    layers, graph: with `by_layer`; the graph, both networks operator by operator, is not in `to_dict`.
    """

    schema = "bnfold.verify/1"
    verdict: Verdict
    levels: Levels
    outputs: tuple[OutputError, ...] = ()
    first_difference: str | None = None
    difference: Difference | None = None
    bundle: str = ""  # the folder that shows the first difference by itself, where one was written
    reason: str = ""  # one sentence: why this verdict
    certificate: Certified | None = None
    notes: tuple[str, ...] = ()
    samples: int = 0
    data: str = ""
    layers: tuple[LayerError, ...] = ()
    graph: tuple[PairedOperator, ...] = field(default=(), repr=False, metadata={"hidden": True})

    @property
    def equivalent(self) -> bool:
        """Whether the verdict is that; neither different nor inconclusive models are equivalent."""
        return self.verdict == "equivalent"

    def __bool__(self) -> bool:
        return self.equivalent
