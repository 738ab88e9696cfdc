"""A report as a page: what it comes to, what a person must look at, then everything that it knows, with small pictures.

Pictures are SVG and HTML in which everything is escaped: bars of channels, dots of errors, two networks side by side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from html import escape as html_escape

import numpy as np

from bnfold.report.base import Report
from bnfold.report.fuse import FuseReport, InspectReport
from bnfold.report.others import BenchReport, ExplainReport, PipelineReport
from bnfold.report.recalibrate import RecalibrateReport
from bnfold.report.verify import LayerError, PairedOperator, VerifyReport
from bnfold.report.words import headline
from bnfold.text import printable

from . import Cell, Drawing, Headline, Line, Part, Picture, Table, folded, tables, verified
from .documents import document

NUMBER = re.compile(r"\b\d[\d.]*(?:e-\d+| %)")
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
    parts += [Line(note) for note in dict.fromkeys(_notes(report)) if note != getattr(report, "harm", "")]
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
    yield tables.layers(report, reasons=False)  # which the table of those that stay has
    would = "would merge" if isinstance(report, InspectReport) else "merged"
    merges = [(merged.into, ", ".join(merged.branches)) for merged in report.merged]
    yield Table(f"Parallel branches that {would} into one operator", ("operator", "branches"), merges)
    yield tables.ranges(report)
    yield tables.composed(report)
    yield tables.equalised(report)
    yield tables.dropped(report)
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
            Picture(strip(shift, tops[0], f"{name}: means moved by")),
            Picture(strip(ratio, tops[1], f"{name}: variances moved by")),
        )
        for name, (shift, ratio) in moved.items()
    ]
    titles = (f"mean moved by, of {tops[0]:.3g} at most", f"variance times, of {2 ** tops[1]:.3g} at most, either way")
    yield Table("Drift by channel", ("BatchNorm", *titles), cells, prose=False)


def _verified(report: VerifyReport) -> Iterator[Part]:
    yield tables.of_levels(report)
    yield tables.outputs(report)
    if report.layers:
        low, high = decades(report.layers)
        cells: list[tuple[Cell, ...]] = [
            (
                each.name or each.operator,
                each.operator,
                f"{each.reference:.1e}",
                f"{each.candidate:.1e}",
                Picture(dots(each, low, high)),
            )
            for each in report.layers
        ]
        titles = ("layer", "operator", "reference", "candidate", Picture(axis(low, high)))
        yield Table("Error by layer, against float64", titles, cells, prose=False)
        yield Line(
            "the root mean square of the error over that of the values, in the stored types: the ring is the reference itself, whose "
            "rounding it is, the dot is the candidate"
        )
    if report.graph:
        caption = "in the order in which operators run; lines are values, from the operator that makes one to those that read it"
        yield Drawing("Both networks", graph(report.graph), caption)


BREAKS = re.compile(r"(?<=\w[/:])(?=[^\W\d])|(?<=\w\.)(?=[^\W\d]\w*[./]\w)")  # not before a suffix
LONG = re.compile(r"\w{25,}")  # a word that breaks behind underscores too
MOST_BARS = 128  # in a strip; of more channels neighbours share one, which shows the larger
WIDTH, HEIGHT = 256, 28  # of a strip
DOTS = 260  # pixels of an axis of errors
LANES = 10  # of a graph's edges, beside each other
LANE = 9  # pixels
FLAT = "M0 0H.1"  # a path without any width isn't drawn
TOLD = {
    "same": "as it was",
    "holds": "takes up",
    "folded": "folded into",
    "merged": "merged into",
    "lowered": "lowered to",
    "differs": "differs",
    "gone": "only in the reference",
    "new": "only in the candidate",
}


def escaped(text: str) -> str:
    return html_escape(printable(text))


def breakable(name: str) -> str:
    """A name or a text that may go on in the next line, between the parts of a name and not in a number (5.7e-08)."""
    text = "<wbr>".join(map(escaped, BREAKS.split(name)))
    return NUMBER.sub(r"<span class=whole>\g<0></span>", LONG.sub(lambda word: re.sub(r"(?<=_)(?=[^\W_])", "<wbr>", word[0]), text))


def strip(values: Sequence[float], top: float, what: str) -> str:
    """A bar for each channel, up to the size of the largest of all strips; what does not fit an axis (infinity, NaN) is drawn in full."""
    step = math.ceil(len(values) / MOST_BARS) or 1
    bars = []
    width = WIDTH / max(math.ceil(len(values) / step), 1)
    for i in range(0, len(values), step):
        size = max(abs(v) if math.isfinite(v) else math.inf for v in values[i : i + step])
        high = HEIGHT * min(size / top, 1.0) if top and math.isfinite(size) else HEIGHT if size else 0.0
        if high > 0.05:
            bars.append(f"M{i / step * width:.1f} {HEIGHT}v-{high:.1f}h{max(width - (width > 3), 0.6):.1f}v{high:.1f}z")
    label = escaped(f"{what}, {len(values)} channels")
    return (
        f'<svg class="strip" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{label}">'
        f'<path d="M0 {HEIGHT - 0.5}H{WIDTH}" class="axis"/><path d="{"".join(bars)}" class="one"/></svg>'
    )


def decades(layers: Sequence[LayerError]) -> tuple[int, int]:
    """The powers of ten between which all errors lie that aren't 0."""
    sizes = [math.log10(e) for each in layers for e in (each.reference, each.candidate) if 0 < e < math.inf]
    return (math.floor(min(sizes)), math.ceil(max(sizes) + 1e-9)) if sizes else (-1, 0)


def axis(low: int, high: int) -> str:
    """The names of the decades, over an axis of errors."""
    every = max(1, (high - low) // 4)
    marks = "".join(
        f'<text x="{_place(10.0**k, low, high):.0f}" y="11" text-anchor="middle">1e{k}</text>' for k in range(low, high + 1, every)
    )
    return f'<svg width="{DOTS + 40}" height="14" aria-hidden="true">{marks}</svg>'


def dots(layer: LayerError, low: int, high: int) -> str:
    """One layer's errors on an axis: a ring for the reference's own, a dot for the candidate's."""
    lines = "".join(f"M{_place(10.0**k, low, high):.0f} 0v16" for k in range(low, high + 1))
    mine, theirs = (_place(error, low, high) for error in (layer.reference, layer.candidate))
    label = escaped(f"{layer.name}: reference {layer.reference:.1e}, candidate {layer.candidate:.1e}")
    return (
        f'<svg width="{DOTS + 40}" height="16" role="img" aria-label="{label}"><title>{label}</title><path d="{lines}" class="axis"/>'
        f'<circle cx="{mine:.1f}" cy="8" r="5.5" class="ring"/><circle cx="{theirs:.1f}" cy="8" r="3" class="dot"/></svg>'
    )


def _place(error: float, low: int, high: int) -> float:
    at = low if error <= 0 or math.isnan(error) else high if math.isinf(error) else math.log10(error)
    return 20 + DOTS * (min(max(at, low), high) - low) / max(high - low, 1)


# --- two networks -----------------------------------------------------------------------------------------------------------------------


def graph(rows: Sequence[PairedOperator]) -> str:
    """Both networks, an operator a row, with their edges at the sides."""
    left = lanes([row.reads for row in rows], [row.reference is not None for row in rows])
    right = lanes([row.candidate_reads for row in rows], [row.candidate is not None for row in rows])
    body = []
    for row, mine, theirs in zip(rows, left, right, strict=True):
        note = f"<small>{TOLD[row.mark]}{f' {breakable(row.note)}' if row.note else ''}</small>" if row.mark != "same" else ""
        sides = [
            "" if name is None else f'<div class="op"><b>{escaped(operator)}</b> <span>{breakable(name)}</span></div>'
            for name, operator in ((row.reference, row.operator), (row.candidate, row.note if row.mark == "lowered" else row.operator))
        ]
        body.append(f'<tr class="{row.mark}"><td class="rail">{mine}</td><td>{sides[0]}{note if row.reference is not None else ""}</td>')
        body.append(f'<td>{sides[1]}{note if row.reference is None else ""}</td><td class="rail">{theirs}</td></tr>\n')
    head = '<tr><th colspan="2" scope="col">reference</th><th colspan="2" scope="col">candidate</th></tr>'
    return f'<table class="graph"><thead>{head}</thead><tbody>\n{"".join(body)}</tbody></table>'


def lanes(reads: Sequence[Sequence[int]], there: Sequence[bool]) -> list[str]:
    """The edges of a graph, row by row: a value goes straight down in its lane until the last operator that reads it."""
    last: dict[int, int] = {}
    for i, before in enumerate(reads):
        last.update(dict.fromkeys(before, i))
    lane: dict[int, int] = {}  # of the operators whose value is still to be read
    drawn: list[tuple[int, str]] = []
    for i, before in enumerate(reads):
        through = sorted({at for made, at in lane.items() if made not in before or last[made] > i})
        into = sorted({lane[made] for made in before if made in lane})
        for made in [made for made in lane if last[made] <= i]:
            del lane[made]
        own = next((at for at in into if at not in lane.values()), None)
        if there[i] and own is None:
            own = next(at for at in range(len(reads) + 1) if at not in lane.values())
        lines = [f"M{_x(at)} 0V100" for at in through]
        if there[i] and own is not None:
            lines += [f"M{_x(at)} 0C{_x(at)} 35 {_x(own)} 15 {_x(own)} 50" for at in into]
            if i in last:
                lane[i] = own
                lines.append(f"M{_x(own)} 50V100")
        drawn.append((-1 if not there[i] or own is None else own, "".join(lines)))
    wide = max((at for at, _ in drawn), default=0)
    width = _x(wide) + LANE
    size = f'viewBox="0 0 {width} 100" preserveAspectRatio="none" style="width:{width}px" aria-hidden="true"'
    dot = [f'<i style="left:{_x(at)}px"></i>' if at >= 0 else "" for at, _ in drawn]
    return [f'<svg {size}><path d="{FLAT}{drawn[i][1]}"/></svg>{dot[i]}<s style="width:{width}px"></s>' for i in range(len(drawn))]


def _x(lane: int) -> int:
    return LANE + LANE * min(lane, LANES - 1)
