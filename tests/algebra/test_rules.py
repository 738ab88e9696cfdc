"""Every row of the table of rules, in both directions, against what the operators compute."""

from __future__ import annotations

import zlib

import numpy as np
import onnx_ir
import pytest
from cases import ALL
from compare import nodes, operators
from specimens import SPECIMENS, Specimen

from bnfold.algebra.affine import Affine, Blocked
from bnfold.algebra.graph import Node
from bnfold.algebra.rule import Step
from bnfold.algebra.rules import RULES, rule_of

MAPS = 150
ids = [str(s) for s in SPECIMENS]


def random_map(rng: np.random.Generator, shape: tuple[int, ...]) -> Affine:
    """A map that varies along no axis, along one, or along two; its scales positive, mixed, with zeros, or one; shifted or not."""
    axes = rng.permutation(len(shape))[: rng.integers(0, 3)]
    if rng.random() < 0.4 and len(shape) > 1:
        axes = np.array([1])  # the usual axis of channels
    size = tuple(n if i in axes else 1 for i, n in enumerate(shape))
    scale = {
        0: lambda: rng.uniform(0.5, 2, size),
        1: lambda: rng.uniform(0.5, 2, size) * rng.choice([-1, 1], size),
        2: lambda: rng.uniform(0.5, 2, size) * rng.choice([0, 1], size),
        3: lambda: np.ones(size),
        4: lambda: np.full(size, rng.uniform(0.5, 2)),
    }[int(rng.integers(5))]()
    shift = {0: lambda: np.zeros(size), 1: lambda: rng.normal(size=size), 2: lambda: np.full(size, rng.normal())}[int(rng.integers(3))]()
    return Affine(scale, shift).settled()


def used(specimen: Specimen, rng: np.random.Generator) -> Node:
    """The specimen; some have taken a map before, so that their parameters await an update already."""
    node = specimen.node(rng)
    if rng.random() < 0.3:
        for param in node.params.values():
            param.update = Affine(rng.uniform(0.5, 2, param.shape), rng.normal(size=param.shape))
    return node


def refilled(node: Node) -> bool:
    """Whether a node pads with another number than its specimen says."""
    return "fill" in node.params and node.params["fill"].update is not None


def updated(node: Node, step: Step) -> dict[str, np.ndarray]:
    params = {role: param.read() for role, param in node.params.items()}
    assert step.updates.keys() <= params.keys()
    return params | {role: update(params[role]) for role, update in step.updates.items()}


def close(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and bool(np.abs(left - right).max(initial=0) <= 1e-10 * max(1.0, np.abs(left).max(initial=0)))


def applied(maps: list[Affine], xs: list[np.ndarray], steers: int) -> list[np.ndarray]:
    assert all(a.is_identity for a in maps[:steers]), "an input that only steers got a map"
    return xs[:steers] + [a(x) for a, x in zip(maps[steers:], xs[steers:], strict=True)]


def check_refusal(blocked: Blocked, must_pass: bool, what: object) -> None:
    """Only what breaks the row's condition is refused, with a clause that fits behind the operator's name."""
    reason = str(blocked)
    assert not must_pass, f"{what} is refused: {reason}"
    assert reason
    assert not reason[0].isupper()
    assert not reason.endswith(".")


@pytest.mark.parametrize("specimen", SPECIMENS, ids=ids)
def test_up(specimen: Specimen) -> None:
    """a(f(x)) = f'(b(x))."""
    rng = np.random.default_rng(zlib.crc32(str(specimen).encode()))
    passed = 0
    for _ in range(MAPS):
        node, xs = used(specimen, rng), specimen.inputs(rng)
        y = specimen.run({role: p.read() for role, p in node.params.items()}, xs)
        a = random_map(rng, y.shape)
        try:
            steps = rule_of(node).up(node, a)
        except Blocked as blocked:
            check_refusal(blocked, specimen.passes_up(a) and not refilled(node), a)
            continue
        assert steps
        passed += 1
        for step in steps:
            maps = [m.settled() for m in step.maps]
            assert [m.rank for m in maps] == [v.rank for v in node.inputs] or all(m.is_identity for m in maps)
            assert close(a(y), specimen.run(updated(node, step), applied(maps, xs, specimen.steers))), f"{a} is not {step}"
    assert passed > 5 or specimen.op == "Recurrent"


@pytest.mark.parametrize("specimen", SPECIMENS, ids=ids)
def test_down(specimen: Specimen) -> None:
    """f(a(x)) = b(f'(x))."""
    rng = np.random.default_rng(zlib.crc32(str(specimen).encode()) + 1)
    passed = 0
    for _ in range(MAPS):
        node, xs = used(specimen, rng), specimen.inputs(rng)
        maps = random_maps(rng, specimen)
        try:
            steps = rule_of(node).down(node, maps)
        except Blocked as blocked:
            check_refusal(blocked, specimen.passes_down(maps) and not refilled(node), maps)
            continue
        assert steps
        passed += 1
        y = specimen.run({role: p.read() for role, p in node.params.items()}, applied(maps, xs, specimen.steers))
        for step in steps:
            [b] = step.maps
            got = b(specimen.run(updated(node, step), xs))
            assert close(y, got), f"{maps} are not {step}"
    assert passed > 5 or specimen.op in ("Normalisation", "Table", "Constant")


def random_maps(rng: np.random.Generator, specimen: Specimen) -> list[Affine]:
    """A map for each input: all of the same scale, all the same, all but one the identity, or each of its own."""
    maps = [Affine.identity(len(s)) if i < specimen.steers else random_map(rng, s) for i, s in enumerate(specimen.shapes)]
    kind, rest = int(rng.integers(4)), range(specimen.steers + 1, len(maps))
    smallest = min(maps[specimen.steers :], key=lambda a: a.rank, default=None)
    for i in rest:
        if kind == 0 or (kind == 1 and smallest is not None and smallest.varying):
            maps[i] = Affine.identity(maps[i].rank)
        elif kind < 3:
            first = maps[specimen.steers]
            if specimen.shapes[i] == specimen.shapes[specimen.steers]:
                maps[i] = first if kind == 2 else Affine(first.scale, rng.normal(size=first.shape)).settled()
            else:  # one that suits operands of other sizes too
                scale, shift = rng.uniform(0.5, 2), rng.normal()
                for k in range(specimen.steers, len(maps)):
                    ones = np.ones((1,) * maps[k].rank)
                    maps[k] = Affine(scale * ones, shift * ones)
    return maps


def test_every_row_has_a_specimen() -> None:
    assert {s.op for s in SPECIMENS} == set(RULES)


def test_specimens_have_names_of_their_own() -> None:
    assert len(set(ids)) == len(ids)


def test_an_operator_without_a_row_is_a_barrier() -> None:
    with pytest.raises(Blocked, match="no rule lets a map cross it"):
        rule_of(Node("Softmax", "s", [], []))
    with pytest.raises(Blocked, match="its bounds are computed"):
        rule_of(Node("Barrier", "s", [], [], {"why": "its bounds are computed"}))


def test_every_operator_of_the_cases_is_lowered_to_a_row() -> None:
    from bnfold.backends.onnx.lowering.table import lower

    found = {node.op for case in ALL for node in lower(onnx_ir.from_proto(case.build())).nodes}
    assert found - {"Barrier"} == set(RULES) - {"Clamp"}  # which a Relu becomes on request


def test_every_onnx_operator_is_in_a_case() -> None:
    from bnfold.backends.onnx.lowering.table import FUSED, OPERATORS

    models = [case.build() for case in ALL]
    used = {name for model in models for name in operators(model)}
    assert set(OPERATORS) - used == set()
    assert set(FUSED) - {f"{node.domain}::{node.op_type}" for model in models for node in nodes(model)} == set()
