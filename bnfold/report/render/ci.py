"""Reports as CI reads them: JUnit XML (a suite for each level, a case for each row), and for GitHub annotations and a Markdown summary.

JUnit XML is for GitLab and Jenkins. A job's summary on GitHub may be long, but not without a limit.
"""

from __future__ import annotations

import math
import os
import re
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

from bnfold.errors import InputError
from bnfold.text import counted, printable, unused

from . import VERDICTS, Cell, Headline, Line, Part, Row, Table, joined

MOST = 10  # annotations of one step that GitHub shows
# What is no success: the element in a test case, and where it is counted.
ELEMENTS = {
    "different": "failure",
    "worse": "failure",
    "harmed": "failure",
    "failed": "failure",
    "inconclusive": "error",
    "broken": "error",
    "skipped": "skipped",
    "kept": "skipped",
}
COUNTS = {"failures": "failure", "errors": "error", "skipped": "skipped"}
SUMMARY = 1 << 20  # bytes that GitHub takes as one step's summary
SPECIAL = re.compile(r"[\\`*_\[\]<>~&|$]")
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "$": "&#36;"}  # the dollar would begin a formula on GitHub


def junit(command: str, model: str, rows: Iterable[Row], seconds: float = 0.0) -> str:
    """The file's text. A test case is known by its class, which names the command, the model and the level, and by its own name."""
    suites: dict[str, list[Row]] = {}
    for row in rows:
        suites.setdefault(row.suite, []).append(row)
    top = ET.Element("testsuites", name="bnfold")
    for suite, cases in suites.items():
        place = f"bnfold.{command}.{printable(model).replace('.', '_')}.{suite}"  # a dot would begin another part
        element = ET.SubElement(top, "testsuite", name=place)
        _count(element, cases)
        seen: set[str] = set()
        for row in cases:
            name = unused(printable(row.name), seen, "{} ({})")
            case = ET.SubElement(element, "testcase", classname=place, name=name, time="0")
            text = printable(joined(row.reason, row.found)) or row.verdict
            if kind := ELEMENTS.get(row.verdict):
                ET.SubElement(case, kind, {"message": text} | ({} if kind == "skipped" else {"type": row.verdict})).text = text
            elif row.found or row.reason:
                ET.SubElement(case, "system-out").text = text
    _count(top, [row for cases in suites.values() for row in cases])
    top.attrib.pop("skipped")  # which Jenkins' schema has no place for here
    top.set("time", f"{seconds:.3f}")
    ET.indent(top)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(top, encoding="unicode") + "\n"


def _count(element: ET.Element, cases: list[Row]) -> None:
    kinds = Counter(ELEMENTS.get(row.verdict) for row in cases)
    element.set("tests", str(len(cases)))
    for name, kind in COUNTS.items():
        element.set(name, str(kinds[kind]))
    element.set("time", "0")


def on_github() -> bool:
    """Whether this runs in GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def annotate(level: Literal["error", "warning"], title: str, text: str) -> None:
    """One annotation: a workflow command on standard error, where the runner reads it as it does on standard output."""
    print(annotation(level, title, text), file=sys.stderr, flush=True)


def annotation(level: str, title: str, text: str) -> str:
    """The workflow command, see https://docs.github.com/actions/reference/workflow-commands-for-github-actions."""
    title, text = (s.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A") for s in (title, text))
    return f"::{level} title={title.replace(':', '%3A').replace(',', '%2C')}::{text}"


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
            text = markdown(parts, SUMMARY - there - len(lead)).encode()
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
