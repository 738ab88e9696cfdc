"""Which inputs hold samples along their first axis, so that a batch can be cut into parts that go through the network one by one.

A graph network's first axis counts nodes, an anchor's anchors, an edge list's two ends: nothing may be cut there. What an input's shape
says decides where it can. Where it leaves that open (first axes of several lengths, integers that may point at rows, a cloud of points, a
sequence), a trial does: a piece of a batch is run whole and without its first or its last row, and only where each row's outputs stay as
they were are rows samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bnfold.errors import BnfoldError, DataError, UnsupportedError

from .spec import Array, Batch, InputSpec

Run = Callable[[Batch], Mapping[str, Array]]  # a model's outputs by name, from its inputs by name
ROWS = 4  # of a batch that are tried
NEAR = 1e-2  # of the largest number: far more than a row's own rounding
NEAR_HALF = 5e-2  # in half precision
SHORT = 3  # axes: images are samples by custom, but what has no more may be a cloud of points, or a sequence whose steps come first


def open_first(specs: Sequence[InputSpec]) -> set[str]:
    """The inputs whose first axis is open, and counts nothing that another axis counts too (nodes by nodes, words by words)."""
    behind = {n for spec in specs for n in spec.shape[1:] if isinstance(n, str)}
    return {spec.name for spec in specs if spec.shape and not isinstance(spec.shape[0], int) and spec.shape[0] not in behind}


def fixed_size(specs: Sequence[InputSpec]) -> int | None:
    """The only batch size that a model takes whose first axes are all fixed: that of its inputs of the highest rank, if they have one.

    Fixed lengths tell no sample from an anchor or a scalar's one entry, but what has samples has the most axes.
    """
    shapes = [spec.shape for spec in specs if spec.shape]
    if not shapes or any(not isinstance(shape[0], int) for shape in shapes):
        return None
    sizes = {shape[0] for shape in shapes if len(shape) == max(map(len, shapes))}
    size = sizes.pop()
    return size if isinstance(size, int) and not sizes else None


def fits_fewer(shape: Sequence[int | None], other: Sequence[int | None], batch: int, samples: int) -> bool:
    """Whether another shape is that of the same value with fewer samples in a batch. batch, samples: how many before, and then."""
    moved = (samples, *shape[1:]) if shape and shape[0] == batch else None
    return None not in shape and tuple(other) in (tuple(shape), moved)


def sample_inputs(specs: Sequence[InputSpec], arrays: Batch, run: Run | None = None, *, sure: bool = False) -> tuple[set[str], bool]:
    """The inputs of a batch that hold samples, as many each, and whether that holds for every other batch too. None hold any: it is one.

    run: the model, for a trial. sure: try in any case, and take what a trial can't tell for no samples where there are several inputs.
    Raises DataError where inputs have one and the same open axis, and arrays of different lengths there.
    """
    lengths = {spec.name: len(arrays[spec.name]) for spec in specs if spec.name in open_first(specs)}
    by_symbol: dict[str, dict[str, int]] = {}
    for spec in specs:
        if spec.name in lengths and isinstance(spec.shape[0], str):
            by_symbol.setdefault(spec.shape[0], {})[spec.name] = lengths[spec.name]
    for found in by_symbol.values():
        if len(set(found.values())) > 1:
            raise DataError(differing(found))
    for spec in specs:  # a graph's matrix has as many rows as there are nodes
        if spec.shape and isinstance(spec.shape[0], str) and spec.name not in lengths:
            lengths = {name: n for name, n in lengths.items() if n != len(arrays[spec.name]) or not _counts(specs, name, spec)}
    groups: dict[int, list[InputSpec]] = {}
    for spec in specs:
        if lengths.get(spec.name, 1) != 1:
            groups.setdefault(lengths[spec.name], []).append(spec)
    if not groups:
        return _of_one(specs, set(lengths), arrays, run)
    fed = [spec for spec in specs if spec.shape]
    pointing = len(fed) > 1 and any(spec.dtype.kind in "iu" for spec in fed)
    alone = len(fed) == 1 and len(fed[0].shape) <= SHORT and run is not None
    squares = len(fed) > 1 and any(n in groups for spec in fed for n in arrays[spec.name].shape[1:])
    if not (sure or pointing or squares or alone or len(groups) > 1):
        return {spec.name for spec in next(iter(groups.values()))}, True
    if run is None:
        return ({spec.name for spec in next(iter(groups.values()))} if len(groups) == 1 else set()), False
    unjudged: set[str] = set()
    for group in sorted(groups.values(), key=lambda found: (-_most(found), -len(found), found[0].name)):
        every = {spec.name for spec in group}
        fewer = {spec.name for spec in group if len(spec.shape) == _most(group)}  # a mask may have as many rows as there are samples
        for names in () if _pointing(group, lengths, arrays) else (every,) if fewer == every else (every, fewer):
            try:
                verdict = rows_are_samples(arrays, names, run)
            except UnsupportedError:
                return sample_inputs(specs, arrays)
            if verdict:
                return names, True
            if verdict is None and names == every:
                unjudged = every
    return (unjudged if len(groups) == 1 and not (sure and len(fed) > 1) else set()), True


def _of_one(specs: Sequence[InputSpec], names: set[str], arrays: Batch, run: Run | None) -> tuple[set[str], bool]:
    """As `sample_inputs`, for first axes that all have the length 1: whether they can be longer is tried with each row twice."""
    open_axes = {spec.shape[0] for spec in specs if spec.name in names}
    if run is None or len(names) < 2 or (len(open_axes) == 1 and None not in open_axes):
        return names, False
    most = _most([spec for spec in specs if spec.name in names])
    for wanted in (names, {spec.name for spec in specs if spec.name in names and len(spec.shape) == most}):
        twice = {name: np.concatenate([array, array]) if name in wanted else array for name, array in arrays.items()}
        try:
            if rows_are_samples(twice, wanted, run):
                return wanted, True
        except UnsupportedError:
            break
    return names, False


def rows_are_samples(arrays: Batch, names: set[str], run: Run, near: float | None = None) -> bool | None:
    """Whether the rows of these inputs are samples, by a trial; None where no output has as many rows, so that none can tell.

    near: how far rows may be off, over the largest number; by default as far as outputs in their stored types.
    """
    rows = min(ROWS, *(len(arrays[name]) for name in names))

    def outputs(start: int, stop: int) -> Mapping[str, Array]:
        return run({name: array[start:stop] if name in names else array for name, array in arrays.items()})

    verdict: bool | None = None
    try:
        whole = outputs(0, rows)
        for start, stop in ((0, rows - 1), (1, rows)):
            part = outputs(start, stop)
            for name, array in whole.items():
                if not array.ndim or len(array) != rows or part[name].shape != (stop - start, *array.shape[1:]):
                    continue
                verdict = True
                if not _near(array[start:stop], part[name], near):
                    return False
    except UnsupportedError:
        raise
    except BnfoldError:  # it can't run on a part: an index without its row, a size that it doesn't take
        return False
    return verdict


def few(given: dict[str, Any], count: int) -> dict[str, Any]:
    """The first images of what a model's user gives it by name, where these are images alone: only a trial tells of other arrays."""
    plain = len(given) == 1 and all(len(getattr(array, "shape", ())) > SHORT for array in given.values())
    return {name: array[:count] for name, array in given.items()} if plain else given


def differing(counts: Mapping[str, int]) -> str:
    """What to say of numbers of samples that differ."""
    which = ", ".join(f"{name!r} has {n}" for name, n in counts.items())
    return f"the numbers of samples differ: {which}; give as many of each"


def _pointing(group: Sequence[InputSpec], lengths: Mapping[str, int], arrays: Batch) -> bool:
    """Whether integers may point at the rows of another input, as a graph's edges do: they have a meaning with these rows alone."""
    names = {spec.name for spec in group}
    rows = max((n for name, n in lengths.items() if name not in names and n > 1), default=0)
    whole = [arrays[spec.name] for spec in group if spec.dtype.kind in "iu" and arrays[spec.name].size]
    return any(-rows <= int(array.min()) and int(array.max()) < rows for array in whole)


def _counts(specs: Sequence[InputSpec], name: str, other: InputSpec) -> bool:
    """Whether a further axis of an input, of no more axes than the other, counts what the other's first does."""
    return any(spec.name == name and other.shape[0] in spec.shape[1:] and len(spec.shape) <= len(other.shape) for spec in specs)


def _most(specs: Sequence[InputSpec]) -> int:
    return max(len(spec.shape) for spec in specs)


def _near(one: Array, other: Array, near: float | None) -> bool:
    if one.dtype.kind not in "fcV":
        return bool(np.array_equal(one, other))
    a, b = (array.astype(np.complex128 if array.dtype.kind == "c" else np.float64) for array in (one, other))
    finite = np.abs(a[np.isfinite(a)])
    near = near or (NEAR_HALF if one.dtype.itemsize == 2 else NEAR)
    return bool(np.allclose(a, b, rtol=0, atol=near * float(finite.max(initial=0.0)), equal_nan=True))
