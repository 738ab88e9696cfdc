"""The command line when something is wrong: files that exist, arguments that make no sense, defects, interruptions."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import bnfold
from bnfold import cli
from bnfold.cli import run

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- files that are written ---------------------------------------------------------------------------------------------------------


def test_no_file_is_overwritten_without_force(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.onnx").write_text("mine")
    assert run(["fuse", "model.onnx", "-o", "out.onnx"]) == 2
    assert capsys.readouterr().err == "bnfold: error: out.onnx: the file exists; give another name, or --force to overwrite it\n"
    assert Path("out.onnx").read_text() == "mine"
    assert run(["fuse", "model.onnx", "-o", "out.onnx", "--force"]) == 0
    assert len(onnx.load("out.onnx").graph.node) == 1


def test_the_input_is_not_overwritten_without_force(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("model.onnx").read_bytes()
    for other in ("model.onnx", f"{here}/model.onnx", "./model.onnx"):
        assert run(["fuse", "model.onnx", "-o", other]) == 2
        assert "this is an input; give another name, or --force to overwrite it" in capsys.readouterr().err
    assert Path("model.onnx").read_bytes() == before
    assert run(["fuse", "model.onnx", "-o", "model.onnx", "--force"]) == 0
    assert len(onnx.load("model.onnx").graph.node) == 1


def test_an_onnx_model_is_written_as_onnx(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "model.onnx", "-o", "out.pt"]) == 2
    assert capsys.readouterr().err == "bnfold: error: out.pt: the name must end in .onnx, such as out.onnx\n"
    assert run(["fuse", "model.onnx"]) == 2
    assert "-o OUT is missing: name the file to write, or give --dry-run" in capsys.readouterr().err


# --- arguments that make no sense ---------------------------------------------------------------------------------------------------

NONSENSE = {
    "fold model.onnx": "No such command 'fold'; see",
    "insect model.onnx": "No such command 'insect'; did you mean 'inspect'? See 'bnfold --help'",
    "inspect": "MODEL is missing; see 'bnfold inspect --help'",
    "fuse model.onnx out.onnx": "too many arguments ('out.onnx'): fuse takes MODEL; the file to write is -o OUT",
    "verify a b c d": "too many arguments ('c', 'd'): verify takes REFERENCE and [CANDIDATE]",
    "fuse model.onnx -o": "-o takes a value, OUT; see 'bnfold fuse --help'",
    "fuse model.onnx -o --force": "-o takes a value, OUT, and --force is an option",
    "fuse model.onnx -o out.onnx --force=1": "--force takes no value",
    "fuse model.onnx --output=": "-o: an empty text; is a variable unset?",
    "pipeline model.onnx --data x.npy": "-o OUT is missing; see 'bnfold pipeline --help'",
    "recalibrate model.onnx --data x.npy --data y.npy -o out.onnx": "--data is given twice, and takes one value",
    "inspect model.onnx --forze": "--forze: no such option; did you mean '--force'? See 'bnfold inspect --help'",
    "recalibrate model.onnx -o out.onnx": "--data DATA is missing",
    "recalibrate model.onnx --data x.npy -o out.onnx --batch-size 0": "--batch-size",
    "fuse model.onnx -o out.onnx --seed -1": "--seed -1: write a whole number, 0 or more",
    "recalibrate model.onnx --data x.npy -o out.onnx --samples 1e3": "--samples 1e3: write a whole number, 1 or more",
    "recalibrate model.onnx --data x.npy -o out.onnx --crop-pct 2": "--crop-pct 2: write a number from 0.01 to 1",
    "recalibrate model.onnx --data x.npy -o out.onnx --until low": "--until low: write a number",
    "recalibrate model.onnx --data x.npy -o out.onnx --memory-budget lots": "--memory-budget lots: not a size; write it like 512M or 2G",
    "recalibrate model.onnx --data x.npy -o out.onnx --device cuda": "--device cuda: that is for PyTorch models; for ONNX give --provider",
    "recalibrate model.onnx --data x.npy -o out.onnx --mean a,b": "--mean a,b: not numbers; write them like 0.485,0.456,0.406",
    "recalibrate model.onnx --data x.npy -o out.onnx --image-size big": "--image-size big: not a size; write it like 224",
    "fuse model.onnx -o out.onnx --input-shape 1,3,x": "--input-shape 1,3,x: not a shape; write it like 1,3,224,224",
    "fuse model.onnx -o out.onnx --input-shape 99999999999999999999,3": "--input-shape 99999999999999999999,3: not a shape",
    "fuse model.onnx -o out.onnx --input-shape z=1,3,8,8": "--input-shape z=1,3,8,8: the model has no input 'z'; its inputs are x",
    "inspect model.onnx --input-shape 1,4,8,8": "(1, 4, 8, 8) doesn't fit it",
    "recalibrate model.onnx --data x.npy -o out.onnx --input-shape 1,4,8,8": "(1, 4, 8, 8) doesn't fit it",
    "inspect model.onnx --input-shape z=1,3,8,8": "--input-shape z=1,3,8,8: the model has no input 'z'; its inputs are x",
    "inspect model.onnx --arch-args [1]": "--arch-args [1]: not a JSON object",
    "inspect model.onnx --input-shape xx=1,3,8,8 --input-shape x=1,3,8,8": "the model has no input 'xx'",
    "recalibrate model.onnx --data x.npy -o out.onnx --method exat": "prior; did you mean 'exact'?",
    "recalibrate model.onnx --data x.npy -o out.onnx --layers bnn -q": "no BatchNorm is called 'bnn'; there are 'bn'; did you mean 'bn'?",
    "fuse model.onnx -o out.onnx --no-verify --data x.npy": "--data and --no-verify exclude each other",
    "pipeline model.onnx --data x.npy -o a.onnx --keep-recalibrated a.onnx": "a.onnx: two files would have this name",
    "fuse model.onnx -o out.onnx --report a.html --html a.html": "a.html: the name must end in .json",
    "explain model.onnx bn": "model.onnx is a file: bnfold explain bn model.onnx",
    "verify model.onnx": "verify takes two models, REFERENCE CANDIDATE",
    "bench model.onnx model.onnx --rounds 1": "--rounds",
    "bench model.onnx model.onnx --provider cpu --provider cuda": "--provider cpu --provider cuda: this command takes one",
}


@pytest.mark.parametrize("line", NONSENSE)
def test_arguments_that_make_no_sense_are_one_line_and_status_2(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(here)
    status = run(line.split())
    out, err = capsys.readouterr()
    assert status == 2, err
    assert err.count("\n") == 1
    assert err.startswith("bnfold: error: ")
    assert NONSENSE[line] in err
    assert out == ""
    assert names(here) == before


# --- defects and interruptions ------------------------------------------------------------------------------------------------------


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError("one over\nnothing")


MEMORY = "bnfold: error: out of memory; give a smaller --batch-size or --input-shape, or for recalibration a smaller --memory-budget\n"


def test_a_defect_is_one_line_and_says_what_to_do(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bnfold.api.inspect", broken)
    assert run(["inspect", "model.onnx"]) == 70
    err = capsys.readouterr().err
    assert err == (
        "bnfold: error: ZeroDivisionError: one over nothing; this is a defect of bnfold: run again with --debug and report what it prints\n"
    )
    assert run(["inspect", "model.onnx", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "bnfold: interrupted; no file is left half-written\n"),
        (MemoryError(), 5, MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 399955996400439996 bytes."), 5, MEMORY),
        (
            OSError(28, "No space left on device", "/x/spill"),
            3,
            "bnfold: error: /x/spill: No space left on device; see to that file or disk, then run again\n",
        ),
        (bnfold.CheckError("it failed"), 1, "bnfold: error: it failed\n"),
        (bnfold.DeviceError("no device"), 5, "bnfold: error: no device\n"),
        (bnfold.UnsupportedError("not served"), 4, "bnfold: error: not served\n"),
    ],
)
def test_every_error_has_its_status(
    error: BaseException, status: int, text: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("bnfold.api.fuse", fail)
    before = names(here)
    assert run(["fuse", "model.onnx", "-o", "out.onnx", "-q"]) == status
    assert capsys.readouterr().err == text
    assert names(here) == before


def test_an_interruption_that_a_library_swallows_is_one_all_the_same(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in an import, whose module is then without what it should have."""

    def half_imported(*_: object, **__: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise bnfold.ModelError("module has no attribute")

    monkeypatch.setattr("bnfold.api.fuse", half_imported)
    before = signal.signal(signal.SIGTERM, cli._interrupt)
    try:
        assert run(["fuse", "model.onnx", "-o", "out.onnx", "-q"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "bnfold: interrupted; no file is left half-written\n"
    monkeypatch.setattr("bnfold.api.fuse", broken)
    assert run(["fuse", "model.onnx", "-o", "out.onnx", "-q"]) == 70


def test_a_reader_that_leaves_changes_nothing(here: Path) -> None:
    """As in `bnfold inspect ... | head -1`, where the pipe closes at once."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for more in ([], ["--json"]):
        line = [sys.executable, "-m", "bnfold", "fuse", "model.onnx", "-o", "out.onnx", "--force", *more]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert re.fullmatch(r"bnfold: fold and check\nbnfold: took \S+ s\n", err), err
    assert "out.onnx" in names(here)
