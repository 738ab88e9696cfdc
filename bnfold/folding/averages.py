"""A convolution that only mixes channels, behind the average that stands behind it, where that takes fewer multiply-adds: a DenseNet's
transitions take a quarter of them. Its weights stay as they are, and so does its bias:

    mean(W*x + b) = W*mean(x) + b        for any mean with weights that sum to 1, over windows or over all places
"""

from __future__ import annotations

from collections.abc import Container

from bnfold.algebra.composition import carried, mixed_axis
from bnfold.algebra.graph import Graph, Node
from bnfold.report import Composed, Counts

from .duplicate import multiply_adds


def defer(graph: Graph, fixed: Container[Node]) -> tuple[list[tuple[Node, Node]], list[Composed]]:
    """Let such convolutions be worked out last: each with its average, in order, and rows for the report. fixed: operators that stay."""
    moved: list[tuple[Node, Node]] = []
    rows: dict[Node, Composed] = {}
    for node in [node for node in graph.nodes if node.op == "Conv" and node not in fixed]:
        while (average := _average(graph, node)) is not None:
            before = rows[node].multiply_adds if node in rows else Counts(multiply_adds(node) or 0, 0)
            _swap(graph, node, average)
            moved.append((node, average))
            assert before is not None
            counts = Counts(before.before, multiply_adds(node) or 0)
            rows[node] = Composed((node.name,), node.name, multiply_adds=counts, behind=average.name)
    if moved:
        graph.number()
    return moved, list(rows.values())


def _average(graph: Graph, node: Node) -> Node | None:
    """What alone reads a convolution, and may as well stand before it; None where it is something else, or nothing is saved."""
    value = node.output
    average = value.users[0][0] if len(value.users) == 1 and not value.is_output and not value.is_sized else None
    if average is None or average.op != "Average" or mixed_axis(node) is None or carried(average, 1) != 1 or graph.rigid(average):
        return None
    same = average.output.rank == value.rank and all(
        average.attrs.get(key) == node.attrs.get(key) for key in ("limit", "cloneable", "scope")
    )
    if not same or not node.attrs["cloneable"]:
        return None
    work = [(multiply_adds(node, probe), multiply_adds(node, probe, output=average.output)) for probe in range(len(value.probes or ()))]
    less = all(now is not None and then is not None and then < now for now, then in work)
    return average if work and less else None


def _swap(graph: Graph, node: Node, average: Node) -> None:
    """Let the average read what the convolution does, and that what the average gives."""
    (source,), inner, outer = node.inputs, node.output, average.output
    size = node.params["weight"].shape[1] * node.attrs["groups"]
    source.users = [(average, 0) if user is node else (user, i) for user, i in source.users]
    inner.users = [(node, 0)]
    average.inputs, average.outputs, node.inputs, node.outputs = [source], [inner], [inner], [outer]
    inner.producer, outer.producer = average, node
    inner.probes = tuple((sizes[0], size, *sizes[2:]) for sizes in outer.probes or ()) or None
    graph.nodes.remove(node)
    graph.nodes.insert(graph.nodes.index(average) + 1, node)
