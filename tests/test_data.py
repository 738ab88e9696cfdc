"""Every form of data becomes the same batches; what doesn't fit is refused with what to do about it."""

from __future__ import annotations

import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from bnfold.data import InputSpec, as_batches, open_data
from bnfold.errors import DataError, UsageError

F32 = np.dtype(np.float32)
X = [InputSpec("x", F32, ("batch", 3))]
X4 = [InputSpec("x", F32, (4, 3))]
TWO = [InputSpec("ids", np.dtype(np.int64), ("n", None)), InputSpec("mask", np.dtype(bool), ("n", None))]
A = np.arange(60, dtype=np.float32).reshape(20, 3)
LABELS = np.arange(20)


def fed(data) -> np.ndarray:
    return np.concatenate([batch["x"] for batch in data])


def sizes(data) -> list[int]:
    return [len(batch["x"]) for batch in data]


def refused(text, call):
    with pytest.raises(DataError, match=re.escape(text)):
        for _ in call():
            pass


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
    np.save(tmp_path / "o.npy", np.array([{}, None], object))
    refused("it holds Python objects, which could run code when read", lambda: open_data(str(tmp_path / "o.npy"), X))
    (tmp_path / "c.csv").write_text("1")
    refused("c.csv: bnfold reads no .csv files; give a .npy", lambda: open_data(str(tmp_path / "c.csv"), X))
    refused("nowhere.npy: there is no such file or folder", lambda: open_data("nowhere.npy", X))


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
        "def number():\n    return 3\n"
    )
    for name, cut in (("arrays", [5, 5, 5, 5]), ("pairs", [9, 11]), ("dicts", [20])):
        data = open_data(f"{tmp_path}/load.py:{name}", X)
        assert sizes(data) == sizes(data) == cut
        np.testing.assert_array_equal(fed(data), A)
        assert data.samples == 20
        assert data.labels is None if name == "arrays" else data.labels.tolist() == list(range(20))
    assert sizes(open_data(f"{tmp_path}/load.py:arrays", X, batch_size=6)) == [6, 6, 6, 2]
    refused("load.py:fails raised RuntimeError: no disk", lambda: open_data(f"{tmp_path}/load.py:fails", X))
    refused("load.py:number gave int; it must give an iterable", lambda: open_data(f"{tmp_path}/load.py:number", X))
    refused("has no function 'nope'; it has arrays, pairs", lambda: open_data(f"{tmp_path}/load.py:nope", X))
    refused("there is no file gone.py", lambda: open_data("gone.py:load", X))
    refused("no_such_module can't be imported (ModuleNotFoundError", lambda: open_data("no_such_module:load", X))


@pytest.mark.parametrize("values", [np.ones(20), np.ones((20, 5), int), np.ones((20, 3, 2))])
def test_labels_that_are_no_classes_are_not_used(values):
    data = as_batches({"x": A, "y": values}, X)
    assert data.labels is None
    assert data.notes[0].startswith("the labels aren't used: classes are integers, one for each sample, and these are ")
    assert len(fed(data)) == 20


def test_labels_in_a_column():
    assert as_batches({"x": A, "y": LABELS[:, None]}, X).labels.tolist() == list(range(20))


def test_function_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_own_data.py").write_text("import numpy as np\ndef load(): return np.ones((3, 3), 'float32')\n")
    monkeypatch.chdir(tmp_path)
    assert sizes(open_data("my_own_data:load", X)) == [3]


def test_every_pass_must_give_the_same():
    once = iter([A])
    data = as_batches(lambda: once, X)
    assert sizes(data) == [20]
    refused("there are no samples", lambda: data)
    cuts = iter((A, A[:5]))
    data = as_batches(lambda: next(cuts), X)
    assert sizes(data) == [20]
    refused("this pass gave 5 samples, another 20; every pass must give the same", lambda: data)


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


# Objects


def test_objects():
    forms = [A, {"x": A}, (A,), (A, LABELS), [A[:7], A[7:]], [(A[:7], LABELS[:7]), (A[7:], LABELS[7:])], list(A), lambda: A]
    for form in forms:
        data = as_batches(form, X, batch_size=8)
        assert sizes(data) == sizes(data) == [8, 8, 4]
        np.testing.assert_array_equal(fed(data), A)
        assert data.samples == 20
    assert as_batches((A, LABELS), X).labels.tolist() == LABELS.tolist()
    assert as_batches((A, LABELS), X, samples=6).labels.tolist() == list(range(6))
    assert sizes(as_batches(as_batches(A, X), X, batch_size=20)) == [20]
    assert sizes(as_batches(as_batches(A, X, batch_size=4, samples=6), X)) == [4, 2]


def test_own_batches_are_kept_and_samples_are_gathered():
    assert sizes(as_batches([A[:3], A[3:]], X)) == [3, 17]
    assert sizes(as_batches([A[:3], A[3:]], X, samples=5)) == [3, 2]
    assert sizes(as_batches(list(A), X)) == [8, 8, 4]


def test_a_generator_can_be_read_once():
    data = as_batches((a for a in np.split(A, 4)), X)
    assert sizes(data) == [5, 5, 5, 5]
    refused("can be read only once, and this is a second pass; give a list", lambda: data)


def test_torch_tensors_and_loaders():
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(A).requires_grad_()
    np.testing.assert_array_equal(fed(as_batches(tensor, X)), A)
    np.testing.assert_array_equal(fed(as_batches(tensor.bfloat16(), [InputSpec("x", np.dtype(ml_dtypes.bfloat16), ("n", 3))])), A)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tensor.detach(), torch.from_numpy(LABELS)), batch_size=6)
    data = as_batches(loader, X)
    assert sizes(data) == sizes(data) == [6, 6, 6, 2]
    assert data.labels.tolist() == LABELS.tolist()


def test_two_inputs():
    ids, mask = np.arange(24).reshape(6, 4), np.ones((6, 4), bool)
    for form in ((ids, mask), {"mask": mask, "ids": ids}, [(ids, mask, np.zeros(6))]):
        batches = list(as_batches(form, TWO, batch_size=4))
        assert [b["ids"].shape for b in batches] == [b["mask"].shape for b in batches] == [(4, 4), (2, 4)]
    refused("no array for input 'mask'; it holds 'ids'", lambda: as_batches({"ids": ids}, TWO))
    refused("the numbers of samples differ: 'ids' has 6, 'mask' has 5", lambda: as_batches((ids, mask[:5]), TWO))
    refused("has 1 arrays, and the model has 2 inputs ('ids', 'mask')", lambda: as_batches([ids], TWO))


def test_lengths_that_differ_start_a_new_batch():
    pairs = [(np.ones((2, n), int), np.ones((2, n), bool)) for n in (3, 3, 5, 3)]
    assert [b["ids"].shape for b in as_batches(pairs, TWO, batch_size=4)] == [(4, 3), (2, 5), (2, 3)]


def test_what_holds_no_samples_goes_along():
    inputs = [*X, InputSpec("scale", F32, ()), InputSpec("table", F32, (2,))]
    table = np.array([1, 2], np.float32)
    batches = list(as_batches({"x": A, "scale": np.float32(2), "table": table}, inputs))
    assert [len(b["x"]) for b in batches] == [8, 8, 4]
    assert all(b["scale"].shape == () and b["scale"] == 2 and b["table"].tolist() == [1, 2] for b in batches)


# Batches


def test_a_fixed_batch():
    data = as_batches((A[:18], LABELS[:18]), X4, batch_size=8)
    assert sizes(data) == [4] * 4
    assert data.samples == len(data.labels) == 16
    assert data.notes == [
        "the model takes batches of 4 only, so a batch size of 8 isn't used",
        "the last 2 samples of 18 can't fill a batch of 4, the only size that the model takes: left out",
    ]
    stream = as_batches(list(A[:7]), X4)
    assert sizes(stream) == [4]
    assert stream.samples == 4
    assert stream.notes == ["the last 3 samples of 7 can't fill a batch of 4, the only size that the model takes: left out"]
    refused("3 samples can't fill a batch of 4", lambda: as_batches(A[:3], X4))


def test_a_missing_batch_axis_is_added():
    data = as_batches(A[0], X)
    assert (sizes(data), data.samples) == ([1], 1)
    assert data.notes == ["the ndarray given: one sample without a batch axis; the axis was added"]


def test_too_few_samples_are_noted():
    assert as_batches(A, X, samples=50).notes == ["50 samples are asked for, and the data hold 20"]


@pytest.mark.parametrize("option", ["batch_size", "samples"])
def test_counts_below_one(option):
    with pytest.raises(UsageError, match="is 0; it must be 1 or more"):
        as_batches(A, X, **{option: 0})


# Values


@pytest.mark.parametrize(
    ("given", "takes"),
    [("f8", "f4"), ("f4", "f2"), ("f2", "f8"), (">f4", "f4"), ("i8", "i4"), ("u1", "i8"), ("f4", ml_dtypes.bfloat16), ("?", "?")],
)
def test_types_that_convert(given, takes):
    array = np.array([[0, 1, 1], [1, 0, 1]], given)
    made = fed(as_batches(array, [InputSpec("x", np.dtype(takes), ("n", 3))]))
    assert made.dtype == np.dtype(takes)
    np.testing.assert_array_equal(made.astype(float), array.astype(float))


@pytest.mark.parametrize(
    ("given", "takes", "text"),
    [
        ("u1", "f4", "takes float32, the data are uint8; scale and normalise them as in training, say x.astype('float32') / 255"),
        ("?", "f4", "takes float32, the data are bool"),
        ("f4", "i8", "takes int64, the data are float32; give the integers"),
        ("f4", "u1", "takes uint8, the data are float32; give the integers (pixels, tokens) before any scaling, as uint8"),
        ("c8", "f4", "takes float32, the data are complex64"),
        ("i8", "?", "takes bool, the data are int64"),
        ("U1", "f4", "takes float32, the data are <U1"),
    ],
)
def test_types_that_dont(given, takes, text):
    refused(f"input 'x' {text}", lambda: as_batches(np.ones((2, 3)).astype(given), [InputSpec("x", np.dtype(takes), ("n", 3))]))


def test_values_that_dont_fit():
    for bad in (np.nan, np.inf, -np.inf):
        array = A.copy()
        array[13, 1] = bad
        refused("the ndarray given: input 'x', sample 13, holds NaN or infinity; clean the data", lambda array=array: as_batches(array, X))
    refused("beyond the range of float16", lambda: as_batches(A + 1e6, [InputSpec("x", np.dtype(np.float16), ("n", 3))]))
    refused("int64 values beyond its range", lambda: as_batches(np.full((2, 3), 300), [InputSpec("x", np.dtype(np.uint8), ("n", 3))]))


def test_shapes_that_dont_fit(tmp_path):
    refused("input 'x' takes (batch, 3), the data are (20, 4); reshape or transpose", lambda: as_batches(np.ones((20, 4), F32), X))
    refused("the data are (1, 20, 3)", lambda: as_batches(A[None], X))
    np.save(tmp_path / "a.npy", A.T)
    refused("a.npy: input 'x' takes (batch, 3), the data are (3, 20)", lambda: open_data(str(tmp_path / "a.npy"), X))
    refused("batch 2 of the list given: input 'x' takes", lambda: as_batches([A, A.T], X))


def test_things_that_are_no_data():
    refused("there are no samples; give at least one", lambda: as_batches(A[:0], X))
    refused("there are no samples; give at least one", lambda: as_batches([], X))
    refused("the data are int; give an array", lambda: as_batches(3, X))
    refused("the data are str; give an array", lambda: as_batches("data.npy", X))
    refused("it holds dict, not numbers", lambda: as_batches([[{}]], X))
    refused("some batches have labels and some have none", lambda: as_batches([(A, LABELS), A], X))
    refused("'labels' has 19", lambda: as_batches((A, LABELS[1:]), X))


def test_a_library_user_needs_no_torch():
    code = "import sys, numpy as np; from bnfold.data import *; x = np.ones((2, 3)); list(as_batches(x, [InputSpec('x', x.dtype, (2, 3))]))"
    check = "; assert not {'torch', 'onnx', 'onnx_ir', 'PIL', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code + check], check=True)
