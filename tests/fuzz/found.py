"""What became of one seed, whatever kind it is of, and the watch over its time."""

from __future__ import annotations

import contextlib
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LIMIT, HANGS = 30, 300  # seconds of the processor, which others may use too; seconds after which a run hangs that uses none
Say = Callable[[str], object]


@dataclass
class Found:
    """became: the outcome in a word, and behind a colon what was said. problem: empty where all is well. report: of the fold."""

    seed: int
    became: str = ""
    problem: str = ""
    report: Any = None
    operators: Counter[str] = field(default_factory=Counter)


class TooLong(BaseException):
    """A run that took longer than LIMIT."""


@contextlib.contextmanager
def watched(found: Found, what: str, say: Say | None = None) -> Iterator[None]:
    """Whatever is raised is a problem, and so is it when it takes too long. what: was done to the seed, for the text."""

    def stop(*_: Any) -> None:
        raise TooLong

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, LIMIT), signal.SIGALRM: (signal.ITIMER_REAL, HANGS)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except TooLong:
        found.became, found.problem = "too long", f"{what}: longer than {LIMIT} s of the processor, or {HANGS} s in all"
    except Exception as error:
        if say is not None:
            say(traceback.format_exc())
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({Path(where.filename).name}:{where.lineno})"
        found.became, found.problem = "failed", f"{what}: {text}"
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
