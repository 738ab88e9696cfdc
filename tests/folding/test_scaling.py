"""Work that grows like the graph, not like its square: counted in calls of functions, which a loaded machine doesn't change."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from bench.scaling import SHAPES, graph, steps
from cases.builder import Net

import bnfold

SIZE = 60


def calls(shape: str, size: int) -> dict[str, int]:
    """How many functions each step calls."""
    found = {}
    for name, run in steps(graph(shape, size)).items():
        count = 0

        def counting(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(counting)
        try:
            run()
        finally:
            sys.setprofile(None)
        found[name] = count
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_twice_the_graph_takes_twice_the_work(shape: str) -> None:
    calls(shape, 2)  # what happens once
    one, two = calls(shape, SIZE), calls(shape, 2 * SIZE)
    assert {name: round(two[name] / one[name], 2) for name in one if two[name] > 2.15 * one[name]} == {}


def test_what_stands_beside_a_batchnorm_may_be_deeper_than_the_stack() -> None:
    net = Net("deep")
    x = y = net.conv(net.input("N", 2, 4, 4), 2, 2, 1)
    for _ in range(sys.getrecursionlimit()):
        y = net.transpose(y, 0, 1, 3, 2)
    net.output(net.bn(x, 2), y)
    (layer,) = bnfold.inspect(net.model()).layers
    assert "is also used by Transpose" in layer.reason


def test_what_computes_a_weight_may_be_deeper_than_the_stack() -> None:
    net = Net("deep")
    w = net.filters(2, 2, 1, 1)
    for _ in range(sys.getrecursionlimit()):
        w = net.op("Neg", w)
    net.output(net.bn(net.conv(net.input("N", 2, 4, 4), 2, 2, 1, weight=w), 2))
    assert bnfold.fuse(net.model())[1].batchnorms.after == 0
