"""Checkpoints in several safetensors files: read whole, and refused in one line where a file is missing, wrong or elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bnfold

ROOT = Path(__file__).resolve().parents[3]
ARCH = "net.py:network"
LAYERS = "nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)"
CODE = f"from torch import nn\n\ndef network():\n    return nn.Sequential({LAYERS})\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two files and its index, in a folder beside the file that builds the network."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        network[1].running_var.uniform_(0.5, 2)
        network[1].running_mean.normal_()
    (tmp_path / "net.py").write_text(CODE)
    made = tmp_path / "checkpoint"
    made.mkdir()
    state = list(network.state_dict().items())
    parts = {"model-00001-of-00002.safetensors": dict(state[:3]), "model-00002-of-00002.safetensors": dict(state[3:])}
    for name, part in parts.items():
        save_file(part, made / name)
    write_index(made, {weight: name for name, part in parts.items() for weight in part})
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    return made


def write_index(folder: Path, places: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def places(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]  # type: ignore[no-any-return]


def command(*arguments: str | Path, where: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "bnfold", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=where, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)


def test_an_index_is_read_and_folded_as_the_whole_checkpoint_is(folder: Path) -> None:
    here = folder.parent
    shape = ("--arch", ARCH, "--input-shape", "1,3,8,8")
    for given, out in (("checkpoint", "a.safetensors"), ("whole.pth", "b.safetensors")):
        done = command("fuse", given, *shape, "-o", out, "--report", f"{out}.json", where=here)
        assert done.returncode == 0, done.stderr
    for pair in (("a.safetensors", "b.safetensors"), (f"checkpoint/{INDEX}", "whole.pth")):
        one, other = (bnfold.load(here / name, arch=f"{here}/{ARCH}").state_dict() for name in pair)
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    inputs = json.loads((here / "a.safetensors.json").read_text())["inputs"]
    assert len(inputs) == 3
    assert all(len(each["sha256"]) == 64 for each in inputs)


BAD = {
    "a file is missing": (lambda where, was: (where / was["0.weight"]).unlink(), "is missing (no such file)"),
    "above the folder": (lambda where, was: write_index(where, was | {"0.bias": "../whole.pth"}), "outside of its folder"),
    "an absolute path": (lambda where, was: write_index(where, was | {"0.bias": "/etc/passwd"}), "outside of its folder"),
    "a path of Windows": (lambda where, was: write_index(where, was | {"0.bias": "..\\whole.pth"}), "outside of its folder"),
    "a nul": (lambda where, was: write_index(where, was | {"0.bias": "a\0b"}), "outside of its folder"),
    "another file's weight": (lambda where, was: write_index(where, was | {"0.bias": was["3.bias"]}), "doesn't hold '0.bias'"),
    "no names": (lambda where, was: write_index(where, was | {"0.bias": 3}), "no weight_map of names"),
    "no map": (lambda where, was: write_index(where, [1]), "no weight_map of names"),
    "empty": (lambda where, was: write_index(where, {}), "no weight_map of names"),
    "cut short": (lambda where, was: (where / INDEX).write_text((where / INDEX).read_text()[:-2]), "no weight_map of names"),
    "no safetensors": (lambda where, was: (where / was["3.bias"]).write_bytes(b"no"), "a damaged safetensors file"),
    "a folder": (lambda where, was: write_index(where, was | {"0.bias": "inner"}) or (where / "inner").mkdir(), "a folder, not a file"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_index_is_refused_in_one_line(folder: Path, what: str) -> None:
    spoil, expected = BAD[what]
    spoil(folder, places(folder))
    with pytest.raises(bnfold.ModelError) as caught:
        bnfold.load(folder, arch=f"{folder.parent}/{ARCH}")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_status_is_that_of_an_unsafe_input(folder: Path) -> None:
    write_index(folder, places(folder) | {"0.bias": "../whole.pth"})
    done = command("inspect", "checkpoint", "--arch", ARCH, where=folder.parent)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="links want a right there")
def test_links_may_lead_where_the_index_does_and_nowhere_else(folder: Path) -> None:
    cache = folder.parent / "snapshot"
    cache.mkdir()
    for file in folder.iterdir():  # as in Hugging Face's cache
        (cache / file.name).symlink_to(file)
    assert bnfold.load(cache, arch=f"{folder.parent}/{ARCH}") is not None
    first = folder / places(folder)["0.weight"]
    first.rename(folder.parent / "elsewhere")
    first.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(bnfold.ModelError, match="a link out of its folder"):
        bnfold.load(folder, arch=f"{folder.parent}/{ARCH}")


def test_what_the_index_does_not_name_is_told(folder: Path) -> None:
    said: list[str] = []
    left = {name: file for name, file in places(folder).items() if name != "1.num_batches_tracked"}
    write_index(folder, left)
    bnfold.load(folder, arch=f"{folder.parent}/{ARCH}", say=said.append)
    assert any("also holds '1.num_batches_tracked'" in text for text in said)
