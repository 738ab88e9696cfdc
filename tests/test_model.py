"""The protocol that every verb asks: opened once, decided once, under any names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import bnfold
from bnfold.backends.onnx.files.load import to_proto
from bnfold.backends.open import open_both, open_model
from bnfold.folding import plan
from bnfold.folding.options import FoldOptions
from bnfold.verbs.pipelines import pipeline
from bnfold.verification.comparison import alike
from bnfold.verification.verify import verify


def test_a_pipeline_decides_what_folds_once_for_the_copy_and_once_for_each_side_of_its_proofs(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide, decided = plan.fold, []

    def counted(graph: Any, **options: Any) -> Any:
        decided.append(graph)
        return decide(graph, **options)

    monkeypatch.setattr(plan, "fold", counted)
    made, report = pipeline(bnfold.load(digits), np.load(digits.parent / "calibration.npz")["image"][:64])
    assert made is not None
    assert report.verify is not None
    assert report.verify.verdict == "equivalent"
    assert len(decided) == 3


def test_a_plan_outlives_a_comparison(digits: Path) -> None:
    model = bnfold.load(digits)
    first, second, _ = open_both(model, bnfold.fuse(model)[0])
    one, other = ({**verify(first, second).to_dict(), "seconds": 0} for _ in range(2))
    assert one == other
    assert first.plan() is first.plan()
    assert first.plan(FoldOptions(clone=True)) is not first.plan()


def test_what_is_opened_is_given_back_as_it_came(digits: Path) -> None:
    proto, model = onnx.load(digits), bnfold.load(digits)
    assert open_model(proto).in_source_form(model) == to_proto(model)
    assert open_model(model).in_source_form(model) is model
    assert open_model(opened := open_model(model)) is opened
    assert open_model(model, opened) is opened


def affine(x: str, y: str) -> onnx.ModelProto:
    """y = 2 x + 1, by these names."""
    nodes = [helper.make_node("Mul", [x, "two"], ["m"]), helper.make_node("Add", ["m", "one"], [y])]
    kept = [numpy_helper.from_array(np.array([value], np.float32), name) for name, value in (("two", 2), ("one", 1))]
    given, made = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in (x, y))
    graph = helper.make_graph(nodes, "g", [given], [made], kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_candidate_goes_by_the_references_names() -> None:
    _, candidate = alike(open_model(affine("x", "y")), open_model(affine("a", "y")))
    assert [spec.name for spec in candidate.inputs()] == [port.name for port in candidate.ports()[0]] == ["x"]
    assert list(candidate.random(batch=2, seed=0, input_shapes={"x": (2, 3)})) == ["x"]
    assert candidate.own({"x": np.zeros(3)}).keys() == {"a"}
    assert {value.name for value in candidate.plan().inputs} == {"x"}
    feeds = {"x": np.ones((2, 3), np.float32)}
    for runner in (candidate.exact(), candidate.session("cpu")):
        np.testing.assert_array_equal(runner.run(feeds)["y"], 3 * feeds["x"])
    renamed = candidate.renamed({"x": "a"}, {"z": "y"})
    assert list(renamed.exact().run(feeds)) == list(renamed.plan().outputs) == [port.name for port in renamed.ports()[2]] == ["z"]
    assert list(candidate.plan().outputs) == ["y"]
