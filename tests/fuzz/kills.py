"""Commands that are killed at any moment, by SIGKILL or SIGTERM, while they replace what an earlier run wrote.

A failure is an input that changed, an output that is neither the earlier one nor the new one, whole, and a file that stays behind the next
run in that folder.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
import torch
from cases.builder import Net

import bnfold

from .found import Found, Say, watched

ROOT = Path(__file__).resolve().parents[2]
ARCH = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
"""
DATA = np.random.default_rng(0).normal(size=(8, 3, 9, 9)).astype(np.float32)
STATE = ("--arch", "arch.py:make")
# What is killed, by the kind of its input and output: the arguments, of which IN and OUT are replaced.
COMMANDS: dict[str, tuple[str, ...]] = {
    "fuse .onnx": ("fuse", "IN.onnx", "-o", "OUT.onnx"),
    "fuse .onnx beside its data": ("fuse", "IN-outside.onnx", "-o", "OUT.onnx"),
    "recalibrate .onnx": ("recalibrate", "IN.onnx", "--data", "data.npy", "-o", "OUT.onnx"),
    "pipeline .onnx beside its data": ("pipeline", "IN-outside.onnx", "--data", "data.npy", "-o", "OUT.onnx"),
    "fuse .pth": ("fuse", "IN.pth", *STATE, "--input-shape", "1,3,9,9", "-o", "OUT.pth"),
    "recalibrate .pth": ("recalibrate", "IN.pth", *STATE, "--data", "data.npy", "-o", "OUT.pth"),
    "fuse .safetensors": ("fuse", "IN.safetensors", *STATE, "--input-shape", "1,3,9,9", "-o", "OUT.safetensors"),
    "fuse .pt2": ("fuse", "IN.pt2", "-o", "OUT.pt2"),
}


def network(name: str) -> onnx.ModelProto:
    net = Net(name)
    net.output(net.bn(net.conv(net.relu(net.bn(net.conv(net.input("N", 3, 9, 9), 3, 6), 6)), 6, 6), 6))
    return net.model()


@functools.cache
def folder() -> Path:
    """The inputs, old and new, and for each command the folder and the seconds of a whole run over the old ones, and over the new."""
    made = Path(tempfile.mkdtemp(prefix="bnfold-kills-"))
    (made / "arch.py").write_text(ARCH)
    np.save(made / "data.npy", DATA)
    scope: dict[str, Any] = {}
    exec(ARCH, scope)
    for seed, name in enumerate(("old", "new")):
        onnx.save(network(name), made / f"{name}.onnx")
        onnx.save(network(name), made / f"{name}-outside.onnx", save_as_external_data=True, location=f"{name}.data", size_threshold=16)
        torch.manual_seed(seed)
        module = scope["make"]().eval()
        torch.save(module.state_dict(), made / f"{name}.pth")
        safetensors.numpy.save_file({key: value.numpy() for key, value in module.state_dict().items()}, made / f"{name}.safetensors")
        torch.export.save(torch.export.export(module, (torch.from_numpy(DATA),)), made / f"{name}.pt2")
    return made


def command(kind: str, name: str) -> list[str]:
    """name: of the input, "old" or "new"."""
    given = [part.replace("IN", name).replace("OUT", "out") for part in COMMANDS[kind]]
    return [sys.executable, "-m", "bnfold", *given, "--force", "-q"]


def run(arguments: list[str], where: Path, **how: Any) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(arguments, cwd=where, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)


def written(where: Path) -> dict[str, Any]:
    """What the output says, whichever files it lies in; an error where it isn't whole."""
    found: dict[str, Any] = {}
    for path in sorted(where.glob("out.*")):
        if path.suffix == ".onnx":
            found[path.name] = onnx.load(path).SerializeToString(deterministic=True)
        elif path.suffix == ".pt2":
            state = torch.export.load(path).state_dict
            found[path.name] = {name: tensor.tolist() for name, tensor in state.items()}
        elif path.suffix == ".pth":
            found[path.name] = {name: t.tolist() for name, t in torch.load(path, weights_only=True).items() if isinstance(t, torch.Tensor)}
        elif path.suffix == ".safetensors":
            found[path.name] = {name: array.tolist() for name, array in safetensors.numpy.load_file(path).items()}
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[path.name] = {name: arrays[name].tolist() for name in arrays.files}
    return found


@functools.cache
def whole(kind: str) -> tuple[Path, float, dict[str, Any], dict[str, Any], set[str]]:
    """A folder with what the old input gives, the seconds that takes, what it says and what the new one does, and the new one's files."""
    place = folder().with_name(f"{folder().name}-{list(COMMANDS).index(kind)}")
    shutil.copytree(folder(), place)
    seconds = 0.0
    for _ in range(2):  # the second time the caches are warm
        start = time.perf_counter()
        assert run(command(kind, "old"), place).wait() == 0
        seconds = time.perf_counter() - start
    old = written(place)
    other = place.with_name(f"{place.name}-new")
    shutil.copytree(place, other)
    assert run(command(kind, "new"), other).wait() == 0
    new, files = written(other), {path.name for path in other.iterdir()}
    shutil.rmtree(other)
    return place, seconds, old, new, files


def next_run(where: Path) -> None:
    """Another one that writes into the folder, whatever it is for."""
    bnfold.save(onnx.load(folder() / "old.onnx"), where / "next.onnx", force=True)


def tried(seed: int, *, save: Path | None = None, say: Say | None = None) -> Found:
    """Whether the old output stood after the kill ("before"), or the new one ("behind")."""
    rng, found = random.Random(seed), Found(seed)
    kind, number = rng.choice(list(COMMANDS)), rng.choice((signal.SIGKILL, signal.SIGTERM))
    place, seconds, old, new, files = whole(kind)
    moment = seconds * rng.choice((rng.uniform(0, 1.1), rng.uniform(0.75, 1.05)))  # files are written towards the end
    with tempfile.TemporaryDirectory() as name, watched(found, f"{kind}, {number.name} after {moment:.3f} s of {seconds:.1f}", say):
        where = Path(name, "work")
        shutil.copytree(place, where)
        process = run(command(kind, "new"), where)
        time.sleep(moment)
        process.send_signal(number)
        process.wait()
        for path in folder().iterdir():
            assert (where / path.name).read_bytes() == path.read_bytes(), f"{path.name} changed"
        after = {path.name for path in where.iterdir()}
        there = written(where)
        if there not in (old, new):  # the moment between two renames, which the next run mends
            next_run(where)
            there = written(where)
        assert there in (old, new), f"neither the old output nor the new one; there are {sorted(after)}"
        found.became = "before" if there == old else "behind"
        next_run(where)
        strays = {path.name for path in where.iterdir()} - files - {path.name for path in place.iterdir()} - {"next.onnx"}
        assert not strays, f"left behind: {sorted(strays)}"
        if save is not None:
            shutil.copytree(where, save)
    return found
