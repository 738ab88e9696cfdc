"""Tar shards, Parquet files and folders of save_to_disk: the same samples as the folder of images or the arrays that they were made of."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tabular import F32, LABELS, PICTURES, ROWS, A, add, datasets, described, images, pa, parquet, png, refused, shades, tar, write

from bnfold.data import InputSpec, open_data


@pytest.fixture(params=["tar", "tars", "braces", "stars", "parquet", "parquets", "foreign", "saved", "splits"])
def twelve(request, tmp_path) -> str:
    """Twelve images of shades and classes 0 to 11, in every form."""
    form, folder = request.param, tmp_path / "a [1] *{b}" / ".hidden"  # what a pattern could take for its own
    folder.mkdir(parents=True)
    if form == "tar":
        return str(tar(folder / "all.tar", 0, 12))
    if form in ("tars", "braces", "stars"):
        where = folder if form == "tars" else tmp_path
        for number in range(3):
            tar(where / f"train-{number:03}.tar", 4 * number, 4 * number + 4)
        return str(folder) if form == "tars" else str(tmp_path / ("train-{000..002}.tar" if form == "braces" else "train-*.tar"))
    if form == "parquet":
        images(0, 12).to_parquet(folder / "all.parquet")
        return str(folder / "all.parquet")
    if form == "parquets":
        for number in range(2):
            images(6 * number, 6 * number + 6).to_parquet(folder / f"train-{number:05}-of-00002.parquet")
        return str(folder)
    if form == "foreign":  # as others than `datasets` write them
        return write(folder / "f.parquet", jpg=map(png, range(12)), target=LABELS[:12], caption=["a picture"] * 12)
    if form == "splits":
        datasets.DatasetDict(train=images(0, 12)).save_to_disk(folder / "all")
    else:
        images(0, 12).save_to_disk(folder / "all")
    return str(folder / "all")


def test_images(twelve):
    data = open_data(twelve, PICTURES, batch_size=5)
    for _ in range(2):
        found = list(data.labelled())
        assert [len(batch["x"]) for batch, _ in found] == [5, 5, 2]
        assert np.concatenate([labels for _, labels in found]).tolist() == list(range(12))
        assert shades(data) == list(range(12))
    assert data.samples == 12
    assert data.labels.tolist() == list(range(12))
    assert open_data(twelve, PICTURES).labels.tolist() == list(range(12))
    assert "crop" in data.description
    fixed = open_data(twelve, [InputSpec("x", F32, (5, 3, 16, 16))])
    assert [len(batch["x"]) for batch in fixed] == [5, 5]
    assert "the last 2 samples of 12 can't fill a batch of 5" in " ".join(fixed.notes)


def test_images_of_a_shard_and_some_images(twelve):
    data = open_data(twelve, PICTURES, batch_size=5)
    assert [shades(data.sharded(i, 2)) for i in range(2)] == [[0, 1, 2, 3, 4, 10, 11], [5, 6, 7, 8, 9]]
    some = open_data(twelve, PICTURES, samples=5)
    assert len(set(shades(some))) == some.samples == 5
    for batch, labels in some.labelled():
        assert shades([batch]) == labels.tolist()
    if not (Path(twelve) / "state.json").exists() and not (Path(twelve) / "dataset_dict.json").exists():
        assert shades(some) == [0, 1, 2, 3, 4]
        assert "the first 5 samples are taken, in the order of the files" in " ".join(some.notes)
    else:
        assert shades(some) == shades(open_data(twelve, PICTURES, samples=5)) != shades(open_data(twelve, PICTURES, samples=5, seed=1))


def test_options_of_images(tmp_path):
    from bnfold.data.images import ImageOptions

    path = str(tar(tmp_path / "a.tar", 0, 3, png=png(7, (40, 60))))
    (tmp_path / "a.png").write_bytes(png(7, (40, 60)))
    options = ImageOptions(resize=20, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(7, (40, 60)))
    (expected,) = open_data(str(folder), PICTURES, images=options)
    (batch,) = open_data(path, PICTURES, images=options)
    assert (batch["x"] == expected["x"]).all()
    open_axes = [InputSpec("x", F32, ("n", 3, "h", "w"))]
    (shaped,) = open_data(path, open_axes, input_shapes={"x": (1, 3, 24, 24)})
    assert shaped["x"].shape == (3, 3, 24, 24)
    refused(
        "a.tar: 000: the image is 60x40 and the model takes 16x16",
        lambda: open_data(path, PICTURES, images=ImageOptions(resize=0, crop=False)),
    )


# Arrays


def test_arrays(tmp_path):
    made = write(tmp_path / "a.parquet", x=A, labels=LABELS)
    fixed = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(A.ravel()), 3), "y": LABELS})
    parquet.write_table(fixed, tmp_path / "b.parquet")
    features = datasets.Features({"x": datasets.Array2D((3, 1), "float32"), "cls": datasets.Value("int64")})
    datasets.Dataset.from_dict({"x": A[:, :, None], "cls": LABELS}, features=features).save_to_disk(tmp_path / "c")
    for path, inputs in ((made, ROWS), (tmp_path / "b.parquet", ROWS), (tmp_path / "c", [InputSpec("x", F32, ("n", 3, 1))])):
        data = open_data(str(path), inputs)
        assert [len(batch["x"]) for batch in data] == [8, 8, 4]
        np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in data]).reshape(20, 3), A)
        assert data.labels.tolist() == list(range(20))
    other = open_data(made, [InputSpec("input", F32, ("n", 3))])  # the only column of arrays, by another name
    np.testing.assert_array_equal(np.concatenate([batch["input"] for batch in other]), A)


def test_arrays_in_a_tar(tmp_path):
    file = io.BytesIO()
    np.save(file, A[:2])
    path = str(tar(tmp_path / "a.tar", 0, 3, **{"x.npy": file.getvalue()}))
    data = open_data(path, [InputSpec("x", F32, ("n", 2, 3))])
    assert [batch["x"].tolist() for batch in data] == [[A[:2].tolist()] * 3]
    assert data.labels.tolist() == [0, 1, 2]


def test_more_than_one_input(tmp_path):
    ids, mask = np.arange(24).reshape(6, 4), np.ones((6, 4), bool)
    two = [InputSpec("ids", np.dtype(np.int64), ("n", None)), InputSpec("mask", np.dtype(bool), ("n", None))]
    path = write(tmp_path / "a.parquet", mask=mask, ids=ids, note=["a"] * 6)
    batches = list(open_data(path, two, batch_size=4))
    np.testing.assert_array_equal(np.concatenate([b["ids"] for b in batches]), ids)
    assert all(b["mask"].dtype == bool for b in batches)
    ragged = write(tmp_path / "b.parquet", ids=[[1, 2], [3, 4], [5]], mask=[[True] * 2] * 2 + [[True]], label=[0, 1, 2])
    data = open_data(ragged, two)
    assert [b["ids"].tolist() for b in data] == [[[1, 2], [3, 4]], [[5]]]
    assert data.labels.tolist() == [0, 1, 2]
    refused("no column for input 'mask'; it has 'ids' (list of int64)", lambda: open_data(write(tmp_path / "c.parquet", ids=ids), two))
    refused("--column ids: that is for a model with one input", lambda: open_data(path, two, column="ids"))


def test_a_column_by_name(tmp_path):
    path = write(tmp_path / "a.parquet", left=map(png, range(3)), right=map(png, range(3, 6)), label=[0, 1, 2])
    refused("columns 'left', 'right' could all be input 'x'; name one: --column left", lambda: open_data(path, PICTURES))
    assert shades(open_data(path, PICTURES, column="right")) == [3, 4, 5]
    refused(
        "no column 'up' that holds images or numbers; it has 'left' (image), 'right' (image)",
        lambda: open_data(path, PICTURES, column="up"),
    )
    np.save(tmp_path / "a.npy", A)
    assert "a.npy: this is no table, so --column x isn't used" in open_data(str(tmp_path / "a.npy"), ROWS, column="x").notes[0]


def test_labels(tmp_path):
    path = write(tmp_path / "a.parquet", x=A, coarse_label=LABELS // 2, fine_label=LABELS)
    data = open_data(path, ROWS)
    assert data.labels.tolist() == list(range(20))
    assert data.notes == ["the labels are those of column 'fine_label', not of 'coarse_label'"]
    words = open_data(write(tmp_path / "b.parquet", x=A, label=["cat"] * 20), ROWS)
    assert words.labels is None
    assert words.notes == ["the labels aren't used: classes are integers, and column 'label' holds string"]
    assert open_data(write(tmp_path / "c.parquet", x=A), ROWS).labels is None
    some = write(tmp_path / "d.parquet", x=A, label=[None, *range(1, 20)])
    refused("some rows have no label in column 'label'", lambda: open_data(some, ROWS))


@pytest.mark.parametrize("key", ["label", "cls", "class", "class_id"])
def test_labels_in_the_json_of_a_tar(tmp_path, key):
    """Whatever else these files hold, and however often that changes."""
    for number, size in enumerate((70, 3, 30)):
        documents = [{key: 100 * number + i, "width": i, **({"note": "late"} if i > 20 else {}), "text": None} for i in range(size)]
        described(tmp_path / f"{number}.tar", *documents)
    expected = [*range(70), *range(100, 103), *range(200, 230)]
    data = open_data(str(tmp_path / "{0..2}.tar"), PICTURES, batch_size=16)
    for _ in range(2):
        found = list(data.labelled())
        assert np.concatenate([labels for _, labels in found]).tolist() == expected
        for batch, labels in found:
            assert shades([batch]) == [label % 100 % 25 for label in labels]
    assert data.labels.tolist() == open_data(str(tmp_path), PICTURES).labels.tolist() == expected
    assert [labels.tolist() for _, labels in data.sharded(1, 5).labelled()] == [expected[16:32], expected[96:]]
    assert not [note for note in data.notes if "labels" in note]


def test_which_labels_of_a_tar(tmp_path):
    both = open_data(str(tar(tmp_path / "a.tar", 0, 3, json=b'{"class_id": 7, "label": 8}')), PICTURES)
    assert both.labels.tolist() == [0, 1, 2]
    assert "the labels are those of column 'cls', not of 'json.label', 'json.class_id'" in both.notes
    number = open_data(described(tmp_path / "b.tar", *({"class": "ant", "class_id": i} for i in range(3))), PICTURES)
    assert number.labels.tolist() == [0, 1, 2]
    for kind, value in {"string": "ant", "float64": 1.5, "bool": True, "list of int64": [1], "null": None}.items():
        words = open_data(described(tmp_path / "c.tar", *[{"label": value}] * 3), PICTURES)
        assert words.labels is None
        assert f"the labels aren't used: classes are integers, and column 'json.label' holds {kind}" in words.notes
    for document in ({"caption": "an ant"}, {}, [3], 3):
        assert open_data(described(tmp_path / "d.tar", *[document] * 3), PICTURES).labels is None


def test_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (8, 9, 10):
        tar(Path(f"s-{number:02}.tar"), number, number + 1)
    assert shades(open_data("s-{08..10}.tar", PICTURES)) == [8, 9, 10]
    assert shades(open_data("s-{10,08}.tar", PICTURES)) == [10, 8]
    assert shades(open_data("s-{0?,10}.tar", PICTURES)) == [8, 9, 10]
    assert shades(open_data(".", PICTURES)) == [8, 9, 10]
    refused("s-{08..11}.tar: there is no file s-11.tar", lambda: open_data("s-{08..11}.tar", PICTURES))
    refused("t-*.tar: there is no such file", lambda: open_data("t-*.tar", PICTURES))
    refused("t.parquet: there is no such file", lambda: open_data("t.parquet", PICTURES))


def test_no_network_is_asked_for_and_nothing_is_left(tmp_path):
    """In a process of its own, where a call for any address ends it; the library that wrote a data set isn't imported to read it."""
    tar(tmp_path / "a.tar", 0, 3)
    images(0, 3).to_parquet(tmp_path / "a.parquet")
    images(0, 3).save_to_disk(tmp_path / "saved")
    home = tmp_path / "home"
    code = f"""
import os, socket, numpy as np
def stop(*a, **k): os._exit(9)
socket.getaddrinfo = socket.socket.connect = socket.create_connection = stop
from bnfold.data import InputSpec, open_data
for name in ("a.tar", "a.parquet", "saved"):
    data = open_data({str(tmp_path)!r} + "/" + name, [InputSpec("x", np.dtype("float32"), ("n", 3, 16, 16))])
    assert sum(len(b["x"]) for b in data) == 3
import sys
assert not {{"datasets", "huggingface_hub"}} & sys.modules.keys()
"""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", code], env={**variables, "HF_HOME": str(home)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not [p for p in home.rglob("*") if p.is_file()]


def test_files_in_a_tar_that_are_packed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(3):
            add(archive, f"{i}.png.gz", gzip.compress(png(i)))
            add(archive, f"{i}.cls.xz", lzma.compress(b"%d" % i))
            add(archive, f"{i}.wav", b"RIFF")  # no image
    data = open_data(str(path), PICTURES)
    assert shades(data) == [0, 1, 2]


def test_types_of_later_files_are_those_of_the_first(tmp_path):
    write(tmp_path / "a.parquet", x=A, label=LABELS)
    doubles = pa.table({"label": pa.array(LABELS, pa.int16()), "x": pa.array(A.astype(float).tolist(), pa.list_(pa.float64()))})
    parquet.write_table(doubles, tmp_path / "b.parquet")
    found = list(open_data(str(tmp_path), ROWS, batch_size=20).labelled())
    assert [labels.tolist() for _, labels in found] == [LABELS.tolist()] * 2
    assert all((batch["x"] == A).all() for batch, _ in found)


def test_a_large_file_is_read_in_parts(tmp_path):
    """The rows of one group are streamed: no more of the file's 60 MiB lies in memory than a part of it."""
    wide = np.random.default_rng(0).standard_normal((5000, 3072)).astype(np.float32)
    parquet.write_table(pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(wide.ravel()), 3072)}), tmp_path / "a.parquet")
    code = f"""
import numpy as np, pyarrow
from bnfold.data import InputSpec, open_data
data = open_data({str(tmp_path / "a.parquet")!r}, [InputSpec("x", np.dtype("float32"), ("n", 3072))])
assert sum(len(batch["x"]) for batch in data) == 5000
assert pyarrow.default_memory_pool().max_memory() < 20 << 20, pyarrow.default_memory_pool().max_memory()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
