"""How images become a model's input, as the user says it or as a configuration of timm or Hugging Face does."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfold.errors import DataError, UsageError
from bnfold.files import contents
from bnfold.text import listed, meant

INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # at their codes in Pillow and Hugging Face
CROP_PCT = 0.875
LONGEST = 1 << 20  # bytes of a configuration


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

    def check(self) -> None:
        """UsageError for what no images could be prepared with, whatever the model takes."""
        if (name := self.interpolation) is not None and name not in INTERPOLATIONS:
            near = meant(name, INTERPOLATIONS)
            raise UsageError(f"interpolation {name!r} isn't known; give {listed(INTERPOLATIONS, 'or')}{near}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UsageError(f"crop_pct is {self.crop_pct}; it must be above 0 and at most 1")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise UsageError(f"std is {', '.join(map(str, self.std))}; every value must be above 0")

    @classmethod
    def from_config(cls, path: str | Path) -> ImageOptions:
        """Options of timm's config.json (or its pretrained_cfg alone) or of Hugging Face's preprocessor_config.json."""
        try:
            config = json.loads(contents(Path(path), LONGEST, "the configuration"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: can't be read as JSON ({error})") from None
        return cls.from_settings(config, str(path))

    @classmethod
    def from_settings(cls, config: Any, where: str) -> ImageOptions:
        """The same of what stands in such a file."""
        try:
            if isinstance(config, Mapping):
                timm = config.get("pretrained_cfg", config)
                found: ImageOptions | None = None
                if isinstance(timm, Mapping) and "input_size" in timm:
                    found = _from_timm(timm)
                elif config.keys() & {"image_mean", "do_normalize", "do_resize", "crop_size", "do_rescale", "size"}:
                    found = _from_hugging_face(config)
                if found is not None:
                    found.check()
                    return found
        except (TypeError, ValueError, KeyError, IndexError, ArithmeticError) as error:
            raise DataError(f"{where}: a setting has a form that bnfold doesn't know ({type(error).__name__}: {error})") from None
        except (DataError, UsageError) as error:
            raise DataError(f"{where}: {error}") from None
        raise DataError(
            f"{where}: neither timm's pretrained_cfg (input_size) nor Hugging Face's preprocessor_config.json (size, image_mean)"
        )


IMAGENET = ImageOptions(crop=True, crop_pct=224 / 256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear")


def preset(name: str, settings: Mapping[str, Any] | None, folder: Path) -> ImageOptions | None:
    """What "timm", "torchvision" or "hf" stands for; None for another text, which is a file's name.

    settings: timm's, which came with the model; folder: where the model lies, and Hugging Face's preprocessor_config.json beside it. Of
    torchvision, whose models bring nothing, the transform of its first weights: 256/224 of the size, the centre, ImageNet's mean and std.
    """
    if name == "timm":
        if not settings:
            raise UsageError("--preprocess timm: the model brings no pretrained_cfg of timm's; give its config.json")
        return ImageOptions.from_settings(settings, "the model's pretrained_cfg")
    if name == "hf":
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            raise UsageError(f"--preprocess hf: there is no {path}; give the file")
        return ImageOptions.from_config(path)
    if name == "torchvision":
        return IMAGENET
    if not name.endswith(".json") and not Path(name).exists():
        kinds = ("timm", "hf", "torchvision")
        raise UsageError(f"--preprocess {name}: give {listed(kinds, 'or')}, or a CONFIG.json of theirs{meant(name, kinds)}")
    return None


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
