"""Parts of reports that several documents show: tables of layers, of levels, of outputs, of scores, and what was compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bnfold.report.fuse import Counts, FuseReport, InspectReport
from bnfold.report.others import BenchReport, PipelineReport
from bnfold.report.recalibrate import LayerStatistics, RecalibrateReport
from bnfold.report.verify import VerifyReport
from bnfold.report.words import compared, facts, percent, score
from bnfold.text import counted, figure

from . import Bar, Line, Part, Row, Table, joined, levels

NAMELESS = "(no name)"
MOVED = "each figure is the layer's worst channel's; means move in old standard deviations, and the variance is new over old"


def layers(report: FuseReport, *, verbose: bool = True, reasons: bool = True) -> Table:
    """What became of every BatchNorm, or would; verbose: with all that there is to say of each, reasons: why it stays, too."""
    words = {"folded": "folds", "kept": "stays"} if isinstance(report, InspectReport) else {}
    titles = ["BatchNorm", "channels", "verdict", "into", "weight range", *(["remarks"] if verbose else [])]
    cells = []
    for layer in report.layers:
        verdict = words.get(layer.verdict, layer.verdict)
        figures = (layer.name or NAMELESS, channels(layer.channels), verdict, ", ".join(layer.into), _spread(report, layer.into))
        cells.append([*figures, joined(layer.reason if reasons else "", *layer.notes)][: len(titles)])
    return Table("BatchNorms", titles, cells, prose=verbose, names=(0, 3), spare=() if verbose else (4, 1))


def _spread(report: FuseReport, into: Sequence[str]) -> str:
    """How the ranges of weights change that take up a BatchNorm, of the one that is wider then."""
    found = max((each for each in report.ranges if each.name in into), key=lambda each: each.after, default=None)
    return "" if found is None else f"{found.before:.3g} to {found.after:.3g}"


def staying(report: FuseReport) -> Table:
    cells = [(layer.name or NAMELESS, channels(layer.channels), layer.reason) for layer in report.kept]
    return Table("BatchNorms that stay", ("BatchNorm", "channels", "why"), cells)


def ranges(report: FuseReport) -> Table:
    cells = [
        (each.name, f"{each.before:.3g}", f"{each.after:.3g}", percent(each.error_before), percent(each.error), each.warning)
        for each in report.ranges
    ]
    titles = ("operator", "before", "after", "int8 off by", "and after", "remarks")
    return Table("Weight ranges, the largest over the median channel's", titles, cells)


def equalised(report: FuseReport) -> Table:
    cells = [(", ".join(e.layers), ", ".join(e.into), "" if e.reason else f"up to {e.factor:.3g}", e.reason) for e in report.equalised]
    return Table("Equalised ranges", ("made by", "read by", "factor", "remarks"), cells, names=(0, 1))


def composed(report: FuseReport) -> Table:
    """Which linear layers in a row became one, and why others didn't."""
    cells = [
        (", ".join(e.layers), e.into + f", behind {e.behind}" * bool(e.behind), *_counts(e.multiply_adds), e.reason)
        for e in report.composed
    ]
    would = "would become one" if isinstance(report, InspectReport) else "became one"
    titles = (f"layers that {would}, or could", "into", "multiply-adds", "then", "why they stay")
    return Table("Linear layers in a row", titles, cells, names=(0, 1))


def _counts(counts: Counts | None) -> tuple[str, str]:
    return ("", "") if counts is None else (f"{counts.before:,}", f"{counts.after:,}")


def dropped(report: FuseReport) -> Table:
    """Which layers lose channels, and why constant ones stay."""
    cells = [(each.name, f"{each.channels:,}", f"{each.dead:,}", f"{each.dropped:,}", each.reason) for each in report.dropped]
    would = "would leave" if isinstance(report, InspectReport) else "taken out"
    return Table(f"Channels {'that ' * (would != 'taken out')}{would}", ("layer", "channels", "constant", would, "why some stay"), cells)


def drift(report: RecalibrateReport, most: int | None = None, *, verbose: bool = True) -> Table:
    """How far each BatchNorm's statistics moved; most: only so many, those that moved furthest."""
    shifts = [layer.mean_shift for layer in report.layers]
    top = max(filter(math.isfinite, shifts), default=0.0)
    cells: list[tuple[str | Bar, ...]] = []
    for layer in report.layers:
        bar = Bar(math.inf if not math.isfinite(layer.mean_shift) else layer.mean_shift / top if top else 0.0)
        cells.append((layer.name or NAMELESS, f"{layer.channels:,}", f"{layer.count:,}", *_moved(layer), bar))
    if most is not None:
        cells = [cells[i] for i in sorted(range(len(cells)), key=lambda i: (-shifts[i], i))[:most]]
    figures = ("mean moved by", "variance times", "worst channel", "dead", "error of mean", "of variance")
    titles = ("BatchNorm", "channels", "values", *figures, "drift")
    shown = [*range(len(titles))] if verbose else [0, 3, 4, 5, 9]
    cells = [tuple(row[i] for i in shown) for row in cells]
    return Table("Drift of the statistics", [titles[i] for i in shown], cells, prose=False, spare=() if verbose else (4, 3))


def _moved(layer: LayerStatistics) -> tuple[str, ...]:
    if not layer.count:
        return ("kept", "kept", "", "", "", "")
    dead = str(layer.dead) if layer.dead else ""
    worst = (f"{layer.mean_shift:.3g}", f"{layer.var_ratio:.3g}", str(layer.worst_channel), dead)
    return (*worst, f"{layer.stderr:.2g}", f"{layer.var_stderr:.2g}")


def timings(report: BenchReport) -> Table:
    """A row for each batch size: how long calls take, and how many samples that makes."""
    cells = []
    for row in report.timings:
        cells.append([f"{row.batch_size:,}"])
        for side in row.latencies:
            cells[-1] += [*(f"{each * 1e3:.3g} ms" for each in (side.p50, side.p95, side.p99)), figure(side.throughput)]
        cells[-1].append(f"{row.ratio:.3g} ({row.ratio_low:.3g} to {row.ratio_high:.3g})")
    sides = (title for side in ("reference", "candidate") for title in (side, "p95", "p99", "samples/s"))
    return Table("Latency, the median of a call", ("batch", *sides, "ratio"), cells, prose=False, names=(), spare=(3, 7, 4, 8, 2, 6))


def measured(report: RecalibrateReport, *, memory: bool = True) -> str:
    """On what statistics were measured, and how; memory: and with how much memory."""
    spilled = f", {_mebibytes(report.spilled_bytes)} spilled to disk" if report.spilled_bytes else ""
    held = f"; at most {_mebibytes(report.held_bytes)} held{spilled}" if report.held_bytes and memory else ""
    return f"{counted(report.samples, 'sample', ',')}, method {report.method}, {report.variance} variance{held}"


def effects(report: RecalibrateReport | PipelineReport, *, verbose: bool = True) -> Iterator[Part]:
    """The scores of labelled samples before and after, and what the change comes to."""
    before, after, e = report.accuracy_before, report.accuracy_after, report.effect
    if before is None:
        return
    if after is None or e is None:
        yield Line(f"accuracy on {counted(before.samples, 'labelled sample', ',')}: {score(before)}")
        return
    if not verbose:
        losses = (f"{a.loss:.3g} (± {a.loss_stderr:.2g})" for a in (before, after))
        found = f"accuracy {score(before)} to {score(after)}, loss {' to '.join(losses)}"
        yield Line(f"{found}, on {counted(before.samples, 'labelled sample', ',')}", e.verdict)
        return
    scores = [
        (name, percent(a.accuracy), f"± {100 * a.stderr:.1f}", f"{a.loss:.4g}", f"± {a.loss_stderr:.2g}")
        for name, a in (("before", before), ("after", after))
    ]
    moved = (f"{100 * e.accuracy:+.1f}", f"± {100 * e.accuracy_stderr:.1f}", f"{e.loss:+.2g}", f"± {e.loss_stderr:.2g}")
    titles = (counted(before.samples, "labelled sample", ","), "accuracy", "", "loss", "")
    yield Table("Scores", titles, [*scores, ("difference", *moved)], prose=False, names=())
    yield Line(verdict=e.verdict, about="effect")


def findings(report: VerifyReport) -> Table:
    """What was compared, how far off it is, and how far off is usual."""
    found = facts(report.levels, report.outputs, report.samples, report.data)
    if report.samples:
        found.insert(0, ("compared", compared(report.samples, report.data)))
    return Table("Compared", ("", ""), found, names=())


def of_levels(report: VerifyReport) -> Table:
    cells = [(row.name, row.verdict, row.found, row.reason) for row in levels(report)]
    return Table("Levels", ("level", "verdict", "found", "remarks"), cells, names=())


def outputs(report: VerifyReport) -> Table:
    cells = [(o.name, f"{o.max_abs:.3g}", f"{o.max_rel:.3g}", f"{o.error_ratio:.3g}") for o in report.outputs]
    return Table("Outputs", ("output", "largest difference", "relative", "error ratio"), cells, prose=False)


def first_difference(report: VerifyReport) -> Iterator[Line]:
    """Where two models part, and why."""
    if report.first_difference:
        yield Line(f"first difference: {report.first_difference}")
    if (d := report.difference) is not None:
        place = f"channel {d.channel}, at ({', '.join(map(str, d.position))})" if d.channel is not None else ""
        numbers = f"{d.found:.6g} where {d.expected:.6g} is expected" if d.expected is not None and d.found is not None else ""
        where = ", ".join(filter(None, (d.what, place)))
        if numbers or where != "output":
            yield Line(f"  {': '.join(filter(None, (where, numbers)))}")
        yield Line(f"  likely cause: {d.cause}")


def judged(rows: Sequence[Row]) -> Table:
    return Table("Baseline", ("row", "verdict", "remarks"), [(row.name, row.verdict, row.reason) for row in rows], names=())


def sizes(report: FuseReport) -> Table:
    found = (
        ("operators", report.operators),
        ("bytes of weights and constants", report.bytes),
        ("parameters, statistics among them", report.parameters),
        ("multiply-adds for a sample", report.multiply_adds),
        ("BatchNorms", report.batchnorms),
    )
    cells = [(what, f"{counts.before:,}", f"{counts.after:,}") for what, counts in found if counts is not None]
    return Table("Size", ("", "before", "after"), cells, prose=False, names=())


def _mebibytes(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB"


def channels(count: int) -> str:
    return f"{count:,}" if count else "unknown"  # which a file may leave open


def certificate(found: Mapping[str, Any]) -> Iterator[str]:
    """What a model states of itself, which may be anything."""

    def given(where: Any, key: str, kind: type[Any]) -> Any:
        value = where.get(key) if isinstance(where, Mapping) else None
        return value if isinstance(value, kind) else kind()

    yield f"made by: bnfold {given(found, 'bnfold', str)}, {given(found, 'made_by', str)}"
    made = " and recalibrated" if found.get("recalibrated") is True else ""
    for entry in given(found, "inputs", list):
        yield f"from: {given(entry, 'name', str)}, SHA-256 {given(entry, 'sha256', str) or 'not known'}{made}"
    if counts := given(found, "batchnorms", dict):
        before, after = (given(counts, key, int) for key in ("before", "after"))
        merged, constants = (len(given(found, key, list)) for key in ("merged", "constants"))
        others = f"; {counted(constants, 'other constant operator', ',')} folded" if constants else ""
        others += f"; {merged:,} operators merged from branches" if merged else ""
        lowered = len(given(found, "lowered", list))
        also = f"{lowered:,} lowered, " if lowered else ""
        yield f"BatchNorms: {before - after - lowered:,} folded, {also}{after:,} kept{others}"
    if rows := given(found, "composed", dict):
        yield f"linear layers: {counted(len(rows), 'operator', ',')} made of several in a row"
    if fewer := given(found, "dropped", dict):
        taken = sum(n for n in fewer.values() if isinstance(n, int))
        yield f"channels: {taken:,} constant, taken out of {counted(len(fewer), 'layer', ',')}"
    if clips := given(found, "clamped", list):
        yield f"clips: {len(clips):,} with bounds for each channel"
    if equal := given(found, "equalised", list):
        yield f"equalised: the channel ranges of {counted(len(equal), 'layer', ',')}"
    verdict = found.get("verdict")
    reason = given(verdict, "reason", str)
    yield f"verdict: {given(verdict, 'verdict', str) or 'none'}" + (f" - {reason}" if reason else "")
    for entry in given(found, "earlier", list):
        names = ", ".join(given(each, "name", str) for each in given(entry, "inputs", list)) or "a model in memory"
        said = given(entry, "verdict", str) or "no verdict"
        yield f"before that: {given(entry, 'made_by', str)} of {names}, {said}, bnfold {given(entry, 'bnfold', str)}"
