"""The certificate that a folded model carries: it survives its travels, changes nothing, and is worth what a second look finds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import bnfold
from bnfold.cli import run
from bnfold.errors import ModelError, UnsupportedError

KEY = "bnfold.certificate"


def sha(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def certified(path: str | Path) -> dict[str, Any]:
    found = bnfold.certificate(path)
    assert found is not None
    return found


@pytest.fixture
def fused(here: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """model.onnx and what `fuse` makes of it."""
    assert run(["fuse", "model.onnx", "-o", "fused.onnx", "-q"]) == 0
    capsys.readouterr()
    return here / "fused.onnx"


# --- what it says ----------------------------------------------------------------------------------------------------------------------


def test_a_folded_file_states_what_it_is(fused: Path) -> None:
    found = certified(fused)
    verdict = found.pop("verdict")
    assert found == {
        "schema": "bnfold.certificate/1",
        "bnfold": bnfold.__version__,
        "made_by": "fuse",
        "inputs": [{"name": "model.onnx", "sha256": sha("model.onnx")}],
        "recalibrated": False,
        "batchnorms": {"before": 1, "after": 0},
        "folded": ["bn"],
        "lowered": [],
        "kept": [],
        "constants": [],
        "merged": [],
        "composed": {},
        "dropped": {},
        "clamped": [],
        "equalised": [],
        "earlier": [],
    }
    assert verdict["verdict"] == "equivalent"
    assert verdict["levels"]["coefficients"]["worst"] <= 1
    assert verdict["levels"]["function"]["error"] < 1e-6
    assert verdict["outputs"][0]["name"] == "y"


def test_it_counts_batchnorms_and_no_other_constants(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load("model.onnx")
    shift = onnx.numpy_helper.from_array(np.arange(4, dtype=np.float32).reshape(4, 1, 1), "shift")
    model.graph.initializer.append(shift)
    model.graph.node[-1].output[0] = "shifted"
    model.graph.node.append(onnx.helper.make_node("Add", ["shifted", "shift"], ["y"], name="add"))
    onnx.save(model, "more.onnx")
    assert run(["fuse", "more.onnx", "-o", "out.onnx", "-q"]) == 0
    found = certified("out.onnx")
    assert (found["folded"], found["constants"], found["batchnorms"]) == (["bn"], ["add"], {"before": 1, "after": 0})
    capsys.readouterr()
    assert run(["inspect", "out.onnx", "-q"]) == 0
    assert "BatchNorms: 1 folded, 0 kept; 1 other constant operator folded" in " ".join(capsys.readouterr().out.split())


def test_it_is_in_the_metadata_and_survives_other_tools(fused: Path) -> None:
    proto = onnx.load(fused)
    assert [entry.key for entry in proto.metadata_props] == [KEY]
    onnx.checker.check_model(proto)
    first = certified(fused)
    onnx.save(proto, "again.onnx")
    onnx.save(onnx.shape_inference.infer_shapes(proto), "inferred.onnx", save_as_external_data=True, location="w", size_threshold=0)
    ir.save(ir.load("again.onnx"), "by-ir.onnx")
    for name in ("again.onnx", "inferred.onnx", "by-ir.onnx"):
        assert certified(name) == first
        assert bnfold.certificate(bnfold.load(name)) == first
        assert bnfold.certificate(onnx.load(name)) == first


def test_it_changes_nothing_but_the_metadata(fused: Path) -> None:
    import onnxruntime as ort

    plain = onnx.load("model.onnx")
    made = onnx.load(fused)
    assert [i.SerializeToString() for i in (*made.graph.input, *made.graph.output)] == [
        i.SerializeToString() for i in (*plain.graph.input, *plain.graph.output)
    ]
    bare = onnx.load(fused)
    del bare.metadata_props[:]
    x = {"x": np.load("x.npy")[:2]}
    one, other = (ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, x)[0] for m in (made, bare))
    np.testing.assert_array_equal(one, other)


def test_metadata_of_others_stays(here: Path, small: Callable[..., onnx.ModelProto]) -> None:
    model = small()
    model.metadata_props.add(key="author", value="someone")
    onnx.save(model, "named.onnx")
    assert run(["fuse", "named.onnx", "-o", "out.onnx", "-q"]) == 0
    assert {entry.key: entry.value for entry in onnx.load("out.onnx").metadata_props}["author"] == "someone"


def test_the_same_fold_gives_the_same_bytes(here: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        assert run(["fuse", "model.onnx", "-o", name, "-q"]) == 0
    assert Path("one.onnx").read_bytes() == Path("two.onnx").read_bytes()


def test_external_data_are_inputs_too(here: Path, small: Callable[..., onnx.ModelProto]) -> None:
    onnx.save(small(), "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    assert run(["fuse", "big.onnx", "-o", "out.onnx", "-q"]) == 0
    assert certified("out.onnx")["inputs"] == [{"name": name, "sha256": sha(name)} for name in ("big.onnx", "big.data")]
    assert run(["verify", "out.onnx", "--against", "big.onnx", "-q"]) == 0


def test_where_nothing_folds_there_is_nothing_to_certify(here: Path) -> None:
    assert run(["fuse", "none.onnx", "-o", "out.onnx", "-q"]) == 0
    assert bnfold.certificate("out.onnx") is None
    for name in ("model.onnx", "gone.onnx"):
        assert bnfold.certificate(name) is None
        assert bnfold.certificate(bnfold.load(name)) is None


def test_a_live_model_has_no_files_to_state(small: Callable[..., onnx.ModelProto], here: Path) -> None:
    fused, _ = bnfold.fuse(small())
    found = bnfold.certificate(fused)
    assert found is not None
    assert found["inputs"] == []
    unchecked, _ = bnfold.fuse(small(), check=False)
    assert bnfold.certificate(unchecked)["verdict"] is None


def test_a_file_that_changed_since_it_was_loaded_has_no_hash(here: Path, small: Callable[..., onnx.ModelProto]) -> None:
    model = bnfold.load("model.onnx")
    onnx.save(small(seed=9, batch=4), "model.onnx")
    fused, _ = bnfold.fuse(model)
    assert bnfold.certificate(fused)["inputs"] == [{"name": "model.onnx", "sha256": ""}]


# --- chains ----------------------------------------------------------------------------------------------------------------------------


def two_norms(small: Callable[..., onnx.ModelProto]) -> onnx.ModelProto:
    """One BatchNorm folds, the other stands behind a Sigmoid and stays."""
    model = small()
    model.graph.node[-1].output[0] = "n"
    model.graph.node.append(onnx.helper.make_node("Sigmoid", ["n"], ["s"], name="sigmoid"))
    model.graph.node.append(onnx.helper.make_node("BatchNormalization", ["s", "gamma", "beta", "mean", "var"], ["y"], name="last"))
    return model


def test_a_recalibrated_file_claims_nothing_and_says_what_it_was(here: Path, small: Callable[..., onnx.ModelProto]) -> None:
    onnx.save(two_norms(small), "two.onnx")
    assert run(["fuse", "two.onnx", "-o", "half.onnx", "-q"]) == 0
    first = certified("half.onnx")
    assert (first["folded"], first["kept"], first["batchnorms"]) == (["bn"], ["last"], {"before": 2, "after": 1})
    assert run(["recalibrate", "half.onnx", "--data", "x.npy", "-o", "fresh.onnx", "-q"]) == 0
    found = certified("fresh.onnx")
    assert (found["made_by"], found["verdict"], found["recalibrated"]) == ("recalibrate", None, True)
    assert found["inputs"] == [{"name": "half.onnx", "sha256": sha("half.onnx")}]
    (before,) = found["earlier"]
    assert before["inputs"] == [{"name": "two.onnx", "sha256": sha("two.onnx")}]
    assert (before["made_by"], before["verdict"]) == ("fuse", "equivalent")
    assert "folded" not in before


def test_a_second_fold_is_a_new_certificate_that_keeps_the_first(here: Path, small: Callable[..., onnx.ModelProto]) -> None:
    first, _ = bnfold.fuse(bnfold.load("model.onnx"))
    bnfold.save(first, "first.onnx")
    again = onnx.load("first.onnx")
    again.graph.node[-1].output[0] = "n"
    for source in small().graph.initializer:
        if source.name not in {t.name for t in again.graph.initializer}:
            again.graph.initializer.append(source)
    again.graph.node.append(onnx.helper.make_node("BatchNormalization", ["n", "gamma", "beta", "mean", "var"], ["y"], name="more"))
    onnx.save(again, "more.onnx")
    assert run(["fuse", "more.onnx", "-o", "second.onnx", "-q"]) == 0
    found = certified("second.onnx")
    assert found["inputs"] == [{"name": "more.onnx", "sha256": sha("more.onnx")}]
    assert found["folded"] == ["more"]
    assert [(each["made_by"], each["inputs"][0]["name"]) for each in found["earlier"]] == [("fuse", "model.onnx")]


def test_a_recalibrated_plain_file_has_none_and_its_fold_states_it(here: Path) -> None:
    assert run(["recalibrate", "model.onnx", "--data", "x.npy", "-o", "fresh.onnx", "-q"]) == 0
    assert bnfold.certificate("fresh.onnx") is None
    assert run(["fuse", "fresh.onnx", "-o", "out.onnx", "-q"]) == 0
    found = certified("out.onnx")
    assert (found["inputs"][0]["sha256"], found["recalibrated"]) == (sha("fresh.onnx"), False)


def test_a_pipeline_states_its_input_and_that_the_statistics_are_new(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pipeline", "model.onnx", "--data", "x.npy", "-o", "ready.onnx", "-q"]) == 0
    capsys.readouterr()
    found = certified("ready.onnx")
    assert (found["made_by"], found["recalibrated"]) == ("pipeline", True)
    assert found["inputs"] == [{"name": "model.onnx", "sha256": sha("model.onnx")}]
    assert [row["provider"] for row in found["verdict"]["levels"]["deployment"]] == ["cpu", "cpu"]
    assert run(["verify", "ready.onnx", "--against", "model.onnx", "-q"]) == 4
    assert "claims no equivalence with it, for the statistics were measured afresh in between" in capsys.readouterr().err


def test_the_argument_is_never_changed(here: Path, small: Callable[..., onnx.ModelProto]) -> None:
    model = bnfold.load("model.onnx")
    bnfold.fuse(model)
    assert bnfold.certificate(model) is None
    fused, _ = bnfold.fuse(two_norms(small))
    before = fused.SerializeToString(deterministic=True)
    bnfold.recalibrate(fused, np.load("x.npy"))
    assert fused.SerializeToString(deterministic=True) == before


# --- inspect, and verify --against -------------------------------------------------------------------------------------------------------


def test_inspect_shows_it(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "fused.onnx"]) == 0
    out = capsys.readouterr().out
    assert f"from: model.onnx, SHA-256 {sha('model.onnx')}" in out
    assert f"made by: bnfold {bnfold.__version__}, fuse" in out
    assert "BatchNorms: 1 folded, 0 kept" in out
    assert "verdict: equivalent - weights: all 2 arrays are" in out
    assert "dynamo" not in out
    assert run(["inspect", "fused.onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certificate"] == certified(fused)
    assert run(["inspect", "model.onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certificate"] is None


def test_against_its_original_the_verdict_holds(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "fused.onnx", "--against", "model.onnx", "-q"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("equivalent, compared on ")
    assert out.splitlines()[-1] == "the certificate's verdict (equivalent) still holds"
    assert run(["verify", "fused.onnx", "--against", "model.onnx", "--json", "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [Path(i["path"]).name for i in report["inputs"]] == ["model.onnx", "fused.onnx"]
    assert report["certificate"] == {
        "stated": "equivalent",
        "holds": True,
        "reason": "the certificate's verdict (equivalent) still holds",
    }


def test_the_page_for_ci_says_it_too(fused: Path) -> None:
    assert run(["verify", "fused.onnx", "--against", "model.onnx", "-q", "--markdown", "page.md", "--junit", "page.xml"]) == 0
    assert "\nthe certificate's verdict (equivalent) still holds\n" in Path("page.md").read_text()


def test_against_another_file_it_is_a_failure_in_one_line(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "fused.onnx", "--against", "another.onnx", "-q"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"another.onnx: not what fused.onnx was made from: its SHA-256 is {sha('another.onnx')}" in err
    assert f"the certificate states {sha('model.onnx')} (model.onnx)" in err


def test_weights_that_were_changed_later_break_the_claim(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(fused)
    weight = model.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(model, fused)
    assert run(["verify", "fused.onnx", "--against", "model.onnx", "-q"]) == 1
    assert "the certificate's verdict (equivalent) does not hold: it is now different" in capsys.readouterr().out


def test_a_certificate_without_a_check_gets_its_verdict_now(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "model.onnx", "-o", "out.onnx", "--no-verify", "-q"]) == 0
    capsys.readouterr()
    assert run(["verify", "out.onnx", "--against", "model.onnx", "-q"]) == 0
    assert "the certificate holds no verdict; the one made now is equivalent" in capsys.readouterr().out


def test_without_a_certificate_it_is_an_input_that_can_not_be_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "model.onnx", "--against", "model.onnx", "-q"]) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "model.onnx: no certificate in it; bnfold fuse and bnfold pipeline write one" in err


def test_a_certificate_that_states_no_file_can_not_be_held_against_one(
    here: Path, small: Callable[..., onnx.ModelProto], capsys: pytest.CaptureFixture[str]
) -> None:
    bnfold.save(bnfold.fuse(small())[0], "out.onnx")
    assert run(["verify", "out.onnx", "--against", "model.onnx", "-q"]) == 1
    assert "the certificate states no file" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": "other/1"}', "[" * 100_000])
def test_a_damaged_certificate(text: str, fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(fused)
    model.metadata_props[0].value = text
    onnx.save(model, fused)
    with pytest.raises(ModelError, match=r"fused\.onnx: the certificate in it is damaged"):
        bnfold.certificate(fused)
    assert run(["verify", "fused.onnx", "--against", "model.onnx", "-q"]) == 3
    assert capsys.readouterr().err.count("\n") == 1
    assert run(["inspect", "fused.onnx"]) == 0
    assert "the certificate in it is damaged" in capsys.readouterr().out


def test_a_certificate_may_say_anything_and_does_nothing(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {
        "schema": "bnfold.certificate/1",
        "bnfold": 7,
        "made_by": "\x1b[2J\n::error::x",
        "inputs": {"a": 1},
        "batchnorms": [],
        "folded": 3,
    }
    odd |= {"verdict": "equivalent", "earlier": [3, {"inputs": [None]}]}
    model = onnx.load(fused)
    model.metadata_props[0].value = json.dumps(odd)
    onnx.save(model, fused)
    assert run(["inspect", "fused.onnx"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert not [line for line in out.splitlines() if line.lstrip().startswith("::")]
    assert run(["verify", "fused.onnx", "--against", "model.onnx", "-q"]) == 1


def test_two_models_or_one_against_its_original(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["fused.onnx"], ["model.onnx", "fused.onnx", "--against", "model.onnx"]):
        assert run(["verify", *line]) == 2
        assert "verify takes two models, REFERENCE CANDIDATE, or a folded one with --against ORIGINAL" in capsys.readouterr().err


def test_files_that_are_no_models(here: Path) -> None:
    Path("empty.onnx").touch()
    Path("text.onnx").write_text("hello")
    for name in ("empty.onnx", "text.onnx", "nowhere.onnx"):
        with pytest.raises(ModelError, match=name):
            bnfold.certificate(name)


# --- PyTorch ---------------------------------------------------------------------------------------------------------------------------

FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)).eval()
    for each in (net[1], net[4]):
        nn.init.uniform_(each.weight, 0.5, 1.5)
        nn.init.normal_(each.bias)
    return net
"""


@pytest.fixture
def checkpoint(here: Path) -> list[str]:
    """A checkpoint, and the options that load it."""
    torch = pytest.importorskip("torch")
    Path("nets.py").write_text(FACTORY)
    scope: dict[str, Any] = {}
    exec(FACTORY, scope)
    torch.save(scope["make"]().state_dict(), "net.pth")
    return ["--arch", "nets.py:make", "--input-shape", "2,3,9,9", "-q"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt2", ".onnx"])
def test_it_travels_in_every_kind_of_file(suffix: str, checkpoint: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    out = f"fused{suffix}"
    assert run(["fuse", "net.pth", *checkpoint, "-o", out]) == 0
    found = certified(out)
    assert found["inputs"] == [{"name": "net.pth", "sha256": sha("net.pth")}]
    assert found["batchnorms"] == {"before": 2, "after": 0}
    assert len(found["folded"]) == 2
    assert found["verdict"]["verdict"] == "equivalent"
    assert bnfold.certificate(bnfold.load(out, arch="nets.py:make")) == found
    capsys.readouterr()
    assert run(["inspect", out, *checkpoint[:2], *(checkpoint[2:] if suffix in (".safetensors", ".pth") else ["-q"])]) == 0
    assert "from: net.pth, SHA-256" in capsys.readouterr().out
    assert run(["verify", out, "--against", "net.pth", *checkpoint]) == 0
    assert "the certificate's verdict (equivalent) still holds" in capsys.readouterr().out


def test_a_recalibrated_module_drops_its_claim(checkpoint: list[str]) -> None:
    import torch

    fused, _ = bnfold.fuse(bnfold.load("net.pth", arch="nets.py:make"), example=torch.zeros(1, 3, 9, 9))
    fused.append(torch.nn.BatchNorm2d(4).eval())
    fresh, _ = bnfold.recalibrate(fused, torch.randn(8, 3, 9, 9))
    found = bnfold.certificate(fresh)
    assert found is not None
    assert (found["verdict"], found["made_by"], found["earlier"][0]["made_by"]) == (None, "recalibrate", "fuse")
    assert bnfold.certificate(fused)["made_by"] == "fuse"
    program = torch.export.export(fused, (torch.zeros(2, 3, 9, 9),))
    assert bnfold.certificate(program) is None
    again, _ = bnfold.fuse(program)
    assert bnfold.certificate(again)["inputs"] == []


def test_a_checkpoint_without_one(checkpoint: list[str]) -> None:
    assert bnfold.certificate("net.pth") is None
    with pytest.raises(UnsupportedError):
        bnfold.certificate(3)


def test_the_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    from test_readme import ROOT, named

    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    monkeypatch.chdir(tmp_path)
    for line in named("certificate").splitlines():
        program, *arguments = line.split()
        assert program == "bnfold"
        assert run(arguments) == 0
    assert capsys.readouterr().out.endswith("the certificate's verdict (equivalent) still holds\n")
