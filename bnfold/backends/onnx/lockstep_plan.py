"""Which operator runs in which stage: BatchNorms in waves, everything else no earlier than it is worth.

Stage k runs what the inputs of wave k's BatchNorms still lack. So each operator runs once, what stands behind the last BatchNorm
never runs, and between two stages only those values are held that a later one reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from .walk import all_nodes, subgraphs

TINY = {"Shape", "Size", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"}
SMALLER = {"MaxPool", "AveragePool", "LpPool", "ArgMax", "ArgMin", "TopK"}
SMALLER |= {f"Reduce{kind}" for kind in ("Mean", "Max", "Min", "Sum", "SumSquare", "L1", "L2", "LogSum", "LogSumExp", "Prod")}


@dataclass(frozen=True, eq=False)
class Call:
    """One BatchNormalization node whose input is measured. layer: the place of its layer."""

    node: ir.Node
    layer: int

    @property
    def source(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value


@dataclass(eq=False)
class Cut:
    """One stage. nodes: what it runs, in order; reads: the values it takes from before; keeps: what later stages read."""

    calls: list[Call]
    nodes: list[ir.Node] = field(default_factory=list)
    reads: list[ir.Value] = field(default_factory=list)
    makes: list[ir.Value] = field(default_factory=list)  # its results: values that are measured, or that later stages read
    keeps: list[ir.Value] = field(default_factory=list)


def sources(node: ir.Node) -> Iterator[ir.Value]:
    """All values that a node reads, those included that its subgraphs take from outside."""
    yield from (value for value in node.inputs if value is not None)
    for _, graph in subgraphs(node):
        own = set(graph.inputs) | set(graph.initializers.values())
        inner = list(all_nodes(graph))
        for each in inner:
            own.update(each.outputs)
            for _, deeper in subgraphs(each):
                own.update(deeper.inputs)
                own.update(deeper.initializers.values())
        read = [value for each in inner for value in each.inputs if value is not None]
        yield from (value for value in (*read, *graph.outputs) if value not in own)


def cut(graph: ir.Graph, calls: list[Call], is_fixed: Callable[[ir.Value], bool]) -> tuple[list[Cut], set[int]]:
    """The stages of a graph, and the layers of which one call depends on another.

    is_fixed: whether a value is the same for all data; what computes such values belongs to no stage and goes where it is read.
    """
    return _Cutter(graph, calls, is_fixed).cut()


class _Cutter:
    def __init__(self, graph: ir.Graph, calls: list[Call], is_fixed: Callable[[ir.Value], bool]) -> None:
        self._calls = calls
        self._call_of = {call.node: i for i, call in enumerate(calls)}
        self._nodes = [node for node in graph if node.outputs and not all(map(is_fixed, node.outputs))]
        self._reads = {node: [v for v in dict.fromkeys(sources(node)) if not is_fixed(v)] for node in self._nodes}
        self._maker = {value: node for node in self._nodes for value in node.outputs}
        self._behind: dict[ir.Value, int] = {}  # bit i: the value depends on the outcome of call i
        for node in self._nodes:
            mask = 0
            for value in self._reads[node]:
                mask |= self._behind.get(value, 0)
            own = 1 << self._call_of[node] if node in self._call_of else 0
            for value in node.outputs:
                self._behind[value] = mask | own

    def cut(self) -> tuple[list[Cut], set[int]]:
        waves = self._waves()
        wave_of = {call.node: k for k, wave in enumerate(waves) for call in wave}
        runs = self._lazily(waves)
        self._shrink_early(runs, wave_of)

        cuts = [Cut(list(wave)) for wave in waves]
        last: dict[ir.Value, int] = {}  # the last stage that reads or measures a value
        for node, k in runs.items():
            for value in self._reads[node]:
                last[value] = max(last.get(value, k), k)
        for call, k in ((call, k) for k, wave in enumerate(waves) for call in wave):
            last[call.source] = max(last.get(call.source, k), k)
        for node in self._nodes:
            if node in runs:
                cuts[runs[node]].nodes.append(node)
        for k, stage in enumerate(cuts):
            measured = {call.source for call in stage.calls}
            made = [value for node in stage.nodes for value in node.outputs]
            wanted = dict.fromkeys(v for node in stage.nodes for v in self._reads[node])
            wanted.update(dict.fromkeys(call.source for call in stage.calls))
            mine = set(made)
            stage.reads = [value for value in wanted if value not in mine]
            stage.makes = [value for value in made if value in measured or last.get(value, -1) > k]
        data = [value for value in last if value not in self._maker]  # they pass by once, in the first stage
        for k, stage in enumerate(cuts):
            before = [value for earlier in cuts[: k + 1] for value in earlier.makes]
            stage.keeps = [value for value in (*data, *before) if last[value] > k]
        return cuts, self._dependent()

    def _dependent(self) -> set[int]:
        masks: dict[int, int] = {}
        for i, call in enumerate(self._calls):
            masks[call.layer] = masks.get(call.layer, 0) | 1 << i
        return {call.layer for call in self._calls if self._behind.get(call.source, 0) & masks[call.layer]}

    def _waves(self) -> list[list[Call]]:
        """A call is ready once all that it depends on are measured. Of a layer, all calls that no other one of its own stands before go
        together, so that they are pooled before one of them is normalised; two layers that wait for each other don't wait.
        """
        behind = [self._behind.get(call.source, 0) for call in self._calls]
        left = set(range(len(self._calls)))
        waves = []
        while left:
            pending = sum(1 << i for i in left)
            ready = {i for i in left if not behind[i] & pending}
            of_layer: dict[int, int] = {}
            for i in left:
                of_layer[self._calls[i].layer] = of_layer.get(self._calls[i].layer, 0) | 1 << i
            waiting = {self._calls[i].layer for i in left - ready if not behind[i] & of_layer[self._calls[i].layer]}
            wave = sorted(i for i in ready if self._calls[i].layer not in waiting) or sorted(ready)
            waves.append([self._calls[i] for i in wave])
            left -= set(wave)
        return waves

    def _lazily(self, waves: list[list[Call]]) -> dict[ir.Node, int]:
        """For each node that is needed at all, the first stage whose BatchNorms need it."""
        runs: dict[ir.Node, int] = {}
        for k, wave in enumerate(waves):
            stack = [self._maker[call.source] for call in wave if call.source in self._maker]
            while stack:
                node = stack.pop()
                if node not in runs:
                    runs[node] = k
                    stack.extend(self._maker[value] for value in self._reads[node] if value in self._maker)
        return runs

    def _shrink_early(self, runs: dict[ir.Node, int], wave_of: dict[ir.Node, int]) -> None:
        """Run what makes a large value small as soon as it can, where the large value would be held for it alone (or nearly)."""
        earliest: dict[ir.Node, int] = {}
        for node in self._nodes:
            at = max((earliest[self._maker[v]] for v in self._reads[node] if v in self._maker), default=0)
            earliest[node] = max(at, wave_of[node] + 1) if node in wave_of else at
        users: dict[ir.Value, list[ir.Node]] = {}
        for node in runs:
            for value in self._reads[node]:
                users.setdefault(value, []).append(node)
        for node in self._nodes:
            if node not in runs or runs[node] <= (at := earliest[node]):
                continue
            alone = all(runs[user] <= at for value in self._reads[node] for user in users[value] if user is not node)
            if node.op_type in TINY or (node.op_type in SMALLER and alone):
                stack = [node]
                while stack:
                    current = stack.pop()
                    if runs[current] > at:
                        runs[current] = at
                        stack.extend(self._maker[value] for value in self._reads[current] if value in self._maker)
