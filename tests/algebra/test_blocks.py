"""Arrays in blocks: nothing is left out or met twice, and what is folded, measured and rounded there is what it is of the whole array."""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
import pytest

from bnfold.algebra import blocks, rounding
from bnfold.algebra.affine import Affine
from bnfold.algebra.graph import Param, Tensor
from bnfold.algebra.layouts import AS_STORED, Layout, reciprocal, scaled, swapped

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
TURNED = Layout("turned", lambda w: w.transpose(1, 0, 2, 3), lambda w: w.transpose(1, 0, 2, 3))
LAYOUTS = {
    "as stored": (AS_STORED, (6, 4, 3, 5)),
    "in another shape": (scaled((6, 60), (6, 4, 3, 5)), (6, 60)),
    "turned": (TURNED, (4, 6, 3, 5)),
    "of a transposed convolution": swapped((6, 4, 3, 5), 2)[::-1],
    "half of it": (scaled((6, 60), (6, 4, 3, 5), 0.5), (6, 60)),
    "the negative": (scaled((6, 60), (6, 4, 3, 5), -1.0), (6, 60)),
    "reciprocal": (reciprocal((6, 60), (6, 4, 3, 5)), (6, 60)),
}


@pytest.fixture(autouse=True, params=[1, 50, 1 << 16])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", request.param)


def weight(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    tiny = float(rounding.limits(DTYPES[dtype]).tiny)
    array = rng.normal(size=(6, 4, 3, 5))
    array[rng.random(array.shape) < 0.2] *= 3 * tiny  # some of which fall below the normal range when they are multiplied
    array[0], array[1, 0] = 0, 0
    return array.astype(DTYPES[dtype])


def param(dtype: str, how: str) -> Param:
    array, (layout, shape) = weight(dtype), LAYOUTS[how]
    tensor = Tensor("w", lambda: array.astype(np.float64), array.shape, float(rounding.limits(array.dtype).max), raw=lambda: array)
    return Param(tensor, shape, layout)


def updates(shape: tuple[int, ...]) -> dict[str, Affine | None]:
    rng = np.random.default_rng(4)
    first, last = (shape[0], *(1,) * (len(shape) - 1)), (*(1,) * (len(shape) - 1), shape[-1])
    return {
        "none": None,
        "by channel": Affine.scaling(rng.normal(size=first)),
        "along the last axis": Affine.scaling(rng.normal(size=last)),
        "a number": Affine.scaling(-0.3),
        "hardly anything": Affine.scaling(1e-6 * rng.normal(size=first)),
        "with a shift": Affine(rng.normal(size=first), rng.normal(size=shape)),
    }


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_each_number_is_met_once_with_what_belongs_to_it(axes: tuple[int, ...]) -> None:
    numbers = np.arange(5 * 3 * 8).reshape(5, 3, 8).transpose(axes)
    along = np.arange(numbers.shape[1]).reshape(1, -1, 1)
    met = []
    for part, other in blocks.aligned(numbers, along):
        assert part.size <= max(blocks.BLOCK, 1)
        assert (np.isin(part, np.take(numbers, other.ravel(), 1))).all()
        met += part.ravel().tolist()
    assert met == list(range(numbers.size)), "in the order in which they lie"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [(), (0,), (1, 3)])
def test_extents_are_those_of_numpy(dtype: str, axes: tuple[int, ...]) -> None:
    array = weight(dtype)
    size, others = np.abs(array.astype(np.float64)), tuple({*range(4)} - {*axes})
    found = blocks.extent(array, axes)
    np.testing.assert_array_equal(found.largest, size.max(axis=others, keepdims=True))
    np.testing.assert_array_equal(found.smallest, np.where(size > 0, size, np.inf).min(axis=others, keepdims=True))
    array[2, 1, 0, 0], array[3, 2, 0, 0] = np.inf, np.nan
    assert np.isnan(blocks.extent(array, ()).largest).all()
    assert blocks.extent(array, (0,)).largest[2] == np.inf
    assert blocks.extent(array[:, :0], (0,)).largest.shape == (6, 0, 1, 1)


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_made_in_blocks_is_what_is_made_whole(dtype: str, how: str) -> None:
    counts = []
    for name, update in updates(LAYOUTS[how][1]).items():
        one = param(dtype, how)
        one.update = update
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            exact = one.layout.stored(one.read())
            whole = rounding.rounded(exact, weight(dtype).dtype)
            assert blocks.stored(one, whole.dtype).tobytes() == whole.tobytes(), name
            parts = list(blocks.in_order(one, whole.dtype))
            assert b"".join(part.tobytes() for part in parts) == whole.tobytes(), name
            counts.append(rounding.lost(exact, whole))
            assert blocks.lost(one, whole.dtype) == (counts[-1], whole.size), name
    assert any(counts) or how == "reciprocal"


def test_only_what_is_laid_out_anew_is_read_as_it_is_stored() -> None:
    has = {how: param("float32", how).source() is not None for how in LAYOUTS}
    assert has == dict.fromkeys(LAYOUTS, True) | {"half of it": False, "reciprocal": False}


def test_a_plain_layout_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 50)
    each = partial(blocks.in_order, dtype=np.dtype(np.float32))
    assert [part.size for part in each(param("float32", "as stored"))] == [45, 15] * 6
    assert [part.size for part in each(param("float32", "turned"))] == [360]
