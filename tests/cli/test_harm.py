"""Files made to do harm: within bounds of time and memory each gets the contract's status and one line. All on the real command line."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import small_model
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
LIMIT, MEMORY = 30, 1 << 20  # seconds; KiB of resident memory: a quarter of what is promised, since these files hold next to nothing
CASES: dict[str, tuple[str, int, str, Callable[[Path], object]]] = {}


def case(line: str, status: int, says: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    def add(prepare: Callable[[Path], object]) -> Callable[[Path], object]:
        CASES[prepare.__name__] = line, status, says, prepare
        return prepare

    return add


def save(
    folder: Path, nodes: list[onnx.NodeProto], arrays: dict[str, np.ndarray], functions: list[onnx.FunctionProto] | None = None
) -> None:
    """The small model, to whose output what the nodes make of `q` and constants is added."""
    model = small_model()
    graph = model.graph
    graph.node[-1].output[0] = "q"
    graph.node.extend([*nodes, helper.make_node("Add", ["q", nodes[-1].output[0]], ["y"])])
    graph.initializer.extend(numpy_helper.from_array(np.array(array), name) for name, array in arrays.items())
    del graph.output[0].type.tensor_type.shape.dim[:]
    model.functions.extend(functions or [])
    model.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save(model, folder / "bad.onnx")


FUSE = "fuse bad.onnx -o out.onnx"


@case(FUSE, 3, "numbers, and weights and inputs have")
def constant_of_shape(folder: Path) -> None:
    save(folder, [helper.make_node("ConstantOfShape", ["s"], ["o"]), helper.make_node("ReduceSum", ["o"], ["r"])], {"s": [1 << 34]})


@case(FUSE, 3, "numbers, and weights and inputs have")
def sums_of_a_row_and_a_column(folder: Path) -> None:
    arrays = {"a": np.ones((60000, 1), np.float32), "b": np.ones((1, 60000), np.float32)}
    save(folder, [helper.make_node("Add", ["a", "b"], ["o"]), helper.make_node("ReduceSum", ["o"], ["r"])], arrays)


@case(FUSE, 3, "numbers, and weights and inputs have")
def sizes_that_double(folder: Path) -> None:
    names = ["e", *(f"d{k}" for k in range(40))]
    nodes = [helper.make_node("Concat", [a, a], [b], axis=0) for a, b in itertools.pairwise(names)]
    nodes += [helper.make_node("ReduceSum", names[-1:], ["r"]), helper.make_node("Cast", ["r"], ["f"], to=TensorProto.FLOAT)]
    save(folder, nodes, {"e": np.array([1], np.int64)})


@case(FUSE, 3, "numbers, and weights and inputs have")
def padding(folder: Path) -> None:
    save(folder, [helper.make_node("Pad", ["q", "p"], ["r"])], {"p": [0, 0, 0, 0, 0, 0, 1 << 17, 1 << 17]})


@case(FUSE, 3, "would make 17,179,869,184 numbers")
def sizes_that_no_inference_knows(folder: Path) -> None:
    nodes = [helper.make_node("Mul", ["a", "a"], ["m"]), helper.make_node("ReduceMax", ["q"], ["t"], keepdims=0)]
    nodes += [helper.make_node("Mul", ["t", "z"], ["u"]), helper.make_node("Cast", ["u"], ["i"], to=TensorProto.INT64)]
    nodes += [helper.make_node("Add", ["m", "i"], ["s"]), helper.make_node("Expand", ["w1", "s"], ["o"])]
    save(folder, [*nodes, helper.make_node("ReduceSum", ["o"], ["r"])], {"a": [1 << 17], "z": np.float32(0), "w1": np.float32(1)})


@case(FUSE, 3, "more than 200,000; export the model without functions")
def functions_that_double(folder: Path) -> None:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    functions = [helper.make_function("own", "F0", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], imports)]
    for k in range(1, 40):
        twice = [helper.make_node(f"F{k - 1}", [a], [b], domain="own") for a, b in (("a", "t"), ("t", "b"))]
        functions.append(helper.make_function("own", f"F{k}", ["a"], ["b"], twice, imports))
    save(folder, [helper.make_node("F39", ["q"], ["r"], domain="own")], {}, functions)


@case(FUSE, 3, "a Loop goes on for more than 100,000 turns")
def a_loop_without_end(folder: Path) -> None:
    infos = [helper.make_tensor_value_info(n, kind, []) for n, kind in (("i", TensorProto.INT64), ("c", TensorProto.BOOL))]
    state = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("v", "w")]
    nodes = [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["v"], ["w"])]
    body = helper.make_graph(nodes, "body", [*infos, state[0]], [helper.make_tensor_value_info("d", TensorProto.BOOL, []), state[1]])
    save(folder, [helper.make_node("Loop", ["n", "t", "q"], ["r"], body=body)], {"n": 1 << 40, "t": True})


# --- data ---------------------------------------------------------------------------------------------------------------------------

RECALIBRATE = "recalibrate model.onnx -o out.onnx --data "


@case(RECALIBRATE + "bomb.npz", 3, "would unpack to 5,368,709,120")
def a_bomb_of_zeros(folder: Path) -> None:
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x.npy", "w", force_zip64=True) as file:
            file.write(bytes(1 << 20))
        archive.filelist[0].file_size = 5 << 30  # which is what a reader goes by
        archive.NameToInfo["x.npy"].file_size = 5 << 30


@case(RECALIBRATE + "lie.npz", 3, "lie.npz: can't be read as .npz")
def a_shape_that_lies(folder: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 3, 8, 8)})
    with zipfile.ZipFile(folder / "lie.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(100))


@case(RECALIBRATE + "one.pt", 3, "some of its numbers for many")
def one_number_for_all(folder: Path) -> None:
    torch.save(torch.zeros(1).expand(1 << 33, 3, 8, 8), folder / "one.pt")


@case(RECALIBRATE + "lists.pt", 3, "some of its numbers for many")
def lists_that_double(folder: Path) -> None:
    found: list[object] = [1]
    for _ in range(60):
        found = [found, found]
    torch.save(found, folder / "lists.pt")


@case(RECALIBRATE + "shards.tar", 3, "unpacks to more than 268,435,456")
def a_packed_file_in_a_shard(folder: Path) -> None:
    data = gzip.compress(bytes(300 << 20), 1)
    with tarfile.open(folder / "shards.tar", "w") as archive:
        entry = tarfile.TarInfo("a.npy.gz")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))


@case("inspect bad.onnx", 3, "it holds 16,000 graphs inside of 24,003 operators, too many to be followed")
def branches_without_end(folder: Path) -> None:
    nodes, last = [], "q"
    for i in range(8000):
        ends = [helper.make_tensor_value_info(f"{side}{i}", TensorProto.FLOAT, None) for side in "ab"]
        sides = [helper.make_graph([helper.make_node("Neg", [last], [end.name])], "side", [], [end]) for end in ends]
        nodes.append(helper.make_node("If", ["which"], [f"o{i}"], then_branch=sides[0], else_branch=sides[1]))
        last = f"o{i}"
    save(folder, nodes, {"which": np.array(True)})


@case(RECALIBRATE + "eps", 3, "it is none of JPEG, PNG, BMP, GIF, WEBP, TIFF, PPM")
def a_program_for_ghostscript(folder: Path) -> None:
    (folder / "eps").mkdir()
    (folder / "eps" / "a.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch owned) (w) file\nshowpage\n"
    )


@case(RECALIBRATE + "wide", 3, "the image has 13000x13000 pixels; reduce it below 134,217,728 first")
def more_pixels_than_memory(folder: Path) -> None:
    (folder / "wide").mkdir()
    header = b"P6 13000 13000 255\n"
    (folder / "wide" / "a.ppm").write_bytes(header + bytes(1000))


@case("verify model.onnx model.onnx --baseline deep.json", 3, "the baseline is not JSON")
def nested_without_end(folder: Path) -> None:
    (folder / "deep.json").write_text("[" * 1_000_000)


@case("verify model.onnx model.onnx --baseline escapes.json", 3, r"its schema is \x1b]0;owned\x07\x1b[31m, not bnfold.verify/1")
def escapes_for_the_terminal(folder: Path) -> None:
    (folder / "escapes.json").write_text(json.dumps({"schema": "\x1b]0;owned\x07\x1b[31m"}))


for kind, line in {
    "model": "inspect pipe",
    "reference": "verify pipe model.onnx",
    "baseline": "verify model.onnx model.onnx --baseline pipe",
    "data": RECALIBRATE + "pipe",
    "configuration": RECALIBRATE + "x.npy --preprocess pipe",
    "statistics": "recalibrate model.onnx --restore pipe -o out.onnx",
    "part": "merge-stats model.onnx pipe -o out.onnx",
}.items():
    for device in ("pipe", "/dev/zero") if kind in ("model", "data") else ("pipe",):

        def prepare(folder: Path) -> None:
            os.mkfifo(folder / "pipe")

        CASES[f"{device} as a {kind}"] = line.replace("pipe", device), 3, "a device or pipe, not a file", prepare


# A process of its own, since Linux counts what a process held before it became another program, and this one may hold much.
MEASURED = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, code, used = os.wait4(process.pid, 0)
print(used.ru_maxrss, file=sys.stderr)
os._exit(os.waitstatus_to_exitcode(code) % 256)
"""


@pytest.mark.parametrize("name", CASES)
def test_a_file_does_no_harm(name: str, here: Path) -> None:
    line, status, says, prepare = CASES[name]
    prepare(here)
    before = {path.name for path in here.iterdir()}
    start = time.monotonic()
    command = [sys.executable, "-c", MEASURED, sys.executable, "-m", "bnfold", *line.split()]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    *_, last, used = found.stderr.splitlines()
    assert (found.returncode, last.startswith("bnfold: error: ")) == (status, True), found.stderr
    assert says in last
    assert last.isprintable()
    assert time.monotonic() - start < LIMIT
    assert int(used) < MEMORY
    assert {path.name for path in here.iterdir()} == before


# --- nothing half-written -----------------------------------------------------------------------------------------------------------


NET = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.Conv2d(64, 64, 3)).eval()
"""


@pytest.mark.parametrize("suffix", ["pt2", "onnx", "safetensors", "pth"])
def test_a_full_disk_is_told_and_leaves_nothing(suffix: str, here: Path) -> None:
    """As files may not grow beyond some 100 kB here, where the weights take 150."""
    Path("net.py").write_text(NET)
    space: dict[str, Any] = {}
    exec(NET, space)
    torch.save(space["make"]().state_dict(), "net.pth")
    Path(f"out.{suffix}").write_text("mine")
    before = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    line = f"fuse net.pth --arch net.py:make --input-shape 1,3,8,8 --no-verify -o out.{suffix} --force"
    found = subprocess.run(
        [sys.executable, "-B", "-m", "bnfold", *line.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert found.returncode == 3, found.stderr
    assert found.stderr.splitlines()[-1].startswith(f"bnfold: error: out.{suffix}: can't be written (")
    assert "File too large" in found.stderr
    assert {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()} == before
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("more", ["<&- >&- 2>&-", ">&-", "2>&-", "2>/dev/full", "| true"])
def test_streams_that_are_closed_or_full_change_nothing(more: str, here: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = f"set -o pipefail; {sys.executable} -W error -m bnfold fuse model.onnx -o out.onnx {more}"
    found = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
    assert found.returncode == 0
    assert [line for line in found.stderr.splitlines() if not line.startswith(("bnfold: fold and check", "bnfold: took "))] == []
    assert len(onnx.load("out.onnx").graph.node) == 1


def test_results_that_cannot_be_written_are_an_error(here: Path) -> None:
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "bnfold", "inspect", "model.onnx"]
        found = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    text = "the results can't be written (No space left on device); see to where standard output goes"
    assert (found.returncode, found.stderr) == (3, f"bnfold: error: {text}\n")


def test_nothing_is_written_into_the_users_home(here: Path) -> None:
    """ONNX Runtime would keep a database for its telemetry there."""
    Path("home").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XDG_")} | {"PYTHONPATH": str(ROOT), "HOME": str(here / "home")}
    for code in (
        "import bnfold.cli as c, sys; sys.argv[1:] = ['verify', 'model.onnx', 'model.onnx']; c.main()",
        "import bnfold; bnfold.verify(*[bnfold.load('model.onnx')] * 2)",
    ):
        subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
        assert [path for path in Path("home").rglob("*") if path.is_file()] == []


def test_a_name_that_is_no_utf8_is_a_name(here: Path) -> None:
    """In reports, pages, JUnit's XML and certificates alike; on the terminal it is seen and does nothing."""
    odd, made = os.fsdecode(b"m\xff\x1b[31m.onnx"), os.fsdecode(b"out\xff.onnx")
    os.rename("model.onnx", odd)
    lines = (
        ["fuse", odd, "-o", made, "--report", "r.json", "--junit", "j.xml", "--markdown", "s.md"],
        ["recalibrate", odd, "--data", "x.npy", "-o", "fresh.onnx", "--html", "h.html"],
        ["verify", made, "--against", odd],
    )
    for line in lines:
        found = subprocess.run([sys.executable, "-m", "bnfold", *line], capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert found.returncode in (0, 6), found.stderr
        assert b"\x1b" not in found.stdout + found.stderr
    assert json.loads(Path("r.json").read_text())["inputs"][0]["path"] == odd
    for name in ("j.xml", "s.md", "h.html"):
        assert "\x1b" not in Path(name).read_text(encoding="utf-8")
