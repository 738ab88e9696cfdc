"""What stands around the measuring: several processes, parts of the data, how many samples are enough, which layers, and the way back."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from arrays import measure
from cases.builder import Net as OnnxNet
from modules import Net, norm
from onnx import numpy_helper
from PIL import Image
from torch import nn

import bnfold
from bnfold import api
from bnfold.cli import run
from bnfold.errors import DataError, UnsupportedError, UsageError
from bnfold.recalibration import statistics_file as kept_statistics
from bnfold.recalibration.changes import f_ratio
from bnfold.recalibration.methods import Exact, MovingAverage
from bnfold.recalibration.scoring import Scores, cross_entropy, effect

ROOT = Path(__file__).resolve().parents[2]
DATA = np.random.default_rng(0).normal(1, 2, (37, 3, 8, 7)).astype(np.float32)


def onnx_network() -> onnx.ModelProto:
    net = OnnxNet("calibrated")
    x = net.relu(net.bn(net.conv(net.input("N", 3, 8, 7), 3, 6, pads=1), 6))
    x = net.op("Add", net.relu(net.bn(net.conv(x, 6, 6, pads=1), 6)), x)
    net.output(net.bn(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), 6, 4), 4))
    return net.model()


def statistics(model: Any) -> dict[str, np.ndarray]:
    if isinstance(model, nn.Module):
        return {name: buffer.double().numpy() for name, buffer in model.named_buffers() if "running" in name}
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    arrays = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}
    return {name: arrays[name] for node in proto.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:]}


def agree(one: dict[str, np.ndarray], other: dict[str, np.ndarray], rtol: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=rtol, atol=rtol * np.abs(array).max(), err_msg=name)


def bnfold_cli(*arguments: object, launcher: tuple[str, ...] = (), folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, *(("-m",) if launcher else ()), "bnfold", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)


FACTORY = """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.LazyLinear(4)
    )
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(onnx_network(), tmp_path / "net.onnx")
    np.save(tmp_path / "data.npy", DATA)
    (tmp_path / "net.py").write_text(FACTORY)
    torch.manual_seed(1)
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    module = namespace["make"]()
    module(torch.from_numpy(DATA[:4]))
    torch.save(module.state_dict(), tmp_path / "net.pth")
    return tmp_path


# --- several processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("method", ["exact", "precise"])
def test_processes_of_torchrun_give_the_single_one_s_result(folder: Path, processes: int, method: str) -> None:
    given = ["recalibrate", "net.onnx", "--data", "data.npy", "--method", method, "--batch-size", "5"]
    assert bnfold_cli(*given, "-o", "one.onnx", folder=folder).returncode == 0
    several = bnfold_cli(
        *given, "-o", "several.onnx", "--json", launcher=("torch.distributed.run", "--nproc-per-node", str(processes)), folder=folder
    )
    assert several.returncode == 0, several.stderr
    assert json.loads(several.stdout)["samples"] == 37  # one of them speaks
    agree(statistics(onnx.load(folder / "several.onnx")), statistics(onnx.load(folder / "one.onnx")))


def test_processes_share_a_pytorch_model_too(folder: Path) -> None:
    given = ["recalibrate", "net.pth", "--arch", "net.py:make", "--data", "data.npy", "--batch-size", "5"]
    assert bnfold_cli(*given, "-o", "one.pth", folder=folder).returncode == 0
    several = bnfold_cli(*given, "-o", "several.pth", launcher=("torch.distributed.run", "--nproc-per-node", "2"), folder=folder)
    assert several.returncode == 0, several.stderr
    one, other = (torch.load(folder / name, weights_only=True) for name in ("one.pth", "several.pth"))
    one, other = (found.get("state_dict", found) for found in (one, other))
    agree(*({k: v.double().numpy() for k, v in found.items() if "running" in k} for found in (one, other)))


def test_more_processes_than_batches(folder: Path) -> None:
    found = bnfold_cli(
        *("recalibrate", "net.onnx", "--data", "data.npy", "--batch-size", "37", "-o", "out.onnx"),
        launcher=("torch.distributed.run", "--nproc-per-node", "3"),
        folder=folder,
    )
    assert found.returncode == 0, found.stderr
    agree(statistics(onnx.load(folder / "out.onnx")), statistics(bnfold.recalibrate(onnx_network(), DATA)[0]))


@pytest.mark.parametrize("allowed", [1, 2])
def test_processes_count_their_bad_images_together(folder: Path, allowed: int) -> None:
    """One in each of two processes; none of them alone has too many."""
    (folder / "images").mkdir()
    for i in range(8):
        path = folder / "images" / f"{i}.png"
        Image.fromarray(np.full((8, 7, 3), 30 * i, np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[: 40 if i in (1, 6) else None])
    found = bnfold_cli(
        *("recalibrate", "net.onnx", "--data", "images", "--batch-size", "4", "--max-bad", str(allowed), "-o", "out.onnx", "--json"),
        launcher=("torch.distributed.run", "--nproc-per-node", "2"),
        folder=folder,
    )
    assert (found.returncode == 0) == (folder / "out.onnx").exists() == (allowed == 2)
    if allowed == 2:
        assert json.loads(found.stdout)["samples"] == 6
        assert "2 images can't be decoded and are left out" in found.stderr + found.stdout
    else:
        assert "6.png" in found.stderr
        assert "2 of 8 images are bad and --max-bad 1 allows 1" in found.stderr


def test_a_moving_average_is_for_one_process(folder: Path) -> None:
    found = bnfold_cli(
        *("recalibrate", "net.onnx", "--data", "data.npy", "--method", "moving-average", "-o", "out.onnx"),
        launcher=("torch.distributed.run", "--nproc-per-node", "2"),
        folder=folder,
    )
    assert found.returncode != 0
    assert "depends on the order of the data, so several processes can't share it" in found.stderr
    assert not (folder / "out.onnx").exists()


# --- parts of the data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["precise", "ioffe-szegedy"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_add_up_to_the_whole(tmp_path: Path, method: str, count: int) -> None:
    model = onnx_network()
    whole, report = bnfold.recalibrate(model, DATA, method=method, batch_size=5)
    paths = [tmp_path / f"{i}.npz" for i in range(count)]
    for i, path in enumerate(paths):
        bnfold.measure_part(model, DATA, (i, count), path, method=method, batch_size=5)
    merged, found = bnfold.merge_parts(model, paths[::-1])
    agree(statistics(merged), statistics(whole), 1e-7)
    assert (found.samples, found.method, found.variance) == (37, report.method, report.variance)


def test_parts_of_a_pytorch_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4)).eval()
    whole, _ = bnfold.recalibrate(module, DATA, method="precise", batch_size=5)
    for i in range(2):
        bnfold.measure_part(module, DATA, (i, 2), tmp_path / f"{i}.npz", method="precise", batch_size=5)
    merged, _ = bnfold.merge_parts(module, [tmp_path / "0.npz", tmp_path / "1.npz"], example=torch.from_numpy(DATA[:2]))
    agree(statistics(merged), statistics(whole), 1e-7)


def test_a_single_layer_s_parts_add_up_with_the_exact_method(tmp_path: Path) -> None:
    """Nothing that is measured stands behind a BatchNorm."""
    net = OnnxNet("one")
    net.output(net.bn(net.conv(net.input("N", 3, 8, 7), 3, 6), 6))
    for i in range(2):
        bnfold.measure_part(net.model(), DATA, (i, 2), tmp_path / f"{i}.npz", method="exact", batch_size=5)
    merged, _ = bnfold.merge_parts(net.model(), [tmp_path / "0.npz", tmp_path / "1.npz"])
    agree(statistics(merged), statistics(bnfold.recalibrate(net.model(), DATA)[0]), 1e-7)


def test_parts_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    for method, why in (("exact", "depends on the statistics of those before it"), ("moving-average", "depends on the order")):
        with pytest.raises(UnsupportedError, match=why):
            bnfold.measure_part(onnx_network(), DATA, (0, 2), tmp_path / "0.npz", method=method)
    assert not (tmp_path / "0.npz").exists()


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    model, paths = onnx_network(), [tmp_path / f"{i}.npz" for i in range(3)]
    for i, path in enumerate(paths):
        bnfold.measure_part(model, DATA, (i, 3), path, method="precise")
    with pytest.raises(UsageError, match="of 3 parts, 1 is missing"):
        bnfold.merge_parts(model, [paths[0], paths[2]])
    with pytest.raises(UsageError, match="part 0 was given already"):
        bnfold.merge_parts(model, [*paths, paths[0]])
    with pytest.raises(UsageError, match="measured on another model"):
        bnfold.merge_parts(bnfold.recalibrate(model, DATA)[0], paths)
    bnfold.measure_part(model, DATA, (1, 3), tmp_path / "other.npz", method="ioffe-szegedy")
    with pytest.raises(UsageError, match="measured with other method"):
        bnfold.merge_parts(model, [paths[0], tmp_path / "other.npz", paths[2]])
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="this isn't what a part of the data gave"):
        bnfold.merge_parts(model, [tmp_path / "text.npz"])
    with pytest.raises(DataError, match="no such file"):
        bnfold.merge_parts(model, [tmp_path / "none.npz"])
    with pytest.raises(UsageError, match="there is no part 3 of 3"):
        bnfold.measure_part(model, DATA, (3, 3), tmp_path / "x.npz")


# --- how many samples are enough ---------------------------------------------------------------------------------------------


def test_until_takes_as_many_samples_as_it_needs() -> None:
    data = np.random.default_rng(1).normal(1, 2, (3000, 3, 8, 7)).astype(np.float32)
    _, report = bnfold.recalibrate(onnx_network(), data, until=0.05)
    assert report.reached
    assert report.until == 0.05
    assert max(layer.stderr for layer in report.layers) <= 0.05
    assert 64 < report.samples < 1500
    assert report.notes[0].startswith(f"{report.samples} samples were enough: the worst channel's mean is known to 0.0")


def test_until_says_when_the_data_are_not_enough() -> None:
    _, report = bnfold.recalibrate(onnx_network(), DATA, until=0.01)
    assert report.reached is False
    assert report.samples == 37
    assert report.notes[0].startswith("37 samples, all that there are, were not enough: the worst channel's mean is known to 0.")


def test_until_looks_all_over_sorted_data() -> None:
    """The first samples are all of one kind; evenly spaced ones aren't."""
    kinds = np.repeat(np.linspace(-5, 5, 10), 400).astype(np.float32)
    data = kinds[:, None, None, None] + np.random.default_rng(2).normal(size=(4000, 3, 4, 4)).astype(np.float32)
    net = OnnxNet("sorted")
    net.output(net.bn(net.input("N", 3, 4, 4), 3))
    fresh, report = bnfold.recalibrate(net.model(), data, until=0.09)
    assert report.samples < 1000
    for name, array in statistics(fresh).items():
        exact = data.mean((0, 2, 3)) if "mean" in name else data.var((0, 2, 3))
        assert np.abs(array - exact).max() < 0.3 * data.std(), name


def test_until_needs_data_that_can_be_read_again() -> None:
    with pytest.raises(UsageError, match="these data can be read only once"):
        bnfold.recalibrate(onnx_network(), (DATA[i : i + 4] for i in range(0, 36, 4)), until=0.1)
    with pytest.raises(UsageError, match="give a number between 0 and 1"):
        bnfold.recalibrate(onnx_network(), DATA, until=0.0)


# --- hints -------------------------------------------------------------------------------------------------------------------


def test_unshuffled_data_are_told_where_the_method_minds() -> None:
    rng = np.random.default_rng(3)
    ordered = np.repeat(np.arange(8.0), 8)[:, None, None, None] + rng.normal(size=(64, 3, 8, 7))
    for data, told in ((ordered, True), (rng.permutation(ordered), False)):
        for method, minds in (("precise", True), ("exact", False)):
            _, report = bnfold.recalibrate(onnx_network(), data.astype(np.float32), method=method, batch_size=8)
            assert any("look unshuffled" in note for note in report.notes) == (told and minds)


def test_shuffled_batches_differ_as_chance_has_it() -> None:
    rng = np.random.default_rng(4)
    ratios = [f_ratio([measure(rng.gamma(2, 1, (8, 16, 9)) * rng.random((8, 16, 1))) for _ in range(8)]) for _ in range(50)]
    assert np.median([r for r in ratios if r is not None]) == pytest.approx(1, abs=0.2)
    assert max(r for r in ratios if r is not None) < 3


def test_data_of_another_scale_are_told() -> None:
    model = bnfold.recalibrate(onnx_network(), DATA)[0]
    assert not any("normalised" in note for note in bnfold.recalibrate(model, DATA * 1.5 + 0.3)[1].notes)
    _, report = bnfold.recalibrate(model, DATA * 255)
    assert any("the data don't look normalised as this network's were: at" in note and "255 times" in note for note in report.notes)


# --- which layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "measured"),
    [
        ({"layers": ["*_0"]}, [0]),
        ({"skip_layers": ["*_0"]}, [1, 2]),
        ({"layers": ["*_[12]"], "skip_layers": ["*_2"]}, [1]),
    ],
)
def test_layers_by_name(given: dict[str, Any], measured: list[int]) -> None:
    model = onnx_network()
    fresh, report = bnfold.recalibrate(model, DATA, **given)
    names = [f"BatchNormalization_node_{i}" for i in measured]
    assert [layer.name for layer in report.layers] == names
    old, new = statistics(model), statistics(fresh)
    assert sum(not np.array_equal(old[name], new[name]) for name in old) == 2 * len(measured)


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(UsageError, match="no BatchNorm is called 'conv\\*'; there are 'BatchNormalization_node_0'"):
        bnfold.recalibrate(onnx_network(), DATA, layers=["conv*"])
    module = nn.Sequential(norm(3)).eval()
    with pytest.raises(UsageError, match="no BatchNorm is called '1'; there are '0'"):
        bnfold.recalibrate(module, DATA, skip_layers=["1"])


# --- training mode -----------------------------------------------------------------------------------------------------------


def training_net(opset: int, outputs: int = 1, **attributes: Any) -> onnx.ModelProto:
    net = OnnxNet("training", opset=opset)
    x = net.conv(net.input("N", 3, 8, 7), 3, 6)
    made = net.ops("BatchNormalization", x, *net.bn_params(6), outputs=outputs, **attributes)
    net.output(net.bn(net.conv(net.relu(made[0]), 6, 4), 4))
    for running in made[1:3]:
        net.output(running, shape=(6,))
    return net.model()


@pytest.mark.parametrize(
    ("opset", "outputs", "attributes"),
    [(17, 3, {"training_mode": 1}), (14, 3, {"training_mode": 1}), (13, 5, {}), (7, 5, {}), (6, 1, {"is_test": 0})],
)
def test_freezing_measures_and_then_all_folds(opset: int, outputs: int, attributes: dict[str, int]) -> None:
    model = training_net(opset, outputs, **attributes)
    names = [output.name for output in model.graph.output]
    _, report = bnfold.recalibrate(model, DATA)
    assert "it is in training mode" in report.notes[0]
    frozen, report = bnfold.recalibrate(model, DATA, freeze=True)
    assert [layer.count for layer in report.layers] == [37 * 6 * 5, 37 * 4 * 3]
    assert [output.name for output in frozen.graph.output] == names
    onnx.checker.check_model(frozen)
    plain = training_net(17)
    agree_by_order(statistics(frozen), statistics(bnfold.recalibrate(plain, DATA)[0]))
    _, folded = bnfold.fuse(frozen)
    assert folded.batchnorms.after == 0


def test_five_outputs_that_nobody_reads_are_frozen_too() -> None:
    net = OnnxNet("five", opset=11)
    made = net.ops("BatchNormalization", net.conv(net.input("N", 3, 8, 7), 3, 6), *net.bn_params(6), outputs=5)
    net.output(made[0])
    model = net.model()
    frozen, report = bnfold.recalibrate(model, DATA, freeze=True)
    assert "was in training mode" in report.notes[0]
    assert next(list(node.output) for node in frozen.graph.node if node.op_type == "BatchNormalization") == made[:1]
    assert bnfold.fuse(frozen)[1].batchnorms.after == 0


@pytest.mark.parametrize("read", [True, False])
def test_the_moments_of_each_batch_can_not_be_frozen(read: bool) -> None:
    net = OnnxNet("moments", opset=11)
    made = net.ops("BatchNormalization", net.conv(net.input("N", 3, 8, 7), 3, 6), *net.bn_params(6), outputs=5)
    net.output(net.relu(made[0]))
    net.output(net.relu(made[3]) if read else made[3], shape=(6,))
    with pytest.raises(bnfold.NothingToDoError, match="used elsewhere in the model, or are outputs of it"):
        bnfold.recalibrate(net.model(), DATA, freeze=True)


def agree_by_order(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for mine, its in zip(one.values(), other.values(), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-6)


def test_freezing_a_module_without_statistics() -> None:
    torch.manual_seed(0)
    own = nn.BatchNorm2d(6, track_running_stats=False)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), own, nn.ReLU(), nn.Conv2d(6, 4, 3), norm(4)).eval()
    frozen, _ = bnfold.recalibrate(module, DATA, freeze=True)
    assert module[1].running_mean is None
    x = module[0](torch.from_numpy(DATA)).detach()
    np.testing.assert_allclose(frozen[1].running_mean.numpy(), x.mean((0, 2, 3)).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(frozen[1].running_var.numpy(), x.var((0, 2, 3), correction=0).numpy(), rtol=1e-5)
    with torch.no_grad():  # one batch of all the data is normalised as before
        want, got = (m[:3](torch.from_numpy(DATA)) for m in (module, frozen))
    torch.testing.assert_close(got, want)
    _, folded = bnfold.fuse(frozen, example=torch.from_numpy(DATA[:2]))
    assert folded.batchnorms.after == 0


# --- the way back ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_old_statistics_come_back_to_the_bit(tmp_path: Path, dtype: str) -> None:
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3), norm(4)).to(kind).eval()
    fresh, report = bnfold.recalibrate(module, torch.from_numpy(DATA).to(kind))
    assert not torch.equal(fresh[1].running_mean, module[1].running_mean)
    kept_statistics.write(tmp_path / "old.npz", report.before)
    back, names = api.restore(fresh, tmp_path / "old.npz", example=torch.from_numpy(DATA[:2]).to(kind))
    assert names == ["1", "4"]
    for name, tensor in module.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_restoring_an_onnx_model_and_what_is_not_its_own(tmp_path: Path) -> None:
    model = onnx_network()
    fresh, report = bnfold.recalibrate(model, DATA)
    agree(statistics(api.restore(fresh, report.before)[0]), statistics(model), 0)
    net = OnnxNet("other")
    net.output(net.bn(net.input("N", 5), 5))
    with pytest.raises(DataError, match="they are another model's"):
        api.restore(net.model(), report.before)


def test_the_command_line_keeps_the_old_statistics_and_puts_them_back(folder: Path) -> None:
    assert bnfold_cli("recalibrate", "net.onnx", "--data", "data.npy", "-o", "new.onnx", folder=folder).returncode == 0
    assert (folder / "new.onnx.before.npz").is_file()
    found = bnfold_cli("recalibrate", "new.onnx", "--restore", "new.onnx.before.npz", "-o", "old.onnx", folder=folder)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["3 BatchNorms have their old statistics again", "written: old.onnx"]
    agree(statistics(onnx.load(folder / "old.onnx")), statistics(onnx.load(folder / "net.onnx")), 0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-o", "a.onnx"], "--data DATA is missing"),
        (["--data", "data.npy"], "-o OUT is missing"),
        (["--data", "data.npy", "--shard", "0/2"], "--shard I/N and --stats FILE.npz go together"),
        (["--data", "data.npy", "--shard", "2/2", "--stats", "s.npz"], "write it like 0/4"),
        (["--data", "data.npy", "--shard", "0/2", "--stats", "s.npz", "-o", "a.onnx"], "a part of the data makes no model"),
        (["--data", "data.npy", "--restore", "x.npz", "-o", "a.onnx"], "leave out --data"),
        (["--data", "data.npy", "-o", "a.onnx", "--momentum", "0.1"], "--momentum is for the method moving-average, not for exact"),
        (["--data", "data.npy", "-o", "a.onnx", "--variance", "odd"], "it is biased or unbiased"),
        (["--data", "data.npy", "-o", "a.onnx", "--method", "prior", "--prior", "-1"], "--prior"),
        (["--data", "data.npy", "-o", "a.onnx", "--prior", "4"], "--prior is for the method prior, not for exact"),
    ],
)
def test_requests_that_make_no_sense(folder: Path, arguments: list[str], text: str) -> None:
    found = bnfold_cli("recalibrate", "net.onnx", *arguments, folder=folder)
    assert found.returncode == 2
    assert text in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["data.npy", "net.onnx", "net.pth", "net.py"]


# --- scores ------------------------------------------------------------------------------------------------------------------


def test_cross_entropy_of_logits_and_of_probabilities() -> None:
    logits, labels = torch.randn(9, 5, dtype=torch.float64) * 30, torch.arange(9) % 5
    want = torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy()
    np.testing.assert_allclose(cross_entropy(logits.numpy(), labels.numpy()), want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(cross_entropy(logits.softmax(1).numpy(), labels.numpy()), want, rtol=1e-9, atol=1e-12)


def test_the_word_is_by_accuracy_then_by_loss() -> None:
    rng = np.random.default_rng(5)
    loss = rng.gamma(1, 1, 400)
    right = rng.random(400) < 0.7

    def word(more: np.ndarray, other: np.ndarray) -> str:
        return effect(Scores(right, loss), Scores(more, other)).verdict

    better = right | (rng.random(400) < 0.3)
    assert word(better, loss + 1) == "improved"
    assert word(right & (rng.random(400) < 0.9), loss - 1) == "harmed"
    assert word(right, loss * 0.9) == "improved"
    assert word(right, loss * 1.1) == "harmed"
    assert word(right, loss) == "no effect"


def test_paired_errors_are_those_of_differences() -> None:
    rng = np.random.default_rng(6)
    before, after = (Scores(rng.random(300) < p, rng.gamma(1, 1, 300)) for p in (0.6, 0.8))
    found = effect(before, after)
    difference = after.right.astype(float) - before.right
    assert found.accuracy == pytest.approx(difference.mean())
    assert found.accuracy_stderr == pytest.approx(difference.std(ddof=1) / 300**0.5)
    assert found.loss_stderr == pytest.approx((after.loss - before.loss).std(ddof=1) / 300**0.5)


def test_no_effect_where_nothing_changes() -> None:
    model = bnfold.recalibrate(onnx_network(), DATA)[0]
    labelled = _labelled(model)
    _, report = bnfold.recalibrate(model, DATA, labelled=labelled)
    assert report.effect is not None
    assert report.effect.verdict == "no effect"
    assert report.accuracy_before == report.accuracy_after


def _labelled(model: Any) -> Any:
    from bnfold.backends.onnx.files.load import from_proto
    from bnfold.backends.onnx.graph.ranges import inputs
    from bnfold.data import as_batches

    return as_batches((DATA, np.arange(37) % 4), inputs(from_proto(model)))


# --- the report --------------------------------------------------------------------------------------------------------------


def test_the_report_tells_dead_channels_and_standard_errors() -> None:
    data = DATA.copy()
    data[:, 1] = 4.0
    net = OnnxNet("dead")
    net.output(net.bn(net.input("N", 3, 8, 7), 3))
    _, report = bnfold.recalibrate(net.model(), data, batch_size=4)
    (layer,) = report.layers
    assert (layer.dead, layer.channels, layer.count) == (1, 3, 37 * 56)
    rows = data[:, [0, 2]].astype(np.float64).reshape(37, 2, -1)
    means, total = rows.mean((0, 2)), 37 * 56
    error = np.sqrt(((rows.sum(2) - 56 * means) ** 2).sum(0) * 37 / 36) / total
    assert layer.stderr == pytest.approx((error / rows.std((0, 2))).max(), rel=1e-6)
    variances = rows.var((0, 2))
    squares = ((rows - means[:, None]) ** 2).sum(2) - 56 * variances
    assert layer.var_stderr == pytest.approx((np.sqrt((squares**2).sum(0) * 37 / 36) / total / variances).max(), rel=1e-6)


def test_old_statistics_are_no_part_of_the_json() -> None:
    _, report = bnfold.recalibrate(onnx_network(), DATA)
    assert "before" not in report.to_dict()
    json.dumps(report.to_dict())
    assert set(report.before) == {layer.name for layer in report.layers}


def test_a_copy_of_the_model_is_what_changes() -> None:
    module = nn.Sequential(norm(3)).eval()
    before = copy.deepcopy(module.state_dict())
    for method in (Exact(), MovingAverage()):
        bnfold.recalibrate(module, DATA, method=method)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_several_inputs_and_integers_by_every_method() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(50, 4)

    def forward(s: Any, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return s.bn(s.mix(torch.relu(s.first(s.table(ids).transpose(1, 2))).transpose(1, 2) + x[:, None]).transpose(1, 2))

    module = Net(forward, table=table, first=norm(4, 1), mix=nn.Linear(4, 5), bn=norm(5, 1)).eval()
    rng = np.random.default_rng(7)
    data = (rng.integers(0, 50, (21, 6)), rng.normal(size=(21, 4)).astype(np.float32))
    found = [statistics(bnfold.recalibrate(module, data, batch_size=size)[0]) for size in (1, 4, 21)]
    agree(found[0], found[1])
    agree(found[0], found[2])
    for method in ("precise", "ioffe-szegedy", "moving-average", "prior"):
        _, report = bnfold.recalibrate(module, data, batch_size=7, method=method)
        assert [layer.count for layer in report.layers] == [126, 126]


def test_the_keys_are_those_of_the_contract() -> None:
    assert set(bnfold.recalibrate(onnx_network(), DATA)[1].to_dict()["layers"][0]) >= {"name", "count", "mean_shift", "var_ratio", "stderr"}


def test_sequences_of_integers_of_several_lengths_beside_another_input() -> None:
    """Against the moments of all positions of all samples, in float64."""
    net = OnnxNet("tokens")
    ids, scale = net.input("N", "T", dtype="int64", name="ids"), net.input("N", 1, name="scale")
    table = net.constant(np.random.default_rng(8).normal(size=(40, 5)).astype(np.float32))
    x = net.op("Transpose", net.op("Gather", table, ids), perm=[0, 2, 1])
    x = net.bn(net.op("Mul", x, net.op("Unsqueeze", scale, net.constant(np.array([2])))), 5)
    net.output(net.bn(net.relu(x), 5))
    rng = np.random.default_rng(9)
    model = net.model()
    lengths = [3, 7, 7, 1, 4]
    batches = [{"ids": rng.integers(0, 40, (n % 3 + 1, n)), "scale": rng.normal(size=(n % 3 + 1, 1)).astype(np.float32)} for n in lengths]
    fresh, report = bnfold.recalibrate(model, batches)
    apart, _ = bnfold.recalibrate(model, [{k: v[i : i + 1] for k, v in b.items()} for b in batches[::-1] for i in range(len(b["ids"]))])
    agree(statistics(apart), statistics(fresh))
    parameters = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    first, second = [node for node in fresh.graph.node if node.op_type == "BatchNormalization"]
    seen = np.concatenate([(parameters[table][b["ids"]] * b["scale"][:, :, None].astype(np.float64)).reshape(-1, 5) for b in batches])
    found = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in fresh.graph.initializer}
    np.testing.assert_allclose(found[first.input[3]], seen.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[first.input[4]], seen.var(0), rtol=1e-6)
    gamma, beta = (found[name] for name in first.input[1:3])
    epsilon = next((a.f for a in first.attribute if a.name == "epsilon"), 1e-5)
    after = np.maximum((seen - seen.mean(0)) / np.sqrt(seen.var(0) + epsilon) * gamma + beta, 0)
    np.testing.assert_allclose(found[second.input[3]], after.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[second.input[4]], after.var(0), rtol=1e-5, atol=1e-6)
    assert [layer.count for layer in report.layers] == [len(seen)] * 2


def test_data_that_are_given_to_be_scored_must_have_labels_that_fit(folder: Path) -> None:
    model = onnx_network()
    with pytest.raises(DataError, match="the data to score on: no labels, or data that can be read only once"):
        bnfold.recalibrate(model, DATA, labelled=DATA.copy())
    _, report = bnfold.recalibrate(model, DATA, labelled=(DATA, np.arange(37) % 4))  # any form that data can have
    assert report.accuracy_before is not None
    assert report.accuracy_before.samples == 37
    np.savez(folder / "labelled.npz", x=DATA, labels=np.arange(37) % 4)
    given = ("recalibrate", "net.onnx", "--data", "data.npy", "-o", "out.onnx", "--eval")
    bare = bnfold_cli(*given, "data.npy", folder=folder)
    assert (bare.returncode, (folder / "out.onnx").exists()) == (3, False)
    assert ": no labels, or data that can be read only once" in bare.stderr
    assert bnfold_cli(*given, "labelled.npz", folder=folder).returncode == 0


def test_another_kind_of_file_is_told_in_plain_words(folder: Path) -> None:
    found = bnfold_cli("recalibrate", "net.onnx", "--restore", "net.py", "-o", "out.onnx", folder=folder)
    assert found.returncode == 3
    assert "net.py: this isn't the old statistics of a recalibrated model (File is not a zip file)" in found.stderr
    np.savez(folder / "labelled.npz", x=DATA)
    found = bnfold_cli("recalibrate", "net.onnx", "--restore", "labelled.npz", "-o", "out.onnx", folder=folder)
    assert found.returncode == 3
    assert "this isn't the old statistics of a recalibrated model, but arrays of something else" in found.stderr


# --- models that were measured apart -----------------------------------------------------------------------------------------


def module_of_clients() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4)).eval()


CLIENTS = [DATA[:9] - 2, DATA[9:20] * 2, DATA[20:]]
COUNTS = [len(part) for part in CLIENTS]


@pytest.mark.parametrize("make", [onnx_network, module_of_clients], ids=["onnx", "torch"])
def test_models_have_the_variance_of_all_their_data(make: Any) -> None:
    """By the law of total variance; in front of all BatchNorms, that is what all data in one place give."""
    clients = [bnfold.recalibrate(make(), part)[0] for part in CLIENTS]
    merged, report = bnfold.merge_models(clients, COUNTS, example=torch.from_numpy(DATA[:2]))
    every, found = [statistics(client) for client in clients], statistics(merged)
    n = np.array(COUNTS)[:, None]
    names = list(found)
    for mean, variance in zip(names[::2], names[1::2], strict=True):
        means, variances = (np.stack([each[name] for each in every]) for name in (mean, variance))
        wanted = (n * means).sum(0) / n.sum()
        np.testing.assert_allclose(found[mean], wanted, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found[variance], (n * (variances + (means - wanted) ** 2)).sum(0) / n.sum(), rtol=1e-6)
    whole = statistics(bnfold.recalibrate(make(), np.concatenate(CLIENTS))[0])
    agree({name: found[name] for name in names[:2]}, {name: whole[name] for name in names[:2]})
    assert report.samples == 37
    assert "all else is the first model's" in report.notes[0]
    assert "can't be told" not in " ".join(report.notes)
    assert report.to_dict()["layers"][0]["stderr"] is None  # which nobody knows


def test_models_that_are_not_the_same_otherwise_are_refused() -> None:
    one, other = module_of_clients(), module_of_clients()
    other[3].weight.data[0] *= 1.01
    how = {"example": torch.from_numpy(DATA[:2])}
    with pytest.raises(DataError, match=r"model 2 differs from the first not in statistics alone: .*3"):
        bnfold.merge_models([one, other], [1, 1], **how)
    fewer = nn.Sequential(*module_of_clients()[:4]).eval()
    with pytest.raises(DataError, match="model 2 has no more BatchNorms, and the first has 4 of 4 channels"):
        bnfold.merge_models([one, fewer], [1, 1], **how)
    with pytest.raises(UsageError, match="2 models and the counts 5"):
        bnfold.merge_models([one, one], [5], **how)


def test_checkpoints_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\nmake = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n")
    torch.manual_seed(0)
    states = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()]
    states.append(states[0] | {"1.running_mean": torch.ones(4), "1.running_var": torch.full((4,), 3.0)})
    for name, state in zip("ab", states, strict=True):
        torch.save(state, tmp_path / f"{name}.pth")
    line = ("merge-stats", "a.pth", "b.pth", "--arch", "net.py:make", "--input-shape", "1,3,8,7", "-o", "out.pth")
    assert "--counts N,N,... is missing" in bnfold_cli(*line, folder=tmp_path).stderr
    done = bnfold_cli(*line, "--counts", "30,10", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    made = torch.load(tmp_path / "out.pth")
    torch.testing.assert_close(made["1.running_mean"], torch.full((4,), 0.25))
    torch.testing.assert_close(made["1.running_var"], torch.full((4,), 1.5 + 0.75 * 0.25**2 + 0.25 * 0.75**2))
    assert torch.equal(made["0.weight"], states[0]["0.weight"])


def test_what_is_merged_is_told_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx_network(), "model.onnx")
    for i in range(2):
        bnfold.measure_part(onnx_network(), [DATA], (i, 2), "part.npz", batch_size=4)
        Path("part.npz").rename(f"part-{i}")
    parts = ["merge-stats", "model.onnx", "part-0", "part-1", "-o", "merged.onnx"]
    assert run([*parts, "--counts", "1,1,1"]) == 2
    assert "--counts is for models" in capsys.readouterr().err
    assert run(["merge-stats", "model.onnx", "part-0", "model.onnx", "-o", "merged.onnx"]) == 2
    assert "part-0 holds measurements, and model.onnx doesn't" in capsys.readouterr().err
    assert run(parts) == 0
