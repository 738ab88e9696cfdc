"""The committed sample is what its script makes. The slow test trains it again."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from compare import batchnorms, operators


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(__file__).resolve().parent.parent / "samples" / "digits"


def shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]


def test_the_model_takes_the_data_and_keeps_its_batchnorms(folder: Path) -> None:
    model = onnx.load(folder / "digits.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(i.name, shape(i)) for i in model.graph.input] == [("image", ["batch", 1, 8, 8])]
    assert [(o.name, shape(o)) for o in model.graph.output] == [("logits", ["batch", 10])]
    assert batchnorms(model) == 8
    counts = operators(model)
    assert counts["Conv"] == 8
    assert counts["Add"] == 3


def test_the_data_are_float_images_with_labels_for_the_test_part_only(folder: Path) -> None:
    with np.load(folder / "calibration.npz") as calibration, np.load(folder / "test.npz") as test:
        assert calibration.files == ["image"]
        assert sorted(test.files) == ["image", "labels"]
        assert (calibration["image"].shape, test["image"].shape, test["labels"].shape) == ((512, 1, 8, 8), (540, 1, 8, 8), (540,))
        for images in (calibration["image"], test["image"]):
            assert images.dtype == np.float32
            assert images.min() == 0
            assert images.max() == 1
        assert np.issubdtype(test["labels"].dtype, np.integer)
        assert set(test["labels"]) == set(range(10))


def test_calibration_and_test_images_come_from_disjoint_parts_of_the_digits(folder: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    with np.load(folder / "calibration.npz") as calibration, np.load(folder / "test.npz") as test:
        parts = {name: {image.tobytes() for image in data["image"]} for name, data in (("calibration", calibration), ("test", test))}
        label = {image.tobytes(): int(n) for image, n in zip(test["image"], test["labels"], strict=True)}
    source = datasets.load_digits()
    every = {(image / 16).astype(np.float32)[None].tobytes(): int(n) for image, n in zip(source.images, source.target, strict=True)}
    assert not parts["calibration"] & parts["test"]
    assert parts["calibration"] | parts["test"] <= every.keys()
    assert all(every[image] == n for image, n in label.items())


def test_the_sample_is_small(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) < 2_000_000


def test_the_script_and_the_files_agree_on_the_weights(folder: Path) -> None:
    """Same parameters by name and shape, without training."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("digits_train", folder / "train.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.CALIBRATION == 512
    network = script.Network()
    with torch.no_grad():
        assert network.eval()(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    model = onnx.load(folder / "digits.onnx")
    stored = {t.name: tuple(t.dims) for t in model.graph.initializer}
    # The exporter stores equal parameters once, and reads the others through Identity.
    stored |= {n.output[0]: stored[n.input[0]] for n in model.graph.node if n.op_type == "Identity"}
    assert stored == wanted


@pytest.mark.slow
def test_training_again_makes_the_same_data_and_the_same_network(folder: Path, tmp_path: Path) -> None:
    """The data are identical anywhere; the weights only with the same PyTorch on the same kind of processor, so they are not compared."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    subprocess.run([sys.executable, folder / "train.py", tmp_path], check=True, capture_output=True)
    for name in ("calibration.npz", "test.npz"):
        with np.load(folder / name) as committed, np.load(tmp_path / name) as made:
            assert committed.files == made.files
            assert all(np.array_equal(committed[key], made[key]) for key in made.files)
    committed_model, made_model = onnx.load(folder / "digits.onnx"), onnx.load(tmp_path / "digits.onnx")
    assert operators(made_model) == operators(committed_model)
    assert {t.name: tuple(t.dims) for t in made_model.graph.initializer} == {
        t.name: tuple(t.dims) for t in committed_model.graph.initializer
    }


def test_the_shift_sample_shows_what_recalibration_brings_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In short: fewer steps of training, one shift, two numbers of images."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    path = Path(__file__).resolve().parent.parent / "samples" / "shift" / "shift.py"
    spec = importlib.util.spec_from_file_location("shift", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, value in {"SIZES": (16, 128), "SHOWN": (16, 128), "EPOCHS": 4}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "SHIFTS", {"contrast": script.SHIFTS["contrast"]})
    found = script.experiment(1)
    scores = found["contrast"]["methods"]
    assert set(scores) == set(script.METHODS)
    assert scores["exact"][128] > found["contrast"]["as it is"] + 0.2
    rows = script.table(found).splitlines()
    assert len(rows) == 2 + len(script.METHODS)
    assert rows[2].endswith(f"| {scores['exact'][16]:.1%} | {scores['exact'][128]:.1%} |")
    pytest.importorskip("matplotlib")
    script.draw(found, tmp_path / "shift.svg")
    assert "<svg" in (tmp_path / "shift.svg").read_text(encoding="utf-8")


def test_the_quantised_sample_shows_what_integers_cost_and_what_brings_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In short: one network, three bits, one seed, two spreads; the tables are those of its page."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    path = Path(__file__).resolve().parent.parent / "samples" / "quantised" / "quantised.py"
    spec = importlib.util.spec_from_file_location("quantised", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    name = "ReLU, depthwise"
    for attribute, value in {"BITS": (3,), "NETWORKS": {name: script.NETWORKS[name]}, "SPREADS": (0, 2)}.items():
        monkeypatch.setattr(script, attribute, value)
    found = script.experiment(1)
    real, _, folded, equalised, recalibrated = found[name, 3, False][0]
    assert min(equalised, recalibrated) > folded + 0.05
    assert real > 0.9
    spread = script.spreads(1)
    assert [warned > 0 for _, _, warned, _ in (spread[0][0], spread[2][0])] == [False, True]
    assert spread[0][0][3] > spread[2][0][3] + 0.3
    prepared = script.recipe(1)
    before, after = (prepared[way, False][0] for way in ("as it is", "bnfold fuse --equalise"))
    assert before[2]["BatchNormalization"] == 3
    assert after[2] == {}
    assert after[1] > before[1] - 0.02
    page = path.with_name("README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(script, "experiment", lambda seeds: found)
    monkeypatch.setattr(script, "spreads", lambda seeds: spread)
    monkeypatch.setattr(script, "recipe", lambda seeds: prepared)
    for table in script.tables(1):
        assert table.splitlines()[0] in page
