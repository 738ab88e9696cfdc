"""The options of recalibration: how statistics are measured, whose, and what is done with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.certificates import kept
from bnfold.errors import InputError, UsageError
from bnfold.files import replacing, unreadable
from bnfold.recalibration.distributed import TIMEOUT, processes

from ..job import Job
from . import DATA, OUT, SPEC, STATISTICS, numbers, option, part, rare, size_in_bytes, values
from .inputs import Feeding, Running, Saving

if TYPE_CHECKING:
    from bnfold.recalibration.methods import Method
    from bnfold.report import RecalibrateReport

OWN_BATCH = 32  # samples
METHODS = "exact, precise, ioffe-szegedy, moving-average or prior"


@dataclass(frozen=True, kw_only=True)
class Calibrating:
    """How statistics are measured."""

    method: str | None = option("--method", f"{METHODS}. Default: exact.", STATISTICS, "NAME", values=values.methods)
    variance: str | None = rare("--variance", "M2/n or M2/(n-1). Default: as the method's source has it.", STATISTICS, "biased|unbiased")
    momentum: str | None = rare("--momentum", "moving-average: weight of the newest batch; none for the plain mean.", STATISTICS, "M|none")
    prior: float | None = rare("--prior", "prior: the old statistics count as N samples (16).", STATISTICS, "N", min=0)
    mean_shift: bool = rare("--mean-shift", "prior: the variance of the mixture, means being apart.", STATISTICS)
    until: float | None = rare("--until", "As many samples as bring each mean's standard error to E deviations.", STATISTICS, "E")

    @property
    def name(self) -> str:
        return self.method or "exact"

    def chosen(self) -> Method:
        """The method with its settings."""
        from bnfold.recalibration.methods import MovingAverage, method

        if self.variance not in (None, "biased", "unbiased"):
            raise UsageError(f"--variance {self.variance}: it is biased or unbiased")
        for name, given, owner in (
            ("--momentum", self.momentum is not None, "moving-average"),
            ("--prior", self.prior is not None, "prior"),
            ("--mean-shift", self.mean_shift, "prior"),
        ):
            if given and self.name != owner:
                raise UsageError(f"{name} is for the method {owner}, not for {self.name}")
        unbiased = None if self.variance is None else self.variance == "unbiased"
        made = method(self.name, unbiased=unbiased, strength=self.prior, mean_shift=self.mean_shift or None)
        if not isinstance(made, MovingAverage) or self.momentum is None:
            return made
        return dataclasses.replace(made, momentum=None if self.momentum == "none" else numbers(self.momentum, "--momentum")[0])

    def batch_size(self, feeding: Feeding) -> int | None:
        """Where each micro-batch is normalised by itself, its size is a part of the method: 32 unless another is asked for."""
        return feeding.batch_size or (None if self.chosen().lockstep else OWN_BATCH)


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """Whose statistics are measured."""

    layers: list[str] | None = option("--layers", "Only BatchNorms of such names; repeatable.", STATISTICS, "PATTERN", values=values.layers)
    skip_layers: list[str] | None = rare("--skip-layers", "None of such names; repeatable.", STATISTICS, "PATTERN", values=values.layers)
    freeze: bool = rare("--freeze", "Give BatchNorms in training mode statistics of their own, so that they can fold.", STATISTICS)

    def settings(self) -> dict[str, Any]:
        """The arguments of `api.recalibrate` and its kin."""
        return {"layers": self.layers or (), "skip_layers": self.skip_layers or (), "freeze": self.freeze}


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What statistics are measured on, how, and whose."""

    loading: Saving
    running: Running
    feeding: Feeding
    calibrating: Calibrating
    choosing: Choosing
    evaluate: str | None = option(
        "--eval", "Labelled data to score before and after, or none. Default: --data, where it has labels.", metavar="DATA"
    )
    accept_harm: bool = rare("--accept-harm", "Write the model even where the scores say that it was harmed.")
    force_random: bool = rare("--force-random", "Measure on random numbers, which no trained network has seen; with --method.", DATA)
    resume: Path | None = rare("--resume", "Keep what is measured, stage by stage, and go on from what is kept there.", DATA, "DIR")
    timeout: float | None = rare(
        "--timeout", "torchrun: after so long a process that says nothing is lost, and all end (1800).", DATA, "SECONDS", min=1
    )
    memory_budget: int = rare(
        "--memory-budget",
        "Activations held in memory before they spill to disk.",
        DATA,
        "SIZE",
        default="1G",
        show_default=True,
        read=size_in_bytes,
    )

    def settings(self, *, of_part: bool = False) -> dict[str, Any]:
        """What the options say, as arguments of `api.recalibrate`, or of `api.measure_part`."""
        found = {"method": self.calibrating.chosen(), **self.choosing.settings()}
        if not of_part:
            return found | {"until": self.calibrating.until, "memory_budget": self.memory_budget, "resume": self.resume}
        if self.resume is not None:
            raise UsageError("--resume keeps what all data give, and --shard measures a part of them, whose file is that; leave one out")
        if self.calibrating.until is not None:
            raise UsageError("--until looks at all data, and --shard measures a part of them; leave one out")
        return found

    def opened(self, data: str, model: Any, job: Job) -> tuple[Any, dict[str, Any]]:
        """The data to measure on, and how the model is called on them, as arguments likewise."""
        if data == "random" and not (self.force_random and self.calibrating.method):
            raise UsageError(
                "--data random: statistics of random numbers make a network useless; give data like those that it will see "
                "(to try it all the same: --method NAME --force-random)"
            )
        processes(self.timeout or TIMEOUT)
        example = self.feeding.read(model, data)
        batches = self.feeding.open(data, model, job, example, samples=self.feeding.samples)
        return batches, {"example": example, "batch_size": self.calibrating.batch_size(self.feeding), "progress": job.progress}

    def labelled(self, batches: Any, model: Any, job: Job, example: Any) -> Any:
        """The data to score."""
        if self.evaluate == "none":
            return None
        return batches if self.evaluate is None else self.feeding.open(self.evaluate, model, job, example, what="labelled data")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the command recalibrate does: measure on all the data and write the model; measure one of several parts (`shard`) and write
    what was measured (`stats`); or put old statistics back (`restore`).
    """

    data: str | None = SPEC
    out: Path | None = OUT
    measuring: Measuring
    restore: Path | None = rare("--restore", "Put the old statistics back that a recalibration kept.", STATISTICS, "OUT.before.npz")
    shard: tuple[int, int] | None = rare(
        "--shard", "Measure part I (from 0) of N only, for merge-stats; with --stats.", STATISTICS, "I/N", read=part
    )
    stats: Path | None = rare("--stats", "Where a part's measurements go.", STATISTICS, "FILE.npz")

    def __post_init__(self) -> None:
        """UsageError where what is needed is missing or too much."""
        if self.restore is not None:
            wrong = {"--data": self.data, "--shard": self.shard, "--stats": self.stats}
            if too_much := [name for name, value in wrong.items() if value is not None]:
                raise UsageError(f"--restore puts old statistics back and measures none; leave out {too_much[0]}")
        elif self.data is None:
            raise UsageError("--data DATA is missing: say what to measure on")
        elif (self.shard is None) != (self.stats is None):
            raise UsageError("--shard I/N and --stats FILE.npz go together: a part's measurements are written to that file")
        elif self.shard is not None and self.out is not None:
            raise UsageError("-o OUT: a part of the data makes no model; bnfold merge-stats makes it from all parts")
        if self.out is None and self.shard is None:
            raise UsageError("-o OUT is missing: name the file to write")


def check_parts(parts: Sequence[Path], counts: Sequence[int] | None) -> None:
    """What is put together can be read, is all of one kind, told by its content, and has the counts that this kind needs."""
    from bnfold.recalibration.statistics_file import is_statistics

    if bad := next(filter(unreadable, parts), None):
        raise InputError(f"{bad}: {unreadable(bad)}; give what recalibrate --shard wrote, or a model")
    measured = {is_statistics(path): path for path in parts}
    if len(measured) == 2:
        raise UsageError(f"{measured[True]} holds measurements, and {measured[False]} doesn't: give STATS of one kind")
    if (True in measured) == (counts is not None):
        raise UsageError(
            "--counts N,N,... is missing: say how many samples each model was measured on, MODEL's first"
            if counts is None
            else "--counts is for models, and STATS are measurements, which hold their own"
        )


def beside(path: Path) -> Path:
    """Where the old statistics of what is written to `path` are kept."""
    return path.with_name(path.name + ".before.npz")


def save(loading: Saving, model: Any, report: RecalibrateReport, path: Path, job: Job, example: Any) -> None:
    """The model, and beside it the statistics that it had: both, or neither."""
    from bnfold.recalibration.statistics_file import write

    with replacing(beside(path)) as (part,):
        write(part, report.before)
        job.wrote(beside(path), what="the old statistics")
        loading.save(model, path, job, example)


def finish(how: Measuring, model: Any, report: RecalibrateReport, path: Path, job: Job, example: Any) -> int:
    """Write what was measured, unless it harms and nobody asked for that; the status."""
    harm = "" if how.accept_harm else report.harm
    if job.main and not harm:
        save(how.loading, model, report, path, job, example)
    job.finish(report)
    if harm:
        job.fail(f"{harm}; the model was not written (--accept-harm writes it)")
    return int(bool(harm))


def save_kept(loading: Saving, model: Any, path: Path, recalibrated: Any, keep: Path | None, job: Job, example: Any) -> None:
    """What a pipeline made, and before it what that was folded from, where it is to be kept: both, or neither."""
    files = [] if keep is None else loading.save(recalibrated, keep, job, example)
    try:
        if files:
            kept(model, files)
        loading.save(model, path, job, example)
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise
