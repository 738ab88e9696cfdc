"""Reports as lines and tables, in the order in which a reader meets them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bnfold.report.base import Report
from bnfold.report.fuse import FuseReport, InspectReport
from bnfold.report.others import BenchReport, PipelineReport
from bnfold.report.recalibrate import Accuracy, LayerStatistics, RecalibrateReport
from bnfold.report.verify import VerifyReport
from bnfold.text import counted

from . import Bar, Line, Part, Row, Table, folded, joined, levels, verified

# --- on a terminal ----------------------------------------------------------------------------------------------------------------------


def document(report: Report) -> list[Part]:
    """What a command shows of its report."""
    parts: dict[type, Callable[[Any], Iterator[Part]]] = {
        FuseReport: _fuse,
        InspectReport: _fuse,
        RecalibrateReport: _recalibrate,
        VerifyReport: _verify,
        PipelineReport: _pipeline,
        BenchReport: _bench,
    }
    return list(parts[type(report)](report))


def _fuse(report: FuseReport) -> Iterator[Part]:
    """What became of every BatchNorm, or would."""
    ranges = {each.name: each for each in report.ranges}
    cells = []
    for layer in report.layers:
        spread = max((ranges[name] for name in layer.into if name in ranges), key=lambda each: each.after, default=None)
        span = "" if spread is None else f"{spread.before:.3g} to {spread.after:.3g}"
        remarks = joined(layer.reason, *layer.notes)
        cells.append((layer.name or "(no name)", _channels(layer.channels), layer.verdict, ", ".join(layer.into), span, remarks))
    yield Table("BatchNorms", ("BatchNorm", "channels", "verdict", "into", "weight range", "remarks"), cells)
    for merged in report.merged:
        yield Line(f"merged into {merged.into}: {', '.join(merged.branches)}")
    moved = [(", ".join(e.layers), ", ".join(e.into), "" if e.reason else f"up to {e.factor:.3g}", e.reason) for e in report.equalised]
    yield Table("Equalised ranges", ("made by", "read by", "factor", "remarks"), moved)
    yield from (Line(f"{each.name}: {each.warning}") for each in report.ranges if each.warning)
    if report.batchnorms.before:
        yield _counts(report)
    if report.bytes_added:
        yield Line(f"{report.bytes_added:,} bytes added by copies of shared weights")
    yield from map(Line, report.notes)
    if isinstance(report, InspectReport) and report.certificate is not None:
        yield Line("certificate, as it states", title=True)
        yield from (Line(f"  {text}") for text in _certificate(report.certificate))
    if report.verify is not None:
        yield Line(report.verify.reason, report.verify.verdict, "check of the folded model")


def _recalibrate(report: RecalibrateReport) -> Iterator[Part]:
    """How far each BatchNorm's statistics moved, each figure its worst channel's; and what that did to labelled samples."""
    cells: list[tuple[str | Bar, ...]] = []
    for layer, bar in zip(report.layers, _bars(report), strict=True):
        name, _, count, shift, ratio, channel, dead, *errors = _drift(layer)
        measured = (shift, ratio, channel, dead if layer.dead else "", *errors) if layer.count else ("kept", "kept", "", "", "", "")
        cells.append((name, count, *measured, bar))
    titles = ("BatchNorm", "values", "mean moved by", "variance times", "channel", "dead", "error of mean", "of variance", "drift")
    yield Table("", titles, cells, prose=False)
    yield Line("each layer's worst channel; means in old standard deviations, their standard errors in new ones")
    spilled = f", {_bytes(report.spilled_bytes)} spilled to disk" if report.spilled_bytes else ""
    held = f"; at most {_bytes(report.held_bytes)} held{spilled}" if report.held_bytes else ""
    yield Line(_measured(report) + held)
    yield from map(Line, report.notes)
    before, after, e = report.accuracy_before, report.accuracy_after, report.effect
    if before is not None and after is not None and e is not None:
        scores = [
            (name, f"{a.accuracy:.1%}", f"± {a.stderr:.1%}", f"{a.loss:.4g}", f"± {a.loss_stderr:.2g}")
            for name, a in (("before", before), ("after", after))
        ]
        moved = (f"{e.accuracy:+.1%}", f"± {e.accuracy_stderr:.1%}", f"{e.loss:+.4g}", f"± {e.loss_stderr:.2g}")
        yield Line()
        yield Table(
            "",
            (counted(before.samples, "labelled sample", ","), "accuracy", "", "loss", ""),
            [*scores, ("difference", *moved)],
            prose=False,
        )
        yield Line(verdict=e.verdict, about="effect")


def _verify(report: VerifyReport) -> Iterator[Part]:
    """The verdict, and what each level says."""
    yield from (_levels(report), _outputs(report))
    yield from _first_difference(report)
    if (d := report.difference) is not None:
        place = f"channel {d.channel}, at ({', '.join(map(str, d.position))}): " if d.channel is not None else ""
        numbers = f"{d.found:.6g} where {d.expected:.6g} is expected" if d.expected is not None and d.found is not None else ""
        yield from (Line(f"  {d.what}, {place}{numbers}"), Line(f"  likely cause: {d.cause}"))
    yield from map(Line, report.notes)
    yield Line(report.reason, report.verdict, "verdict")
    if report.certificate is not None:
        yield Line(report.certificate.reason)


def _pipeline(report: PipelineReport) -> Iterator[Part]:
    """Every step that ran, and the accuracy where there are labels."""
    steps = {"recalibrate": report.recalibrate, "fuse": report.fuse, "verify": report.verify}
    for number, (name, step) in enumerate((name, step) for name, step in steps.items() if step is not None):
        yield from [Line()] * (number > 0)
        yield from (Line(name, title=True), *document(step))
    before, after = report.accuracy_before, report.accuracy_after
    if report.notes or before is not None:
        yield Line()
    if before is not None:
        moved = f", {_score(after)} after" if after is not None else ""
        moved += f": {report.effect.verdict}" if report.effect is not None else ""
        yield Line(f"accuracy on {counted(before.samples, 'sample', ',')}: {_score(before)} before{moved}")
    yield from map(Line, report.notes)


def _bench(report: BenchReport) -> Iterator[Part]:
    """Two models side by side."""
    times = [("reference", f"{report.reference * 1e3:.3f} ms"), ("candidate", f"{report.candidate * 1e3:.3f} ms")]
    yield Table("", ("model", "median time of a call"), times, prose=False)
    how = f"batch {report.batch_size}, {report.provider}, optimisation {report.optimisation}"
    yield Line(f"{report.rounds} interleaved rounds; {how}")
    half = f"half of the rounds between {report.ratio_low:.3f} and {report.ratio_high:.3f}"
    yield Line(f"candidate / reference: {report.ratio:.3f} ({half})")


def _certificate(found: Mapping[str, Any]) -> Iterator[str]:
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
        yield f"BatchNorms: {before - after:,} folded, {after:,} kept{others}"
    verdict = found.get("verdict")
    reason = given(verdict, "reason", str)
    yield f"verdict: {given(verdict, 'verdict', str) or 'none'}" + (f" - {reason}" if reason else "")
    for entry in given(found, "earlier", list):
        names = ", ".join(given(each, "name", str) for each in given(entry, "inputs", list)) or "a model in memory"
        said = given(entry, "verdict", str) or "no verdict"
        yield f"before that: {given(entry, 'made_by', str)} of {names}, {said}, bnfold {given(entry, 'bnfold', str)}"


# --- on a page --------------------------------------------------------------------------------------------------------------------------


def summary(command: str, files: Sequence[str], report: Report, compared: Iterable[Row] = (), failed: str = "") -> list[Part]:
    """A verdict as a page, the verdict first. failed: why the run failed in spite of it."""
    verdict, fused = verified(report), folded(report)
    parts: list[Part] = [_about(command, files)]
    if verdict is not None:
        parts.append(Line(verdict.reason, verdict.verdict))
        if verdict.certificate is not None:
            parts.append(Line(verdict.certificate.reason))
    if failed:
        parts.append(Line(failed, "failed"))
    if fused is not None:
        parts.append(_counts(fused))
    if isinstance(report, PipelineReport):
        scores = {"before": report.accuracy_before, "after": report.accuracy_after}.items()
        parts += [Line(f"accuracy {when}: {_score(a)} on {counted(a.samples, 'sample', ',')}") for when, a in scores if a is not None]
    parts.append(Table("Baseline", ("row", "verdict", "remarks"), [(r.name, r.verdict, r.reason) for r in compared]))
    if verdict is not None:
        parts += [_levels(verdict), *_first_difference(verdict)]
    if fused is not None:
        stay = [(layer.name or "(no name)", _channels(layer.channels), layer.reason) for layer in fused.kept]
        parts.append(Table("BatchNorms that stay", ("BatchNorm", "channels", "why"), stay))
    return [*parts, _outputs(verdict)] if verdict is not None else parts


def failure(command: str, files: Sequence[str], text: str) -> list[Part]:
    """The page of a run that an error ended."""
    return [_about(command, files), Line(text, "error")]


def drift(report: RecalibrateReport) -> tuple[list[str], Table]:
    """A recalibration as a page: its facts, and each BatchNorm's figures."""
    facts = [_measured(report)]
    if report.accuracy_before is not None and report.accuracy_after is not None and report.effect is not None:
        before, after = (f"{_score(a)}, loss {a.loss:.3g} (± {a.loss_stderr:.2g})" for a in (report.accuracy_before, report.accuracy_after))
        facts += [f"accuracy {before} before, {after} after", f"effect: {report.effect.verdict}"]
    titles = ("BatchNorm", "channels", "values", "mean moved by", "", "variance times", "worst channel", "dead")
    figures = zip(map(_drift, report.layers), _bars(report), strict=True)
    cells: list[tuple[str | Bar, ...]] = [(*each[:4], bar, *each[4:]) for each, bar in figures]
    return facts, Table("", (*titles, "error of the mean", "error of the variance"), cells)


# --- what several show ------------------------------------------------------------------------------------------------------------------


def _about(command: str, files: Sequence[str]) -> Line:
    return Line(f"bnfold {command}: {', '.join(files)}", title=True)


def _counts(report: FuseReport) -> Line:
    before, after = report.batchnorms.before, report.batchnorms.after
    tense = "would stay" if isinstance(report, InspectReport) else "stays" if after == 1 else "stay"
    return Line(f"{counted(before, 'BatchNorm', ',')}, of which {after:,} {tense}")


def _levels(report: VerifyReport) -> Table:
    cells = [(row.name, row.verdict, row.found, row.reason) for row in levels(report)]
    return Table("Levels", ("level", "verdict", "candidate", "remarks"), cells)


def _outputs(report: VerifyReport) -> Table:
    cells = [(o.name, f"{o.max_abs:.3g}", f"{o.max_rel:.3g}", f"{o.error_ratio:.3g}") for o in report.outputs]
    return Table("Outputs", ("output", "largest difference", "relative", "error ratio"), cells, prose=False)


def _first_difference(report: VerifyReport) -> list[Line]:
    return [Line(f"first difference: {report.first_difference}")] if report.first_difference else []


def _drift(layer: LayerStatistics) -> tuple[str, ...]:
    counts = (layer.name or "(no name)", f"{layer.channels:,}", f"{layer.count:,}")
    moved = (f"{layer.mean_shift:.3g}", f"{layer.var_ratio:.3g}", str(layer.worst_channel), str(layer.dead))
    return (*counts, *moved, f"{layer.stderr:.2g}", f"{layer.var_stderr:.2g}")


def _bars(report: RecalibrateReport) -> list[Bar]:
    shifts = [layer.mean_shift for layer in report.layers]
    top = max(filter(math.isfinite, shifts), default=0.0)
    return [Bar(math.inf if not math.isfinite(shift) else shift / top if top else 0.0) for shift in shifts]


def _measured(report: RecalibrateReport) -> str:
    return f"{counted(report.samples, 'sample', ',')}, method {report.method}, {report.variance} variance"


def _score(a: Accuracy) -> str:
    return f"{a.accuracy:.1%} (± {a.stderr:.1%})"


def _channels(channels: int) -> str:
    return f"{channels:,}" if channels else "unknown"  # which a file may leave open


def _bytes(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB"
