"""What the rules say in words, and of which operators."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from cases.builder import Net
from onnx import parser

import bnfold
from bnfold.algebra.rules import RULES
from bnfold.cli import run
from bnfold.verbs.explanations import WORDS

NETWORK = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 2, 6, 6] x) => (float[N, 2, 6, 6] y)
<float[3, 2, 1, 1] w = {1, -2, 0.5, 1, 3, 1}, float[3] g1 = {1, 0, 2}, float[3] b = {0.1, 0.2, 0.3}, float[3] m = {0.1, 0, 0.2},
 float[3] v = {1, 2, 3}, float[3, 3, 1, 1] w1 = {1, 2, 1, -1, 3, 2, 1, 1, 1}, float[3] g2 = {1, -1, 0.5},
 float[3] b2 = {0, 0.1, 0.2}, float[3] m2 = {0.3, 0, 0.1}, float[3] v2 = {2, 1, 1}, float[2, 3, 1, 1] w2 = {1, 2, 3, 4, 5, 6}>
{
  [conv] a = Conv (x, w)
  [first] a1 = BatchNormalization (a, g1, b, m, v)
  [relu1] a2 = Relu (a1)
  [mid] a3 = Conv (a2, w1)
  [tanh] c = Tanh (a3)
  [second] d = BatchNormalization (c, g2, b2, m2, v2)
  [relu] e = Relu (d)
  [last] y = Conv (e, w2)
}"""


def test_every_rule_has_its_words() -> None:
    assert WORDS.keys() == RULES.keys()


@pytest.mark.parametrize("rule", RULES)
def test_operators_of_onnx_are_of_the_rule_that_names_them(rule: str) -> None:
    import onnx
    from onnx.defs import has

    from bnfold.backends.onnx.lowering.table import OPERATORS

    named = [name for name in WORDS[rule][2].split() if has(name) and name != "Constant"]
    assert set(named) <= OPERATORS.keys(), onnx.__version__


def test_every_operator_of_both_tables_is_found() -> None:
    pytest.importorskip("torch")
    from bnfold.backends.onnx.lowering.table import OPERATORS
    from bnfold.backends.torch.lowering import table

    assert [name for name in (*OPERATORS, *table.OPERATORS) if not bnfold.explain(name).text] == []


def test_an_operator_is_found_by_its_rule_or_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    for what in (["Max"], ["MaxPool"], ["max_pool2d"], ["nn.MaxPool2d"], ["torch.amax"], []):
        assert run(["explain", *what]) == 0
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


def test_advice_is_of_what_blocks() -> None:
    """A shift stops before a Relu and before a padding, of which the second alone can be told to pad otherwise."""
    net = Net("padded")
    shifted = net.bn(net.op("Relu", net.conv(net.input("N", 3, 8, 8), 3, 4)), 4, positive=True)
    net.output(net.conv(net.op("Tanh", shifted), 4, 2), net.conv(net.bn(net.op("Tanh", shifted), 4), 4, 2, pads=1))
    behind_relu, before_padding = (" ".join(bnfold.explain(f"BatchNormalization_node_{i}", net.model()).text) for i in range(2))
    assert "its shift is not zero" in behind_relu
    assert "what pads with zeros" not in behind_relu
    assert "what pads with zeros must not see a shift" in before_padding


def test_what_options_would_let_go_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A network with a channel that is constant, and a BatchNorm with negative gammas between two non-linearities."""
    model = parser.parse_model(NETWORK)
    monkeypatch.chdir(tmp_path)
    onnx.save(model, "model.onnx")

    def said(*arguments: str) -> str:
        assert run(["explain", *arguments]) == 0
        return capsys.readouterr().out

    text = said("second", "model.onnx")
    assert "it stays: " in text
    assert "what would let it go: --clamps, with which it folds into" in text
    assert "--clone" not in text
    text = said("second", "model.onnx", "--clamps")
    assert "it folds into" in text
    assert "clips with bounds for each channel" in text
    dropped = "1 channel of the 3 of conv holds one number whatever goes in; it can be taken out"
    assert f"with --drop-dead: {dropped}" in said("first", "model.onnx")
    assert dropped in said("first", "model.onnx", "--drop-dead").replace("with --drop-dead: ", "")
    assert "it takes up first" in said("conv", "model.onnx")

    options = ["--clamps", "--drop-dead", "--equalise"]
    assert run(["fuse", "model.onnx", "-o", "fused.onnx", *options]) == 0
    assert "clips with bounds for each channel" in capsys.readouterr().out
    certificate = bnfold.certificate("fused.onnx")
    assert certificate is not None
    assert (certificate["dropped"], certificate["clamped"], certificate["equalised"]) == ({"conv": 1}, ["relu"], ["conv"])
    assert "it was folded, as the model's certificate states" in said("second", "fused.onnx")
    assert "it lost channels" in said("conv", "fused.onnx")
    assert run(["inspect", "fused.onnx"]) == 0
    out = capsys.readouterr().out
    for line in (
        "channels: 1 constant, taken out of 1 layer",
        "clips: 1 with bounds for each channel",
        "equalised: the channel ranges of 1",
    ):
        assert line in out


def test_linear_layers_in_a_row_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    net = Net("two in a row")
    net.output(net.conv(net.conv(net.bn(net.conv(net.input("N", 3, 8, 8), 3, 8), 8), 8, 32, kernel=1), 32, 4, kernel=1))
    onnx.save(net.model(), "model.onnx")
    (row,) = [each for each in bnfold.inspect(bnfold.load("model.onnx"), merge_linear=True).composed if each.into]
    assert run(["explain", row.layers[0], "model.onnx", "--merge-linear"]) == 0
    assert f"become one, {row.into}" in capsys.readouterr().out
    assert run(["fuse", "model.onnx", "-o", "fused.onnx", "--merge-linear", "-q"]) == 0
    assert run(["inspect", "fused.onnx"]) == 0
    assert "linear layers: 1 operator made of several in a row" in capsys.readouterr().out
