"""Images as a network wants them: read, resized, cropped, scaled, normalised.

The steps and their rounding follow torchvision's and timm's evaluation transforms: the shorter side is resized (Pillow, with its
antialiasing), the centre is cropped, the values are scaled and normalised per channel.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's codes
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class ImageOptions:
    """What to do with an image; None leaves it to the default, which `Pipeline` states.

    size: (height, width) that the network gets. resize: the shorter side before the crop, or crop_pct: size / resize. stretch: resize
    to the size itself, whatever the proportions. mean, std: per channel, of the scaled values. scale: multiplies the pixel values.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    crop_pct: float | None = None
    stretch: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    interpolation: str | None = None
    bgr: bool = False

    @classmethod
    def from_config(cls, path: str | Path) -> ImageOptions:
        """The options in a preprocessing config of timm (pretrained_cfg) or Hugging Face (preprocessor_config.json)."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror or error})") from None
        except ValueError:
            raise DataError(f"{path}: not a JSON file") from None
        if not isinstance(found, dict):
            raise DataError(f"{path}: not a preprocessing config; expected a JSON object")
        config = found.get("pretrained_cfg", found)
        try:
            if "input_size" in config or "crop_pct" in config:
                return cls._timm(config)
            if any(key in config for key in ("image_mean", "do_normalize", "do_resize", "crop_size", "size")):
                return cls._hugging_face(config)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"{path}: a preprocessing config that makes no sense ({type(error).__name__}: {error})") from None
        raise DataError(
            f"{path}: neither timm's (input_size, mean, std) nor Hugging Face's (image_mean, image_std, size) preprocessing config"
        )

    @classmethod
    def _timm(cls, config: dict[str, Any]) -> ImageOptions:
        height, width = config.get("input_size", (3, 224, 224))[-2:]
        mode = config.get("crop_mode", "center")
        return cls(
            size=(int(height), int(width)),
            crop_pct=float(config.get("crop_pct", 0.875)),
            stretch=mode == "squash",
            mean=_floats(config.get("mean")),
            std=_floats(config.get("std")),
            scale=1 / 255,
            interpolation=config.get("interpolation"),
        )

    @classmethod
    def _hugging_face(cls, config: dict[str, Any]) -> ImageOptions:
        size, crop = config.get("size", {}), config.get("crop_size", {})
        size = {"shortest_edge": size} if isinstance(size, int) else size
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        cropped = bool(crop) and config.get("do_center_crop", False)
        if cropped:
            target = (int(crop["height"]), int(crop["width"]))
        elif "height" in size:
            target = (int(size["height"]), int(size["width"]))
        else:
            target = (int(size["shortest_edge"]),) * 2
        normalised = config.get("do_normalize", True)
        code = config.get("resample", 2)
        return cls(
            size=target,
            resize=int(size["shortest_edge"]) if "shortest_edge" in size else None,
            stretch="height" in size and not cropped,
            mean=_floats(config.get("image_mean")) if normalised else None,
            std=_floats(config.get("image_std")) if normalised else None,
            scale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
            interpolation=FILTERS[int(code)] if isinstance(code, int) else str(code),
        )


def _floats(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(v) for v in values)


class Pipeline:
    """The options resolved for one input of shape (N, C, H, W) or (N, H, W, C): callable on a file, and readable."""

    def __init__(self, options: ImageOptions, shape: tuple[int | str | None, ...]) -> None:
        if len(shape) != 4:
            raise DataError(f"images need an input of rank 4, (N, C, H, W) or (N, H, W, C); this one has shape {list(shape)}")
        fixed = [n if isinstance(n, int) else None for n in shape]
        self.last = fixed[1] not in MODES and fixed[3] in MODES
        channels = fixed[3] if self.last else fixed[1]
        self.channels = 3 if channels is None else channels
        if self.channels not in MODES:
            raise DataError(f"images have 1, 3 or 4 channels; the input of shape {list(shape)} wants {self.channels}")
        height, width = fixed[1:3] if self.last else fixed[2:4]
        wanted = options.size or (height or width or 224, width or height or 224)
        if (height not in (None, wanted[0])) or (width not in (None, wanted[1])):
            raise DataError(f"the network takes images of {height} x {width}, not {wanted[0]} x {wanted[1]}; leave --image-size out")
        self.size = wanted
        self.stretch = options.stretch
        self.resize = options.resize or math.floor(min(wanted) / (options.crop_pct or 1.0))
        self.interpolation = options.interpolation or "bilinear"
        if self.interpolation not in FILTERS:
            raise UsageError(f"interpolation '{self.interpolation}' is not known; choose one of {', '.join(FILTERS)}")
        self.scale = 1 / 255 if options.scale is None else options.scale
        self.bgr = options.bgr
        self.notes = []
        if options.mean is None or options.std is None:
            self.notes.append("images are scaled to [0, 1] and not normalised: give --mean and --std if the network was trained with them")
        self.mean, self.std = (self._per_channel(c, name) for c, name in ((options.mean, "mean"), (options.std, "std")))

    def _per_channel(self, values: tuple[float, ...] | None, name: str) -> npt.NDArray[np.float64]:
        default = 0.0 if name == "mean" else 1.0
        given = (default,) if values is None else values
        if len(given) not in (1, self.channels) or (name == "std" and 0 in given):
            raise UsageError(f"{name} has {len(given)} values, the network's images have {self.channels} channels (and no std is 0)")
        return np.broadcast_to(np.asarray(given, np.float64), self.channels)

    def __str__(self) -> str:
        height, width = self.size
        shape = f"stretched to {height}x{width}" if self.stretch else f"shorter side {self.resize}, centre {height}x{width}"
        order = ("BGR" if self.bgr else MODES[self.channels]) + (" NHWC" if self.last else " NCHW")
        scale = "1/255" if self.scale == 1 / 255 else f"{self.scale:g}"
        numbers = [", ".join(f"{v:g}" for v in c) for c in (self.mean, self.std)]
        return f"{shape} ({self.interpolation}), times {scale}, minus ({numbers[0]}), over ({numbers[1]}), {order}"

    def __call__(self, path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """One sample, without a batch axis. Raises DataError naming a file that is no image, or a broken one."""
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened)
                image = (
                    image.convert("RGBA").convert(MODES[self.channels])
                    if image.mode in ("P", "LA", "PA")
                    else image.convert(MODES[self.channels])
                )
        except Exception as error:  # Pillow raises many kinds for a broken file
            text = " ".join(str(error).split())[:120]
            raise DataError(f"{path}: not an image, or a broken one ({text}); remove it from the folder") from None
        pixels = np.asarray(self._shaped(image), np.float64).reshape(*self.size, self.channels)
        if self.bgr:
            pixels = pixels[..., ::-1]
        pixels = (pixels * self.scale - self.mean) / self.std
        return np.ascontiguousarray(pixels if self.last else pixels.transpose(2, 0, 1)).astype(dtype)

    def _shaped(self, image: Image) -> Image:
        from PIL.Image import Resampling

        how = Resampling[self.interpolation.upper()]
        height, width = self.size
        if self.stretch:
            return image.resize((width, height), how)
        w, h = image.size
        new = (self.resize, max(1, int(self.resize * h / w))) if w <= h else (max(1, int(self.resize * w / h)), self.resize)
        if new != image.size:
            image = image.resize(new, how)
        left, top = round((image.size[0] - width) / 2), round((image.size[1] - height) / 2)
        return image.crop((left, top, left + width, top + height))  # what lies outside is filled with zeros
