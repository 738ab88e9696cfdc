"""The comparison with other tools on two rows; `python -m tests.rivals` makes it whole."""

from __future__ import annotations

import onnx
import pytest
from rivals import __main__ as command
from rivals.judge import judge_onnx, names, network
from rivals.tools import TOOLS, Tool, own

ROWS = names(of_modules=False)[:2]


def test_two_rows_and_a_tool_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(TOOLS, "absent", Tool("no_such_package", own))
    monkeypatch.setattr("sys.argv", ["rivals", "--models", "--cases", "2", "--tools", "bnfold", "absent"])
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert "| bnfold | catalogue | 2 | 2 | 0 | 0 | 0 | 0 |" in printed
    assert "| absent | not installed |" in printed
    assert "bnfold: 0 wrong, failed or invalid; architectures: none" in printed


def test_a_process_that_ends_or_takes_too_long_is_a_row() -> None:
    ended = list(command.run("no such tool", ROWS, 60))
    assert [("KeyError" in result["crashed"], result["name"]) for result in ended] == [(True, name) for name in ROWS]
    (late,) = command.run("bnfold", ROWS[:1], 0)
    assert late["crashed"].startswith("more than 0 s")
    assert command.line("x", "catalogue", [late | {"before": 1}]).startswith("| x | catalogue | 1 | 1 | 1 | 0 | 1 | 0 |")


def test_what_is_wrong_with_a_model() -> None:
    model, data, limit = network(ROWS[0], False)
    made = own(model)
    assert judge_onnx(model, made, data, limit) == {"before": 1, "left": 0}
    assert judge_onnx(model, None, data, limit) == {"before": 1, "left": 1}
    weight = next(tensor for tensor in made.graph.initializer if tensor.name == made.graph.node[0].input[1])
    weight.CopyFrom(onnx.numpy_helper.from_array(1.5 * onnx.numpy_helper.to_array(weight), weight.name))
    assert "wrong" in judge_onnx(model, made, data, limit)
    made.graph.node[0].input[1] = "nothing"
    assert "invalid" in judge_onnx(model, made, data, limit)
