"""The options of data: what is fed to a model, and what it looks like."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.backends.open import open_model
from bnfold.errors import UsageError

from ..job import Job
from . import DATA, IMAGES, height_and_width, numbers, option, resize, shapes

if TYPE_CHECKING:
    from bnfold.data import InputSpec
    from bnfold.data.images import ImageOptions


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """What random data look like."""

    input_shape: list[str] | None = option(
        "--input-shape",
        "Shape of an input with open axes; of a module's, its type too, such as int64, where it isn't floating point; repeatable.",
        DATA,
        "[NAME=]1,3,224,224[:TYPE]",
    )
    seed: int = option("--seed", "For everything random.", DATA, default=0)

    def specs(self, model: Any, example: Any = None) -> list[InputSpec]:
        """What the model is fed. example: how it is called, as `read` gives it."""
        return open_model(model, example).specs

    def shapes(self, model: Any, example: Any = None) -> dict[str, tuple[int, ...]] | None:
        """The shapes asked for, by input name."""
        if not self.input_shape:
            return None
        from bnfold.data.random import check_shapes

        opened = open_model(model, example)
        taken = {spec.name: spec.dtype.name for spec in opened.specs}
        asked = shapes(self.input_shape, list(taken), "--input-shape")
        found = {name: shape.sizes for name, shape in asked.items()}
        if opened.states_inputs:  # what doesn't is read for the shape that is asked for
            for name, shape in asked.items():
                if shape.dtype not in (None, taken[name]):
                    raise UsageError(f"--input-shape {name}=...:{shape.dtype}: the model takes {taken[name]} there")
            check_shapes(found, opened.specs)
        return found

    def read(self, model: Any, spec: str | None) -> Any:
        """As `call`, for several steps: what must be called to be read is read at once. With nothing to call it with, it isn't."""
        call = self.call(model, spec)
        opened = open_model(model, call)
        if opened.states_inputs or (call is None and spec is None):
            return call
        opened.specs  # noqa: B018
        return opened

    def call(self, model: Any, spec: str | None = None) -> Any:
        """The model, called with the shapes asked for, or as the data show; None where it says itself how."""
        opened = open_model(model)
        if opened.states_inputs:
            self.shapes(model)  # shapes that don't fit are refused, whoever asks for them
            return None
        if self.input_shape:
            asked = shapes(self.input_shape, opened.arguments, "--input-shape")
            types = {name: shape.dtype for name, shape in asked.items() if shape.dtype is not None}
            return opened.called(shapes={name: shape.sizes for name, shape in asked.items()}, types=types).by_position()
        if spec in (None, "random") or opened.brings_example:
            return None
        from bnfold.data.open import first_of

        found = first_of(str(spec))
        return None if found is None else opened.fed(found, 2).by_position()

    def example(self, model: Any) -> Any:
        """A random batch of the shapes asked for; None leaves the choice to the library."""
        opened = open_model(model)
        if not opened.states_inputs:
            return self.call(model)
        shapes = self.shapes(model)
        if shapes is None and self.seed == 0:
            return None
        from bnfold.data.random import random_feeds

        return random_feeds(opened.specs, seed=self.seed, input_shapes=shapes)


@dataclass(frozen=True, kw_only=True)
class Imaging:
    """What is done to images."""

    max_bad: str | None = option("--max-bad", "How many images may be undecodable. Default: 1%.", IMAGES, "N|P%")
    preprocess: Path | None = option("--preprocess", "A configuration of timm, or a preprocessor's of Hugging Face.", IMAGES, "CONFIG.json")
    image_size: tuple[int, int] | None = option("--image-size", "What the network gets.", IMAGES, "H[,W]", read=height_and_width)
    resize: int | tuple[int, int] | None = option(
        "--resize", "First: the shorter side, or both, in pixels; 0 for no resize.", IMAGES, "N|H,W", read=resize
    )
    crop: bool | None = option("--crop/--no-crop", "Then: cut --image-size out of the centre, or resize to it.", IMAGES)
    crop_pct: float | None = option("--crop-pct", "In place of --resize: --image-size over it.", IMAGES, min=0.01, max=1.0)
    scale: float | None = option("--scale", "Then: what pixels are multiplied by, 1/255 unless given.", IMAGES)
    mean: tuple[float, ...] | None = option("--mean", "Then: what is subtracted.", IMAGES, "R,G,B", read=numbers)
    std: tuple[float, ...] | None = option("--std", "Then: what it is divided by.", IMAGES, "R,G,B", read=numbers)
    interpolation: str | None = option("--interpolation", "bilinear, bicubic, nearest, lanczos, box or hamming.", IMAGES, "NAME")
    bgr: bool | None = option("--bgr/--rgb", "The order of the channels.", IMAGES)
    channels_last: bool | None = option(
        "--channels-last/--channels-first", "(N, H, W, C) or (N, C, H, W), where the shape leaves it open.", IMAGES
    )

    def options(self) -> ImageOptions | None:
        """What the command line says goes before the configuration; None where nothing is said."""
        given = {name: value for name, value in vars(self).items() if value is not None and name not in ("max_bad", "preprocess")}
        if self.preprocess is None and not given:
            return None
        from bnfold.data.images import ImageOptions

        if "image_size" in given:
            given["size"] = given.pop("image_size")
        base = ImageOptions() if self.preprocess is None else ImageOptions.from_config(self.preprocess)
        return dataclasses.replace(base, **given)


@dataclass(frozen=True, kw_only=True)
class Feeding(Shaping):
    """What data go in."""

    images: Imaging
    batch_size: int | None = option("--batch-size", "Samples that go through at once.", DATA, min=1)
    samples: int | None = option("--samples", "Use at most so many samples.", DATA, min=1)
    column: str | None = option("--column", "Of a table: what goes in, where several columns could.", DATA, "NAME")

    def open(self, spec: str, model: Any, job: Job, example: Any, *, samples: int | None = None) -> Any:
        """The user's data as batches; what is done to them is said on standard error. example: as `read` gives it."""
        from bnfold.data import open_data
        from bnfold.data.corrupt import MAX_BAD

        data = open_data(
            spec,
            self.specs(model, example),
            batch_size=self.batch_size,
            samples=samples,
            seed=self.seed,
            images=self.images.options(),
            input_shapes=self.shapes(model, example),
            column=self.column,
            max_bad=self.images.max_bad or MAX_BAD,
            flat=getattr(example, "flat", None),
        )
        job.feed(data)
        if job.reports and Path(spec).is_file():
            job.came_in(Path(spec))
        return data

    def compared(self, spec: str | None, reference: Any, job: Job) -> dict[str, Any]:
        """What two models are fed, as arguments of `api.verify` and of `bench`."""
        example = self.read(reference, spec)
        batches = None if spec is None else self.open(spec, reference, job, example, samples=self.samples)
        shapes = self.shapes(reference, example)
        how = {"seed": self.seed, "input_shapes": shapes, "batch_size": self.batch_size, "progress": job.progress}
        return {"batches": batches, "example": example, **how}
