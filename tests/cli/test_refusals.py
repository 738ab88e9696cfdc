"""No bad news at status 0: what harms, what can't be told, what doesn't fit, what changed nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import bnfold
from bnfold.cli import run

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 4


def named(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """x (batch, 4) -> MatMul -> BatchNorm -> y, which tells the largest of four numbers, and data that it was made for (`same.npz`)."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 200)
    x = (rng.standard_normal((200, CLASSES)) + 4 * np.eye(CLASSES)[labels]).astype(np.float32)
    arrays = {"w": np.eye(CLASSES), "gamma": x.std(0), "beta": x.mean(0), "mean": x.mean(0), "var": x.var(0)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["c"], name="mm")]
    nodes.append(helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y"], name="bn", epsilon=1e-9))
    ports = [helper.make_tensor_value_info(name, 1, ["batch", CLASSES]) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "g", ports[:1], ports[1:], initializers), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        ),
        "model.onnx",
    )
    np.savez("same.npz", x=x, labels=labels)
    few = np.array([*np.flatnonzero(labels == 0)[:30], *np.flatnonzero(labels == 1)[:1]])  # of one class: its mean is no mean of all
    np.savez("skewed.npz", x=x[few], labels=labels[few])
    return tmp_path


# --- what harms -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["recalibrate", "pipeline"])
def test_statistics_that_harm_are_status_1_with_their_scores_and_nothing_is_written(
    verb: str, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = named(classifier)
    line = [verb, "model.onnx", "--data", "skewed.npz", "--eval", "same.npz", "-o", "out.onnx"]
    assert run([*line, "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["effect"]["verdict"] == "harmed"
    last = err.splitlines()[-1]
    scores = [f"{100 * found[which]['accuracy']:.1f} %" for which in ("accuracy_before", "accuracy_after")]
    assert f"bnfold: error: harmed: on 200 labelled samples, accuracy {scores[0]} before and {scores[1]} after, loss " in last
    assert "written" in last
    assert named(classifier) == before
    assert run([*line, "--accept-harm"]) == 0
    assert "out.onnx" in named(classifier)


def test_ci_hears_of_harm(classifier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    line = ["pipeline", "model.onnx", "--data", "skewed.npz", "--eval", "same.npz", "-o", "out.onnx", "--junit", "r.xml"]
    assert run([*line, "--markdown", "r.md"]) == 1
    out, err = capsys.readouterr()
    assert sum(" on 200 labelled samples" in each for each in out.splitlines()) == 1
    assert "::error title=model.onnx%3A harmed::harmed: on 200 labelled samples, accuracy " in err
    assert 'failures="1"' in (text := Path("r.xml").read_text())
    assert re.search(r'name="scores" time="0">\n +<failure message="harmed: on 200 labelled samples', text)
    assert "**failed**: harmed: on 200 labelled samples" in Path("r.md").read_text()
    assert run([*line, "--accept-harm", "--force"]) == 0
    assert "accepted by --accept-harm" in (text := Path("r.xml").read_text())
    assert 'failures="0"' in text
    assert "::error" not in capsys.readouterr().err


def test_the_library_gives_no_model_that_was_harmed(classifier: Path) -> None:
    from bnfold.verbs.pipelines import pipeline

    model = bnfold.load("model.onnx")
    skewed, same = (dict(np.load(name)) for name in ("skewed.npz", "same.npz"))
    harmed, report = pipeline(model, skewed, labelled=same)
    assert harmed is None
    assert report.notes[-1] == report.harm
    accepted, report = pipeline(model, skewed, labelled=same, accept_harm=True)
    assert accepted is not None
    assert report.harm


@pytest.mark.parametrize("verb", ["recalibrate", "pipeline"])
@pytest.mark.parametrize("more", [[], ["--method", "exact"], ["--force-random"]])
def test_random_numbers_are_nothing_to_measure_on(verb: str, more: list[str], classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "model.onnx", "--data", "random", "-o", "out.onnx", *more]) == 2
    assert "--method NAME --force-random" in capsys.readouterr().err
    assert "out.onnx" not in named(classifier)


def test_random_numbers_where_both_are_asked_for(classifier: Path) -> None:
    assert run(["recalibrate", "model.onnx", "--data", "random", "-o", "out.onnx", "--method", "exact", "--force-random"]) == 0


# --- labels -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worst", [CLASSES, 511, -1])
def test_labels_of_other_classes_are_refused(worst: int, classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = dict(np.load("same.npz"))
    found["labels"][7] = worst
    np.savez("other.npz", **found)
    for more in (["--data", "other.npz"], ["--data", "same.npz", "--eval", "other.npz"]):
        assert run(["pipeline", "model.onnx", *more, "-o", "out.onnx"]) == 3
        assert f"there is a label {worst}, and the network's classes are 0 to 3" in capsys.readouterr().err
    assert "out.onnx" not in named(classifier)
    assert run(["pipeline", "model.onnx", "--data", "other.npz", "--eval", "none", "-o", "out.onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy_before"] is None


def test_two_folders_are_no_thousand_classes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load("model.onnx")
    model.graph.node[-1].output[0] = "inner"
    model.graph.node.append(helper.make_node("GlobalAveragePool", ["inner"], ["y"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, ["batch", 4, 1, 1]))
    onnx.save(model, "classes.onnx")
    rng = np.random.default_rng(0)

    def pictures(folder: str, classes: int) -> None:
        for place in range(2 * classes):
            path = Path(folder, f"class{place // 2}", f"{place}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)

    pictures("two", 2)
    pictures("four", 4)
    line = ["recalibrate", "classes.onnx", "-o", "out.onnx", "--data"]
    assert run([*line, "two"]) == 3
    assert "its 2 sub-folders can't be the network's 4 classes" in capsys.readouterr().err
    assert run([*line, "two", "--eval", "none"]) == 0
    assert run([*line, "four", "--force", "--accept-harm", "--report", "four.json"]) == 0
    assert json.loads(Path("four.json").read_text())["accuracy_before"]["samples"] == 8


# --- folds ------------------------------------------------------------------------------------------------------------------------------


def test_a_check_that_is_inconclusive_is_status_6_and_nothing_is_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The square root of random data: both models give nothing but NaN, whatever the fold."""
    model = onnx.load("model.onnx")
    model.graph.node[0].input[0] = "root"
    model.graph.node.insert(0, helper.make_node("Sqrt", ["x"], ["root"]))
    onnx.save(model, "nan.onnx")
    assert run(["fuse", "nan.onnx", "-o", "out.onnx", "-q"]) == 6
    out, err = capsys.readouterr()
    assert "inconclusive" in out
    assert err.startswith("bnfold: error: the check is inconclusive (--no-verify leaves it out): ")
    assert err.endswith("nothing was written\n")
    assert "out.onnx" not in named(here)
    assert run(["fuse", "nan.onnx", "-o", "out.onnx", "--no-verify"]) == 0


def test_where_nothing_folds_that_is_a_warning(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "none.onnx", "-o", "out.onnx", "-q"]) == 0
    assert capsys.readouterr().err == "bnfold: warning: nothing folds: the only BatchNorm stays, and the model is as it was\n"
    assert run(["fuse", "none.onnx", "-o", "strict.onnx", "--strict", "-q"]) == 1
    assert "strict.onnx" not in named(here)


def test_a_constant_channel_that_stays_is_no_batchnorm(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = np.ones((2, 3, 1, 1), np.float32)
    weight[1] = 0
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, c, 4, 4]) for name, c in (("x", 3), ("y", 2))]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "dead.onnx")
    assert run(["fuse", "dead.onnx", "-o", "out.onnx", "--drop-dead", "-q"]) == 0
    assert capsys.readouterr().err == "bnfold: warning: nothing folds, and the model is as it was\n"


def test_no_channels_is_nothing_to_compare(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"w": np.zeros((0, 3, 1, 1), np.float32), **dict.fromkeys("gbmv", np.zeros(0, np.float32))}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, c, 4, 4]) for name, c in (("x", 3), ("y", 0))]
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("BatchNormalization", ["a", *"gbmv"], ["y"])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(a, name) for name, a in arrays.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "empty.onnx")
    assert run(["fuse", "empty.onnx", "-o", "out.onnx", "-q"]) == 6
    assert "all outputs are empty; nothing was written" in capsys.readouterr().err


# --- one status for one kind of thing ---------------------------------------------------------------------------------------------------

USAGE = {
    "--std 0": "every value must be above 0",
    "--interpolation bicubicc": "isn't known; give nearest, lanczos, bilinear, bicubic, box or hamming; did you mean 'bicubic'?",
    "--preprocess timn": "--preprocess timn: give timm, hf or torchvision, or a CONFIG.json of theirs; did you mean 'timm'?",
    "--image-size 16": "images of 16x16 don't fit",
    "--mean 1,2": "one for each channel",
}


@pytest.mark.parametrize("option", USAGE)
def test_a_bad_value_of_an_option_is_status_2(option: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pictures").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("pictures/a.png")
    assert run(["recalibrate", "model.onnx", "--data", "pictures", "-o", "out.onnx", *option.split()]) == 2
    assert USAGE[option] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("library", "remedy", "line"),
    [
        ("pyarrow", "pip install pyarrow", "recalibrate model.onnx --data rows.parquet -o x.onnx"),
        ("torch", "pip install torch onnxscript", "inspect x.pt2"),
    ],
)
def test_an_extra_that_is_missing_is_status_4(library: str, remedy: str, line: str, here: Path) -> None:
    import zipfile

    Path("rows.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with zipfile.ZipFile("x.pt2", "w") as archive:
        archive.writestr("x/archive_format", "pt2")
    code = f"import sys; sys.modules[{library!r}] = None\nfrom bnfold.cli import run\nsys.exit(run({line.split()}))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert remedy in done.stderr


# --- what was written -------------------------------------------------------------------------------------------------------------------


def test_all_files_that_were_written_are_named(
    here: Path, capsys: pytest.CaptureFixture[str], small: Callable[..., onnx.ModelProto]
) -> None:
    model = small()
    onnx.save(model, "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "weight"))
    lines = (
        "recalibrate big.onnx --data x.npy -o fresh.onnx --report fresh.json --html fresh.html",
        "pipeline big.onnx --data x.npy -o out.onnx --junit out.xml --markdown out.md --report out.json",
        "verify model.onnx another.onnx --bundle parts --report parts.json",
    )
    for line in lines:
        before = named(here)
        assert run(line.split()) in (0, 1)
        told = capsys.readouterr().out.splitlines()[-1].removeprefix("written: ").replace(" (the old statistics)", "")
        assert set(told.replace(" and ", ", ").split(", ")) == named(here) - before
