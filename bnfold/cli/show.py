"""Reports as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..report import Accuracy, BenchReport, FuseReport, InspectReport, PipelineReport, RecalibrateReport, VerifyReport

COLOURS = {"folded": "green", "kept": "yellow", "equivalent": "bold green", "different": "bold red", "inconclusive": "bold yellow"}


def fuse(console: Console, report: FuseReport) -> None:
    """What became of every BatchNorm, or would."""
    table = _table("BatchNorm", "channels", "verdict", "into", "why, and what to know")
    for layer in report.layers:
        remarks = "; ".join(text for text in (layer.reason, *layer.notes) if text)
        table.add_row(layer.name, str(layer.channels), _verdict(layer.verdict), ", ".join(layer.into), remarks)
    console.print(table)
    for merged in report.merged:
        console.print(f"merged into {merged.into}: {', '.join(merged.branches)}")
    before, after = report.batchnorms.before, report.batchnorms.after
    would = "would leave" if isinstance(report, InspectReport) else "leaves"
    copies = f", {report.bytes_added:,} bytes more for copies of shared weights" if report.bytes_added else ""
    console.print(f"{before} BatchNorm{'s' * (before != 1)}; folding {would} {after}{copies}")
    for note in report.notes:
        console.print(note)
    if report.verify is not None:
        console.print(Text("check before writing: ").append(_verdict(report.verify.verdict)).append(f" ({report.verify.reason})"))


def recalibrate(console: Console, report: RecalibrateReport) -> None:
    """How far each BatchNorm's statistics moved, each figure its worst channel's."""
    table = _table("BatchNorm", "count", "shift of mean", "ratio of variance", "standard error")
    for layer in report.layers:
        figures = (f"{layer.mean_shift:.3g}", f"{layer.var_ratio:.3g}", f"{layer.stderr:.2g}") if layer.count else ("kept", "kept", "")
        table.add_row(layer.name, f"{layer.count:,}", *figures)
    console.print(table)
    held = f"{report.held_bytes / 2**20:.1f} MiB held"
    spilled = f", {report.spilled_bytes / 2**20:.1f} MiB spilled to disk" if report.spilled_bytes else ""
    console.print(f"{report.samples:,} samples, method {report.method}, {held}{spilled}")
    for note in report.notes:
        console.print(note)


def verify(console: Console, report: VerifyReport) -> None:
    """The verdict, and what each level says."""
    console.print(Text("verdict: ").append(_verdict(report.verdict)).append(f" ({report.reason})" if report.reason else ""))
    levels = report.levels
    table = _table("level", "verdict", "figure", "remark")
    c, f = levels.coefficients, levels.function
    worst = f"worst of {c.checked} arrays: {c.worst:.3g} unit roundoffs" if c.checked else ""
    table.add_row("coefficients", _verdict(c.verdict), worst, c.reason)
    error = "" if f.verdict == "skipped" else f"error {f.error:.2g} in float64, rounding explains {f.yardstick:.2g}"
    table.add_row("function", _verdict(f.verdict), error, f.reason)
    for row in levels.deployment:
        where = f"{row.provider}, optimisation {row.optimisation}"
        ratio = "" if row.verdict == "skipped" else f"{row.ratio:.3g} times the reference's own error"
        table.add_row(f"deployment ({where})", _verdict(row.verdict), ratio, row.reason)
    console.print(table)
    if report.outputs:
        table = _table("output", "largest difference", "relative", "error ratio")
        for output in report.outputs:
            table.add_row(output.name, f"{output.max_abs:.3g}", f"{output.max_rel:.3g}", f"{output.error_ratio:.3g}")
        console.print(table)
    if report.first_difference:
        console.print(f"first difference: {report.first_difference}")


def pipeline(console: Console, report: PipelineReport) -> None:
    """Every step that ran, and the accuracy where there are labels."""
    if report.recalibrate is not None:
        recalibrate(console, report.recalibrate)
    if report.fuse is not None:
        fuse(console, report.fuse)
    if report.verify is not None:
        verify(console, report.verify)
    if report.accuracy_before is not None and report.accuracy_after is not None:
        console.print(f"accuracy before {_accuracy(report.accuracy_before)}, after {_accuracy(report.accuracy_after)}")
    for note in report.notes:
        console.print(note)


def bench(console: Console, report: BenchReport) -> None:
    """Two models side by side."""
    table = _table("model", "median time of a call")
    table.add_row("reference", f"{report.reference * 1e3:.3f} ms")
    table.add_row("candidate", f"{report.candidate * 1e3:.3f} ms")
    console.print(table)
    rounds = f"{report.rounds} interleaved rounds, batch {report.batch_size}, {report.provider}"
    console.print(f"candidate / reference: {report.ratio:.3f} ({report.ratio_low:.3f} to {report.ratio_high:.3f}; {rounds})")


def _accuracy(a: Accuracy) -> str:
    return f"{a.accuracy:.2%} ± {a.stderr:.2%} ({a.samples:,} samples)"


def _verdict(verdict: str) -> Text:
    return Text(verdict, style=COLOURS.get(verdict, "dim"))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=False)
    return table
