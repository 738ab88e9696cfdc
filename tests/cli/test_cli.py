"""The command line's contracts: what goes to which stream, exit statuses, files, reports."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import bnfold
from bnfold.cli import run
from bnfold.cli.app import EXAMPLES

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("inspect", "recalibrate", "fuse", "verify", "pipeline", "bench")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- help and version ---------------------------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"bnfold {bnfold.__version__}\n"


def test_without_a_command_the_help_comes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([command, "--help"]) == 0
    assert EXAMPLES[command] in capsys.readouterr().out


def test_help_is_asked_for_as_people_do(capsys: pytest.CaptureFixture[str]) -> None:
    for line, other in ((["help"], ["--help"]), (["help", "fuse"], ["fuse", "--help"])):
        assert run(line) == run(other) == 0
        one, two = capsys.readouterr().out.split("Usage:")[1:]
        assert one.split() == two.split()


def test_the_help_comes_at_once() -> None:
    """Under 0.3 s for the whole process: of processor time, and the least of three, since what else runs can only add to it."""

    def seconds() -> float:
        used = os.times()
        return used.children_user + used.children_system

    taken = []
    for _ in range(3):
        before = seconds()
        subprocess.run([sys.executable, "-m", "bnfold", "--help"], cwd=ROOT, capture_output=True, check=True)
        taken.append(seconds() - before)
    assert min(taken) < 0.3


def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    monkeypatch.chdir(tmp_path)
    for example in EXAMPLES.values():  # in their order: verify and bench read what fuse writes
        program, *arguments = shlex.split(example)
        assert program == "bnfold"
        for path in (each for each in arguments if each.startswith("part-")):
            part = ["recalibrate", arguments[1], "--data", "samples/digits/calibration.npz", "--method", "precise", "--stats", path]
            assert run([*part, "--shard", f"{path[5]}/2"]) == 0
        assert run(arguments) == 0, (example, capsys.readouterr().err)
    assert {"fresh.onnx", "fused.onnx", "ready.onnx"} <= names(tmp_path)


# --- what goes where ----------------------------------------------------------------------------------------------------------------


def test_results_on_standard_output_and_nothing_of_it_cut(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "none.onnx"]) == 0
    out, err = capsys.readouterr()
    row = next(line for line in out.splitlines() if line.startswith("bn "))
    reason = bnfold.inspect(bnfold.load("none.onnx")).layers[0].reason
    assert row.split()[:3] == ["bn", "4", "stays"]
    assert reason
    assert f"1 stays: {reason} (bn)" in out.splitlines()
    assert out.startswith("0 of 1 would fold, ")
    assert f"1 stays: {reason} (bn)" in out.splitlines()
    assert err == ""


def test_progress_and_remarks_on_standard_error_as_plain_lines(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "model.onnx", "-o", "out.onnx"]) == 0
    out, err = capsys.readouterr()
    assert "written: out.onnx" in out
    assert re.fullmatch(r"bnfold: fold and check\nbnfold: took \d\.\d s\n", err)


def test_quiet_leaves_standard_error_empty(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recalibrate", "model.onnx", "--data", "x.npy", "-o", "out.onnx", "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_what_is_done_to_the_data_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recalibrate", "model.onnx", "--data", "x.npy", "-o", "out.onnx"]) == 0
    assert "bnfold: data: " in capsys.readouterr().err


def test_what_becomes_of_an_image_is_said_and_the_command_line_goes_before_the_configuration(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cats/1.png", "cats/2.png", "dogs/3.png"):
        Path("pictures", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(Path("pictures", name))
    Path("config.json").write_text(json.dumps({"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.8}))
    line = ["recalibrate", "model.onnx", "--data", "pictures", "--preprocess", "config.json", "--force"]
    pipelines = []
    for more in ([], ["--std", "0.125,0.125,0.125", "--resize", "9", "--bgr"]):
        assert run([*line, *more, "-o", f"{len(more)}.onnx"]) == 0
        pipelines.append(capsys.readouterr().err.splitlines()[0])
    first, second = pipelines
    assert first.startswith("bnfold: data: pictures")
    assert "0.25" in first
    assert "0.125" in second
    assert first != second
    assert Path("0.onnx").read_bytes() != Path("5.onnx").read_bytes()


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 140])
def test_a_narrow_terminal_gets_every_name_whole(columns: int) -> None:
    from bnfold.report import Counts, FuseReport, Layer
    from bnfold.report.render.terminal import text as text_of

    reason = "the value is read by two operators, only one of which can take it"
    layers = (Layer("features.0.bn[x]", 64, "folded", ("features.0.conv",), ""), Layer("features.1.bn[x]", 64, "kept", (), reason))
    text = text_of(FuseReport(batchnorms=Counts(2, 1), layers=layers), verbose=True, width=columns)
    assert "…" not in text
    assert all(name in text for name in ("features.0.bn[x]", "features.1.bn[x]", "features.0.conv")) or "features.*.bn[x]" in text
    assert reason in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= columns


# --- reports ------------------------------------------------------------------------------------------------------------------------


def test_json_is_the_report_and_nothing_else(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "model.onnx", "-o", "out.onnx", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    digest = hashlib.sha256(Path("model.onnx").read_bytes()).hexdigest()
    assert report["schema"] == "bnfold.fuse/1"
    assert report["bnfold"] == bnfold.__version__
    assert report["inputs"] == [{"path": "model.onnx", "sha256": digest}]
    assert report["seconds"] > 0
    assert report["batchnorms"] == {"before": 1, "after": 0}
    layer = report["layers"][0]
    assert (layer["name"], layer["channels"], layer["verdict"], layer["into"], layer["reason"]) == ("bn", 4, "folded", ["conv"], "")
    assert report["merged"] == []
    assert report["bytes_added"] == 0
    assert report["verify"]["verdict"] == "equivalent"


def test_the_report_goes_to_a_file_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "model.onnx", "--report", "r.json"]) == 0
    assert "bn " in capsys.readouterr().out
    assert json.loads(Path("r.json").read_text())["schema"] == "bnfold.inspect/1"
    assert run(["inspect", "model.onnx", "--report", "r.json"]) == 2
    assert "r.json: the file exists; give another name, or --force to overwrite it" in capsys.readouterr().err
    assert run(["inspect", "model.onnx", "--report", "r.json", "--force"]) == 0
    assert run(["inspect", "model.onnx", "--report", "model.onnx", "--force"]) == 2
    assert "the name must end in .json" in capsys.readouterr().err


def test_every_report_has_the_keys_of_the_contract(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def report(*arguments: str, status: int = 0) -> dict[str, object]:
        assert run([*arguments, "--json", "-q"]) == status
        found = json.loads(capsys.readouterr().out)
        assert found["schema"] == f"bnfold.{arguments[0]}/1"
        assert {"bnfold", "inputs", "seconds"} <= found.keys()
        return found

    found = report("recalibrate", "model.onnx", "--data", "x.npy", "-o", "fresh.onnx")
    assert {"method", "samples", "layers"} <= found.keys()
    assert found["samples"] == 24
    assert {"name", "count", "mean_shift", "var_ratio", "stderr"} <= found["layers"][0].keys()
    assert [i["path"] for i in found["inputs"]] == ["model.onnx", "x.npy"]
    found = report("verify", "model.onnx", "another.onnx", status=1)
    assert found["verdict"] == "different"
    assert found.keys() >= {"levels", "outputs", "first_difference"}
    assert found["levels"].keys() == {"coefficients", "function", "deployment"}
    assert {"provider", "optimisation", "ratio"} <= found["levels"]["deployment"][0].keys()
    assert {"name", "max_abs", "max_rel", "error_ratio"} <= found["outputs"][0].keys()
    found = report("pipeline", "model.onnx", "--data", "x.npy", "-o", "ready.onnx")
    assert all(found[step] for step in ("recalibrate", "fuse", "verify"))
    found = report("bench", "model.onnx", "ready.onnx", "--rounds", "5")
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]


# --- what the commands do -----------------------------------------------------------------------------------------------------------


def test_the_files_that_external_data_stand_in_are_inputs_too(
    here: Path, small: Callable[..., onnx.ModelProto], capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(small(), "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    assert run(["inspect", "big.onnx", "--json"]) == 0
    found = {Path(i["path"]).name: i["sha256"] for i in json.loads(capsys.readouterr().out)["inputs"]}
    assert found == {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in ("big.onnx", "big.data")}


def test_dry_run_writes_nothing(here: Path) -> None:
    before = names(here)
    assert run(["fuse", "model.onnx", "--dry-run"]) == 0
    assert run(["fuse", "model.onnx", "--dry-run", "-o", "out.onnx"]) == 0
    assert names(here) == before


def test_where_nothing_folds_the_output_is_the_input(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "none.onnx", "-o", "out.onnx"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("0 of 1 folded, ")
    assert "1 stays: " in out
    assert onnx.load("out.onnx") == onnx.load("none.onnx")


def test_strict_fails_where_a_batchnorm_stays(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "model.onnx", "-o", "out.onnx", "--strict"]) == 0
    capsys.readouterr()
    for command in (["fuse", "none.onnx"], ["pipeline", "none.onnx", "--data", "x.npy"]):
        assert run([*command, "-o", "strict.onnx", "--strict", "-q"]) == 1
        out, err = capsys.readouterr()
        assert err == "bnfold: error: --strict: 1 BatchNorm stays; nothing was written\n"
        assert "1 stays: " in out
    assert "strict.onnx" not in names(here)


def test_a_model_without_batchnorms_is_told_how_to_keep_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["fuse"], ["recalibrate", "--data", "x.npy"], ["pipeline", "--data", "x.npy"]):
        assert run([*command, "gone.onnx", "-o", "out.onnx", "-q"]) == 4, command
        err = capsys.readouterr().err
        assert err.startswith("bnfold: error: ")
        assert "the model holds no BatchNorm" in err
        assert "dynamo=True, optimize=False" in err
        assert "training=torch.onnx.TrainingMode.PRESERVE" in err
    assert run(["inspect", "gone.onnx"]) == 0
    assert "dynamo=True, optimize=False" in capsys.readouterr().out
    assert "out.onnx" not in names(here)


def test_verify_says_its_verdict_by_its_status(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "model.onnx", "-o", "out.onnx"]) == 0
    capsys.readouterr()
    assert run(["verify", "model.onnx", "out.onnx", "--data", "x.npy"]) == 0
    assert capsys.readouterr().out.startswith("equivalent, compared on 24 samples of x.npy")
    assert run(["verify", "model.onnx", "another.onnx"]) == 1
    assert capsys.readouterr().out.startswith("different, first at ")


def test_inconclusive_is_a_status_of_its_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("nan.npy", np.full((4, 3, 8, 8), 1e38, np.float32))
    constant = onnx.load("model.onnx")
    constant.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.zeros((4, 3, 3, 3), np.float32), "weight"))
    onnx.save(constant, "constant.onnx")
    assert run(["verify", "constant.onnx", "constant.onnx"]) == 6
    assert capsys.readouterr().out.startswith("inconclusive, ")


def test_pipeline_stops_where_the_verdict_is_not_equivalent(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constant = onnx.load("model.onnx")
    constant.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.full((4, 3, 3, 3), 1e-30, np.float32), "weight"))
    onnx.save(constant, "constant.onnx")
    status = run(["pipeline", "constant.onnx", "--data", "x.npy", "-o", "out.onnx", "-q"])
    err = capsys.readouterr().err
    assert status in (0, 1, 3, 6)
    assert ("out.onnx" in names(here)) == (status == 0), err


def test_bench_gives_a_ratio_with_its_range(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bench", "model.onnx", "model.onnx", "--rounds", "5", "--batch-size", "2,5", "--unoptimised", "--threads", "1"]
    assert run([*line, "--report", "r.json"]) == 0
    out = capsys.readouterr().out
    assert "5 interleaved rounds, cpu, optimisation off, 1 thread" in out
    assert " times as long as the reference at batch 2 and 5" in out
    assert [line.split()[0] for line in out.splitlines() if " ms " in line] == ["2", "5"]
    found = json.loads(Path("r.json").read_text())
    assert found["ratio"] == found["candidate"] / found["reference"]  # the seconds that are shown don't contradict it
    for side in found["latencies"]:
        assert 0 < side["p50"] <= side["p95"] <= side["p99"]
        assert side["throughput"] == 2 / side["p50"]
    assert found["timings"][0] == {key: found[key] for key in found["timings"][0]}
    assert [row["batch_size"] for row in found["timings"]] == [2, 5]
    noise = [row["ratio_low"] <= 1 <= row["ratio_high"] for row in found["timings"]]
    assert out.startswith("no difference beyond noise: ") == all(noise)
    for row, is_noise in zip(found["timings"], noise, strict=True):
        assert (f"{row['ratio']:.3g} (noise)" in out) == (is_noise and not all(noise))


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("99", "give 5 samples at once"),
        ("0", "write a number, 1 or more"),
        ("2,x", "write a number, 1 or more"),
        ("2,99", "give 5 samples"),
    ],
)
def test_bench_at_a_batch_size_that_cannot_be_had(size: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("five.npy", np.load("x.npy")[:5])
    assert run(["bench", "model.onnx", "model.onnx", "--rounds", "5", "--data", "five.npy", "--batch-size", size]) == 2
    assert says in capsys.readouterr().err


def test_bench_tells_no_winner_where_noise_could_be_it_and_no_ratio_of_nothing() -> None:
    from bnfold.report import BenchReport, Latency, Timing
    from bnfold.report.render.terminal import text
    from bnfold.verbs.benchmark import _ratio

    rng = np.random.default_rng(0)
    noise = 1 + 0.2 * rng.standard_normal((2, 21))
    for factor, faster in ((1.0, ""), (8e-5, "candidate"), (3.0, "reference")):
        ratio, low, high = _ratio(noise * [[1.0], [factor]], 0)
        sides = (Latency(1.0, 1.0, 1.0, 1.0),) * 2
        times = {"reference": 1.0, "candidate": ratio, "ratio": ratio, "ratio_low": low, "ratio_high": high, "latencies": sides}
        timing = Timing(batch_size=1, **times)
        report = BenchReport(**vars(timing), provider="cpu", rounds=21, timings=(timing,))
        assert report.faster == faster
        assert ("no difference beyond noise" in text(report)) == (not faster)
        assert "0.000" not in text(report)


def test_the_help_takes_two_screens_and_names_the_rest(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        assert run([command, "--help"]) == 0
        short = capsys.readouterr().out
        assert run([command, "--help-all"]) == 0
        whole = capsys.readouterr().out
        assert len(short.splitlines()) <= 52
        assert set(re.findall(r"--[a-z-]+", short)) < set(re.findall(r"--[a-z-]+", whole)) | {"--help-all"}
        assert f"bnfold {command} --help-all" in short
        assert "[default: 0]" in short


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell: str) -> None:
    """As the shell calls it."""
    words = {"bash": {"COMP_WORDS": "bnfold fuse --dry", "COMP_CWORD": "2"}}.get(shell, {"_TYPER_COMPLETE_ARGS": "bnfold fuse --dry"})
    environment = os.environ | words | {"_BNFOLD_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    program = "import sys; from bnfold.cli import main; sys.argv = ['bnfold']; main()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "--dry-run" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("recalibrate model.onnx --method ", "exact ioffe-szegedy moving-average precise prior"),
        ("recalibrate model.onnx --layers b", "bn"),
        ("recalibrate gone.onnx --layers b", ""),
        ("fuse model.onnx --lower ", "depthwise mul-add"),
        ("fuse model.onnx --drop", "--drop-dead"),
        ("verify model.onnx --provider c", "cpu"),
        ("fuse model.onnx --recipe ", "mine"),
        ("explain MaxP", "MaxPool"),
    ],
)
def test_shells_complete_values(line: str, offered: str, here: Path) -> None:
    Path("bnfold.toml").write_text("[recipe.mine]\nseed = 3\n")
    environment = os.environ | {"_BNFOLD_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    environment |= {"_TYPER_COMPLETE_ARGS": f"bnfold {line}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "bnfold"], env=environment, capture_output=True, text=True)
    assert {each.partition("\t")[0] for each in done.stdout.split("\n") if each} == {*offered.split()}
    assert not done.stderr


def test_a_memory_budget_changes_nothing_but_the_memory(here: Path) -> None:
    for name, budget in (("a.onnx", "1G"), ("b.onnx", "1k")):
        assert run(["recalibrate", "model.onnx", "--data", "x.npy", "-o", name, "--memory-budget", budget, "--batch-size", "4"]) == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def test_samples_that_are_moved_to_tell_roundings_apart_are_not_counted(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fused = str(tmp_path / "fused.onnx")
    assert run(["fuse", str(digits), "-o", fused, "-q"]) == 0
    assert run(["verify", str(digits), fused, "--data", str(digits.parent / "test.npz"), "--samples", "3", "-q"]) == 0
    assert "on 3 samples of test.npz" in capsys.readouterr().out


def test_options_of_data_that_are_not_given_are_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "model.onnx", "another.onnx", "--image-size", "8"]) == 1
    assert "no --data are given, so the options of images and tables aren't used" in capsys.readouterr().err


def test_labels_give_the_accuracy(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = digits.parent
    out = str(tmp_path / "out.onnx")
    assert (
        run(["pipeline", str(digits), "--data", str(data / "calibration.npz"), "--eval", str(data / "test.npz"), "-o", out, "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    before, after = report["accuracy_before"], report["accuracy_after"]
    assert before["samples"] == after["samples"] == 540
    assert after["accuracy"] - before["accuracy"] > 3 * (before["stderr"] + after["stderr"])
    assert report["verify"]["verdict"] == "equivalent"
    assert len(report["recalibrate"]["layers"]) == report["fuse"]["batchnorms"]["before"] == 8


def test_a_check_by_coefficients_alone_is_told_once_with_what_the_command_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small: Callable[..., onnx.ModelProto]
) -> None:
    """A Gemm fits one size of the open axes only: `fuse` takes shapes, `verify` takes data too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "2000")
    model = small()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = f"size {len(dim.dim_param)}"
    model.graph.node[-1].output[0] = "inner"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4 * 6 * 6, 5), np.float32), "matrix"))
    model.graph.node.append(onnx.helper.make_node("Flatten", ["inner"], ["flat"]))
    model.graph.node.append(onnx.helper.make_node("Gemm", ["flat", "matrix"], ["y"]))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", 1, ["N", 5]))
    onnx.save(model, "m.onnx")
    assert run(["fuse", "m.onnx", "-o", "out.onnx"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 folded, equivalent, " in out
    assert out.count("weren't compared") == out.count("these are random data") == 1
    assert "--input-shape" in out
    assert "give data" not in out
    assert run(["verify", "m.onnx", "out.onnx"]) == 6
    assert "or give data" in capsys.readouterr().out
    assert run(["fuse", "m.onnx", "-o", "out.onnx", "--force", "--input-shape", "1,3,8,8"]) == 0
    assert "no outputs were compared" not in capsys.readouterr().out
