"""Reports as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..report import Accuracy, BenchReport, FuseReport, InspectReport, PipelineReport, RecalibrateReport, VerifyReport

COLOURS = {"folded": "green", "kept": "yellow", "equivalent": "bold green", "different": "bold red", "inconclusive": "bold yellow"}
GAP = 2  # columns between two cells
PROSE = 28  # the least width for a last column of sentences; with less room, a row is written as a paragraph


def fuse(console: Console, report: FuseReport) -> None:
    """What became of every BatchNorm, or would."""
    rows = [
        (
            layer.name or "(no name)",
            f"{layer.channels:,}",
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
    if report.verify is not None:
        _verdict(console, "check of the folded model", report.verify)


def recalibrate(console: Console, report: RecalibrateReport) -> None:
    """How far each BatchNorm's statistics moved, each figure its worst channel's."""
    rows = [
        (
            layer.name or "(no name)",
            f"{layer.count:,}",
            *((f"{layer.mean_shift:.3g}", f"{layer.var_ratio:.3g}", f"{layer.stderr:.2g}") if layer.count else ("kept", "kept", "")),
        )
        for layer in report.layers
    ]
    _rows(console, ("BatchNorm", "values", "mean moved by", "variance times", "standard error"), rows, prose=False)
    console.print("each layer's worst channel; means in old standard deviations, their standard errors in new ones")
    spilled = f", {_bytes(report.spilled_bytes)} spilled to disk" if report.spilled_bytes else ""
    held = f"; at most {_bytes(report.held_bytes)} held{spilled}" if report.held_bytes else ""
    console.print(f"{report.samples:,} samples, method {report.method}{held}")
    for note in report.notes:
        console.print(note)


def verify(console: Console, report: VerifyReport) -> None:
    """The verdict, and what each level says."""
    levels = report.levels
    c, f = levels.coefficients, levels.function
    found = f"worst of {c.checked} arrays off by {c.worst:.2g} units of roundoff" if c.checked else ""
    rows: list[tuple[str, str, str, str]] = [("coefficients", c.verdict, found, c.reason)]
    found = "" if f.verdict == "skipped" else f"off by {f.error:.2g}; rounded weights explain {f.yardstick:.2g}"
    rows.append(("function, in float64", f.verdict, found, f.reason))
    for row in levels.deployment:
        found = "" if row.verdict == "skipped" else f"errs {row.ratio:.2g} times as much as the reference"
        rows.append((f"{row.provider}, optimisation {row.optimisation}", row.verdict, found, row.reason))
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
        console.print(f"accuracy on {report.accuracy_before.samples:,} samples: {_accuracy(report.accuracy_before)} before{after}")
    for note in report.notes:
        console.print(note)


def bench(console: Console, report: BenchReport) -> None:
    """Two models side by side."""
    rows = [("reference", f"{report.reference * 1e3:.3f} ms"), ("candidate", f"{report.candidate * 1e3:.3f} ms")]
    _rows(console, ("model", "median time of a call"), rows, prose=False)
    how = f"batch {report.batch_size}, {report.provider}, optimisation {report.optimisation}"
    console.print(f"{report.rounds} interleaved rounds; {how}")
    console.print(
        f"candidate / reference: {report.ratio:.3f} (half of the rounds between {report.ratio_low:.3f} and {report.ratio_high:.3f})"
    )


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
