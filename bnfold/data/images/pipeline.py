"""From an image file to a sample, prepared as the model was trained to see it; and folders of images.

The steps and their rounding are torchvision's (`Resize`, `CenterCrop`, `ToTensor`, `Normalize`) and those of timm's evaluation transform:
turn upright by EXIF, convert to the model's channels, resize, crop the centre, scale, normalise, order the channels and the axes.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfold.capture import Switch
from bnfold.errors import DataError, UsageError
from bnfold.text import counted, one_line

from ..corrupt import CorruptError
from ..source import Chunk, Request, Source
from ..spec import Array, Batch, InputSpec, is_float, shape_text
from .options import CROP_PCT, INTERPOLATIONS, ImageOptions

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
SIZE = 224
# Pillow knows many more, and starts a program for one (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MOST_PIXELS = 1 << 27  # of an image that is decoded
LARGE = 1 << 22  # pixels, beyond which images are decoded one at a time, so that memory holds one of them
_one_at_a_time = Switch(lambda: None, lambda before: None, alone=True)


@dataclass(frozen=True)
class Pipeline:
    """The steps from an image file to one sample in the layout of `spec`, all resolved."""

    dtype: np.dtype[Any]
    channels: int
    size: tuple[int, int]
    resize: int | tuple[int, int]
    cover: bool  # resize is a pair to cover with the aspect kept
    crop: bool
    interpolation: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool
    bgr: bool
    whole: bool  # images of at most `size` are resized to it and not cropped

    def __call__(self, content: Path | bytes, where: str | None = None) -> Array:
        """(C, H, W), or (H, W, C) with channels last, of a file or its bytes. CorruptError where these can't be decoded."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        name = where or str(content)
        try:
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as file:
                if (pixels := file.width * file.height) > MOST_PIXELS:
                    raise CorruptError(name, f"the image has {file.width}x{file.height} pixels; reduce it below {MOST_PIXELS:,} first")
                if file.mode.startswith(("I", "F")):
                    raise DataError(
                        f"{name}: the image has more than 8 bits per channel; save it with 8, or prepare it with FILE.py:FUNCTION"
                    )
                with _one_at_a_time() if pixels > LARGE else contextlib.nullcontext():
                    ImageOps.exif_transpose(file, in_place=True)
                    image = file.convert(MODES[self.channels])
                    whole = self.whole and image.height <= self.size[0] and image.width <= self.size[1]
                    image = self._scaled(image, self.size[::-1], name) if whole else self._resized(image, name)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            text = f"it is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else one_line(error)
            raise CorruptError(name, f"the image can't be decoded ({text})") from None
        if self.crop and not whole:
            image = image.crop(_centre(image.size, self.size))
        if (image.height, image.width) != self.size:
            raise DataError(
                f"{name}: the image is {image.height}x{image.width} and the model takes "
                f"{self.size[0]}x{self.size[1]}; let it be resized or cropped"
            )
        made = self._normalised(np.asarray(image).reshape(*self.size, self.channels))
        made = made[..., ::-1] if self.bgr else made
        return np.ascontiguousarray(made if self.channels_last else made.transpose(2, 0, 1))

    def _resized(self, image: Image, name: str) -> Image:
        if self.resize == 0:
            return image
        width, height = image.size
        if isinstance(self.resize, int):  # torchvision: the longer side is cut to an integer
            short, long = self.resize, int(self.resize * max(width, height) / min(width, height))
            target = (short, long) if width <= height else (long, short)
        elif self.cover:  # timm's ResizeKeepRatio
            ratio = min(height / self.resize[0], width / self.resize[1])
            target = (round(width / ratio), round(height / ratio))
        else:
            target = (self.resize[1], self.resize[0])
        return self._scaled(image, target, name)

    def _scaled(self, image: Image, target: tuple[int, int], name: str) -> Image:
        if target[0] * target[1] > MOST_PIXELS:
            raise CorruptError(name, f"resized, it would have {target[0]}x{target[1]} pixels; it is too narrow, or --resize too large")
        return image if target == image.size else image.resize(target, INTERPOLATIONS.index(self.interpolation))

    def _normalised(self, pixels: Array) -> Array:
        if not is_float(self.dtype):
            return pixels.astype(self.dtype)
        real: Array = pixels.astype(np.float32)
        real = real / np.float32(255) if self.scale == 1 / 255 else real * np.float32(self.scale)  # ToTensor divides
        real = (real - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return real.astype(self.dtype)

    def __str__(self) -> str:
        height, width = self.size
        steps = [MODES[self.channels]]
        if self.resize:
            pair = "x".join(map(str, self.resize)) if isinstance(self.resize, tuple) else ""
            steps.append(f"{'cover' if self.cover else 'resize to'} {pair or f'shorter side {self.resize}'} ({self.interpolation})")
        if self.crop:
            steps.append(f"centre crop {height}x{width}")
        if self.whole:
            steps[1:] = [f"{', '.join(steps[1:])}, if larger than {height}x{width}"]
        if is_float(self.dtype):
            steps.append("scale 1/255" if self.scale == 1 / 255 else f"scale {self.scale:g}")
            for name, values, idle in (("mean", self.mean, 0), ("std", self.std, 1)):
                if any(v != idle for v in values):
                    steps.append(f"{name} {', '.join(f'{v:g}' for v in values)}")
        else:
            steps.append("pixels as they are")
        return " -> ".join([*steps, *(["BGR"] if self.bgr else []), f"{self.dtype} {'HWC' if self.channels_last else 'CHW'}"])


def _centre(have: tuple[int, int], want: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of torchvision's CenterCrop, from (width, height) and (height, width); black beyond the image."""
    (width, height), (tall, wide) = have, want
    left = -((wide - width) // 2) if wide > width else round((width - wide) / 2)
    top = -((tall - height) // 2) if tall > height else round((height - tall) / 2)
    return left, top, left + wide, top + tall


def resolve(spec: InputSpec, options: ImageOptions | None = None) -> tuple[Pipeline, list[str]]:
    """The pipeline for an input, and notes on what was assumed. DataError: it takes no images; UsageError: the options contradict it."""
    given, notes = options or ImageOptions(), []
    whole = f"input {spec.name!r} takes {spec}"
    if len(spec.shape) != 4 or not (is_float(spec.dtype) or np.can_cast(np.uint8, spec.dtype, "safe")):
        raise DataError(f"{whole}, which isn't images; give arrays, or FILE.py:FUNCTION")
    last = given.channels_last
    if last is None:
        last = spec.shape[1] not in MODES and spec.shape[3] in MODES
    channels = spec.shape[3 if last else 1]
    channels = channels if isinstance(channels, int) else 3
    if channels not in MODES:
        raise DataError(f"{whole}: images have 1, 3 or 4 channels, not {channels}; if the channels come last, say so")
    sides = spec.shape[1:3] if last else spec.shape[2:4]
    height, width = (n if isinstance(n, int) else SIZE for n in sides)
    size = (given.size, given.size) if isinstance(given.size, int) else given.size or (height, width)
    if given.size is None and any(not isinstance(n, int) for n in sides):
        notes.append(f"{whole}; images are made {height}x{width}, as no size is given")
    if any(isinstance(n, int) and n != w for n, w in zip(sides, size, strict=True)):
        raise UsageError(f"{whole}, so images of {size[0]}x{size[1]} don't fit; give that size, or none")
    given.check()
    crop = given.crop is not False and not given.stretch
    resize, cover = None if given.stretch else given.resize, False
    uncut = crop and given.crop is None and resize is None and given.crop_pct is None
    if resize is None and not crop:
        resize = size
    elif resize is None:
        pct = CROP_PCT if given.crop_pct is None else given.crop_pct
        full = (math.floor(size[0] / pct), math.floor(size[1] / pct))
        resize, cover = (full[0], False) if full[0] == full[1] else (full, True)
        if given.crop_pct is None:
            notes.append(
                f"neither a resize nor crop_pct is given; {CROP_PCT} is taken, timm's default, for images larger than {size[0]}x{size[1]}"
            )
    mean, std = given.mean or (0.0,), given.std or (1.0,)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise UsageError(
                f"{name} has {len(values)} values, and {whole}: {channels} channels; give one for each channel, or one for all"
            )
    if given.bgr and channels != 3:
        raise UsageError(f"{whole}: BGR needs 3 channels, not {channels}")
    if is_float(spec.dtype) and given.mean is None and given.std is None:
        scaled = "scaled to [0, 1]" if given.scale is None else f"multiplied by {given.scale:g}"
        notes.append(f"no mean and std are given: values are {scaled} and not normalised")
    elif not is_float(spec.dtype) and (given.mean or given.std or given.scale):
        notes.append(f"{whole}: it gets pixels as they are, so scale, mean and std aren't used")
    scale = 1 / 255 if given.scale is None else given.scale
    interpolation = given.interpolation or "bilinear"
    made = Pipeline(spec.dtype, channels, size, resize, cover, crop, interpolation, scale, mean, std, last, bool(given.bgr), uncut)
    return made, notes


def shaped(spec: InputSpec, input_shapes: Mapping[str, Sequence[int]]) -> InputSpec:
    """The input with the sizes that are asked for in place of open axes."""
    shape = input_shapes.get(spec.name)
    if not shape:
        return spec
    if len(shape) != len(spec.shape):
        raise UsageError(f"input {spec.name!r} has shape {shape_text(spec.shape)}; {shape_text(shape)} doesn't fit it")
    axes = (n if isinstance(n, int) else m for n, m in zip(spec.shape[1:], shape[1:], strict=True))
    return InputSpec(spec.name, spec.dtype, (spec.shape[0], *axes))


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


def folder_source(request: Request) -> Source:
    """A folder of images; as many as are asked for, when that is fewer, by a shuffle from the seed."""
    folder, samples = Path(request.spec), request.samples
    spec = shaped(request.only_input("images serve", "an .npz file or FILE.py:FUNCTION"), request.input_shapes)
    paths, labels, classes, notes = _labelled(folder)
    pipeline, assumed = resolve(spec, request.images)
    total = len(paths)
    if samples is not None and 0 < samples < total:
        chosen = np.random.default_rng(request.seed).permutation(total)[:samples]
        paths, labels = [paths[i] for i in chosen], None if labels is None else labels[chosen]

    def make(path: Path) -> Batch:
        return {spec.name: pipeline(path)[None]}

    def chunks() -> Iterator[Chunk]:
        for place, path in enumerate(paths):
            label = None if labels is None else labels[place : place + 1]
            yield Chunk({}, label, str(path), single=True, make=partial(make, path))

    of = f"{len(paths)} of {total} images" if len(paths) < total else counted(total, "image")
    return Source(chunks, f"{folder}: {of}: {pipeline}", (*notes, *assumed), len(paths), labels=labels, images=True, classes=classes)
