"""Which BatchNorms are meant: patterns of names, as the shell has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from bnfold.errors import UsageError

Select = Callable[[str], bool]


def every(name: str) -> bool:
    return True


class Selection:
    """The names that match one of `layers` (all, where there are none) and none of `skipped`; remembers what it was asked.

    Patterns are those of the shell: * for anything, ? for one character, [abc] for one of these.
    """

    def __init__(self, layers: Sequence[str] = (), skipped: Sequence[str] = ()) -> None:
        self._layers, self._skipped = tuple(layers), tuple(skipped)
        self._asked: dict[str, None] = {}

    def __call__(self, name: str) -> bool:
        self._asked[name] = None
        return (not self._layers or _any(name, self._layers)) and not _any(name, self._skipped)

    def check(self) -> None:
        """UsageError for a pattern that matches none of the names asked for."""
        for pattern in (*self._layers, *self._skipped):
            if not any(fnmatchcase(name, pattern) for name in self._asked):
                names = list(self._asked)
                told = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                raise UsageError(f"no BatchNorm is called {pattern!r}; there are {told or 'none'}")

    @property
    def is_all(self) -> bool:
        return not self._layers and not self._skipped


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
