"""A verdict as a Markdown page: for a file, and for the summary of a job on GitHub, which may be long but not without a limit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnfold.errors import InputError
from bnfold.report import Accuracy, PipelineReport, Report

from .rows import Row, counted, folded, levels, printable, verified

MOST = 1 << 20  # bytes that GitHub takes as one step's summary
SPECIAL = re.compile(r"[\\`*_\[\]<>~&|$]")
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "$": "&#36;"}  # the dollar would begin a formula on GitHub


@dataclass(frozen=True)
class Table:
    """Under its title; what its rows hold is plain text. Without rows there is no table."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def page(command: str, files: Sequence[str], report: Report, compared: Iterable[Row] = (), failed: str = "") -> list[str | Table]:
    """The parts of the page, the verdict first. failed: why the run failed in spite of its verdict."""
    parts: list[str | Table] = [_title(command, files)]
    verdict, fused = verified(report), folded(report)
    if verdict is not None:
        parts.append(f"**{verdict.verdict}**" + (f": {escape(verdict.reason)}" if verdict.reason else ""))
        if verdict.certificate is not None:
            parts.append(escape(verdict.certificate.reason))
    if failed:
        parts.append(f"**failed**: {escape(failed)}")
    if fused is not None:
        before, after = fused.batchnorms.before, fused.batchnorms.after
        parts.append(f"{before:,} BatchNorm{'s' * (before != 1)}, of which {after:,} {'stays' if after == 1 else 'stay'}")
    if isinstance(report, PipelineReport):
        scores = [("before", report.accuracy_before), ("after", report.accuracy_after)]
        parts += [f"accuracy {when}: {_accuracy(score)}" for when, score in scores if score is not None]
    parts.append(Table("Baseline", ("row", "verdict", "remarks"), [(r.name, r.verdict, r.reason) for r in compared]))
    if verdict is not None:
        found = [(row.name, row.verdict, row.found, row.reason) for row in levels(verdict)]
        parts.append(Table("Levels", ("level", "verdict", "candidate", "remarks"), found))
        if verdict.first_difference:
            parts.append(f"first difference: {escape(verdict.first_difference)}")
    kept = [] if fused is None else [layer for layer in fused.layers if layer.verdict == "kept"]
    stay = [(layer.name or "(no name)", counted(layer.channels), layer.reason) for layer in kept]
    parts.append(Table("BatchNorms that stay", ("BatchNorm", "channels", "why"), stay))
    if verdict is not None:
        figures = [(o.name, f"{o.max_abs:.3g}", f"{o.max_rel:.3g}", f"{o.error_ratio:.3g}") for o in verdict.outputs]
        parts.append(Table("Outputs", ("output", "largest difference", "relative", "error ratio"), figures))
    return parts


def error_page(command: str, files: Sequence[str], text: str) -> list[str | Table]:
    """The page of a run that an error ended."""
    return [_title(command, files), f"**error**: {escape(text)}"]


def render(parts: Iterable[str | Table], most: int | None = None) -> str:
    """The page's text, of at most so many bytes: tables are cut, the later ones first, with a line that says by how much.

    Where not even the rest fits, it is cut from the end; the text is empty where nothing fits.
    """
    parts = [part for part in parts if isinstance(part, str) or part.rows]
    cuts = [_cut(part, 0) if isinstance(part, Table) else f"{part}\n" for part in parts]
    room = None if most is None else most - sum(_size(text) + 1 for text in cuts)
    if room is not None and room < 0:
        while cuts and sum(_size(text) + 1 for text in cuts) > (most or 0):
            cuts.pop()
        return "".join(f"{text}\n" for text in cuts)
    for i, part in enumerate(parts):
        if isinstance(part, Table):
            least = cuts[i]
            cuts[i] = _filled(part, None if room is None else room + _size(least))
            room = None if room is None else room + _size(least) - _size(cuts[i])
    return "".join(f"{text}\n" for text in cuts)


def _filled(table: Table, room: int | None) -> str:
    """A table with as many rows as there is room for."""
    whole = _cut(table, len(table.rows))
    if room is None or _size(whole) <= room:
        return whole
    count, used = 0, _size(_cut(table, 0))
    while count < len(table.rows) and (used := used + _size(_row(table.rows[count]))) <= room:
        count += 1
    return _cut(table, count)


def _cut(table: Table, count: int) -> str:
    head = [f"### {table.title}\n\n", _row(table.columns), _row(["---"] * len(table.columns), plain=True)]
    left = len(table.rows) - count
    return "".join([*head, *(_row(row) for row in table.rows[:count]), _left_out(left) if left else ""])


def _left_out(count: int) -> str:
    return f"\n{count:,} row{'s' * (count != 1)} left out\n"


def _row(cells: Sequence[str], *, plain: bool = False) -> str:
    return f"| {' | '.join(cell if plain else escape(cell) for cell in cells)} |\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, in a table too: on one line, with nothing in it that means anything."""
    return SPECIAL.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), " ".join(printable(text).split()))


def append(path: Path, parts: Iterable[str | Table]) -> None:
    """Add a page to the job summary, whole or not at all, as far as its limit lets. InputError: it can't be written."""
    try:
        with open(path, "ab") as file:
            there = file.tell()
            lead = b"\n" if there else b""
            text = render(parts, MOST - there - len(lead)).encode()
            try:
                if text:
                    file.write(lead + text)
                    file.flush()
            except OSError:
                os.truncate(path, there)
                raise
    except OSError as error:
        raise InputError(f"{path}: the job summary can't be written ({error.strerror})") from None


def _title(command: str, files: Sequence[str]) -> str:
    return f"## bnfold {command}: {escape(', '.join(files))}"


def _accuracy(a: Accuracy) -> str:
    return f"{a.accuracy:.1%} (± {a.stderr:.1%}) on {a.samples:,} samples"


def _size(text: str) -> int:
    return len(text.encode())
