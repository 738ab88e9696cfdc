"""How samples go into a model's inputs: their types, shapes and counts, and which values an input can take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bnfold.errors import DataError
from bnfold.text import listed

from .samples import Run, differing, fixed_size, open_first, sample_inputs
from .source import Chunk, Source
from .spec import Array, Batch, InputSpec, is_float, shape_text

WHOLE = "the rows of the inputs aren't samples of their own, so nothing is cut: each batch goes through as it is, and counts as one sample"


class Counted(dict[str, Array]):
    """A batch by input name that knows how many samples it holds. One that can't be cut into any is one itself."""

    def __init__(self, arrays: Batch, samples: int) -> None:
        super().__init__(arrays)
        self.samples = samples


def samples_of(batch: Mapping[str, Any]) -> int:
    """How many samples a batch holds: it says so, or its arrays do."""
    return batch.samples if isinstance(batch, Counted) else max((len(array) for array in batch.values() if array.ndim), default=1)


class Inputs:
    """A model's inputs, and what they take.

    size: the only batch size that the model takes, or None. batched: the inputs that hold samples, as far as the last chunk shows; the
    others are the same for all. None does where a batch can't be cut (see `samples`).
    note: is given what the user should know. source: where the chunks come from. run: the model, which is asked where the inputs' shapes
    don't tell. Raises DataError for a model without inputs.
    """

    def __init__(
        self, specs: Sequence[InputSpec], note: Callable[[str], None], source: Source | None = None, run: Run | None = None
    ) -> None:
        if not specs:
            raise DataError("the model has no inputs, so it can't be fed data")
        self.specs = tuple(specs)
        self._note, self.run = note, run
        self._batches = source is not None and source.keep
        self._copy = source is not None and source.keep and source.ahead  # a loader may use its buffer again
        self.size = fixed_size(specs)
        first = [spec.shape[0] for spec in specs if spec.shape]
        self._fixed = bool(first) and all(isinstance(n, int) for n in first)
        self._open = {s.name for s in specs if s.shape and s.shape[0] == self.size} if self._fixed else open_first(specs)
        self._known = self._fixed
        self.batched = set(self._open)

    def fitted(self, chunk: Chunk) -> tuple[Chunk, int]:
        """The chunk with a sample axis on everything, and its number of samples; DataError unless names, types, shapes and counts fit."""
        arrays, single, counts = {}, chunk.single, {}
        if chunk.make is None:
            for spec in self.specs:
                given = arrays[spec.name] = chunk.arrays[spec.name]
                check_type(given.dtype, spec, chunk.where)
                if spec.name in self._open and given.ndim == len(spec.shape) - 1:
                    arrays[spec.name], single = given[None], True
                if not _fits(arrays[spec.name].shape, (None, *spec.shape[1:]) if spec.name in self._open else spec.shape):
                    raise DataError(
                        f"{chunk.where}: input {spec.name!r} takes {shape_text(spec.shape)}, the data are {shape_text(given.shape)}; "
                        f"reshape or transpose them"
                    )
            counts = self._counts(arrays, chunk.where)
        if single and not chunk.single and not self._batches:
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
        if any(n != count for n in counts.values()) and self.batched:
            raise DataError(f"{chunk.where}: {differing(counts)}")
        return replace(chunk, arrays=arrays, labels=labels, single=single), count

    def _counts(self, arrays: Batch, where: str) -> dict[str, int]:
        """The number of samples in each of the inputs that hold some. What the first chunk shows holds until another doesn't fit."""
        if not self._known or (not self._fixed and len({len(arrays[name]) for name in self.batched}) > 1):
            try:
                self.batched, self._known = sample_inputs(self.specs, arrays, self.run)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
        if not self.batched and any(spec.shape for spec in self.specs):
            self._note(WHOLE)
        return {name: len(arrays[name]) for name in arrays if name in self.batched}

    def cut(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        """Samples start to stop, in the types that the model takes; DataError for values that it can't take."""
        arrays = {}
        for spec in self.specs:
            array = chunk.arrays[spec.name]
            made = convert(array[start:stop] if spec.name in self.batched else array, spec, chunk.where, start)
            arrays[spec.name] = made.copy() if self._copy and np.may_share_memory(made, array) else made
        return replace(chunk, arrays=arrays, labels=self.labels(chunk, start, stop))

    def labels(self, chunk: Chunk, start: int, stop: int) -> Array | None:
        """Those of samples start to stop. Of a batch that is one sample they go along whole."""
        return chunk.labels if chunk.labels is None or not self.batched else chunk.labels[start:stop]

    def alike(self, a: Chunk, b: Chunk) -> bool:
        """Whether one batch can hold both."""
        for spec in self.specs if a.make is None and b.make is None else ():
            x, y = a.arrays[spec.name], b.arrays[spec.name]
            if x.shape[1:] != y.shape[1:] if spec.name in self.batched else not np.array_equal(x, y):
                return False
        return True

    def batch(self, parts: list[Chunk]) -> tuple[Counted, Array | None]:
        """One batch of all parts, and its labels."""
        where = parts[0].where
        batch = {
            spec.name: joined([p.arrays[spec.name] for p in parts], where) if spec.name in self.batched else parts[0].arrays[spec.name]
            for spec in self.specs
        }
        labels = [p.labels for p in parts if p.labels is not None]
        count = next((len(batch[name]) for name in self.batched), 1)
        return Counted(batch, count), joined(labels, where) if labels else None


def joined(parts: list[Array], where: str) -> Array:
    """One array of all parts. DataError where their shapes differ."""
    if len(parts) == 1:
        return parts[0]
    try:
        return np.concatenate(parts)
    except ValueError as error:
        raise DataError(f"{where}: samples of different shapes ({error}); make them alike") from None


def check_type(dtype: np.dtype[Any], spec: InputSpec, where: str) -> None:
    """DataError unless the type converts without loss of meaning: float to float, text to text, and integers if they fit (`convert`)."""
    if dtype == spec.dtype or _same_kind(dtype, spec.dtype) or (dtype.kind in "iu" and spec.dtype.kind in "iu"):
        return
    advice = f"convert them with .astype({spec.dtype.name!r}) if that is right"
    if dtype.kind in "iub" and is_float(spec.dtype):
        advice = f"scale and normalise them as in training, say x.astype({spec.dtype.name!r}) / 255 for pixels"
    elif spec.dtype.kind in "iu" and is_float(dtype):
        advice = f"give the integers (pixels, tokens) before any scaling, as {spec.dtype}"
    elif np.can_cast(dtype, spec.dtype, "safe") and dtype.kind != "b":
        return
    raise DataError(f"{where}: input {spec.name!r} takes {spec.dtype}, the data are {dtype}; {advice}")


def convert(array: Array, spec: InputSpec, where: str, start: int) -> Array:
    """The array in the input's type; DataError for NaN, infinity and values that the type can't hold."""
    finite = spec.dtype.kind == "V" or spec.dtype.kind in "fc"
    with np.errstate(over="ignore", invalid="ignore"):
        made = np.ascontiguousarray(array, dtype=spec.dtype).reshape(array.shape)
    for values, what in (
        (array, "holds NaN or infinity; clean the data"),
        (made, f"holds values beyond the range of {spec.dtype}, which the model takes; scale the data"),
    ):
        if finite and not (good := np.isfinite(values)).all():
            at = np.argwhere(~good)
            raise DataError(f"{where}: input {spec.name!r}{f', sample {start + at[0][0]},' if array.ndim else ''} {what}")
        if array.dtype == made.dtype:
            break
    if array.dtype.kind in "iu" and array.dtype != made.dtype and not np.array_equal(array, made):
        raise DataError(f"{where}: input {spec.name!r} takes {spec.dtype}, and the data hold {array.dtype} values beyond its range")
    return made


def check_feeds(feeds: Batch, specs: Sequence[InputSpec], optional: Iterable[str] = (), *, any_float: bool = False) -> None:
    """DataError unless the feeds are just what the inputs ask for: names, types (any floating-point one with `any_float`) and shapes.

    optional: initializers that the caller may override (IR version 4 and later).
    """
    missing = [spec.name for spec in specs if spec.name not in feeds]
    if missing:
        raise DataError(f"no data for input {listed(map(repr, missing))}; the data have {listed(map(repr, feeds)) or 'nothing'}")
    extra = feeds.keys() - {spec.name for spec in specs} - set(optional)
    if extra:
        raise DataError(
            f"the data name {listed(map(repr, sorted(extra)))}, but the model's inputs are {listed(repr(s.name) for s in specs)}"
        )
    symbols: dict[str, tuple[str, int]] = {}
    for spec in specs:
        array = feeds[spec.name]
        if array.dtype != spec.dtype and not (_same_kind(array.dtype, spec.dtype) and (any_float or array.dtype.kind in "OUS")):
            raise DataError(f"input {spec.name!r} takes {spec.dtype}, the data are {array.dtype}")
        if not _fits(array.shape, spec.shape):
            raise DataError(f"input {spec.name!r} has shape {shape_text(spec.shape)}, the data have {shape_text(array.shape)}")
        for axis, (d, n) in enumerate(zip(spec.shape, array.shape, strict=True)):
            if isinstance(d, str):
                where, before = symbols.setdefault(d, (f"axis {axis} of {spec.name!r}", n))
                if before != n:
                    raise DataError(f"{d!r} is {before} on {where} but {n} on axis {axis} of {spec.name!r}")


def _same_kind(a: np.dtype[Any], b: np.dtype[Any]) -> bool:
    """Whether both are floating-point types, or both text."""
    return (is_float(a) and is_float(b)) or (a.kind in "OUS" and b.kind in "OUS")


def _fits(shape: Sequence[int], axes: Sequence[int | str | None]) -> bool:
    return len(shape) == len(axes) and all(n == d or not isinstance(d, int) for n, d in zip(shape, axes, strict=True))
