"""What a report comes to, row by row, for the files that other programs read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from bnfold.report import FuseReport, PipelineReport, Report, VerifyReport

# What XML 1.0 can't hold, not even escaped; half a pair of UTF-16 (a path that isn't UTF-8 has them) can't be encoded at all.
UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Row:
    """One finding. suite: the level that it is of; found: its figures; reason: what there is to say about the verdict."""

    suite: str
    name: str
    verdict: str  # a level's or a BatchNorm's; or "worse", "failed" or "broken"
    found: str = ""
    reason: str = ""


def printable(text: str) -> str:
    """The text with a replacement character for what no file of text should hold."""
    return UNPRINTABLE.sub("\ufffd", text)


def verified(report: Report) -> VerifyReport | None:
    """The verdict in a report, where there is one."""
    return report if isinstance(report, VerifyReport) else getattr(report, "verify", None)


def folded(report: Report) -> FuseReport | None:
    """What became of the BatchNorms, where a report says so."""
    return report.fuse if isinstance(report, PipelineReport) else report if isinstance(report, FuseReport) else None


def rows(report: Report) -> Iterator[Row]:
    """The verdict, the levels that it comes from, and the BatchNorms."""
    if (verdict := verified(report)) is not None:
        yield Row("verdict", "verdict", verdict.verdict, reason=verdict.reason)
        yield from levels(verdict)
    if (fused := folded(report)) is not None:
        for layer in fused.layers:
            yield Row("BatchNorms", layer.name or "(no name)", layer.verdict, ", ".join(layer.into), layer.reason)


def levels(report: VerifyReport) -> Iterator[Row]:
    """The three levels: what each measured, and what it says."""
    c, f = report.levels.coefficients, report.levels.function
    found = f"worst of {c.checked} arrays off by {c.worst:.2g} units of roundoff" if c.checked else ""
    yield Row("coefficients", "coefficients", c.verdict, found, c.reason)
    found = "" if f.verdict == "skipped" else f"off by {f.error:.2g}; rounded weights explain {f.yardstick:.2g}"
    yield Row("function", "function, in float64", f.verdict, found, f.reason)
    for row in report.levels.deployment:
        erred = "" if row.verdict == "skipped" else f"errs {row.ratio:.2g} times as much as the reference"
        found = "; ".join(text for text in (erred, row.placed) if text)
        yield Row("deployment", row.name, row.verdict, found, row.reason)


def counted(channels: int) -> str:
    """A layer's channels, which a file may leave open."""
    return f"{channels:,}" if channels else "unknown"
