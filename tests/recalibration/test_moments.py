"""Moments against numpy's float64 on the whole array at once."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from arrays import measure

from bnfold.recalibration import moments
from bnfold.recalibration.moments import Moments, pool


def whole(x: np.ndarray, axis: int = 1) -> tuple[np.ndarray, np.ndarray]:
    others = tuple(i for i in range(x.ndim) if i != axis)
    return x.astype(np.float64).mean(others), x.astype(np.float64).var(others)


@pytest.mark.parametrize(
    "shape",
    [(5, 3), (1, 4), (700, 1100), (4, 3, 1), (6, 5, 2), (3, 4, 7), (2, 3, 70_000), (2, 130, 9, 9), (3, 8, 4, 5, 6), (40, 600, 7, 7)],
)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_any_shape_and_type(shape: tuple[int, ...], dtype: type) -> None:
    x = np.random.default_rng(0).normal(1, 2, shape).astype(dtype)
    found = measure(x)
    mean, variance = whole(x)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.variance(), variance, rtol=1e-12, atol=1e-13)
    assert found.count == x.size // shape[1]
    assert found.samples == shape[0]


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_any_channel_axis(axis: int) -> None:
    x = np.random.default_rng(1).normal(3, 1, (4, 5, 6)).transpose(0, 2, 1)
    found = measure(x, axis)
    mean, variance = whole(x, axis % 3)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-13)
    np.testing.assert_allclose(found.variance(), variance, rtol=1e-13)


def test_a_strided_array_is_read_right() -> None:
    x = np.random.default_rng(2).normal(size=(6, 8, 9))[::2, ::-1, 1::3]
    np.testing.assert_allclose(measure(x).variance(), whole(x)[1], rtol=1e-13)


@pytest.mark.parametrize("mean", [1e3, 1e4, 1e6])
def test_a_large_mean_costs_no_digits(mean: float) -> None:
    """E[x^2] - E[x]^2 in float32 gives 8.0 for a true variance of 1.0 at mean 1e4."""
    x = np.random.default_rng(3).normal(mean, 1, (64, 2, 50)).astype(np.float32)
    np.testing.assert_allclose(measure(x).variance(), whole(x)[1], rtol=1e-9)


def test_pooling_equals_one_batch_whatever_the_cuts() -> None:
    x = np.random.default_rng(4).normal(1e4, 1, (37, 3, 5, 5)).astype(np.float32)
    one = measure(x)
    for size in (1, 3, 36):
        many = pool(measure(x[i : i + size]) for i in range(0, 37, size))
        assert (many.count, many.samples) == (one.count, one.samples)
        assert_alike(many, one, 1e-8)


def test_the_order_of_pooling_does_not_matter() -> None:
    parts = [measure(np.random.default_rng(i).normal(i, 1 + i, (i + 1, 2, 3))) for i in range(6)]
    forth, back = pool(parts), pool(parts[::-1])
    np.testing.assert_allclose(forth.m2, back.m2, rtol=1e-14)


def test_a_piece_of_a_sample_and_whole_samples_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(5).normal(2, 3, (5, 4, 300))
    one = measure(x)
    for block in (16, 64, 1024):
        monkeypatch.setattr(moments, "BLOCK", block)
        found = measure(x)
        assert_alike(found, one, 1e-12)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(6).normal(2, 3, (9, 16, 40, 40)).astype(np.float32)
    one = measure(x)
    monkeypatch.setattr(moments, "PARALLEL", 1)
    np.testing.assert_array_equal(measure(x).m2, one.m2)


def test_nothing_to_pool() -> None:
    none = measure(np.zeros((0, 3, 4)))
    some = measure(np.ones((2, 3, 4)))
    assert none.count == 0
    assert np.isnan(none.variance()).all()
    assert np.isinf(none.standard_error()).all()
    assert (none + some) is some
    assert (some + none) is some
    assert (Moments.empty(3) + none).count == 0


def test_variance_biased_and_unbiased() -> None:
    x = np.random.default_rng(7).normal(size=(10, 3))
    np.testing.assert_allclose(measure(x).variance(), x.var(0), rtol=1e-13)
    np.testing.assert_allclose(measure(x).variance(unbiased=True), x.var(0, ddof=1), rtol=1e-13)


def test_standard_error_is_that_of_independent_samples() -> None:
    rng = np.random.default_rng(8)
    flat = rng.normal(size=(50, 3))
    np.testing.assert_allclose(measure(flat).standard_error(), flat.std(0, ddof=1) / 50**0.5, rtol=1e-12)
    # A hundred equal pixels per sample tell no more than one.
    np.testing.assert_allclose(measure(np.repeat(flat[..., None], 100, 2)).standard_error(), flat.std(0, ddof=1) / 50**0.5, rtol=1e-12)
    images = rng.normal(size=(20, 3, 6, 6)) + rng.normal(size=(20, 3, 1, 1))
    np.testing.assert_allclose(measure(images).standard_error(), images.mean((2, 3)).std(0, ddof=1) / 20**0.5, rtol=1e-12)


def test_standard_errors_of_samples_of_different_sizes_are_those_of_ratios() -> None:
    """Samples of 1 to 40 elements, pooled in any order: both errors against their formulas over all samples at once."""
    rng = np.random.default_rng(9)
    samples = [rng.gamma(2.0, 1.5, (3, int(size))) + rng.normal(size=(3, 1)) for size in rng.integers(1, 40, 60)]
    found = pool(measure(x[None]) for x in samples)
    everything = np.concatenate(samples, axis=1)
    mean, variance, total = everything.mean(1), everything.var(1), everything.shape[1]
    of_mean = [(x - mean[:, None]).sum(1) for x in samples]
    of_variance = [np.square(x - mean[:, None]).sum(1) - x.shape[1] * variance for x in samples]
    for error, parts in ((found.standard_error(), of_mean), (found.variance_error(), of_variance)):
        np.testing.assert_allclose(error, np.sqrt(np.square(parts).sum(0) * 60 / 59) / total, rtol=1e-9)


def test_standard_errors_tell_how_far_statistics_scatter() -> None:
    """Over 400 repetitions, what is told is what is seen."""
    rng = np.random.default_rng(10)
    found = [measure(rng.gamma(1.0, 2.0, (80, 2, 5)) * rng.uniform(0.5, 1.5, (80, 1, 1))) for _ in range(400)]
    assert np.mean([m.standard_error() for m in found]) == pytest.approx(np.std([m.mean for m in found], axis=0).mean(), rel=0.1)
    assert np.mean([m.variance_error() for m in found]) == pytest.approx(np.std([m.variance() for m in found], axis=0).mean(), rel=0.15)


def assert_alike(one: Moments, other: Moments, rtol: float) -> None:
    for name in ("mean", "m2"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=rtol, err_msg=name)
    for mine, its in zip(one.spread, other.spread, strict=True):
        np.testing.assert_allclose(mine, its, rtol=rtol, atol=rtol * np.abs(other.spread).max())
    assert one.weight == other.weight


def test_a_value_that_is_not_finite_shows() -> None:
    x = np.ones((3, 2, 4), np.float32)
    x[1, 1, 2] = np.nan
    found = measure(x)
    assert np.isfinite(found.m2[0])
    assert not np.isfinite(found.m2[1])
