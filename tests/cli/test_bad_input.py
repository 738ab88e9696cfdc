"""Whatever is wrong with what comes in: the contract's status, one clear line, nothing written. All on the real command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import small_model

ROOT = Path(__file__).resolve().parents[2]
FUSE = "fuse model.onnx -o out.onnx"
RECALIBRATE = "recalibrate model.onnx --data DATA -o out.onnx"


@dataclass(frozen=True)
class Case:
    """prepare: puts the bad file into the folder, which holds model.onnx and x.npy. says: a part of the one line."""

    name: str
    line: str
    status: int
    says: str
    prepare: Callable[[Path], object]

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = []


def case(line: str, status: int, says: str) -> Callable[[Callable[[Path], object]], None]:
    def add(prepare: Callable[[Path], object]) -> None:
        CASES.append(Case(prepare.__name__, line, status, says, prepare))

    return add


def images(n: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, channels, 8, 8)).astype(np.float32)


# --- models -------------------------------------------------------------------------------------------------------------------------


@case("fuse nowhere.onnx -o out.onnx", 3, "nowhere.onnx: no such file")
def missing(folder: Path) -> None:
    pass


@case("fuse modle.onnx -o out.onnx", 3, "modle.onnx: no such file; did you mean 'model.onnx'?")
def misspelt(folder: Path) -> None:
    pass


@case("inspect frozen.pb", 3, "frozen.pb: not an ONNX model, but by its name a TensorFlow graph; convert it to ONNX with tf2onnx")
def another_framework(folder: Path) -> None:
    (folder / "frozen.pb").write_bytes(np.random.default_rng(2).bytes(4096))


@case("inspect saved", 3, "saved: a TensorFlow SavedModel; convert it")
def another_framework_in_a_folder(folder: Path) -> None:
    (folder / "saved").mkdir()
    (folder / "saved" / "saved_model.pb").write_bytes(b"")


@case(FUSE, 3, "model.onnx: an empty file; export or download it again")
def empty(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"")


@case(FUSE, 3, "model.onnx: ")
def truncated(folder: Path) -> None:
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[: len(whole) // 2])


@case(FUSE, 3, "model.onnx: not an ONNX model")
def garbage(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(np.random.default_rng(1).bytes(4096))


@case(FUSE, 3, "model.onnx: an HTML page, probably of a failed download; download the model again")
def html(folder: Path) -> None:
    (folder / "model.onnx").write_text("<!DOCTYPE html>\n<html><body>Not found</body></html>\n")


@case(FUSE, 3, "model.onnx: a Git LFS pointer, not the file itself; run 'git lfs pull'")
def lfs_pointer(folder: Path) -> None:
    (folder / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n")


@case(
    "fuse model.pt -o out.onnx",
    3,
    "model.pt: a zip archive (a PyTorch checkpoint, TorchScript or .pt2 file), cut short or damaged; save or download it again",
)
def wrong_extension(folder: Path) -> None:
    (folder / "model.pt").write_bytes(b"PK\x03\x04" + bytes(100))


@case("fuse model.pt --arch net.py:make -o out.pth", 3, "model.pt: a zip archive (a PyTorch checkpoint, TorchScript or .pt2 file), cut")
def damaged_checkpoint(folder: Path) -> None:
    (folder / "model.pt").write_bytes(b"PK\x03\x04" + bytes(100))


@case("fuse nowhere.pth --arch net.py:make -o out.pth", 3, "nowhere.pth: no such file")
def missing_checkpoint(folder: Path) -> None:
    pass


@case("recalibrate nowhere.pth --data x.npy --device cpu -o out.pth", 3, "nowhere.pth: no such file")
def missing_checkpoint_for_a_device(folder: Path) -> None:
    pass


@case("verify model.onnx models", 3, "models: a folder, not a model file; name the file in it")
def folder_to_verify(folder: Path) -> None:
    (folder / "models").mkdir()


@case("verify model.onnx model.onnx --input-shape 0,3,8,8", 2, "--input-shape 0,3,8,8: no samples; the first number")
def no_samples_asked(folder: Path) -> None:
    pass


@case("recalibrate model.onnx --data /dev/null -o out.onnx", 3, "/dev/null: a device or pipe, not a file; give a .npy")
def device_for_data(folder: Path) -> None:
    pass


@case("fuse x.npy -o out.onnx", 3, "x.npy: not an ONNX model")
def data_for_a_model(folder: Path) -> None:
    pass


@case("inspect sub", 3, "sub: a folder, not a model file")
def folder_for_a_model(folder: Path) -> None:
    (folder / "sub").mkdir()


def external(folder: Path, location: str = "weights.data") -> Path:
    """model.onnx with its weights in a file of their own, which it seeks at `location`."""
    onnx.save(small_model(), folder / "model.onnx", save_as_external_data=True, location="weights.data", size_threshold=0)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "weights.data"


@case(FUSE, 3, "the file 'weights.data' with the data of tensor 'weight' is missing")
def external_missing(folder: Path) -> None:
    external(folder).unlink()


@case(FUSE, 3, "of 'weights.data', which has 100; copy the whole file")
def external_too_short(folder: Path) -> None:
    data = external(folder)
    data.write_bytes(data.read_bytes()[:100])


@case(FUSE, 3, "points outside the model's folder ('../weights.data'), which is not safe")
def external_outside(folder: Path) -> None:
    external(folder, "../weights.data")


@case(FUSE, 3, "points outside the model's folder ('/etc/passwd'), which is not safe")
def external_absolute(folder: Path) -> None:
    external(folder, "/etc/passwd")


@case(FUSE, 3, "points outside the model's folder ('weights.data' is a link to ")
def external_through_a_link(folder: Path) -> None:
    data = external(folder)
    data.unlink()
    data.symlink_to("/etc/passwd")


@case("verify model.onnx other.onnx", 3, "other.onnx: not an ONNX model")
def garbage_to_compare_with(folder: Path) -> None:
    (folder / "other.onnx").write_text("nothing")


# --- data ---------------------------------------------------------------------------------------------------------------------------


@case(RECALIBRATE.replace("DATA", "nowhere.npz"), 3, "nowhere.npz")
def data_missing(folder: Path) -> None:
    pass


@case(RECALIBRATE.replace("DATA", "x.npz"), 3, "x.npz")
def data_empty_file(folder: Path) -> None:
    (folder / "x.npz").write_bytes(b"")


@case(RECALIBRATE.replace("DATA", "x.npy"), 3, "x.npy")
def data_garbage(folder: Path) -> None:
    (folder / "x.npy").write_bytes(np.random.default_rng(1).bytes(4096))


@case(RECALIBRATE.replace("DATA", "x.npy"), 3, "x.npy")
def data_truncated(folder: Path) -> None:
    whole = (folder / "x.npy").read_bytes()
    (folder / "x.npy").write_bytes(whole[: len(whole) // 2])


@case(RECALIBRATE.replace("DATA", "x.npy"), 3, "x.npy")
def data_pickled(folder: Path) -> None:
    np.save(folder / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


@case(RECALIBRATE.replace("DATA", "x.csv"), 3, "x.csv")
def data_of_an_unknown_kind(folder: Path) -> None:
    (folder / "x.csv").write_text("1,2\n")


@case(RECALIBRATE.replace("DATA", "x.npz"), 3, "'x'")
def data_with_a_wrong_name(folder: Path) -> None:
    np.savez(folder / "x.npz", picture=images(), extra=images())


@case(RECALIBRATE.replace("DATA", "x.npy"), 3, "'x'")
def data_of_a_wrong_shape(folder: Path) -> None:
    np.save(folder / "x.npy", images(channels=4))


@case(RECALIBRATE.replace("DATA", "x.npy"), 3, "'x'")
def data_of_a_wrong_type(folder: Path) -> None:
    np.save(folder / "x.npy", np.full((8, 3, 8, 8), "a"))


@case(RECALIBRATE.replace("DATA", "x.npy"), 3, "NaN")
def data_with_nan(folder: Path) -> None:
    bad = images()
    bad[3, 1, 2, 2] = np.nan
    np.save(folder / "x.npy", bad)


@case(RECALIBRATE.replace("DATA", "x.npy"), 3, "")
def data_without_samples(folder: Path) -> None:
    np.save(folder / "x.npy", images(0))


@case(RECALIBRATE.replace("DATA", "sub"), 3, "sub")
def data_folder_without_data(folder: Path) -> None:
    (folder / "sub").mkdir()


@case(RECALIBRATE.replace("DATA", "feed.py:nothing"), 3, "nothing")
def data_function_missing(folder: Path) -> None:
    (folder / "feed.py").write_text("def batches():\n    return []\n")


@case(RECALIBRATE.replace("DATA", "feed.py:batches"), 3, "no luck")
def data_function_that_fails(folder: Path) -> None:
    (folder / "feed.py").write_text("def batches():\n    raise RuntimeError('no luck')\n")


# --- where it runs, and where it writes -----------------------------------------------------------------------------------------------


@case("verify model.onnx model.onnx --provider cuda9", 2, "no execution provider is called 'cuda9'; did you mean cuda")
def unknown_provider(folder: Path) -> None:
    pass


@case("verify model.onnx model.onnx --provider dml", 5, "execution provider dml is not in this ONNX Runtime")
def provider_that_is_not_here(folder: Path) -> None:
    pass


@case("pipeline model.onnx --data x.npy -o out.onnx --provider dml", 5, "execution provider dml is not in this ONNX Runtime")
def provider_that_is_not_here_for_the_last_step(folder: Path) -> None:
    pass


@case("fuse model.onnx -o nowhere/out.onnx", 2, "nowhere is not a folder; make it first")
def output_folder_missing(folder: Path) -> None:
    pass


@case("fuse model.onnx -o x.npy/out.onnx", 2, "x.npy is not a folder; make it first")
def output_folder_that_is_a_file(folder: Path) -> None:
    pass


@case("pipeline model.onnx --data x.npy -o /proc/out.onnx", 2, "/proc/out.onnx: can't write to /proc")
def output_not_writable(folder: Path) -> None:
    pass


@case("inspect model.onnx --report /proc/r.json", 2, "/proc/r.json: can't write to /proc")
def report_not_writable(folder: Path) -> None:
    pass


# --- running them ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str
    before: dict[str, bytes]
    after: dict[str, bytes]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def furnish(folder: Path) -> None:
    folder.mkdir()
    onnx.save(small_model(), folder / "model.onnx")
    np.save(folder / "x.npy", images())


def command_line(line: str) -> list[str]:
    return [sys.executable, "-m", "bnfold", *line.split()]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every case in a folder and a process of its own, two at a time."""
    root = tmp_path_factory.mktemp("bad")

    def outcome(case: Case) -> Outcome:
        folder = root / case.name
        furnish(folder)
        case.prepare(folder)
        before = contents(folder)
        done = subprocess.run(command_line(case.line), cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
        return Outcome(done.returncode, done.stdout, done.stderr, before, contents(folder))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((case.name for case in CASES), pool.map(outcome, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input(case: Case, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[case.name]
    errors = [line for line in outcome.err.splitlines() if line.startswith("bnfold: error: ")]
    assert outcome.status == case.status, outcome.err
    assert len(errors) == 1, outcome.err
    assert outcome.err.splitlines()[-1] == errors[0]
    assert case.says in errors[0]
    assert all(line.startswith("bnfold: ") for line in outcome.err.splitlines()), outcome.err
    assert outcome.out == ""
    assert outcome.after == outcome.before


ENDLESS = """
import itertools, pathlib, time
import numpy as np

def batches():
    rng = np.random.default_rng(0)
    for number in itertools.count():
        if number == 5:
            pathlib.Path("begun").touch()
        time.sleep(0.02)
        yield rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(sent: signal.Signals, tmp_path: Path) -> None:
    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    furnish(folder)
    scratch.mkdir()
    (folder / "feed.py").write_text(ENDLESS)
    before = contents(folder)
    line = command_line("recalibrate model.onnx --data feed.py:batches -o out.onnx --report r.json --memory-budget 1k")
    process = subprocess.Popen(
        line, cwd=folder, env=environment() | {"TMPDIR": str(scratch)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(600):
            if (folder / "begun").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "bnfold: interrupted; no file is left half-written"
    assert all(line.startswith("bnfold: ") for line in err.splitlines())
    (folder / "begun").unlink()
    assert contents(folder) == before
    assert list(scratch.glob("[!.]*")) == []
