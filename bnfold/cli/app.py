"""The commands. Each checks where it will write, makes one library call, and shows the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import _version
from ..errors import UsageError
from . import options as o
from . import show
from .job import Job, ready_to_write

STATUS = {"equivalent": 0, "different": 1, "inconclusive": 6}

app = typer.Typer(
    name="bnfold",
    help="Recalibrate, fold and verify the BatchNorm layers of trained networks.",
    epilog="Exit status: 0 done or equivalent, 1 the check failed, 2 usage, 3 bad input, 4 nothing to do or unsupported, "
    "5 device or provider not available, 6 inconclusive, 70 a defect of bnfold, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version_wanted(wanted: bool) -> None:
    if wanted:
        print(f"bnfold {_version.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version_wanted, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def _load(path: Path, arch: str | None, arch_args: str | None, trust_pickle: bool, device: str = "cpu") -> Any:
    from .. import api

    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: expected cpu or cuda")
    return api.load(path, arch=arch, arch_args=o.json_object(arch_args, "--arch-args"), trust_pickle=trust_pickle)


def _open(job: Job, spec: str, model: Any, **given: Any) -> Any:
    """The user's data as batches; what is done to them is said on standard error."""
    from ..backends.onnx.run import inputs
    from ..data import open_data

    specs = inputs(model)
    shapes = o.shapes(given.pop("input_shape"), [spec.name for spec in specs])
    data = open_data(spec, specs, input_shapes=shapes, **given)
    job.remark(f"data: {data.description}")
    for note in data.notes:
        job.remark(note)
    return data


def _shapes(model: Any, given: list[str] | None) -> dict[str, tuple[int, ...]] | None:
    if not given:
        return None
    from ..backends.onnx.run import inputs

    return o.shapes(given, [spec.name for spec in inputs(model)])


def _example(model: Any, given: list[str] | None, seed: int) -> Any:
    """A random batch of the shapes asked for; None leaves the choice to the check."""
    shapes = _shapes(model, given)
    if shapes is None:
        return None
    from ..backends.onnx.run import inputs, random_feeds

    return random_feeds(inputs(model), seed=seed, input_shapes=shapes)


def _same_kind(out: Path, model: Path) -> None:
    if out.suffix.lower() != ".onnx":
        raise UsageError(f"{out}: an ONNX model is written as .onnx; name it {out.with_suffix('.onnx').name}")


@app.command()
def inspect(
    model: o.Model,
    arch: o.Arch = None,
    arch_args: o.ArchArgs = None,
    trust_pickle: o.TrustPickle = False,
    clone: Annotated[bool, typer.Option("--clone", help="As for fuse.")] = False,
    as_json: o.Json = False,
    report: o.ReportFile = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """List every BatchNorm, and where it would fold to, or why it can't. Changes nothing.

    Example: bnfold inspect model.onnx
    """
    from .. import api

    with Job(as_json=as_json, report=report, quiet=quiet, inputs=[model]) as job:
        job.finish(api.inspect(_load(model, arch, arch_args, trust_pickle), clone=clone), show.fuse)


@app.command()
def fuse(
    model: o.Model,
    out: o.MaybeOut = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do it all, write nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail, with status 1 and nothing written, if a BatchNorm stays.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the result before it is written.")] = True,
    clone: Annotated[
        bool, typer.Option("--clone", help="Double an operator whose output has other users, if that lets a BatchNorm fold.")
    ] = False,
    arch: o.Arch = None,
    arch_args: o.ArchArgs = None,
    trust_pickle: o.TrustPickle = False,
    input_shape: o.InputShape = None,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    report: o.ReportFile = None,
    force: o.Force = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Fold BatchNorms into the weights around them, check the result, and write it.

    Example: bnfold fuse model.onnx -o fused.onnx
    """
    from .. import api

    if out is None and not dry_run:
        raise UsageError("-o OUT is missing; name the file to write, or give --dry-run")
    if out is not None:
        _same_kind(out, model)
        ready_to_write(out, force=force, inputs=[model])
    with Job(as_json=as_json, report=report, quiet=quiet, inputs=[model]) as job:
        loaded = _load(model, arch, arch_args, trust_pickle)
        job.progress("fold and check" if verify else "fold", 0, None)
        example = _example(loaded, input_shape, seed) if verify else None
        fused, result = api.fuse(loaded, example=example, check=verify, clone=clone)
        kept = sum(layer.verdict == "kept" for layer in result.layers)
        failed = strict and kept > 0
        if out is not None and not dry_run and not failed:
            api.save(fused, out, force=force)
        job.finish(result, show.fuse)
        if failed:
            job.remark(f"--strict: {kept} BatchNorm{'s' * (kept != 1)} stayed, so nothing was written")
        return 1 if failed else 0


@app.command()
def recalibrate(
    model: o.Model,
    data: o.Data,
    out: o.Out,
    arch: o.Arch = None,
    arch_args: o.ArchArgs = None,
    trust_pickle: o.TrustPickle = False,
    input_shape: o.InputShape = None,
    device: o.Device = "cpu",
    provider: o.Provider = None,
    batch_size: o.BatchSize = None,
    samples: o.Samples = None,
    seed: o.Seed = 0,
    preprocess: o.Preprocess = None,
    image_size: o.ImageSize = None,
    resize: o.Resize = None,
    mean: o.Mean = None,
    std: o.Std = None,
    scale: o.Scale = None,
    interpolation: o.Interpolation = None,
    memory_budget: o.MemoryBudget = "1G",
    as_json: o.Json = False,
    report: o.ReportFile = None,
    force: o.Force = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Measure every BatchNorm's mean and variance afresh on your data, exactly, in one pass.

    Example: bnfold recalibrate model.onnx --data images/ -o fresh.onnx
    """
    from .. import api

    _same_kind(out, model)
    ready_to_write(out, force=force, inputs=[model])
    budget = o.size_in_bytes(memory_budget)
    images = o.images(preprocess, image_size, resize, mean, std, scale, interpolation)
    with Job(as_json=as_json, report=report, quiet=quiet, inputs=[model]) as job:
        loaded = _load(model, arch, arch_args, trust_pickle, device)
        batches = _open(job, data, loaded, batch_size=batch_size, samples=samples, seed=seed, images=images, input_shape=input_shape)
        fresh, result = api.recalibrate(loaded, batches, memory_budget=budget, provider=_one(provider), progress=job.progress)
        api.save(fresh, out, force=force)
        job.finish(result, show.recalibrate)


@app.command()
def verify(
    reference: o.Reference,
    candidate: o.Candidate,
    data: o.MaybeData = None,
    arch: o.Arch = None,
    arch_args: o.ArchArgs = None,
    trust_pickle: o.TrustPickle = False,
    input_shape: o.InputShape = None,
    device: o.Device = "cpu",
    provider: o.Provider = None,
    batch_size: o.BatchSize = None,
    samples: o.Samples = None,
    seed: o.Seed = 0,
    preprocess: o.Preprocess = None,
    image_size: o.ImageSize = None,
    resize: o.Resize = None,
    mean: o.Mean = None,
    std: o.Std = None,
    scale: o.Scale = None,
    interpolation: o.Interpolation = None,
    as_json: o.Json = False,
    report: o.ReportFile = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Decide whether two models compute the same function: coefficients, float64, and as deployed.

    Example: bnfold verify model.onnx fused.onnx --provider cpu
    """
    from .. import api

    images = o.images(preprocess, image_size, resize, mean, std, scale, interpolation)
    with Job(as_json=as_json, report=report, quiet=quiet, inputs=[reference, candidate]) as job:
        one = _load(reference, arch, arch_args, trust_pickle, device)
        other = _load(candidate, arch, arch_args, trust_pickle, device)
        batches = None
        if data is not None:
            batches = _open(job, data, one, batch_size=batch_size, samples=samples, seed=seed, images=images, input_shape=input_shape)
        result = api.verify(
            one,
            other,
            batches,
            providers=provider or ["cpu"],
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            input_shapes=_shapes(one, input_shape),
            progress=job.progress,
        )
        job.finish(result, show.verify)
        return STATUS[result.verdict]


@app.command()
def pipeline(
    model: o.Model,
    data: o.Data,
    out: o.Out,
    evaluate: Annotated[
        str | None,
        typer.Option("--eval", metavar="DATA", help="Labelled data to score before and after (default: --data, if it has labels)."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail, with status 1 and nothing written, if a BatchNorm stays.")] = False,
    arch: o.Arch = None,
    arch_args: o.ArchArgs = None,
    trust_pickle: o.TrustPickle = False,
    input_shape: o.InputShape = None,
    device: o.Device = "cpu",
    provider: o.Provider = None,
    batch_size: o.BatchSize = None,
    samples: o.Samples = None,
    seed: o.Seed = 0,
    preprocess: o.Preprocess = None,
    image_size: o.ImageSize = None,
    resize: o.Resize = None,
    mean: o.Mean = None,
    std: o.Std = None,
    scale: o.Scale = None,
    interpolation: o.Interpolation = None,
    memory_budget: o.MemoryBudget = "1G",
    as_json: o.Json = False,
    report: o.ReportFile = None,
    force: o.Force = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Recalibrate, then fuse, then verify; stop at the first step that fails, and then write nothing.

    Example: bnfold pipeline model.onnx --data images/ -o ready.onnx
    """
    from .. import api
    from ..pipeline import pipeline as run

    _same_kind(out, model)
    ready_to_write(out, force=force, inputs=[model])
    budget = o.size_in_bytes(memory_budget)
    images = o.images(preprocess, image_size, resize, mean, std, scale, interpolation)
    with Job(as_json=as_json, report=report, quiet=quiet, inputs=[model]) as job:
        loaded = _load(model, arch, arch_args, trust_pickle, device)
        given: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "images": images, "input_shape": input_shape}
        batches = _open(job, data, loaded, samples=samples, **given)
        scored = batches if evaluate is None else _open(job, evaluate, loaded, samples=None, **given)
        final, result = run(
            loaded, batches, labelled=scored, strict=strict, providers=provider or ["cpu"], memory_budget=budget, progress=job.progress
        )
        if final is not None:
            api.save(final, out, force=force)
        job.finish(result, show.pipeline)
        if final is None:
            job.remark("nothing was written")
            return STATUS[result.verify.verdict] if result.verify is not None else 1
        return 0


@app.command()
def bench(
    reference: o.Reference,
    candidate: o.Candidate,
    data: o.MaybeData = None,
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="Interleaved rounds.")] = 20,
    input_shape: o.InputShape = None,
    provider: o.Provider = None,
    batch_size: o.BatchSize = None,
    samples: o.Samples = None,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    report: o.ReportFile = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Time two models side by side, in turn, and give the ratio.

    Example: bnfold bench model.onnx fused.onnx
    """
    from ..bench import bench as run

    with Job(as_json=as_json, report=report, quiet=quiet, inputs=[reference, candidate]) as job:
        one, other = _load(reference, None, None, False), _load(candidate, None, None, False)
        batches = None
        if data is not None:
            batches = _open(job, data, one, batch_size=batch_size, samples=samples, seed=seed, images=None, input_shape=input_shape)
        shapes = _shapes(one, input_shape)
        result = run(
            one,
            other,
            batches,
            provider=_one(provider),
            rounds=rounds,
            batch_size=batch_size or 1,
            seed=seed,
            input_shapes=shapes,
            progress=job.progress,
        )
        job.finish(result, show.bench)


def _one(providers: list[str] | None) -> str:
    if providers is not None and len(providers) > 1:
        raise UsageError("--provider: one provider at a time here")
    return providers[0] if providers else "cpu"
