"""What the command recalibrate was asked to do, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.errors import UsageError

from .options import parse

if TYPE_CHECKING:
    from bnfold.report import RecalibrateReport

    from .options.models import Loading


@dataclass(frozen=True)
class Whole:
    """Measure on all the data, and write the model."""

    data: str
    out: Path


@dataclass(frozen=True)
class Part:
    """Measure one of several parts, and write what was measured."""

    data: str
    part: tuple[int, int]
    stats: Path


@dataclass(frozen=True)
class Restore:
    """Put old statistics back."""

    before: Path
    out: Path


Task = Whole | Part | Restore


def asked(data: str | None, out: Path | None, restore: Path | None, shard: str | None, stats: Path | None) -> Task:
    """What to do. UsageError where what is needed for it is missing or too much."""
    if restore is not None:
        wrong = {"--data": data, "--shard": shard, "--stats": stats}
        if too_much := [name for name, value in wrong.items() if value is not None]:
            raise UsageError(f"--restore puts old statistics back and measures none; leave out {too_much[0]}")
    elif data is None:
        raise UsageError("--data DATA is missing: say what to measure on")
    elif shard is not None and stats is not None:
        if out is not None:
            raise UsageError("-o OUT: a part of the data makes no model; bnfold merge-stats makes it from all parts")
        return Part(data, parse.part(shard, "--shard"), stats)
    elif shard is not None or stats is not None:
        raise UsageError("--shard I/N and --stats FILE.npz go together: a part's measurements are written to that file")
    if out is None:
        raise UsageError("-o OUT is missing: name the file to write")
    if restore is not None:
        return Restore(restore, out)
    assert data is not None
    return Whole(data, out)


def written(task: Task) -> dict[Path, str]:
    """The files that it writes, and of which kind: "model", or a suffix."""
    if isinstance(task, Part):
        return {task.stats: ".npz"}
    return {task.out: "model"} | ({beside(task.out): ".npz"} if isinstance(task, Whole) else {})


def beside(path: Path) -> Path:
    """Where the old statistics of what is written to `path` are kept."""
    return path.with_name(path.name + ".before.npz")


def save(loading: Loading, model: Any, report: RecalibrateReport, path: Path, *, force: bool, example: Any) -> None:
    """The model, and beside it the statistics that it had; first those, so that nothing is lost where the second fails."""
    from bnfold.recalibration.statistics_file import write

    side = beside(path)
    write(side, report.before)
    try:
        loading.save(model, path, force=force, example=example)
    except BaseException:
        side.unlink(missing_ok=True)
        raise
