"""A small part of the sweep over right folds and seeded defects; `python -m tests.power` runs all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import power.sweep
import pytest
import torch
from opened import verify
from power.__main__ import error, errors, main, table
from power.defects import DEFECTS
from power.list import AS_MODULES, IN_HALF, NAMES
from power.models import ONNX_FOLDS, RememberedOnnx, RememberedTorch, exported, grouped
from power.rivals import RIVALS
from power.sweep import sweep
from torch import nn

import bnfold
from bnfold.backends.onnx.files.load import from_proto
from bnfold.report import VerifyReport


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """Two small networks; every defect."""
    grouped = sweep("grouped", routes=("onnx",), dtypes=("float32", "float16"))
    return [grouped, sweep("tabular", routes=("torch",), dtypes=("float32",))]


def test_no_right_fold_is_called_wrong_and_no_defect_is_missed(found: list[dict[str, Any]]) -> None:
    assert [text for result in found for text in errors(result)] == []
    runs = [run for result in found for run in result["runs"]]
    assert {run["what"] for run in runs if run["kind"] == "defect"} == DEFECTS.keys()
    assert {run["what"] for run in runs if run["kind"] == "right"} >= {"bnfold", "torch.fx", "ONNX Runtime, basic"}


def test_what_half_precision_hides_is_below_a_bound_that_the_report_states(found: list[dict[str, Any]]) -> None:
    below = [run for result in found for run in result["runs"] if run.get("below")]
    assert "epsilon 1.1e-5 for 1e-5" in {run["what"] for run in below}
    for run in below:
        assert run["dtype"] == "float16"
        assert run["size"] <= 5
        assert "rounding alone explains" in run["reason"]


def test_an_epsilon_shows_only_in_the_coefficients(found: list[dict[str, Any]]) -> None:
    runs = [run for result in found for run in result["runs"] if run["what"].startswith("epsilon") and run["dtype"] == "float32"]
    assert runs
    for run in runs:
        assert run["levels"] == ["coefficients"]
        assert not run["rivals"]["allclose 1e-3"]


def words(report: VerifyReport) -> str:
    """All that it says but how long it took."""
    return json.dumps(report.to_dict() | {"seconds": 0})


@pytest.mark.parametrize(("name", "route"), [("grouped", "onnx"), ("tabular", "torch")])
def test_the_sweep_measures_what_verify_says_of_the_models_themselves(name: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each report of the sweep, where runs are remembered, against `bnfold.verify` of the two models."""
    judged = []

    def both(reference: Any, candidate: Any, example: Any = None, **given: Any) -> VerifyReport:
        report = verify(reference, candidate, example=example, **given)
        if isinstance(reference, RememberedOnnx):
            reference, candidate = reference.model, candidate.model
        elif isinstance(reference, RememberedTorch):
            args, _ = reference.traced.program.example_inputs
            reference, candidate, example = reference.traced.model, candidate.traced.model, args[0]
        assert words(report) == words(bnfold.verify(reference, candidate, example=example, **given))
        judged.append(report.verdict)
        return report

    monkeypatch.setattr(power.sweep, "verify", both)
    some = {title: DEFECTS[title] for title in ("mean not subtracted", "an output missing")}
    monkeypatch.setattr(power.sweep, "DEFECTS", some)
    sweep(name, routes=(route,), dtypes=("float32",))
    assert judged.count("equivalent") >= 2
    assert judged.count("different") == len(some)


def test_a_tool_that_changes_nothing_has_made_no_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor has bnfold, where every BatchNorm stays; of a model against itself nothing is measured."""
    monkeypatch.setattr(power.sweep, "DEFECTS", {})
    kinds = {}
    for name, route in (("tabular", "onnx"), ("crepe", "torch")):
        result = sweep(name, routes=(route,), dtypes=("float32",))
        kinds |= {(name, run["what"]): run["kind"] for run in result["runs"]}
        assert errors(result) == []
    assert (kinds["tabular", "bnfold"], kinds["tabular", "ONNX Runtime, basic"]) == ("right", "unchanged")
    assert kinds["crepe", "bnfold"] == "unchanged"


class Branches(nn.Module):
    """Two, added. The last BatchNorm of one shifts everything far below what the ReLU behind it passes."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.shut, self.head = grouped()[:6], grouped()[:6], grouped()[6:]
        nn.init.constant_(self.shut[4].bias, -100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.alive(x) + self.shut(x))


def test_a_layer_that_says_nothing_is_found_in_a_remembered_model_too() -> None:
    """Before it could stand anything, so where the coefficients can't be compared, not even a right fold is called equivalent."""
    proto = exported(Branches().eval(), (3, 12, 12), torch.float32)
    made = ONNX_FOLDS["ONNX Runtime, extended"](proto)
    (name,) = made.graph.node[-1].output
    made.graph.node[-1].output[0] = "once"
    made.graph.node.append(onnx.helper.make_node("Max", ["once", "once"], [name]))  # which pairs with nothing
    report = verify(RememberedOnnx(from_proto(proto)), from_proto(made), samples=4)
    assert (report.verdict, report.reason) == (
        "inconclusive",
        "not all was exercised: on these data /shut/shut.5/Relu gives the same whatever it is fed",
    )
    assert words(report) == words(bnfold.verify(proto, made, samples=4))


def test_the_rivals_ask_what_they_ask() -> None:
    want = {"y": np.array([1.0, 1000.0], np.float32), "z": np.zeros(2, np.float32)}
    alarms = {name: rival(want, dict(want)) for name, rival in RIVALS.items()}
    assert not any(alarms.values())
    near = {"y": np.array([1.0, 1000.02], np.float32), "z": np.full(2, 5e-6, np.float32)}
    assert {name: rival(want, near) for name, rival in RIVALS.items()} == {
        "assert_close": True,
        "allclose 1e-3": False,
        "allclose": True,
        "Polygraphy": True,
    }
    lost = {"y": want["y"]}
    assert [rival(want, lost) for rival in RIVALS.values()] == [True, False, False, False]
    nan = {"y": np.array([1.0, np.nan], np.float32), "z": want["z"]}
    assert [rival(want, nan) for rival in RIVALS.values()] == [True, True, True, False]


def test_the_lists() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 10
    assert set(NAMES) >= IN_HALF | AS_MODULES


def test_the_command_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"route": "onnx", "dtype": "float32", "seed": 0, "reason": "x", "rivals": dict.fromkeys(RIVALS, False)}
    right = common | {"kind": "right", "what": "bnfold", "verdict": "equivalent", "levels": []}
    defect = common | {"kind": "defect", "what": "a", "verdict": "different", "levels": ["coefficients"], "below": False}
    missed = defect | {"verdict": "equivalent", "levels": []}
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"name": "tabular", "seconds": 1.0, "runs": [right, defect, missed, missed | {"below": True}]}) + "\n")
    monkeypatch.setattr("sys.argv", ["power", "tabular", "--results", str(results)])
    assert main() == 1
    out = capsys.readouterr().out
    assert "| a, float32 | 3 | 1 (and 1 below rounding) | 1: 1 | 3 | 3 | 3 | 3 |" in out
    assert "tabular: onnx: float32: 0: defect: a: equivalent: x" in out
    assert not error(right)
    assert table([{"name": "unet", "failed": "it took more than 5 s"}]).count("\n") == 5
