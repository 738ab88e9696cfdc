"""What CI reads: JUnit XML, Markdown, annotations, a baseline, exit statuses; and the samples, run as far as they can be here."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from onnx import numpy_helper

import bnfold
from bnfold import api
from bnfold.cli import run
from bnfold.cli.baseline import Baseline
from bnfold.report import (
    Accuracy,
    Coefficients,
    Counts,
    Deployment,
    Function,
    FuseReport,
    Layer,
    Levels,
    OutputError,
    PipelineReport,
    VerifyReport,
)
from bnfold.report.render import Line, Part, Row, Table
from bnfold.report.render.ci import SUMMARY, annotation, append, escape, junit, markdown

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "samples" / "ci"
ANY = st.text(st.characters(exclude_categories=()), max_size=30)  # surrogates and control characters too
ODD = 'a|b\n::error::x\r"<&>\x00\x1b[31m`*_\ud800\ufffe]]>'


def folded() -> None:
    """folded.onnx beside model.onnx, of which it is the fold."""
    bnfold.save(bnfold.fuse(bnfold.load("model.onnx"))[0], "folded.onnx", force=True)


def zeroed(path: str) -> None:
    """A model that answers the same whatever it is fed."""
    model = onnx.load("model.onnx")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((4, 3, 3, 3), np.float32), "weight"))
    onnx.save(model, path)


def verdict(worst: float = 0.9, *, word: Any = "equivalent", output: str = "y", provider: str = "cpu", **more: Any) -> VerifyReport:
    levels = Levels(Coefficients("equivalent", 2, 0.5), Function("equivalent", 1e-8, 2e-8), (Deployment(provider, "off", worst),))
    return VerifyReport(verdict=word, levels=levels, outputs=(OutputError(output, 1e-6, 1e-7, worst),), **more)


def kept(count: int, name: str = "layer") -> FuseReport:
    layers = tuple(Layer(f"{name}{i}", 8, "kept", (), f"reason {i}") for i in range(count))
    return FuseReport(batchnorms=Counts(count, count), layers=layers)


# --- JUnit XML ----------------------------------------------------------------------------------------------------------------------


def cases(text: str) -> dict[tuple[str, str], str]:
    """By suite and name: the element that says what became of a test case, or passed. Checks what the readers rely on.

    Jenkins' schema (junit-10.xsd) and GitLab's parser: counts that add up, a class and a name for each, of which no two are the same.
    """
    top = ET.fromstring(text.encode("utf-8"))
    assert top.tag == "testsuites"
    found: dict[tuple[str, str], str] = {}
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in top:
        assert suite.tag == "testsuite"
        assert suite.attrib.keys() == {"name", "time", *totals}
        counts = dict.fromkeys(totals, 0)
        for case in suite:
            assert case.tag == "testcase"
            assert case.attrib.keys() == {"classname", "name", "time"}
            (child,) = list(case) or [None]
            kind = "passed" if child is None or child.tag == "system-out" else child.tag
            if child is not None and kind != "passed":
                assert child.tag in ("failure", "error", "skipped")
                assert child.attrib.keys() == ({"message"} if kind == "skipped" else {"message", "type"})
                assert child.text
            key = (case.attrib["classname"], case.attrib["name"])
            assert key not in found
            found[key] = kind
            counts["tests"] += 1
            if kind != "passed":
                counts[{"failure": "failures", "error": "errors"}.get(kind, kind)] += 1
        assert {name: int(suite.attrib[name]) for name in counts} == counts
        totals = {name: totals[name] + counts[name] for name in counts}
    assert top.attrib.keys() == {"name", "time", "tests", "failures", "errors"}
    assert all(int(top.attrib[name]) == totals[name] for name in ("tests", "failures", "errors"))
    return {(classname.rpartition(".")[2], name): kind for (classname, name), kind in found.items()}


@given(names=st.lists(ANY, max_size=4), reason=ANY, model=ANY)
def test_junit_holds_any_name(names: list[str], reason: str, model: str) -> None:
    found = [Row("BatchNorms", name, word, reason, reason) for name in names for word in ("kept", "folded", "failed")]
    assert len(cases(junit("fuse", model, found))) == len(found)


def test_no_two_test_cases_have_one_name() -> None:
    found = [Row("BatchNorms", name, "folded") for name in ("a", "a (2)", "a", "\0", "\1", "a")]
    assert len(cases(junit("fuse", "m", found))) == 6


def test_a_test_case_for_each_row_of_the_verdict(here: Path) -> None:
    assert run(["fuse", "model.onnx", "-o", "out.onnx", "--junit", "fuse.xml"]) == 0
    rows = [("coefficients", "coefficients"), ("function", "function, in float64")]
    deployed = [("deployment", f"cpu, optimisation {which}") for which in ("off", "on")]
    assert cases(Path("fuse.xml").read_text()) == dict.fromkeys([("verdict", "verdict"), *rows, ("BatchNorms", "bn")], "passed")
    assert run(["verify", "model.onnx", "out.onnx", "--junit", "same.xml"]) == 0
    assert cases(Path("same.xml").read_text()) == dict.fromkeys([("verdict", "verdict"), *rows, *deployed], "passed")
    assert run(["verify", "model.onnx", "another.onnx", "--junit", "other.xml"]) == 1
    assert set(cases(Path("other.xml").read_text()).values()) == {"failure"}
    zeroed("zero.onnx")
    assert run(["verify", "zero.onnx", "zero.onnx", "--junit", "zero.xml"]) == 6
    assert cases(Path("zero.xml").read_text())["verdict", "verdict"] == "error"
    assert run(["pipeline", "model.onnx", "--data", "x.npy", "-o", "ready.onnx", "--junit", "pipeline.xml"]) == 0
    assert len(cases(Path("pipeline.xml").read_text())) == 6


def test_a_batchnorm_that_stays_is_skipped_and_with_strict_a_failure(here: Path) -> None:
    assert run(["fuse", "none.onnx", "-o", "out.onnx", "--junit", "fuse.xml"]) == 0
    assert cases(Path("fuse.xml").read_text()) == {("BatchNorms", "bn"): "skipped"}
    for command in (["fuse", "none.onnx"], ["pipeline", "none.onnx", "--data", "x.npy"]):
        assert run([*command, "-o", "strict.onnx", "--strict", "--junit", f"{command[0]}-strict.xml"]) == 1
        assert cases(Path(f"{command[0]}-strict.xml").read_text()) == {("BatchNorms", "bn"): "failure"}


def test_an_error_that_ends_the_run_is_in_the_files_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["fuse", "gone.onnx", "-o", "out.onnx", "--junit", "gone.xml", "--markdown", "gone.md"]
    assert run(line) == 4
    assert cases(Path("gone.xml").read_text()) == {("run", "run"): "error"}
    assert "the model holds no BatchNorm" in Path("gone.md").read_text()

    def fail(*_: object, **__: object) -> None:
        raise bnfold.CheckError("the folded model failed its check")

    monkeypatch.setattr("bnfold.api.fuse", fail)
    assert run(["fuse", "model.onnx", "-o", "out.onnx", "--junit", "check.xml"]) == 1
    assert cases(Path("check.xml").read_text()) == {("run", "run"): "failure"}


def test_a_verdict_that_fails_the_pipeline_is_in_the_files(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = api.verify
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    for word, status, kind, level in (("different", 1, "failure", "error"), ("inconclusive", 6, "error", "warning")):
        monkeypatch.setattr("bnfold.api.verify", lambda *a, w=word, **k: dataclasses.replace(real(*a, **k), verdict=w, reason="so it is"))
        line = ["pipeline", "model.onnx", "--data", "x.npy", "-o", "no.onnx", "--junit", f"{word}.xml", "--markdown", f"{word}.md"]
        assert run(line) == status
        assert cases(Path(f"{word}.xml").read_text())["verdict", "verdict"] == kind
        assert annotations(capsys.readouterr().err) == [(level, f"model.onnx: {word}", "so it is")]
        assert f"**{word}**: so it is" in Path(f"{word}.md").read_text()
    assert not Path("no.onnx").exists()


def test_files_are_checked_before_any_work(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folded()
    Path("there.xml").write_text("mine")
    for option, path, status in (
        ("--junit", "there.xml", 2),
        ("--junit", "r.json", 2),
        ("--markdown", "r.txt", 2),
        ("--markdown", "no/r.md", 2),
    ):
        for command in (["fuse", "model.onnx", "-o", "o.onnx"], ["verify", "model.onnx", "folded.onnx"]):
            assert run([*command, option, path]) == status
            assert capsys.readouterr().err.startswith(f"bnfold: error: {path}: ")
    assert not Path("o.onnx").exists()
    assert Path("there.xml").read_text() == "mine"
    assert run(["verify", "model.onnx", "folded.onnx", "--junit", "there.xml", "--force"]) == 0
    assert cases(Path("there.xml").read_text())


# --- Markdown -----------------------------------------------------------------------------------------------------------------------


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a page, as a reader of GitHub's Markdown sees their cells."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level > 2:
            assert {child.type for child in token.children} <= {"text", "text_special"}, token.content
            found[-1][-1].append("".join(child.content for child in token.children))
    return found


def seen(text: str) -> str:
    """A name as a cell shows it."""
    return " ".join(re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text).split())


@given(name=ANY, reason=st.text(st.sampled_from("\\|`*_[]<>~&$!-\n:# a"), max_size=20))
def test_a_cell_shows_any_text_as_it_is(name: str, reason: str) -> None:
    (table,) = tables(markdown([Table("T", ("a", "b", "c"), [(name, "x", reason), ("y", reason, name)])]))
    assert table[1:] == [[seen(name).strip(), "x", seen(reason)], ["y", seen(reason), seen(name).strip()]]


def test_the_page_begins_with_the_verdict(here: Path) -> None:
    assert run(["verify", "model.onnx", "another.onnx", "--markdown", "r.md"]) == 1
    text = Path("r.md").read_text()
    title, _, first, *_ = text.splitlines()
    assert title == "## bnfold verify: model.onnx, another.onnx"
    assert first.startswith("**different**, first at ")
    levels, outputs = tables(text)
    assert [row[:2] for row in levels] == [
        ["level", "verdict"],
        ["coefficients", "different"],
        ["function, in float64", "different"],
        ["cpu, optimisation off", "different"],
        ["cpu, optimisation on", "different"],
    ]
    assert outputs[1][0] == "y"


def test_the_page_names_the_batchnorms_that_stay(here: Path) -> None:
    odd = onnx.load("none.onnx")
    odd.graph.node[-1].name = "b|n\n`x`"
    onnx.save(odd, "odd.onnx")
    assert run(["fuse", "odd.onnx", "-o", "out.onnx", "--markdown", "r.md"]) == 0
    text = Path("r.md").read_text()
    (table,) = tables(text)
    assert table[0] == ["BatchNorm", "channels", "why"]
    assert table[1][:2] == ["b|n `x`", "4"]
    assert "**0 of 1 folded**, " in text


def test_the_summary_of_a_job_is_appended_to(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folded()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    assert run(["verify", "model.onnx", "folded.onnx", "--markdown", "r.md"]) == 0
    first = Path("summary.md").read_text()
    assert first == Path("r.md").read_text()
    assert run(["verify", "model.onnx", "another.onnx"]) == 1
    assert Path("summary.md").read_text().startswith(first)
    assert Path("summary.md").read_text().count("## bnfold verify") == 2


def test_a_summary_that_cannot_be_written_is_said(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folded()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "no/summary.md")
    assert run(["verify", "model.onnx", "folded.onnx"]) == 0
    assert "bnfold: no/summary.md: the job summary can't be written" in capsys.readouterr().err


@pytest.mark.parametrize("there", [0, 1, 1 << 19, SUMMARY - 3000, SUMMARY - 300, SUMMARY - 100, SUMMARY - 1, SUMMARY, SUMMARY + 5])
def test_the_summary_stays_within_the_limit_and_says_what_is_left_out(there: int, tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_bytes(b"x" * there)
    rows = [(f"läyer|{i}", "8", f"reason {i}") for i in range(40_000)]
    listed = [Table("Levels", ("level", "verdict"), [("one", "same")]), Table("Stay", ("a", "b", "c"), rows)]
    append(path, [Line("title", title=True), *listed, Line("the end")])
    size = path.stat().st_size
    assert size <= max(SUMMARY, there)
    text = path.read_bytes()[there:].decode()
    if there < SUMMARY - 1000:
        assert size > SUMMARY - 100
        assert text.endswith("the end\n\n")
        levels, stay = tables(text)
        assert levels[1] == ["one", "same"]
        assert [row[0] for row in stay[1:]] == [f"läyer|{i}" for i in range(len(stay) - 1)]
        assert f"\n\n{40_000 - (len(stay) - 1):,} rows left out\n" in text
    if there >= SUMMARY - 1:
        assert text == ""


@given(most=st.integers(0, 700), sizes=st.lists(st.integers(0, 8), max_size=3))
def test_a_page_is_never_longer_than_it_may_be(most: int, sizes: list[int]) -> None:
    parts: list[Part] = [Line("title", title=True), *(Table("T", ("a", "b"), [(ODD, str(i)) for i in range(n)]) for n in sizes)]
    text = markdown(parts, most)
    assert len(text.encode()) <= most
    whole = markdown(parts)
    assert (text == whole) == (len(whole.encode()) <= most)


# --- annotations --------------------------------------------------------------------------------------------------------------------


def annotations(err: str) -> list[tuple[str, str, str]]:
    """Level, title and text, as GitHub's runner reads them."""

    def plain(text: str) -> str:
        for code, character in (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
            text = text.replace(code, character)
        return text

    found = re.findall(r"^::(error|warning) title=([^:,\n]*)::(.*)$", err, re.MULTILINE)
    assert len(found) == len(re.findall("^::", err, re.MULTILINE))
    return [(level, plain(title), plain(text)) for level, title, text in found]


@given(title=ANY, text=ANY)
def test_an_annotation_is_one_line_whatever_it_says(title: str, text: str) -> None:
    command = annotation("error", title, text)
    assert "\n" not in command
    assert "\r" not in command
    assert annotations(command)[0][1:] == (title, text) or "\x85" in command or {"\u2028", "\u2029"} & set(command)


def test_annotations_go_to_standard_error_only_on_github(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folded()
    zeroed("zero.onnx")
    runs = [
        (["verify", "model.onnx", "another.onnx"], 1, ["error"]),
        (["verify", "model.onnx", "folded.onnx"], 0, []),
        (["verify", "zero.onnx", "zero.onnx"], 6, ["warning"]),
        (["fuse", "none.onnx", "-o", "out.onnx", "--force"], 0, ["warning"]),
        (["fuse", "none.onnx", "-o", "strict.onnx", "--strict"], 1, ["error", "warning"]),
        (["inspect", "missing.onnx"], 3, ["error"]),
        (["fuse", "gone.onnx", "-o", "no.onnx"], 4, ["error"]),
        (["verify"], 2, ["error"]),
    ]
    for on in (False, True):
        monkeypatch.setenv("GITHUB_ACTIONS", "true" if on else "false")
        for command, status, levels in runs:
            assert run([*command, "--json"]) == status
            out, err = capsys.readouterr()
            assert [level for level, _, _ in annotations(err)] == (levels if on else [])
            assert "::" not in out
            if out:
                json.loads(out)


def test_at_most_ten_annotations(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    for count in (0, 1, 9, 10, 11, 500):
        monkeypatch.setattr("bnfold.api.fuse", lambda model, n=count, **_: (model, kept(n, ODD.replace("\ud800", ""))))
        assert run(["fuse", "model.onnx", "-o", "out.onnx", "--force"]) == 0
        found = annotations(capsys.readouterr().err)
        assert len(found) == min(count, 9)
        if count > 9:
            assert found[-1][2].startswith(f"{count - 8:,} more findings")


# --- a baseline ---------------------------------------------------------------------------------------------------------------------


def compared(now: Any, then: Any, path: Path) -> dict[str, str]:
    """By row: what the comparison of two reports says."""
    path.write_text(json.dumps(then.to_dict()))
    return {row.name: row.verdict for row in Baseline(path, then.schema).compare(now)}


@pytest.mark.parametrize(
    ("now", "then", "worse"),
    [
        (0.9, 0.9, False),
        (0.99, 0.1, False),  # errs less than the reference itself
        (1.4, 0.95, False),
        (1.6, 0.95, True),
        (1.2, 0.0, True),
        (3.0, 2.5, False),
        (math.inf, 1.9, True),
        (math.inf, math.inf, False),
        (0.5, math.inf, False),
    ],
)
def test_a_row_is_worse_by_more_than_noise_only(now: float, then: float, worse: bool, tmp_path: Path) -> None:
    if then == 0:  # measured, in another row
        before = verdict(then)
        levels = dataclasses.replace(before.levels, deployment=(*before.levels.deployment, Deployment("cpu", "on", 0.8)))
        found = compared(verdict(now), dataclasses.replace(before, levels=levels), tmp_path / "b.json")
        assert found.pop("cpu, optimisation on") == "skipped"
    else:
        found = compared(verdict(now), verdict(then), tmp_path / "b.json")
    expected = "worse" if worse else "equivalent"
    assert found["cpu, optimisation off"] == found["output y"] == expected
    assert all(word == "equivalent" for name, word in found.items() if name not in ("cpu, optimisation off", "output y"))


def test_the_verdict_and_the_levels_get_worse_in_their_order(tmp_path: Path) -> None:
    words = ("equivalent", "inconclusive", "different")
    for i, now in enumerate(words):
        for j, then in enumerate(words):
            found = compared(verdict(word=now), verdict(word=then), tmp_path / "b.json")
            assert found["verdict"] == ("worse" if i > j else "equivalent")
    levels = dataclasses.replace(verdict().levels, coefficients=Coefficients("different", 2, 9.0))
    assert compared(dataclasses.replace(verdict(), levels=levels), verdict(), tmp_path / "b.json")["coefficients"] == "worse"


def test_what_is_new_or_gone_or_was_not_measured_is_said_and_no_more(tmp_path: Path) -> None:
    one, skipped = Deployment("cpu", "off", 0.9), Deployment("cuda", "off", 0.0, "skipped", "no")
    before = dataclasses.replace(verdict(), levels=dataclasses.replace(verdict().levels, deployment=(one, Deployment("old", "on", 0.9))))
    after = dataclasses.replace(
        verdict(),
        levels=dataclasses.replace(verdict().levels, deployment=(one, dataclasses.replace(skipped, ratio=5.0, verdict="different"))),
    )
    found = compared(after, before, tmp_path / "b.json")
    assert found["cuda, optimisation off"] == found["old, optimisation on"] == "skipped"
    before = dataclasses.replace(verdict(), levels=dataclasses.replace(verdict().levels, deployment=(one, skipped)))
    assert compared(after, before, tmp_path / "b.json")["cuda, optimisation off"] == "skipped"


def test_accuracy_may_fall_by_two_standard_errors(tmp_path: Path) -> None:
    def report(share: float | None) -> PipelineReport:
        accuracy = None if share is None else Accuracy(share, math.sqrt(share * (1 - share) / 500), 500)
        return PipelineReport(verify=verdict(), accuracy_after=accuracy)

    path = tmp_path / "b.json"
    allowed = 2 * math.sqrt(0.9 * 0.1 / 500 * 2)
    for share, word in ((0.95, "equivalent"), (0.9 - 0.9 * allowed, "equivalent"), (0.9 - 1.1 * allowed, "worse"), (None, "skipped")):
        assert compared(report(share), report(0.9), path)["accuracy"] == word
    assert compared(report(0.9), report(None), path)["accuracy"] == "skipped"
    assert "accuracy" not in compared(report(None), report(None), path)
    assert compared(PipelineReport(), report(0.9), path) == {"verdict": "skipped", "accuracy": "skipped"}


def test_verify_fails_only_where_something_got_worse(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folded()
    assert run(["verify", "model.onnx", "folded.onnx", "--report", "same.json"]) == 0
    assert run(["verify", "model.onnx", "another.onnx", "--report", "other.json"]) == 1
    capsys.readouterr()
    files = ["--junit", "r.xml", "--markdown", "r.md", "--force"]
    assert run(["verify", "model.onnx", "folded.onnx", "--baseline", "same.json", *files]) == 0
    assert "baseline: 6 of 6 rows are no worse than in same.json" in capsys.readouterr().out
    assert set(cases(Path("r.xml").read_text()).values()) == {"passed"}
    assert run(["verify", "model.onnx", "another.onnx", "--baseline", "same.json", *files]) == 1
    out, err = capsys.readouterr()
    assert "baseline: verdict is worse: different, equivalent in the baseline" in out
    assert re.search(r"baseline: cpu, optimisation off is worse: errs \S+ times as much as the reference, \S+ in the baseline", out)
    assert "bnfold: error: worse than the baseline: verdict: different" in err
    assert cases(Path("r.xml").read_text())["baseline", "verdict"] == "failure"
    assert tables(Path("r.md").read_text())[0][1][:2] == ["verdict", "worse"]
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert run(["verify", "model.onnx", "another.onnx", "--baseline", "other.json", *files, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["verdict"] == "different"
    assert [level for level, _, _ in annotations(err)] == ["warning"]
    assert "failure" not in cases(Path("r.xml").read_text()).values()
    assert run(["verify", "model.onnx", "folded.onnx", "--baseline", "other.json"]) == 0


def test_pipeline_writes_nothing_that_is_worse_than_its_baseline(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["pipeline", str(digits), "--eval", str(digits.parent / "test.npz")]
    assert run([*line, "--data", str(digits.parent / "calibration.npz"), "-o", "one.onnx", "--report", "b.json"]) == 0
    assert run([*line, "--data", str(digits.parent / "calibration.npz"), "-o", "two.onnx", "--baseline", "b.json"]) == 0
    capsys.readouterr()
    noise = ["--data", "random", "--method", "exact", "--force-random", "--accept-harm"]
    assert run([*line, *noise, "-o", "three.onnx", "--baseline", "b.json"]) == 1
    out, err = capsys.readouterr()
    assert "baseline: accuracy is worse: " in out
    assert err.splitlines()[-1].endswith("; nothing was written")
    assert sorted(path.name for path in tmp_path.glob("*.onnx")) == ["one.onnx", "two.onnx"]


def without(*path: Any) -> Callable[[dict[str, Any]], Any]:
    def change(found: dict[str, Any]) -> Any:
        at: Any = found
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        return found

    return change


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], Any]:
    def change(found: dict[str, Any]) -> Any:
        at: Any = found
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return found

    return change


BAD_BASELINES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda found: [found],
    "a number": lambda found: 3,
    "no schema": without("schema"),
    "another schema": put("bnfold.pipeline/1", "schema"),
    "a later schema": put("bnfold.verify/2", "schema"),
    "a schema of another kind": put([1], "schema"),
    "no verdict": without("verdict"),
    "an unknown verdict": put("good", "verdict"),
    "no levels": without("levels"),
    "levels of another kind": put(7, "levels"),
    "no ratio": without("levels", "deployment", 0, "ratio"),
    "a ratio in words": put("two", "levels", "deployment", 0, "ratio"),
    "a row of another kind": put(None, "levels", "deployment", 0),
    "no outputs": without("outputs"),
    "an output without a name": put(None, "outputs", 0, "name"),
    "other outputs": put("z", "outputs", 0, "name"),
}


@pytest.mark.parametrize("what", BAD_BASELINES)
def test_a_baseline_that_does_not_fit_is_status_3_and_one_line(what: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("b.json").write_text(json.dumps(BAD_BASELINES[what](copy.deepcopy(verdict().to_dict()))))
    assert run(["verify", "model.onnx", "model.onnx", "--baseline", "b.json", "-q"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"bnfold: error: b\.json: .*baseline.*; (give|compare) .*\n", err)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"NaN", b"{}"])
def test_a_baseline_that_cannot_be_read(content: bytes | None, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        Path("b.json").write_bytes(content)
    for command in (["verify", "model.onnx", "model.onnx"], ["pipeline", "model.onnx", "--data", "x.npy", "-o", "out.onnx"]):
        assert run([*command, "--baseline", "b.json"]) == 3
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"bnfold: error: b\.json: .*baseline.*\n", err)


def test_a_baseline_of_other_providers_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(bnfold.InputError, match="for other rows"):
        compared(verdict(), verdict(provider="cuda"), tmp_path / "b.json")


# --- exit statuses ------------------------------------------------------------------------------------------------------------------

DEFECT = """
import bnfold.api, sys
def broken(*_, **__): raise ZeroDivisionError("one over nothing")
bnfold.api.inspect = broken
sys.argv = ["bnfold", "inspect", "model.onnx"]
from bnfold.cli import main
main()
"""
INTERRUPTING = """
import os, signal
def batches():
    os.kill(os.getpid(), signal.SIGINT)
    yield
"""


def unavailable() -> str:
    """An execution provider that ONNX Runtime knows and this build hasn't got."""
    import onnxruntime as ort

    name = next(name for name in ort.get_all_providers() if name not in ort.get_available_providers())
    return name.removesuffix("ExecutionProvider").lower()


STATUSES = {
    0: "verify model.onnx folded.onnx",
    1: "verify model.onnx another.onnx",
    2: "verify model.onnx",
    3: "verify model.onnx x.npy",
    4: "fuse gone.onnx -o out.onnx",
    5: "verify model.onnx model.onnx --provider PROVIDER",
    6: "verify zero.onnx zero.onnx",
    70: "",
    130: "recalibrate model.onnx --data feed.py:batches -o out.onnx",
}


@pytest.mark.parametrize("status", STATUSES)
def test_every_exit_status_by_a_process_of_its_own(status: int, here: Path) -> None:
    folded()
    zeroed("zero.onnx")
    Path("feed.py").write_text(INTERRUPTING)
    words = STATUSES[status].replace("PROVIDER", unavailable()).split()
    start = ["-m", "bnfold", *words] if words else ["-c", DEFECT]
    done = subprocess.run([sys.executable, *start], capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == status, done.stderr
    assert not Path("out.onnx").exists()
    assert "Traceback" not in done.stderr
    assert ("bnfold: error: " in done.stderr) == (status in (2, 3, 4, 5, 70))


# --- the samples --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in a folder with the samples, with `bnfold` and Python on PATH, as a runner of CI does."""
    tools, work = tmp_path / "tools", tmp_path / "work"
    tools.mkdir()
    shutil.copytree(ROOT / "samples", work / "samples")
    for name, command in {"bnfold": "-m bnfold", "python": "", "python3": ""}.items():
        (tools / name).write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {command} "$@"\n')
        (tools / name).chmod(0o755)

    def execute(script: str, *, folder: Path = work, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"} | variables
        line = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    return execute


Shell = Callable[..., "subprocess.CompletedProcess[str]"]


def parsed(path: Path) -> Any:
    return pytest.importorskip("yaml").safe_load(path.read_text(encoding="utf-8"))


def act(shell: Shell, tmp_path: Path, **given: str) -> subprocess.CompletedProcess[str]:
    """The steps of the action, with its inputs where the runner would put them."""
    action = parsed(SAMPLES / "action.yml")
    assert action["runs"]["using"] == "composite"
    inputs = {name: given.get(name, str(declared.get("default", ""))) for name, declared in action["inputs"].items()}
    assert all(name in given for name, declared in action["inputs"].items() if declared.get("required"))
    fixed = {
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "GITHUB_OUTPUT": str(tmp_path / "outputs"),
        "GITHUB_PATH": str(tmp_path / "path"),
        "RUNNER_TEMP": str(tmp_path),
    }
    done = None
    for step in action["runs"]["steps"]:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"]  # inputs come by the environment, never into the script
        values = {
            name: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda found: inputs[found[1]], text).replace(
                "${{ github.action_path }}", str(SAMPLES)
            )
            for name, text in step["env"].items()
        }
        done = shell(step["run"], **fixed, **values)
        if done.returncode:
            break
    assert done is not None
    return done


def test_the_action_recalibrates_and_folds(shell: Shell, tmp_path: Path) -> None:
    shell("mv samples/digits/test.npz 'samples/digits/test images.npz'")
    done = act(
        shell,
        tmp_path,
        model="samples/digits/digits.onnx",
        data="samples/digits/calibration.npz",
        output="fused model.onnx",
        args="--eval 'samples/digits/test images.npz'\n--seed 3\n",
    )
    assert done.returncode == 0, done.stderr
    work = tmp_path / "work"
    outputs = dict(line.split("=", 1) for line in (tmp_path / "outputs").read_text().splitlines())
    assert json.loads((work / outputs["report"]).read_text())["accuracy_after"]["samples"] == 540
    assert "failure" not in cases((work / outputs["junit"]).read_text()).values()
    assert (work / "fused model.onnx").is_file()
    assert "**equivalent**" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "path").exists()


def test_the_action_folds_without_data_and_passes_the_status_on(shell: Shell, tmp_path: Path) -> None:
    assert act(shell, tmp_path, model="samples/digits/digits.onnx", output="fused.onnx").returncode == 0
    done = act(shell, tmp_path, model="fused.onnx", output="again.onnx")
    assert done.returncode == 4
    assert annotations(done.stderr)[0][0] == "error"
    done = act(shell, tmp_path, model="fused.onnx", output="again.onnx", args="--layers 'a b")
    assert (done.returncode, done.stderr) == (2, "::error title=bnfold::args: a quote that is opened isn't closed\n")


@pytest.mark.parametrize(("extra", "suffix"), [("", ""), ("torch,datasets", "[torch,datasets]")])
def test_the_action_installs_its_own_copy_with_the_extra(extra: str, suffix: str, tmp_path: Path) -> None:
    """By a Python whose environments have a pip that writes down what it was to install."""
    pip, python = tmp_path / "bnfold" / "bin" / "pip", tmp_path / "python3"
    pip.parent.mkdir(parents=True)
    for path, script in {pip: f'shift; shift; echo "$@" > {tmp_path}/asked', python: f'echo "$@" > {tmp_path}/made'}.items():
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    step = parsed(SAMPLES / "action.yml")["runs"]["steps"][0]
    given = {"SOURCE": "a folder", "EXTRA": extra, "RUNNER_TEMP": str(tmp_path), "GITHUB_PATH": str(tmp_path / "path")}
    command = ["/bin/bash", "-eo", "pipefail", "-c", step["run"]]
    subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"} | given, check=True)
    assert (tmp_path / "asked").read_text() == f"a folder{suffix}\n"
    assert (tmp_path / "path").read_text() == f"{pip.parent}\n"


def test_the_job_of_gitlab_says_what_it_needs_to_install(tmp_path: Path) -> None:
    (job,) = parsed(SAMPLES / "gitlab-ci.yml").values()
    command = ["/bin/bash", "-ec", "\n".join(job["before_script"])]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"} | job["variables"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "BNFOLD: is what pip installs" in done.stderr


@pytest.mark.parametrize("args", ["", "--strict --seed 2"])
def test_the_job_of_gitlab(args: str, shell: Shell, tmp_path: Path) -> None:
    (job,) = parsed(SAMPLES / "gitlab-ci.yml").values()
    variables = job["variables"] | {
        "MODEL": "samples/digits/digits.onnx",
        "DATA": "samples/digits/calibration.npz",
        "ARGS": args,
    }
    done = shell("\n".join([*job["before_script"], *job["script"]]), **variables)
    assert done.returncode == 0, done.stderr
    work, artifacts = tmp_path / "work", job["artifacts"]
    assert artifacts["when"] == "always"
    for path in artifacts["paths"]:
        assert (work / path.replace("$OUTPUT", variables["OUTPUT"])).is_file()
    assert len(cases((work / artifacts["reports"]["junit"]).read_text())) == 13


def staged(work: Path, shell: Shell) -> None:
    """A repository with a folded model, one whose BatchNorms would fold, and one that is damaged, all of them staged."""
    script = """
        git init -q . && git config user.email a@b && git config user.name n
        mkdir training && cp samples/digits/digits.onnx training/
        bnfold fuse training/digits.onnx -o fused.onnx -q && echo no > note.txt && git add training fused.onnx note.txt
    """
    done = shell(script)
    assert done.returncode == 0, done.stderr


def test_the_hook_on_staged_files(shell: Shell, tmp_path: Path) -> None:
    (hook,) = parsed(ROOT / ".pre-commit-hooks.yaml")
    (configured,) = [h for repo in parsed(SAMPLES / "pre-commit-config.yaml")["repos"] for h in repo["hooks"]]
    assert configured["id"] == hook["id"]
    work = tmp_path / "work"
    staged(work, shell)
    files = [name for name in shell("git diff --cached --name-only").stdout.splitlines() if re.search(hook["files"], name)]
    assert files == ["fused.onnx", "training/digits.onnx"]
    allowed = [name for name in files if not re.search(configured["exclude"], name)]
    assert shell(f"{hook['entry']} {' '.join(allowed)}").returncode == 0
    done = shell(f"{hook['entry']} {' '.join(files)}")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == "training/digits.onnx: 8 BatchNorms would fold: bnfold fuse training/digits.onnx -o fused.onnx\n"
    (work / "bad.onnx").write_bytes(b"no model")
    done = shell(f"{hook['entry']} bad.onnx fused.onnx")
    assert done.returncode == 3
    assert done.stderr.startswith("bnfold: error: bad.onnx")


@pytest.mark.skipif(shutil.which("pre-commit") is None, reason="pre-commit is not installed")
def test_pre_commit_itself_on_a_repository_of_the_hook(shell: Shell, tmp_path: Path) -> None:
    """Offline: what `language: python` would install is on PATH already."""
    hooks, work = tmp_path / "hooks", tmp_path / "work"
    hooks.mkdir()
    text = (ROOT / ".pre-commit-hooks.yaml").read_text()
    assert "language: python" in text
    (hooks / ".pre-commit-hooks.yaml").write_text(text.replace("language: python", "language: system"))
    commit = "git init -q . && git add . && git -c user.email=a@b -c user.name=n commit -qm hooks && git rev-parse HEAD"
    revision = shell(commit, folder=hooks).stdout.strip()
    staged(work, shell)
    config = (
        (SAMPLES / "pre-commit-config.yaml").read_text().replace("https://github.com/OWNER/bnfold", str(hooks)).replace("REF", revision)
    )
    home = {"PRE_COMMIT_HOME": str(tmp_path / "home")}
    (work / ".pre-commit-config.yaml").write_text(config)
    done = shell("git add .pre-commit-config.yaml && pre-commit run", **home)
    assert done.returncode == 0, done.stdout + done.stderr
    (work / ".pre-commit-config.yaml").write_text(re.sub(" *exclude:.*\n", "", config))
    done = shell("git add .pre-commit-config.yaml && pre-commit run", **home)
    assert done.returncode == 1
    assert "training/digits.onnx: 8 BatchNorms would fold" in done.stdout


def test_the_commands_of_the_page(shell: Shell, tmp_path: Path) -> None:
    found = re.search(r"^<!-- ci:.*?^```sh\n(.*?)^```$", (SAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found
    done = shell(found[1])
    assert done.returncode == 0, done.stderr
    work = tmp_path / "work"
    for name in re.findall(r"--(?:report|junit|markdown) (\S+)", found[1]):
        assert (work / name).is_file()
    assert "6 of 6 rows are no worse than in verdict.json" in done.stdout


def test_escaping_leaves_plain_names_alone() -> None:
    assert escape("features.0.bn-1") == "features.0.bn-1"
