"""What stands between the verb `recalibrate` and its plan: whose model it is, which data and processes, and how many samples are enough."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnfold._version import __version__
from bnfold.data import BATCH_SIZE, WHOLE, Batch, Data, InputSpec, as_batches, digest
from bnfold.data.inputs import check_feeds
from bnfold.data.memory import repeatable, within_memory
from bnfold.data.samples import few
from bnfold.data.source import peek
from bnfold.errors import DataError, NothingToDoError, UsageError
from bnfold.model import Model
from bnfold.report import RecalibrateReport

from .distributed import Processes, processes
from .journal import Journal
from .lockstep import recalibrate as run_plan
from .methods import Method
from .plan import Plan, Progress, Selection, every
from .scoring import Scores, effect, score, score_if_fits
from .statistics_file import fingerprint

PILOT = 64  # samples of the first trial of `until`
GROWTH = 16  # times as many samples, at most, in the next trial
MARGIN = 1.1  # more samples than the last trial says are needed


@dataclasses.dataclass(frozen=True)
class Target:
    """Which BatchNorms are measured, and where. freeze: those in training mode too. device: of PyTorch, or ONNX Runtime's provider."""

    layers: Sequence[str] = ()
    skipped: Sequence[str] = ()
    freeze: bool = False
    device: str = "cpu"

    def plan(self, model: Model, *, one_size: bool = False) -> Plan:
        """The model, cut into stages. one_size: what must be called to be read is read for samples of one size."""
        select = Selection(self.layers, self.skipped)
        try:
            chosen = select if self.layers or self.skipped else every
            plan: Plan = model.lockstep(select=chosen, freeze=self.freeze, device=self.device, one_size=one_size)
        except NothingToDoError:
            select.check()
            raise
        select.check()
        return plan


def recalibrate(
    model: Model,
    batches: Any,
    method: Method,
    target: Target,
    *,
    until: float | None = None,
    labelled: Any = None,
    memory_budget: int = 1 << 30,
    batch_size: int | None = None,
    samples: int | None = None,
    progress: Progress | None = None,
    resume: Path | None = None,
) -> tuple[Model, RecalibrateReport]:
    """A copy of the model with new statistics, and what changed (see `api.recalibrate`)."""
    start = time.perf_counter()
    group = processes()
    run = _Run(*called(model, batches, batch_size), target, method, memory_budget, batch_size, group, progress, resume, until)
    scores: Scores | None = None
    notes: tuple[str, ...] = ()
    if labelled is not None and not group.rank:
        scores, notes = score_if_fits(run.model, labelled, batches, provider=target.device)
    fresh, found = run(samples) if until is None else _until(run, until, samples)
    if scores is not None:
        after = score(fresh, labelled, provider=target.device)
        assert after is not None
        found = dataclasses.replace(found, accuracy_before=scores.summary(), accuracy_after=after.summary(), effect=effect(scores, after))
    return fresh, dataclasses.replace(found, notes=(*found.notes, *notes), seconds=time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Recalibration on the first samples of the data, as often as it is asked for."""

    model: Model
    batches: Any
    target: Target
    method: Method
    memory_budget: int
    batch_size: int | None
    group: Processes
    progress: Progress | None
    resume: Path | None
    until: float | None

    def __call__(self, samples: int | None, *, spread: bool = False) -> tuple[Model, RecalibrateReport]:
        # Statistics don't depend on the size of micro-batches where they are measured in lockstep.
        if not (self.method.lockstep and repeatable(self.batches)):
            return self._measured(self.batch_size, samples, spread)
        (model, found), notes = within_memory(lambda size: self._measured(size, samples, spread), self.batch_size, self.group.gather)
        return model, dataclasses.replace(found, notes=(*found.notes, *notes))

    def _measured(self, size: int | None, samples: int | None, spread: bool) -> tuple[Model, RecalibrateReport]:
        """With micro-batches of a size."""
        # A module is first read for samples of one size, which is quicker; where some have another, all starts afresh.
        quick = self.model.is_unread and repeatable(self.batches) and self.group.size == 1
        for one_size in (True, False) if quick else (False,):
            plan = self.target.plan(self.model, one_size=one_size)
            if one_size and _counts_elsewhere(plan.specs):
                continue
            try:
                data = data_of(self.batches, plan, one_size, size, samples, spread)
                mine = data.sharded(self.group.rank, self.group.size) if self.group.size > 1 else data
                batches = fitting(mine, plan.specs, one_size)
                how: dict[str, Any] = {"method": self.method, "memory_budget": self.memory_budget, "progress": self.progress}
                with self.model.computing(), self._journal(plan, batches, size, samples, one_size) as (journal, batches):
                    found = run_plan(plan, batches, **how, group=self.group, journal=journal)
                break
            except (_OtherSizeError, DataError) as error:
                if not one_size:
                    raise error
        if self.group.size > 1:
            data.know_bad(mine, self.group.gather)
        notes = (*found.notes, *(note for note in data.notes if note == WHOLE))
        return self.model.remade(plan.write()), dataclasses.replace(found, notes=notes)

    @contextlib.contextmanager
    def _journal(
        self, plan: Plan, batches: Iterator[Batch], size: int | None, samples: int | None, one_size: bool
    ) -> Iterator[tuple[Journal | None, Iterator[Batch]]]:
        """What is kept of a measurement where that is asked for, and the micro-batches."""
        if self.resume is None:
            yield None, batches
            return
        target = self.target
        run = {
            "bnfold": __version__,
            "data set": data_of(self.batches, plan, one_size, self.batch_size, None).fingerprint(),
            "method": f"{self.method.name} {dataclasses.asdict(self.method)}",
            "choice of layers": f"{[*target.layers]} without {[*target.skipped]}" + " frozen" * target.freeze,
            "model": fingerprint(plan.layers),
            "device": target.device.partition(":")[0],
            "batch size": f"{self.batch_size}",
            "number of processes": f"{self.group.size}",
            "standard error": f"{self.until}",
        }
        first = next(batches, None)
        rest = batches if first is None else itertools.chain([first], batches)
        of = {"model": plan.identity(), "data set": digest({} if first is None else first)}
        name = f"{samples or 'all'}-samples" + "-one-size" * one_size + f"-by-{size}" * (size != self.batch_size)
        with Journal(self.resume, run, name, of, plan.layers, self.method, self.group) as journal:
            yield journal, rest


class _OtherSizeError(Exception):
    """A micro-batch of another size than the network was read for."""


def _counts_elsewhere(specs: Sequence[InputSpec]) -> bool:
    """Whether one of several inputs, read for samples of one size, has a first axis that is tied to another axis."""
    first = [spec.shape[0] for spec in specs if spec.shape]
    return len(first) > 1 and any(isinstance(n, int) and n > 1 for n in first)


def called(model: Model, batches: Any, batch_size: int | None) -> tuple[Model, Any]:
    """The model, called as the data show where nothing else does; and the data."""
    if not model.needs_example:
        return model, batches
    first, batches = peek(batches)
    if first is batches:  # all samples at once
        count = batch_size or BATCH_SIZE
        return model.fed(_few(first, count), count), batches
    if first is None:
        raise DataError("the data hold no batch: give at least one; an iterator gives its batches only once")
    return model.fed(first), batches


def data_of(batches: Any, plan: Plan, one_size: bool, batch_size: int | None, samples: int | None, spread: bool = False) -> Data:
    """The data as the plan's network takes them. one_size: axes behind the first may differ from the example's.

    spread: samples are taken from all over the data, not the first ones.
    """
    specs = plan.specs
    wide = [dataclasses.replace(spec, shape=(*spec.shape[:1], *(None for _ in spec.shape[1:]))) for spec in specs] if one_size else specs
    first = None if spread else samples
    data: Data = as_batches(batches, wide, batch_size=batch_size, samples=first, run=plan.outputs, flat=plan.flat)
    return data.spread(samples) if spread and samples is not None else data


def fitting(data: Data, specs: Sequence[InputSpec], one_size: bool = False) -> Iterator[Batch]:
    """The micro-batches; with one_size, one whose axes behind the first differ from the example's doesn't go through."""
    for batch in data:
        if one_size and any(batch[spec.name].shape[1:] != spec.shape[1:] for spec in specs):
            raise _OtherSizeError
        check_feeds(batch, specs)
        yield batch


def _until(run: _Run, limit: float, samples: int | None) -> tuple[Model, RecalibrateReport]:
    """As many samples as bring every channel's standard error of the mean down to `limit` standard deviations, found by a few trials.

    A standard error falls with the root of the number of samples, so a trial tells how many the next one takes.
    """
    if not 0 < limit < 1:
        raise UsageError(f"the standard error asked for is {limit} standard deviations; give a number between 0 and 1")
    if not repeatable(run.batches):
        raise UsageError("to find out how many samples are enough takes several passes, and these data can be read only once")
    count = PILOT if samples is None else min(PILOT, samples)
    while True:
        fresh, found = run(count, spread=True)
        worst = max((layer.stderr for layer in found.layers if layer.count), default=0.0)
        reached = worst <= limit
        if reached or found.samples < count or count == samples:
            break
        wanted = math.ceil(found.samples * (worst / limit) ** 2 * MARGIN) if math.isfinite(worst) else count * GROWTH
        count = min(max(wanted, count + 1), count * GROWTH)
        count = count if samples is None else min(count, samples)
    note = (
        f"{found.samples:,} samples were enough: the worst channel's mean is known to {worst:.2g} standard deviations"
        if reached
        else f"{found.samples:,} samples, all that there are, were not enough: the worst channel's mean is known to {worst:.2g} standard "
        f"deviations, and {limit:g} was asked for"
    )
    return fresh, dataclasses.replace(found, until=limit, reached=reached, notes=(note, *found.notes))


def _few(samples: Any, count: int) -> Any:
    """The first samples of an array, or of each in a mapping or tuple of arrays, where these are plainly samples."""
    if isinstance(samples, Mapping):
        return few(dict(samples), count)
    arrays = few({str(i): array for i, array in enumerate(samples if isinstance(samples, tuple) else (samples,))}, count)
    return tuple(arrays.values()) if isinstance(samples, tuple) else arrays["0"]
