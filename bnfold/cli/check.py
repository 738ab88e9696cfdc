"""Where a verdict goes besides the terminal: files for CI, the summary and the annotations of a job on GitHub, an earlier report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnfold.errors import CheckError, InputError
from bnfold.files import ready_to_write, write_text
from bnfold.report import Report
from bnfold.report.render import Row, folded, rows, verified
from bnfold.text import printable

from .baseline import Baseline
from .options import OUTPUT, rare

if TYPE_CHECKING:
    from bnfold.report.render import Part


Say = Callable[[str], None]

DOUBTFUL = ("different", "inconclusive")


@dataclass(frozen=True)
class Checking:
    """Where a verdict goes besides."""

    junit: Path | None = rare("--junit", "Write the verdict as JUnit XML.", OUTPUT, "FILE.xml")
    markdown: Path | None = rare("--markdown", "Write the verdict as Markdown.", OUTPUT, "FILE.md")


class Check:
    """One run's. files: the models, of which the last is the one in question. strict: whether a BatchNorm that stays is a failure.
    accept_harm: whether statistics that harm are none.

    baseline: an earlier report, read at once; with one, `verify` fails only where something got worse.
    """

    def __init__(
        self,
        command: str,
        where: Checking,
        *files: Path,
        force: bool,
        strict: bool = False,
        accept_harm: bool = False,
        baseline: Path | None = None,
    ) -> None:
        self.command, self.where, self.files = command, where, [printable(str(path)) for path in files]
        self.strict, self.accept_harm = strict, accept_harm
        ready_to_write((where.junit, [".xml"]), (where.markdown, [".md"]), force=force, inputs=files)
        self.summary = os.environ.get("GITHUB_STEP_SUMMARY")
        self.baseline = None if baseline is None else Baseline(baseline, f"bnfold.{command}/1")
        self.compared: list[Row] = []
        self._given = False

    @property
    def pages(self) -> list[Path]:
        """The files that it writes."""
        return [path for path in (self.where.junit, self.where.markdown) if path is not None]

    # --- an earlier report ------------------------------------------------------------------------------------------------------

    def compare(self, report: Report) -> str:
        """What is worse than in the baseline, in one line; empty where nothing is. InputError: the two have nothing in common."""
        self.compared = [] if self.baseline is None else self.baseline.compare(report)
        found = "; ".join(f"{row.name}: {row.reason}" for row in self.worse)
        return f"worse than the baseline: {found}" if found else ""

    @property
    def worse(self) -> list[Row]:
        return [row for row in self.compared if row.verdict == "worse"]

    def outcome(self) -> list[str]:
        """What couldn't be compared, and how much is no worse."""
        if self.baseline is None:
            return []
        told = [f"baseline: {row.name}: {row.reason}" for row in self.compared if row.verdict == "skipped"]
        if judged := len(self.compared) - len(told):
            told.append(f"baseline: {judged - len(self.worse)} of {judged} rows are no worse than in {self.baseline.path}")
        return told

    def status(self, status: int) -> int:
        """The exit status of `verify`, whose own is `status`."""
        return status if self.baseline is None else int(bool(self.worse))

    # --- files and annotations ---------------------------------------------------------------------------------------------------

    def finished(self, report: Report, say: Say) -> None:
        """Give out what a report says, whatever its verdict. say: told if the job summary, which nobody asked for, can't be written."""
        from bnfold.report.render.ci import on_github
        from bnfold.report.render.documents import summary

        self._given = True
        fused = folded(report)
        failed = fused.failure if fused is not None and self.strict else ""
        harm = "" if self.accept_harm else getattr(report, "harm", "")
        page = summary(self.command, self.files, report, self.compared, failed or harm)
        self._write([*map(self._judged, rows(report)), *self.compared], page, report.seconds, say)
        if on_github():
            kept = fused.kept if fused is not None else ()
            stay = [(False, f"{layer.name or '(no name)'} stays", layer.reason or "it stays") for layer in kept]
            ended = [(True, title, text) for title, text in (("a BatchNorm stays", failed), ("harmed", harm)) if text]
            self._annotate([*ended, *self._verdict(report), *stay])

    def ended(self, error: Exception, say: Say) -> None:
        """The same for a run that an error ended before there was a report. What can't be written then is said too."""
        from bnfold.report.render.documents import failure

        if self._given:
            return
        text = str(error) if hasattr(error, "exit_status") else f"{type(error).__name__}: {str(error)[:300]}".rstrip(": ")
        row = Row("run", "run", "failed" if isinstance(error, CheckError) else "broken", reason=" ".join(text.split()))
        try:
            self._write([row], failure(self.command, self.files, row.reason), 0.0, say)
        except InputError as second:
            say(str(second))

    def _judged(self, row: Row) -> Row:
        """A row as the exit status has it: a BatchNorm that mustn't stay, or a difference that the baseline has too."""
        if self.strict and row.verdict == "kept":
            return dataclasses.replace(row, verdict="failed")
        if self.accept_harm and row.verdict == "harmed":
            return dataclasses.replace(row, verdict="skipped", reason=f"{row.reason}; accepted by --accept-harm")
        if self._excused and row.verdict in DOUBTFUL:
            reason = f"{row.verdict}; see the baseline" + (f": {row.reason}" if row.reason else "")
            return dataclasses.replace(row, verdict="skipped", reason=reason)
        return row

    @property
    def _excused(self) -> bool:
        return self.command == "verify" and self.baseline is not None

    def _write(self, found: list[Row], page: list[Part], seconds: float, say: Say) -> None:
        from bnfold.report.render.ci import append, markdown

        if self.where.junit is not None:
            from bnfold.report.render.ci import junit

            write_text(self.where.junit, junit(self.command, Path(self.files[-1]).stem, found, seconds))
        if self.where.markdown is not None:
            write_text(self.where.markdown, markdown(page))
        if self.summary:
            try:
                append(Path(self.summary), page)
            except InputError as error:
                say(str(error))

    def _verdict(self, report: Report) -> list[tuple[bool, str, str]]:
        """Whether it is an error, title and text of what is to be said of the verdict, and of each row that got worse."""
        found, verdict = [], verified(report)
        if verdict is not None and verdict.verdict in DOUBTFUL:
            found.append((verdict.verdict == "different" and not self._excused, verdict.verdict, verdict.reason or verdict.verdict))
        return [*found, *((True, "worse than the baseline", f"{row.name}: {row.reason}") for row in self.worse)]

    def _annotate(self, found: Sequence[tuple[bool, str, str]]) -> None:
        """At most MOST annotations, of which one is left for an error that may come yet."""
        from bnfold.report.render.ci import MOST, annotate

        shown = found if len(found) < MOST else found[: MOST - 2]
        for wrong, title, text in shown:
            annotate("error" if wrong else "warning", f"{self.files[-1]}: {title}", text)
        if len(found) > len(shown):
            annotate("warning", f"{self.files[-1]}: more", f"{len(found) - len(shown):,} more findings; the report names them all")
