"""Files, folders and functions become the same batches as the arrays in them, or are refused; random data depend on the seed alone."""

from __future__ import annotations

import json
import re
import sys

import ml_dtypes
import numpy as np
import pytest
from arrays import F32, LABELS, A, X, fed, refused, sizes

from bnfold.data import InputSpec, as_batches, open_data
from bnfold.errors import DataError, UsageError


def refused_soon(text, call):
    with pytest.raises(DataError, match=re.escape(text)):
        call()


# Files


def saved(tmp_path, form):
    path = tmp_path / f"data{form}"
    if form == ".npy":
        np.save(path, A)
    elif form == ".npz":
        np.savez(path, x=A, labels=LABELS)
    elif form == ".safetensors":
        from safetensors.numpy import save_file

        save_file({"x": A, "labels": LABELS}, path)
    else:
        torch = pytest.importorskip("torch")
        torch.save({"x": torch.from_numpy(A), "labels": torch.from_numpy(LABELS)}, path)
    return str(path)


@pytest.mark.parametrize("form", [".npy", ".npz", ".safetensors", ".pt"])
def test_files(tmp_path, form):
    data = open_data(saved(tmp_path, form), X)
    assert data.samples == 20
    assert sizes(data) == sizes(data) == [8, 8, 4]
    np.testing.assert_array_equal(fed(data), A)
    if form != ".npy":
        np.testing.assert_array_equal(data.labels, LABELS)
    few = open_data(saved(tmp_path, form), X, batch_size=5, samples=7)
    assert (few.samples, sizes(few)) == (7, [5, 2])
    assert few.labels is None if form == ".npy" else few.labels.tolist() == list(range(7))


def test_batches_of_a_npy_file_stay_on_disk(tmp_path):
    batch = next(iter(open_data(saved(tmp_path, ".npy"), X)))["x"]
    base = batch
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


@pytest.mark.parametrize("key", ["labels", "label", "y", "target", "targets"])
def test_names_of_labels(tmp_path, key):
    np.savez(tmp_path / "d.npz", **{"pictures": A, key: LABELS})
    data = open_data(str(tmp_path / "d.npz"), X)
    np.testing.assert_array_equal(data.labels, LABELS)
    np.testing.assert_array_equal(fed(data), A)


def test_an_input_called_y_is_no_label(tmp_path):
    np.savez(tmp_path / "d.npz", y=A)
    data = open_data(str(tmp_path / "d.npz"), [InputSpec("y", F32, ("n", 3))])
    assert data.labels is None
    assert data.samples == 20


def test_unused_arrays_are_noted(tmp_path):
    np.savez(tmp_path / "d.npz", x=A, weights=LABELS)
    assert "'weights' isn't used: no input has that name" in open_data(str(tmp_path / "d.npz"), X).notes[0]


def test_folder_of_samples_and_batches(tmp_path):
    np.save(tmp_path / "a.npy", A[0])
    np.save(tmp_path / "b.npy", A[1:12])
    np.save(tmp_path / "c.npy", A[12])
    data = open_data(str(tmp_path), X)
    assert sizes(data) == [8, 5]
    np.testing.assert_array_equal(fed(data), A[:13])
    assert data.samples == 13
    assert data.notes == []


def test_unreadable_files(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"")
    refused("a.npy: the file is empty", lambda: open_data(str(tmp_path / "a.npy"), X))
    for name in ("b.npy", "b.npz", "b.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        refused(f"{name}: can't be read as .{name[2:]}", lambda name=name: open_data(str(tmp_path / name), X))
    for head in (
        b"((",
        b"  x\n y",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        b"{'descr': '<f4', 'shape': (1%s,)}" % (b"0" * 30),
    ):
        (tmp_path / "d.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(64))
        refused("d.npy: can't be read as .npy (", lambda: open_data(str(tmp_path / "d.npy"), X))
    np.save(tmp_path / "o.npy", np.array([{}, None], object))
    refused("it holds Python objects, which could run code when read", lambda: open_data(str(tmp_path / "o.npy"), X))
    (tmp_path / "c.csv").write_text("1")
    refused("c.csv: bnfold reads no .csv files; give a .npy", lambda: open_data(str(tmp_path / "c.csv"), X))
    refused("nowhere.npy: there is no such file or folder", lambda: open_data("nowhere.npy", X))
    refused("https://a.b/c.npy: an address, not a file; download it", lambda: open_data("https://a.b/c.npy", X))
    (tmp_path / "gen.py").touch()
    refused("gen.py:FUNCTION", lambda: open_data(str(tmp_path / "gen.py"), X))


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Evil(), tmp_path / "e.pt")
    refused("it holds Python objects, which could run code when read", lambda: open_data(str(tmp_path / "e.pt"), X))
    assert not (tmp_path / "ran").exists()


def test_a_torch_file_without_torch(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused("reading it needs PyTorch, which isn't installed", lambda: open_data(str(tmp_path / "a.pt"), X))


# Functions


def test_function_of_a_file(tmp_path):
    (tmp_path / "beside.py").write_text("import numpy as np\nA = np.arange(60, dtype='float32').reshape(20, 3)\n")
    (tmp_path / "load.py").write_text(
        "from beside import A\n"
        "def arrays():\n    for i in range(0, 20, 5): yield A[i:i + 5]\n"
        "def pairs():\n    return [(A[:9], range(9)), (A[9:], range(9, 20))]\n"
        "def dicts():\n    yield {'x': A, 'labels': list(range(20))}\n"
        "def fails():\n    yield A\n    raise RuntimeError('no disk')\n"
        "class Set:\n    __len__ = lambda self: 20\n    def __getitem__(self, i):\n"
        "        if i == 7: raise OSError('disk gone')\n        return A[i]\n"
        "def worker():\n    from torch.utils.data import DataLoader\n    return DataLoader(Set(), batch_size=5, num_workers=1)\n"
        "def number():\n    return 3\n"
    )
    for name, cut in (("arrays", [5, 5, 5, 5]), ("pairs", [9, 11]), ("dicts", [20])):
        data = open_data(f"{tmp_path}/load.py:{name}", X)
        assert sizes(data) == sizes(data) == cut
        np.testing.assert_array_equal(fed(data), A)
        assert data.samples == 20
        assert data.labels is None if name == "arrays" else data.labels.tolist() == list(range(20))
    assert sizes(open_data(f"{tmp_path}/load.py:arrays", X, batch_size=6)) == [6, 6, 6, 2]
    refused("load.py:fails raised RuntimeError instead of its batch 2: no disk", lambda: open_data(f"{tmp_path}/load.py:fails", X))
    refused("load.py:worker raised OSError instead of its batch 2: disk gone; see", lambda: open_data(f"{tmp_path}/load.py:worker", X))
    refused("load.py:number gave int; it must give an iterable", lambda: open_data(f"{tmp_path}/load.py:number", X))
    refused("has no function 'nope'; it has arrays, pairs", lambda: open_data(f"{tmp_path}/load.py:nope", X))
    refused("there is no file gone.py", lambda: open_data("gone.py:load", X))
    refused("no_such_module can't be imported (ModuleNotFoundError", lambda: open_data("no_such_module:load", X))


def test_function_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_own_data.py").write_text("import numpy as np\ndef load(): return np.ones((3, 3), 'float32')\n")
    monkeypatch.chdir(tmp_path)
    assert sizes(open_data("my_own_data:load", X)) == [3]


# Random data


def test_random():
    inputs = [InputSpec("x", F32, ("n", 3, None)), InputSpec("t", np.dtype(np.int64), ("n",)), InputSpec("m", np.dtype(bool), ("n", 2))]
    data = open_data("random", inputs, samples=11, batch_size=4)
    first, again = list(data), list(data)
    assert [len(b["x"]) for b in first] == [4, 4, 3]
    assert all((a[k] == b[k]).all() for a, b in zip(first, again, strict=True) for k in a)
    assert not np.array_equal(first[0]["x"], first[1]["x"])
    assert "input 'x' has dynamic axes; 4x3x16 is taken (--input-shape x=... gives another)" in data.notes
    other = open_data("random", inputs, samples=11, batch_size=4, seed=1)
    assert not np.array_equal(next(iter(other))["x"], first[0]["x"])
    given = open_data("random", inputs, input_shapes={"x": (2, 3, 5)})
    assert next(iter(given))["x"].shape == (2, 3, 5)
    assert next(iter(given))["t"].shape == (2,)
    assert given.notes == []


# Files and functions that aren't quite what they should be


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", "a.pt"])
def test_files_that_are_something_else(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused_soon(f"{name}: this is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`", lambda: open_data(str(path), X))
    path.write_bytes(b"\n<!DOCTYPE html><html>404</html>")
    refused_soon(f"{name}: this is a web page, not a {path.suffix} file", lambda: open_data(str(path), X))


def test_cut_files(tmp_path):
    from safetensors.numpy import save_file

    np.save(tmp_path / "a.npy", A)
    np.savez(tmp_path / "a.npz", x=A)
    save_file({"x": A}, tmp_path / "a.safetensors")
    for form in (".npy", ".npz", ".safetensors"):
        path = tmp_path / f"a{form}"
        path.write_bytes(path.read_bytes()[:140])
        refused_soon(f"a{form}: can't be read as {form} (", lambda path=path: open_data(str(path), X))


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
