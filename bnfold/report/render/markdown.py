"""Lines and tables as Markdown. A job's summary on GitHub is Markdown, which may be long but not without a limit."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from bnfold.errors import InputError
from bnfold.text import counted, printable

from . import VERDICTS, Cell, Headline, Line, Part, Table

MOST = 1 << 20  # bytes that GitHub takes as one step's summary
SPECIAL = re.compile(r"[\\`*_\[\]<>~&|$]")
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "$": "&#36;"}  # the dollar would begin a formula on GitHub


def markdown(parts: Iterable[Part], most: int | None = None) -> str:
    """The page's text, of at most so many bytes: tables are cut, the later ones first, with a line that says by how much.

    Where not even the rest fits, it is cut from the end; the text is empty where nothing fits.
    """
    shown = [part for part in parts if isinstance(part, (Headline, Line)) or (isinstance(part, Table) and part.rows)]
    texts = [_table(part, 0) if isinstance(part, Table) else f"{_line(part)}\n\n" for part in shown]
    room = math.inf if most is None else most - sum(map(_size, texts))
    while room < 0 and texts:
        room += _size(texts.pop())
        shown = []
    for i, part in enumerate(shown):
        if isinstance(part, Table):
            room += _size(texts[i])
            texts[i] = _table(part, room)
            room -= _size(texts[i])
    return "".join(texts)


def _line(line: Headline | Line) -> str:
    if isinstance(line, Headline):
        return ", ".join(f"**{escape(part)}**" if i == 0 or part in VERDICTS else escape(part) for i, part in enumerate(line.parts))
    text = escape(line.text)
    if line.title:
        return f"## {text}"
    return f"**{line.verdict}**" + (f": {text}" if text else "") if line.verdict else text


def _table(table: Table, room: float) -> str:
    """A table with as many rows as there is room for, and a line that says how many are left out."""
    head = f"### {table.title}\n\n{_row(table.columns)}| {' | '.join(['---'] * len(table.columns))} |\n"
    rows = list(map(_row, table.rows))
    if _size(whole := "".join([head, *rows, "\n"])) <= room:
        return whole
    least = _size(head + _left_out(len(rows)))
    count = max(bisect(list(accumulate(map(_size, rows), initial=least)), room) - 1, 0)
    return "".join([head, *rows[:count], _left_out(len(rows) - count)])


def _left_out(count: int) -> str:
    return f"\n{counted(count, 'row', ',')} left out\n\n"


def _row(cells: Sequence[Cell]) -> str:
    return f"| {' | '.join(escape(str(cell)) for cell in cells)} |\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, in a table too: on one line, with nothing in it that means anything."""
    return SPECIAL.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), " ".join(printable(text).split()))


def append(path: Path, parts: Iterable[Part]) -> None:
    """Add a page to the job summary, whole or not at all, as far as its limit lets. InputError: it can't be written."""
    try:
        with open(path, "ab") as file:
            there = file.tell()
            lead = b"\n" if there else b""
            text = markdown(parts, MOST - there - len(lead)).encode()
            try:
                if text:
                    file.write(lead + text)
                    file.flush()
            except OSError:
                os.truncate(path, there)
                raise
    except OSError as error:
        raise InputError(f"{path}: the job summary can't be written ({error.strerror})") from None


def _size(text: str) -> int:
    return len(text.encode())
