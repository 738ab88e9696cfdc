"""Pages: one file each, without scripts, without anything from elsewhere, all escaped; and in a real browser, small and large."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import bnfold
from bnfold.cli import run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ODD = "<script>alert(1)</script>&\"'"
VERBS = ("inspect", "recalibrate", "fuse", "verify", "pipeline", "bench")
# What the browser is asked of a page in a frame of some width: whether it is wider than that, and which words stand on two lines.
PROBE = """
const frame = document.querySelector("iframe");
frame.onload = () => {
  const inner = frame.contentDocument, broken = [];
  const walk = inner.createTreeWalker(inner.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    for (const word of node.data.matchAll(/[\\p{L}\\p{N}]+/gu)) {
      const range = inner.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1) broken.push(word[0]);
    }
  }
  const style = frame.contentWindow.getComputedStyle(inner.body);
  const found = {over: inner.documentElement.scrollWidth - frame.clientWidth, broken, text: style.color, page: style.backgroundColor,
    boxes: inner.querySelectorAll(".op").length, dots: inner.querySelectorAll("circle.dot").length};
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
};
"""


class Balanced(HTMLParser):
    """Holds that every element is closed, and remembers what there is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "wbr", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> dict[str, str]:
    """A page of every verb, of the digits."""
    folder = tmp_path_factory.mktemp("pages")
    data, out, model = str(digits.parent / "calibration.npz"), str(folder / "out.onnx"), str(digits)
    lines = {
        "inspect": [model],
        "recalibrate": [model, "--data", data, "--samples", "64", "-o", str(folder / "fresh.onnx")],
        "fuse": [model, "-o", out],
        "verify": [model, out],
        "pipeline": [model, "--data", data, "--eval", str(digits.parent / "test.npz"), "-o", str(folder / "ready.onnx")],
        "bench": [model, out, "--rounds", "5"],
    }
    found = {}
    for verb in VERBS:
        path = folder / f"{verb}.html"
        assert run([verb, *lines[verb], "--html", str(path), "-q"]) == 0
        found[verb] = path.read_text(encoding="utf-8")
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_a_page_is_one_file(verb: str, pages: dict[str, str]) -> None:
    text = pages[verb]
    assert text.startswith("<!DOCTYPE html>")
    tags = set(Balanced(text.removeprefix("<!DOCTYPE html>")).tags)
    assert not tags & {"script", "img", "link", "iframe", "object", "embed"}
    assert not re.search(r"https?:|url\(|@import|src=|href=|\son\w+=", text)


def test_a_page_says_what_the_report_knows(pages: dict[str, str]) -> None:
    shown = {verb: unescape(re.sub(r"<[^>]+>", "", text)) for verb, text in pages.items()}
    assert "8 of 8 would fold" in shown["inspect"]
    assert "Drift by channel" in shown["recalibrate"]
    assert pages["recalibrate"].count('class="strip"') == 16
    assert all(title in shown["fuse"] for title in ("equivalent", "Size", "BatchNorms", "Weight ranges", "Error by layer", "Both networks"))
    assert all(title in shown["verify"] for title in ("Error by layer", "Both networks", "folded into /stem/Conv", "takes up /bn/"))
    assert all(title in shown["pipeline"] for title in ("Scores", "Drift by channel", "Both networks", "improved"))
    assert "the median of a call" in shown["bench"]


@pytest.mark.parametrize(("lower", "written"), [("mul-add", ["Mul", "Add"]), ("depthwise", ["Conv"])])
def test_what_was_lowered_is_marked_and_compared(lower: Any, written: list[str]) -> None:
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        onnx.helper.make_node("Sigmoid", ["a"], ["b"], name="sigmoid"),
        onnx.helper.make_node("BatchNormalization", ["b", "gamma", "beta", "mean", "variance"], ["c"], name="bn"),
        onnx.helper.make_node("Tanh", ["c"], ["y"], name="tanh"),
    ]
    rng = np.random.default_rng(0)
    arrays = {name: rng.uniform(0.5, 1.5, 4).astype(np.float32) for name in ("gamma", "beta", "mean", "variance")}
    arrays["w"] = rng.standard_normal((4, 3, 1, 1)).astype(np.float32)
    ports = [[onnx.helper.make_tensor_value_info(name, 1, ["n", channels, 5, 5])] for name, channels in (("x", 3), ("y", 4))]
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "net", *ports, weights), ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 17)]
    )
    fused, _ = bnfold.fuse(model, lower=lower)
    report = bnfold.verify(model, fused, by_layer=True)
    assert [row.note for row in report.graph if row.mark == "lowered"] == written
    assert [row.reference for row in report.graph if row.mark == "same"] == ["conv", "sigmoid", "tanh"]
    assert {layer.name for layer in report.layers} == {"conv", "sigmoid", "bn", "tanh"}
    assert all(layer.candidate < 1e-6 for layer in report.layers)
    assert f"lowered to {written[-1]}" in report._repr_html_()


def test_names_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model = small()
    for node in model.graph.node:
        node.name = ODD + node.op_type
    onnx.save(model, "odd.onnx")
    assert run(["fuse", "odd.onnx", "-o", "out.onnx", "--html", "fuse.html", "-q"]) == 0
    assert run(["verify", "odd.onnx", "out.onnx", "--html", "verify.html", "-q"]) == 0
    np.save("x.npy", np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32))
    assert run(["recalibrate", "odd.onnx", "--data", "x.npy", "-o", "fresh.onnx", "--html", "recalibrate.html", "-q"]) == 0
    for verb in ("fuse", "verify", "recalibrate"):
        text = Path(f"{verb}.html").read_text(encoding="utf-8")
        assert "script" not in Balanced(text.removeprefix("<!DOCTYPE html>")).tags
        assert escape(ODD + "BatchNormalization") in text.replace("<wbr>", "")


def test_a_report_in_a_notebook(digits: Path) -> None:
    fused, report = bnfold.fuse(bnfold.load(digits))
    text = bnfold.verify(bnfold.load(digits), fused, by_layer=True)._repr_html_()
    Balanced(text)
    assert text.startswith('<div class="bnfold">')
    depth, outside = 0, ""
    for c in text.partition("<style>")[2].partition("</style>")[0]:
        depth += (c == "{") - (c == "}")
        outside += c if depth == 0 else ""
    assert all(".bnfold" in each or each.strip().startswith("@media") for each in outside.split("}") if each.strip())
    assert str(report).splitlines()[0].startswith("8 of 8 folded, equivalent, ")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1300])
def test_in_a_browser(width: int, scheme: str, pages: dict[str, str], tmp_path: Path) -> None:
    """Nothing is wider than the page, but for tables that scroll by themselves; no word is broken; light and dark can be read."""
    for verb in ("verify", "pipeline") if scheme == "light" else ("inspect",):
        found = probed(pages[verb], width, scheme, tmp_path)
        assert found["over"] <= 0
        assert found["broken"] == []
        text, page = (brightness(found[key]) for key in ("text", "page"))
        assert (text < 80 < 200 < page) if scheme == "light" else (page < 80 < 200 < text)
        if verb != "inspect":
            assert found["boxes"] == 29 - 1 + 20  # the exporter's Identity does nothing
            assert found["dots"] >= 20


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_long_names_break_between_their_words(tmp_path: Path, small: Any) -> None:
    model = small()
    for node in model.graph.node:
        node.name = f"some_backbone_of_a_network_with_residual_units_stage_1_{node.op_type}_1"
    fresh, _ = bnfold.recalibrate(model, [np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)])
    report = bnfold.verify(model, fresh, by_layer=True)
    found = probed(f"<body class=bnfold>{report._repr_html_()}</body>", 400, "light", tmp_path)
    assert found["over"] <= 0
    assert found["broken"] == []
    assert report.verdict == "different"


def probed(page: str, width: int, scheme: str, folder: Path) -> dict[str, Any]:
    """What the browser says of a page in a frame."""
    assert BROWSER is not None
    frame = f'<iframe srcdoc="{escape(page)}" style="border:0;width:{width}px;height:900px"></iframe>'
    (folder / "frame.html").write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body>{frame}<script>{PROBE}</script></body>', encoding="utf-8"
    )
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"]
    line += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*line, (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=120, check=True)
    (answer,) = re.findall(r"FOUND(\{.*\})END", done.stdout)
    return dict(json.loads(unescape(answer)))


def brightness(colour: str) -> float:
    """The mean of red, green and blue in `rgb(...)`."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3
