"""Tables that don't fit, are damaged or hold something else are refused in one line."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tabular import F32, PICTURES, ROWS, A, add, datasets, described, images, pa, parquet, png, refused, shades, tar, write

from bnfold.data import InputSpec, open_data
from bnfold.errors import UnsupportedError


def test_columns_that_dont_fit(tmp_path):
    refused("no column for input 'x'; it has 'text' (string)", lambda: open_data(write(tmp_path / "a.parquet", text=["a"]), ROWS))
    refused("input 'x' takes (n, 3), the data are (20, 2)", lambda: open_data(write(tmp_path / "b.parquet", x=A[:, :2]), ROWS))
    refused("some rows hold nothing", lambda: open_data(write(tmp_path / "c.parquet", x=[[1.0, 2, 3], None]), ROWS))
    refused("the lists in a row are of different lengths", lambda: open_data(write(tmp_path / "d.parquet", x=[[[1.0], [1.0, 2.0]]]), ROWS))
    refused("which isn't images", lambda: open_data(write(tmp_path / "e.parquet", x=[png(0)]), ROWS))
    two = [*PICTURES, InputSpec("z", F32, ("n", 3))]
    refused("images serve a model with one input", lambda: open_data(write(tmp_path / "f.parquet", x=[png(0)], z=A[:1]), two))
    refused("takes float32, the data are int64", lambda: open_data(write(tmp_path / "g.parquet", x=A.astype(int)), ROWS))
    bad = A.copy()
    bad[13, 1] = np.nan
    refused("input 'x', sample 13, holds NaN", lambda: open_data(write(tmp_path / "h.parquet", x=bad), ROWS))


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_files_that_are_something_else(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    refused(f"{name}: the file is empty", lambda: open_data(str(path), PICTURES))
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused("this is a Git LFS pointer", lambda: open_data(str(path), PICTURES))
    path.write_bytes(b"<html>404</html>")
    refused("this is a web page", lambda: open_data(str(path), PICTURES))
    path.write_bytes(b"PAR1" + b"nothing of the kind" * 100)
    refused(f"{name}: can't be read", lambda: open_data(str(path), PICTURES))


def test_no_samples(tmp_path):
    tarfile.open(tmp_path / "a.tar", "w").close()
    refused("there are no samples; give at least one", lambda: open_data(str(tmp_path / "a.tar"), PICTURES))
    parquet.write_table(pa.table({"x": pa.array([], pa.list_(pa.float32()))}), tmp_path / "a.parquet")
    refused("there are no samples; give at least one", lambda: open_data(str(tmp_path / "a.parquet"), ROWS))
    images(0, 0).save_to_disk(tmp_path / "saved")
    refused("there are no samples; give at least one", lambda: open_data(str(tmp_path / "saved"), PICTURES))
    tar(tmp_path / "b.tar", 0, 3)
    assert shades(open_data(str(tmp_path / "[ab].tar"), PICTURES)) == [0, 1, 2]


@pytest.mark.parametrize("cut", [200, 1536, 2048, 2500, 4096, 5632])
def test_a_tar_that_is_cut_off(tmp_path, cut):
    whole = tar(tmp_path / "a.tar", 0, 6).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:cut])
    refused("b.tar: ", lambda: open_data(str(tmp_path / "b.tar"), PICTURES))
    refused("b.tar: ", lambda: open_data(str(tmp_path / "?.tar"), PICTURES))


def test_a_tar_with_a_damaged_header(tmp_path):
    whole = bytearray(tar(tmp_path / "a.tar", 0, 6).read_bytes())
    whole[2 * 2048 + 100] ^= 0x55
    (tmp_path / "a.tar").write_bytes(whole)
    refused("a.tar: the archive is damaged behind 2 samples; fetch or make it again", lambda: open_data(str(tmp_path / "a.tar"), PICTURES))


def test_a_tar_whose_samples_differ(tmp_path):
    with tarfile.open(tar(tmp_path / "a.tar", 0, 3), "a") as archive:
        add(archive, "zz.jpg", png(0))
    refused("a.tar: can't be read (", lambda: open_data(str(tmp_path / "a.tar"), PICTURES))
    refused(
        "can't be read (ValueError: invalid literal for int()", lambda: open_data(str(tar(tmp_path / "b.tar", 0, 3, cls=b"ant")), PICTURES)
    )


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ({"label": "ant"}, "'label' in its .json file is 'ant'"),
        ({"label": 2.5}, "'label' in its .json file is 2.5"),
        ({"label": True}, "'label' in its .json file is True"),
        ({"label": 2**64}, "'label' in its .json file is 18446744073709551616"),
        ({"label": [3] * 99}, "'label' in its .json file is [3, 3, "),
        ({"label": None}, "there is no 'label' in its .json file"),
        ({}, "there is no 'label' in its .json file"),
        ([3], "there is no 'label' in its .json file"),
    ],
)
def test_a_class_in_the_json_of_a_tar_that_is_no_integer(tmp_path, document, what):
    path = described(tmp_path / "a.tar", *({"label": i} for i in range(66)), document)
    refused(f"a.tar: 066: {what}", lambda: open_data(path, PICTURES))
    refused("classes are integers: give every sample one, or leave that key out of all", lambda: open_data(path, PICTURES))
    assert open_data(path, PICTURES, samples=60).labels.tolist() == list(range(60))  # it isn't read


def test_a_parquet_file_that_is_damaged(tmp_path):
    rng = np.random.default_rng(0)
    path = Path(write(tmp_path / "a.parquet", x=rng.standard_normal((5000, 3)).astype("f")))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("a.parquet: can't be read (Arrow", lambda: open_data(str(path), ROWS))
    path.write_bytes(whole[:4] + b"\xff" * 400 + whole[404:])
    refused("a.parquet: can't be read (", lambda: open_data(str(path), ROWS))


def test_parquet_files_whose_columns_differ(tmp_path):
    write(tmp_path / "a.parquet", x=A)
    write(tmp_path / "b.parquet", z=A)
    refused("can't be read (", lambda: open_data(str(tmp_path), ROWS))


def test_folders_of_several_kinds_and_splits(tmp_path):
    tar(tmp_path / "train-0.tar", 0, 2)
    tar(tmp_path / "test-0.tar", 2, 4)
    refused("its files are of several splits (test, train); name those of one, say", lambda: open_data(str(tmp_path), PICTURES))
    assert shades(open_data(str(tmp_path / "test*.tar"), PICTURES)) == [2, 3]
    write(tmp_path / "a.parquet", x=A)
    refused("it holds .parquet and .tar files; name those of one kind", lambda: open_data(str(tmp_path), PICTURES))
    (tmp_path / "a.png").write_bytes(png(9))
    assert shades(open_data(str(tmp_path), PICTURES)) == [9]  # a folder of images, with archives beside them
    datasets.DatasetDict(train=images(0, 3), test=images(3, 5)).save_to_disk(tmp_path / "saved")
    refused("it holds the splits test, train; name one, say", lambda: open_data(str(tmp_path / "saved"), PICTURES))
    assert shades(open_data(str(tmp_path / "saved" / "test"), PICTURES)) == [3, 4]
    next((tmp_path / "saved" / "test").glob("*.arrow")).unlink()
    refused("test: can't be read (FileNotFoundError", lambda: open_data(str(tmp_path / "saved" / "test"), PICTURES))


def test_a_saved_data_set_whose_lists_end_behind_its_file(tmp_path):
    """A file that is mapped into memory is looked at before it is believed."""
    datasets.Dataset.from_dict({"x": A.tolist()}).save_to_disk(tmp_path / "d")
    (path,) = (tmp_path / "d").glob("*.arrow")
    ends = np.arange(0, 63, 3, dtype=np.int32)
    whole, spoilt = path.read_bytes(), ends.copy()
    assert whole.count(ends.tobytes()) == 1
    spoilt[-1] = 1 << 30
    path.write_bytes(whole.replace(ends.tobytes(), spoilt.tobytes()))
    refused("d: can't be read (ArrowInvalid", lambda: open_data(str(tmp_path / "d"), ROWS))


def test_whole_numbers_that_are_too_large(tmp_path):
    path = str(tar(tmp_path / "a.tar", 0, 3, cls=str(2**70).encode()))
    refused("a.tar, from row 0: some rows hold no numbers, or larger ones than 64 bits can", lambda: open_data(path, PICTURES))


def test_a_missing_library(tmp_path, monkeypatch):
    tar(tmp_path / "a.tar", 0, 2)
    write(tmp_path / "a.parquet", x=A)
    images(0, 3).save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "saved"):
        with pytest.raises(UnsupportedError, match=f"{name}: reading it needs the pyarrow library, which isn't installed"):
            open_data(str(tmp_path / name), PICTURES)
    assert shades(open_data(str(tmp_path / "a.tar"), PICTURES)) == [0, 1]
