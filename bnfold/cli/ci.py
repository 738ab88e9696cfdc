"""Where a verdict goes besides the terminal: files for CI, the summary and the annotations of a job on GitHub, an earlier report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bnfold.errors import CheckError, InputError
from bnfold.files import ready_to_write, write_text
from bnfold.report import Report

from .render.github import MOST, annotate, wanted
from .render.rows import Row, folded, printable, rows, verified

if TYPE_CHECKING:
    from .baseline import Baseline
    from .job import Job
    from .render.markdown import Table

Say = Callable[[str], None]

DOUBTFUL = ("different", "inconclusive")


class Check:
    """One run's. files: the models, of which the last is the one in question. strict: whether a BatchNorm that stays is a failure.

    baseline: an earlier report, read at once; with one, `verify` fails only where something got worse.
    """

    def __init__(
        self,
        command: str,
        files: Sequence[Path],
        *,
        junit: Path | None = None,
        markdown: Path | None = None,
        force: bool = False,
        strict: bool = False,
        baseline: Path | None = None,
    ) -> None:
        self.command, self.files, self.strict = command, [printable(str(path)) for path in files], strict
        self.junit, self.markdown = junit, markdown
        for path, suffix in ((junit, ".xml"), (markdown, ".md")):
            if path is not None:
                ready_to_write(path, suffixes=[suffix], force=force, inputs=files)
        summary = os.environ.get("GITHUB_STEP_SUMMARY")
        self.summary = Path(summary) if summary else None
        self.baseline: Baseline | None = None
        if baseline is not None:
            from .baseline import Baseline

            self.baseline = Baseline(baseline, f"bnfold.{command}/1")
        self.compared: list[Row] = []
        self._given = False

    # --- an earlier report ------------------------------------------------------------------------------------------------------

    def compare(self, report: Report) -> bool:
        """Whether something is worse than in the baseline. Raises InputError where the two have nothing in common."""
        self.compared = [] if self.baseline is None else self.baseline.compare(report)
        return bool(self._worse)

    @property
    def _worse(self) -> list[Row]:
        return [row for row in self.compared if row.verdict == "worse"]

    @property
    def problem(self) -> str:
        """What got worse, in one line; empty where nothing did."""
        found = "; ".join(f"{row.name}: {row.reason}" for row in self._worse)
        return f"worse than the baseline: {found}" if found else ""

    def tell(self, job: Job) -> None:
        """Say what the comparison found, and what couldn't be compared."""
        if self.baseline is None:
            return
        same = sum(row.verdict == "equivalent" for row in self.compared)
        lines = [f"baseline: {row.name}: {row.reason}" for row in self.compared if row.verdict == "skipped"]
        lines.append(f"baseline: {same} of {len(self.compared)} rows are no worse than in {self.baseline.path}")
        for text in lines:
            (job.remark if job.as_json else job.say)(text)
        for row in self._worse:
            job.say(f"baseline: {row.name} is worse: {row.reason}")

    def status(self, status: int) -> int:
        """The exit status of `verify`, whose own is `status`."""
        return status if self.baseline is None else 1 if self._worse else 0

    # --- files and annotations ---------------------------------------------------------------------------------------------------

    def finished(self, report: Report, say: Say) -> None:
        """Give out what a report says, whatever its verdict. say: told if the job summary, which nobody asked for, can't be written."""
        from .render.markdown import page

        self._given = True
        found = [*map(self._judged, rows(report)), *self.compared]
        fused = folded(report)
        kept = 0 if fused is None or not self.strict else sum(layer.verdict == "kept" for layer in fused.layers)
        failed = f"--strict: {kept} BatchNorm{'s stay' if kept > 1 else ' stays'}" if kept else ""
        self._write(found, page(self.command, self.files, report, self.compared, failed), report.seconds, say)
        if wanted():
            self._annotate(report, failed)

    def ended(self, error: Exception, say: Say) -> None:
        """The same for a run that an error ended before there was a report. What can't be written then is said too."""
        from .render.markdown import error_page

        if self._given:
            return
        text = str(error) if hasattr(error, "exit_status") else f"{type(error).__name__}: {str(error)[:300]}".rstrip(": ")
        row = Row("run", "run", "failed" if isinstance(error, CheckError) else "broken", reason=" ".join(text.split()))
        try:
            self._write([row], error_page(self.command, self.files, row.reason), 0.0, say)
        except InputError as second:
            say(str(second))

    def _judged(self, row: Row) -> Row:
        """A row as the exit status has it: a BatchNorm that mustn't stay, or a difference that the baseline has too."""
        if self.strict and row.verdict == "kept":
            return dataclasses.replace(row, verdict="failed")
        if self._excused and row.verdict in DOUBTFUL:
            reason = f"{row.verdict}; see the baseline" + (f": {row.reason}" if row.reason else "")
            return dataclasses.replace(row, verdict="skipped", reason=reason)
        return row

    @property
    def _excused(self) -> bool:
        return self.command == "verify" and self.baseline is not None

    def _write(self, found: list[Row], page: list[str | Table], seconds: float, say: Say) -> None:
        from .render.markdown import append, render

        if self.junit is not None:
            from .render.junit import junit

            write_text(self.junit, junit(self.command, Path(self.files[-1]).stem, found, seconds))
        if self.markdown is not None:
            write_text(self.markdown, render(page))
        if self.summary is not None:
            try:
                append(self.summary, page)
            except InputError as error:
                say(str(error))

    def _annotate(self, report: Report, failed: str) -> None:
        """At most MOST annotations, of which one is left for an error that may come yet."""
        verdict, fused, model = verified(report), folded(report), self.files[-1]
        found: list[tuple[bool, str, str]] = []
        if failed:
            found.append((True, f"{model}: a BatchNorm stays", failed))
        if verdict is not None and verdict.verdict in DOUBTFUL:
            wrong = verdict.verdict == "different" and not self._excused
            found.append((wrong, f"{model}: {verdict.verdict}", verdict.reason or verdict.verdict))
        found += [(True, f"{model}: worse than the baseline", f"{row.name}: {row.reason}") for row in self._worse]
        kept = [] if fused is None else [layer for layer in fused.layers if layer.verdict == "kept"]
        found += [(False, f"{model}: {layer.name or '(no name)'} stays", layer.reason or "it stays") for layer in kept]
        shown = found if len(found) < MOST else found[: MOST - 2]
        for wrong, title, text in shown:
            annotate("error" if wrong else "warning", title, text)
        if len(found) > len(shown):
            annotate("warning", f"{model}: more", f"{len(found) - len(shown):,} more findings; the report names them all")
