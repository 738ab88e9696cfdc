"""A table as a source of samples: a row is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bnfold.errors import DataError

from ..images import resolve, shaped
from ..source import Source
from ..spec import InputSpec
from . import chunks, columns
from .library import Library
from .table import parquet, saved
from .tars import tars

if TYPE_CHECKING:
    from ..images import ImageOptions


def table_source(
    spec: str,
    files: Sequence[Path],
    inputs: Sequence[InputSpec],
    *,
    samples: int | None,
    seed: int,
    options: ImageOptions | None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    column: str | None = None,
) -> Source:
    """Samples of shards, or, where there are no `files`, of the folder that save_to_disk wrote.

    samples: that many by a shuffle from `seed` of a folder of save_to_disk; the first ones of shards, which are read in order. column: the
    one for a model's only input, where several could be it. DataError where the library is missing or what it reads doesn't fit.
    """
    library = Library(spec)
    if not files:
        table = saved(library, samples, seed)
    elif files[0].suffix.lower() == ".parquet":
        table = parquet(library, files)
    else:
        table = tars(library, files)
    chosen = columns.of_inputs(table.features, inputs, spec, column)
    label, notes = columns.of_labels(table.features, chosen)
    wanted = list(dict.fromkeys([*chosen.values(), *([] if label is None else [label])]))
    names = ", ".join(f"column {name!r}" for name in chosen.values())
    if samples is not None and files and (table.total is None or samples < table.total):
        notes.append(f"{spec}: the first {samples} samples are taken, in the order of the files")
    described = f"{spec}: {table.what}, {names}"
    pictures = [name for name in chosen.values() if columns.is_image(table.features[name])]
    if not pictures:
        arrays = partial(chunks.of_arrays, table, wanted, chosen, label, spec)
        return Source(arrays, described, tuple(notes), table.total, count=table.count)
    if len(inputs) != 1:
        raise DataError(f"{spec}: images serve a model with one input, and this one has {len(inputs)}; give arrays, or FILE.py:FUNCTION")
    pipeline, assumed = resolve(shaped(inputs[0], input_shapes), options)
    images = partial(chunks.of_images, table, wanted, pictures[0], inputs[0].name, label, pipeline)
    return Source(images, f"{described}: {pipeline}", (*notes, *assumed), table.total, pictures=True, count=table.count)
