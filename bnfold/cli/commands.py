"""The commands. Each checks where it will write, makes one library call, and shows the report; without a status of its own it is 0."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bnfold import api
from bnfold.certificates import claim
from bnfold.errors import UsageError
from bnfold.files import ready_to_write

from . import extras as extras
from . import options as o
from .app import command, command_line
from .check import Check, Checking
from .job import Job, Reporting
from .options.folding import Folding
from .options.inputs import Feeding, Loading, Running, Saving, Shaping
from .options.recalibration import Choosing, Measuring, Task, beside, check_parts, finish, save, save_kept

__all__ = ["command_line"]

STEPS = ("recalibrate", "fold and check", "verify")  # of a pipeline; scoring belongs to the first and the last
LEVELS = ("weights", "outputs", "as deployed")  # of verify
STATUS = {"equivalent": 0, "different": 1, "inconclusive": 6}


@command
def inspect(
    *,
    model: Path = o.MODEL,
    loading: Loading,
    shaping: Shaping,
    reporting: Reporting,
    folding: Folding,
) -> None:
    """List every BatchNorm, and where it would fold to, or why it can't.

    Nothing is changed.
    """
    with Job(reporting) as job:
        loaded = loading.load(model, job)
        job.finish(api.inspect(loaded, example=shaping.call(loaded), **folding.options))


@command
def recalibrate(
    *,
    model: Path = o.MODEL,
    task: Task,
    reporting: Reporting,
) -> int:
    """Measure every BatchNorm's mean and variance afresh on your data.

    By default exactly, in one pass: the statistics are those of all data as one batch. The old ones are kept in OUT.before.npz. Under
    torchrun, the processes share the data.
    """
    how, data, out = task.measuring, task.data, task.out
    loading, settings = how.loading, how.settings(of_part=task.shard is not None)
    before = beside(out) if out is not None and data is not None else None
    ready_to_write((out, loading.suffixes(model)), (before, [".npz"]), (task.stats, [".npz"]), force=reporting.force, inputs=[model])
    with Job(reporting) as job, how.running.fallback():
        provider = how.running.one_provider(model)
        loaded = loading.load(model, job)
        if task.restore is not None and out is not None:
            example = how.feeding.call(loaded)
            old, names = api.restore(loaded, task.restore, example=example)
            loading.save(old, out, job, example)
            job.say(f"{len(names)} BatchNorm{'s have their' if len(names) != 1 else ' has its'} old statistics again")
            return 0
        assert data is not None
        batches, given = how.opened(data, loaded, job)
        if task.shard is not None and task.stats is not None:
            from bnfold.verbs.parts import measure_part  # with numpy, which the help has no need of

            job.finish(measure_part(loaded, batches, task.shard, task.stats, provider=provider, **settings, **given))
            job.wrote(task.stats)
            return 0
        assert out is not None
        labelled = how.labelled(batches, loaded, job, given["example"])
        fresh, report = api.recalibrate(loaded, batches, labelled=labelled, provider=provider, **settings, **given)
        return finish(how, fresh, report, out, job, given["example"])


@command
def merge_stats(
    *,
    model: Path = o.MODEL,
    parts: list[Path] = o.argument(
        "STATS...", "What recalibrate --shard wrote; or models that were each measured on data of their own.", read=o.model_file
    ),
    out: Path = o.OUT,
    counts: list[int] | None = o.option("--counts", "How many samples each model was measured on.", metavar="N,N,...", read=o.counts),
    loading: Saving,
    shaping: Shaping,
    reporting: Reporting,
    choosing: Choosing,
) -> None:
    """Put together what parts of the data gave (recalibrate --shard), and write the model with these statistics.

    All parts must be there, each once, measured on this model by one method. Or, with --counts, put together the statistics of MODEL and
    of others that are the same but for their statistics, as those of clients: the variance is that of all data.
    """
    from bnfold.verbs.parts import merge_models, merge_parts

    check_parts(parts, counts)
    ready_to_write((out, loading.suffixes(model)), (beside(out), [".npz"]), force=reporting.force, inputs=[model, *parts])
    with Job(reporting, command="merge-stats") as job:
        loaded = loading.load(model, job)
        example = shaping.call(loaded)
        if counts is None:
            fresh, report = merge_parts(loaded, parts, example=example, **choosing.settings())
        else:
            models = [loaded, *(loading.load(path, job) for path in parts)]
            chosen = {"layers": choosing.layers or (), "skip_layers": choosing.skip_layers or ()}
            fresh, report = merge_models(models, counts, example=example, **chosen)
        save(loading, fresh, report, out, job, example)
        job.finish(report)


@command
def fuse(
    *,
    model: Path = o.MODEL,
    loading: Saving,
    shaping: Shaping,
    reporting: Reporting,
    checking: Checking,
    folding: Folding,
    out: Path | None = o.OUT,
    dry_run: bool = o.option("--dry-run", "Do it all, but write nothing."),
    strict: bool = o.STRICT,
    data: str | None = o.option("--data", "A file of arrays, or a function, to check it on. Default: random.", o.DATA, "DATA"),
    no_verify: bool = o.option("--no-verify", "Leave out the check of the result."),
) -> int:
    """Fold BatchNorms into the weights around them.

    The result is checked before it is written: its coefficients, and its outputs in float64.
    """
    if out is None and not dry_run:
        raise UsageError("-o OUT is missing: name the file to write, or give --dry-run")
    target = None if dry_run else out
    ready_to_write((target, loading.suffixes(model)), force=reporting.force, inputs=[model])
    with Job(reporting, Check("fuse", checking, model, force=reporting.force, strict=strict)) as job:
        loaded = loading.load(model, job)
        example = shaping.call(loaded, data) if no_verify else shaping.example(loaded, data)
        if no_verify and data is not None and example is None:
            raise UsageError("--data and --no-verify exclude each other: data are what the result is checked on")
        job.progress("fold" if no_verify else "fold and check", 0, None)
        fused, report = api.fuse(loaded, example=example, check=not no_verify, by_layer=job.html_path is not None, **folding.options)
        stays = report.failure if strict else ""
        doubt = f"the check is inconclusive (--no-verify leaves it out): {report.doubt}" if report.doubt else ""
        failed = stays or doubt
        if target is not None and not failed:
            loading.save(fused, target, job, example)
        job.finish(report)
        if failed:
            job.fail(f"{failed}; nothing was written")
        elif report.in_training:
            job.warn(report.in_training)
        elif not report.changes:
            stay = {0: "", 1: ": the only BatchNorm stays"}.get(count := len(report.kept), f": all {count} BatchNorms stay")
            job.warn(f"nothing folds{stay}, and the model is as it was")
    return 1 if stays else STATUS["inconclusive"] if doubt else 0


@command
def verify(
    *,
    reference: Path = o.REFERENCE,
    loading: Loading,
    running: Running,
    feeding: Feeding,
    reporting: Reporting,
    checking: Checking,
    candidate: Path | None = o.CANDIDATE,
    against: Path | None = o.option(
        "--against",
        "In place of CANDIDATE: hold a folded model, given alone, against this by its certificate.",
        o.MODELS,
        "ORIGINAL",
        read=o.model_file,
    ),
    data: str | None = o.SPEC_OR_RANDOM,
    map_input: list[str] | None = o.MAP_INPUT,
    map_output: list[str] | None = o.MAP_OUTPUT,
    baseline: Path | None = o.BASELINE,
    bundle: Path | None = o.option("--bundle", "Where the models differ, write the part that shows it, with a script.", o.OUTPUT, "DIR"),
    coefficients_only: bool = o.rare(
        "--coefficients-only", "Compare operators, settings and coefficients alone, which takes no data and runs neither model."
    ),
) -> int:
    """Decide whether two models compute the same function.

    Without a tolerance, on three levels: the coefficients, the function in float64, and the models as deployed. With --against, whether a
    folded model was made from the original that its certificate states, and whether its verdict still holds.
    """
    if (candidate is None) == (against is None):
        raise UsageError("verify takes two models, REFERENCE CANDIDATE, or a folded one with --against ORIGINAL")
    if against is not None:
        reference, candidate = against, reference
    assert candidate is not None
    if coefficients_only and data is not None:
        raise UsageError("--data and --coefficients-only exclude each other: coefficients are compared without data")
    check = Check("verify", checking, reference, candidate, force=reporting.force, baseline=baseline)
    with Job(reporting, check, () if coefficients_only else LEVELS) as job, running.fallback():
        providers = ("cpu",) if coefficients_only else running.providers(reference, candidate)
        one, other = (loading.load(path, job) for path in (reference, candidate))
        claimed = None if against is None else claim(other, candidate, one, reference)
        how = feeding.compared(data, one, job) | {"providers": providers, "samples": feeding.samples, "bundle": bundle, "force": job.force}
        how |= {"map_inputs": o.pairs(map_input, "--map-input"), "map_outputs": o.pairs(map_output, "--map-output")}
        how |= {"coefficients_only": coefficients_only, "by_layer": job.html_path is not None}
        report = api.verify(one, other, **how)
        report = report if claimed is None else claimed.held(report)
        worse = check.compare(report)
        if report.bundle:
            job.wrote(Path(report.bundle))
        job.finish(report)
        job.compared(check)
        if worse:
            job.fail(worse)
    return check.status(STATUS[report.verdict])


@command
def pipeline(
    *,
    model: Path = o.MODEL,
    data: str = o.SPEC,
    out: Path = o.OUT,
    measuring: Measuring,
    reporting: Reporting,
    checking: Checking,
    folding: Folding,
    strict: bool = o.STRICT,
    keep: Path | None = o.rare("--keep-recalibrated", "Write what was folded too, for verify --against.", o.OUTPUT, "FILE"),
    baseline: Path | None = o.BASELINE,
) -> int:
    """Recalibrate, then fuse, then verify.

    The first step that fails ends it, and then nothing is written.
    """
    from bnfold.verbs.pipelines import pipeline as run

    loading, settings = measuring.loading, measuring.settings()
    suffixes = loading.suffixes(model)
    ready_to_write((out, suffixes), (keep, suffixes), force=reporting.force, inputs=[model])
    allowed = {"strict": strict, "accept_harm": measuring.accept_harm}
    check = Check("pipeline", checking, model, force=reporting.force, **allowed, baseline=baseline)
    with Job(reporting, check, STEPS) as job, measuring.running.fallback():
        providers = measuring.running.providers(model)
        loaded = loading.load(model, job)
        batches, given = measuring.opened(data, loaded, job)
        labelled = measuring.labelled(batches, loaded, job, given["example"])
        recalibrated: list[Any] = []
        given |= {**allowed, **folding.options, "providers": providers, "keep": recalibrated.append, "by_layer": job.html_path is not None}
        ready, report = run(loaded, batches, labelled=labelled, **settings, **given)
        worse = check.compare(report)
        written = ready is not None and not worse
        if written and job.main:
            save_kept(loading, ready, out, recalibrated[0], keep, job, given["example"])
        job.finish(report)
        job.compared(check)
        if not written:
            advice = " (--accept-harm writes it)" * bool(report.harm and not worse)
            job.fail(f"{worse or report.notes[-1]}; nothing was written{advice}")
    return 0 if written else 1 if worse or report.verify is None else STATUS[report.verify.verdict] or 1


@command
def bench(
    *,
    reference: Path = o.REFERENCE,
    candidate: Path = o.CANDIDATE,
    running: Running,
    loading: Loading,
    feeding: Feeding,
    reporting: Reporting,
    data: str | None = o.SPEC_OR_RANDOM,
    rounds: int = o.option("--rounds", "How often each is timed.", min=5, default=21, show_default=True),
    map_input: list[str] | None = o.MAP_INPUT,
    threads: int | None = o.option("--threads", "Threads that one operator may use. Default: as the runtime likes.", min=1),
    unoptimised: bool = o.rare("--unoptimised", "With ONNX Runtime's own optimisations off, which fold too."),
) -> None:
    """Time two models side by side.

    In turn, round by round, so that a change in the machine's speed meets both: the ratio holds where the seconds don't. With several
    numbers (--batch-size 1,8,32), at each batch size.
    """
    from bnfold.verbs.benchmark import bench as run

    with Job(reporting) as job, running.fallback():
        provider = running.one_provider(reference, candidate)
        one, other = (loading.load(path, job) for path in (reference, candidate))
        sizes = feeding.batch_sizes
        feeding = dataclasses.replace(feeding, batch_sizes=sizes and [max(sizes)])
        how = feeding.compared(data, one, job) | {"batch_size": sizes, "map_inputs": o.pairs(map_input, "--map-input")}
        job.finish(run(one, other, **how, provider=provider, rounds=rounds, optimise=not unoptimised, threads=threads))
