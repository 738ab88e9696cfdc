"""One run of a command: its clock, its progress, and where its report goes."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from bnfold.certificates import sha256
from bnfold.files import ready_to_write, write_text
from bnfold.recalibration.distributed import rank
from bnfold.report import InputFile, Report
from bnfold.text import duration, figure, listed, visible

from .options import OUTPUT, option, rare, values
from .streams import fitted, may_be_terminal, reader_may_leave

if TYPE_CHECKING:
    from bnfold.data import Data

    from .check import Check
    from .terminal import ProgressLine

UNBOUNDED = 1 << 16  # columns where the output is no terminal: nothing wraps
EVERY = 10.0  # seconds between two plain lines of progress


@dataclass(frozen=True)
class Reporting:
    """Where the report goes."""

    as_json: bool = option("--json", "The report as JSON on standard output, nothing else.", OUTPUT)
    report: Path | None = option("--report", "Write the report to a file too.", OUTPUT, "FILE.json")
    html: Path | None = option("--html", "Write the report as a page, for a browser.", OUTPUT, "FILE.html")
    force: bool = option("--force", "Overwrite files that exist.", OUTPUT)
    verbose: bool = option("-v --verbose", "Show every layer and every figure.", OUTPUT)
    quiet: bool = option("-q --quiet", "No progress and no remarks.", OUTPUT)
    recipe: str | None = option("--recipe", "Options of bnfold.toml or pyproject.toml.", OUTPUT, "NAME", values=values.recipes)
    debug: bool = rare("--debug", "Show the traceback of an error.", OUTPUT)


class Job:
    """Results go to standard output; progress, remarks and errors to standard error. check: where a verdict goes besides."""

    def __init__(self, where: Reporting, check: Check | None = None, steps: Sequence[str] = (), *, command: str = "") -> None:
        """steps: how the names of stages begin that steps of the work begin with; any other stage belongs to the step that runs. command:
        its name, where its report is that of another."""
        self.as_json, self.force, self.verbose = where.as_json, where.force, where.verbose
        self.main = rank() == 0  # of several processes, one speaks and writes
        self.report_path, self.html_path = (where.report, where.html) if self.main else (None, None)
        self.quiet = where.quiet or not self.main
        self._inputs: list[InputFile] = []
        self.models: list[str] = []  # in the order in which they were opened
        self._start = time.perf_counter()
        self._bar: ProgressLine | None = None
        self._data: list[Data] = []
        self._notes: set[str] = set()
        self._said: dict[int, float] = {}
        self._began: dict[str, tuple[int, float]] = {}
        self._check, self._steps, self._step, self._command = check, steps, 0, command
        self._written: list[str] = []
        ready_to_write((self.report_path, [".json"]), (self.html_path, [".html"]), force=where.force)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()
        if self._check is not None and isinstance(error, Exception):
            self._check.ended(error, self.remark)
        if error is None and self._written:
            self.say(f"written: {listed(self._written)}")

    # --- what went in -----------------------------------------------------------------------------------------------------------

    @property
    def reports(self) -> bool:
        """Whether anyone wants the report itself, and so what came in."""
        return self.as_json or self.report_path is not None or self.html_path is not None

    def came_in(self, *paths: Path) -> None:
        """Files that were read, for the report."""
        self._inputs += [InputFile(str(path), sha256(path) if path.is_file() else "") for path in paths]

    def feed(self, data: Data, what: str) -> None:
        """Say what data go in, and what there is to know about them. what: they are for."""
        self.remark(f"{what}: {data.description}")
        self._data.append(data)
        self._say_notes()

    def _say_notes(self) -> None:
        """What data tell about themselves, some of it only when they were read."""
        for note in (note for data in self._data for note in data.notes):
            if note not in self._notes:
                self._notes.add(note)
                self.remark(note)

    # --- while it runs ----------------------------------------------------------------------------------------------------------

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """On a terminal a bar for the stage; elsewhere a line when a step begins, and then every ten seconds."""
        if self.quiet:
            return
        now = time.monotonic()
        first, begun = self._began.setdefault(stage, (done, now))
        found = [f"{done:,}" if total is None else f"{done:,} of {total:,}"] if done or total else []
        if done > first and now > begun:
            rate = (done - first) / (now - begun)
            found += [f"{figure(rate)}/s", *([] if total is None else [f"{duration(max(total - done, 0) / rate)} left"])]
        self._step = next((i for i, step in enumerate(self._steps) if i >= self._step and stage.startswith(step)), self._step)
        count = f"step {self._step + 1} of {len(self._steps)}, " if self._steps else ""
        name = f"{count}{stage}"
        if self._bar is None and may_be_terminal(sys.stderr):
            from .terminal import bar

            self._bar = bar(sys.stderr)
        if self._bar is not None:
            self._bar.show(name, done, total, ", ".join(found))
        elif self._step not in self._said:
            self.remark(f"{count}{self._steps[self._step]}" if count else stage)
            self._said[self._step] = now
        elif now - self._said[self._step] >= EVERY:
            self.remark(f"{name}: {', '.join(found)}" if found else name)
            self._said[self._step] = now

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def remark(self, text: str) -> None:
        """A line on standard error."""
        if not self.quiet:
            self._tell(text)

    def fail(self, text: str) -> None:
        """An error on standard error, whose report is given out all the same."""
        self._tell(f"error: {text}")

    def warn(self, text: str) -> None:
        """What a user must know, whatever else is left unsaid."""
        self._tell(f"warning: {text}")

    def _tell(self, text: str) -> None:
        line = f"bnfold: {visible(text)}"
        if self._bar is not None:
            self._bar.above(line)
            return
        with reader_may_leave(sys.stderr):
            print(fitted(line), file=sys.stderr, flush=True)

    # --- what comes out ---------------------------------------------------------------------------------------------------------

    def finish(self, report: Report) -> None:
        """Give out the report: as tables or as JSON, and to a file where one was asked for."""
        from bnfold.report.render.terminal import text as text_of

        self._stop()
        self._say_notes()
        if self._began:
            self.remark(f"took {duration(time.perf_counter() - self._start)}")
        if not self.main:
            return
        report = dataclasses.replace(report, seconds=time.perf_counter() - self._start, inputs=tuple(self._inputs))
        if self._check is not None:
            self._check.finished(report, self.remark)
            self.wrote(*self._check.pages)
        if self.html_path is not None:
            from bnfold.report.render.html import html

            command = self._command or report.schema.removeprefix("bnfold.").partition("/")[0]
            write_text(self.html_path, html(report, command, self.models))
            self.wrote(self.html_path)
        if self.as_json or self.report_path is not None:
            text = json.dumps(report.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
            if self.report_path is not None:
                write_text(self.report_path, text)
                self.wrote(self.report_path)
            if self.as_json:
                _write(text.replace("##[", "#\\u0023["))  # which is the same JSON, and no command of a CI job's
                return
        if may_be_terminal(sys.stdout):
            from .terminal import show

            if show(report, sys.stdout, verbose=self.verbose):
                return
        _write(text_of(report, verbose=self.verbose, width=UNBOUNDED) + "\n")

    def wrote(self, *paths: Path, what: str = "") -> None:
        """Files that were written, to be named at the end. what: they hold, where that isn't plain."""
        self._written += [f"{path} ({what})" if what else str(path) for path in paths]

    def say(self, text: str) -> None:
        """A line of the results, unless standard output is the report's alone."""
        if not self.as_json and self.main:
            _write(visible(text) + "\n")

    def compared(self, check: Check) -> None:
        """Say what the comparison with a baseline found."""
        for text in check.outcome():
            (self.remark if self.as_json else self.say)(text)
        for row in check.worse:
            self.say(f"baseline: {row.name} is worse: {row.reason}")


def _write(text: str) -> None:
    with reader_may_leave(sys.stdout):
        sys.stdout.write(text)
        sys.stdout.flush()
