"""One run of a command: its clock, its progress, and where its report goes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console

from ..errors import InputError, UsageError
from ..report import InputFile, Report

R = TypeVar("R", bound=Report)
WIDE = 200  # columns where the output is no terminal


class Job:
    """Results go to standard output, progress and remarks to standard error."""

    def __init__(self, *, as_json: bool, report: Path | None, quiet: bool, inputs: list[Path]) -> None:
        self.as_json = as_json
        self.report_path = report
        self.quiet = quiet
        self.inputs = inputs
        self.start = time.perf_counter()
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        if report is not None:
            ready_to_write(report, force=True, inputs=inputs)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """A bar for each stage on a terminal; a line when a stage begins where there is none."""
        if self.quiet:
            return
        if not sys.stderr.isatty():
            if stage not in self._tasks:
                self._tasks[stage] = None
                print(f"bnfold: {stage}", file=sys.stderr)
            return
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.err, transient=True)
            self._bar.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        self._bar.update(self._tasks[stage], completed=done, total=total)

    def remark(self, text: str) -> None:
        """A line on standard error."""
        if not self.quiet:
            self.err.print(f"bnfold: {text}", markup=False, highlight=False, soft_wrap=True)

    def finish(self, report: R, show: Callable[[Console, R], None]) -> R:
        """Give out the report: as a table, or as JSON; to a file too where one was asked for."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        report = dataclasses.replace(report, seconds=time.perf_counter() - self.start)
        if self.as_json or self.report_path is not None:
            report = dataclasses.replace(report, inputs=tuple(InputFile(str(path), _sha256(path)) for path in self.inputs))
            text = json.dumps(report.to_dict(), indent=2, allow_nan=False)
            if self.report_path is not None:
                _write_text(self.report_path, text + "\n")
            if self.as_json:
                print(text)
                return report
        show(self.out, report)
        return report


def ready_to_write(path: Path, *, force: bool, inputs: list[Path]) -> None:
    """Fail before any work is done where the result couldn't be written in the end."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if path.exists() and not force:
        what = "is the input itself" if any(path.exists() and p.exists() and path.samefile(p) for p in inputs) else "exists"
        raise UsageError(f"{path} {what}; give another name, or --force to overwrite it")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise InputError(f"{path}: the folder {folder} doesn't exist; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{path}: can't write to {folder} ({error.strerror or error}); choose another folder") from None


def _console(stream: Any) -> Console:
    return Console(file=stream, width=None if stream.isatty() else WIDE, highlight=False, markup=False)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror or error}); choose another folder") from None
    finally:
        part.unlink(missing_ok=True)
