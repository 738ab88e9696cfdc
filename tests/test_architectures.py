"""A handful of the sweep over real architectures; `python -m tests.architectures` runs all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures.__main__ import main, table, trouble
from architectures.list import NAMES, OWN, make
from architectures.sweep import EXACT, error, general, onnx_route, route, run
from vision import package

import bnfold
from bnfold.backends.torch.export.trace import trace

CASES = {**dict.fromkeys(OWN, 0), "crepe": 3, "mobilenet_v3_small": 0, "ghostnet_100": 0}


@pytest.mark.parametrize(("name", "stay"), CASES.items())
def test_all_routes_keep_the_same_ones_and_are_exact(name: str, stay: int) -> None:
    if name not in OWN:
        package("timm")
    module, shape = make(name)
    double = module.double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    want = run(double, x)
    here, copied = route(double, x)
    there, program = route(trace(double, x).program, None)
    assert here["after"] == there["after"] == stay
    assert here["kept"] == there["kept"]
    assert here["lowered"] == there["lowered"] == 0
    assert error(want, run(copied, x)) < EXACT
    assert error(want, run(program.module(), x)) < EXACT
    if name in OWN:
        other = onnx_route(double, x)
        assert other["kept"] == here["kept"]
        assert other["lowered"] == 0
        assert other["error"] < EXACT


def test_the_list_is_long_enough() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 60


def test_the_reasons_are_without_names() -> None:
    reason = "before it: conv2d a.b blocks, its output is also used by c; behind it: relu a.relu blocks, its shift is not zero"
    assert general(reason) == "relu blocks, its shift is not zero"
    assert general("relu a blocks, 1 of its 16 scales is negative") == "relu blocks, some of its scales are negative"


def test_the_command_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results.jsonl"
    routes = {key: {"before": 2, "after": 0, "error": 1e-15, "reasons": {}, "kept": []} for key in ("onnx", "torch", "pt2")}
    good = {"name": "tabular", **routes, "verdict": "equivalent", "reason": "", "seconds": 1.0}
    bad = good | {"name": "unet", "torch": routes["torch"] | {"after": 1, "kept": ["norm"]}}
    results.write_text("".join(json.dumps(each) + "\n" for each in (good, bad)))
    monkeypatch.setattr("sys.argv", ["architectures", "tabular", "unet", "--results", str(results)])
    assert main() == 1
    assert "1 of 2 architectures meet every criterion; not: unet" in capsys.readouterr().out
    assert trouble(bad) == "the routes keep different ones"
    assert trouble(good | {"pt2": routes["pt2"] | {"error": 1e-3}}) == "not exact"
    assert trouble(good | {"pt2": routes["pt2"] | {"lowered": 1}}) == "some stay with --lower mul-add"
    assert trouble(good | {"verdict": "different", "reason": "x"}) == "the verdict is different: x"
    kept = {route: result | {"after": result["before"]} for route, result in routes.items()}
    assert not trouble(good | kept | {"verdict": "inconclusive", "reason": "nothing is folded"})
    shown = table([good, {"name": "unet", "failed": "it took more than 5 s"}])
    assert "| tabular | 2 | 0 |" in shown
    assert "| unet | | | | | not measured: it took more than 5 s |" in shown
    assert bnfold.__version__
