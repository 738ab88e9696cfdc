"""Random data that fit a model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bnfold.errors import UnsupportedError, UsageError
from bnfold.text import listed

from .spec import Batch, InputSpec, is_float, shape_text


def random_feeds(
    specs: Sequence[InputSpec],
    *,
    batch: int = 1,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Batch:
    """One lively random batch: the same for the same arguments.

    Floats are standard normal; booleans are fair coins; integers are what the model is known to take (`InputSpec.takes`), or else 0 or
    1, which any table, mask or token type can take, and of 8 bits any (they are pixels). A dynamic axis 0 becomes `batch`. Any other
    dynamic axis takes its symbol's size from `sizes`, or 64 in the images of a rank-4 input (axes 2 and 3), 32 in a volume (axes 2 to 4
    of rank 5) and 16 elsewhere; the same symbol has the same size everywhere. Where the model can't run at those sizes, `input_shapes`
    gives whole shapes by input name.
    """
    wanted = dict(input_shapes or {})
    check_shapes(wanted, specs)
    known: dict[str, int] = dict(sizes or {})
    for spec in specs:
        if spec.name in wanted:
            shape = tuple(wanted[spec.name])
            known.update({d: n for d, n in zip(spec.shape, shape, strict=True) if isinstance(d, str)})
        elif spec.shape and isinstance(spec.shape[0], str):
            known.setdefault(spec.shape[0], batch)

    shapes = {}
    for spec in specs:
        made: tuple[int, ...] = ()
        for axis, d in enumerate(spec.shape):
            usual = batch if axis == 0 else {4: 64, 5: 32}.get(len(spec.shape), 16) if axis >= 2 else 16
            made += (d if isinstance(d, int) else usual if d is None else known.setdefault(d, usual),)
        shapes[spec.name] = tuple(wanted.get(spec.name, made))
    rng = np.random.default_rng(seed)
    return {spec.name: _lively(rng, spec, shapes[spec.name], known) for spec in specs}


def check_shapes(wanted: Mapping[str, Sequence[int]], specs: Sequence[InputSpec]) -> None:
    """UsageError unless these shapes that a user asks for, by input name, are some that the inputs take."""
    by_name = {spec.name: spec for spec in specs}
    for name, asked in wanted.items():
        if name not in by_name:
            raise UsageError(f"--input-shape names {name!r}, which is no input; the model has {listed(by_name)}")
        stated = by_name[name].shape
        if len(asked) != len(stated) or any(isinstance(d, int) and d != n for d, n in zip(stated, asked, strict=True)):
            raise UsageError(f"input {name!r} has shape {shape_text(stated)}; {shape_text(tuple(asked))} doesn't fit it")


def whole_numbers(rng: np.random.Generator, spec: InputSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> np.ndarray:
    """Integers that an input is known to take. sizes: by symbol."""
    assert spec.takes is not None
    kind = np.iinfo(spec.dtype)
    low, high = spec.takes.within(sizes)
    found = rng.integers(max(low, kind.min), min(high, kind.max), shape, dtype=spec.dtype, endpoint=True)
    if spec.takes.copies and found.ndim == 1 and found.size:
        found[-1] = -1
    return found


def _lively(rng: np.random.Generator, spec: InputSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> np.ndarray:
    if is_float(spec.dtype):
        return rng.standard_normal(shape).astype(spec.dtype)
    if spec.dtype.kind in "iu" and spec.takes is not None:
        return whole_numbers(rng, spec, shape, sizes)
    if spec.dtype.kind in "iu":
        low, high = (np.iinfo(spec.dtype).min, np.iinfo(spec.dtype).max) if spec.dtype.itemsize == 1 else (0, 1)
        return rng.integers(low, high, shape, dtype=spec.dtype, endpoint=True)
    if spec.dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if spec.dtype.kind == "c":
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(spec.dtype)
    raise UnsupportedError(f"input {spec.name!r} takes {spec.dtype}: there are no random data of that type; give --data")
