"""Which operator runs in which stage: BatchNorms in waves, everything else no earlier than it is worth.

Stage k runs what the inputs of wave k's BatchNorms still lack. What stands behind the last BatchNorm never runs, and between two stages
only those values are held that a later one reads. Each operator runs once, but for the cheap ones that make a large value out of small
ones: that costs less than to hold the large value, so the small ones are held, and the operator runs once more where its value is read.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

N = TypeVar("N", bound=Hashable)  # an operator of some framework
V = TypeVar("V", bound=Hashable)  # a value of it

# The multiply-adds that are worth one byte less to hold. To make its page, write it and read it again takes as long as 10 of them where
# pages come cheap, and as 100 in a virtual machine; and what isn't held leaves room for more data before they spill.
PER_BYTE = 32


@dataclass(frozen=True, eq=False)
class Call(Generic[N, V]):
    """One BatchNorm whose input is measured. node: the operator that normalises; source: its input; layer: the place of its layer.

    through: the operator that makes its input from `source`, where the moments are known from those of `source` without running it.
    """

    node: N
    source: V
    layer: int
    through: N | None = None


@dataclass(frozen=True, eq=False)
class Operation(Generic[N, V]):
    """An operator whose outcome depends on the data. reads: those of its inputs that do, each once.

    shrinks: 2 where the output is next to nothing (a global pool), 1 where it is smaller than the input, else 0. work: the multiply-adds
    of one that may run twice, which makes one value and reads nothing beside `reads` but what is stored; None for all others.
    """

    node: N
    reads: tuple[V, ...]
    makes: tuple[V, ...]
    shrinks: int = 0
    work: int | None = None


@dataclass(eq=False)
class Cut(Generic[N, V]):
    """One stage. nodes: what it runs, in order; reads: the values it takes from before; keeps: what later stages read."""

    calls: list[Call[N, V]]
    nodes: list[N] = field(default_factory=list)
    reads: list[V] = field(default_factory=list)
    makes: list[V] = field(default_factory=list)  # its results: values that are measured, or that later stages read
    keeps: list[V] = field(default_factory=list)


def cut(
    operations: Sequence[Operation[N, V]], calls: Sequence[Call[N, V]], sizes: Mapping[V, int] | None = None
) -> tuple[list[Cut[N, V]], set[int]]:
    """The stages of a network, and the layers of which one call depends on another.

    operations: in topological order; what computes values that are the same for all data is none of them, and goes where it is read.
    sizes: of values, in bytes, as far as they are known, at the size of the data at which `Operation.work` is counted. Without them every
    operator runs once.
    """
    return _Cutter(operations, calls, sizes or {}).cut()


class _Cutter(Generic[N, V]):
    def __init__(self, operations: Sequence[Operation[N, V]], calls: Sequence[Call[N, V]], sizes: Mapping[V, int]) -> None:
        self._calls, self._sizes = calls, sizes
        self._call_of = {call.node: i for i, call in enumerate(calls)}
        self._nodes = [each.node for each in operations]
        self._operation = {each.node: each for each in operations}
        self._reads = {each.node: each.reads for each in operations}
        self._maker = {value: each.node for each in operations for value in each.makes}
        self._behind: dict[V, int] = {}  # bit i: the value depends on the outcome of call i
        for node in self._nodes:
            mask = 0
            for value in self._reads[node]:
                mask |= self._behind.get(value, 0)
            own = 1 << self._call_of[node] if node in self._call_of else 0
            for value in self._operation[node].makes:
                self._behind[value] = mask | own

    def cut(self) -> tuple[list[Cut[N, V]], set[int]]:
        waves = self._waves()
        wave_of = {call.node: k for k, wave in enumerate(waves) for call in wave}
        runs = self._lazily(waves)
        self._shrink_early(runs, wave_of)

        cuts: list[Cut[N, V]] = [Cut(list(wave)) for wave in waves]
        last: dict[V, int] = {}  # the last stage that reads or measures a value
        for node, k in runs.items():
            for value in self._reads[node]:
                last[value] = max(last.get(value, k), k)
        for call, k in ((call, k) for k, wave in enumerate(waves) for call in wave):
            last[call.source] = max(last.get(call.source, k), k)
        again = self._again(runs, last, waves)
        for node in self._nodes:
            if node in runs:
                cuts[runs[node]].nodes.append(node)
                if node in again:
                    cuts[again[node]].nodes.append(node)
        for k, stage in enumerate(cuts):
            measured = {call.source for call in stage.calls}
            made = [value for node in stage.nodes for value in self._operation[node].makes]
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

    def _again(self, runs: dict[N, int], last: dict[V, int], waves: list[list[Call[N, V]]]) -> dict[N, int]:
        """The operators that run again, and in which stage, since what they read is cheaper to hold. last: changed accordingly."""
        reading: dict[V, set[int]] = {}
        for node, k in runs.items():
            for value in self._reads[node]:
                reading.setdefault(value, set()).add(k)
        for k, wave in enumerate(waves):
            for call in wave:
                reading.setdefault(call.source, set()).add(k)
        again: dict[N, int] = {}
        remade: set[V] = set()
        for node in self._nodes:
            if node not in runs or (work := self._operation[node].work) is None:
                continue
            (made,), reads = self._operation[node].makes, self._reads[node]
            later = [k for k in reading.get(made, ()) if k > runs[node]]
            if len(later) != 1 or not remade.isdisjoint(reads) or not all(value in self._sizes for value in (made, *reads)):
                continue
            saved = self._sizes[made] - sum(self._sizes[value] for value in reads if last[value] < later[0])
            if saved > 0 and work <= PER_BYTE * saved:
                again[node] = later[0]
                remade.add(made)
                last[made] = runs[node]
                for value in reads:
                    last[value] = max(last[value], later[0])
        return again

    def _dependent(self) -> set[int]:
        masks: dict[int, int] = {}
        for i, call in enumerate(self._calls):
            masks[call.layer] = masks.get(call.layer, 0) | 1 << i
        return {call.layer for call in self._calls if self._behind.get(call.source, 0) & masks[call.layer]}

    def _waves(self) -> list[list[Call[N, V]]]:
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

    def _lazily(self, waves: list[list[Call[N, V]]]) -> dict[N, int]:
        """For each node that is needed at all, the first stage whose BatchNorms need it."""
        runs: dict[N, int] = {}
        for k, wave in enumerate(waves):
            stack = [self._maker[call.source] for call in wave if call.source in self._maker]
            while stack:
                node = stack.pop()
                if node not in runs:
                    runs[node] = k
                    stack.extend(self._maker[value] for value in self._reads[node] if value in self._maker)
        return runs

    def _shrink_early(self, runs: dict[N, int], wave_of: dict[N, int]) -> None:
        """Run what makes a large value small as soon as it can, where the large value would be held for it alone (or nearly)."""
        earliest: dict[N, int] = {}
        for node in self._nodes:
            at = max((earliest[self._maker[v]] for v in self._reads[node] if v in self._maker), default=0)
            earliest[node] = max(at, wave_of[node] + 1) if node in wave_of else at
        users: dict[V, list[N]] = {}
        for node in runs:
            for value in self._reads[node]:
                users.setdefault(value, []).append(node)
        for node in self._nodes:
            if node not in runs or runs[node] <= (at := earliest[node]):
                continue
            alone = all(runs[user] <= at for value in self._reads[node] for user in users[value] if user is not node)
            shrinks = self._operation[node].shrinks
            if shrinks == 2 or (shrinks == 1 and alone):
                stack = [node]
                while stack:
                    current = stack.pop()
                    if runs[current] > at:
                        runs[current] = at
                        stack.extend(self._maker[value] for value in self._reads[current] if value in self._maker)
