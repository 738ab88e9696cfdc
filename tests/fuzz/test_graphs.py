"""A few hundred random networks in each run of the tests; thousands with `python -m tests.fuzz graphs`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import Net
from compare import difference, feeds, run_double

import bnfold
from bnfold.backends.onnx.lowering.table import OPERATORS

from .graphs import build, share_folded, tried

COUNT = 300
BLOCK = 50
FOLDED = 0.55  # the share of BatchNorms that must fold, by which no test here can pass by folding nothing


@pytest.mark.parametrize("first", range(0, COUNT, BLOCK))
def test_folding_changes_no_random_network(first: int) -> None:
    found = [tried(seed) for seed in range(first, first + BLOCK)]
    failed = {f.seed: f.problem for f in found if f.problem}
    assert not failed, f"look closer with: python -m tests.fuzz graphs --only {min(failed)}\n{failed}"
    assert share_folded([f.report for f in found if f.report]) > FOLDED
    assert sum(len(f.report.merged) for f in found if f.report) > 3


@pytest.mark.slow
def test_folding_changes_no_network_of_thousands() -> None:
    assert [f.seed for f in map(tried, range(10_000, 13_000)) if f.problem] == []


def test_an_output_keeps_its_shape_where_a_clone_and_a_merge_number_operators_anew() -> None:
    assert not tried(9_000_254).problem


def test_a_seed_is_the_same_network_each_time() -> None:
    assert all(build(seed) == build(seed) for seed in range(20))


def test_random_networks_hold_most_operators() -> None:
    """What they lack are operators that need inputs or outputs of other types, or old opsets."""
    used = {node.op_type for seed in range(400) for node in build(seed).graph.node}
    assert set(OPERATORS) - used <= {
        "GroupNormalization",
        "CastLike",
        "Upsample",
        "GlobalLpPool",
        "DeformConv",
        "GridSample",
        "GatherElements",
        "GatherND",
        "ScatterND",
    }


# --- what they found, each reduced to a few operators ------------------------------------------------------------------------------


def constant_twice(net: Net) -> None:
    """A constant that stands twice in a Concat becomes two."""
    x, c = net.conv(net.input(3, 2, 4), 2, 2, 1, dims=1), net.weight(net.normal(3, 2, 4))
    net.output(net.bn(net.op("Concat", x, c, c, axis=1), 6))


def channels_as_rows(net: Net) -> None:
    """A scale that varies along the rows of a product passes it; its bias must not be scaled."""
    x, w, bias = net.bn(net.input(4, 3), 3), net.weight(net.normal(4, 5)), net.weight(net.normal(5))
    net.output(net.gemm(net.reshape(net.op("Gemm", x, w, bias, transA=1), 1, 15), 15, 2))


def channels_as_rows_unshifted(net: Net) -> None:
    x, w, bias = net.bn(net.input(4, 3), 3, shift=False), net.weight(net.normal(4, 5)), net.weight(net.normal(5))
    net.output(net.gemm(net.transpose(net.op("Gemm", x, w, bias, transA=1), 1, 0), 3, 2))


def one_matrix_for_the_batch(net: Net) -> None:
    """Only the left factor has the channels."""
    y = net.op("Sigmoid", net.input(5, 3, name="y"))
    net.output(net.bn(net.op("MatMul", net.conv(net.input("N", 2, 4, 5), 2, 3, 1), y), 3, shift=False))


def reader_behind_a_folded_batchnorm(net: Net) -> None:
    """Who reads a doubled layer may do so through a BatchNorm that has gone."""
    y = net.gemm(net.input("N", 4), 4, 6)
    net.output(net.bn(net.bn(y, 6), 6), net.op("Sigmoid", net.bn(y, 6)))


def part_of_a_split(net: Net) -> None:
    """A Split is several moves, yet reads one value."""
    y = net.conv(net.input("N", 4, 5, 5), 4, 6)
    one, rest = net.split(y, 1, 1, 5)
    net.output(net.bn(one, 1), rest, net.op("Sigmoid", y))


def same_value_twice(net: Net) -> None:
    y = net.conv(net.input("N", 4, 5, 5), 4, 6)
    net.output(net.bn(net.op("Add", y, y), 6), net.op("Sigmoid", y))


def batchnorms_that_share_a_batchnorm(net: Net) -> None:
    """A BatchNorm folded into the double of another one is nothing won."""
    y = net.bn(net.op("Sigmoid", net.input("N", 4)), 4)
    net.output(net.bn(net.unsqueeze(y, 2), 4), net.op("MatMul", y, net.weight(net.normal(4, 3))))


def two_behind_a_pad(net: Net) -> None:
    """The fill of the second is what the first made of it."""
    y = net.pad(net.conv(net.input("N", 4, "L"), 4, 1, 1, dims=1), 0, 0, 1, 0, 0, 1, value=0.7)
    net.output(net.bn(net.bn(y, 1), 1))


def merged_then_folded(net: Net) -> None:
    """Of two calls of one BatchNorm behind a sum, what a merge lets fold is reported call by call."""
    x = net.relu(net.input("N", 4, "L"))
    y, params = net.op("Add", net.conv(x, 4, 4, 3, dims=1, pads=1), x), net.bn_params(4)
    z = net.bn(y, params=params)
    net.output(z, net.bn(z, params=params))


def behind_what_nobody_reads(net: Net) -> None:
    """A part of the network that no output needs stays as it is, whatever folds in it."""
    x = net.input("N", 4, 6, 6)
    y = net.bn(net.op("Sigmoid", net.bn(net.op("Sigmoid", x), 4)), 4)
    net.bn(net.op("Tanh", y), 4)
    net.output(net.bn(net.conv(x, 4, 3), 3))


def dead_along_the_batch_of_a_product(net: Net) -> None:
    """The channels of the BatchNorm are no channels of the product that takes it."""
    params = net.bn_params(2)
    gamma = next(t for t in net.initializers if t.name == params[0])
    gamma.raw_data = net.rng.uniform(0.5, 1.5, 1).tobytes() + bytes(8)
    net.output(net.bn(net.op("MatMul", net.input("N", 2, 3, 4), net.matrix(2, 4, 5)), params=params))


FOUND = [
    (dead_along_the_batch_of_a_product, 0),
    (behind_what_nobody_reads, 2),
    (two_behind_a_pad, 0),
    (merged_then_folded, None),
    (constant_twice, 0),
    (channels_as_rows, 0),
    (channels_as_rows_unshifted, None),
    (one_matrix_for_the_batch, 0),
    (reader_behind_a_folded_batchnorm, None),
    (part_of_a_split, None),
    (same_value_twice, None),
    (batchnorms_that_share_a_batchnorm, None),
]


@pytest.mark.parametrize("options", [{}, {"clone": True}, {"drop_dead": True, "clamps": True}], ids=" ".join)
@pytest.mark.parametrize(("draw", "left"), FOUND, ids=[draw.__name__ for draw, _ in FOUND])
def test_what_random_networks_found(draw: Callable[[Net], None], left: int | None, options: dict[str, bool]) -> None:
    """left: how many BatchNorms stay, None where that is not the point."""
    net = Net(draw.__name__, dtype="float64")
    draw(net)
    model = net.model()
    fused, report = bnfold.fuse(model, check=False, **options)
    data = feeds(model)
    assert difference(run_double(model, data), run_double(fused, data)) < 1e-12
    assert sum(layer.verdict == "kept" for layer in report.layers) == report.batchnorms.after
    assert left is None or report.batchnorms.after == left
