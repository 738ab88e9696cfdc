"""Reports as tables. What comes out of a file is shown escaped: no name begins a line of its own, or a command to a terminal or runner."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bnfold.report import Accuracy, BenchReport, Effect, FuseReport, InspectReport, PipelineReport, RecalibrateReport, Report, VerifyReport

from .escape import visible_in
from .rows import counted

R = TypeVar("R", bound=Report)

COLOURS = {
    "improved": "bold green",
    "harmed": "bold red",
    "folded": "green",
    "kept": "yellow",
    "equivalent": "bold green",
    "different": "bold red",
    "inconclusive": "bold yellow",
}
BAR = 12  # characters of the longest bar
GAP = 2  # columns between two cells
PROSE = 28  # the least width for a last column of sentences; with less room, a row is written as a paragraph


def _escaped(show: Callable[[Console, R], None]) -> Callable[[Console, R], None]:
    """The same for a report whose texts hold nothing that acts."""

    @functools.wraps(show)
    def safe(console: Console, report: R) -> None:
        show(console, visible_in(report))

    return safe


@_escaped
def fuse(console: Console, report: FuseReport) -> None:
    """What became of every BatchNorm, or would."""
    rows = [
        (
            layer.name or "(no name)",
            counted(layer.channels),
            layer.verdict,
            ", ".join(layer.into),
            "; ".join(text for text in (layer.reason, *layer.notes) if text),
        )
        for layer in report.layers
    ]
    _rows(console, ("BatchNorm", "channels", "verdict", "into", "remarks"), rows)
    for merged in report.merged:
        console.print(f"merged into {merged.into}: {', '.join(merged.branches)}")
    before, after = report.batchnorms.before, report.batchnorms.after
    if before:
        tense = "would stay" if isinstance(report, InspectReport) else "stay" if after != 1 else "stays"
        console.print(f"{before} BatchNorm{'s' * (before != 1)}, of which {after} {tense}")
    if report.bytes_added:
        console.print(f"{report.bytes_added:,} bytes added by copies of shared weights")
    for note in report.notes:
        console.print(note)
    if isinstance(report, InspectReport) and report.certificate is not None:
        _certificate(console, report.certificate)
    if report.verify is not None:
        _verdict(console, "check of the folded model", report.verify)


@_escaped
def recalibrate(console: Console, report: RecalibrateReport) -> None:
    """How far each BatchNorm's statistics moved, each figure its worst channel's; and what that did to labelled samples."""
    top = max((layer.mean_shift for layer in report.layers if math.isfinite(layer.mean_shift)), default=0.0)
    rows = [
        (
            layer.name or "(no name)",
            f"{layer.count:,}",
            *((f"{layer.mean_shift:.3g}", f"{layer.var_ratio:.3g}") if layer.count else ("kept", "kept")),
            str(layer.worst_channel) if layer.count else "",
            str(layer.dead) if layer.dead else "",
            *((f"{layer.stderr:.2g}", f"{layer.var_stderr:.2g}") if layer.count else ("", "")),
            bar(layer.mean_shift, top),
        )
        for layer in report.layers
    ]
    titles = ("BatchNorm", "values", "mean moved by", "variance times", "channel", "dead", "error of mean", "of variance", "drift")
    _rows(console, titles, rows, prose=False)
    console.print("each layer's worst channel; means in old standard deviations, their standard errors in new ones")
    spilled = f", {_bytes(report.spilled_bytes)} spilled to disk" if report.spilled_bytes else ""
    held = f"; at most {_bytes(report.held_bytes)} held{spilled}" if report.held_bytes else ""
    console.print(f"{report.samples:,} samples, method {report.method}, {report.variance} variance{held}")
    for note in report.notes:
        console.print(note)
    if report.accuracy_before is not None and report.accuracy_after is not None and report.effect is not None:
        _scores(console, report.accuracy_before, report.accuracy_after, report.effect)


def bar(value: float, top: float) -> str:
    """A bar in eighths of a character, BAR long for `top`; full for infinity."""
    eighths: int = BAR * 8 if not math.isfinite(value) else round(BAR * 8 * value / top) if top else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _scores(console: Console, before: Accuracy, after: Accuracy, effect: Effect) -> None:
    rows = [
        (name, f"{a.accuracy:.1%}", f"± {a.stderr:.1%}", f"{a.loss:.4g}", f"± {a.loss_stderr:.2g}")
        for name, a in (("before", before), ("after", after))
    ]
    rows.append(
        (
            "difference",
            f"{effect.accuracy:+.1%}",
            f"± {effect.accuracy_stderr:.1%}",
            f"{effect.loss:+.4g}",
            f"± {effect.loss_stderr:.2g}",
        )
    )
    console.print()
    _rows(console, (f"{before.samples:,} labelled samples", "accuracy", "", "loss", ""), rows, prose=False)
    console.print(Text("effect: ").append(effect.verdict, style=COLOURS.get(effect.verdict, "bold")))


@_escaped
def verify(console: Console, report: VerifyReport) -> None:
    """The verdict, and what each level says."""
    levels = report.levels
    c, f = levels.coefficients, levels.function
    found = f"worst of {c.checked} arrays off by {c.worst:.2g} units of roundoff" if c.checked else ""
    rows: list[tuple[str, str, str, str]] = [("coefficients", c.verdict, found, c.reason)]
    found = "" if f.verdict == "skipped" else f"off by {f.error:.2g}; rounded weights explain {f.yardstick:.2g}"
    rows.append(("function, in float64", f.verdict, found, f.reason))
    for row in levels.deployment:
        erred = "" if row.verdict == "skipped" else f"errs {row.ratio:.2g} times as much as the reference"
        found = "; ".join(text for text in (erred, row.placed) if text)
        rows.append((row.name, row.verdict, found, row.reason))
    _rows(console, ("level", "verdict", "candidate", "remarks"), rows)
    if report.outputs:
        figures = [(o.name, f"{o.max_abs:.3g}", f"{o.max_rel:.3g}", f"{o.error_ratio:.3g}") for o in report.outputs]
        _rows(console, ("output", "largest difference", "relative", "error ratio"), figures, prose=False)
    if report.first_difference:
        console.print(f"first difference: {report.first_difference}")
    if report.difference is not None:
        d = report.difference
        place = f"channel {d.channel}, at {_place(d.position)}: " if d.channel is not None else ""
        numbers = f"{d.found:.6g} where {d.expected:.6g} is expected" if d.expected is not None and d.found is not None else ""
        console.print(f"  {d.what}, {place}{numbers}", highlight=False)
        console.print(Text(f"  likely cause: {d.cause}"))
    for note in report.notes:
        console.print(note)
    _verdict(console, "verdict", report)
    if report.certificate is not None:
        console.print(report.certificate.reason)


@_escaped
def pipeline(console: Console, report: PipelineReport) -> None:
    """Every step that ran, and the accuracy where there are labels."""
    if report.recalibrate is not None:
        console.print(Text("recalibrate", style="bold"))
        recalibrate(console, report.recalibrate)
    if report.fuse is not None:
        console.print(_title("fuse"))
        fuse(console, report.fuse)
    if report.verify is not None:
        console.print(_title("verify"))
        verify(console, report.verify)
    if report.notes or report.accuracy_before is not None:
        console.print()
    if report.accuracy_before is not None:
        after = f", {_accuracy(report.accuracy_after)} after" if report.accuracy_after is not None else ""
        after += f": {report.effect.verdict}" if report.effect is not None else ""
        console.print(f"accuracy on {report.accuracy_before.samples:,} samples: {_accuracy(report.accuracy_before)} before{after}")
    for note in report.notes:
        console.print(note)


@_escaped
def bench(console: Console, report: BenchReport) -> None:
    """Two models side by side."""
    rows = [("reference", f"{report.reference * 1e3:.3f} ms"), ("candidate", f"{report.candidate * 1e3:.3f} ms")]
    _rows(console, ("model", "median time of a call"), rows, prose=False)
    how = f"batch {report.batch_size}, {report.provider}, optimisation {report.optimisation}"
    console.print(f"{report.rounds} interleaved rounds; {how}")
    console.print(
        f"candidate / reference: {report.ratio:.3f} (half of the rounds between {report.ratio_low:.3f} and {report.ratio_high:.3f})"
    )


def _certificate(console: Console, found: Mapping[str, Any]) -> None:
    """What a model states of itself, which may be anything."""

    def given(where: Any, key: str, kind: type[Any]) -> Any:
        value = where.get(key) if isinstance(where, Mapping) else None
        return value if isinstance(value, kind) else kind()

    made = " and recalibrated" if found.get("recalibrated") is True else ""
    console.print(Text("certificate, as it states", style="bold"))
    console.print(f"  made by: bnfold {given(found, 'bnfold', str)}, {given(found, 'made_by', str)}")
    for entry in given(found, "inputs", list):
        console.print(f"  from: {given(entry, 'name', str)}, SHA-256 {given(entry, 'sha256', str) or 'not known'}{made}")
    counts = given(found, "batchnorms", dict)
    if counts:
        before, kept = (given(counts, key, int) for key in ("before", "after"))
        merged, constants = (len(given(found, key, list)) for key in ("merged", "constants"))
        console.print(
            f"  BatchNorms: {before - kept:,} folded, {kept:,} kept"
            + (f"; {constants:,} other constant operator{'s' * (constants != 1)} folded" if constants else "")
            + (f"; {merged:,} operators merged from branches" if merged else "")
        )
    verdict = found.get("verdict")
    reason = given(verdict, "reason", str)
    console.print(f"  verdict: {given(verdict, 'verdict', str) or 'none'}" + (f" - {reason}" if reason else ""))
    for entry in given(found, "earlier", list):
        names = ", ".join(given(each, "name", str) for each in given(entry, "inputs", list)) or "a model in memory"
        said = given(entry, "verdict", str) or "no verdict"
        console.print(f"  before that: {given(entry, 'made_by', str)} of {names}, {said}, bnfold {given(entry, 'bnfold', str)}")


def _place(position: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, position)) + ")"


def _title(step: str) -> Text:
    return Text(f"\n{step}", style="bold")


def _accuracy(a: Accuracy) -> str:
    return f"{a.accuracy:.1%} (± {a.stderr:.1%})"


def _bytes(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB"


def _verdict(console: Console, title: str, report: VerifyReport) -> None:
    text = Text(f"{title}: ").append(_coloured(report.verdict))
    console.print(text.append(f" - {report.reason}") if report.reason else text)


def _coloured(text: str) -> Text:
    return Text(text, style=COLOURS.get(text, ""))


def _rows(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]], *, prose: bool = True) -> None:
    """A table without its empty columns, or, where it is too wide for the console, a paragraph for each row. Names are never cut.

    prose: whether the last column holds sentences, which may go over several lines.
    """
    if not rows:
        return
    used = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    widths = [max(len(titles[i]), *(len(row[i]) for row in rows)) for i in used]
    if prose and used[-1] == len(titles) - 1:
        widths[-1] = min(widths[-1], PROSE)
    if sum(widths) + GAP * (len(used) - 1) <= console.width:
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        for i in used:
            table.add_column(titles[i], overflow="fold", no_wrap=i != used[-1], justify="right" if _numbers(rows, i) else "left")
        for row in rows:
            table.add_row(*(_coloured(row[i]) for i in used))
        console.print(table)
        return
    for row in rows:
        console.print(Text(row[0], style="bold"), overflow="fold")
        for i in used[1:]:
            if row[i]:
                console.print(Text(f"  {titles[i]}: ").append(_coloured(row[i])), overflow="fold")


def _numbers(rows: Sequence[Sequence[str]], column: int) -> bool:
    return all(row[column][:1].isdigit() or row[column] in ("", "kept", "inf", "nan") for row in rows) and column > 0
