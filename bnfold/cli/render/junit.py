"""A verdict as JUnit XML, as GitLab and Jenkins read it: a test suite for each level, a test case for each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain, count
from xml.etree import ElementTree as ET

from .rows import Row, printable

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
        place = f"bnfold.{command}.{_part(model)}.{suite}"
        element = ET.SubElement(top, "testsuite", name=place)
        _count(element, cases)
        seen: set[str] = set()
        for row in cases:
            name = printable(row.name)
            name = next(n for n in chain([name], (f"{name} ({i})" for i in count(2))) if n not in seen)
            seen.add(name)
            case = ET.SubElement(element, "testcase", classname=place, name=name, time="0")
            text = printable("; ".join(part for part in (row.reason, row.found) if part)) or row.verdict
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


def _part(name: str) -> str:
    """A name as a part of a class's, in which a dot would begin another."""
    return printable(name).replace(".", "_")
