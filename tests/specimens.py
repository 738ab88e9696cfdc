"""Specimens of every row of the table of rules: a neutral node, and in numpy what it computes.

`run` is a statement of the operator of its own: it knows nothing of the rules. `passes_up` and `passes_down` state which maps must cross
or be absorbed; every other map may be refused, but then with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from specimen_operators import (
    Array,
    Run,
    affine,
    clamp,
    contraction,
    conv,
    conv_transpose,
    halves,
    interpolated,
    letters,
    normalised,
    recurrent,
    unary,
    weighed_conv,
    windows,
)

from bnfold.algebra.affine import Affine
from bnfold.algebra.graph import Node, Param, Tensor, Value


def never(*_: object) -> bool:
    return False


def always(*_: object) -> bool:
    return True


@dataclass(frozen=True)
class Specimen:
    """name: unique. op: the row. shapes: of the inputs. steers: how many of the inputs, from the first, carry no map;
    `feed` then makes them.
    unknown: axes whose size the rule may not know. params: shapes of the parameters. passes_up: of a map on the output; passes_down: of
    the maps on the inputs.
    """

    name: str
    op: str
    shapes: Sequence[tuple[int, ...]]
    run: Run
    passes_up: Callable[[Affine], bool]
    passes_down: Callable[[list[Affine]], bool]
    attrs: dict[str, Any] = field(default_factory=dict)
    params: dict[str, tuple[int, ...]] = field(default_factory=dict)
    missing: dict[str, tuple[int, ...]] = field(default_factory=dict)  # parameters that the operator hasn't yet
    given: dict[str, float] = field(default_factory=dict)  # parameters whose value is told by an attribute too
    steers: int = 0
    feed: Callable[[np.random.Generator], list[Array]] | None = None
    unknown: tuple[int, ...] = ()

    def node(self, rng: np.random.Generator) -> Node:
        params = {}
        for role, shape in self.params.items():
            array = np.full(shape, self.given[role]) if role in self.given else rng.normal(size=shape)
            params[role] = Param(Tensor(role, lambda a=array: a, shape, np.inf), shape)
        params |= {role: Param(None, shape) for role, shape in self.missing.items()}
        dims = [tuple(None if i in self.unknown else n for i, n in enumerate(s)) for s in self.shapes]
        inputs = [Value(f"x{i}", (shape,), len(shape)) for i, shape in enumerate(dims)]
        out = self.run({role: p.read() for role, p in params.items()}, self.inputs(rng)).shape
        output = Value("y", (tuple(None if i in self.unknown else n for i, n in enumerate(out)),), len(out))
        attrs = {name: value(rng) if callable(value) and name in ("gain", "mean") else value for name, value in self.attrs.items()}
        return Node(self.op, self.name, inputs, [output], attrs, params)

    def inputs(self, rng: np.random.Generator) -> list[Array]:
        steering = self.feed(rng) if self.feed else []
        return steering + [rng.normal(0.3, 1.0, shape) for shape in self.shapes[len(steering) :]]

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


# --- what maps are like ----------------------------------------------------------------------------------------------------------


def along(*axes: int) -> Callable[[Affine], bool]:
    """Maps that vary along these axes alone."""
    return lambda a: set(a.varying) <= {axis % a.rank for axis in axes}


def fixed(*axes: int) -> Callable[[Affine], bool]:
    """Maps that don't vary along these axes."""
    return lambda a: not set(a.varying) & {axis % a.rank for axis in axes}


def increasing(a: Affine) -> bool:
    return bool((a.scale >= 0).all())


def unshifted(a: Affine) -> bool:
    return not a.shift.any()


def both(*laws: Callable[[Affine], bool]) -> Callable[[Affine], bool]:
    return lambda a: all(law(a) for law in laws)


def each(*laws: Callable[[Affine], bool]) -> Callable[[list[Affine]], bool]:
    """The laws hold for each input's map."""
    return lambda maps: all(law(a) for a in maps for law in laws)


def alike(*laws: Callable[[Affine], bool], steers: int = 0) -> Callable[[list[Affine]], bool]:
    """All inputs have the same map, and the laws hold for it."""
    return lambda maps: all(a.same_as(maps[steers]) and all(law(a) for law in laws) for a in maps[steers:])


def same_scale(maps: list[Affine]) -> bool:
    return all((a.scale == maps[0].scale).all() for a in maps)


def one_number(fill: float) -> Callable[[Affine], bool]:
    return lambda a: np.unique(a(np.asarray(fill))).size == 1


def undoes(fill: float) -> Callable[[list[Affine]], bool]:
    """Some one number is mapped to the fill."""

    def law(maps: list[Affine]) -> bool:
        a = maps[0]
        if (a(np.asarray(fill)) == fill).all():
            return True
        return bool((a.scale != 0).all()) and np.unique((fill - a.shift) / a.scale).size == 1

    return law


GAIN = np.array([0.5, 2.0, 1.5]).reshape(1, 3, 1, 1)
MEAN = np.array([0.3, -1.0, 0.8]).reshape(1, 3, 1, 1)
IMAGE = (2, 3, 4, 6)
ONES = (1, 1, 1, 1)
SPACE = (2, 3)


def _fits(a: Affine, shape: tuple[int, ...]) -> bool:
    """Whether a map has no axis along which an operand of this shape would have to grow."""
    lead = a.rank - len(shape)
    return all(axis >= lead and shape[axis - lead] > 1 for axis in a.varying)


SPECIMENS = [
    Specimen("x", "Identity", [IMAGE], unary(lambda x: x), always, always),
    # averages
    Specimen(
        "2 x 2 windows", "Average", [IMAGE], unary(lambda x: halves(x).mean((-1, -2))), fixed(2, 3), each(fixed(2, 3)), {"mixes": SPACE}
    ),
    Specimen("global", "Average", [IMAGE], unary(lambda x: x.mean(SPACE, keepdims=True)), fixed(2, 3), each(fixed(2, 3)), {"mixes": SPACE}),
    Specimen("axis 1 goes", "Average", [IMAGE], unary(lambda x: x.mean(1)), always, each(fixed(1)), {"mixes": (1,), "drops": True}),
    Specimen(
        "two axes go", "Average", [IMAGE], unary(lambda x: x.mean((0, 2))), always, each(fixed(0, 2)), {"mixes": (0, 2), "drops": True}
    ),
    Specimen("linear", "Resize", [(2, 3, 5)], unary(interpolated), fixed(2), each(fixed(2)), {"mixes": (2,)}),
    Specimen("nearest", "Resize", [IMAGE], unary(lambda x: x.repeat(2, 2)), fixed(2), each(fixed(2)), {"mixes": (2,)}),
    Specimen("of channels", "Crop", [IMAGE], unary(lambda x: x[:, 1:3]), fixed(1), each(fixed(1)), {"mixes": (1,)}),
    Specimen(
        "by an array of places",
        "Lookup",
        [IMAGE],
        unary(lambda x: x[:, np.array([[0, 2], [1, 1], [2, 0]])]),
        fixed(1, 2),
        each(fixed(1)),
        {"axis": 1, "taken": 1, "given": 2},
    ),
    Specimen(
        "by two vectors of places",
        "Lookup",
        [IMAGE],
        unary(lambda x: x[:, :, np.array([3, 0, 1]), np.array([5, 0, 2])]),
        fixed(2),
        each(fixed(2, 3)),
        {"axis": 2, "taken": 2, "given": 1},
    ),
    # order
    Specimen(
        "2 x 2 windows",
        "Max",
        [IMAGE],
        unary(lambda x: halves(x).max((-1, -2))),
        both(increasing, fixed(2, 3)),
        each(increasing, fixed(2, 3)),
        {"mixes": SPACE},
    ),
    Specimen(
        "least of axis 1", "Max", [IMAGE], unary(lambda x: x.min(1)), increasing, each(increasing, fixed(1)), {"mixes": (1,), "drops": True}
    ),
    Specimen(
        "and where it is",
        "Max",
        [(2, 3, 4)],
        unary(lambda x: np.concatenate([x.max(2), 0 * x.argmax(2)], 1)[:, :3]),
        lambda a: bool((a.scale > 0).all()),
        each(lambda a: bool((a.scale > 0).all()), fixed(2)),
        {"mixes": (2,), "drops": True, "strict": True},
    ),
    # stretchings
    Specimen("two bounds", "Clamp", [IMAGE], clamp, always, always, {"limit": 1e30}, {"low": ONES, "high": ONES}),
    Specimen(
        "one bound",
        "Clamp",
        [IMAGE],
        clamp,
        always,
        always,
        {"limit": 1e30},
        {"low": ONES, "high": ONES},
        given={"low": 0.0, "high": 1e30},
    ),
    Specimen("relu", "Relu", [IMAGE], unary(lambda x: np.maximum(x, 0)), both(increasing, unshifted), each(increasing, unshifted)),
    Specimen(
        "leaky", "Relu", [IMAGE], unary(lambda x: np.where(x > 0, x, -0.3 * x)), both(increasing, unshifted), each(increasing, unshifted)
    ),
    Specimen(
        "a slope per channel",
        "Relu",
        [IMAGE],
        unary(lambda x: np.where(x > 0, x, MEAN * x)),
        both(increasing, unshifted),
        each(increasing, unshifted),
    ),
    Specimen("size", "Relu", [IMAGE], unary(np.abs), both(increasing, unshifted), each(increasing, unshifted)),
    Specimen(
        "euclidean norm of windows",
        "Relu",
        [IMAGE],
        unary(lambda x: np.sqrt((halves(x) ** 2).sum((-1, -2)))),
        both(increasing, unshifted, fixed(2, 3)),
        each(increasing, unshifted, fixed(2, 3)),
        {"mixes": SPACE},
    ),
    Specimen(
        "sums by computed places",
        "Scatter",
        [IMAGE],
        unary(lambda x: np.concatenate([x[:, :, [0]] + x[:, :, [2]], 0 * x[:, :, [0]], x[:, :, 1:]], axis=2)),
        both(unshifted, fixed(2)),
        each(unshifted, fixed(2)),
        {"mixes": (2,)},
    ),
    # fills
    Specimen(
        "zeros",
        "Pad",
        [(2, 3, 4)],
        unary(lambda x: np.pad(x, [(0, 0), (0, 0), (1, 2)])),
        both(unshifted, fixed(2)),
        each(unshifted, fixed(2)),
        {"mixes": (2,), "fill": 0.0},
    ),
    Specimen(
        "average that counts its zeros",
        "Pad",
        [(2, 3, 4)],
        unary(lambda x: windows(np.pad(x, [(0, 0), (0, 0), (1, 1)]), 3).mean(-1)),
        both(unshifted, fixed(2)),
        each(unshifted, fixed(2)),
        {"mixes": (2,), "fill": 0.0},
    ),
    Specimen(
        "a fill of its own",
        "Pad",
        [(2, 3, 4)],
        lambda params, xs: np.pad(xs[0], [(0, 0), (0, 0), (1, 2)], constant_values=float(params["fill"])),
        both(one_number(0.7), fixed(2)),
        lambda maps: fixed(2)(maps[0]) and undoes(0.7)(maps),
        {"mixes": (2,), "fill": 0.7},
        params={"fill": ()},
        given={"fill": 0.7},
    ),
    # sums
    Specimen("axis 2 goes", "Sum", [IMAGE], unary(lambda x: x.sum(2)), always, each(fixed(2)), {"mixes": (2,), "drops": True}),
    Specimen("axes 0 and 3", "Sum", [IMAGE], unary(lambda x: x.sum((0, 3), keepdims=True)), always, each(fixed(0, 3)), {"mixes": (0, 3)}),
    Specimen(
        "a length that isn't known",
        "Sum",
        [IMAGE],
        unary(lambda x: x.sum(3, keepdims=True)),
        both(unshifted, fixed(3)),
        each(unshifted, fixed(3)),
        {"mixes": (3,)},
        unknown=(3,),
    ),
    Specimen("x + y", "Add", [IMAGE, IMAGE], lambda _, xs: xs[0] + xs[1], always, same_scale),
    Specimen("x - y", "Add", [IMAGE, IMAGE], lambda _, xs: xs[0] - xs[1], always, same_scale, {"multiples": (1, -1)}),
    Specimen("x + 2.5*y", "Add", [IMAGE, IMAGE], lambda _, xs: xs[0] + 2.5 * xs[1], always, same_scale, {"multiples": (1, 2.5)}),
    Specimen("x + 0*y", "Add", [IMAGE, IMAGE], lambda _, xs: xs[0], always, same_scale, {"multiples": (1, 0)}),
    Specimen("x + y + z", "Add", [IMAGE] * 3, lambda _, xs: xs[0] + xs[1] + xs[2], always, same_scale),
    Specimen("y is broadcast", "Add", [IMAGE, (3, 1, 6)], lambda _, xs: xs[0] + xs[1], along(1, 3), same_scale),
    Specimen(
        "both are broadcast",
        "Add",
        [(2, 1, 4), (3, 1)],
        lambda _, xs: xs[0] - xs[1],
        lambda a: not a.varying,
        same_scale,
        {"multiples": (1, -1)},
    ),
    # products
    Specimen("x * y", "Mul", [IMAGE, IMAGE], lambda _, xs: xs[0] * xs[1], unshifted, each(unshifted)),
    Specimen(
        "x / y",
        "Mul",
        [IMAGE, IMAGE],
        lambda _, xs: xs[0] / xs[1],
        unshifted,
        lambda maps: unshifted(maps[0]) and maps[1].is_identity,
        {"factors": 1},
    ),
    Specimen("a gate", "Mul", [IMAGE, (2, 3, 1, 1)], lambda _, xs: xs[0] * xs[1], unshifted, each(unshifted)),
    Specimen("outer", "Mul", [(4, 1), (1, 3)], lambda _, xs: xs[0] * xs[1], lambda a: unshifted(a) and len(a.varying) < 2, each(unshifted)),
    Specimen(
        "matrices",
        "MatMul",
        [(4, 5), (5, 3)],
        lambda _, xs: xs[0] @ xs[1],
        lambda a: unshifted(a) and 1 in a.shape,
        lambda m: each(unshifted)(m) and fixed(1)(m[0]) and fixed(0)(m[1]),
    ),
    Specimen(
        "batches of matrices",
        "MatMul",
        [(2, 3, 4, 5), (2, 3, 5, 4)],
        lambda _, xs: xs[0] @ xs[1],
        lambda a: unshifted(a) and 1 in a.shape[2:],
        lambda m: each(unshifted)(m) and fixed(3)(m[0]) and fixed(2)(m[1]),
    ),
    Specimen(
        "one matrix for the batch",
        "MatMul",
        [(2, 4, 5), (5, 3)],
        lambda _, xs: xs[0] @ xs[1],
        lambda a: unshifted(a) and (fixed(2)(a) or along(2)(a)),
        lambda m: each(unshifted)(m) and fixed(2)(m[0]) and fixed(0)(m[1]),
    ),
    # choices
    Specimen("of two", "Mean", [IMAGE, IMAGE], lambda _, xs: (xs[0] + xs[1]) / 2, always, alike()),
    Specimen("one is broadcast", "Mean", [IMAGE, (1, 3, 1, 6)], lambda _, xs: (xs[0] + xs[1]) / 2, along(1, 3), alike()),
    Specimen(
        "c ? x : y",
        "Where",
        [(2, 1, 4, 6), IMAGE, IMAGE],
        lambda _, xs: np.where(xs[0], xs[1], xs[2]),
        always,
        alike(steers=1),
        {"selectors": 1},
        steers=1,
        feed=lambda rng: [rng.random((2, 1, 4, 6)) < 0.5],
    ),
    Specimen("greater of two", "Maximum", [IMAGE, IMAGE], lambda _, xs: np.maximum(xs[0], xs[1]), increasing, alike(increasing)),
    Specimen(
        "least of three",
        "Maximum",
        [IMAGE, IMAGE, (3, 4, 6)],
        lambda _, xs: np.minimum(np.minimum(xs[0], xs[1]), xs[2]),
        both(increasing, fixed(0)),
        alike(increasing),
    ),
    # convolutions
    *(
        Specimen(
            f"{dims}-D in {groups} groups{' padded' if pad else ''}",
            "Conv",
            [(2, 4, 6, 5)[: 2 + dims]],
            conv(groups, dims, pad=pad, stride=stride),
            along(1),
            each(along(1), always if not pad else unshifted),
            {"groups": groups, "uniform": not pad},
            {"weight": (8, 4 // groups, 3, 2)[: 2 + dims], **({"bias": (8,)} if groups > 1 else {})},
            {} if groups > 1 else {"bias": (8,)},
        )
        for dims, groups, pad, stride in ((2, 1, 0, 1), (2, 2, 0, 2), (2, 4, 1, 1), (1, 2, 1, 2))
    ),
    Specimen(
        "transposed",
        "Conv",
        [(2, 4, 5)],
        conv_transpose(2, 2),
        along(1),
        each(along(1), unshifted),
        {"groups": 2, "uniform": False, "uneven": "its outputs see different taps"},
        {"weight": (6, 2, 3), "bias": (6,)},
    ),
    Specimen(
        "each tap as a second input says",
        "Conv",
        [(2, 4, 6, 5), (2, 4, 4, 3, 2)],
        weighed_conv(),
        along(1),
        lambda maps: along(1)(maps[0]) and unshifted(maps[0]) and maps[1].is_identity,
        {"groups": 1, "uniform": False},
        {"weight": (8, 4, 3, 2), "bias": (8,)},
    ),
    # contractions
    Specimen(
        "x W + b",
        "Contraction",
        [(4, 5)],
        contraction("nk,ko->no"),
        along(1),
        lambda m: len(m[0].varying) < 2,
        letters("nk,ko->no"),
        {"weight": (5, 3), "bias": (1, 3)},
    ),
    Specimen(
        "x W' + one number",
        "Contraction",
        [(4, 5)],
        contraction("nk,ok->no"),
        along(1),
        lambda m: len(m[0].varying) < 2,
        letters("nk,ok->no"),
        {"weight": (3, 5), "bias": (1, 1)},
    ),
    Specimen(
        "W x",
        "Contraction",
        [(2, 5, 3)],
        contraction("bmo,km->bko"),
        along(1),
        each(lambda a: along(1)(a) or fixed(1)(a)),
        letters("bmo,km->bko") | {"grows_add": True},
        {"weight": (4, 5)},
        {"bias": (1, 1, 1)},
    ),
    Specimen(
        "without a bias",
        "Contraction",
        [(2, 3, 5)],
        contraction("bnk,ko->bno"),
        both(along(2), unshifted),
        each(lambda a: along(2)(a) or fixed(2)(a)),
        letters("bnk,ko->bno"),
        {"weight": (5, 4)},
    ),
    Specimen(
        "a matrix per channel",
        "Contraction",
        [(2, 3, 5)],
        contraction("nck,cko->nco"),
        along(1, 2),
        each(lambda a: fixed(0)(a) or along(0)(a)),
        letters("nck,cko->nco"),
        {"weight": (3, 5, 4)},
        {"bias": (1, 1, 1)},
    ),
    Specimen(
        "turned round",
        "Contraction",
        [(2, 3, 5)],
        contraction("nck,ko->onc"),
        along(0),
        each(lambda a: along(2)(a) or fixed(2)(a)),
        letters("nck,ko->onc"),
        {"weight": (5, 4)},
        {"bias": (1, 1, 1)},
    ),
    # affine operators
    Specimen(
        "BatchNorm",
        "Affine",
        [IMAGE],
        affine(GAIN, MEAN),
        along(1),
        always,
        {"gain": GAIN, "mean": MEAN},
        {"gamma": (1, 3, 1, 1), "beta": (1, 3, 1, 1)},
    ),
    Specimen("x * c", "Affine", [IMAGE], affine(), always, always, {"grows": True}, {"gamma": (1, 3, 1, 1)}),
    Specimen("x * 0", "Affine", [IMAGE], affine(), unshifted, always, {"grows": True}, {"gamma": (1, 3, 1, 1)}, given={"gamma": 0.0}),
    Specimen("x + c", "Affine", [IMAGE], affine(), always, always, {"grows": True}, {"beta": (1, 1, 1, 6)}),
    Specimen("c - x", "Affine", [IMAGE], affine(-1.0), always, always, {"grows": True, "gain": -1.0}, {"beta": (1, 1, 1, 1)}),
    Specimen("-x", "Affine", [IMAGE], affine(-1.0), always, always, {"gain": -1.0}),
    # what has weights of its own
    Specimen(
        "over the last axis", "Normalisation", [(2, 3, 5)], normalised((2,)), along(2), never, {}, {"gamma": (1, 1, 5), "beta": (1, 1, 5)}
    ),
    Specimen(
        "over space", "Normalisation", [IMAGE], normalised((2, 3)), along(1), never, {}, {"gamma": (1, 3, 1, 1), "beta": (1, 3, 1, 1)}
    ),
    Specimen(
        "rows",
        "Table",
        [(2, 3)],
        lambda p, xs: p["table"][xs[0]],
        along(2),
        never,
        {"axes": [None, 2]},
        {"table": (7, 4)},
        steers=1,
        feed=lambda rng: [rng.integers(0, 7, (2, 3))],
    ),
    Specimen(
        "columns",
        "Table",
        [(2, 3)],
        lambda p, xs: np.take(p["table"], xs[0], 1),
        along(0, 3),
        never,
        {"axes": [0, None, 3]},
        {"table": (4, 7, 5)},
        steers=1,
        feed=lambda rng: [rng.integers(0, 7, (2, 3))],
    ),
    Specimen("c", "Constant", [], lambda p, _: p["value"] + np.zeros((3, 4)), always, never, {}, {"value": (3, 4)}),
    Specimen("from zero", "Recurrent", [(5, 2, 3)], recurrent, never, each(along(2)), {}, {"weight": (1, 4, 3)}, {"bias": (1, 8)}),
    Specimen(
        "from a state",
        "Recurrent",
        [(5, 2, 3), (1, 2, 4)],
        recurrent,
        never,
        lambda m: along(2)(m[0]) and m[1].is_identity,
        {},
        {"weight": (1, 4, 3), "bias": (1, 8)},
    ),
    # moves
    *(
        Specimen(name, "Move", [(2, 3, 4)], unary(f), passes, always, {"run": lambda xs, _, f=f: f(xs[0]), "kept": kept})
        for name, f, kept, passes in (
            ("transpose", lambda x: x.transpose(2, 0, 1), {0: 1, 1: 2, 2: 0}, always),
            ("merge the last axes", lambda x: x.reshape(x.shape[0], -1), {0: 0}, always),
            ("merge the first axes", lambda x: x.reshape(-1, x.shape[2]), {2: 1}, always),
            ("slice", lambda x: x[:, 1:], {0: 0, 2: 2}, always),
            ("reversed", lambda x: x[:, :, ::-1], {0: 0, 1: 1}, always),
            ("doubled", lambda x: np.concatenate([x, x], 1), {0: 0, 2: 2}, fixed(1)),
            ("grown", lambda x: np.broadcast_to(x[:, None], (x.shape[0], 5, *x.shape[1:])), {0: 0, 1: 2, 2: 3}, fixed(1)),
            ("edges repeated", lambda x: np.pad(x, [(0, 0), (0, 0), (1, 1)], mode="edge"), {0: 0, 1: 1}, fixed(2)),
            ("a shuffle, nothing kept", lambda x: x.reshape(2, 2, 6).transpose(0, 2, 1).reshape(2, 3, 4), {}, always),
        )
    ),
    Specimen(
        "concat",
        "Move",
        [(2, 3, 4), (2, 5, 4)],
        lambda _, xs: np.concatenate(xs, 1),
        always,
        always,
        {"run": lambda xs, _: np.concatenate(xs, 1), "kept": {0: 0, 2: 2}},
    ),
]
