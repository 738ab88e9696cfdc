"""Options that are written down, in bnfold.toml or pyproject.toml."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bnfold.cli import run

WRITTEN = """
seed = 3
[recalibrate]
batch-size = 6
[recipe.small]
layers = ["b*"]
method = "precise"
"""


@pytest.mark.parametrize("name", ["bnfold.toml", "pyproject.toml"])
def test_what_is_written_down_holds_below_it_unless_the_command_line_says_else(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = WRITTEN if name == "bnfold.toml" else f"[tool.bnfold]{WRITTEN}".replace("[rec", "[tool.bnfold.rec")
    Path(name).write_text(tables)
    below = here / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    line = ["recalibrate", "../model.onnx", "--data", "../x.npy", "--force", "-o", "out.onnx", "--report", "r.json"]

    def method(*more: str) -> str:
        assert run([*line, *more]) == 0
        return str(json.loads(Path("r.json").read_text())["method"])

    assert method() == "exact"
    assert f"bnfold: options of {here / name}\n" in capsys.readouterr().err
    assert method("--recipe", "small") == method("--recipe=small") == "precise"
    assert method("--recipe", "small", "--method", "exact") == "exact"
    assert run(["recalibrate", "--help"]) == 0
    assert "[default: 3]" in capsys.readouterr().out
    Path("bnfold.toml").write_text("")  # the nearest one counts
    assert run(["recalibrate", "--help"]) == 0
    assert "[default: 0]" in capsys.readouterr().out


def test_switches_and_required_options(here: Path) -> None:
    Path("bnfold.toml").write_text('[fuse]\nstrict = true\n[pipeline]\ndata = "x.npy"\n')
    assert run(["fuse", "none.onnx", "-o", "out.onnx"]) == 1
    assert run(["pipeline", "model.onnx", "-o", "out.onnx"]) == 0


WRONG = {
    "sed = 3": (2, "there is no option 'sed'; did you mean 'seed'?"),
    "[fuse]\nrounds = 3": (2, "[fuse]: there is no option 'rounds'"),
    "[fus]\nstrict = true": (2, "[fus]: there is no such command; did you mean 'fuse'?"),
    "[recipe.a]\nsed = 3": (2, "[recipe.a]: there is no option 'sed'"),
    "recipe = 3": (2, "recipe is no table"),
    "recipe.a = 3": (2, "[recipe.a]: a table of options is expected"),
    "[fuse]\nstrict = 1": (2, "strict = 1: true or false is expected"),
    "seed = true": (2, "seed = True: a text, a number or a list is expected"),
    "seed = 'x'": (2, "--seed x: write a whole number, 0 or more"),
    "\ufeffseed = 'x'": (2, "--seed x"),  # with the mark that some editors begin a file with
    "trust-pickle = true": (2, "trust-pickle: that is asked for on the command line, each time"),
    "arch = 'net.py:make'": (2, "arch: that is asked for on the command line, each time"),
    'arch-args = \'{"checkpoint_path": "evil.pth"}\'': (2, "arch-args: that is asked for on the command line, each time"),
    "no-verify = true": (2, "no-verify waives a check: give --no-verify on the command line, each time"),
    "[pipeline]\naccept-harm = true": (2, "[pipeline]: accept-harm waives a check"),
    "[recipe.a]\nforce-random = true": (2, "[recipe.a]: force-random waives a check"),
    "[verify]\ncoefficients-only = true": (2, "coefficients-only waives a check"),
    "[verify]\nallow-cpu-fallback = ['*']": (2, "allow-cpu-fallback waives a check"),
    "[verify]\nbaseline = 'old.json'": (2, "baseline waives a check"),
    "data = 'evil.py:f'": (2, "may name code to run: that is asked for on the command line, each time"),
    "data = 'evil.py:f\u00b7'": (2, "may name code to run"),
    "eval = ['x.npz', 'evil:f']": (2, "may name code to run"),
    "provider = ['cpu', 'qnn:backend_path=evil.so']": (2, "may name code to run"),
    "provider = 'qnn:backend_path = evil.so'": (2, "may name code to run"),
    "provider = 'tensorrt:device_id=0,trt_extra_plugin_lib_paths=evil.so'": (2, "may name code to run"),
    "provider = 'qnn:op_packages=evil.so'": (2, "may name code to run"),
    "seed =": (3, "not TOML"),
    f"seed = {'[' * 9999}": (3, "not TOML"),
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_one_line(text: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bnfold.toml").write_text(text)
    status, says = WRONG[text]
    assert run(["fuse", "model.onnx", "-o", "out.onnx", "-q"]) == status
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize(
    "option", ["data = 'C:x.npy'", "provider = ['cpu', 'tensorrt:trt_fp16_enable=1,device_id=0', 'openvino:device_type=GPU']"]
)
def test_files_and_plain_options_of_providers_may_be_written_down(option: str, here: Path) -> None:
    Path("bnfold.toml").write_text(f"[verify]\n{option}")
    assert run(["fuse", "model.onnx", "-o", "out.onnx"]) == 0


def test_a_pyproject_that_is_no_toml_is_refused_only_where_it_speaks_of_bnfold(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pyproject.toml").write_text("[tool.other")
    assert run(["fuse", "model.onnx", "-o", "out.onnx"]) == 0
    Path("pyproject.toml").write_text("[tool.bnfold]\nseed = ")
    assert run(["fuse", "model.onnx", "-o", "out.onnx", "--force"]) == 3
    assert "pyproject.toml: not TOML (" in capsys.readouterr().err


def test_a_recipe_that_is_not_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "model.onnx", "-o", "out.onnx", "--recipe", "small"]) == 2
    assert "--recipe small: there is no bnfold.toml" in capsys.readouterr().err
    Path("bnfold.toml").write_text(WRITTEN)
    assert run(["fuse", "model.onnx", "-o", "out.onnx", "--recipe", "smal"]) == 2
    assert "it has small; did you mean 'small'?" in capsys.readouterr().err
