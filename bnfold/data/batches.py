"""The user's data as batches: the samples of a source, cut to the size that is asked for, as often as they are wanted.

The sample axis is axis 0. An input whose first axis is fixed while another input's is dynamic, and one without axes, holds no samples: it
goes along with every batch. Where no rows of the inputs are samples (a graph's nodes), a batch is never cut nor joined: it is one sample.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bnfold.errors import DataError, UsageError
from bnfold.text import counted

from .corrupt import MAX_BAD, Bad, BadSample, CorruptError
from .inputs import Counted, Inputs, joined
from .prefetch import in_pool, read_ahead
from .samples import Run
from .source import BATCH_SIZE, Chunk, Source
from .spec import Array, InputSpec


@dataclass(frozen=True, eq=False)
class Part:
    """Some samples of a batch. place: that of the first of them in the data. count: how many they are."""

    chunk: Chunk
    place: int
    count: int


class Data:
    """Batches by input name, as often as they are asked for.

    description: where the data come from, in a line. notes: what the user should know about them.
    samples, labels: how many samples a pass goes through, and their classes (integers, one for each). Arrays and images know both at once.
    Of iterables, functions, folders of arrays and tars `samples` is None until a pass is complete; asking for `labels` makes that pass
    where the first batch has some, but of a generator, which can be read only once, they are None until it has been read. A pass may add a
    note.
    bad: the images that couldn't be decoded, as far as they were read. They count among samples and labels, and their batches are smaller
    for them; so labels go with samples by `labelled` alone. max_bad: how many are allowed, a number or a percentage of all.
    classes: how many there are, where the labels are places among them: of the sub-folders of a folder of images.
    shard: (i, n) leaves batches i, i + n, i + 2n, ... of those that are cut without it, and makes no other; samples, labels and limits are
    those of the whole. Where there are fewer than n batches, some shards are empty.
    run: the model, which is asked where the inputs' shapes don't tell which rows are samples (see `samples`).
    What takes time to read is read in a background thread, two batches ahead; a generator of the user's is read only as it is asked for.
    Raises DataError, when opened or when iterated, for data that don't fit; UsageError for a batch size or a count below 1.
    """

    def __init__(
        self,
        source: Source,
        inputs: Sequence[InputSpec],
        *,
        batch_size: int | None = None,
        samples: int | None = None,
        shard: tuple[int, int] = (0, 1),
        max_bad: int | str = MAX_BAD,
        run: Run | None = None,
    ) -> None:
        for option, value in (("batch size", batch_size), ("number of samples", samples)):
            if value is not None and value < 1:
                raise UsageError(f"the {option} is {value}; it must be 1 or more")
        if not 0 <= shard[0] < shard[1]:
            raise UsageError(f"the shard is {shard[0]} of {shard[1]}; it must be one of 0 to n - 1, of n")
        self._settings: dict[str, Any] = {"batch_size": batch_size, "samples": samples, "shard": shard, "max_bad": max_bad, "run": run}
        self._notes: dict[str, None] = {}
        self._inputs = Inputs(inputs, self._note, source, run)
        if source.whole is not None:
            fitted, total = self._inputs.fitted(source.whole)  # what can't fit is refused at once
            source = replace(source, open=lambda: iter((fitted,)), total=total, labels=fitted.labels)
        self._source, self._limit, self._fixed = source, samples, self._inputs.size
        self._keep = source.keep and batch_size is None and self._fixed is None
        self._size = self._fixed or batch_size or BATCH_SIZE
        self.description, self.shard, self.again = source.description, shard, source.again
        self.classes = source.classes
        self._bad = Bad(max_bad)
        self._labels: Array | None = None
        self._passed = False
        self._counted: int | None = source.total
        self.samples: int | None = None
        for text in source.notes:
            self._note(text)
        if self._fixed is not None and batch_size not in (None, self._fixed):
            self._note(f"the model takes batches of {self._fixed} only, so a batch size of {batch_size} isn't used")
        if source.total is not None:
            self._settle(min(source.total, samples or source.total), source.total)

    @property
    def notes(self) -> list[str]:
        return [*self._notes, *self._bad.notes]

    @property
    def bad(self) -> list[BadSample]:
        return self._bad.samples

    @property
    def labels(self) -> Array | None:
        if self._labels is None and not self._passed and self.again:
            first = next(iter(self._source.open()), None)
            if first is not None and first.labels is not None:
                for _ in self._plan(make=False):
                    pass
        return self._labels

    def fed(
        self, inputs: Sequence[InputSpec], *, batch_size: int | None = None, samples: int | None = None, run: Run | None = None
    ) -> Data:
        """The same data for other inputs; what isn't given stays as it is. The bad images that are found are known to both."""
        given = {"batch_size": batch_size, "samples": samples, "run": run}
        made = self._with(self._source, inputs, **{name: value for name, value in given.items() if value})
        made._bad = self._bad
        return made

    def asking(self, run: Run) -> Data:
        """The same data, with a model to ask which of their rows are samples."""
        return self.fed(self._inputs.specs, run=run)

    def sharded(self, index: int, count: int) -> Data:
        """The same data as process `index` of `count` reads them."""
        return self._with(self._source, shard=(index, count))

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def spread(self, count: int) -> Data:
        """So many samples, evenly spaced, where it is known how many there are: the first ones of sorted data say nothing of the others."""
        total = self._source.total
        if total is None or total <= count:
            return self._with(self._source, samples=count)
        places = np.arange(count) * total // count
        labels = None if self._source.labels is None else self._source.labels[places]
        fewer = replace(self._source, open=lambda: self._at(places), total=count, labels=labels, whole=None)
        return self._with(fewer, samples=None)

    def _with(self, source: Source, inputs: Sequence[InputSpec] | None = None, **changes: Any) -> Data:
        return Data(source, inputs or self._inputs.specs, **(self._settings | changes))

    def know_bad(self, shard: Data, gather: Callable[[Any], list[Any]]) -> None:
        """Know the bad images of all processes, after a pass over each one's shard (see `Bad.know`)."""
        if self._source.images:
            self._bad.know(gather(shard._bad), self._total())

    def _at(self, places: Array) -> Iterator[Chunk]:
        """The samples at these places, in rising order."""
        start = 0
        for chunk in self._source.open():
            fitted, count = self._inputs.fitted(chunk)
            mine = places[(places >= start) & (places < start + count)] - start
            start += count
            if len(mine) == count:
                yield chunk
            elif len(mine):
                arrays = {name: array[mine] if name in self._inputs.batched else array for name, array in fitted.arrays.items()}
                yield replace(fitted, arrays=arrays, labels=None if fitted.labels is None else fitted.labels[mine])

    def __iter__(self) -> Iterator[Counted]:
        for batch, _ in self.labelled():
            yield batch

    def labelled(self) -> Iterator[tuple[Counted, Array | None]]:
        """Every batch with its labels, one for each of its samples, or None."""
        batches = self._batches()
        yield from read_ahead(batches) if self._source.ahead and self.again else batches

    def _batches(self) -> Iterator[tuple[Counted, Array | None]]:
        """The shard's batches."""
        plan = ((number, parts) for number, parts in self._plan() if self._mine(number))
        if not self._source.images:
            for _, parts in plan:
                yield self._inputs.batch([part.chunk for part in parts])
            return
        empty = True
        pieces = ((number, part) for number, parts in plan for part in parts)
        with contextlib.closing(in_pool(pieces, lambda piece: self._made(piece[1]))) as pool:
            for _, group in itertools.groupby(pool, lambda made: made[0][0]):
                chunks = []
                for (_, part), found in group:
                    if isinstance(found, CorruptError):
                        self._bad.add(part.place, found, self._total())
                    elif found is not None:
                        chunks.append(found)
                if chunks and self._fixed not in (None, len(chunks)):
                    self._note(f"a batch that holds a bad image is left out whole, as the model takes batches of {self._fixed} only")
                elif chunks:
                    empty = False
                    yield self._inputs.batch(chunks)
        if empty and len(self._bad) and self.shard == (0, 1):
            raise DataError(f"{self.description}: no batch is left without the images that can't be decoded; replace them")

    def _mine(self, number: int) -> bool:
        return number % self.shard[1] == self.shard[0]

    def _total(self) -> int:
        """The number of samples that a pass goes through, by counting where it isn't known."""
        if self._counted is None:
            assert self._source.count is not None
            self._counted = self._source.count()
        return self._counted if self._limit is None else min(self._counted, self._limit)

    def _made(self, part: Part) -> Chunk | CorruptError | None:
        """An image, decoded; what is wrong with it; or None where that is known from another pass."""
        if part.place in self._bad:
            return None
        assert part.chunk.make is not None
        try:
            arrays = part.chunk.make()
        except CorruptError as error:
            return error
        chunk, _ = self._inputs.fitted(replace(part.chunk, arrays=arrays, make=None))
        return self._inputs.cut(chunk, 0, 1)

    def _plan(self, *, make: bool = True) -> Iterator[tuple[int, list[Part]]]:
        """Every batch of the whole, by its number: the size asked for, but a chunk of another shape than the last one's starts a new batch.

        The samples of the shard's own are cut out and converted (unless `make` is False); of other batches only the labels are to be used.
        At the end of a pass it is known how many samples there are.
        """
        open_: list[Part] = []  # the batch that isn't full yet
        seen = number = fed = 0
        labels: list[Array] = []
        bare: bool | None = None

        def cut() -> tuple[int, list[Part]]:
            nonlocal open_, number, fed
            done, open_, number = (number, open_), [], number + 1
            fed += sum(part.count for part in done[1])
            labels.extend(part.chunk.labels for part in done[1] if part.chunk.labels is not None)
            return done

        for found in self._source.open():
            chunk, count = self._inputs.fitted(found)
            if bare not in (None, chunk.labels is None):
                raise DataError(f"{self.description}: some batches have labels and some have none; give them to all or to none")
            bare = chunk.labels is None
            whole = self._keep and not chunk.single
            size = count if whole or not self._inputs.batched else self._size
            apart = bool(open_) and not self._inputs.alike(open_[-1].chunk, chunk)
            if open_ and (whole or apart) and self._fixed is None:
                yield cut()
            elif apart:
                raise DataError(f"{chunk.where}: a batch of {self._fixed} can't hold samples of different shapes or types; make them alike")
            start = 0
            while start < count and seen != self._limit:
                stop = min(count, start + size - sum(part.count for part in open_))
                stop = stop if self._limit is None else min(stop, start + self._limit - seen)
                if chunk.make is None and make and self._mine(number):
                    piece = self._inputs.cut(chunk, start, stop)
                else:
                    piece = replace(chunk, labels=self._inputs.labels(chunk, start, stop))
                open_.append(Part(piece, seen, stop - start))
                seen, start = seen + stop - start, stop
                if sum(part.count for part in open_) == size:
                    yield cut()
            if seen == self._limit:
                break
        if open_ and self._fixed is None:
            yield cut()
        if self._source.total is None:
            self._settle(seen, seen)
        if self.samples is not None and fed != self.samples:
            raise DataError(
                f"{self.description}: this pass gave {fed} samples, another {self.samples}; "
                "every pass must give the same (return a new iterator each time)"
            )
        self.samples, self._passed = fed, True
        if labels:
            self._labels = joined(labels, f"the labels of {self.description}")

    def _settle(self, wanted: int, total: int) -> None:
        """What a pass feeds of `wanted` samples; the notes about the rest."""
        if not total:
            raise DataError(f"{self.description}: there are no samples; give at least one")
        if self._limit is not None and total < self._limit:
            self._note(f"{counted(self._limit, 'sample')} {'is' if self._limit == 1 else 'are'} asked for, and the data hold {total}")
        rest = wanted % self._fixed if self._fixed and self._inputs.batched else 0
        only = f"can't fill a batch of {self._fixed}, the only size that the model takes"
        if rest == wanted:
            raise DataError(f"{self.description}: {counted(wanted, 'sample')} {only}")
        if rest:
            self._note(f"the last {counted(rest, 'sample')} of {wanted} {only}: left out")
        if self._source.total is not None:
            self.samples = wanted - rest
            cut = None if not self._inputs.batched else self.samples
            self._labels = None if self._source.labels is None else self._source.labels[:cut]

    def _note(self, text: str) -> None:
        self._notes.setdefault(text)
