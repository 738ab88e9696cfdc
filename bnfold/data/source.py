"""What data are before they are batches: a source of chunks, each of some samples as they were found.

Here are those of Python's objects: arrays, mappings and tuples of arrays, iterables of such, and functions that return any of them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfold.errors import DataError
from bnfold.text import some

from .spec import Array, Batch, InputSpec

if TYPE_CHECKING:
    from .images.options import ImageOptions

BATCH_SIZE = 8  # where nobody says another
LABELS = ("labels", "label", "y", "targets", "target")
# An item of data in the form in which a model is called, lists and dicts nested in it, as arrays by input name; None for plain arrays.
Flat = Callable[[Any], "Mapping[str, Any] | None"]


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
class Source:
    """Chunks, opened anew for every pass.

    total, labels: the number of samples and their labels where these are known without a pass. count: what finds out the number without
    a pass, where that is some work.
    keep: the chunks are batches of the user's own making, kept whole unless another size is asked for.
    again: a second pass is possible. images: the chunks are images, one each, decoded when they are needed (`Chunk.make`).
    ahead: reading takes time, so it is done in the background. whole: all data, where they are one chunk; how many samples it has depends
    on the model that they are for. classes: how many there are, where the labels are places among them (sub-folders of images).
    files: those that they are read from.
    """

    open: Callable[[], Iterator[Chunk]]
    description: str
    notes: tuple[str, ...] = ()
    total: int | None = None
    labels: Array | None = None
    keep: bool = False
    again: bool = True
    images: bool = False
    ahead: bool = True
    count: Callable[[], int] | None = None
    whole: Chunk | None = None
    classes: int | None = None
    files: Callable[[], Iterable[Path]] | None = None

    def fingerprint(self) -> str:
        """The same for the same data, as far as that is known without reading them: arrays by their numbers, files by sizes and times."""
        if self.whole is not None:
            return digest(self.whole.arrays)
        found = [(path, path.stat()) for path in (self.files() if self.files is not None else ())]
        text = "".join(f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in found)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class Request:
    """What is asked of data that are named by a text; see `open.open_data`."""

    spec: str
    inputs: Sequence[InputSpec]
    batch_size: int | None
    samples: int | None
    seed: int
    images: ImageOptions | None
    input_shapes: Mapping[str, Sequence[int]]
    column: str | None
    flat: Flat | None

    def only_input(self, what: str, instead: str) -> InputSpec:
        """The model's only input, as far as it is to be fed with this. DataError where it has several."""
        if len(self.inputs) != 1:
            raise DataError(f"{self.spec}: {what} a model with one input, and this one has {len(self.inputs)}; give {instead}")
        return self.inputs[0]


def digest(batch: Mapping[str, Array]) -> str:
    """Of names, types, shapes and numbers."""
    found = hashlib.sha256()
    for name, array in batch.items():
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def is_array(obj: Any) -> bool:
    """Whether it is an array, or a tensor of PyTorch, told by its methods so that neither library is needed."""
    return hasattr(obj, "__array__") or hasattr(obj, "detach")


def as_array(obj: Any, where: str) -> Array:
    """An array of an array, a number, a list of numbers or a tensor."""
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


def is_samples(obj: Any, inputs: Sequence[InputSpec], flat: Flat | None = None) -> bool:
    """Whether an object is samples, rather than an iterable of batches."""
    if isinstance(obj, tuple):
        arrays = [is_array(o) for o in obj]
        nested = flat is not None and any(arrays) and not all(arrays)
        return nested or (len(obj) in (len(inputs), len(inputs) + 1) and all(arrays))
    return isinstance(obj, Mapping) or is_array(obj)


def check_data(obj: Any) -> None:
    """DataError for what gives no batches, whatever the model takes."""
    if isinstance(obj, (str, bytes)) or not (is_array(obj) or callable(obj) or hasattr(obj, "__iter__") or hasattr(obj, "__getitem__")):
        raise DataError(f"the data are {type(obj).__name__}; give an array, a tuple or dict of arrays, or an iterable of batches")


def peek(batches: Any) -> tuple[Any, Any]:
    """The first batch, and all of them, which an iterator has to give again."""
    check_data(batches)
    if isinstance(batches, Mapping) or is_array(batches) or (isinstance(batches, tuple) and any(map(is_array, batches))):
        return batches, batches
    if callable(batches) and not hasattr(batches, "__iter__"):
        return peek(batches())[0], batches
    if isinstance(batches, Iterator):
        first = next(batches, None)
        return first, batches if first is None else itertools.chain([first], batches)
    return next(iter(batches), None), batches


def from_object(obj: Any, inputs: Sequence[InputSpec], where: str, flat: Flat | None = None) -> Source:
    """All samples at once: an array, or a mapping or sequence of arrays."""
    chunk, notes = _chunk(obj, inputs, where, flat)
    return Source(lambda: iter((chunk,)), where, notes, ahead=False, whole=chunk)


def from_stream(obj: Any, inputs: Sequence[InputSpec], where: str, flat: Flat | None = None) -> Source:
    """An iterable of batches, or a function that returns one (or all samples at once)."""
    used = False

    def chunks() -> Iterator[Chunk]:
        nonlocal used
        made = obj() if callable(obj) and not hasattr(obj, "__iter__") else obj
        if is_samples(made, inputs, flat):
            yield _chunk(made, inputs, where, flat)[0]
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
            yield _chunk(item, inputs, f"batch {number} of {where}", flat)[0]

    return Source(chunks, where, keep=True, again=not isinstance(obj, Iterator), ahead=not isinstance(obj, (list, tuple)))


def _chunk(obj: Any, inputs: Sequence[InputSpec], where: str, flat: Flat | None) -> tuple[Chunk, tuple[str, ...]]:
    """One item of data by input name, and notes on what isn't used of it. DataError for names that don't fit."""
    names = [spec.name for spec in inputs]
    listed = ", ".join(map(repr, names))
    try:
        called = None if flat is None else flat(obj)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    obj = obj if called is None else called
    if isinstance(obj, Mapping):
        named = {str(key): as_array(value, f"{where}, array {key!r}") for key, value in obj.items()}
        label = next((key for key in LABELS if key in named and key not in names and len(named) > 1), None)
        labels = None if label is None else named.pop(label)
        if len(names) == len(named) == 1 and names[0] not in named:
            (key,) = named
            return Chunk({names[0]: named[key]}, labels, f"{where}, array {key!r}"), ()
        if missing := [name for name in names if name not in named]:
            lacking = ", ".join(map(repr, missing))
            raise DataError(f"{where}: no array for input {lacking}; it holds {some(named)}; name the arrays as the inputs")
        extra = ", ".join(repr(key) for key in named if key not in names)
        notes = (f"{where}: {extra} isn't used: no input has that name",) if extra else ()
        return Chunk({name: named[name] for name in names}, labels, where), notes
    items = list(obj) if isinstance(obj, (tuple, list)) else [obj]
    if len(items) not in (len(names), len(names) + 1):
        raise DataError(
            f"{where} has {len(items)} arrays, and the model has {len(names)} inputs ({listed}); "
            f"give one for each, in this order, then at most the labels"
        )
    arrays = [as_array(item, f"{where}, array {number}" if len(items) > 1 else where) for number, item in enumerate(items)]
    return Chunk(dict(zip(names, arrays, strict=False)), arrays[len(names)] if len(arrays) > len(names) else None, where), ()
