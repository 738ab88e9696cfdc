"""What `recalibrate` reports: how each BatchNorm's statistics changed, and what that did to the scores of labelled samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .base import Report

Word = Literal["improved", "harmed", "no effect"]


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
class ScoredReport(Report):
    """What labelled samples say; None where there are none, or where a step failed before."""

    accuracy_before: Accuracy | None = None
    accuracy_after: Accuracy | None = None
    effect: Effect | None = None

    @property
    def harm(self) -> str:
        """By how much the scores fell, where they did; empty elsewhere."""
        before, after = self.accuracy_before, self.accuracy_after
        if before is None or after is None or self.effect is None or self.effect.verdict != "harmed":
            return ""
        scores = f"accuracy {100 * before.accuracy:.1f} % before and {100 * after.accuracy:.1f} % after"
        scores += f", loss {before.loss:.4g} and {after.loss:.4g}"
        return f"harmed: on {before.samples:,} labelled samples, {scores}"


@dataclass(frozen=True, kw_only=True)
class RecalibrateReport(ScoredReport):
    """method, variance: as `methods` has them; variance is "biased" or "unbiased". before, after: mean and variance
    of each channel by layer, not in `to_dict`.

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
    notes: tuple[str, ...] = ()
    before: Mapping[str, Any] = field(default_factory=dict, repr=False, metadata={"hidden": True})
    after: Mapping[str, Any] = field(default_factory=dict, repr=False, metadata={"hidden": True})
