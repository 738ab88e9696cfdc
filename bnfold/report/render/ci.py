"""Rows as CI reads them: JUnit XML for GitLab and Jenkins (a suite for each level, a case for each row), annotations for GitHub."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Literal
from xml.etree import ElementTree as ET

from bnfold.text import printable, unused

from . import Row, joined

MOST = 10  # annotations of one step that GitHub shows
# What is no success: the element in a test case, and where it is counted.
ELEMENTS = {
    "different": "failure",
    "worse": "failure",
    "failed": "failure",
    "inconclusive": "error",
    "broken": "error",
    "skipped": "skipped",
    "kept": "skipped",
}
COUNTS = {"failures": "failure", "errors": "error", "skipped": "skipped"}


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
