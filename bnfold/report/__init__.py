"""What each verb reports. Keys may be added, never renamed.

`inputs` and `seconds` are filled in by whoever knows them: the command line knows the files, a library call that got a live model doesn't.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .base import InputFile as InputFile
from .base import Report as Report

Verdict = Literal["equivalent", "different", "inconclusive"]
Word = Literal["improved", "harmed", "no effect"]


@dataclass(frozen=True)
class Layer:
    """What became of one BatchNorm, or would; batchnorm: False for another constant affine operator, which is listed where it folded."""

    name: str
    channels: int  # 0 where they aren't known
    verdict: Literal["folded", "kept"]
    into: tuple[str, ...]  # the operators that hold its coefficients now
    reason: str  # why it was kept; empty where it was folded
    notes: tuple[str, ...] = ()  # health and hazards: dead channels, weights that became subnormal
    batchnorm: bool = True


@dataclass(frozen=True)
class Merged:
    """Parallel linear branches that became one operator."""

    into: str
    branches: tuple[str, ...]


@dataclass(frozen=True)
class Counts:
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class FuseReport(Report):
    """bytes_added: what copies of shared weights add to the model."""

    schema = "bnfold.fuse/1"
    batchnorms: Counts
    layers: tuple[Layer, ...]
    merged: tuple[Merged, ...] = ()
    bytes_added: int = 0
    verify: VerifyReport | None = None  # the check before writing; None with check=False
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether anything folds or merges."""
        return bool(self.merged) or any(layer.verdict == "folded" for layer in self.layers)

    @property
    def kept(self) -> tuple[Layer, ...]:
        """The BatchNorms that stay."""
        return tuple(layer for layer in self.layers if layer.verdict == "kept")

    @property
    def failure(self) -> str:
        """What `--strict` says of them; empty where none stays."""
        count = len(self.kept)
        return f"--strict: {count} BatchNorm{'s stay' if count > 1 else ' stays'}" if count else ""


@dataclass(frozen=True, kw_only=True)
class InspectReport(FuseReport):
    """As for `fuse`, and `verdict` is what `fuse` would do. certificate: of a folded model, see `certificate`."""

    schema = "bnfold.inspect/1"
    certificate: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class LayerStatistics:
    """How one BatchNorm's statistics changed; each figure is the worst channel's.

    count: elements per channel that were pooled (0: no data reached it, and its statistics stay). mean_shift: |new mean - old mean| in
    old standard deviations. var_ratio: new variance / old variance, of the channel in which it is furthest from 1. stderr: standard error
    of the data's mean in their standard deviations. var_stderr: that of their variance, over the variance. worst_channel: the one whose
    statistics moved furthest, from 0 on. dead: channels that are constant on these data.
    """

    name: str
    count: int
    mean_shift: float
    var_ratio: float
    stderr: float
    var_stderr: float = 0.0
    channels: int = 0
    worst_channel: int = 0
    dead: int = 0


@dataclass(frozen=True)
class Accuracy:
    """Share of samples whose largest output is their label, with sqrt(p (1 - p) / samples); the mean cross-entropy in nats, likewise."""

    accuracy: float
    stderr: float
    samples: int
    loss: float = 0.0
    loss_stderr: float = 0.0


@dataclass(frozen=True)
class Effect:
    """What a change did to the scores of the same samples, as differences after - before with the standard errors of paired samples.

    verdict: by the accuracy where it moved by more than two standard errors, else by the loss likewise.
    """

    verdict: Word
    accuracy: float
    accuracy_stderr: float
    loss: float
    loss_stderr: float


@dataclass(frozen=True, kw_only=True)
class RecalibrateReport(Report):
    """method, variance: as `methods` has them; variance is "biased" or "unbiased". before: the old statistics by layer, not in `to_dict`.

    until: the standard error that was asked for; reached: whether these samples were enough for it.
    """

    schema = "bnfold.recalibrate/1"
    method: str
    samples: int
    layers: tuple[LayerStatistics, ...]
    variance: str = "biased"
    until: float | None = None
    reached: bool | None = None
    held_bytes: int = 0  # most bytes of activations held at once
    spilled_bytes: int = 0  # bytes that went to disk past the memory budget
    accuracy_before: Accuracy | None = None
    accuracy_after: Accuracy | None = None
    effect: Effect | None = None
    notes: tuple[str, ...] = ()
    before: Mapping[str, Any] = field(default_factory=dict, repr=False, metadata={"hidden": True})


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
    """Level 2. error: largest relative difference of the two in float64; yardstick: what rounded weights explain."""

    verdict: Literal["equivalent", "different", "inconclusive", "skipped"]
    error: float = 0.0
    yardstick: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Deployment:
    """Level 3, one row per provider, precision and optimisation level. ratio: the candidate's error over the reference's own.

    precision: "full", with float32 in full, or "as deployed", with what the provider does by itself (TF32); where there are both, the
    first decides. share: of the candidate's nodes, those that ran on the provider, `nodes` of `of`; None where nobody can say. counted:
    by the runtime's own record ("session"), the profile of a run ("profile") or the operators that a run called ("operators").
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


@dataclass(frozen=True, kw_only=True)
class VerifyReport(Report):
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


@dataclass(frozen=True, kw_only=True)
class PipelineReport(Report):
    """What each step reported; None for a step that didn't run."""

    schema = "bnfold.pipeline/1"
    recalibrate: RecalibrateReport | None = None
    fuse: FuseReport | None = None
    verify: VerifyReport | None = None
    accuracy_before: Accuracy | None = None
    accuracy_after: Accuracy | None = None
    effect: Effect | None = None
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
