"""Files and functions that aren't quite what they should be."""

from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest

from bnfold.data import InputSpec, as_batches, open_data
from bnfold.errors import DataError, UsageError

X = [InputSpec("x", np.dtype(np.float32), ("batch", 3))]
A = np.arange(60, dtype=np.float32).reshape(20, 3)
LABELS = np.arange(20)


def fed(data) -> np.ndarray:
    return np.concatenate([batch["x"] for batch in data])


def refused(text, call):
    with pytest.raises(DataError, match=re.escape(text)):
        call()


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", "a.pt"])
def test_files_that_are_something_else(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(f"{name}: this is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`", lambda: open_data(str(path), X))
    path.write_bytes(b"\n<!DOCTYPE html><html>404</html>")
    refused(f"{name}: this is a web page, not a {path.suffix} file", lambda: open_data(str(path), X))


def test_cut_files(tmp_path):
    from safetensors.numpy import save_file

    np.save(tmp_path / "a.npy", A)
    np.savez(tmp_path / "a.npz", x=A)
    save_file({"x": A}, tmp_path / "a.safetensors")
    for form in (".npy", ".npz", ".safetensors"):
        path = tmp_path / f"a{form}"
        path.write_bytes(path.read_bytes()[:140])
        refused(f"a{form}: can't be read as {form} (", lambda path=path: open_data(str(path), X))


def test_bfloat16_in_a_safetensors_file(tmp_path):
    data = A[:2].astype(ml_dtypes.bfloat16).tobytes()
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "d.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    np.testing.assert_array_equal(fed(open_data(str(tmp_path / "d.safetensors"), X)), A[:2])


def test_a_suffix_in_capitals(tmp_path):
    with open(tmp_path / "A.NPY", "wb") as file:
        np.save(file, A)
    np.testing.assert_array_equal(fed(open_data(str(tmp_path / "A.NPY"), X)), A)


@pytest.mark.parametrize(
    "body", ["import sys\nsys.exit(0)\n", "def f():\n    raise SystemExit(0)\n", "def f():\n    yield 1\n    exit(0)\n"]
)
def test_a_function_that_exits_is_an_error(tmp_path, body):
    (tmp_path / "f.py").write_text(body)
    with pytest.raises(DataError, match=r"f\.py.*SystemExit"):
        list(open_data(f"{tmp_path / 'f.py'}:f", [InputSpec("x", np.dtype(np.int64), ("n",))]))


def test_labels_of_a_function_are_there_before_the_first_pass(tmp_path):
    (tmp_path / "f.py").write_text(
        "import numpy as np\ndef f():\n    for i in range(3): yield {'x': np.ones((2, 3), 'f'), 'labels': [i, i]}\n"
    )
    assert open_data(f"{tmp_path / 'f.py'}:f", X).labels.tolist() == [0, 0, 1, 1, 2, 2]
    once = as_batches(({"x": A[i : i + 2], "labels": LABELS[i : i + 2]} for i in range(0, 20, 2)), X)
    assert once.labels is None
    assert len(fed(once)) == 20
    assert once.labels.tolist() == list(range(20))


def test_a_negative_seed(tmp_path):
    with pytest.raises(UsageError, match="the seed is -1; it must be 0 or more"):
        open_data("random", X, seed=-1)
