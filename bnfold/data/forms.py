"""The forms in which users bring data: arrays, iterables and functions in Python, files and folders on the command line."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfold.errors import DataError

from .batches import Data
from .corrupt import MAX_BAD
from .samples import Run
from .source import LABELS, Chunk, Source
from .spec import Array, InputSpec

if TYPE_CHECKING:
    from .images import ImageOptions


# An item of data in the form in which a model is called, lists and dicts nested in it, as arrays by input name; None for plain arrays.
Flat = Callable[[Any], "Mapping[str, Any] | None"]


def as_batches(
    obj: Any,
    inputs: Sequence[InputSpec],
    *,
    batch_size: int | None = None,
    samples: int | None = None,
    shard: tuple[int, int] | None = None,
    run: Run | None = None,
    flat: Flat | None = None,
) -> Data:
    """Data from what a library's user has at hand.

    obj: an array or tensor of samples; a mapping or tuple of such (a tuple in the inputs' order, its labels last); an iterable of
    batches, each of one of these forms (a list, a DataLoader, a generator); or a function without arguments that returns any of them,
    called for each pass.
    An item without a sample axis is one sample. batch_size: 8 for arrays; an iterable's own batches are kept unless a size is given or the
    model takes one only. A generator can be iterated once. shard: (i, n), run: see `Data`. flat: what takes an item in the form in which a
    model is called apart (see `Flat`).
    """
    if isinstance(obj, Data):
        return obj.fed(inputs, batch_size=batch_size, samples=samples, shard=shard, run=run)
    if isinstance(obj, (str, bytes)) or not (
        _holds_samples(obj, inputs, flat) or callable(obj) or hasattr(obj, "__iter__") or hasattr(obj, "__getitem__")
    ):
        raise DataError(f"the data are {type(obj).__name__}; give an array, a tuple or dict of arrays, or an iterable of batches")
    name = f"the {type(obj).__name__} given"
    source = from_object(obj, inputs, name, flat) if _holds_samples(obj, inputs, flat) else from_stream(obj, inputs, name, flat)
    return Data(source, inputs, batch_size=batch_size, samples=samples, shard=shard or (0, 1), run=run)


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
    flat: Flat | None = None,
) -> Data:
    """The command line's DATA.

    spec: a .npy, .npz, .safetensors, .pt or .pth file; tar shards or Parquet files, by a pattern or as a folder; a folder of images, of
    .npy files or of `datasets`' save_to_disk; FILE.py:FUNCTION or MODULE:FUNCTION (any form of `as_batches`, made anew for each pass); or
    `random`. samples: at most so many, the first ones, but a random choice by `seed` in a folder of images or of save_to_disk. images: how
    images are prepared. input_shapes: whole shapes by input name, where the model's are dynamic. shard, max_bad: see `Data`. column: the
    one of a table that goes into the model, where several could.
    """
    from .open import open_source

    source = open_source(
        spec, inputs, batch_size=batch_size, samples=samples, seed=seed, images=images, input_shapes=input_shapes, column=column, flat=flat
    )
    return Data(source, inputs, batch_size=batch_size, samples=samples, shard=shard, max_bad=max_bad)


def peek(batches: Any) -> tuple[Any, Any]:
    """The first batch, and all of them, which an iterator has to give again."""
    if isinstance(batches, Mapping) or _is_array(batches) or (isinstance(batches, tuple) and any(map(_is_array, batches))):
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
    return Source(lambda: iter((chunk,)), where, tuple(notes), ahead=False, held=chunk)


def from_stream(obj: Any, inputs: Sequence[InputSpec], where: str, flat: Flat | None = None) -> Source:
    """An iterable of batches, or a function that returns one (or all samples at once)."""
    used = False

    def chunks() -> Iterator[Chunk]:
        nonlocal used
        made = obj() if callable(obj) and not hasattr(obj, "__iter__") else obj
        if _holds_samples(made, inputs, flat):
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


def _chunk(obj: Any, inputs: Sequence[InputSpec], where: str, flat: Flat | None = None) -> tuple[Chunk, list[str]]:
    """One item of data by input name, and notes on what isn't used of it. DataError for names that don't fit."""
    names = [spec.name for spec in inputs]
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


def _holds_samples(obj: Any, inputs: Sequence[InputSpec], flat: Flat | None = None) -> bool:
    """Whether the object is samples, rather than an iterable of batches."""
    if isinstance(obj, tuple):
        arrays = [_is_array(o) for o in obj]
        nested = flat is not None and any(arrays) and not all(arrays)
        return nested or (len(obj) in (len(inputs), len(inputs) + 1) and all(arrays))
    return isinstance(obj, Mapping) or _is_array(obj)


def _is_array(obj: Any) -> bool:
    return hasattr(obj, "__array__") or hasattr(obj, "detach")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
