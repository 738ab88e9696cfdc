"""Samples that can't be read: skipped, counted, listed, and fatal past a limit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from bnfold.errors import DataError, UsageError

MAX_BAD = "1%"
SHOWN = 3


class CorruptError(DataError):
    """One sample that can't be read. where: what it is called; reason: why."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason


class BadSample(NamedTuple):
    """A sample that was skipped, and why."""

    where: str
    reason: str


class Bad:
    """The bad samples of some data, by their places, so that a second pass counts none twice.

    limit: how many are allowed, a number or a percentage of all ("1%"). UsageError for anything else.
    """

    def __init__(self, limit: int | str = MAX_BAD) -> None:
        self.limit = str(limit).strip()
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?|\.\d+)\s*%", self.limit)
        if match is None or (match[2] and float(match[2]) > 100):
            raise UsageError(f"--max-bad {limit}: give a number of images, or a percentage of them like {MAX_BAD}")
        self._count = None if match[1] is None else int(match[1])
        self._percent = float(match[2] or 0)
        self._found: dict[int, BadSample] = {}

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, place: int) -> bool:
        return place in self._found

    @property
    def samples(self) -> list[BadSample]:
        """All of them, in their order in the data."""
        return [self._found[place] for place in sorted(self._found)]

    @property
    def notes(self) -> list[str]:
        """What there is to say about them."""
        count = len(self)
        first = ", ".join(sample.where for sample in self.samples[:SHOWN]) + (", ..." if count > SHOWN else "")
        what = "1 image can't be decoded and is" if count == 1 else f"{count} images can't be decoded and are"
        return [f"{what} left out: {first}"] if count else []

    def allowed(self, total: int) -> int:
        """How many bad ones are allowed of so many."""
        return math.floor(total * self._percent / 100 + 1e-9) if self._count is None else self._count

    def add(self, place: int, error: CorruptError, total: int) -> None:
        """One more, of `total` samples. DataError where that is one too many."""
        self._found[place] = BadSample(error.where, error.reason)
        self._check(self._found[place], len(self), total)

    def know(self, parts: Iterable[Bad], total: int) -> None:
        """Those of parts of the data too. DataError where they are too many together, of `total` samples."""
        found = {place: sample for part in parts for place, sample in part._found.items()}
        self._found |= found
        if found:
            self._check(found[max(found)], len(found), total)

    def _check(self, last: BadSample, count: int, total: int) -> None:
        if count > (allowed := self.allowed(total)):
            raise DataError(
                f"{last.where}: {last.reason}; {count} of {total} images {'is' if count == 1 else 'are'} bad and --max-bad {self.limit} "
                f"allows {allowed}: replace or remove {'it' if count == 1 else 'them'}, or allow more, say --max-bad {count}"
            )
