"""Reports as lines and tables, in the order in which a reader meets them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from bnfold.report.base import Report
from bnfold.report.fuse import FuseReport, InspectReport
from bnfold.report.others import BenchReport, ExplainReport, PipelineReport
from bnfold.report.recalibrate import RecalibrateReport
from bnfold.report.verify import VerifyReport
from bnfold.report.words import CLIPS, headline
from bnfold.text import counted

from . import Headline, Line, Part, Row, Table, folded, tables, verified
from .tables import NAMELESS

SHARE = re.compile(r"(\d+)%")
COUNT = re.compile(r"\d+ of its \d+ (\w+) (?:is|are)\b")
OTHER_NAME = re.compile(  # in what is said of a layer
    r"(?<![\w/.])(?:[\w.:-]*/[\w./:-]*\w|[^\W\d]\w*(?:\.\w+)+|\w+_\w+|(?<=\w )\w+(?= blocks))(?![\w/])"
)
FEW = 5  # layers that are named of many with one thing to be said of them, and shown of those that moved

# --- on a terminal ----------------------------------------------------------------------------------------------------------------------


def document(report: Report, *, verbose: bool = False) -> list[Part]:
    """What a command shows of its report: what it comes to, and what a person must look at; verbose: every layer and every figure."""
    return [Headline(headline(report)), *_PARTS[type(report)](report, verbose)]


def _fuse(report: FuseReport, verbose: bool) -> Iterator[Part]:
    """What stays and why, what is remarkable of what folded, and what the result was checked by."""
    yield from _layers(report, verbose)
    if (check := report.verify) is not None:
        yield from [tables.findings(check)] if check.verdict == "equivalent" else [Line(check.reason, check.verdict, "check")]
        yield from map(Line, check.notes)
        yield from _titled(tables.of_levels(check), tables.outputs(check)) if verbose else ()


def _inspect(report: InspectReport, verbose: bool) -> Iterator[Part]:
    """Where every BatchNorm would go."""
    if not verbose:
        yield tables.layers(report, verbose=False)
    yield from _layers(report, verbose)
    if report.certificate is not None:
        yield Line("certificate, as it states", title=True)
        yield from (Line(f"  {text}") for text in tables.certificate(report.certificate))


def _layers(report: FuseReport, verbose: bool) -> Iterator[Part]:
    would = "would merge" if isinstance(report, InspectReport) else "merged"
    if verbose:
        yield tables.layers(report)
        yield from _titled(tables.ranges(report))
        yield from (Line(f"{would} into {merged.into}: {', '.join(merged.branches)}") for merged in report.merged)
    else:
        yield from _grouped("stays", [(layer.reason, layer.name) for layer in report.kept])
        yield from _grouped("", [(note, layer.name) for layer in report.layers for note in layer.notes])
        yield from _grouped("", [(each.warning, each.name) for each in report.ranges if each.warning])
        if report.merged:
            count = sum(len(merged.branches) for merged in report.merged)
            yield Line(f"{count:,} parallel branches {would} into {counted(len(report.merged), 'operator', ',')}")
    yield from _remarks(report)


def _grouped(word: str, found: Iterable[tuple[str, str]]) -> Iterator[Line]:
    """Layers with one thing to be said of them, the first few by name. What is said may differ by names, counts and percentages."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for text, name in found:
        groups.setdefault(SHARE.sub("", OTHER_NAME.sub("", COUNT.sub("", text))), []).append((text, name or NAMELESS))
    for same in groups.values():
        text, names = same[0][0] or "no reason is known", [name for _, name in same]
        if len({text for text, _ in same}) > 1:
            most = max((int(share) for each, _ in same for share in SHARE.findall(each)), default=0)
            text = COUNT.sub(r"some of its \1 are", SHARE.sub(f"up to {most}%", OTHER_NAME.sub("*", text)))
        many = len(names) > FEW + 1
        listed = ", ".join(names[:FEW] if many else names) + (f" and {len(names) - FEW:,} more" if many else "")
        count = f"{len(names):,} {word if len(names) == 1 else word.rstrip('s')}: " if word else ""
        yield Line(f"{count}{text} ({listed})")


def _titled(*found: Table) -> Iterator[Part]:
    """Tables behind their titles, of those that have rows."""
    for table in found:
        if table.rows:
            yield from (Line(table.title, title=True), table)


def _remarks(report: FuseReport) -> Iterator[Part]:
    yield from _titled(tables.composed(report), tables.equalised(report), tables.dropped(report))
    yield from _grouped("", [(CLIPS, name) for name in report.clamped])
    if report.bytes_added:
        yield Line(f"{report.bytes_added:,} bytes added by copies of shared weights")
    yield from map(Line, report.notes)


def _recalibrate(report: RecalibrateReport, verbose: bool) -> Iterator[Part]:
    """Whose statistics moved most, and what that did to labelled samples."""
    moved = any(layer.mean_shift or layer.var_ratio != 1 for layer in report.layers)  # by a part of the data none has
    few = None if verbose or not moved or len(report.layers) <= FEW + 1 else FEW
    if few is not None:
        yield Line(f"the {few} that moved most, of {len(report.layers):,}", title=True)
    if moved:
        yield tables.drift(report, few, verbose=verbose)
        yield Line(tables.MOVED)
    hidden = [layer for layer in report.layers if layer.dead and not verbose]
    yield from _grouped("", [(f"{counted(layer.dead, 'channel')} constant on these data", layer.name) for layer in hidden])
    yield Line(tables.measured(report, memory=verbose))
    yield from map(Line, report.notes)
    yield from tables.effects(report, verbose=verbose)


def _verify(report: VerifyReport, verbose: bool) -> Iterator[Part]:
    """What was compared and how far off it is, or what is wrong; and what each level says."""
    yield tables.findings(report) if report.verdict == "equivalent" else Line(report.reason, report.verdict, "verdict")
    yield from tables.first_difference(report)
    yield from map(Line, report.notes)
    if verbose or any(row.placed for row in report.levels.deployment):
        yield from _titled(tables.of_levels(report))
    if verbose:
        yield from _titled(tables.outputs(report))
    if report.certificate is not None:
        yield Line(report.certificate.reason)


def _pipeline(report: PipelineReport, verbose: bool) -> Iterator[Part]:
    """Every step that ran, and the accuracy where there are labels."""
    steps: list[tuple[str, Callable[[Any, bool], Iterator[Part]], Report | None]] = [
        ("recalibrate", _recalibrate, report.recalibrate),
        ("fuse", _fuse if report.verify is None or verbose else _layers, report.fuse),  # the verdict says it of the whole
        ("verify", _verify, report.verify),
    ]
    for name, shown, step in steps:
        if step is not None:
            yield from (Line(), Line(name, title=True)) if verbose else ()
            yield from shown(step, verbose)
    yield from (Line(),) if verbose else ()
    yield from tables.effects(report, verbose=verbose)
    yield from (Line(note) for note in report.notes if note != report.harm)  # which is said already


def _bench(report: BenchReport, verbose: bool) -> Iterator[Part]:
    yield tables.timings(report)
    yield Line("candidate / reference with its 95 % interval; where 1 is within that, these rounds show no difference")
    threads = "" if report.threads is None else f", {counted(report.threads, 'thread')}"
    yield Line(f"{report.rounds} interleaved rounds, {report.provider}, optimisation {report.optimisation}{threads}")


_PARTS: dict[type, Callable[[Any, bool], Iterator[Part]]] = {
    FuseReport: _fuse,
    InspectReport: _inspect,
    RecalibrateReport: _recalibrate,
    VerifyReport: _verify,
    PipelineReport: _pipeline,
    BenchReport: _bench,
    ExplainReport: lambda report, verbose: map(Line, report.text),
}


# --- on a page --------------------------------------------------------------------------------------------------------------------------


def summary(command: str, files: Sequence[str], report: Report, compared: Sequence[Row] = (), failed: str = "") -> list[Part]:
    """A verdict as a page, what it comes to first. failed: why the run failed in spite of it."""
    verdict, fused = verified(report), folded(report)
    parts: list[Part] = [_about(command, files), Headline(headline(report))]
    if verdict is not None and verdict.verdict != "equivalent":
        parts.append(Line(verdict.reason, verdict.verdict))
    if failed:
        parts.append(Line(failed, "failed"))
    if verdict is not None:
        parts += [tables.findings(verdict)] if verdict.verdict == "equivalent" else []
        parts += [Line(verdict.certificate.reason)] if verdict.certificate is not None else []
    if isinstance(report, PipelineReport):
        parts += tables.effects(report)
    parts.append(tables.judged(compared))
    if verdict is not None:
        parts += [tables.of_levels(verdict), *tables.first_difference(verdict)]
    if fused is not None:
        parts.append(tables.staying(fused))
    return [*parts, tables.outputs(verdict)] if verdict is not None else parts


def failure(command: str, files: Sequence[str], text: str) -> list[Part]:
    """The page of a run that an error ended."""
    return [_about(command, files), Line(text, "error")]


def _about(command: str, files: Sequence[str]) -> Line:
    return Line(f"bnfold {command}: {', '.join(files)}", title=True)
