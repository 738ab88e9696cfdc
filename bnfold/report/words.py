"""What reports come to, in words for those who deploy a model: a headline, and what was compared, on what, and how far off it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bnfold.text import counted, listed

from .base import Report
from .fuse import Counts, FuseReport, InspectReport
from .others import BenchReport, ExplainReport, PipelineReport
from .recalibrate import Accuracy, Effect, RecalibrateReport
from .verify import Levels, VerifyReport

UNITS = ("bytes", "kB", "MB", "GB", "TB")
ONCE = 1.0001  # units of roundoff: a number that is rounded once is within one, but for how that is measured
CLIPS = "clips with bounds for each channel, since a BatchNorm passes it"
Fact = tuple[str, str]  # what was compared, and what was found


def headline(report: Report) -> list[str]:
    """What a report comes to, in a few words each."""
    parts = list(_parts(report))
    return parts or ["nothing was done"]


def _parts(report: Report) -> Iterator[str]:
    if isinstance(report, PipelineReport):
        if report.fuse is not None:
            yield _folded(report.fuse)
            yield report.verify.verdict if report.verify is not None else "not verified"
        elif report.recalibrate is not None:
            yield _measured(report.recalibrate)
        yield from scores(report.accuracy_before, report.accuracy_after, report.effect)
        if report.fuse is not None:
            yield from sizes(report.fuse)
    elif isinstance(report, FuseReport):
        yield _folded(report)
        if not isinstance(report, InspectReport) and report.changes:
            yield report.verify.verdict if report.verify is not None else "not checked"
        yield from sizes(report)
    elif isinstance(report, RecalibrateReport):
        yield _measured(report)
        yield from scores(report.accuracy_before, report.accuracy_after, report.effect)
    elif isinstance(report, VerifyReport):
        yield report.verdict
        if report.first_difference:
            yield f"first at {report.first_difference}"
        yield f"compared {compared(report.samples, report.data)}"
    elif isinstance(report, ExplainReport):
        yield report.what
    elif isinstance(report, BenchReport):
        if len(report.timings) > 1:
            none = not any(row.faster for row in report.timings)
            ratios = listed(f"{row.ratio:.3g}{'' if none or row.faster else ' (noise)'}" for row in report.timings)
            times = f"{ratios} times as long as the reference at batch {listed(row.batch_size for row in report.timings)}"
            yield f"{'no difference beyond noise: ' * none}the candidate takes {times}"
            return
        times = f"{report.ratio:.3g} times as long as the reference ({report.ratio_low:.3g} to {report.ratio_high:.3g})"
        yield f"the candidate takes {times}" if report.faster else f"no difference beyond noise: the candidate takes {times}"


def _folded(report: FuseReport) -> str:
    count, left = report.batchnorms.before, report.batchnorms.after
    would = "would fold" if isinstance(report, InspectReport) else "folded"
    others = [layer for layer in report.layers if not layer.batchnorm]
    if not count and others:
        return f"{counted(len(others), 'constant operator', ',')} {would}"
    also = f", {report.lowered:,} written as other operators" if report.lowered else ""
    return f"{count - left - report.lowered:,} of {count:,} {would}{also}" if count else "no BatchNorm"


def _measured(report: RecalibrateReport) -> str:
    return f"{counted(len(report.layers), 'BatchNorm', ',')} measured on {counted(report.samples, 'sample', ',')}"


def scores(before: Accuracy | None, after: Accuracy | None, effect: Effect | None) -> Iterator[str]:
    """What became of the accuracy; that it improved is seen."""
    if before is not None and after is not None:
        yield f"accuracy {percent(before.accuracy)} to {percent(after.accuracy)}"
        if effect is not None and effect.verdict != "improved":
            yield effect.verdict


def sizes(report: FuseReport) -> Iterator[str]:
    """Bytes and operators, before and after."""
    if report.bytes is not None:
        yield in_bytes(report.bytes)
    joined = any(each.into for each in report.composed)
    if report.parameters is not None and (joined or any(each.dropped for each in report.dropped)):
        yield f"{report.parameters.before:,} to {report.parameters.after:,} parameters"
    if report.multiply_adds is not None and joined:
        yield f"{report.multiply_adds.before:,} to {report.multiply_adds.after:,} multiply-adds"
    if report.operators is not None:
        before, after = report.operators.before, report.operators.after
        yield counted(before, "operator", ",") + (f" to {after:,}" if after != before else "")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def score(a: Accuracy) -> str:
    return f"{percent(a.accuracy)} (± {100 * a.stderr:.1f})"


def in_bytes(counts: Counts) -> str:
    """`1.12 to 1.10 MB`: three digits, in the unit of the larger; one number where both are the same."""
    most, unit = max(counts.before, counts.after), 0
    while most >= 1000 and unit < len(UNITS) - 1:
        most, unit = most // 1000, unit + 1
    digits = 0 if not unit else 2 if most < 10 else 1 if most < 100 else 0
    before, after = (f"{each / 1000**unit:,.{digits}f}" for each in (counts.before, counts.after))
    return f"{before} to {after} {UNITS[unit]}" if before != after else f"{after} {UNITS[unit]}"


def compared(samples: int, data: str) -> str:
    """On what two models were compared."""
    if not samples:
        return "by coefficients alone"
    of = data.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return f"on {counted(samples, 'sample', ',')}{f' of {of}' if of else ''}"


def facts(levels: Levels, outputs: Sequence[object], samples: int, data: str) -> list[Fact]:
    """What each level of `verify` found where nothing is wrong: what was compared, and how far off it is, beside what is usual."""
    found: list[Fact] = []
    c, f = levels.coefficients, levels.function
    if c.verdict == "equivalent" and c.checked:
        off = "what exact arithmetic gives, rounded once" if c.worst <= ONCE else f"right to {c.worst:.2g} roundings"
        found.append(("weights", f"all {c.checked:,} arrays are {off}" if c.checked > 1 else f"the only array is {off}"))
    elif c.verdict == "equivalent":
        found.append(("weights", "no operator holds any that a fold could change"))
    elif c.batchnorms:
        names = ", ".join(c.uncertified[:3]) + " ..." * (len(c.uncertified) > 3)
        text = f"{c.certified:,} of {c.batchnorms:,} BatchNorms could be certified by their coefficients"
        found.append(("weights", text + (f", not {names}" if names else "")))
    if f.verdict == "equivalent" and outputs:
        off = "don't differ" if not f.error else f"differ by {f.error:.1e} of the largest"
        where = "before activations are rounded to integers, " if f.before_rounding else ""
        found.append(("outputs", f"{where}{off}; rounding alone explains {f.yardstick:.1e}"))
    if rows := [row for row in levels.deployment if row.verdict == "equivalent"]:
        worst = max(rows, key=lambda row: row.ratio)
        where = ", ".join(dict.fromkeys(row.provider for row in rows))
        text = f"on {where} {worst.ratio:.2g} times the reference's own rounding error (at most {worst.limit:g})"
        found.append(("as deployed", text))
    found += [("as deployed", row.reason) for row in levels.deployment if row.verdict == "skipped" and row.ratio]
    if not samples:
        found.append(("outputs", "neither model was run" if f.verdict == "skipped" else f"weren't compared: {f.reason}"))
    return list(dict.fromkeys(found))
