"""Small texts: numbers of things, lists of names, an error in a line, names that are free, and what others wrote made harmless."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import chain, count
from typing import Any

# What XML 1.0 can't hold, not even escaped; half a pair of UTF-16 (a path that isn't UTF-8 has them) can't be encoded at all.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
# GitHub's runner takes a line that begins with `::`, whatever stands before of blanks, and `##[` anywhere, for a command.
COMMAND = re.compile(r"^(\s*):(?=:)|(?<=#)#(?=\[)")


class Notes(dict[Any, str]):
    """What is to be said, by what it is about."""

    def add(self, about: Any, text: str) -> None:
        """Say it too, if it is anything, and new."""
        if text not in (said := self.get(about, "")):
            self[about] = f"{said}; {text}" if said else text


def counted(n: int, what: str, form: str = "") -> str:
    """`1 sample`, `2 samples`; with the form ",", `1,000 samples`."""
    return f"{n:{form}} {what}{'s' * (n != 1)}"


def figure(x: float) -> str:
    """Three digits, and never an exponent for what is large: `0.032`, `32.1`, `2,030`."""
    return f"{float(f'{x:.3g}'):,.0f}" if 100 <= x < math.inf else f"{x:.3g}"


def listed(names: Iterable[object], word: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    texts = [str(n) for n in names]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {word} {texts[-1]}" if texts else ""


def some(names: Iterable[str], most: int = 5) -> str:
    """`'a', 'b'`, and of many the first few: `'a', 'b', 'c', 'd', 'e' and 3 more`; `none`."""
    texts = [*map(repr, names)]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return (", ".join(texts[:most]) + more) or "none"


def meant(name: str, names: Iterable[str], before: str = "", alike: float = 0.7) -> str:
    """`; did you mean 'layer1.bn'?` for a name that is nearly one of those there are, or a part of one; "" where none is near.

    before: what is shown before each; alike: of 1, how near it must be.
    """
    from difflib import get_close_matches

    known = [*names]
    near = get_close_matches(name, known, 2, alike) or [each for each in known if name in re.split(r"[/.]", each)][:2]
    return f"; did you mean {listed((repr(before + each) for each in near), 'or')}?" if near else ""


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of what an error says, at most so long and without its full stop; the error's type where it says nothing."""
    lines = _said(error).splitlines() or [type(error).__name__]
    return lines[0].strip()[:most].rstrip(".")


def one_line(error: BaseException, most: int = 200) -> str:
    """All that an error says on one line, otherwise as `first_line`."""
    return " ".join(_said(error).split())[:most].rstrip(".") or type(error).__name__


def _said(error: BaseException) -> str:
    """What an error says, of one of the operating system without its number and the file's name."""
    return (isinstance(error, OSError) and error.strerror) or str(error).strip()


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `2 min 5 s`, `1 h 3 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def unused(stem: str, taken: set[str], form: str = "{}_{}", first: int = 2) -> str:
    """The stem, or else the first of the names numbered from it that isn't taken; now it is."""
    name = next(name for name in chain([stem], (form.format(stem, i) for i in count(first))) if name not in taken)
    taken.add(name)
    return name


def printable(text: str) -> str:
    """The text with a replacement character for what no file of text should hold."""
    return UNPRINTABLE.sub("\ufffd", text)


def encodable(text: str) -> str:
    """The text as UTF-8 can hold it: a path that isn't UTF-8 has the escapes that JSON and Python have for what is no character."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def visible(text: str) -> str:
    """The text as a terminal or the log of a CI job may show it: on one line, seen and doing nothing.

    What can't be printed, line breaks and controls among it, becomes the escapes that Python has for them.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return COMMAND.sub(lambda found: f"{found[1]}\\x3a" if found[0].endswith(":") else "\\x23", text)
