"""The commands. Each checks where it will write, makes one library call, and shows the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from bnfold._version import __version__
from bnfold.errors import UsageError
from bnfold.files import ready_to_write, write_text

from . import tasks as recalibration
from .options import common as o
from .options import parse
from .options.data import Feeding, Shaping
from .options.groups import grouped
from .options.models import Loading, Running
from .options.output import Checking, Reporting
from .options.statistics import Calibrating, Choosing

STATUS = {"equivalent": 0, "different": 1, "inconclusive": 6}
# One for each command; they run as they stand in a clone of the repository.
SAMPLE = "samples/digits/digits.onnx"
EXAMPLES = {
    "inspect": f"bnfold inspect {SAMPLE}",
    "recalibrate": f"bnfold recalibrate {SAMPLE} --data samples/digits/calibration.npz -o fresh.onnx",
    "merge_stats": f"bnfold merge-stats {SAMPLE} part-0.npz part-1.npz -o merged.onnx",
    "fuse": f"bnfold fuse {SAMPLE} -o fused.onnx",
    "verify": f"bnfold verify {SAMPLE} fused.onnx",
    "pipeline": f"bnfold pipeline {SAMPLE} --data samples/digits/calibration.npz --eval samples/digits/test.npz -o ready.onnx",
    "bench": f"bnfold bench {SAMPLE} fused.onnx",
}

app = typer.Typer(
    name="bnfold",
    help="Recalibrate, fold and verify the BatchNorm layers of trained networks.",
    epilog="Exit status: 0 done or equivalent; 1 the check failed; 2 usage; 3 an input can't be read, or is unsafe or invalid; "
    "4 nothing to do, or unsupported; 5 a device or provider is not available; 6 inconclusive; 70 a defect of bnfold; 130 interrupted.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def command(function: Callable[..., int]) -> Callable[..., int]:
    """A command of the application, with its example under its help."""
    app.command(epilog=f"Example: {EXAMPLES[function.__name__]}")(grouped(function))
    return function


@app.callback(invoke_without_command=True)
def _main(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"bnfold {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@command
def inspect(model: o.ModelFile, loading: Loading, shaping: Shaping, reporting: Reporting, clone: o.Clone = False) -> int:
    """List every BatchNorm, and where it would fold to, or why it can't.

    Nothing is changed.
    """
    from bnfold import api

    with reporting.job() as job:
        loaded = loading.load(model, job)
        job.finish(api.inspect(loaded, example=shaping.call(loaded), clone=clone))
    return 0


@command
def recalibrate(
    model: o.ModelFile,
    loading: Loading,
    running: Running,
    shaping: Shaping,
    feeding: Feeding,
    calibrating: Calibrating,
    choosing: Choosing,
    reporting: Reporting,
    data: o.DataOrNot = None,
    out: o.MaybeOut = None,
    evaluate: o.Evaluate = None,
    memory_budget: o.MemoryBudget = "1G",
    html: o.Html = None,
    restore: o.Restore = None,
    shard: o.Shard = None,
    stats: o.Stats = None,
) -> int:
    """Measure every BatchNorm's mean and variance afresh on your data.

    By default exactly, in one pass, layer by layer: the statistics are those of all the data as one batch, whatever the batch size. The old
    ones are kept in OUT.before.npz. Under torchrun, the processes share the data and write one result.
    """
    from bnfold import api

    from .render.pages import html as page

    asked = recalibration.asked(data, out, restore, shard, stats)
    settings = calibrating.settings(of_part=isinstance(asked, recalibration.Part)) | choosing.settings()
    budget = parse.size_in_bytes(memory_budget, "--memory-budget")
    for path, kind in (recalibration.written(asked) | ({html: ".html"} if html is not None else {})).items():
        ready_to_write(path, suffixes=loading.suffixes(model) if kind == "model" else [kind], force=reporting.force, inputs=[model])
    with reporting.job() as job, running.fallback():
        provider = running.one_provider(model)
        loaded = loading.load(model, job)
        if isinstance(asked, recalibration.Restore):
            example = shaping.call(loaded)
            old, names = api.restore(loaded, asked.before, example=example)
            loading.save(old, asked.out, force=reporting.force, example=example)
            job.say(f"{len(names)} BatchNorm{'s have their' if len(names) != 1 else ' has its'} old statistics again")
            job.say(f"written: {asked.out}")
            return 0
        example = shaping.read(loaded, asked.data)
        batches = feeding.open(asked.data, loaded, job, shaping, example, samples=feeding.samples)
        given = {"example": example, "provider": provider, "batch_size": calibrating.batch_size(feeding), "progress": job.progress}
        if isinstance(asked, recalibration.Part):
            report = api.measure_part(loaded, batches, asked.part, asked.stats, **settings, **given)
            job.finish(report)
            job.say(f"written: {asked.stats}")
            return 0
        labelled = batches if evaluate is None else feeding.open(evaluate, loaded, job, shaping, example)
        fresh, report = api.recalibrate(loaded, batches, labelled=labelled, memory_budget=budget, **settings, **given)
        if job.main:
            recalibration.save(loading, fresh, report, asked.out, force=reporting.force, example=example)
            if html is not None:
                write_text(html, page(report, str(model)))
        job.finish(report)
        job.say(f"written: {asked.out}, and the old statistics to {recalibration.beside(asked.out)}")
    return 0


@command
def merge_stats(
    model: o.ModelFile,
    parts: o.Parts,
    out: o.Out,
    loading: Loading,
    shaping: Shaping,
    reporting: Reporting,
    choosing: Choosing,
) -> int:
    """Put together what parts of the data gave (recalibrate --shard), and write the model with these statistics.

    All parts must be there, each once, measured on this model by one method.
    """
    from bnfold import api

    for path, suffixes in ((out, loading.suffixes(model)), (recalibration.beside(out), [".npz"])):
        ready_to_write(path, suffixes=suffixes, force=reporting.force, inputs=[model, *parts])
    with reporting.job() as job:
        loaded = loading.load(model, job)
        example = shaping.call(loaded)
        fresh, report = api.merge_parts(loaded, parts, example=example, **choosing.settings())
        recalibration.save(loading, fresh, report, out, force=reporting.force, example=example)
        job.finish(report)
        job.say(f"written: {out}, and the old statistics to {recalibration.beside(out)}")
    return 0


@command
def fuse(
    model: o.ModelFile,
    loading: Loading,
    shaping: Shaping,
    reporting: Reporting,
    checking: Checking,
    out: o.MaybeOut = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do it all, but write nothing.")] = False,
    strict: o.Strict = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Leave out the check of the result.")] = False,
    clone: o.Clone = False,
) -> int:
    """Fold BatchNorms into the weights around them.

    The result is checked before it is written: its coefficients, and its outputs in float64.
    """
    from bnfold import api

    if out is None and not dry_run:
        raise UsageError("-o OUT is missing: name the file to write, or give --dry-run")
    if out is not None and not dry_run:
        ready_to_write(out, suffixes=loading.suffixes(model), force=reporting.force, inputs=[model])
    with reporting.job(checking.check("fuse", model, force=reporting.force, strict=strict)) as job:
        loaded = loading.load(model, job)
        example = shaping.call(loaded) if no_verify else shaping.example(loaded)
        job.progress("fold" if no_verify else "fold and check", 0, None)
        fused, report = api.fuse(loaded, example=example, check=not no_verify, clone=clone)
        kept = sum(layer.verdict == "kept" for layer in report.layers)
        failed = strict and kept > 0
        if out is not None and not dry_run and not failed:
            loading.save(fused, out, force=reporting.force, example=example)
        job.finish(report)
        if failed:
            job.fail(f"--strict: {kept} BatchNorm{'s stay' if kept > 1 else ' stays'}; nothing was written")
        elif out is not None and not dry_run:
            job.say(f"written: {out}")
    return 1 if failed else 0


@command
def verify(
    reference: o.Reference,
    loading: Loading,
    running: Running,
    shaping: Shaping,
    feeding: Feeding,
    reporting: Reporting,
    checking: Checking,
    candidate: o.MaybeCandidate = None,
    against: o.Against = None,
    data: o.MaybeData = None,
    baseline: o.Baseline = None,
    bundle: o.Bundle = None,
    coefficients_only: Annotated[
        bool,
        typer.Option(
            "--coefficients-only", help="Compare operators, settings and coefficients alone, which takes no data and runs neither model."
        ),
    ] = False,
) -> int:
    """Decide whether two models compute the same function.

    Without a tolerance, on three levels: the coefficients, the function in float64, and the models as deployed. With --against, whether a
    folded model was made from the original that its certificate states, and whether its verdict still holds.
    """
    from bnfold import api
    from bnfold.certificates import claim

    if (candidate is None) == (against is None):
        raise UsageError("verify takes two models, REFERENCE CANDIDATE, or a folded one with --against ORIGINAL")
    if against is not None:
        reference, candidate = against, reference
    assert candidate is not None
    if coefficients_only and data is not None:
        raise UsageError("--data and --coefficients-only exclude each other: coefficients are compared without data")
    check = checking.check("verify", reference, candidate, force=reporting.force, baseline=baseline)
    with reporting.job(check) as job, running.fallback():
        providers = ("cpu",) if coefficients_only else running.providers(reference, candidate)
        one, other = (loading.load(path, job) for path in (reference, candidate))
        claimed = None if against is None else claim(other, candidate, one, reference)
        report = api.verify(
            one,
            other,
            **feeding.compared(data, one, job, shaping),
            providers=providers,
            samples=feeding.samples,
            batch_size=feeding.batch_size,
            progress=job.progress,
            bundle=bundle,
            force=reporting.force,
            coefficients_only=coefficients_only,
        )
        report = report if claimed is None else claimed.held(report)
        worse = check.compare(report)
        job.finish(report)
        if report.bundle:
            job.say(f"written: {report.bundle}")
        job.compared(check)
        if worse:
            job.fail(worse)
    return check.status(STATUS[report.verdict])


@command
def pipeline(
    model: o.ModelFile,
    data: o.Data,
    out: o.Out,
    loading: Loading,
    running: Running,
    shaping: Shaping,
    feeding: Feeding,
    calibrating: Calibrating,
    choosing: Choosing,
    reporting: Reporting,
    checking: Checking,
    evaluate: o.Evaluate = None,
    strict: o.Strict = False,
    memory_budget: o.MemoryBudget = "1G",
    baseline: o.Baseline = None,
) -> int:
    """Recalibrate, then fuse, then verify.

    The first step that fails ends it, and then nothing is written.
    """
    from bnfold.pipeline import pipeline as run

    ready_to_write(out, suffixes=loading.suffixes(model), force=reporting.force, inputs=[model])
    settings = calibrating.settings() | choosing.settings()
    budget = parse.size_in_bytes(memory_budget, "--memory-budget")
    check = checking.check("pipeline", model, force=reporting.force, strict=strict, baseline=baseline)
    with reporting.job(check) as job, running.fallback():
        providers = running.providers(model)
        loaded = loading.load(model, job)
        example = shaping.read(loaded, data)
        batches = feeding.open(data, loaded, job, shaping, example, samples=feeding.samples)
        labelled = batches if evaluate is None else feeding.open(evaluate, loaded, job, shaping, example)
        ready, report = run(
            loaded,
            batches,
            labelled=labelled,
            example=example,
            strict=strict,
            providers=providers,
            memory_budget=budget,
            batch_size=calibrating.batch_size(feeding),
            **settings,
            progress=job.progress,
        )
        worse = check.compare(report)
        written = ready is not None and not worse
        if written and job.main:
            loading.save(ready, out, force=reporting.force, example=example)
        job.finish(report)
        job.compared(check)
        if written:
            job.say(f"written: {out}")
        else:
            job.fail(f"{worse or report.notes[-1]}; nothing was written")
    return 0 if written else 1 if worse or report.verify is None else STATUS[report.verify.verdict]


@command
def bench(
    reference: o.Reference,
    candidate: o.Candidate,
    running: Running,
    loading: Loading,
    shaping: Shaping,
    feeding: Feeding,
    reporting: Reporting,
    data: o.MaybeData = None,
    rounds: Annotated[int, typer.Option("--rounds", min=5, help="How often each is timed.")] = 21,
    unoptimised: Annotated[bool, typer.Option("--unoptimised", help="With ONNX Runtime's own optimisations off, which fold too.")] = False,
) -> int:
    """Time two models side by side.

    In turn, round by round, so that a change in the machine's speed meets both: the ratio holds where the seconds don't.
    """
    from bnfold.bench import bench as run

    with reporting.job() as job, running.fallback():
        provider = running.one_provider(reference, candidate)
        one, other = (loading.load(path, job) for path in (reference, candidate))
        report = run(
            one,
            other,
            **feeding.compared(data, one, job, shaping),
            provider=provider,
            rounds=rounds,
            batch_size=feeding.batch_size or 1,
            optimise=not unoptimised,
            progress=job.progress,
        )
        job.finish(report)
    return 0
