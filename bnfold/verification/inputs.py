"""What `verify` feeds two models, and whether they take and give the same kinds of things at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import numpy as np

from bnfold.data import Batch, as_batches
from bnfold.data.random import usual_shapes, whole_numbers
from bnfold.data.samples import ROWS, Run, fixed_size, rows_are_samples, sample_inputs
from bnfold.errors import BnfoldError, UnsupportedError, UsageError
from bnfold.model import Model

SAMPLES = 32  # compared where nobody says how many
LARGE = 1 << 17  # numbers in one sample; of samples as large as a photograph a few are enough, since they give many outputs
FEW_SAMPLES = 2
BATCH = 8
EXACT = 1e-9  # of the largest number: within this two runs in float64 agree
OTHER_SEED = 2**31 - 1  # of data that differ from what anybody asks for


def is_several(example: Any) -> bool:
    """Whether an example is several calls of a model: a list of nothing but tuples of arguments and dicts of them by name."""
    return isinstance(example, list) and bool(example) and all(isinstance(each, (tuple, Mapping)) for each in example)


def given(reference: Model, batches: Any, samples: int | None, batch_size: int | None) -> Iterator[Batch]:
    """The user's data, as many batches as it takes for the number of samples."""
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    seen = 0
    run = outputs_of(reference)
    for batch in as_batches(batches, reference.inputs(), batch_size=batch_size, samples=samples, run=run, flat=reference.flat):
        yield batch
        seen += batch.samples
        large = sum(array.size for array in batch.values()) > LARGE * batch.samples
        if seen >= (samples or (FEW_SAMPLES if large else SAMPLES)):
            return


def outputs_of(subject: Model) -> Run:
    """What gives a model's outputs, in float64 where that can be had; the model is made ready for it when it is first asked for them."""
    oracle, deployed = cache(subject.exact), cache(partial(subject.session, "cpu", subject.optimisations[0]))

    def run(batch: Batch) -> Batch:
        try:
            return oracle().run(batch)
        except UnsupportedError:  # ONNX's evaluator says no more of an index that points at nothing
            return deployed().run(batch)

    return run


def in_parts(reference: Model, candidate: Model, most: int = ROWS) -> tuple[Model, Model, tuple[str, ...]]:
    """Two models that fix a large batch, with a few samples in it, and a note of that; as they are where rows aren't shown to be samples.

    most: samples in a batch, no more than ROWS. Both are tried, in float64: no row of what they give may depend on the other rows.
    """
    specs = reference.inputs()
    batch = fixed_size(specs)
    size = sum(map(math.prod, usual_shapes(specs, 1, {}).values()))
    if batch is None or batch <= ROWS or size <= LARGE:
        return reference, candidate, ()
    count = FEW_SAMPLES if size > LARGE * batch else most
    fixed = f"the batch of {batch:,} that the model fixes was compared"
    try:
        first, second = (_of_rows(side, batch, count) for side in (reference, candidate))
    except BnfoldError:  # what can't be run with fewer is run whole
        first = second = None
    if first is None or second is None:
        return reference, candidate, (f"{fixed} whole, which takes its time: nothing shows that no row depends on another",)
    return first, second, (f"{fixed} {count} rows at a time: each is computed by itself, by the shapes in the graph and by a trial",)


def _of_rows(subject: Model, batch: int, count: int) -> Model | None:
    """The model with so many samples in a batch, where each is computed by itself."""
    whole, fewer = subject.of_fewer(count), subject.of_fewer(count - 1)
    if whole is None or fewer is None:
        return None
    given = [(port.shape or (), n) for side, n in ((whole, count), (fewer, count - 1)) for port in side.ports()[2]]
    if any(shape[:1] != (n,) for shape, n in given):
        return None
    names = {spec.name for spec in subject.inputs() if spec.shape[:1] == (batch,)}
    runs = {count: outputs_of(whole), count - 1: outputs_of(fewer)}
    made = whole.random(batch=count, seed=OTHER_SEED, input_shapes=None)
    shown = rows_are_samples(made, names, lambda feeds: runs[len(feeds[min(names)])](feeds), EXACT)
    return whole if shown else None


def shortened(subject: Model, example: Batch) -> Batch:
    """Two samples of an example for a quick check, where a trial shows that they can be cut out of it; else the example as it was given."""
    specs = subject.inputs()
    if max((array.shape[0] for array in example.values() if array.ndim), default=0) <= ROWS:
        return example
    samples, _ = sample_inputs(specs, example, outputs_of(subject), sure=True)
    return {name: array[:FEW_SAMPLES] if name in samples else array for name, array in example.items()}


def random(
    reference: Model,
    candidate: Model,
    samples: int | None,
    batch_size: int | None,
    seed: int,
    input_shapes: Mapping[str, tuple[int, ...]] | None,
) -> list[Batch]:
    """Random data: in more than one batch where there is more than one sample, so that it shows whether outputs depend on them."""
    shapes = _fixed_shapes(reference, candidate, seed, input_shapes)
    one = reference.random(batch=1, seed=seed, input_shapes=shapes)
    wanted = samples or (FEW_SAMPLES if sum(a.size for a in one.values()) > LARGE else SAMPLES)
    specs = reference.inputs()
    dynamic = all(s.shape and not isinstance(s.shape[0], int) for s in specs) and not shapes
    batch = min(batch_size or BATCH, -(-wanted // 2) if wanted > 1 else 1) if dynamic else 1
    size = batch if dynamic else sample_count(one)
    made = [reference.random(batch=batch, seed=seed + k, input_shapes=shapes) for k in range(max(1, -(-wanted // size)))]
    return [_taken_by_both(reference, candidate, each, seed + k) for k, each in enumerate(made)]


def _taken_by_both(reference: Model, candidate: Model, batch: Batch, seed: int) -> Batch:
    """The batch with other integers in the inputs of which the candidate takes fewer."""
    theirs = {spec.name: spec.takes for spec in candidate.inputs()}
    rng = np.random.default_rng(seed)
    found = dict(batch)
    for spec in reference.inputs():
        takes = theirs.get(spec.name)
        if takes is None or spec.name not in batch or spec.dtype.kind not in "iu":
            continue
        both = takes if spec.takes is None else spec.takes.and_(takes)
        if both != spec.takes:
            sizes = {d: n for d, n in zip(spec.shape, batch[spec.name].shape, strict=False) if isinstance(d, str)}
            found[spec.name] = whole_numbers(rng, dataclasses.replace(spec, takes=both), batch[spec.name].shape, sizes)
    return found


def _fixed_shapes(
    reference: Model, candidate: Model, seed: int, given: Mapping[str, tuple[int, ...]] | None
) -> Mapping[str, tuple[int, ...]] | None:
    """Shapes that suit both models: a candidate may have fixed what the reference leaves open."""
    pairs = list(zip(reference.inputs(), candidate.inputs(), strict=False))
    fixed = any(isinstance(n, int) and not isinstance(m, int) for a, b in pairs for m, n in zip(a.shape, b.shape, strict=False))
    if not fixed or given:
        return given
    return {name: array.shape for name, array in candidate.random(batch=1, seed=seed, input_shapes=None).items()}


def resized(reference: Model, candidate: Model, batch: Batch, seed: int) -> list[Batch]:
    """One sample each of two other sizes, half as large again and an odd one, where both models leave axes open besides the first."""
    specs = reference.inputs()
    theirs = {spec.name: spec.shape for spec in candidate.inputs()}
    open_axes = [
        (spec.name, axis)
        for spec in specs
        for axis, d in enumerate(spec.shape)
        if axis and not isinstance(d, int) and not isinstance(theirs.get(spec.name, spec.shape)[axis], int)
    ]
    if not open_axes or any(spec.name not in batch for spec in specs):
        return []
    found = []
    for times, odd in ((1.5, 0), (0.75, 1)):
        shapes = {name: list(array.shape) for name, array in batch.items()}
        for name, axis in open_axes:
            shapes[name][axis] = max(1, int(times * shapes[name][axis])) | odd
        for spec in specs:
            if spec.shape and not isinstance(spec.shape[0], int):
                shapes[spec.name][0] = 1
        made = reference.random(batch=1, seed=seed, input_shapes={name: tuple(shape) for name, shape in shapes.items()})
        found.append(_taken_by_both(reference, candidate, made, seed))
    return found


def another(subject: Model, batch: Batch) -> Batch:
    """Other data of the same shapes."""
    return subject.random(batch=1, seed=OTHER_SEED, input_shapes={name: array.shape for name, array in batch.items()})


def sample_count(batch: Batch) -> int:
    """How many samples a batch holds, as far as its arrays tell."""
    return max((array.shape[0] for array in batch.values() if array.ndim), default=1) or 1


def is_large(batch: Batch) -> bool:
    """Whether each of its samples is large."""
    return sum(array.size for array in batch.values()) > LARGE * sample_count(batch)


def moved(feeds: list[Batch], times: int, seed: int) -> Iterator[Batch]:
    """The samples again, their floats moved by a thousandth: new rounding errors of the same size."""
    rng = np.random.default_rng(seed)
    for _ in range(times):
        for batch in feeds:
            yield {
                name: (array * (1 + 1e-3 * rng.standard_normal(array.shape))).astype(array.dtype) if array.dtype.kind in "fV" else array
                for name, array in batch.items()
            }
