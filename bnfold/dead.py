"""Layers that data don't reach: what stands before one could be anything, and no output would show it."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import BnfoldError
from .exercise import another
from .graph import Graph, Value
from .inner import chunks, only
from .levels import Truth, plain, varies
from .subject import Subject


def dead_layer(reference: Subject, truth: Truth) -> str:
    """The first layer whose output is the same on different data though data reach it; "" where there is none."""
    try:
        graph, layers = reference.plan().graph, reference.layers()
        alive = {id(v) for v in _fed(graph)}
        names = [v.name for node in graph.nodes for v in node.outputs if id(v) in alive and v.name in layers and node.op != "Barrier"]
        one = truth.feeds[0]
        other = another(reference, one)
        for chunk in chunks(names):
            run = only(reference, chunk)
            first, second = plain(run(one)), plain(run(other))
            for name, array in first.items():
                if array.dtype.kind == "f" and array.size and not varies([array, second[name]]):
                    return layers[name]
    except BnfoldError:
        return ""
    return ""


def _fed(graph: Graph) -> Iterator[Value]:
    """The values that data reach. Where an operator isn't known, what it gives may be a size, so nothing is said of what follows."""
    reached = {v for node in graph.nodes for v in node.inputs if v.producer is None}
    for node in graph.nodes:
        if node.op != "Barrier" and any(v in reached for v in node.inputs):
            reached.update(node.outputs)
            yield from node.outputs
