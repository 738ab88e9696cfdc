"""Small texts: numbers of things, lists of names, and what an error says in a line."""

from __future__ import annotations

from collections.abc import Iterable


def counted(n: int, what: str) -> str:
    """`1 sample`, `2 samples`."""
    return f"{n} {what}{'s' * (n != 1)}"


def listed(names: Iterable[object], word: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    texts = [str(n) for n in names]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {word} {texts[-1]}" if texts else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop; the error's type where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
