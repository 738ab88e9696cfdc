"""The options of what goes in: how models are read and where they run, what they are fed and what that looks like."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold import api
from bnfold.backends.metadata import files_of
from bnfold.backends.open import open_model, places, suffixes
from bnfold.certificates import folder_of
from bnfold.errors import UsageError

from ..job import Job
from . import DATA, IMAGES, MODELS, OUTPUT, counts, height_and_width, json_object, numbers, option, rare, resize, shapes, values

if TYPE_CHECKING:
    from bnfold.data.images import ImageOptions
    from bnfold.model import Model


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How model files are read."""

    arch: str | None = option("--arch", "What builds a checkpoint, or FILE.py:FACTORY.", MODELS, "MODULE:FACTORY")
    arch_args: dict[str, Any] | None = option("--arch-args", "The arguments of --arch.", MODELS, "JSON", read=json_object)
    trust_pickle: bool = rare("--trust-pickle", "Load files that can run code.", MODELS)
    ignore_keys: list[str] | None = rare(
        "--ignore-keys", "Keys of a checkpoint to pass over, which --arch has no weights for; repeatable.", MODELS, "PATTERN"
    )

    def load(self, path: Path, job: Job) -> Any:
        """The model in a file, which goes into the report."""
        ignored = tuple(self.ignore_keys or ())
        model = api.load(
            path, arch=self.arch, arch_args=self.arch_args, trust_pickle=self.trust_pickle, ignore_keys=ignored, say=job.remark
        )
        if job.reports:
            job.came_in(*files_of(model, path))
        job.models.append(str(path))
        return model


@dataclass(frozen=True, kw_only=True)
class Saving(Loading):
    """How they are read, and what is made of them is written."""

    plain_state: bool = rare(
        "--plain-state", "Write a state dict without what says that it was folded, for a class without the BatchNorms.", OUTPUT
    )

    def suffixes(self, path: Path) -> tuple[str, ...]:
        """How the name of what is made of this model may end."""
        return suffixes(path, checkpoint=self.arch is not None)

    def save(self, model: Any, path: Path, job: Job, example: Any) -> list[Path]:
        """Write a model, and say in which files; a .pt file is a whole module only where one came in."""
        as_state = self.arch is not None
        files = api.save(model, path, force=job.force, example=example, as_state=as_state, plain_state=self.plain_state)
        job.wrote(*files)
        if not self.plain_state and (how := open_model(model).reloaded(path, as_state=as_state)):
            job.remark(f"{path}: {how}")
        return files


@dataclass(frozen=True, kw_only=True)
class Running:
    """Where models run."""

    device: str | None = option("--device", "For PyTorch models.", MODELS, "cpu|cuda")
    provider: list[str] | None = option(
        "--provider",
        "ONNX Runtime's: cpu (default), cuda, openvino, ..., or tensorrt:trt_fp16_enable=1; repeatable.",
        MODELS,
        "NAME",
        values=values.providers,
    )
    allow_cpu_fallback: list[str] | None = rare(
        "--allow-cpu-fallback",
        "What may run on the CPU where the provider has no kernel for it; repeatable. Anything else ends the run.",
        MODELS,
        "OPERATOR|NODE",
    )

    def providers(self, *paths: Path) -> tuple[str, ...]:
        """Where the models in these files run: ONNX Runtime's providers, PyTorch's device, or both, each looked for at once."""
        return places(paths, self.provider or (), self.device)

    def fallback(self) -> AbstractContextManager[None]:
        """What of a model may run on the CPU, while this lasts."""
        return api.cpu_fallback(self.allow_cpu_fallback or ())

    def one_provider(self, *paths: Path) -> str:
        """The same, where there can be only one."""
        if len(self.provider or ()) > 1:
            raise UsageError(f"--provider {' --provider '.join(self.provider or ())}: this command takes one")
        return self.providers(*paths)[-1]


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """What random data look like."""

    input_shape: list[str] | None = option(
        "--input-shape",
        "[NAME=]1,3,224,224[:TYPE] of an open input, or of a module's (1,16:int64); repeatable.",
        DATA,
        "SHAPE",
    )
    seed: int = option("--seed", "For everything random.", DATA, default=0, min=0)

    def shapes(self, model: Model) -> dict[str, tuple[int, ...]] | None:
        """The shapes asked for, by input name. What doesn't state its inputs is read for the shape that is asked for."""
        if not self.input_shape:
            return None
        taken = {spec.name: spec.dtype.name for spec in model.specs}
        asked = shapes(self.input_shape, list(taken), "--input-shape")
        found = {name: shape.sizes for name, shape in asked.items()}
        if model.states_inputs:
            from bnfold.data.random import check_shapes

            for name, shape in asked.items():
                if shape.dtype not in (None, taken[name]):
                    raise UsageError(f"--input-shape {name}=...:{shape.dtype}: the model takes {taken[name]} there")
            check_shapes(found, model.specs)
        return found

    def read(self, model: Any, spec: str | None) -> Any:
        """As `call`, for several steps: what must be called to be read is read at once. With nothing to call it with, it isn't."""
        call = self.call(model, spec)
        opened = open_model(model, call)
        if opened.states_inputs or (call is None and spec is None):
            return call
        opened.inputs()
        return opened

    def call(self, model: Any, spec: str | None = None) -> Any:
        """The model, called with the shapes asked for, or as the data show; None where it says itself how."""
        opened = open_model(model)
        if opened.states_inputs:
            self.shapes(opened)  # shapes that don't fit are refused, whoever asks for them
            return None
        if self.input_shape:
            asked = shapes(self.input_shape, opened.arguments, "--input-shape")
            types = {name: shape.dtype for name, shape in asked.items() if shape.dtype is not None}
            return opened.called(shapes={name: shape.sizes for name, shape in asked.items()}, types=types)
        if spec in (None, "random") or opened.brings_example:
            return None
        from bnfold.data.open import first_of

        found = first_of(str(spec))
        return None if found is None else opened.fed(found, 2)

    def example(self, model: Any, spec: str | None = None) -> Any:
        """What to check a fold on: the first of the data, or a random batch of the shapes asked for; None leaves that to the library."""
        opened = open_model(model)
        if not opened.states_inputs:
            return self.call(model, spec)
        if spec not in (None, "random"):
            from bnfold.data.open import first_of

            if (found := first_of(spec)) is None:
                what = "neither a file of arrays nor a function that returns batches, which `fuse` takes"
                raise UsageError(f"--data {spec}: {what if Path(spec).exists() else 'there is no such file'}")
            return found
        shapes = self.shapes(opened)
        if shapes is None and self.seed == 0:
            return None
        from bnfold.data.random import random_feeds

        return random_feeds(opened.specs, seed=self.seed, input_shapes=shapes)


@dataclass(frozen=True, kw_only=True)
class Imaging:
    """What is done to images."""

    max_bad: str | None = rare("--max-bad", "How many images may be undecodable. Default: 1%.", IMAGES, "N|P%")
    preprocess: str | None = option(
        "--preprocess",
        "timm or hf, as the model or the file beside it says, torchvision, or a CONFIG.json of theirs.",
        IMAGES,
        "HOW",
    )
    image_size: tuple[int, int] | None = rare("--image-size", "What the network gets.", IMAGES, "H[,W]", read=height_and_width)
    resize: int | tuple[int, int] | None = rare(
        "--resize", "First: the shorter side, or both, in pixels; 0 for no resize.", IMAGES, "N|H,W", read=resize
    )
    crop: bool | None = rare("--crop/--no-crop", "Then: cut --image-size out of the centre, or resize to it.", IMAGES)
    crop_pct: float | None = rare("--crop-pct", "In place of --resize: --image-size over it.", IMAGES, min=0.01, max=1.0)
    scale: float | None = rare("--scale", "Then: what pixels are multiplied by, 1/255 unless given.", IMAGES, "X")
    mean: tuple[float, ...] | None = rare("--mean", "Then: what is subtracted.", IMAGES, "R,G,B", read=numbers)
    std: tuple[float, ...] | None = rare("--std", "Then: what it is divided by.", IMAGES, "R,G,B", read=numbers)
    interpolation: str | None = rare(
        "--interpolation", "bilinear, bicubic, nearest, lanczos, box or hamming.", IMAGES, "NAME", values=values.interpolations
    )
    bgr: bool | None = rare("--bgr/--rgb", "The order of the channels.", IMAGES)
    channels_last: bool | None = rare(
        "--channels-last/--channels-first", "(N, H, W, C) or (N, C, H, W), where the shape leaves it open.", IMAGES
    )

    def options(self, model: Model) -> ImageOptions | None:
        """What the command line says goes before the configuration; None where nothing is said."""
        given = {name: value for name, value in vars(self).items() if value is not None and name not in ("max_bad", "preprocess")}
        if self.preprocess is None and not given:
            return None
        from bnfold.data.images.options import ImageOptions, preset

        if "image_size" in given:
            given["size"] = given.pop("image_size")
        base = ImageOptions()
        if self.preprocess is not None:
            found = preset(self.preprocess, model.preprocessing, folder_of(model.source))
            base = found or ImageOptions.from_config(self.preprocess)
        return dataclasses.replace(base, **given)


@dataclass(frozen=True, kw_only=True)
class Feeding(Shaping):
    """What data go in."""

    images: Imaging
    batch_sizes: list[int] | None = option("--batch-size", "Samples at once. Default: 8, or as the data come.", DATA, "N", read=counts)
    samples: int | None = option("--samples", "At most so many. Default: all; to compare models, a few.", DATA, min=1)
    column: str | None = rare("--column", "Of a table: what goes in, where several columns could.", DATA, "NAME")

    @property
    def batch_size(self) -> int | None:
        """The only one; UsageError where there are several."""
        if self.batch_sizes is not None and len(self.batch_sizes) > 1:
            raise UsageError(f"--batch-size {','.join(map(str, self.batch_sizes))}: this command takes one number")
        return None if self.batch_sizes is None else self.batch_sizes[0]

    def open(self, spec: str, model: Any, job: Job, example: Any, *, samples: int | None = None, what: str = "data") -> Any:
        """The user's data as batches; what is done to them is said on standard error. example: as `read` gives it; what: they are for."""
        from bnfold.data import open_data
        from bnfold.data.corrupt import MAX_BAD

        opened = open_model(model, example)
        data = open_data(
            spec,
            opened.specs,
            batch_size=self.batch_size,
            samples=samples,
            seed=self.seed,
            images=self.images.options(opened),
            input_shapes=self.shapes(opened),
            column=self.column,
            max_bad=self.images.max_bad or MAX_BAD,
            flat=getattr(example, "flat", None),
        )
        job.feed(data, what)
        if job.reports and Path(spec).is_file():
            job.came_in(Path(spec))
        return data

    def compared(self, spec: str | None, reference: Any, job: Job) -> dict[str, Any]:
        """What two models are fed, as arguments of `api.verify` and of `bench`."""
        if spec is None and any(each is not None for each in (self.column, *vars(self.images).values())):
            job.remark("no --data are given, so the options of images and tables aren't used")
        example = self.read(reference, spec)
        batches = None if spec is None else self.open(spec, reference, job, example, samples=self.samples)
        shapes = self.shapes(open_model(reference, example))
        how = {"seed": self.seed, "input_shapes": shapes, "batch_size": self.batch_size, "progress": job.progress}
        return {"batches": batches, "example": example, **how}
