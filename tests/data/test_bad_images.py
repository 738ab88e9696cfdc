"""Images that can't be decoded are left out, counted and listed, up to a limit, and labels stay with their samples."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from opened import score
from PIL import Image

from bnfold import recalibrate
from bnfold.cli import run
from bnfold.data import InputSpec, as_batches, open_data
from bnfold.data.corrupt import Bad, CorruptError
from bnfold.errors import DataError, UsageError

PICTURES = [InputSpec("x", np.dtype(np.float32), ("n", 3, 8, 8))]


def png(shade: int, *, bad: bool = False) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()[:40] if bad else file.getvalue()


def folder_of(path: Path, total: int, bad) -> str:
    """Images of shades 0 to total - 1, in classes of even and odd shades."""
    for name in ("a", "b"):
        (path / name).mkdir(parents=True)
    for i in range(total):
        (path / "ab"[i % 2] / f"{i:03}.png").write_bytes(png(i, bad=i in bad))
    return str(path)


def table_of(path: Path, form: str, total: int, bad) -> str:
    datasets = pytest.importorskip("datasets")
    if form == "tar":
        with tarfile.open(path, "w") as archive:
            for i in range(total):
                for name, content in ((f"{i:03}.png", png(i, bad=i in bad)), (f"{i:03}.cls", str(i % 2).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        return str(path)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = [{"bytes": png(i, bad=i in bad), "path": None} for i in range(total)]
    made = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(total)]}, features=features)
    made.to_parquet(path) if form == "parquet" else made.save_to_disk(path)
    return str(path)


def shades(batch) -> list[int]:
    return [round(float(v) * 255) for v in batch["x"][:, 0, 0, 0]]


def refused(text, call):
    with pytest.raises(DataError, match=text) as caught:
        for _ in call():
            pass
    assert "\n" not in str(caught.value)


def test_one_is_left_out_of_its_batch(tmp_path):
    data = open_data(folder_of(tmp_path / "d", 100, {6, 9}), PICTURES, batch_size=10, max_bad="2%")
    for _ in range(2):
        found = list(data.labelled())
        assert [len(batch["x"]) for batch, _ in found] == [9, *[10] * 4, 9, *[10] * 4]  # the even shades come first
        for batch, labels in found:
            assert [shade % 2 for shade in shades(batch)] == labels.tolist()
        assert shades(found[0][0]) == [0, 2, 4, 8, 10, 12, 14, 16, 18]
        assert shades(found[1][0])[0] == 20
    names = [str(tmp_path / "d" / "a" / "006.png"), str(tmp_path / "d" / "b" / "009.png")]
    assert [sample.where for sample in data.bad] == names
    assert all("the image can't be decoded (" in sample.reason for sample in data.bad)
    assert f"2 images can't be decoded and are left out: {names[0]}, {names[1]}" in data.notes
    assert data.samples == len(data.labels) == 100  # by place, the bad ones among them


@pytest.mark.parametrize("form", ["tar", "parquet", "saved"])
def test_of_tables_too(tmp_path, form):
    path = table_of(tmp_path / f"d.{form}", form, 130, {5, 70})
    data = open_data(path, PICTURES, batch_size=50, max_bad=2)
    for _ in range(2):
        found = list(data.labelled())
        assert [len(batch["x"]) for batch, _ in found] == [49, 49, 30]
        for batch, labels in found:
            assert [shade % 2 for shade in shades(batch)] == labels.tolist()
    called = {"tar": [f"{path}: 005", f"{path}: 070"]}.get(form, [f"{path}, row 5", f"{path}, row 70"])
    assert [sample.where for sample in data.bad] == called
    assert len(data.notes[-1]) < 400
    refused("; 2 of 130 images are bad and --max-bad 1% allows 1: replace or remove them, or allow more", lambda: open_data(path, PICTURES))
    assert len(list(open_data(path, PICTURES, max_bad="1.6%"))) == 17
    assert not open_data(path, PICTURES, max_bad=0, batch_size=64).sharded(1, 2).bad


def test_rows_without_an_image(tmp_path):
    pytest.importorskip("datasets")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": png(1), "path": None}, None, {"bytes": b"", "path": None}, {"bytes": None, "path": "gone.png"}]
    parquet.write_table(
        pa.table({"image": pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))}), tmp_path / "d.parquet"
    )
    data = open_data(str(tmp_path / "d.parquet"), PICTURES, max_bad=3)
    assert [shades(batch) for batch in data] == [[1]]
    assert [(sample.where.rpartition(", ")[2], sample.reason) for sample in data.bad] == [
        (f"row {i}", "there is no image") for i in (1, 2, 3)
    ]


def test_too_many_are_fatal_and_the_error_says_what_to_do(tmp_path):
    ten = folder_of(tmp_path / "ten", 10, {4})
    refused(
        r"004.png: the image can't be decoded \(.*\); 1 of 10 images is bad and --max-bad 1% allows 0: replace or remove it, "
        r"or allow more, say --max-bad 1$",
        lambda: open_data(ten, PICTURES),
    )
    for limit in (1, "1", "10%", " 10 % "):
        assert len(list(open_data(ten, PICTURES, max_bad=limit))) == 2
    for limit in (0, "9.9%", "0%"):
        refused("1 of 10 images is bad", lambda limit=limit: open_data(ten, PICTURES, max_bad=limit))
    hundred = folder_of(tmp_path / "hundred", 100, {4, 50})
    refused("2 of 100 images are bad and --max-bad 1% allows 1", lambda: open_data(hundred, PICTURES))
    data = open_data(hundred, PICTURES, max_bad=1)
    found = []
    refused("050.png", lambda: (found.extend(shades(batch)) for batch in data))
    assert found == [i for i in range(0, 48, 2) if i != 4]  # it comes at its batch


@pytest.mark.parametrize("limit", ["many", "-1", "1.5", "101%", "%", -1])
def test_limits_that_are_none(tmp_path, limit):
    with pytest.raises(UsageError, match=re.escape(f"--max-bad {limit}: give a number of images, or a percentage of them like 1%")):
        open_data(folder_of(tmp_path / "d", 2, set()), PICTURES, max_bad=limit)


def test_how_many_are_allowed():
    assert [Bad("1%").allowed(n) for n in (99, 100, 199, 200)] == [0, 1, 1, 2]
    assert [Bad(3).allowed(n) for n in (1, 1000)] == [3, 3]
    assert Bad("0.1%").allowed(3000) == 3
    assert Bad("29%").allowed(100) == 29


def test_nothing_is_left(tmp_path):
    refused(
        "no batch is left without the images that can't be decoded",
        lambda: open_data(folder_of(tmp_path / "d", 3, {0, 1, 2}), PICTURES, max_bad=9),
    )


def test_a_fixed_batch_is_left_out_whole(tmp_path):
    data = open_data(folder_of(tmp_path / "d", 12, {2}), [InputSpec("x", np.dtype(np.float32), (4, 3, 8, 8))], max_bad=1)
    assert [shades(batch) for batch in data] == [[8, 10, 1, 3], [5, 7, 9, 11]]
    assert "a batch that holds a bad image is left out whole, as the model takes batches of 4 only" in data.notes


def test_other_faults_are_not_skipped(tmp_path):
    path = folder_of(tmp_path / "d", 200, set())
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "d" / "a" / "000.png")
    refused("000.png: the image has more than 8 bits per channel", lambda: open_data(path, PICTURES))


def shade_model() -> onnx.ModelProto:
    """x (n, 3, 8, 8) -> BatchNorm -> (n, 2): which of the first two channels is larger."""
    arrays = {"one": np.ones(3), "zero": np.zeros(3), "axes": np.array([2, 3])}
    nodes = [
        helper.make_node("BatchNormalization", ["x", "one", "zero", "zero", "one"], ["b"], name="bn"),
        helper.make_node("ReduceMean", ["b", "axes"], ["m"], keepdims=0),
        helper.make_node("Gather", ["m", "first"], ["y"], axis=1),
    ]
    inits = [numpy_helper.from_array(a.astype(np.int64 if n == "axes" else np.float32), n) for n, a in arrays.items()]
    graph = helper.make_graph(
        nodes,
        "shade",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [*inits, numpy_helper.from_array(np.array([0, 1]), "first")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_accuracy_takes_labels_with_their_samples(tmp_path):
    """A first image lost would shift all labels by one, and the accuracy from 100% to 0%."""
    with tarfile.open(tmp_path / "d.tar", "w") as archive:
        for i in range(40):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (0, 200, 0) if i % 2 else (200, 0, 0)).save(file, "PNG")
            content = file.getvalue()[: 40 if i in (0, 17) else None]
            for name, value in ((f"{i:03}.png", content), (f"{i:03}.cls", str(i % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))
    pytest.importorskip("datasets")
    data = open_data(str(tmp_path / "d.tar"), PICTURES, max_bad=2)
    model = ir.from_proto(shade_model())
    found = score(model, data).summary()
    assert (found.accuracy, found.samples) == (1.0, 38)
    shards = [score(model, data.sharded(i, 9)) for i in range(9)]
    assert sum(len(s.right) for s in shards if s is not None) == 38
    assert score(model, as_batches(np.ones((4, 3, 8, 8), np.float32), PICTURES)) is None
    assert score(model, as_batches((b for b in data), PICTURES)) is None
    nodes = [helper.make_node("Slice", ["x", "zero", "two"], ["y"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["k", 2])]
    inits = [numpy_helper.from_array(np.array([value]), name) for name, value in (("zero", 0), ("two", 2))]
    graph = helper.make_graph(nodes, "half", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])], outputs, inits)
    half = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    four = as_batches((np.ones((4, 2), np.float32), np.zeros(4, int)), [InputSpec("x", np.dtype(np.float32), ("n", 2))])
    with pytest.raises(DataError, match="a batch has 4 labels, and the output 2 rows"):
        score(half, four)


def test_what_a_step_finds_is_known_to_the_data_given(tmp_path):
    data = open_data(folder_of(tmp_path / "d", 20, {3}), PICTURES, max_bad=1)
    _, report = recalibrate(shade_model(), data)
    assert report.samples == 19
    assert len(data.bad) == 1


def test_the_command_line(tmp_path, capsys):
    onnx.save(shade_model(), tmp_path / "m.onnx")
    path = folder_of(tmp_path / "d", 20, {3})
    line = ["recalibrate", str(tmp_path / "m.onnx"), "--data", path, "-o", str(tmp_path / "out.onnx")]
    assert run(line) == 3
    assert "003.png: the image can't be decoded" in (err := capsys.readouterr().err)
    assert "--max-bad 1% allows 0: replace or remove it, or allow more, say --max-bad 1\n" in err
    assert run([*line, "--max-bad", "1"]) == 0
    assert "bnfold: 1 image can't be decoded and is left out: " in capsys.readouterr().err
    assert run([*line, "--max-bad", "few", "--force"]) == 2
    pytest.importorskip("datasets")
    tar = table_of(tmp_path / "d.tar", "tar", 20, {3})
    line[3] = tar
    assert run([*line, "--max-bad", "5%", "--column", "png", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 19
    assert run([*line, "--column", "jpg", "--force"]) == 3
    assert "no column 'jpg'" in capsys.readouterr().err


def test_what_another_pass_found_isnt_counted_against_a_shorter_one() -> None:
    """Bad ones among the last, known from a whole pass, when the first ones alone are read."""
    bad, shard = Bad("5%"), Bad("5%")
    bad.add(35, CorruptError("35.png", "no image"), 40)
    bad.add(36, CorruptError("36.png", "no image"), 40)
    bad.know([shard], 16)
    shard.add(19, CorruptError("19.png", "no image"), 20)
    with pytest.raises(DataError, match=r"19.png: no image; 1 of 16 images is bad"):
        bad.know([shard], 16)
    assert [sample.where for sample in bad.samples] == ["19.png", "35.png", "36.png"]
