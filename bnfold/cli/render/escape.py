"""Texts that others wrote, such as the names in a model, as a terminal or the log of a CI job may show them: they are seen, and do nothing.

GitHub's runner takes a line that begins with `::`, whatever stands before of blanks, and `##[` anywhere, for a command.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, TypeVar

T = TypeVar("T")
COMMAND = re.compile(r"^(\s*):(?=:)|(?<=#)#(?=\[)")


def visible(text: str) -> str:
    """The text on one line: what can't be printed, line breaks and controls among it, as the escapes that Python has for them."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return COMMAND.sub(lambda found: f"{found[1]}\\x3a" if found[0].endswith(":") else "\\x23", text)


def visible_in(x: T) -> T:
    """A report in which every text is visible."""
    found: Any = x
    if isinstance(x, str):
        found = visible(x)
    elif isinstance(x, tuple):
        found = tuple(map(visible_in, x))
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        changed = {f.name: visible_in(getattr(x, f.name)) for f in dataclasses.fields(x) if "hidden" not in f.metadata}
        found = dataclasses.replace(x, **changed)
    elif isinstance(x, dict):
        found = {visible_in(key): visible_in(value) for key, value in x.items()}
    elif isinstance(x, list):
        found = list(map(visible_in, x))
    same_kind: T = found
    return same_kind
