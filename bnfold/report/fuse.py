"""What `fuse` and `inspect` report: what became of each BatchNorm, or would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from bnfold.text import counted

from .base import Report
from .verify import VerifyReport


@dataclass(frozen=True)
class Counts:
    before: int
    after: int


@dataclass(frozen=True)
class Layer:
    """What became of one BatchNorm, or would; batchnorm: False for another constant affine operator, which is listed where it folded."""

    name: str
    channels: int  # 0 where they aren't known
    verdict: Literal["folded", "lowered", "kept"]  # lowered: written as other operators, of which a note tells
    into: tuple[str, ...]  # the operators that hold its coefficients now
    reason: str  # why it doesn't fold; empty where it does
    notes: tuple[str, ...] = ()  # health and hazards: dead channels, weights that became subnormal
    batchnorm: bool = True


@dataclass(frozen=True)
class Merged:
    """Parallel linear branches that became one operator."""

    into: str
    branches: tuple[str, ...]


@dataclass(frozen=True)
class WeightRange:
    """How a weight's range changed. before, after: the largest over the median of its output channels' largest magnitudes.

    error_before, error: how far int8 with one scale for the whole weight puts the weights of the median channel off: their median error
    over their median magnitude. warning: where that is so much that a quantiser per tensor will suffer; else empty.
    """

    name: str
    before: float
    after: float
    error_before: float
    error: float
    warning: str = ""


@dataclass(frozen=True)
class Equalised:
    """Channels whose ranges were made to match, or why they weren't. layers: that make them; into: that read them.

    factor: the largest by which a channel was multiplied or divided.
    """

    layers: tuple[str, ...]
    into: tuple[str, ...]
    reason: str = ""
    factor: float = 1.0


@dataclass(frozen=True)
class Dropped:
    """Output channels of a layer with weights. dropped: how many leave; dead: how many hold the same number whatever goes in; reason: why
    some of those stay."""

    name: str
    channels: int
    dropped: int
    dead: int
    reason: str = ""


@dataclass(frozen=True)
class Composed:
    """Linear layers in a row. into: the operator that they became; reason: why they stay as they are, where they do. multiply_adds: of
    these alone, for one sample; None where they aren't known. behind: the average behind which the layer stands now, before which it stood.
    """

    layers: tuple[str, ...]
    into: str
    reason: str = ""
    multiply_adds: Counts | None = None
    behind: str = ""


class Size(NamedTuple):
    """Of a model: the operators that compute, constants apart; the bytes of what is stored; and the floating-point numbers among it."""

    operators: int
    bytes: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class FuseReport(Report):
    """bytes_added: what copies of shared weights add to the model. operators: how many compute, constants apart; bytes: of weights and
    other constants as stored; parameters: floating-point numbers among these. All are None where the model would have to be read once
    more to tell.
    """

    schema = "bnfold.fuse/1"
    batchnorms: Counts
    layers: tuple[Layer, ...]
    merged: tuple[Merged, ...] = ()
    lowered: int = 0  # BatchNorms that other operators stand for now
    equalised: tuple[Equalised, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    clamped: tuple[str, ...] = ()  # what clips by bounds of each channel now, since a map passed it
    composed: tuple[Composed, ...] = ()
    ranges: tuple[WeightRange, ...] = ()  # of the operators whose weights change
    bytes_added: int = 0
    multiply_adds: Counts | None = None  # of the layers with weights, for one sample; None where a size isn't known
    verify: VerifyReport | None = None  # the check before writing; None with check=False
    notes: tuple[str, ...] = ()
    operators: Counts | None = None
    bytes: Counts | None = None
    parameters: Counts | None = None

    def sized(self, before: Size | None, after: Size | None) -> FuseReport:
        """The report with `operators`, `bytes` and `parameters`, where both models know how large they are."""
        if before is None or after is None:
            return self
        operators, size, parameters = map(Counts, before, after)
        return replace(self, operators=operators, bytes=size, parameters=parameters)

    @property
    def changes(self) -> bool:
        """Whether anything folds, merges, is lowered or equalised, or loses channels."""
        more = any(each.factor != 1 for each in self.equalised) or any(each.dropped for each in self.dropped) or bool(self.merged)
        return more or any(each.into for each in self.composed) or any(layer.verdict != "kept" for layer in self.layers)

    @property
    def kept(self) -> tuple[Layer, ...]:
        """The BatchNorms that stay."""
        return tuple(layer for layer in self.layers if layer.verdict == "kept")

    @property
    def failure(self) -> str:
        """What `--strict` says of them; empty where none stays."""
        count = len(self.kept)
        return f"--strict: {count} BatchNorm{'s stay' if count > 1 else ' stays'}" if count else ""

    @property
    def in_training(self) -> str:
        """What to say of BatchNorms that stay since they are in training mode; empty where none does."""
        count = sum("it is in training mode" in layer.reason for layer in self.kept)
        return f"{counted(count, 'BatchNorm')} in training mode can't fold: call eval() on the model, or export it so" if count else ""

    @property
    def doubt(self) -> str:
        """Why the check is inconclusive; empty where it isn't, or was left out."""
        return self.verify.reason if self.verify is not None and self.verify.verdict == "inconclusive" else ""


@dataclass(frozen=True, kw_only=True)
class InspectReport(FuseReport):
    """As for `fuse`, and `verdict` is what `fuse` would do. certificate: of a folded model, see `certificate`."""

    schema = "bnfold.inspect/1"
    certificate: Mapping[str, Any] | None = None
