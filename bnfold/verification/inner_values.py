"""Inner values by the names that a `Model` has for them, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator

from bnfold.model import Model

from .yardstick import Run

CHUNK = 64  # values looked at in one run, so that they needn't all be held


def chunks(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), CHUNK):
        yield names[start : start + CHUNK]


def only(subject: Model, names: list[str], jitter: int | None = None) -> Run:
    """A run in float64 that gives some values and no others. jitter: as for `Model.oracle`."""
    run = subject.exact(jitter=jitter, outputs=names).run
    return lambda feeds: {name: value for name, value in run(feeds).items() if name in names}
