"""Folders of images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from bnfold.errors import DataError
from bnfold.text import counted

from ..source import Chunk, Request, Source
from ..spec import Array, Batch
from .pipeline import resolve, shaped

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def find(folder: Path) -> Iterator[Path]:
    """The images below a folder, but for those that are hidden or lie in a folder that is."""
    for path in folder.rglob("*"):
        if path.suffix.lower() in SUFFIXES and path.is_file() and not _hidden(path.relative_to(folder)):
            yield path


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _labelled(folder: Path) -> tuple[list[Path], Array | None, int | None, list[str]]:
    """The images below a folder in sorted order; their labels, the places of their sub-folders among these, sorted; how many; notes."""
    paths = sorted(find(folder))
    if not paths:
        raise DataError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))}) and no .npy files in it")
    inside = [p.relative_to(folder).parts for p in paths]
    if all(len(parts) == 1 for parts in inside):
        return paths, None, None, []
    if any(len(parts) == 1 for parts in inside):
        return paths, None, None, [f"{folder}: some images lie outside its sub-folders, so there are no labels"]
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not _hidden(Path(p.name)))
    return paths, np.array([classes.index(parts[0]) for parts in inside], np.int64), len(classes), []


def folder_source(asked: Request) -> Source:
    """A folder of images; as many as are asked for, when that is fewer, by a shuffle from the seed."""
    folder, samples = Path(asked.spec), asked.samples
    spec = shaped(asked.only_input("images serve", "an .npz file or FILE.py:FUNCTION"), asked.input_shapes)
    paths, labels, classes, notes = _labelled(folder)
    pipeline, assumed = resolve(spec, asked.images)
    total = len(paths)
    if samples is not None and 0 < samples < total:
        chosen = np.random.default_rng(asked.seed).permutation(total)[:samples]
        paths, labels = [paths[i] for i in chosen], None if labels is None else labels[chosen]

    def make(path: Path) -> Batch:
        return {spec.name: pipeline(path)[None]}

    def chunks() -> Iterator[Chunk]:
        for place, path in enumerate(paths):
            label = None if labels is None else labels[place : place + 1]
            yield Chunk({}, label, str(path), single=True, make=partial(make, path))

    of = f"{len(paths)} of {total} images" if len(paths) < total else counted(total, "image")
    return Source(chunks, f"{folder}: {of}: {pipeline}", (*notes, *assumed), len(paths), labels=labels, images=True, classes=classes)
