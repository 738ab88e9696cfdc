"""What the rules say in words, and of which operators."""

from __future__ import annotations

from pathlib import Path

import pytest

import bnfold
from bnfold.algebra.rules import RULES
from bnfold.cli import run
from bnfold.verbs.explanations import WORDS


def test_every_rule_has_its_words() -> None:
    assert WORDS.keys() == RULES.keys()


@pytest.mark.parametrize("rule", RULES)
def test_operators_of_onnx_are_of_the_rule_that_names_them(rule: str) -> None:
    import onnx
    from onnx.defs import has

    from bnfold.backends.onnx.lowering.table import OPERATORS

    named = [name for name in WORDS[rule][2].split() if has(name) and name != "Constant"]
    assert set(named) <= OPERATORS.keys(), onnx.__version__


def test_an_operator_is_found_by_its_rule_or_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("Max", "MaxPool", "max_pool2d", "nn.MaxPool2d", "torch.amax", ""):
        assert run(["explain", what]) == 0
        assert "max(s*x + t) = s*max(x) + t if s >= 0" in capsys.readouterr().out
    assert run(["explain", "MaxPol"]) == 2
    assert "nothing crosses what isn't in the table; did you mean 'MaxPool'" in capsys.readouterr().err


def test_a_layer_says_why_it_stays_and_what_would_let_it_go(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "bn", "none.onnx"]) == 0
    out = capsys.readouterr().out
    reason = bnfold.inspect(bnfold.load("none.onnx")).layers[0].reason
    assert f"it stays: {reason}" in out
    assert "what would let it go: a non-linearity stands between it and the weights" in out
    assert run(["explain", "bn", "model.onnx", "--report", "r.json"]) == 0
    assert "it folds into conv" in capsys.readouterr().out
    assert run(["explain", "bm", "model.onnx"]) == 2
    assert "there are 'bn'" in capsys.readouterr().err
    assert run(["explain", "model.onnx"]) == 2
    assert "model.onnx is a file: name one of its BatchNorms before it" in capsys.readouterr().err
    assert bnfold.explain("bn", bnfold.load("none.onnx")).what == "bn"
