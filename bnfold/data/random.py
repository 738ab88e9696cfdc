"""Random data that fit a model's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bnfold.errors import UnsupportedError, UsageError
from bnfold.text import listed

from .source import BATCH_SIZE, Chunk, Request, Source
from .spec import Array, Batch, InputSpec, is_float, shape_text


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
            known.update({d: n for d, n in zip(spec.shape, wanted[spec.name], strict=True) if isinstance(d, str)})
        elif spec.shape and isinstance(spec.shape[0], str):
            known.setdefault(spec.shape[0], batch)

    shapes = usual_shapes(specs, batch, known) | {name: tuple(shape) for name, shape in wanted.items()}
    rng = np.random.default_rng(seed)
    return {spec.name: _lively(rng, spec, shapes[spec.name], known) for spec in specs}


def usual_shapes(specs: Sequence[InputSpec], batch: int, known: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of each input's random data. known: the sizes of symbols, to which those that get one here are added."""
    shapes = {}
    for spec in specs:
        made: tuple[int, ...] = ()
        for axis, d in enumerate(spec.shape):
            usual = batch if axis == 0 else {4: 64, 5: 32}.get(len(spec.shape), 16) if axis >= 2 else 16
            made += (d if isinstance(d, int) else usual if d is None else known.setdefault(d, usual),)
        shapes[spec.name] = made
    return shapes


def check_shapes(wanted: Mapping[str, Sequence[int]], specs: Sequence[InputSpec]) -> None:
    """UsageError unless these shapes that a user asks for, by input name, are some that the inputs take."""
    by_name = {spec.name: spec for spec in specs}
    for name, shape in wanted.items():
        if name not in by_name:
            raise UsageError(f"--input-shape names {name!r}, which is no input; the model has {listed(by_name)}")
        stated = by_name[name].shape
        if len(shape) != len(stated) or any(isinstance(d, int) and d != n for d, n in zip(stated, shape, strict=True)):
            raise UsageError(f"input {name!r} has shape {shape_text(stated)}; {shape_text(tuple(shape))} doesn't fit it")


def whole_numbers(rng: np.random.Generator, spec: InputSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    """Integers that an input is known to take. sizes: by symbol."""
    assert spec.takes is not None
    kind = np.iinfo(spec.dtype)
    low, high = spec.takes.within(sizes)
    found: Array = rng.integers(max(low, kind.min), min(high, kind.max), shape, dtype=spec.dtype, endpoint=True)
    if spec.takes.copies and found.ndim == 1 and found.size:
        found[-1] = -1
    return found


def _lively(rng: np.random.Generator, spec: InputSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Array:
    kind = spec.dtype.kind
    if is_float(spec.dtype):
        return rng.standard_normal(shape).astype(spec.dtype)
    if kind in "iu" and spec.takes is not None:
        return whole_numbers(rng, spec, shape, sizes)
    if kind in "iu":
        low, high = (np.iinfo(spec.dtype).min, np.iinfo(spec.dtype).max) if spec.dtype.itemsize == 1 else (0, 1)
        return rng.integers(low, high, shape, dtype=spec.dtype, endpoint=True)
    if kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if kind == "c":
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(spec.dtype)
    raise UnsupportedError(f"input {spec.name!r} takes {spec.dtype}: there are no random data of that type; give --data")


def random_source(request: Request) -> Source:
    """Batches of `random_feeds`, each from a seed of its own; two batches unless a number of samples is given."""
    inputs, samples, shapes = request.inputs, request.samples, {name: tuple(shape) for name, shape in request.input_shapes.items()}
    if (request.batch_size is not None and request.batch_size < 1) or (samples is not None and samples < 1):
        raise UsageError("the batch size and the number of samples must be 1 or more")
    given = [shapes[s.name][0] for s in inputs if shapes.get(s.name) and s.shape]
    fixed = [s.shape[0] for s in inputs if s.shape and isinstance(s.shape[0], int)]
    dynamic = len(fixed) < sum(bool(s.shape) for s in inputs)
    usual = request.batch_size or min(samples or BATCH_SIZE, BATCH_SIZE)
    size = max(given) if given else usual if dynamic or not fixed else fixed[0]
    count = -(-samples // size) if samples is not None else 2

    def chunks() -> Iterator[Chunk]:
        shared: dict[str, Array] = {}
        for number in range(count):
            state = int(np.random.SeedSequence([request.seed, number]).generate_state(1)[0])
            feeds = random_feeds(inputs, batch=size, seed=state, input_shapes=shapes)
            for s in inputs:
                if not s.shape or (dynamic and isinstance(s.shape[0], int)):
                    feeds[s.name] = shared.setdefault(s.name, feeds[s.name])
            yield Chunk(feeds, None, f"random batch {number + 1}")

    example = next(chunks())
    notes = []
    for s in inputs:
        if s.name not in shapes and any(not isinstance(n, int) for n in s.shape[1:]):
            taken = "x".join(str(n) for n in example.arrays[s.name].shape)
            notes.append(f"input {s.name!r} has dynamic axes; {taken} is taken (--input-shape {s.name}=... gives another)")
    # Of several inputs it may show only when they are fed which of them hold samples, and how many.
    return Source(chunks, f"random, seed {request.seed}", tuple(notes), count * size if len(inputs) == 1 else None, keep=True)
