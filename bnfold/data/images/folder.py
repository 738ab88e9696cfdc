"""Folders of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bnfold.errors import DataError
from bnfold.text import counted

from ..source import Chunk, Source
from ..spec import Array, Batch, InputSpec
from .options import ImageOptions
from .pipeline import resolve, shaped

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def has_images(folder: Path) -> bool:
    """Whether there is an image below a folder."""
    return any(p.suffix.lower() in SUFFIXES and p.is_file() and not _hidden(p.relative_to(folder)) for p in folder.rglob("*"))


def find_images(folder: Path) -> tuple[list[Path], Array | None, list[str]]:
    """The images below a folder in sorted order; their labels, the places of their sub-folders in sorted order; notes."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and not _hidden(p.relative_to(folder)))
    if not paths:
        raise DataError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))}) and no .npy files in it")
    inside = [p.relative_to(folder).parts for p in paths]
    if all(len(parts) == 1 for parts in inside):
        return paths, None, []
    if any(len(parts) == 1 for parts in inside):
        return paths, None, [f"{folder}: some images lie outside its sub-folders, so there are no labels"]
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not _hidden(Path(p.name)))
    return paths, np.array([classes.index(parts[0]) for parts in inside], np.int64), []


def folder_source(
    folder: Path,
    inputs: Sequence[InputSpec],
    *,
    samples: int | None,
    seed: int,
    options: ImageOptions | None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Source:
    """A folder of images; `samples` of them, when that is fewer, by a shuffle from `seed`."""
    if len(inputs) != 1:
        raise DataError(
            f"{folder}: images serve a model with one input, and this one has {len(inputs)}; give an .npz file or FILE.py:FUNCTION"
        )
    spec = inputs[0]
    spec = shaped(spec, input_shapes)
    paths, labels, notes = find_images(folder)
    pipeline, assumed = resolve(spec, options)
    total = len(paths)
    if samples is not None and 0 < samples < total:
        chosen = np.random.default_rng(seed).permutation(total)[:samples]
        paths, labels = [paths[i] for i in chosen], None if labels is None else labels[chosen]

    def make(path: Path) -> Batch:
        return {spec.name: pipeline(path)[None]}

    def chunks() -> Iterator[Chunk]:
        for place, path in enumerate(paths):
            label = None if labels is None else labels[place : place + 1]
            yield Chunk({}, label, str(path), single=True, make=partial(make, path))

    of = f"{len(paths)} of {total} images" if len(paths) < total else counted(total, "image")
    return Source(chunks, f"{folder}: {of}: {pipeline}", (*notes, *assumed), len(paths), labels=labels, pictures=True)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
