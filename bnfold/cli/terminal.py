"""What a terminal shows: a bar for the stage that runs, and reports in colour. Rich draws them, which is imported where there is one."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bnfold.report import Report
from bnfold.report.render.documents import document
from bnfold.report.render.terminal import show as draw

from .streams import reader_may_leave


class _Console(Console):
    """A console whose reader may leave early: the work goes on, and its status is that of the work."""

    def __init__(self, file: Any) -> None:
        super().__init__(file=file, markup=False, highlight=False, emoji=False)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with reader_may_leave(self.file):
            raise BrokenPipeError


class ProgressLine:
    """One line at the bottom: the stage that runs, how far it is, and for how long."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(12),
            TimeElapsedColumn(),
            TextColumn("{task.fields[found]}"),
        )
        self._display = Progress(*columns, console=console, transient=True)
        self._display.start()

    def show(self, stage: str, done: int, total: int | None, found: str) -> None:
        """The bar of the stage, alone."""
        tasks = self._display.tasks
        if tasks and tasks[0].description == stage:
            self._display.update(tasks[0].id, total=total, completed=done, found=found)
            return
        for task in tasks:
            self._display.remove_task(task.id)
        self._display.add_task(stage, total=total, completed=done, found=found)

    def above(self, line: str) -> None:
        """A line that stays."""
        self._display.console.print(line)

    def stop(self) -> None:
        self._display.stop()


def bar(stream: Any) -> ProgressLine | None:
    """A bar on the stream; None where that is no terminal, or one that can't move its cursor."""
    console = _Console(stream)
    return ProgressLine(console) if console.is_terminal and not console.is_dumb_terminal else None


def show(report: Report, stream: Any, *, verbose: bool) -> bool:
    """Whether the stream is a terminal, on which the report is then shown."""
    console = _Console(stream)
    if console.is_terminal:
        draw(console, document(report, verbose=verbose))
    return console.is_terminal
