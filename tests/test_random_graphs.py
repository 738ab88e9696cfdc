"""A few hundred random networks in each run of the tests; thousands with `python tests/random_graphs.py`."""

from __future__ import annotations

import pytest
from random_graphs import build, check, share_folded

from bnfold.backends.onnx.ops import OPERATORS

COUNT = 300
BLOCK = 50
FOLDED = 0.55  # the share of BatchNorms that must fold, by which no test here can pass by folding nothing


@pytest.mark.parametrize("first", range(0, COUNT, BLOCK))
def test_folding_changes_no_random_network(first: int) -> None:
    found = [check(seed) for seed in range(first, first + BLOCK)]
    failed = {f.seed: f.problem for f in found if f.problem}
    assert not failed, f"look closer with: python tests/random_graphs.py --only {min(failed)}\n{failed}"
    assert share_folded([f.report for f in found if f.report]) > FOLDED
    assert sum(len(f.report.merged) for f in found if f.report) > 3


@pytest.mark.slow
def test_folding_changes_no_network_of_thousands() -> None:
    assert [f.seed for f in map(check, range(10_000, 13_000)) if f.problem] == []


def test_a_seed_is_the_same_network_each_time() -> None:
    assert all(build(seed) == build(seed) for seed in range(20))


def test_random_networks_hold_most_operators() -> None:
    """What they lack are operators that need inputs or outputs of other types, or old opsets."""
    used = {node.op_type for seed in range(400) for node in build(seed).graph.node}
    assert set(OPERATORS) - used <= {"GroupNormalization", "CastLike", "Upsample", "GlobalLpPool"}
