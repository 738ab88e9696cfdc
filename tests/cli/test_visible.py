"""Names in a model do nothing on a terminal or in the log of a CI job: they are shown escaped, each on its line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from bnfold.cli import run
from bnfold.cli.streams import fitted
from bnfold.text import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer1.0.bn[x]", "layer1.0.bn[x]"),
        ("größe 模型", "größe 模型"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u2028\u202ea", r"\u2028\u202ea"),
        ("\ud800", r"\ud800"),
        ("::error::x", r"\x3a:error::x"),
        ("  ::stop-commands::x", r"  \x3a:stop-commands::x"),
        ("std::vector", "std::vector"),
        ("a ##[error]b", r"a #\x23[error]b"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("name", ["bn\n::error::owned", "::add-mask::folded", "bn\r\n\x1b[2J::warning::x"])
def test_no_line_of_a_table_is_a_command(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in ("model", "none"):
        model = onnx.load(f"{source}.onnx")
        for node in model.graph.node:
            node.name = f"{name} {node.op_type}" if node.op_type != "BatchNormalization" else name
        for info in model.graph.output:
            old, info.name = info.name, name
        for node in model.graph.node:
            node.output[:] = [name if output == old else output for output in node.output]
        onnx.save(model, f"odd-{source}.onnx")
    lines = (
        (["inspect", "odd-model.onnx"], 0),
        (["inspect", "odd-none.onnx"], 0),
        (["fuse", "odd-model.onnx", "-o", "odd-fused.onnx"], 0),
        (["recalibrate", "odd-none.onnx", "--data", "x.npy", "-o", "odd-fresh.onnx"], 0),
        (["verify", "odd-none.onnx", "odd-fresh.onnx"], 1),
        (["pipeline", "odd-model.onnx", "--data", "x.npy", "-o", "odd-ready.onnx"], 0),
    )
    for line, status in lines:
        assert run(line) == status
        for text in capsys.readouterr():
            assert "\x1b" not in text
            assert "\r" not in text
            assert not [each for each in text.split("\n") if each.lstrip().startswith("::")], line


@pytest.mark.parametrize(("columns", "lines"), [(40, 4), (0, 1), (None, 1)])
def test_remarks_break_between_words_on_a_terminal(columns: int | None, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def size(fd: int) -> os.terminal_size:
        if columns is None:
            raise OSError
        return os.terminal_size((columns, 24))

    text = "bnfold: error: a file whose name isn't broken, /a/rather/long/path/to-some-model/of-which-nobody-knows.onnx: no such file"
    monkeypatch.setattr(os, "get_terminal_size", size)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
    found = fitted(text)
    assert found.replace("\n", " ") == text
    assert found.count("\n") + 1 == lines
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert fitted(text) == text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_written_with_what_it_has(encoding: str, digits: Path, tmp_path: Path) -> None:
    """Bars and signs of a table, and names, in a process of its own."""
    arguments = ["recalibrate", digits, "--data", digits.parent / "test.npz", "-o", "größe☃.onnx", "-q"]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-m", "bnfold", *arguments], capture_output=True, env=environment, cwd=tmp_path, check=True)
    out = done.stdout.decode(encoding)
    assert ("█" if encoding == "utf-8" else "####") in out
    assert f"accuracy 80.9 % ({'+-' if encoding == 'ascii' else '±'} " in out
    assert {"ascii": r"gr\xf6\xdfe\u2603.onnx", "cp1252": r"größe\u2603.onnx", "utf-8": "größe☃.onnx"}[encoding] in out
