"""Affine maps: composition, free elements, and what each condition refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bnfold.algebra.affine import Affine, Blocked

NAN = np.nan


def per_channel(*pairs: tuple[float, float]) -> Affine:
    """A map along axis 1 of an image."""
    scale, shift = (np.array(c).reshape(1, -1, 1, 1) for c in zip(*pairs, strict=True))
    return Affine(scale, shift)


def test_after_is_composition() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 5))
    a = Affine(rng.normal(size=(1, 3, 1, 1)), rng.normal(size=(1, 3, 1, 1)))
    b = Affine(rng.normal(size=(1, 1, 1, 5)), rng.normal(size=(1, 1, 1, 1)))
    np.testing.assert_allclose(a.after(b)(x), a(b(x)), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(b.after(a)(x), b(a(x)), rtol=1e-14, atol=1e-14)
    assert a.after(Affine.identity(4)).same_as(a)
    assert Affine.identity(4).after(a).same_as(a)


def test_composing_is_associative() -> None:
    rng = np.random.default_rng(1)
    a, b, c = (Affine(rng.normal(size=3), rng.normal(size=3)) for _ in range(3))
    left, right = a.after(b).after(c), a.after(b.after(c))
    np.testing.assert_allclose(left.scale, right.scale)
    np.testing.assert_allclose(left.shift, right.shift)


def test_coefficients_share_a_shape_and_are_float64() -> None:
    a = Affine(np.float32(2), np.zeros((1, 3), np.float16))
    assert a.shape == a.scale.shape == a.shift.shape == (1, 3)
    assert a.scale.dtype == a.shift.dtype == np.float64


def test_identity() -> None:
    assert Affine.identity(3).shape == (1, 1, 1)
    assert Affine.identity(3).is_identity
    assert Affine.identity(0).is_identity
    assert not Affine.scaling(np.array([1.0, 2.0])).is_identity
    assert not Affine.shifting(np.array([0.0, 2.0])).is_identity


@pytest.mark.parametrize(
    ("given", "scale", "shift"),
    [
        pytest.param(per_channel((2, 1), (2, 1), (2, 1)), [2], [1], id="equal coefficients shrink"),
        pytest.param(per_channel((2, 1), (2, 0)), [2, 2], [1, 0], id="different shifts don't"),
        pytest.param(per_channel((2, 1), (NAN, NAN), (2, 1)), [2], [1], id="free elements fit any others"),
        pytest.param(per_channel((2, 1), (NAN, NAN), (3, 1)), [2, 1, 3], [1, 0, 1], id="free elements become the identity"),
        pytest.param(per_channel((NAN, NAN), (NAN, NAN)), [1], [0], id="free altogether"),
        pytest.param(per_channel((0, 1), (0, 1)), [0], [1], id="zeros"),
    ],
)
def test_settled(given: Affine, scale: list[float], shift: list[float]) -> None:
    settled = given.settled()
    assert settled.scale.ravel().tolist() == scale
    assert settled.shift.ravel().tolist() == shift
    assert settled.rank == given.rank
    assert settled.settled().same_as(settled)


def test_settled_shrinks_each_axis_by_itself() -> None:
    grid = np.repeat(np.arange(1.0, 4.0)[:, None], 5, axis=1)
    assert Affine(grid, 0 * grid).settled().shape == (3, 1)
    free = grid.copy()
    free[1, 2] = NAN
    free[2, 0] = NAN
    settled = Affine(free, 0 * free).settled()
    assert settled.shape == (3, 1)
    assert settled.scale.ravel().tolist() == [1, 2, 3]


def test_settled_never_changes_an_element_that_is_read() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        shape = tuple(rng.integers(1, 4, 3))
        scale, shift = rng.integers(0, 2, shape).astype(float), rng.integers(0, 2, shape).astype(float)
        free = rng.random(shape) < 0.4
        given = Affine(np.where(free, NAN, scale), np.where(free, NAN, shift))
        settled = given.settled()
        wide = [np.broadcast_to(c, shape) for c in (settled.scale, settled.shift)]
        assert (wide[0][~free] == scale[~free]).all()
        assert (wide[1][~free] == shift[~free]).all()
        assert not np.isnan(settled.scale).any()
        assert not np.isnan(settled.shift).any()


def test_varying() -> None:
    assert Affine(np.ones((1, 3, 1, 2)), np.zeros(())).varying == (1, 3)
    assert Affine.identity(4).varying == ()


def test_along() -> None:
    a = per_channel((2, 1), (3, 0))
    assert [c.tolist() for c in a.along(1, 2)] == [[2, 3], [1, 0]]
    assert [c.tolist() for c in a.along(-3, 2)] == [[2, 3], [1, 0]]
    assert [c.tolist() for c in Affine.identity(2).along(1, 3)] == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda a: a.along(2, 5), "the map varies along axis 1, the operator's channels lie along axis 2"),
        (lambda a: a.along(1, 5), "the map has 2 channels, the operator 5"),
        (lambda a: a.require(increasing=True), "1 of its 2 scales is negative"),
        (lambda a: Affine(-1.0 * np.ones(3), 0.0).require(increasing=True), "3 of its 3 scales are negative"),
        (lambda a: a.require(unshifted=True), "its shift is not zero"),
        (lambda a: a.require(unscaled=True), "its scale is not one"),
        (lambda a: a.broadcast_from(4, (2, 1, 4, 4)), "the map varies along axis 1, along which an operand is broadcast"),
        (lambda a: a.broadcast_from(4, (2, None, 4, 4)), "the map varies along axis 1, along which an operand is broadcast"),
        (lambda a: a.broadcast_from(2, (4, 4)), "the map varies along axis 1, along which an operand is broadcast"),
        (lambda a: a.broadcast_from(3, None), "the map varies along axis 1, along which an operand is broadcast"),
    ],
)
def test_refusals(call: Callable[[Affine], object], reason: str) -> None:
    with pytest.raises(Blocked) as caught:
        call(per_channel((2, 1), (-3, 0)))
    assert str(caught.value) == reason


def test_require_gives_the_map_back() -> None:
    a = per_channel((2, 0), (0, 0))
    assert a.require(increasing=True, unshifted=True) is a
    assert a.require() is a


@pytest.mark.parametrize(
    ("rank", "sizes", "shape"), [(4, (2, 2, 4, 4), (1, 2, 1, 1)), (3, (2, 4, 4), (2, 1, 1)), (4, (None, 2, 1, 1), (1, 2, 1, 1))]
)
def test_broadcast_from(rank: int, sizes: tuple[int | None, ...], shape: tuple[int, ...]) -> None:
    assert per_channel((2, 1), (-3, 0)).broadcast_from(rank, sizes).shape == shape


def test_broadcast_from_a_scalar() -> None:
    assert Affine.identity(4).broadcast_from(0, ()).shape == ()


def test_same_as() -> None:
    a = per_channel((2, 1), (2, 1))
    assert a.same_as(a.settled())
    assert not a.same_as(per_channel((2, 1), (2, 0)))
    assert not a.same_as(a.linear)


def test_map_moves_both_coefficients() -> None:
    a = per_channel((2, 1), (3, 0)).map(lambda c: c.transpose(0, 2, 3, 1))
    assert a.shape == (1, 1, 1, 2)
    assert a.shift.ravel().tolist() == [1, 0]
