"""The options of data: what is fed to a model, and what it looks like."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bnfold.errors import UsageError

from ..job import Job
from . import parse
from .common import DATA, IMAGES, option

if TYPE_CHECKING:
    from bnfold.data import InputSpec
    from bnfold.data.images import ImageOptions


@dataclass(frozen=True)
class Shaping:
    """What random data look like."""

    input_shape: Annotated[
        list[str] | None,
        option(
            "--input-shape",
            panel=DATA,
            metavar="[NAME=]1,3,224,224[:TYPE]",
            help="Shape of an input with open axes; of a module's, its type too, such as int64, where it isn't floating point; repeatable.",
        ),
    ] = None
    seed: Annotated[int, option("--seed", panel=DATA, help="For everything random.")] = 0

    def specs(self, model: Any, example: Any = None) -> list[InputSpec]:
        """What the model is fed. example: how a module is called, as `read` gives it."""
        from bnfold.backends import family

        if family(model) == "onnx":
            from bnfold.backends.onnx.graph.inputs import inputs

            return inputs(model)
        from bnfold.backends.torch.export.trace import trace

        return trace(model, example).specs

    def shapes(self, model: Any, example: Any = None) -> dict[str, tuple[int, ...]] | None:
        """The shapes asked for, by input name."""
        if not self.input_shape:
            return None
        from bnfold.backends import is_module
        from bnfold.data.random import check_shapes

        specs = self.specs(model, example)
        taken = {spec.name: spec.dtype.name for spec in specs}
        asked = parse.shapes(self.input_shape, list(taken), "--input-shape")
        for name, shape in asked.items():
            if shape.dtype not in (None, taken[name]) and not is_module(model):
                raise UsageError(f"--input-shape {name}=...:{shape.dtype}: the model takes {taken[name]} there")
        found = {name: shape.sizes for name, shape in asked.items()}
        if not is_module(model):  # a module is read for the shape that is asked for
            check_shapes(found, specs)
        return found

    def read(self, model: Any, spec: str | None) -> Any:
        """As `call`, for several steps: the module is read at once, and by none of them again. With nothing to call it with, it isn't."""
        from bnfold.backends import is_module

        call = self.call(model, spec)
        if not is_module(model) or (call is None and spec is None):
            return call
        from bnfold.backends.torch.export.trace import trace

        return trace(model, call)

    def call(self, model: Any, spec: str | None = None) -> Any:
        """How a PyTorch module is called: with the shapes asked for, as the data show, or as the model itself says (None)."""
        from bnfold.backends import is_module

        if not is_module(model):
            self.shapes(model)  # shapes that don't fit are refused, whoever asks for them
            return None
        from bnfold.backends.torch.export.trace import Call, example_of, forward_names, in_places, random_example, shortened_call

        if self.input_shape:
            asked = parse.shapes(self.input_shape, forward_names(model), "--input-shape")
            types = {name: shape.dtype for name, shape in asked.items() if shape.dtype is not None}
            return in_places(model, random_example(model, {name: shape.sizes for name, shape in asked.items()}, types))
        if spec in (None, "random") or getattr(model, "pretrained_cfg", None) or getattr(model, "example_input_array", None) is not None:
            return None
        from bnfold.data.open import first_of

        found = first_of(str(spec))
        if found is None:
            return None
        call = example_of(model, found)
        return shortened_call(model, in_places(model, Call((), dict(call))) if isinstance(call, Mapping) else call)

    def example(self, model: Any) -> Any:
        """A random batch of the shapes asked for; None leaves the choice to the library."""
        from bnfold.backends import is_module

        if is_module(model):
            return self.call(model)
        shapes = self.shapes(model)
        if shapes is None and self.seed == 0:
            return None
        from bnfold.data.random import random_feeds

        return random_feeds(self.specs(model), seed=self.seed, input_shapes=shapes)


@dataclass(frozen=True)
class Feeding:
    """What data go in."""

    batch_size: Annotated[int | None, option("--batch-size", panel=DATA, min=1, help="Samples that go through at once.")] = None
    samples: Annotated[int | None, option("--samples", panel=DATA, min=1, help="Use at most so many samples.")] = None
    column: Annotated[
        str | None, option("--column", panel=DATA, metavar="NAME", help="Of a table: what goes in, where several columns could.")
    ] = None
    max_bad: Annotated[
        str | None, option("--max-bad", panel=IMAGES, metavar="N|P%", help="How many images may be undecodable. Default: 1%.")
    ] = None
    preprocess: Annotated[
        Path | None,
        option("--preprocess", panel=IMAGES, metavar="CONFIG.json", help="A configuration of timm, or a preprocessor's of Hugging Face."),
    ] = None
    image_size: Annotated[str | None, option("--image-size", panel=IMAGES, metavar="H[,W]", help="What the network gets.")] = None
    resize: Annotated[
        str | None, option("--resize", panel=IMAGES, metavar="N|H,W", help="First: the shorter side, or both, in pixels; 0 for no resize.")
    ] = None
    crop: Annotated[
        bool | None, option("--crop/--no-crop", panel=IMAGES, help="Then: cut --image-size out of the centre, or resize to it.")
    ] = None
    crop_pct: Annotated[
        float | None, option("--crop-pct", panel=IMAGES, min=0.01, max=1.0, help="In place of --resize: --image-size over it.")
    ] = None
    scale: Annotated[float | None, option("--scale", panel=IMAGES, help="Then: what pixels are multiplied by, 1/255 unless given.")] = None
    mean: Annotated[str | None, option("--mean", panel=IMAGES, metavar="R,G,B", help="Then: what is subtracted.")] = None
    std: Annotated[str | None, option("--std", panel=IMAGES, metavar="R,G,B", help="Then: what it is divided by.")] = None
    interpolation: Annotated[
        str | None, option("--interpolation", panel=IMAGES, metavar="NAME", help="bilinear, bicubic, nearest, lanczos, box or hamming.")
    ] = None
    bgr: Annotated[bool | None, option("--bgr/--rgb", panel=IMAGES, help="The order of the channels.")] = None
    channels_last: Annotated[
        bool | None,
        option("--channels-last/--channels-first", panel=IMAGES, help="(N, H, W, C) or (N, C, H, W), where the shape leaves it open."),
    ] = None

    def images(self) -> ImageOptions | None:
        """What to do with images: what the command line says goes before the configuration."""
        given: dict[str, Any] = {
            "size": None if self.image_size is None else parse.height_and_width(self.image_size, "--image-size"),
            "resize": None if self.resize is None else parse.resize(self.resize, "--resize"),
            "crop": self.crop,
            "crop_pct": self.crop_pct,
            "scale": self.scale,
            "mean": None if self.mean is None else parse.numbers(self.mean, "--mean"),
            "std": None if self.std is None else parse.numbers(self.std, "--std"),
            "interpolation": self.interpolation,
            "bgr": self.bgr,
            "channels_last": self.channels_last,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if self.preprocess is None and not given:
            return None
        from bnfold.data.images import ImageOptions

        base = ImageOptions() if self.preprocess is None else ImageOptions.from_config(self.preprocess)
        return dataclasses.replace(base, **given)

    def open(self, spec: str, model: Any, job: Job, shaping: Shaping, example: Any, *, samples: int | None = None) -> Any:
        """The user's data as batches; what is done to them is said on standard error. example: as `shaping.read` gives it."""
        from bnfold.data import open_data
        from bnfold.data.corrupt import MAX_BAD

        data = open_data(
            spec,
            shaping.specs(model, example),
            batch_size=self.batch_size,
            samples=samples,
            seed=shaping.seed,
            images=self.images(),
            input_shapes=shaping.shapes(model, example),
            column=self.column,
            max_bad=MAX_BAD if self.max_bad is None else self.max_bad,
            flat=getattr(example, "flat", None),
        )
        job.feed(data)
        if job.reports and Path(spec).is_file():
            job.came_in(Path(spec))
        return data

    def compared(self, spec: str | None, reference: Any, job: Job, shaping: Shaping) -> dict[str, Any]:
        """What two models are fed, as arguments of `api.verify` and of `bench`."""
        example = shaping.read(reference, spec)
        return {
            "batches": None if spec is None else self.open(spec, reference, job, shaping, example, samples=self.samples),
            "seed": shaping.seed,
            "input_shapes": shaping.shapes(reference, example),
            "example": example,
        }
