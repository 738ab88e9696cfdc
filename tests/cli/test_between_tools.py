"""What goes between two tools: names of models, files that say what they are, settings that come with a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bnfold
from bnfold.cli import run

DIGITS = Path(__file__).resolve().parents[2] / "samples" / "digits"
MYNET = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

def folded():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
"""


@pytest.fixture
def checkpoint(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """state.pth of mynet.make, beside mynet.py in the working directory, which is on no path; x.npy fits."""
    torch = pytest.importorskip("torch")
    Path("mynet.py").write_text(MYNET)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p).resolve() != here.resolve()])
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    scope: dict[str, Any] = {}
    exec(MYNET, scope)
    torch.save(scope["make"]().state_dict(), "state.pth")
    return here


# --- pipelines and what they are held against -------------------------------------------------------------------------------------------


def test_what_a_pipeline_made_is_held_against_what_it_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pipeline", "model.onnx", "--data", "x.npy", "-o", "out.onnx", "--keep-recalibrated", "kept.onnx"]) == 0
    assert "written: kept.onnx and out.onnx" in capsys.readouterr().out
    assert run(["verify", "out.onnx", "--against", "kept.onnx"]) == 0
    assert run(["verify", "out.onnx", "--against", "model.onnx"]) == 4
    assert "out.onnx was folded from kept.onnx, whose statistics were measured afresh on the way from this" in capsys.readouterr().err
    assert run(["verify", "out.onnx", "--against", "another.onnx"]) == 1
    assert run(["pipeline", "model.onnx", "--data", "x.npy", "-o", "second.onnx"]) == 0
    assert run(["verify", "second.onnx", "--against", "model.onnx"]) == 4
    assert "--keep-recalibrated FILE" in capsys.readouterr().err


def test_nothing_is_kept_of_a_pipeline_that_fails(here: Path) -> None:
    line = ["pipeline", "none.onnx", "--data", "x.npy", "-o", "out.onnx", "--keep-recalibrated", "kept.onnx", "--strict"]
    assert run(line) == 1
    assert not Path("kept.onnx").exists()


def test_a_file_that_was_folded_is_known_as_such(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "model.onnx", "-o", "folded.onnx"]) == 0
    for verb, *more in (["fuse"], ["recalibrate", "--data", "x.npy"], ["pipeline", "--data", "x.npy"]):
        assert run([verb, "folded.onnx", "-o", "x.onnx", *more]) == 4
        assert "bnfold has folded it already (1 BatchNorms before, from model.onnx)" in capsys.readouterr().err
    assert run(["inspect", "folded.onnx"]) == 0
    assert "bnfold has folded it already" in capsys.readouterr().out
    assert run(["fuse", "gone.onnx", "-o", "x.onnx"]) == 4
    assert "Exporters fold Conv+BatchNorm by default" in capsys.readouterr().err


# --- PyTorch ----------------------------------------------------------------------------------------------------------------------------


def test_a_folded_state_dict_says_how_it_is_loaded_and_may_be_plain(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    line = ["fuse", "state.pth", "--arch", "mynet:make", "--input-shape", "1,3,8,8", "-o"]
    assert run([*line, "f.pth"]) == 0
    assert "f.pth: the weights, with what was folded: bnfold.load('f.pth', arch=...) makes" in capsys.readouterr().err
    assert run([*line, "plain.pth", "--plain-state"]) == 0
    assert "bnfold.load(" not in capsys.readouterr().err
    scope: dict[str, Any] = {}
    exec(MYNET, scope)
    plain = scope["folded"]().eval()
    plain.load_state_dict(torch.load("plain.pth", weights_only=True))
    module = bnfold.load("f.pth", arch="mynet.py:make")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(module(x), plain(x))


def test_a_factory_beside_the_user_and_data_that_show_how_it_is_called(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "state.pth", "--arch", "mynet:make", "--data", "x.npy", "-o", "f.pt2"]) == 0
    assert run(["fuse", "model.onnx", "--data", "x.npy", "-o", "f.onnx"]) == 0
    capsys.readouterr()
    for data, why in (("nowhere.npy", "there is no such file"), (".", "neither a file of arrays nor a function")):
        assert run(["fuse", "model.onnx", "--data", data, "-o", "g.onnx"]) == 2
        assert f"--data {data}: {why}" in capsys.readouterr().err
    assert run(["inspect", "state.pth", "--arch", "mynet:mak"]) == 2
    assert "mynet has no 'mak'; did you mean 'make'?" in capsys.readouterr().err


# --- names of models --------------------------------------------------------------------------------------------------------------------


def test_a_model_on_hugging_face(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def fetched(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns[:2]))
        return str(here)

    monkeypatch.setattr(hub, "snapshot_download", fetched)
    assert run(["inspect", "hf://owner/net@v2/model.onnx"]) == 0
    assert bnfold.inspect(bnfold.load("hf://owner/net/model.onnx")).layers
    assert asked == [("owner/net", "v2", ["model.onnx", "model.onnx_data"]), ("owner/net", None, ["model.onnx", "model.onnx_data"])]
    assert run(["fuse", "hf://owner/net/model.onnx", "-o", "fused.onnx"]) == 0
    assert run(["verify", "fused.onnx", "--against", "hf://owner/net/model.onnx"]) == 0
    assert run(["average", *["hf://owner/net/model.onnx"] * 2, "--data", "x.npy", "-o", "mean.onnx"]) == 0
    assert run(["inspect", "hf://owner/net/other.onnx"]) == 3
    assert "hf://owner/net/other.onnx: there is no file other.onnx in that repository" in capsys.readouterr().err

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    assert run(["fuse", "hf://owner/net/model.onnx", "-o", "x.onnx"]) == 3
    assert "can't be fetched (ConnectionError: no route to host); is the name right, and is there a network?" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert run(["inspect", "hf://owner/net/model.onnx"]) == 4


@pytest.mark.parametrize("name", ["hf://owner", "hf://owner/net", "https://huggingface.co/owner/net/model.onnx"])
def test_a_name_that_is_no_file(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", name]) == 2
    assert f"bnfold: error: {name}: " in capsys.readouterr().err


def test_a_model_of_timm(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    exec(MYNET, scope)

    def create(name: str, *, pretrained: bool) -> object:
        if pretrained:
            raise ConnectionError("no route to host")
        made = scope["make"]()
        made.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 1.0}
        return made

    names = ["resnet18", "resnet50"]
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(is_model=names.__contains__, list_models=lambda: names, create_model=create))
    without = ["--arch-args", '{"pretrained": false}']
    assert run(["fuse", "timm:resnet18.a1_in1k", *without, "-o", "f.pt2"]) == 0
    capsys.readouterr()
    assert run(["fuse", "timm:resnet18", "-o", "g.pt2"]) == 3
    assert "its weights need a network" in capsys.readouterr().err
    assert run(["inspect", "timm:resnet81"]) == 2
    assert "did you mean 'resnet18'" in capsys.readouterr().err
    Path("pictures").mkdir()
    for place in range(4):
        Image.fromarray(np.random.default_rng(place).integers(0, 256, (8, 8, 3), np.uint8)).save(f"pictures/{place}.png")
    assert run(["recalibrate", "timm:resnet18", *without, "--data", "pictures", "--preprocess", "timm", "-o", "r.pt2"]) == 0
    assert "centre crop 8x8 -> scale 1/255 -> mean 0.5, 0.5, 0.5 -> std 0.25, 0.25, 0.25" in capsys.readouterr().err


def test_settings_of_images_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pictures").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save("pictures/a.png")
    line = ["recalibrate", "model.onnx", "--data", "pictures", "--force", "-o", "out.onnx", "--preprocess"]
    assert run([*line, "torchvision"]) == 0
    assert "resize to shorter side 9 (bilinear) -> centre crop 8x8 -> scale 1/255 -> mean 0.485, 0.456, 0.406" in capsys.readouterr().err
    assert run([*line, "timm"]) == 2
    assert run([*line, "hf"]) == 2
    assert "there is no " in capsys.readouterr().err
    settings = {"do_resize": True, "size": {"height": 8, "width": 8}, "image_mean": [0.1] * 3, "image_std": [0.9] * 3}
    Path("preprocessor_config.json").write_text(json.dumps(settings))
    assert run([*line, "hf"]) == 0
    assert "mean 0.1, 0.1, 0.1 -> std 0.9, 0.9, 0.9" in capsys.readouterr().err
