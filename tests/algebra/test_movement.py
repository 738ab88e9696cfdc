"""Operators that only move data: where their maps go, and what depends on a size that the user may change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bnfold.algebra.affine import Affine, Blocked
from bnfold.algebra.graph import Node, Value
from bnfold.algebra.movement import move_down, move_up

Array = np.ndarray
Shapes = tuple[tuple[int | None, ...], ...]


def move(
    run: Callable[[list[Array], tuple[int, ...]], Array], inputs: list[Shapes], output: Shapes, kept: dict[int, int] | None = None
) -> Node:
    """A move whose values have these shapes at each probe."""
    values = [Value(f"x{i}", probes, len(probes[0])) for i, probes in enumerate(inputs)]
    return Node("Move", "move", values, [Value("y", output, len(output[0]))], {"run": run, "kept": kept or {}})


MOVES: list[tuple[str, tuple[int, ...], Callable[[Array], Array], dict[int, int]]] = [
    ("transpose", (2, 3, 4), lambda x: x.transpose(2, 0, 1), {0: 1, 1: 2, 2: 0}),
    ("flatten", (2, 3, 4), lambda x: x.reshape(x.shape[0], -1), {0: 0}),
    ("merge in front", (2, 3, 4), lambda x: x.reshape(-1, x.shape[2]), {2: 1}),
    ("split an axis", (2, 6, 4), lambda x: x.reshape(x.shape[0], 2, 3, x.shape[2]), {0: 0, 2: 3}),
    ("slice", (2, 6, 4), lambda x: x[:, 1::2], {0: 0, 2: 2}),
    ("flip", (2, 6, 4), lambda x: x[:, ::-1], {0: 0, 2: 2}),
    ("permuted channels", (2, 4, 4), lambda x: x[:, [2, 0, 3, 1]], {0: 0, 2: 2}),
    ("squeeze", (2, 1, 4), lambda x: x[:, 0], {0: 0, 2: 1}),
    ("unsqueeze", (2, 4), lambda x: x[:, None], {0: 0, 1: 2}),
    ("tile", (2, 3, 4), lambda x: np.concatenate([x, x], 1), {0: 0, 2: 2}),
    ("edges", (2, 3, 4), lambda x: np.pad(x, [(0, 0), (0, 0), (1, 1)], mode="edge"), {0: 0, 1: 1}),
    ("reflections", (2, 3, 4), lambda x: np.pad(x, [(0, 0), (0, 0), (2, 1)], mode="reflect"), {0: 0, 1: 1}),
]


def random_map(rng: np.random.Generator, shape: tuple[int, ...]) -> Affine:
    size = tuple(n if rng.random() < 0.4 else 1 for n in shape)
    return Affine(rng.integers(1, 4, size).astype(float), rng.integers(0, 2, size).astype(float)).settled()


def outcome(call: Callable[[], Affine]) -> Affine | None:
    try:
        return call().settled()
    except Blocked:
        return None


@pytest.mark.parametrize(("name", "shape", "f", "kept"), MOVES, ids=[m[0] for m in MOVES])
def test_kept_axes_are_only_a_short_cut(name: str, shape: tuple[int, ...], f: Callable[[Array], Array], kept: dict[int, int]) -> None:
    """Numbering every axis at its full size gives the same maps, and blocks the same."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=shape)
    out = f(x).shape
    short, full = (move(lambda xs, _: f(xs[0]), [(shape,)], (out,), k) for k in (kept, {}))
    for _ in range(100):
        a, b = random_map(rng, out), random_map(rng, shape)
        ups = [outcome(lambda node=node, a=a: move_up(node, a)[0]) for node in (short, full)]
        downs = [outcome(lambda node=node, b=b: move_down(node, [b])) for node in (short, full)]
        for one, other in (ups, downs):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.same_as(other)
        if ups[0] is not None:
            np.testing.assert_allclose(f(ups[0](x) + np.zeros(shape)), a(f(x)))
        assert downs[0] is not None
        np.testing.assert_allclose(downs[0](f(x)), f(b(x) + np.zeros(shape)))


@pytest.mark.parametrize(("name", "shape", "f", "kept"), MOVES, ids=[m[0] for m in MOVES])
def test_a_map_along_kept_axes_needs_no_other_size(
    name: str, shape: tuple[int, ...], f: Callable[[Array], Array], kept: dict[int, int]
) -> None:
    rng = np.random.default_rng(5)
    x, out = rng.normal(size=shape), f(rng.normal(size=shape)).shape
    inside = tuple(n if i in kept else None for i, n in enumerate(shape))
    outside = tuple(n if i in kept.values() else None for i, n in enumerate(out))
    node = move(lambda xs, _: f(xs[0]), [(inside,)], (outside,), kept)
    a, b = (Affine(*(rng.normal(size=[n or 1 for n in sizes]) for _ in range(2))) for sizes in (outside, inside))
    np.testing.assert_allclose(f(move_up(node, a)[0](x) + np.zeros(shape)), a(f(x)))
    np.testing.assert_allclose(move_down(node, [b])(f(x)), f(b(x) + np.zeros(shape)))


def test_copies_that_need_different_maps() -> None:
    node = move(lambda xs, _: np.concatenate([xs[0], xs[0]], 1), [((2, 3),)], ((2, 6),), {0: 0})
    both = np.array([[2.0, 3, 4, 2, 3, 4]])
    assert move_up(node, Affine(both, 0 * both))[0].scale.ravel().tolist() == [2, 3, 4]
    with pytest.raises(Blocked, match="copies of one element would need different maps"):
        move_up(node, Affine(np.array([[2.0, 3, 4, 2, 3, 5]]), 0 * both))


def test_copies_that_need_different_shifts() -> None:
    node = move(lambda xs, _: np.concatenate([xs[0], xs[0]], 1), [((2, 3),)], ((2, 6),), {0: 0})
    with pytest.raises(Blocked, match="copies"):
        move_up(node, Affine(np.ones((1, 6)), np.array([[0.0, 0, 0, 0, 0, 1]])))


def test_elements_that_the_output_does_not_read_are_free() -> None:
    node = move(lambda xs, _: xs[0][:, 1:3], [((2, 4),)], ((2, 2),), {0: 0})
    [up] = move_up(node, Affine(np.array([[2.0, 3.0]]), np.array([[1.0, 0.0]])))
    assert np.isnan(up.scale).ravel().tolist() == [True, False, False, True]
    assert up.settled().scale.ravel().tolist() == [1, 2, 3, 1]
    [up] = move_up(node, Affine(np.array([[2.0]]), np.array([[1.0]])))
    assert up.settled().scale.ravel().tolist() == [2]


def test_several_inputs() -> None:
    node = move(lambda xs, _: np.concatenate(xs, 1), [((2, 1, 5),), ((2, 2, 5),)], ((2, 3, 5),), {0: 0, 2: 2})
    a = Affine(np.array([2.0, 3, 4]).reshape(1, 3, 1), np.zeros(()))
    maps = [m.settled() for m in move_up(node, a)]
    assert [m.scale.ravel().tolist() for m in maps] == [[2], [3, 4]]
    assert move_down(node, maps).same_as(a)
    assert move_down(node, [Affine.identity(3)] * 2).is_identity


def test_a_dynamic_batch_is_no_obstacle() -> None:
    """[N, 6, 4] as [N, 24]: the same map at both probes."""
    node = move(lambda xs, shape: xs[0].reshape(shape), [((2, 6, 4), (3, 6, 4))], ((2, 24), (3, 24)), {0: 0})
    a = Affine(np.arange(1.0, 25).reshape(1, 24), np.zeros(()))
    assert move_up(node, a)[0].shape == (1, 6, 4)
    assert move_down(node, [Affine(np.arange(1.0, 7).reshape(1, 6, 1), np.zeros(()))]).shape == (1, 24)


def test_a_map_that_would_depend_on_the_batch() -> None:
    """[N, 3] as [3, N] without a transposition: which column is which channel depends on N."""
    node = move(lambda xs, shape: xs[0].reshape(shape), [((2, 3), (4, 3))], ((3, 2), (3, 4)))
    a = Affine(np.array([2.0, 3, 4]).reshape(3, 1), np.zeros(()))
    with pytest.raises(Blocked, match="where the map goes depends on the size of a dynamic axis"):
        move_up(node, a)
    with pytest.raises(Blocked, match="dynamic axis"):
        move_down(node, [Affine(np.array([[2.0, 3, 4]]), np.zeros(()))])
    assert move_up(node, Affine.identity(2))[0].settled().is_identity


def test_merging_a_dynamic_axis_with_the_channels_behind_it() -> None:
    """[N, L, 3] as [N*L, 3] keeps the channels, whatever N is."""
    node = move(lambda xs, shape: xs[0].reshape(shape), [((2, 5, 3), (3, 5, 3))], ((10, 3), (15, 3)))
    a = Affine(np.array([[2.0, 3, 4]]), np.zeros(()))
    assert move_up(node, a)[0].settled().shape == (1, 1, 3)
    assert move_down(node, [Affine(a.scale[None], np.zeros(()))]).same_as(a)


@pytest.mark.parametrize("probes", [((2, None),), None])
def test_sizes_that_are_not_known(probes: Shapes | None) -> None:
    node = Node("Move", "move", [Value("x", probes, 2)], [Value("y", probes, 2)], {"run": lambda xs, _: xs[0][:, 1:], "kept": {0: 0}})
    along = Affine(np.arange(1.0, 4)[None], np.zeros(()))
    with pytest.raises(Blocked, match="the size of axis 1 of x isn't known"):
        move_up(node, along)
    with pytest.raises(Blocked, match="the size of axis 1 of x isn't known"):
        move_down(node, [along])


def test_a_rank_that_is_not_known() -> None:
    node = Node("Move", "move", [Value("x")], [Value("y")], {"run": lambda xs, _: xs[0], "kept": {}})
    with pytest.raises(Blocked, match="the rank of x isn't known"):
        move_up(node, Affine.identity(2))


def test_an_output_of_another_shape_than_stated() -> None:
    node = move(lambda xs, _: xs[0][:, 1:], [((2, 4),)], ((2, 4),), {0: 0})
    with pytest.raises(Blocked, match="its output shape isn't certain"):
        move_up(node, Affine.identity(2))
