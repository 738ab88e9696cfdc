"""Which operator runs in which stage: BatchNorms in waves, everything else no earlier than it is worth.

Stage k runs what the inputs of wave k's BatchNorms still lack. What stands behind the last BatchNorm never runs, and between two stages
only those values are held that a later one reads. Each operator runs once, but for the cheap ones that make a large value out of small
ones: that costs less than to hold the large value, so the small ones are held, and the operator runs once more where its value is read.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

N = TypeVar("N", bound=Hashable)  # an operator of some framework
V = TypeVar("V", bound=Hashable)  # a value of it

# The multiply-adds that are worth one byte less to hold. To make its page, write it and read it again takes as long as 10 of them where
# pages come cheap, and as 100 in a virtual machine; and what isn't held leaves room for more data before they spill.
PER_BYTE = 32


@dataclass(frozen=True, eq=False)
class NormCall(Generic[N, V]):
    """One BatchNorm whose input is measured. node: the operator that normalises; source: its input; layer: the place of its layer.

    per_activation, axis: see `protocol.Reading`. through: the operator that makes its input from `source`, where the moments are known from
    those of `source` without running it.
    """

    node: N
    source: V
    layer: int
    per_activation: bool = False
    through: N | None = None
    axis: int = 1


@dataclass(frozen=True, eq=False)
class Operation(Generic[N, V]):
    """An operator whose outcome depends on the data. reads: those of its inputs that do, each once.

    shrinks: 2 where the output is next to nothing (a global pool), 1 where it is smaller than the input, else 0. work: the multiply-adds
    of one that may run twice, which makes one value and reads nothing beside `reads` but what is stored; None for all others. pointwise:
    whether it is a pointwise convolution that need not run for the moments behind it, and one operator alone reads what it makes.
    """

    node: N
    reads: tuple[V, ...]
    makes: tuple[V, ...]
    shrinks: int = 0
    work: int | None = None
    pointwise: bool = False


@dataclass(frozen=True, eq=False)
class Cut(Generic[N, V]):
    """One stage. nodes: what it runs, in order; reads: the values that it takes from before; makes: its results, which are measured or
    which later stages read; keeps: all that later stages read.
    """

    calls: list[NormCall[N, V]]
    nodes: list[N]
    reads: list[V]
    makes: list[V]
    keeps: list[V]


def cut(
    operations: Sequence[Operation[N, V]], calls: Sequence[NormCall[N, V]], sizes: Mapping[V, int] | None = None
) -> tuple[list[Cut[N, V]], set[int]]:
    """The stages of a network, and the layers of which one call depends on another.

    operations: in topological order; what computes values that are the same for all data is none of them, and goes where it is read.
    sizes: of values, in bytes, as far as they are known, at the size of the data at which `Operation.work` is counted. Without them every
    operator runs once.
    """
    return _Cutter(operations, calls, sizes or {}).cut()


def _places(bits: int) -> Iterator[int]:
    """Those of the bits that are set, in order."""
    while bits:
        yield (bits & -bits).bit_length() - 1
        bits &= bits - 1


class _Cutter(Generic[N, V]):
    def __init__(self, operations: Sequence[Operation[N, V]], calls: Sequence[NormCall[N, V]], sizes: Mapping[V, int]) -> None:
        self._operations, self._calls, self._sizes = operations, calls, sizes
        self._maker = {value: each for each in operations for value in each.makes}
        bits = {call.node: 1 << i for i, call in enumerate(calls)}
        self._of_layer: dict[int, int] = {}
        for call in calls:
            self._of_layer[call.layer] = self._of_layer.get(call.layer, 0) | bits[call.node]
        self._behind: dict[V, int] = {}  # bit i: the value depends on the outcome of call i
        self._next: dict[V, int] = {}  # bit i: and no other call stands between
        for each in operations:
            mask = bits.get(each.node, 0)
            near = 0
            for value in each.reads:
                mask |= self._behind.get(value, 0)
                near |= self._next.get(value, 0)
            self._behind.update(dict.fromkeys(each.makes, mask))
            self._next.update(dict.fromkeys(each.makes, bits.get(each.node, near)))

    def cut(self) -> tuple[list[Cut[N, V]], set[int]]:
        waves = self._waves()
        runs: dict[Operation[N, V], int] = {}  # what is needed at all, and the first stage whose BatchNorms need it
        for k, wave in enumerate(waves):
            self._run(runs, k, [call.source for call in wave])
        self._shrink_early(runs, waves)
        read_in: dict[V, set[int]] = {}  # the stages that read or measure a value
        for each, k in runs.items():
            for value in each.reads:
                read_in.setdefault(value, set()).add(k)
        for k, wave in enumerate(waves):
            for call in wave:
                read_in.setdefault(call.source, set()).add(k)
        last = {value: max(stages) for value, stages in read_in.items()}
        again = self._again(runs, read_in, last)

        parts: list[list[Operation[N, V]]] = [[] for _ in waves]
        for each in self._operations:
            for k in [runs[each], *again.get(each, ())] if each in runs else ():
                parts[k].append(each)
        cuts = []
        alive = [value for value in last if value not in self._maker]  # the data: they pass by once, in the first stage
        for k, (wave, part) in enumerate(zip(waves, parts, strict=True)):
            measured = dict.fromkeys(call.source for call in wave)
            made = dict.fromkeys(value for each in part for value in each.makes)
            reads = [v for v in dict.fromkeys([*(v for each in part for v in each.reads), *measured]) if v not in made]
            makes = [value for value in made if value in measured or last.get(value, -1) > k]
            alive = [value for value in (*alive, *makes) if last[value] > k]
            cuts.append(Cut(wave, [each.node for each in part], reads, makes, alive))
        return cuts, {call.layer for call in self._calls if self._behind.get(call.source, 0) & self._of_layer[call.layer]}

    def _waves(self) -> list[list[NormCall[N, V]]]:
        """A call is ready once all that it depends on are measured. Of a layer, all calls that no other one of its own stands before go
        together, so that they are pooled before one of them is normalised; two layers that wait for each other don't wait.
        """
        behind = [self._behind.get(call.source, 0) for call in self._calls]
        layers = [call.layer for call in self._calls]
        next_to = [list(_places(self._next.get(call.source, 0))) for call in self._calls]  # the calls that it waits for, but for theirs
        lacks = [len(each) for each in next_to]
        for_it: list[list[int]] = [[] for _ in self._calls]
        for i, each in enumerate(next_to):
            for j in each:
                for_it[j].append(i)
        pending = (1 << len(self._calls)) - 1
        ready = [i for i, count in enumerate(lacks) if not count]
        waves = []
        while ready:
            open_ = {layer: self._of_layer[layer] & pending for layer in {layers[i] for i in ready}}
            waiting = {
                layer
                for layer, calls in open_.items()
                if calls.bit_count() > 1 and any(lacks[i] and not behind[i] & calls for i in _places(calls))
            }
            wave = [i for i in ready if layers[i] not in waiting] or ready
            waves.append([self._calls[i] for i in wave])
            ready = sorted({*ready} - {*wave})
            for i in wave:
                pending ^= 1 << i
                for j in for_it[i]:
                    lacks[j] -= 1
                    if not lacks[j]:
                        ready.append(j)
            ready.sort()
        return waves

    def _run(self, runs: dict[Operation[N, V], int], k: int, values: Sequence[V]) -> None:
        """Run what makes these values, and what that needs, in a stage no later than k."""
        stack = list(values)
        while stack:
            each = self._maker.get(stack.pop())
            if each is not None and runs.get(each, k + 1) > k:
                runs[each] = k
                stack.extend(each.reads)

    def _shrink_early(self, runs: dict[Operation[N, V], int], waves: list[list[NormCall[N, V]]]) -> None:
        """Run what makes a large value small as soon as it can, where the large value would be held for it alone (or nearly)."""
        behind_wave = {call.node: k + 1 for k, wave in enumerate(waves) for call in wave}
        earliest: dict[V, int] = {}
        users: dict[V, list[Operation[N, V]]] = {}
        for each in self._operations:
            at = max([behind_wave.get(each.node, 0), *(earliest.get(value, 0) for value in each.reads)])
            earliest.update(dict.fromkeys(each.makes, at))
            for value in each.reads if each in runs else ():
                users.setdefault(value, []).append(each)
        for each in self._operations:
            at = earliest[each.makes[0]]
            if each.shrinks and each in runs and runs[each] > at:
                alone = all(runs[user] <= at for value in each.reads for user in users[value] if user is not each)
                if each.shrinks == 2 or alone:
                    self._run(runs, at, each.makes)

    def _again(self, runs: dict[Operation[N, V], int], read_in: dict[V, set[int]], last: dict[V, int]) -> dict[Operation[N, V], list[int]]:
        """The operators that run again, and in which stage, since what they read is cheaper to hold. last: changed accordingly."""
        again: dict[Operation[N, V], list[int]] = {}
        remade: set[V] = set()
        for each in self._operations:
            if each not in runs or each.work is None:
                continue
            (made,), reads = each.makes, each.reads
            later = [k for k in read_in.get(made, ()) if k > runs[each]]
            if len(later) != 1 or not remade.isdisjoint(reads) or not all(value in self._sizes for value in (made, *reads)):
                continue
            saved = self._sizes[made] - sum(self._sizes[value] for value in reads if last[value] < later[0])
            if saved > 0 and each.work <= PER_BYTE * saved:
                again[each] = later
                remade.add(made)
                last[made] = runs[each]
                last.update((value, max(last[value], later[0])) for value in reads)
        return again
