"""Arrays, iterables and functions become the same batches; what doesn't fit is refused with what to do about it."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from arrays import F32, LABELS, TWO, X4, A, X, fed, refused, sizes

from bnfold.data import InputSpec, as_batches, open_data
from bnfold.errors import UsageError

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


@pytest.mark.parametrize("values", [np.ones(20), np.ones((20, 5), int), np.ones((20, 3, 2))])
def test_labels_that_are_no_classes_are_not_used(values):
    data = as_batches({"x": A, "y": values}, X)
    assert data.labels is None
    assert data.notes[0].startswith("the labels aren't used: classes are integers, one for each sample, and these are ")
    assert len(fed(data)) == 20


def test_labels_in_a_column():
    assert as_batches({"x": A, "y": LABELS[:, None]}, X).labels.tolist() == list(range(20))


def test_every_pass_must_give_the_same():
    once = iter([A])
    data = as_batches(lambda: once, X)
    assert sizes(data) == [20]
    refused("there are no samples", lambda: data)
    cuts = iter((A, A[:5]))
    data = as_batches(lambda: next(cuts), X)
    assert sizes(data) == [20]
    refused("this pass gave 5 samples, another 20; every pass must give the same", lambda: data)


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
