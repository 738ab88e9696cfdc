"""Work that grows like the graph, not like its square: counted in calls of functions, which a loaded machine doesn't change."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from bench.scaling import SHAPES, graph, steps

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
