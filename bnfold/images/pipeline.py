"""Folders of images, prepared as the model was trained to see them.

The steps and their rounding are torchvision's (`Resize`, `CenterCrop`, `ToTensor`, `Normalize`) and those of timm's evaluation transform:
turn upright by EXIF, convert to the model's channels, resize, crop the centre, scale, normalise, order the channels and the axes.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .bad import CorruptError
from .data import Array, Batch, Chunk, InputSpec, Source, counted
from .errors import DataError, UsageError
from .values import is_float, shape_text

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # at their codes in Pillow and Hugging Face
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CROP_PCT = 0.875
SIZE = 224


@dataclass(frozen=True)
class ImageOptions:
    """How images become a model's input; None is what isn't given.

    size: (height, width) that the model takes. resize: the shorter side in pixels, or (height, width) for both, or 0 for none.
    crop: whether the centre of `size` is cut out after the resize; without, images are resized to `size`. crop_pct: `size` over the
    resize where that isn't given. scale: what pixels of 0 to 255 are multiplied by (1/255). mean, std: per channel, after the scale, in
    the order RGB. interpolation: one of Pillow's. channels_last: NHWC. bgr: the channels are reversed, last of all. stretch: images are
    resized to `size` itself and nothing is cut, whatever resize, crop and crop_pct say.
    """

    size: int | tuple[int, int] | None = None
    resize: int | tuple[int, int] | None = None
    crop: bool | None = None
    crop_pct: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    interpolation: str | None = None
    channels_last: bool | None = None
    bgr: bool | None = None
    stretch: bool | None = None

    @classmethod
    def from_config(cls, path: str | Path) -> ImageOptions:
        """Options of timm's config.json (or its pretrained_cfg alone) or of Hugging Face's preprocessor_config.json."""
        try:
            config = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: can't be read as JSON ({error})") from None
        try:
            if isinstance(config, dict):
                timm = config.get("pretrained_cfg", config)
                if isinstance(timm, dict) and "input_size" in timm:
                    return _from_timm(timm)
                if config.keys() & {"image_mean", "do_normalize", "do_resize", "crop_size", "do_rescale", "size"}:
                    return _from_hugging_face(config)
        except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
            raise DataError(f"{path}: a setting has a form that bnfold doesn't know ({type(error).__name__}: {error})") from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        raise DataError(
            f"{path}: neither timm's pretrained_cfg (input_size) nor Hugging Face's preprocessor_config.json (size, image_mean)"
        )


def _from_timm(config: Mapping[str, Any]) -> ImageOptions:
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise DataError(f"crop_mode {mode!r} isn't served (center and squash are); prepare the images yourself with FILE.py:FUNCTION")
    _, height, width = config["input_size"]
    pct = float(config.get("crop_pct") or CROP_PCT)
    return ImageOptions(
        size=(height, width),
        resize=(math.floor(height / pct), math.floor(width / pct)) if mode == "squash" else None,
        crop=True,
        crop_pct=pct,
        mean=_floats(config.get("mean")),
        std=_floats(config.get("std")),
        interpolation=config.get("interpolation"),
    )


def _from_hugging_face(config: Mapping[str, Any]) -> ImageOptions:
    size, crop = config.get("size"), bool(config.get("do_center_crop", "crop_size" in config))
    resize: int | tuple[int, int] | None = None
    if isinstance(size, int):  # an older form: the shorter side where a crop follows, else both sides
        size = {"shortest_edge": size} if crop or "crop_pct" in config else {"height": size, "width": size}
    if isinstance(size, dict) and "shortest_edge" in size and "longest_edge" not in size:
        resize = int(size["shortest_edge"])
    elif isinstance(size, dict) and "height" in size:
        resize = (int(size["height"]), int(size["width"]))
    elif size is not None:
        raise DataError(f"size {size} isn't served (shortest_edge, and height with width, are); prepare the images with FILE.py:FUNCTION")
    cut = config.get("crop_size") if crop else None
    final = (int(cut["height"]), int(cut["width"])) if isinstance(cut, dict) else (cut, cut) if isinstance(cut, int) else None
    if isinstance(resize, int) and config.get("crop_pct") and not crop:  # ConvNeXt: crops below 384 pixels, squashes from there on
        final, crop = (resize, resize), resize < 384
        resize = int(resize / config["crop_pct"]) if crop else final
    if not config.get("do_resize", True):
        resize = 0
    for key in ("rescale_offset", "include_top", "do_pad", "do_thumbnail", "do_align_long_axis"):
        if config.get(key):
            raise DataError(f"{key} isn't served; prepare the images yourself with FILE.py:FUNCTION")
    code = config.get("resample")
    plain = config.get("do_normalize", True) is False
    return ImageOptions(
        size=final or (resize if isinstance(resize, tuple) else None),
        resize=resize,
        crop=crop,
        mean=(0.0,) if plain else _floats(config.get("image_mean")),
        std=(1.0,) if plain else _floats(config.get("image_std")),
        scale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
        interpolation=None if code is None else INTERPOLATIONS[code],
        bgr=True if config.get("do_flip_channel_order") else None,
    )


def _floats(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, values)) if isinstance(values, (list, tuple)) else (float(values),)


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

    def __call__(self, content: Path | bytes, where: str | None = None) -> Array:
        """(C, H, W), or (H, W, C) with channels last, of a file or its bytes. CorruptError where these can't be decoded."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        name = where or str(content)
        try:
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
                if file.mode.startswith(("I", "F")):
                    raise DataError(
                        f"{name}: the image has more than 8 bits per channel; save it with 8, or prepare it with FILE.py:FUNCTION"
                    )
                image = ImageOps.exif_transpose(file).convert(MODES[self.channels])
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            text = "it is no image of a kind that Pillow reads" if isinstance(error, UnidentifiedImageError) else str(error)
            raise CorruptError(name, f"the image can't be decoded ({text})") from None
        image = self._resized(image)
        if self.crop:
            image = image.crop(_centre(image.size, self.size))
        if (image.height, image.width) != self.size:
            raise DataError(
                f"{name}: the image is {image.height}x{image.width} and the model takes "
                f"{self.size[0]}x{self.size[1]}; let it be resized or cropped"
            )
        pixels = np.asarray(image).reshape(*self.size, self.channels)
        made = self._normalised(pixels) if is_float(self.dtype) else pixels.astype(self.dtype)
        made = made[..., ::-1] if self.bgr else made
        return np.ascontiguousarray(made if self.channels_last else made.transpose(2, 0, 1))

    def _resized(self, image: Image) -> Image:
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
        return image if target == image.size else image.resize(target, INTERPOLATIONS.index(self.interpolation))

    def _normalised(self, pixels: Array) -> Array:
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
    """The pipeline for an input, and notes on what was assumed. DataError where the input takes no images, or options contradict it."""
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
        raise DataError(f"{whole}, so images of {size[0]}x{size[1]} don't fit; give that size, or none")
    interpolation = given.interpolation or "bilinear"
    if interpolation not in INTERPOLATIONS:
        raise DataError(f"interpolation {interpolation!r} isn't known; give one of {', '.join(INTERPOLATIONS)}")
    crop = given.crop is not False and not given.stretch
    resize, cover = None if given.stretch else given.resize, False
    if resize is None and not crop:
        resize = size
    elif resize is None:
        pct = CROP_PCT if given.crop_pct is None else given.crop_pct
        if not 0 < pct <= 1:
            raise DataError(f"crop_pct is {pct}; it must be above 0 and at most 1")
        full = (math.floor(size[0] / pct), math.floor(size[1] / pct))
        resize, cover = (full[0], False) if full[0] == full[1] else (full, True)
        if given.crop_pct is None:
            notes.append(
                f"neither a resize nor crop_pct is given; {CROP_PCT} is taken, timm's default: resize to {max(full)}, crop the centre"
            )
    mean, std = given.mean or (0.0,), given.std or (1.0,)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise DataError(f"{name} has {len(values)} values, and {whole}: {channels} channels; give one for each channel, or one for all")
    if not all(v > 0 for v in std):
        raise DataError(f"std is {', '.join(map(str, std))}; every value must be above 0")
    if given.bgr and channels != 3:
        raise DataError(f"{whole}: BGR needs 3 channels, not {channels}")
    if is_float(spec.dtype) and given.mean is None and given.std is None:
        told = "scaled to [0, 1]" if given.scale is None else f"multiplied by {given.scale:g}"
        notes.append(f"no mean and std are given: values are {told} and not normalised")
    elif not is_float(spec.dtype) and (given.mean or given.std or given.scale):
        notes.append(f"{whole}: it gets pixels as they are, so scale, mean and std aren't used")
    scale = 1 / 255 if given.scale is None else given.scale
    made = Pipeline(spec.dtype, channels, size, resize, cover, crop, interpolation, scale, mean, std, last, bool(given.bgr))
    return made, notes


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


def shaped(spec: InputSpec, input_shapes: Mapping[str, Sequence[int]] | None) -> InputSpec:
    """The input with the sizes that are asked for in place of open axes."""
    shape = (input_shapes or {}).get(spec.name)
    if not shape:
        return spec
    if len(shape) != len(spec.shape):
        raise UsageError(f"input {spec.name!r} has shape {shape_text(spec.shape)}; {shape_text(shape)} doesn't fit it")
    axes = (n if isinstance(n, int) else m for n, m in zip(spec.shape[1:], shape[1:], strict=True))
    return InputSpec(spec.name, spec.dtype, (spec.shape[0], *axes))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


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
