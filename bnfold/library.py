"""The verbs as another program calls them: errors in Python's terms, progress for the asking, and a log under `bnfold`.

The logger says at DEBUG which stages a verb goes through, at INFO what its report comes to, at WARNING what went unsaid otherwise.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from .errors import BnfoldError

log = logging.getLogger("bnfold")
EVERY = 0.1  # seconds between two looks at a stage
# What the command line calls by another name than Python does. An option's value stands behind it, but for those that are switches.
NAMES = {"--data": "batches", "--input-shape": "input_shapes", "--eval": "labelled", "--device": "device", "--provider": "providers"}
SWITCHES = {"--trust-pickle", "--freeze", "--force", "--keep-per-tensor", "--clone", "--accept-harm", "--strict", "--equalise"}


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
        log.debug("%s begins", function.__name__)
        try:
            made = function(*args, **given)
        except BnfoldError as error:
            if len(error.args) == 1:
                error.args = (in_python(str(error)),)
            raise
        finally:
            if told:
                stages.end()
        _outcome(function.__name__, made)
        return made

    return called


def in_python(text: str) -> str:
    """What an error says, with arguments of functions where it names options of the command line."""

    def argument(found: re.Match[str]) -> str:
        name = NAMES.get(found[1], found[1][2:].replace("-", "_"))
        return f"{name}=True" if found[1] in SWITCHES else f"{name}=" if found[2] else name

    return re.sub(r"(--[a-z][a-z-]+)\b( (?=[A-Z0-9'{]|\w+\.\w))?", argument, text)


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


def _outcome(name: str, made: Any) -> None:
    """Log what a report comes to, and the BatchNorms that stayed only since nobody called eval()."""
    from .report import FuseReport, Report
    from .report.words import headline

    report = made[-1] if isinstance(made, tuple) else made
    if not isinstance(report, Report):
        return
    log.info("%s: %s", name, ", ".join(headline(report)))
    fused = report if isinstance(report, FuseReport) else getattr(report, "fuse", None)
    if fused is not None and fused.in_training:
        log.warning("%s: %s", name, fused.in_training)
