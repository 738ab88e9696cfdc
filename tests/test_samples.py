"""The committed files are what their script makes, and each sample shows, in short, what its page says. The slow test trains again."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from compare import batchnorms, operators
from vision import package

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


def script(name: str, **settings: object) -> ModuleType:
    """The script of a sample, imported, with constants of its own."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    path = SAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for setting, value in settings.items():
        assert hasattr(module, setting)
        setattr(module, setting, value)
    return module


def page(name: str) -> str:
    return (SAMPLES / name / "README.md").read_text(encoding="utf-8")


def is_on(table: str, name: str) -> bool:
    """Whether a page has a table with this one's titles and the first words of its rows."""
    rows = [line.split(" | ")[0] for line in table.splitlines()]
    return table.splitlines()[0] in page(name) and all(f"\n{row}" in page(name) for row in rows)


@pytest.fixture(scope="module")
def folder() -> Path:
    return SAMPLES / "digits"


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
    sample = script("digits/train")
    assert sample.CALIBRATION == 512
    network = sample.Network()
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


def test_corruptions_cost_accuracy_and_recalibration_brings_much_of_it_back() -> None:
    """In short: one network, hardly trained, two corruptions, one method."""
    sample = script("corruptions/corruptions", EPOCHS=3, NAMES=("exact",))
    sample.WAYS = [("exact", size) for size in sample.SIZES]
    for name in set(sample.CORRUPTIONS) - {"contrast", "rotation"}:
        del sample.CORRUPTIONS[name]
    by_severity, by_way = sample.experiment(1)
    ((before, after),) = by_severity["contrast", 5]
    assert after > before + 0.3
    ((before, after),) = by_severity["rotation", 5]
    assert after < before + 0.3  # which it can't mend
    (uncorrupted,) = by_way["", 10]
    one, most = (uncorrupted[1 + sample.WAYS.index(("exact", size))] for size in (1, 512))
    assert most > one + 0.05
    by_line, by_method = sample.tables(by_severity, by_way).split("\n\n")
    assert is_on(by_line, "corruptions")
    assert is_on(by_method, "corruptions")


def test_averaged_networks_work_when_aligned_and_measured_afresh() -> None:
    sample = script("averaging/averaging", EPOCHS=4, BATCHES=(32,))
    alone, as_they_are, in_line = sample.two_networks([32])
    assert min(alone[1:]) > 0.95
    assert in_line[2] > max(as_they_are[2], in_line[1]) + 0.15
    _, *measured = sample.swa()
    assert min(score for row in measured for score in row[1:]) > 0.95
    for table in sample.table(sample.TITLES[0], sample.two_networks([])), sample.table(sample.TITLES[1], measured):
        assert is_on(table, "averaging")


def test_aligned_channels_are_the_same_function() -> None:
    sample = script("averaging/averaging")
    torch = pytest.importorskip("torch")
    first, second = sample.Network().eval(), sample.Network().eval()
    x = torch.rand(16, 1, 8, 8)
    moved = sample.aligned(first, second, x)
    torch.testing.assert_close(moved(x), second(x))
    assert not torch.equal(moved.stem.weight, second.stem.weight)


def test_the_branches_of_repvgg_become_a_plain_network(capsys: pytest.CaptureFixture[str]) -> None:
    script("reparam/reparam", EPOCHS=1).main()
    shown = capsys.readouterr().out
    assert "\n| Conv | 10 | 5 |\n" in shown
    assert "equivalent, compared on 32 samples" in shown
    assert is_on(shown.split("\n\n")[0], "reparam")


def test_a_keras_network_is_recalibrated_folded_and_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras runs on another back-end")
    trained, fresh, read = script("keras/keras_digits").main()
    assert fresh > trained + 0.3
    assert read == pytest.approx(fresh, abs=0.005)


def test_a_callback_of_lightning_measures_when_training_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    sample = script("callbacks/lightning_callback")
    torch = pytest.importorskip("torch")
    x, y, *_ = sample.digits()
    module, callback = sample.Digits(), sample.Recalibrate(samples=64)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(module, sample.DataLoader(sample.TensorDataset(x, y), batch_size=32))
    assert callback.report.samples == 64
    with torch.no_grad():
        made = module.network.stem(x[:64])
    torch.testing.assert_close(module.network.bn.running_mean, made.mean((0, 2, 3)))
    assert module.network.training


def test_an_average_of_timm_is_recalibrated_and_folded() -> None:
    pytest.importorskip("torch")
    package("timm")
    _, averaged, fresh, folded = script("callbacks/timm_ema", STEPS=60).main()
    assert fresh > averaged + 0.2
    assert folded == pytest.approx(fresh, abs=0.005)


def test_a_pass_of_olive_recalibrates_and_folds(tmp_path: Path) -> None:
    pytest.importorskip("olive")
    shutil.copytree(SAMPLES, tmp_path / "samples")
    command = re.search(r"olive (run .*)", page("callbacks"))
    assert command
    paths = os.pathsep.join([str(SAMPLES.parent), "samples/callbacks"])
    environment = os.environ | {"PYTHONPATH": paths, "OLIVE_DISABLE_TELEMETRY": "1"}
    subprocess.run([sys.executable, "-m", "olive", *command[1].split()], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert batchnorms(onnx.load(tmp_path / "folded" / "model.onnx")) == 0


def test_two_processes_measure_what_one_does() -> None:
    assert max(script("torchrun/processes", METHODS=("exact",)).main(2).values()) < 1e-6


def test_the_quantised_sample_shows_what_integers_cost_and_what_brings_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In short: one network, three bits, one seed, two spreads; the tables are those of its page."""
    name = "ReLU, depthwise"
    sample = script("quantised/quantised", BITS=(3,), SPREADS=(0, 2))
    sample.NETWORKS = {name: sample.NETWORKS[name]}
    found = sample.experiment(1)
    real, _, folded, equalised, recalibrated = found[name, 3, False][0]
    assert min(equalised, recalibrated) > folded + 0.05
    assert real > 0.9
    spread = sample.spreads(1)
    assert [warned > 0 for _, _, warned, _ in (spread[0][0], spread[2][0])] == [False, True]
    assert spread[0][0][3] > spread[2][0][3] + 0.3
    prepared = sample.recipe(1)
    before, after = (prepared[way, False][0] for way in ("as it is", "bnfold fuse --equalise"))
    assert before[2]["BatchNormalization"] == 3
    assert after[2] == {}
    assert after[1] > before[1] - 0.02
    monkeypatch.setattr(sample, "experiment", lambda seeds: found)
    monkeypatch.setattr(sample, "spreads", lambda seeds: spread)
    monkeypatch.setattr(sample, "recipe", lambda seeds: prepared)
    for table in sample.tables(1):
        assert table.splitlines()[0] in page("quantised")
