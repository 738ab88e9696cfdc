"""Reports for readers, and for other programs: what a report comes to, once for every rendering.

A rendering (`terminal`, `html`, `ci`) knows nothing of reports: it shows rows (one finding each), or lines, tables and
drawings (`documents`), and escapes what stands in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bnfold.report.base import Report
from bnfold.report.fuse import FuseReport
from bnfold.report.others import PipelineReport
from bnfold.report.verify import VerifyReport
from bnfold.report.words import headline, scores
from bnfold.text import counted

VERDICTS = ("equivalent", "different", "inconclusive", "improved", "harmed", "no effect")
# Whether what a word says of a model is good news.
GOOD = ("equivalent", "improved", "folded", "folds", "lowered")
BAD = ("different", "harmed", "failed", "error", "worse")
DOUBTFUL = ("inconclusive", "kept", "stays")


@dataclass(frozen=True)
class Row:
    """One finding. suite: the level that it is of; found: its figures; reason: what there is to say about the verdict."""

    suite: str
    name: str
    verdict: str  # a level's or a BatchNorm's; or "worse", "failed" or "broken"
    found: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Headline:
    """All that a report comes to, in a few words each, of which a verdict may be one."""

    parts: Sequence[str]


@dataclass(frozen=True)
class Line:
    """A line of plain text, before which a verdict may stand, and before that what it is about. title: of what follows."""

    text: str = ""
    verdict: str = ""
    about: str = ""
    title: bool = False


@dataclass(frozen=True)
class Bar:
    """In a cell: a bar of so much of the longest; infinity is longer."""

    share: float


@dataclass(frozen=True)
class Picture:
    """In a cell, or over a column, of a page alone: SVG in which everything is escaped."""

    svg: str


Cell = str | Bar | Picture


@dataclass(frozen=True)
class Table:
    """Plain text in cells. prose: whether the last column holds sentences. Without rows there is no table.

    names: the columns of names, whose common beginning and end may be left out; spare: the columns that may be, the first one first.
    """

    title: str
    columns: Sequence[str | Picture]
    rows: Sequence[Sequence[Cell]]
    prose: bool = True
    names: Sequence[int] = (0,)
    spare: Sequence[int] = ()


@dataclass(frozen=True)
class Drawing:
    """A picture for a page alone, in HTML in which everything is escaped."""

    title: str
    markup: str
    caption: str


Part = Headline | Line | Table | Drawing


def verified(report: Report) -> VerifyReport | None:
    """The verdict in a report, where there is one."""
    return report if isinstance(report, VerifyReport) else getattr(report, "verify", None)


def folded(report: Report) -> FuseReport | None:
    """What became of the BatchNorms, where a report says so."""
    return report.fuse if isinstance(report, PipelineReport) else report if isinstance(report, FuseReport) else None


def rows(report: Report) -> Iterator[Row]:
    """The verdict, the levels that it comes from, what labelled samples say, and the BatchNorms."""
    if (verdict := verified(report)) is not None:
        yield Row("verdict", "verdict", verdict.verdict, ", ".join(headline(report)), verdict.reason)
        yield from levels(verdict)
    if isinstance(report, PipelineReport) and report.effect is not None:
        found = ", ".join(scores(report.accuracy_before, report.accuracy_after, None))
        yield Row("scores", "scores", report.effect.verdict, found, report.harm)
    if (fused := folded(report)) is not None:
        for layer in fused.layers:
            yield Row("BatchNorms", layer.name or "(no name)", layer.verdict, ", ".join(layer.into), layer.reason)


def levels(report: VerifyReport) -> Iterator[Row]:
    """The three levels: what each measured, and what it says."""
    c, f = report.levels.coefficients, report.levels.function
    found = f"worst of {counted(c.checked, 'array')} off by {c.worst:.2g} times the unit roundoff" if c.checked else ""
    yield Row("coefficients", "coefficients", c.verdict, found, c.reason)
    found = "" if f.verdict == "skipped" else f"off by {f.error:.2g}; rounded weights explain {f.yardstick:.2g}"
    yield Row("function", "function, in float64", f.verdict, found, f.reason)
    for row in report.levels.deployment:
        erred = "" if row.verdict == "skipped" else f"{row.ratio:.2g} times the reference's error (at most {row.limit:g})"
        yield Row("deployment", row.name, row.verdict, joined(erred, row.placed), row.reason)


def joined(*texts: str) -> str:
    """Those of the texts that say something."""
    return "; ".join(filter(None, texts))
