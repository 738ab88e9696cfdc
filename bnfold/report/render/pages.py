"""Lines and tables as Markdown and HTML. A job's summary on GitHub is Markdown, which may be long but not without a limit."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect
from collections.abc import Iterable, Sequence
from html import escape as html_escape
from itertools import accumulate
from pathlib import Path

from bnfold.errors import InputError
from bnfold.report.recalibrate import RecalibrateReport
from bnfold.text import counted, printable

from . import Bar, Line, Part, Table
from .documents import drift

MOST = 1 << 20  # bytes that GitHub takes as one step's summary
SPECIAL = re.compile(r"[\\`*_\[\]<>~&|$]")
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "$": "&#36;"}  # the dollar would begin a formula on GitHub
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; background: #fff; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
td.bar { width: 24%; text-align: left; }
td.bar i { display: block; height: .8em; background: #4477aa; min-width: 1px; }
td.bar i.far { background: #cc6677; }
"""
EXPLAINED = (
    "Each figure is the layer's worst channel's. Means move in old standard deviations (the bars); the variance is new over old; "
    "standard errors take samples as independent, that of the mean in the data's standard deviations, that of the variance as a share "
    "of it; dead channels are constant on these data."
)


# --- Markdown ---------------------------------------------------------------------------------------------------------------------------


def markdown(parts: Iterable[Part], most: int | None = None) -> str:
    """The page's text, of at most so many bytes: tables are cut, the later ones first, with a line that says by how much.

    Where not even the rest fits, it is cut from the end; the text is empty where nothing fits.
    """
    parts = [part for part in parts if isinstance(part, Line) or part.rows]
    texts = [f"{_line(part)}\n\n" if isinstance(part, Line) else _table(part, 0) for part in parts]
    room = math.inf if most is None else most - sum(map(_size, texts))
    while room < 0 and texts:
        room += _size(texts.pop())
        parts = []
    for i, part in enumerate(parts):
        if isinstance(part, Table):
            room += _size(texts[i])
            texts[i] = _table(part, room)
            room -= _size(texts[i])
    return "".join(texts)


def _line(line: Line) -> str:
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


def _row(cells: Sequence[str | Bar]) -> str:
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


# --- HTML -------------------------------------------------------------------------------------------------------------------------------


def html(report: RecalibrateReport, model: str) -> str:
    """A recalibration as a page of its own: without scripts and without anything from elsewhere. model: what it is about."""
    facts, table = drift(report)
    head = "".join(f"<th>{html_escape(title)}</th>" for title in table.columns)
    rows = ("".join(map(_cell, cells)) for cells in table.rows)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html_escape(model)}: recalibration</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>Recalibration of {html_escape(model)}</h1>\n{_list(facts)}\n"
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{chr(10).join(f'<tr>{row}</tr>' for row in rows)}\n</tbody></table>\n"
        f"<p>{EXPLAINED}</p>\n{_list(report.notes)}\n<p>bnfold {html_escape(report.bnfold)}</p>\n</body></html>\n"
    )


def _cell(cell: str | Bar) -> str:
    if isinstance(cell, str):
        return f"<td>{html_escape(cell)}</td>"
    far = " class=far" if cell.share > 1 else ""
    return f'<td class="bar"><i{far} style="width:{100 * min(cell.share, 1.0):.1f}%"></i></td>'


def _list(texts: Iterable[str]) -> str:
    items = "".join(f"<li>{html_escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""
