"""What the user's data can be, as batches: files, folders, functions, arrays and loaders.

Every form becomes a `Source` of chunks; `Data` fits the chunks to the model's inputs and cuts them into batches. The sample axis is axis 0.
An input whose first axis is fixed while another input's is dynamic, and one without axes, holds no samples: it goes along with every batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .ahead import in_pool, read_ahead
from .bad import MAX_BAD, Bad, BadSample, CorruptError
from .errors import DataError, UsageError
from .values import check_type, convert, shape_text

if TYPE_CHECKING:
    from .images import ImageOptions

Array = npt.NDArray[Any]
Batch = dict[str, Array]

BATCH_SIZE = 8
LABELS = ("labels", "label", "y", "targets", "target")


@dataclass(frozen=True)
class InputSpec:
    """A model's input; a dynamic axis is its symbol, or None when it has none."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {shape_text(self.shape)}"


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some samples as they were found. where: what an error calls them. single: they were one sample without a sample axis.

    make: what makes the arrays of one sample, in place of `arrays`, where that is work to be done only when they are needed.
    """

    arrays: Batch
    labels: Array | None
    where: str
    single: bool = False
    make: Callable[[], Batch] | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """Some samples of a batch. place: that of the first of them in the data. count: how many they are."""

    chunk: Chunk
    place: int
    count: int


@dataclass(frozen=True, eq=False)
class Source:
    """Chunks, opened anew for every pass.

    total, labels: the number of samples and their labels where these are known without a pass. count: what finds out the number without
    a pass, where that is some work.
    keep: the chunks are batches of the user's own making, kept whole unless another size is asked for.
    again: a second pass is possible. pictures: the chunks are images, one each, decoded when they are needed (`Chunk.make`).
    ahead: reading takes time, so it is done in the background.
    """

    open: Callable[[], Iterator[Chunk]]
    description: str
    notes: tuple[str, ...] = ()
    total: int | None = None
    labels: Array | None = None
    keep: bool = False
    again: bool = True
    pictures: bool = False
    ahead: bool = True
    count: Callable[[], int] | None = None


class Data:
    """Batches by input name, as often as they are asked for.

    description: where the data come from, in a line. notes: what the user should know about them.
    samples, labels: how many samples a pass goes through, and their classes (integers, one for each). Arrays and images know both at once.
    Of iterables, functions, folders of arrays and tars `samples` is None until a pass is complete; asking for `labels` makes that pass
    where the first batch has some, but of a generator, which can be read only once, they are None until it has been read. A pass may add a
    note.
    bad: the images that couldn't be decoded, as far as they were read. They count among samples and labels, and their batches are smaller
    for them; so labels go with samples by `labelled` alone. max_bad: how many are allowed, a number or a percentage of all.
    shard: (i, n) leaves batches i, i + n, i + 2n, ... of those that are cut without it, and makes no other; samples, labels and limits are
    those of the whole. Where there are fewer than n batches, some shards are empty.
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
    ) -> None:
        for option, value in (("batch size", batch_size), ("number of samples", samples)):
            if value is not None and value < 1:
                raise UsageError(f"the {option} is {value}; it must be 1 or more")
        if not 0 <= shard[0] < shard[1]:
            raise UsageError(f"the shard is {shard[0]} of {shard[1]}; it must be one of 0 to n - 1, of n")
        if not inputs:
            raise DataError("the model has no inputs, so it can't be fed data")
        self._source, self._inputs, self._asked, self._limit = source, tuple(inputs), batch_size, samples
        first = [spec.shape[0] for spec in inputs if spec.shape]
        dynamic = any(not isinstance(n, int) for n in first)
        self._fixed = first[0] if first and not dynamic and isinstance(first[0], int) else None
        self._batched = {s.name for s in inputs if s.shape and (not isinstance(s.shape[0], int) if dynamic else s.shape[0] == self._fixed)}
        self._keep = source.keep and batch_size is None and self._fixed is None
        self._size = self._fixed or batch_size or BATCH_SIZE
        self.description = source.description
        self.shard = shard
        self._bad = Bad(max_bad)
        self._notes: list[str] = []
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
    def again(self) -> bool:
        """Whether a second pass is possible: a generator can be read only once."""
        return self._source.again

    @property
    def notes(self) -> list[str]:
        return [*self._notes, *self._bad.notes]

    @property
    def bad(self) -> list[BadSample]:
        return self._bad.samples

    @property
    def labels(self) -> Array | None:
        if self._labels is None and not self._passed and self._source.again:
            first = next(iter(self._source.open()), None)
            if first is not None and first.labels is not None:
                for _ in self._plan(make=False):
                    pass
        return self._labels

    def sharded(self, index: int, count: int) -> Data:
        """The same data as process `index` of `count` reads them."""
        return self._like(self._inputs, self._asked, self._limit, (index, count))

    def spread(self, count: int) -> Data:
        """So many samples, evenly spaced, where it is known how many there are: the first ones of sorted data say nothing of the others."""
        total = self._source.total
        if total is None or total <= count:
            return self._like(self._inputs, self._asked, count, self.shard)
        places = np.arange(count) * total // count
        labels = None if self._source.labels is None else self._source.labels[places]
        fewer = replace(self._source, open=lambda: self._at(places), total=count, labels=labels)
        return Data(fewer, self._inputs, batch_size=self._asked, shard=self.shard, max_bad=self._bad.limit)

    def _at(self, places: Array) -> Iterator[Chunk]:
        """The samples at these places, in rising order."""
        start = 0
        for chunk in self._source.open():
            fitted, count = self._fit(chunk)
            mine = places[(places >= start) & (places < start + count)] - start
            start += count
            if len(mine) in (0, count):
                if len(mine):
                    yield chunk
                continue
            arrays = {name: array[mine] if name in self._batched else array for name, array in fitted.arrays.items()}
            yield replace(fitted, arrays=arrays, labels=None if fitted.labels is None else fitted.labels[mine])

    def _like(self, inputs: Sequence[InputSpec], batch_size: int | None, samples: int | None, shard: tuple[int, int]) -> Data:
        return Data(self._source, inputs, batch_size=batch_size, samples=samples, shard=shard, max_bad=self._bad.limit)

    def __iter__(self) -> Iterator[Batch]:
        for batch, _ in self.labelled():
            yield batch

    def labelled(self) -> Iterator[tuple[Batch, Array | None]]:
        """Every batch with its labels, one for each of its samples, or None."""
        batches = self._batches()
        yield from read_ahead(batches) if self._source.ahead and self._source.again else batches

    def _batches(self) -> Iterator[tuple[Batch, Array | None]]:
        """The shard's batches."""
        plan = ((number, parts) for number, parts in self._plan() if self._mine(number))
        if not self._source.pictures:
            for _, parts in plan:
                yield self._batch([part.chunk for part in parts])
            return
        empty = True
        pieces = ((number, part) for number, parts in plan for part in parts)
        for _, group in itertools.groupby(in_pool(pieces, lambda piece: self._made(piece[1])), lambda made: made[0][0]):
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
                yield self._batch(chunks)
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
        chunk, _ = self._fit(replace(part.chunk, arrays=arrays, make=None))
        return self._part(chunk, 0, 1)

    def _plan(self, *, make: bool = True) -> Iterator[tuple[int, list[Part]]]:
        """Every batch of the whole, by its number: the size asked for, but a chunk of another shape than the last one's starts a new batch.

        The samples of the shard's own are cut out and converted (unless `make` is False); of other batches only the labels are to be used.
        At the end of a pass it is known how many samples there are.
        """
        held: list[Part] = []
        seen = number = fed = 0
        labels: list[Array] = []
        bare: bool | None = None

        def cut() -> tuple[int, list[Part]]:
            nonlocal held, number, fed
            done, held, number = (number, held), [], number + 1
            fed += sum(part.count for part in done[1])
            labels.extend(part.chunk.labels for part in done[1] if part.chunk.labels is not None)
            return done

        for found in self._source.open():
            chunk, count = self._fit(found)
            if bare not in (None, chunk.labels is None):
                raise DataError(f"{self.description}: some batches have labels and some have none; give them to all or to none")
            bare = chunk.labels is None
            whole = self._keep and not chunk.single
            size = count if whole or not self._batched else self._size
            apart = bool(held) and not self._together(held[-1].chunk, chunk)
            if held and (whole or apart) and self._fixed is None:
                yield cut()
            elif apart:
                raise DataError(f"{chunk.where}: a batch of {self._fixed} can't hold samples of different shapes or types; make them alike")
            start = 0
            while start < count and seen != self._limit:
                stop = min(count, start + size - sum(part.count for part in held))
                stop = stop if self._limit is None else min(stop, start + self._limit - seen)
                if chunk.make is None and make and self._mine(number):
                    piece = self._part(chunk, start, stop)
                else:
                    piece = replace(chunk, labels=None if chunk.labels is None else chunk.labels[start:stop])
                held.append(Part(piece, seen, stop - start))
                seen, start = seen + stop - start, stop
                if sum(part.count for part in held) == size:
                    yield cut()
            if seen == self._limit:
                break
        if held and self._fixed is None:
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
            self._labels = _join(labels, f"the labels of {self.description}")

    def _settle(self, wanted: int, total: int) -> None:
        """What a pass feeds of `wanted` samples; the notes about the rest."""
        if not total:
            raise DataError(f"{self.description}: there are no samples; give at least one")
        if self._limit is not None and total < self._limit:
            self._note(f"{self._limit} samples are asked for, and the data hold {total}")
        rest = wanted % self._fixed if self._fixed and self._batched else 0
        if rest == wanted:
            raise DataError(
                f"{self.description}: {_counted(wanted)} can't fill a batch of {self._fixed}, the only size that the model takes"
            )
        if rest:
            self._note(
                f"the last {_counted(rest)} of {wanted} can't fill a batch of {self._fixed}, the only size that the model takes: left out"
            )
        if self._source.total is not None:
            self.samples = wanted - rest
            self._labels = None if self._source.labels is None else self._source.labels[: self.samples]

    def _fit(self, chunk: Chunk) -> tuple[Chunk, int]:
        """The chunk with a sample axis on everything, and its number of samples; DataError unless names, types, shapes and counts fit."""
        arrays, single, counts = {}, chunk.single, {}
        for spec in self._inputs if chunk.make is None else ():
            given = arrays[spec.name] = chunk.arrays[spec.name]
            check_type(given.dtype, spec, chunk.where)
            if spec.name in self._batched and given.ndim == len(spec.shape) - 1:
                arrays[spec.name], single = given[None], True
            axes = tuple(None if axis == 0 and spec.name in self._batched else n for axis, n in enumerate(spec.shape))
            shape = arrays[spec.name].shape
            if len(shape) != len(axes) or any(isinstance(a, int) and a != n for a, n in zip(axes, shape, strict=True)):
                raise DataError(
                    f"{chunk.where}: input {spec.name!r} takes {shape_text(spec.shape)}, the data are {shape_text(given.shape)}; "
                    f"reshape or transpose them"
                )
            if spec.name in self._batched:
                counts[spec.name] = shape[0]
        if single and not chunk.single and not self._source.keep:
            self._note(f"{chunk.where}: one sample without a batch axis; the axis was added")
        count = next(iter(counts.values()), 1)
        labels = chunk.labels
        if labels is not None and (labels.dtype.kind not in "iu" or labels.size != (len(labels) if labels.ndim else 1)):
            found = f"{labels.dtype} {shape_text(labels.shape)}"
            self._note(f"the labels aren't used: classes are integers, one for each sample, and these are {found}")
            labels = None
        if labels is not None:
            labels = labels.reshape(-1)
            counts["labels"] = len(labels)
        if any(n != count for n in counts.values()) and self._batched:
            told = ", ".join(f"{name!r} has {n}" for name, n in counts.items())
            raise DataError(f"{chunk.where}: the numbers of samples differ: {told}; give as many of each")
        return replace(chunk, arrays=arrays, labels=labels, single=single), count

    def _part(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        """Samples start to stop, in the types that the model takes; DataError for values that it can't take."""
        arrays = {}
        for spec in self._inputs:
            array = chunk.arrays[spec.name]
            made = convert(array[start:stop] if spec.name in self._batched else array, spec, chunk.where, start)
            reused = self._source.keep and np.may_share_memory(made, array)  # a loader may use its buffer again
            arrays[spec.name] = made.copy() if reused and self._source.ahead else made
        return replace(chunk, arrays=arrays, labels=None if chunk.labels is None else chunk.labels[start:stop])

    def _together(self, a: Chunk, b: Chunk) -> bool:
        """Whether one batch can hold both."""
        for spec in self._inputs if a.make is None and b.make is None else ():
            x, y = a.arrays[spec.name], b.arrays[spec.name]
            if x.shape[1:] != y.shape[1:] if spec.name in self._batched else not np.array_equal(x, y):
                return False
        return True

    def _batch(self, parts: list[Chunk]) -> tuple[Batch, Array | None]:
        where = parts[0].where
        batch = {
            spec.name: _join([p.arrays[spec.name] for p in parts], where) if spec.name in self._batched else parts[0].arrays[spec.name]
            for spec in self._inputs
        }
        labels = [p.labels for p in parts if p.labels is not None]
        return batch, _join(labels, where) if labels else None

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)


def as_batches(
    obj: Any,
    inputs: Sequence[InputSpec],
    *,
    batch_size: int | None = None,
    samples: int | None = None,
    shard: tuple[int, int] | None = None,
) -> Data:
    """Data from what a library's user has at hand.

    obj: an array or tensor of samples; a mapping or tuple of such (a tuple in the inputs' order, its labels last); an iterable of
    batches, each of one of these forms (a list, a DataLoader, a generator); or a function without arguments that returns any of them,
    called for each pass.
    An item without a sample axis is one sample. batch_size: 8 for arrays; an iterable's own batches are kept unless a size is given or the
    model takes one only. A generator can be iterated once. shard: (i, n), see `Data`.
    """
    if isinstance(obj, Data):
        made = obj._like(inputs, batch_size or obj._asked, samples or obj._limit, shard or obj.shard)
        made._bad = obj._bad  # what is found is known to both
        return made
    if isinstance(obj, (str, bytes)) or not (
        _holds_samples(obj, inputs) or callable(obj) or hasattr(obj, "__iter__") or hasattr(obj, "__getitem__")
    ):
        raise DataError(f"the data are {type(obj).__name__}; give an array, a tuple or dict of arrays, or an iterable of batches")
    name = f"the {type(obj).__name__} given"
    source = from_object(obj, inputs, name) if _holds_samples(obj, inputs) else from_stream(obj, inputs, name)
    return Data(source, inputs, batch_size=batch_size, samples=samples, shard=shard or (0, 1))


def open_data(
    spec: str,
    inputs: Sequence[InputSpec],
    *,
    batch_size: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    images: ImageOptions | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    shard: tuple[int, int] = (0, 1),
    max_bad: int | str = MAX_BAD,
    column: str | None = None,
) -> Data:
    """The command line's DATA.

    spec: a .npy, .npz, .safetensors, .pt or .pth file; tar shards or Parquet files, by a pattern or as a folder; a folder of images, of
    .npy files or of `datasets`' save_to_disk; FILE.py:FUNCTION or MODULE:FUNCTION (any form of `as_batches`, made anew for each pass); or
    `random`. samples: at most so many, the first ones, but a random choice by `seed` in a folder of images or of save_to_disk. images: how
    images are prepared. input_shapes: whole shapes by input name, where the model's are dynamic. shard, max_bad: see `Data`. column: the
    one of a table that goes into the model, where several could.
    """
    from .sources import open_source

    source = open_source(
        spec, inputs, batch_size=batch_size, samples=samples, seed=seed, images=images, input_shapes=input_shapes, column=column
    )
    return Data(source, inputs, batch_size=batch_size, samples=samples, shard=shard, max_bad=max_bad)


def from_object(obj: Any, inputs: Sequence[InputSpec], where: str) -> Source:
    """All samples at once: an array, or a mapping or sequence of arrays."""
    chunk, notes = _chunk(obj, inputs, where)
    data = Data(Source(lambda: iter(()), where), inputs)
    fitted, total = data._fit(chunk)  # what can't fit is refused at once
    return Source(lambda: iter((fitted,)), where, (*notes, *data.notes), total, fitted.labels, ahead=False)


def from_stream(obj: Any, inputs: Sequence[InputSpec], where: str) -> Source:
    """An iterable of batches, or a function that returns one (or all samples at once)."""
    used = False

    def chunks() -> Iterator[Chunk]:
        nonlocal used
        made = obj() if callable(obj) and not hasattr(obj, "__iter__") else obj
        if _holds_samples(made, inputs):
            yield _chunk(made, inputs, where)[0]
            return
        try:
            items = iter(made)
        except TypeError:
            raise DataError(f"{where} gave {type(made).__name__}; it must give an iterable of arrays, tuples or dicts") from None
        if items is obj:
            if used:
                raise DataError(f"{where} can be read only once, and this is a second pass; give a list, or a function that makes it anew")
            used = True
        for number, item in enumerate(items, 1):
            yield _chunk(item, inputs, f"batch {number} of {where}")[0]

    return Source(chunks, where, keep=True, again=not isinstance(obj, Iterator), ahead=not isinstance(obj, (list, tuple)))


def _chunk(obj: Any, inputs: Sequence[InputSpec], where: str) -> tuple[Chunk, list[str]]:
    """One item of data by input name, and notes on what isn't used of it. DataError for names that don't fit."""
    names = [spec.name for spec in inputs]
    if isinstance(obj, Mapping):
        named = {str(key): as_array(value, f"{where}, array {key!r}") for key, value in obj.items()}
        label = next((key for key in LABELS if key in named and key not in names and len(named) > 1), None)
        labels = None if label is None else named.pop(label)
        if len(names) == len(named) == 1 and names[0] not in named:
            (key,) = named
            return Chunk({names[0]: named[key]}, labels, f"{where}, array {key!r}"), []
        if missing := [name for name in names if name not in named]:
            raise DataError(
                f"{where}: no array for input {_listed(missing)}; it holds {_listed(named) or 'nothing'}; name the arrays as the inputs"
            )
        extra = [key for key in named if key not in names]
        notes = [f"{where}: {_listed(extra)} isn't used: no input has that name"] if extra else []
        return Chunk({name: named[name] for name in names}, labels, where), notes
    items = list(obj) if isinstance(obj, (tuple, list)) else [obj]
    if len(items) not in (len(names), len(names) + 1) or (len(items) > 1 and items is obj):
        raise DataError(
            f"{where} has {len(items)} arrays, and the model has {len(names)} inputs ({_listed(names)}); "
            f"give one for each, in this order, then at most the labels"
        )
    arrays = [as_array(item, f"{where}, array {number}" if len(items) > 1 else where) for number, item in enumerate(items)]
    return Chunk(dict(zip(names, arrays, strict=False)), arrays[len(names)] if len(arrays) > len(names) else None, where), []


def as_array(obj: Any, where: str) -> Array:
    """An array of an array, a number, a list of numbers or a tensor (told by its methods, so that PyTorch isn't needed)."""
    if hasattr(obj, "detach"):
        obj = obj.detach().cpu()
        obj = (obj.float() if str(obj.dtype) == "torch.bfloat16" else obj).numpy()  # exact; numpy has no bfloat16
    try:
        array = np.asarray(obj)
    except ValueError as error:
        raise DataError(f"{where}: no array can be made of it ({error})") from None
    if array.dtype == object and not all(isinstance(item, (str, bytes)) for item in array.flat):
        raise DataError(f"{where}: it holds {type(obj).__name__}, not numbers; give an array")
    return array


def _holds_samples(obj: Any, inputs: Sequence[InputSpec]) -> bool:
    """Whether the object is samples, rather than an iterable of batches."""
    if isinstance(obj, tuple):
        return len(obj) in (len(inputs), len(inputs) + 1) and all(hasattr(o, "__array__") or hasattr(o, "detach") for o in obj)
    return isinstance(obj, Mapping) or hasattr(obj, "__array__") or hasattr(obj, "detach")


def _join(parts: list[Array], where: str) -> Array:
    if len(parts) == 1:
        return parts[0]
    try:
        return np.concatenate(parts)
    except ValueError as error:
        raise DataError(f"{where}: samples of different shapes ({error}); make them alike") from None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _counted(n: int) -> str:
    return f"{n} sample" if n == 1 else f"{n} samples"
