"""The verbs as another program calls them: errors in Python's terms, progress for the asking, and a log under `bnfold`.

The logger says at DEBUG which stages a verb goes through, at INFO what its report comes to, at WARNING what went unsaid otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from .errors import EXAMPLE, BnfoldError
from .report.base import Report
from .text import meant

log = logging.getLogger("bnfold")
EVERY = 0.1  # seconds between two looks at a stage
RENAMED = {"data": "batches", "eval": "labelled"}  # options whose arguments have other names


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as this module says. Its `progress` may be True: then the stages are shown on standard error."""
    parameters = inspect.signature(function).parameters
    told = "progress" in parameters

    @functools.wraps(function)
    def called(*args: Any, **given: Any) -> Any:
        if told:
            given["progress"] = stages = _Stages(given.get("progress"))
        if "say" in parameters and given.get("say") is None:
            given["say"] = log.info
        unknown = [name for name in given if name not in parameters and name not in (known := _arguments())]
        if unknown:
            raise TypeError(f"{function.__name__}() has no argument {unknown[0]!r}{meant(unknown[0], known)}")
        log.debug("%s begins", function.__name__)
        start = time.perf_counter()
        try:
            made = function(*args, **given)
        except BnfoldError as error:
            if len(error.args) == 1:
                error.args = (in_python(str(error), parameters),)
            raise
        finally:
            if told:
                stages.end()
        *models, report = made if isinstance(made, tuple) else (made,)
        if not isinstance(report, Report):
            return made
        if not report.seconds:
            report = dataclasses.replace(report, seconds=time.perf_counter() - start)
        _log(function.__name__, report)
        return (*models, report) if models else report

    return called


def in_python(text: str, first: Mapping[str, inspect.Parameter] | None = None) -> str:
    """What an error says, with arguments where it names options of the command line. first: those of the verb that was called."""
    known = {**_arguments(), **(first or {})}

    def argument(found: re.Match[str]) -> str:
        option = found[1].replace("-", "_")
        option = RENAMED.get(option, option)
        name = next((each for of in (first or {}, known) for each in (option, f"{option}s") if each in of), None)
        if name is None:
            return found[0]
        return f"{name}=True" if known[name].annotation == "bool" else f"{name}=" if found[2] else name

    text = text.replace(EXAMPLE, "such as example=batch").replace("--eval none", "labelled=None")
    return re.sub(r"--([a-z][a-z-]+)\b( (?=[A-Z0-9'{]|\w+\.\w))?", argument, text)


def _arguments() -> dict[str, inspect.Parameter]:
    """Of all verbs, and the options of a fold."""
    import bnfold

    from .folding.options import FoldOptions

    verbs = [getattr(bnfold, name) for name in bnfold.__all__ if name.islower() and not name.startswith("_")]
    return {name: each for one in (*verbs, FoldOptions) for name, each in inspect.signature(one).parameters.items()}


class _Stages:
    """Progress that is logged, and passed on: to a function of the caller's, or, where that is True, to standard error."""

    def __init__(self, asked: Any) -> None:
        self._tell = self._show if asked is True else asked or None
        self._stage, self._seen, self._wide = "", 0.0, 0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage != self._stage:
            log.debug("%s", stage)
        if self._tell is not None:
            self._tell(stage, done, total)
        self._stage = stage

    def _show(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if stage == self._stage and done != total and now - self._seen < EVERY:
            return
        count = f": {done:,}{'' if total is None else f' of {total:,}'}" if done or total else ""
        self._write(f"{stage}{count}")
        self._seen = now

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{text:{self._wide}}")
        sys.stderr.flush()
        self._wide = len(text)

    def end(self) -> None:
        if self._wide:
            self._write("")
            sys.stderr.write("\r")


def _log(name: str, report: Report) -> None:
    """Log what a report comes to, and the BatchNorms that stayed only since nobody called eval()."""
    from .report import FuseReport
    from .report.words import headline

    log.info("%s: %s", name, ", ".join(headline(report)))
    fused = report if isinstance(report, FuseReport) else getattr(report, "fuse", None)
    if fused is not None and fused.in_training:
        log.warning("%s: %s", name, fused.in_training)
