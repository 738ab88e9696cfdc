"""Double an operator whose output has other users too, so that a BatchNorm behind it can fold into the copy.

It costs the operator's work a second time, so it is done on request only. Clones are made in the graph at once and undone where the
fold comes to nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from bnfold.algebra.affine import Blocked
from bnfold.algebra.graph import Graph, Node, Value

LIMIT = 4  # operators doubled for one site


class Shared(Blocked):
    """Blocked by another user of a value; `uses` are the uses that want the map."""

    def __init__(self, reason: str, value: Value, uses: list[tuple[Node, int]]) -> None:
        super().__init__(reason)
        self.value = value
        self.uses = uses


class Clones:
    """The clones made for one site."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made: list[tuple[Node, Node]] = []  # (original, copy)

    def add(self, shared: Shared) -> bool:
        """Double the producer of a shared value for those who want the map; False where that can't be."""
        node = shared.value.producer
        if node is None or len(self.made) == LIMIT or not node.attrs.get("cloneable") or not shared.uses:
            return False
        if node.op == "Affine" or not all(user.attrs.get("cloneable", True) for user, _ in shared.uses):
            return False  # a second BatchNorm for the sake of one is nothing won; a Split is several moves in one operator
        if any(v.producer is not None and v.producer.op == "Constant" for v in node.inputs):
            return False
        value = Value(f"{shared.value.name}.clone", shared.value.probes, shared.value.rank)
        params = {role: dataclasses.replace(p) for role, p in node.params.items()}
        readers = [(user.native, i) for user, i in shared.uses]
        native = dataclasses.replace(node.native, clone_of=node.native, readers=readers)
        copy = Node(node.op, f"{node.name}.clone", list(node.inputs), [value], dict(node.attrs), params, native, label=node.label)
        self._move_uses(shared.uses, shared.value, value)
        self.graph.nodes.insert(self.graph.nodes.index(node) + 1, copy)
        self.graph.number()
        self.made.append((node, copy))
        return True

    @staticmethod
    def _move_uses(uses: list[tuple[Node, int]], old: Value, new: Value) -> None:
        for user, i in uses:
            user.inputs[i] = new
            old.users.remove((user, i))
            new.users.append((user, i))

    def undo(self) -> None:
        for node, copy in reversed(self.made):
            self._move_uses(list(copy.output.users), copy.output, node.output)
            for i, value in enumerate(copy.inputs):
                value.users.remove((copy, i))
            for role, param in copy.params.items():
                if param.tensor is not None:
                    param.tensor.users.remove((copy, role))
            self.graph.take_out(copy)
        self.made.clear()
        self.graph.number()

    @property
    def note(self) -> str:
        """What the clones cost."""
        names = ", ".join(f"{node.label} {node.name}" for node, _ in self.made)
        work = [multiply_adds(node) for node, _ in self.made]
        cost = "" if None in work else f", {sum(n for n in work if n is not None):,} multiply-adds more for each sample"
        return f"doubles {names}{cost}"


def multiply_adds(
    node: Node, probe: int = 0, *, shape: Sequence[int] | None = None, groups: int | None = None, output: Value | None = None
) -> int | None:
    """Multiplications that an operator with weights does for one sample, at a probe's sizes; None where they aren't known.

    shape, groups, output: what it would have instead of its own weight, groups and output.
    """
    if node.op == "Recurrent":
        return None
    if "weight" not in node.params:
        return 0
    transposed = node.attrs.get("transposed", False)  # its taps are spread from each element that it reads
    probes = (node.inputs[0] if transposed else output or node.output).probes
    if probes is None or None in probes[probe]:
        return None
    shape, letters = shape or node.params["weight"].shape, node.attrs.get("w", "")
    groups = groups or node.attrs.get("groups", 1)
    if node.op == "Conv":
        taps = shape[0] // groups * int(np.prod(shape[2:])) if transposed else int(np.prod(shape[1:]))
    else:
        taps = int(np.prod([n for n, name in zip(shape, letters, strict=True) if name not in node.attrs["y"]]))
    return int(np.prod([n for n in probes[probe][1:] if n is not None])) * taps
