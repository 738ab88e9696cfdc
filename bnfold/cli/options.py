"""The options that several commands share, in groups, each declared once."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import parse
from .check import Check
from .job import Job

if TYPE_CHECKING:
    from ..data import InputSpec
    from ..images import ImageOptions
    from ..methods import Method

# Titles of the help's panels.
MODELS, DATA, STATISTICS, IMAGES, OUTPUT = "Models", "Data", "Statistics", "Images", "Output"
OWN_BATCH = 32  # samples
METHODS = "exact, precise, ioffe-szegedy, moving-average or prior"


def _option(*names: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, show_default=False, **more)


ModelFile = Annotated[
    Path, typer.Argument(metavar="MODEL", help="The model: .onnx, .pt2, or a checkpoint with --arch.", show_default=False)
]
Reference = Annotated[Path, typer.Argument(metavar="REFERENCE", help="The model that is right.", show_default=False)]
Candidate = Annotated[Path, typer.Argument(metavar="CANDIDATE", help="The model to compare with it.", show_default=False)]
Out = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The file to write.", show_default=False)]
MaybeCandidate = Annotated[Path | None, typer.Argument(metavar="CANDIDATE", help="The model to compare with it.", show_default=False)]
Against = Annotated[
    Path | None,
    _option(
        "--against",
        panel=MODELS,
        metavar="ORIGINAL",
        help="In place of CANDIDATE: hold a folded model, given alone, against this by its certificate.",
    ),
]
MaybeOut = Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT", help="The file to write.", show_default=False)]
DATA_FORMS = (
    "A .npy, .npz, .safetensors or .pt file; a folder of images or of .npy files; tar shards or .parquet files, as a folder or a pattern; "
    "a folder of save_to_disk; FILE.py:FUNCTION or MODULE:FUNCTION that returns batches; or random."
)
Data = Annotated[str, typer.Option("--data", metavar="DATA", help=DATA_FORMS, show_default=False)]
MaybeData = Annotated[str | None, typer.Option("--data", metavar="DATA", help=f"{DATA_FORMS} Default: random.", show_default=False)]
Strict = Annotated[bool, typer.Option("--strict", help="Fail, with status 1 and nothing written, if a BatchNorm stays.")]
Clone = Annotated[bool, typer.Option("--clone", help="Double an operator whose output is read elsewhere, if that lets a BatchNorm fold.")]
Baseline = Annotated[
    Path | None,
    _option(
        "--baseline",
        panel=OUTPUT,
        metavar="REPORT.json",
        help="An earlier --report of the same command: fail where something got worse, by more than noise.",
    ),
]
Evaluate = Annotated[
    str | None,
    typer.Option("--eval", metavar="DATA", help="Labelled data to score before and after. Default: --data, where it has labels."),
]
Html = Annotated[
    Path | None, _option("--html", panel=OUTPUT, metavar="FILE.html", help="The report as a page: a table and a chart of the drift.")
]
Bundle = Annotated[
    Path | None,
    _option("--bundle", panel=OUTPUT, metavar="DIR", help="Where the models differ, write the part that shows it, with a script."),
]
MemoryBudget = Annotated[
    str, typer.Option("--memory-budget", metavar="SIZE", help="Activations held in memory before they spill to disk.", rich_help_panel=DATA)
]


DataOrNot = Annotated[str | None, typer.Option("--data", metavar="DATA", help=DATA_FORMS, show_default=False)]
Restore = Annotated[
    Path | None,
    _option("--restore", panel=STATISTICS, metavar="OUT.before.npz", help="Put the old statistics back that a recalibration kept."),
]
Shard = Annotated[
    str | None,
    _option("--shard", panel=STATISTICS, metavar="I/N", help="Measure part I (from 0) of N only, for merge-stats; with --stats."),
]
Stats = Annotated[Path | None, _option("--stats", panel=STATISTICS, metavar="FILE.npz", help="Where a part's measurements go.")]
Parts = Annotated[list[Path], typer.Argument(metavar="STATS...", help="What recalibrate --shard wrote.", show_default=False)]
Layers = Annotated[
    list[str] | None, _option("--layers", panel=STATISTICS, metavar="PATTERN", help="Only BatchNorms of such names; repeatable.")
]
SkipLayers = Annotated[
    list[str] | None, _option("--skip-layers", panel=STATISTICS, metavar="PATTERN", help="None of such names; repeatable.")
]
Freeze = Annotated[
    bool, _option("--freeze", panel=STATISTICS, help="Give BatchNorms in training mode statistics of their own, so that they can fold.")
]


@dataclass(frozen=True)
class Loading:
    """How model files are read."""

    arch: Annotated[
        str | None,
        _option("--arch", panel=MODELS, metavar="MODULE:FACTORY", help="What builds the network of a checkpoint; FILE.py:FACTORY too."),
    ] = None
    arch_args: Annotated[str | None, _option("--arch-args", panel=MODELS, metavar="JSON", help="The arguments of --arch.")] = None
    trust_pickle: Annotated[bool, _option("--trust-pickle", panel=MODELS, help="Load files that can run code.")] = False

    def load(self, path: Path, job: Job) -> Any:
        """The model in a file, which goes into the report."""
        from .. import api

        args = None if self.arch_args is None else parse.json_object(self.arch_args, "--arch-args")
        model = api.load(path, arch=self.arch, arch_args=args, trust_pickle=self.trust_pickle, say=job.remark)
        if job.reports:
            from ..certificate import files_of

            job.came_in(*files_of(model, path))
        return model

    def suffixes(self, path: Path) -> tuple[str, ...]:
        """How the name of what is made of this model may end."""
        from ..backends.kinds import kind_of

        kind = kind_of(path)
        if kind == "onnx":
            return (".onnx",)
        return (".pt2", ".onnx") if kind == "pt2" else (".pt2", ".onnx", ".safetensors", ".pth", ".pt", ".bin", ".ckpt")

    def save(self, model: Any, path: Path, *, force: bool, example: Any) -> None:
        """Write a model; a .pt file is a whole module only where one came in."""
        from .. import api

        api.save(model, path, force=force, example=example, as_state=self.arch is not None)


@dataclass(frozen=True)
class Calibrating:
    """How statistics are measured, and whose."""

    method: Annotated[str, _option("--method", panel=STATISTICS, metavar="NAME", help=f"{METHODS}. Default: exact.")] = "exact"
    variance: Annotated[
        str | None,
        _option(
            "--variance", panel=STATISTICS, metavar="biased|unbiased", help="M2/n or M2/(n-1). Default: as the method's source has it."
        ),
    ] = None
    momentum: Annotated[
        str | None,
        _option(
            "--momentum", panel=STATISTICS, metavar="M|none", help="moving-average: weight of the newest batch; none for the plain mean."
        ),
    ] = None
    prior: Annotated[
        float | None, _option("--prior", panel=STATISTICS, min=0, metavar="N", help="prior: the old statistics count as N samples (16).")
    ] = None
    mean_shift: Annotated[
        bool, _option("--mean-shift", panel=STATISTICS, help="prior: the variance of the mixture, means being apart.")
    ] = False
    layers: Layers = None
    skip_layers: SkipLayers = None
    freeze: Freeze = False
    until: Annotated[
        float | None,
        _option("--until", panel=STATISTICS, metavar="E", help="As many samples as bring each mean's standard error to E deviations."),
    ] = None

    def chosen(self) -> Method:
        """The method with its settings."""
        from ..methods import MovingAverage, method

        if self.variance not in (None, "biased", "unbiased"):
            raise UsageError(f"--variance {self.variance}: it is biased or unbiased")
        for option, given, owner in (
            ("--momentum", self.momentum is not None, "moving-average"),
            ("--prior", self.prior is not None, "prior"),
            ("--mean-shift", self.mean_shift, "prior"),
        ):
            if given and self.method != owner:
                raise UsageError(f"{option} is for the method {owner}, not for {self.method}")
        unbiased = None if self.variance is None else self.variance == "unbiased"
        made = method(self.method, unbiased=unbiased, strength=self.prior, mean_shift=self.mean_shift or None)
        if not isinstance(made, MovingAverage) or self.momentum is None:
            return made
        return dataclasses.replace(made, momentum=None if self.momentum == "none" else parse.numbers(self.momentum, "--momentum")[0])

    def batch_size(self, feeding: Feeding) -> int | None:
        """Where each micro-batch is normalised by itself, its size is a part of the method: 32 unless another is asked for."""
        return feeding.batch_size or (None if self.chosen().lockstep else OWN_BATCH)

    def settings(self, *, of_part: bool = False) -> dict[str, Any]:
        """The arguments of `api.recalibrate`, or of `api.measure_part`."""
        given = {"method": self.chosen(), "layers": self.layers or (), "skip_layers": self.skip_layers or (), "freeze": self.freeze}
        if of_part and self.until is not None:
            raise UsageError("--until looks at all data, and --shard measures a part of them; leave one out")
        return given if of_part else given | {"until": self.until}


@dataclass(frozen=True)
class Running:
    """Where models run."""

    device: Annotated[str | None, _option("--device", panel=MODELS, metavar="cpu|cuda", help="For PyTorch models.")] = None
    provider: Annotated[
        list[str] | None,
        _option(
            "--provider",
            panel=MODELS,
            metavar="NAME[:OPTION=VALUE,...]",
            help="ONNX Runtime's execution provider: cpu (default), cuda, tensorrt:trt_fp16_enable=1, openvino, ...; repeatable.",
        ),
    ] = None
    allow_cpu_fallback: Annotated[
        list[str] | None,
        _option(
            "--allow-cpu-fallback",
            panel=MODELS,
            metavar="OPERATOR|NODE",
            help="What may run on the CPU where the provider has no kernel for it; repeatable. Anything else ends the run.",
        ),
    ] = None

    def providers(self, *paths: Path) -> tuple[str, ...]:
        """Where the models in these files run: ONNX Runtime's providers, PyTorch's device, or both, each looked for at once."""
        from ..backends.kinds import kind_of

        kinds = {kind_of(path) == "onnx" for path in paths}
        if self.device is not None and False not in kinds:
            raise UsageError(f"--device {self.device}: that is for PyTorch models; for ONNX give --provider")
        if self.provider and True not in kinds:
            raise UsageError(f"--provider {self.provider[0]}: that is for ONNX models; for PyTorch give --device")
        if True in kinds:
            from ..backends.onnx.providers import resolve

            for name in self.provider or ("cpu",):
                resolve(name)
        if self.device is not None:
            from ..backends.torch.run import device_of

            device_of(self.device)
        return tuple(dict.fromkeys([*(self.provider or ()), *([self.device] if self.device else [])])) or ("cpu",)

    def fallback(self) -> AbstractContextManager[None]:
        """What of a model may run on the CPU, while this lasts."""
        from ..api import cpu_fallback

        return cpu_fallback(self.allow_cpu_fallback or ())

    def one_provider(self, *paths: Path) -> str:
        """The same, where there can be only one."""
        if len(self.provider or ()) > 1:
            raise UsageError(f"--provider {' --provider '.join(self.provider or ())}: this command takes one")
        return self.providers(*paths)[-1]


@dataclass(frozen=True)
class Shaping:
    """What random data look like."""

    input_shape: Annotated[
        list[str] | None,
        _option("--input-shape", panel=DATA, metavar="[NAME=]1,3,224,224", help="Shape of an input with open axes; repeatable."),
    ] = None
    seed: Annotated[int, _option("--seed", panel=DATA, help="For everything random.")] = 0

    def specs(self, model: Any, spec: str | None = None) -> list[InputSpec]:
        """What the model is fed. spec: the data, which may show how a module is called."""
        from ..backends import family

        if family(model) == "onnx":
            from ..backends.onnx.feeds import inputs

            return inputs(model)
        from ..backends.torch.trace import trace

        return trace(model, self.call(model, spec)).specs

    def shapes(self, model: Any) -> dict[str, tuple[int, ...]] | None:
        """The shapes asked for, by input name."""
        if not self.input_shape:
            return None
        return parse.shapes(self.input_shape, [spec.name for spec in self.specs(model)], "--input-shape")

    def call(self, model: Any, spec: str | None = None) -> Any:
        """How a PyTorch module is called: with the shapes asked for, as the data show, or as the model itself says (None)."""
        from ..backends import family

        if family(model) != "torch" or not hasattr(model, "forward"):
            return None
        from ..backends.torch.trace import example_of, forward_names, random_example

        if self.input_shape:
            return random_example(model, parse.shapes(self.input_shape, forward_names(model), "--input-shape"))
        if spec in (None, "random") or getattr(model, "pretrained_cfg", None) or getattr(model, "example_input_array", None) is not None:
            return None
        from ..sources import first_of

        found = first_of(str(spec))
        return None if found is None else example_of(model, found)

    def example(self, model: Any) -> Any:
        """A random batch of the shapes asked for; None leaves the choice to the library."""
        from ..backends import family

        if family(model) == "torch":
            return self.call(model)
        shapes = self.shapes(model)
        if shapes is None and self.seed == 0:
            return None
        from ..feeds import random_feeds

        return random_feeds(self.specs(model), seed=self.seed, input_shapes=shapes)


@dataclass(frozen=True)
class Feeding:
    """What data go in."""

    batch_size: Annotated[int | None, _option("--batch-size", panel=DATA, min=1, help="Samples that go through at once.")] = None
    samples: Annotated[int | None, _option("--samples", panel=DATA, min=1, help="Use at most so many samples.")] = None
    column: Annotated[
        str | None, _option("--column", panel=DATA, metavar="NAME", help="Of a table: what goes in, where several columns could.")
    ] = None
    max_bad: Annotated[
        str | None, _option("--max-bad", panel=IMAGES, metavar="N|P%", help="How many images may be undecodable. Default: 1%.")
    ] = None
    preprocess: Annotated[
        Path | None,
        _option("--preprocess", panel=IMAGES, metavar="CONFIG.json", help="A configuration of timm, or a preprocessor's of Hugging Face."),
    ] = None
    image_size: Annotated[str | None, _option("--image-size", panel=IMAGES, metavar="H[,W]", help="What the network gets.")] = None
    resize: Annotated[
        str | None, _option("--resize", panel=IMAGES, metavar="N|H,W", help="First: the shorter side, or both, in pixels; 0 for no resize.")
    ] = None
    crop: Annotated[
        bool | None, _option("--crop/--no-crop", panel=IMAGES, help="Then: cut --image-size out of the centre, or resize to it.")
    ] = None
    crop_pct: Annotated[
        float | None, _option("--crop-pct", panel=IMAGES, min=0.01, max=1.0, help="In place of --resize: --image-size over it.")
    ] = None
    scale: Annotated[float | None, _option("--scale", panel=IMAGES, help="Then: what pixels are multiplied by, 1/255 unless given.")] = None
    mean: Annotated[str | None, _option("--mean", panel=IMAGES, metavar="R,G,B", help="Then: what is subtracted.")] = None
    std: Annotated[str | None, _option("--std", panel=IMAGES, metavar="R,G,B", help="Then: what it is divided by.")] = None
    interpolation: Annotated[
        str | None, _option("--interpolation", panel=IMAGES, metavar="NAME", help="bilinear, bicubic, nearest, lanczos, box or hamming.")
    ] = None
    bgr: Annotated[bool | None, _option("--bgr/--rgb", panel=IMAGES, help="The order of the channels.")] = None
    channels_last: Annotated[
        bool | None,
        _option("--channels-last/--channels-first", panel=IMAGES, help="(N, H, W, C) or (N, C, H, W), where the shape leaves it open."),
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
        from ..images import ImageOptions

        base = ImageOptions() if self.preprocess is None else ImageOptions.from_config(self.preprocess)
        return dataclasses.replace(base, **given)

    def open(self, spec: str, model: Any, job: Job, shaping: Shaping, *, samples: int | None = None) -> Any:
        """The user's data as batches; what is done to them is said on standard error."""
        from ..bad import MAX_BAD
        from ..data import open_data

        data = open_data(
            spec,
            shaping.specs(model, spec),
            batch_size=self.batch_size,
            samples=samples,
            seed=shaping.seed,
            images=self.images(),
            input_shapes=shaping.shapes(model),
            column=self.column,
            max_bad=MAX_BAD if self.max_bad is None else self.max_bad,
        )
        job.feed(data)
        if job.reports and Path(spec).is_file():
            job.came_in(Path(spec))
        return data


@dataclass(frozen=True)
class Reporting:
    """Where the report goes."""

    as_json: Annotated[bool, _option("--json", panel=OUTPUT, help="The report as JSON on standard output, and nothing else there.")] = False
    report: Annotated[Path | None, _option("--report", panel=OUTPUT, metavar="FILE.json", help="Write the report to a file too.")] = None
    force: Annotated[bool, _option("--force", panel=OUTPUT, help="Overwrite files that exist.")] = False
    quiet: Annotated[bool, _option("-q", "--quiet", panel=OUTPUT, help="No progress and no remarks.")] = False
    debug: Annotated[bool, _option("--debug", panel=OUTPUT, help="Show the traceback of an error.")] = False

    def job(self, check: Check | None = None) -> Job:
        return Job(as_json=self.as_json, report=self.report, force=self.force, quiet=self.quiet, check=check)


@dataclass(frozen=True)
class Checking:
    """Where a verdict goes besides."""

    junit: Annotated[Path | None, _option("--junit", panel=OUTPUT, metavar="FILE.xml", help="Write the verdict as JUnit XML.")] = None
    markdown: Annotated[Path | None, _option("--markdown", panel=OUTPUT, metavar="FILE.md", help="Write the verdict as Markdown.")] = None

    def check(self, command: str, *files: Path, force: bool, strict: bool = False, baseline: Path | None = None) -> Check:
        return Check(command, files, junit=self.junit, markdown=self.markdown, force=force, strict=strict, baseline=baseline)
