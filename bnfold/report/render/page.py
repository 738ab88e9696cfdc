"""A report as a page: what it comes to, what a person must look at, then everything that it knows, with pictures."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bnfold.report.base import Report
from bnfold.report.fuse import FuseReport, InspectReport
from bnfold.report.others import BenchReport, ExplainReport, PipelineReport
from bnfold.report.recalibrate import RecalibrateReport
from bnfold.report.verify import VerifyReport
from bnfold.report.words import headline

from . import Cell, Drawing, Headline, Line, Part, Picture, Table, drawings, folded, tables, verified
from .documents import document

STRIPS = 1.0  # of a logarithm to base 2: what the strips of variances show in full at least


def page(report: Report) -> list[Part]:
    """All of a report, what decides first."""
    verdict, fused = verified(report), folded(report)
    recalibrated = report if isinstance(report, RecalibrateReport) else getattr(report, "recalibrate", None)
    parts: list[Part] = [Headline(headline(report))]
    if verdict is not None:
        parts += [tables.findings(verdict)] if verdict.verdict == "equivalent" else [Line(verdict.reason, verdict.verdict)]
        parts += tables.first_difference(verdict)
        if verdict.certificate is not None:
            parts.append(Line(verdict.certificate.reason))
    if isinstance(report, (PipelineReport, RecalibrateReport)):
        parts += tables.effects(report)
    if isinstance(report, (BenchReport, ExplainReport)):
        parts += document(report)[1:]
    parts += [Line(note) for note in dict.fromkeys(_notes(report))]
    if fused is not None:
        parts += _folded(fused)
    if recalibrated is not None:
        parts += _recalibrated(recalibrated)
    if verdict is not None:
        parts += _verified(verdict)
    return parts


def _notes(report: Report) -> Iterator[str]:
    """What each step remarked."""
    for each in (report, *(getattr(report, step, None) for step in ("recalibrate", "fuse", "verify"))):
        yield from getattr(each, "notes", ())


def _folded(report: FuseReport) -> Iterator[Part]:
    yield tables.staying(report)
    yield tables.sizes(report)
    yield tables.layers(report)
    would = "would merge" if isinstance(report, InspectReport) else "merged"
    merges = [(merged.into, ", ".join(merged.branches)) for merged in report.merged]
    yield Table(f"Parallel branches that {would} into one operator", ("operator", "branches"), merges)
    yield tables.ranges(report)
    yield tables.equalised(report)
    if isinstance(report, InspectReport) and report.certificate is not None:
        yield Line("Certificate, as it states", title=True)
        yield from map(Line, tables.certificate(report.certificate))


def _recalibrated(report: RecalibrateReport) -> Iterator[Part]:
    yield tables.drift(report)
    yield Line(tables.MOVED)
    yield Line(tables.measured(report))
    moved: dict[str, tuple[list[float], list[float]]] = {}
    for name, (mean, variance) in report.before.items():
        if name in report.after:
            new_mean, new_variance = report.after[name]
            with np.errstate(all="ignore"):
                shift = np.where(new_mean == mean, 0.0, np.abs(new_mean - mean) / np.sqrt(variance))
                ratio = np.where(new_variance == variance, 0.0, np.log2(new_variance / variance))
            moved[name] = shift.ravel().tolist(), ratio.ravel().tolist()
    tops = [max((abs(v) for pair in moved.values() for v in pair[i] if np.isfinite(v)), default=0.0) for i in (0, 1)]
    tops[1] = max(tops[1], STRIPS)
    cells: list[tuple[Cell, ...]] = [
        (
            name or tables.NAMELESS,
            Picture(drawings.strip(shift, tops[0], f"{name}: means moved by")),
            Picture(drawings.strip(ratio, tops[1], f"{name}: variances moved by")),
        )
        for name, (shift, ratio) in moved.items()
    ]
    titles = (f"mean moved by, of {tops[0]:.3g} at most", f"variance times, of {2 ** tops[1]:.3g} at most, either way")
    yield Table("Drift by channel", ("BatchNorm", *titles), cells, prose=False)


def _verified(report: VerifyReport) -> Iterator[Part]:
    yield tables.of_levels(report)
    yield tables.outputs(report)
    if report.layers:
        low, high = drawings.decades(report.layers)
        cells: list[tuple[Cell, ...]] = [
            (
                each.name or each.operator,
                each.operator,
                f"{each.reference:.1e}",
                f"{each.candidate:.1e}",
                Picture(drawings.dots(each, low, high)),
            )
            for each in report.layers
        ]
        titles = ("layer", "operator", "reference", "candidate", Picture(drawings.axis(low, high)))
        yield Table("Error by layer, against float64", titles, cells, prose=False)
        yield Line(
            "the root mean square of the error over that of the values, in the stored types: the ring is the reference itself, whose "
            "rounding it is, the dot is the candidate"
        )
    if report.graph:
        caption = "in the order in which operators run; lines are values, from the operator that makes one to those that read it"
        yield Drawing("Both networks", drawings.graph(report.graph), caption)
