"""Several processes share the batches of one: cut alike, none twice, none lost, and nothing made that another makes."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bnfold.data import InputSpec, as_batches, open_data
from bnfold.data.images import Pipeline
from bnfold.errors import DataError, UsageError

F32 = np.dtype(np.float32)
X = [InputSpec("x", F32, ("n", 3))]
PICTURES = [InputSpec("x", F32, ("n", 3, 8, 8))]
A = np.arange(60, dtype=np.float32).reshape(20, 3)


def batches(data) -> list[tuple[list, list | None]]:
    return [(batch["x"].tolist(), None if labels is None else labels.tolist()) for batch, labels in data.labelled()]


def dealt(data, count: int) -> list:
    """The batches of all shards, in the order of one process."""
    hands = [batches(data.sharded(index, count)) for index in range(count)]
    rounds = list(itertools.chain.from_iterable(itertools.zip_longest(*hands)))
    while rounds and rounds[-1] is None:
        rounds.pop()
    return rounds


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    batch_size=st.none() | st.integers(1, 9),
    fixed=st.none() | st.integers(1, 4),
    limit=st.none() | st.integers(1, 40),
    count=st.integers(1, 6),
    form=st.sampled_from(["array", "list", "function", "samples"]),
    labelled=st.booleans(),
)
def test_the_shards_are_the_whole(sizes, batch_size, fixed, limit, count, form, labelled):
    total = sum(sizes)
    fixed = None if fixed is not None and fixed > min(total, limit or total) else fixed
    array, labels = np.arange(3 * total, dtype=np.float32).reshape(total, 3), np.arange(total)
    ends = np.cumsum(sizes)[:-1]
    parts = list(zip(np.split(array, ends), np.split(labels, ends), strict=True)) if labelled else np.split(array, ends)
    samples = list(zip(array, labels, strict=True)) if labelled else list(array)
    data = {"array": (array, labels) if labelled else array, "list": parts, "function": lambda: iter(parts), "samples": samples}[form]
    inputs = [InputSpec("x", F32, (fixed or "n", 3))]
    whole = as_batches(data, inputs, batch_size=batch_size, samples=limit)
    expected = batches(whole)
    assert dealt(whole, count) == expected
    shard = as_batches(whole, inputs).sharded(count - 1, count)
    assert batches(shard) == expected[count - 1 :: count]
    assert batches(as_batches(data, inputs, batch_size=batch_size, samples=limit).sharded(0, count)) == expected[::count]
    assert shard.samples == whole.samples  # of the whole
    assert shard.notes == whole.notes
    assert shard.labels is None if not labelled else shard.labels.tolist() == whole.labels.tolist()


@settings(max_examples=25, deadline=None)
@given(
    total=st.integers(1, 30),
    batch_size=st.integers(1, 9),
    limit=st.none() | st.integers(1, 40),
    count=st.integers(1, 5),
    bad=st.sets(st.integers(0, 29), max_size=6),
)
def test_shards_of_images_some_of_them_bad(tmp_path_factory, total, batch_size, limit, count, bad):
    folder = tmp_path_factory.mktemp("images")
    for i in range(total):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (i, 0, 0)).save(file, "PNG")
        (folder / f"{i % 3}").mkdir(exist_ok=True)
        (folder / f"{i % 3}" / f"{i:02}.png").write_bytes(file.getvalue()[: 40 if i in bad else None])
    whole = open_data(str(folder), PICTURES, batch_size=batch_size, samples=limit, max_bad="100%")
    try:
        expected = batches(whole)
    except DataError:
        assert len(whole.bad) == min(total, limit or total)  # nothing is left
        return
    shards = [whole.sharded(index, count) for index in range(count)]
    found = [batches(shard) for shard in shards]
    assert sorted(itertools.chain.from_iterable(found)) == sorted(expected)
    assert sorted(b for shard in shards for b in shard.bad) == sorted(whole.bad)
    for part in [expected, *found]:
        for values, labels in part:
            assert len(values) == len(labels) <= batch_size
            assert [round(v[0][0][0] * 255) % 3 for v in values] == [sorted({i % 3 for i in range(total)})[label] for label in labels]


def test_of_others_nothing_is_made(tmp_path, monkeypatch):
    decoded = []
    real = Pipeline.__call__
    monkeypatch.setattr(Pipeline, "__call__", lambda self, path, where=None: decoded.append(path.name) or real(self, path, where))
    for i in range(12):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    data = open_data(str(tmp_path), PICTURES, batch_size=2).sharded(1, 3)
    assert [len(batch["x"]) for batch in data] == [2, 2]
    assert sorted(decoded) == ["02.png", "03.png", "08.png", "09.png"]
    assert data.samples == 12


def test_arrays_of_others_are_not_converted(monkeypatch):
    from bnfold.data import inputs

    seen = []
    real = inputs.convert
    monkeypatch.setattr(inputs, "convert", lambda array, *rest: seen.append(len(array)) or real(array, *rest))
    spoilt = A.astype(np.float64)
    spoilt[3] = np.nan  # another's affair
    data = as_batches(spoilt, X, batch_size=6).sharded(1, 2)
    assert [batch["x"][0, 0] for batch in data] == [18, 54]
    assert seen == [6, 2]


def test_an_empty_shard_is_no_error():
    data = as_batches(A, X, batch_size=20).sharded(1, 2)
    assert list(data) == []
    assert (data.samples, data.shard) == (20, (1, 2))
    assert len(list(open_data("random", X).sharded(1, 2))) == 1
    assert list(open_data("random", X).sharded(2, 3)) == []


def test_random_data_are_shared_out():
    whole = open_data("random", X, samples=40, batch_size=4)
    assert dealt(whole, 3) == batches(whole)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_shards_that_are_none(shard):
    with pytest.raises(UsageError, match=r"the shard is .*; it must be one of 0 to n - 1"):
        as_batches(A, X).sharded(*shard)
    with pytest.raises(UsageError, match="the shard is"):
        as_batches(A, X).sharded(*shard)
