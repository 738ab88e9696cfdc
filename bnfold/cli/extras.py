"""Commands beside the main ones, which `commands` has with its own: averaging checkpoints, and explanations."""

from __future__ import annotations

from pathlib import Path

from bnfold.errors import UsageError
from bnfold.files import ready_to_write

from . import options as o
from .app import command
from .job import Job, Reporting
from .options.folding import Folding
from .options.inputs import Loading, Shaping
from .options.recalibration import Measuring, beside, finish


@command
def average(
    *,
    models: list[Path] = o.argument("MODEL MODEL...", "Checkpoints of one network, two or more.", read=o.model_file),
    data: str = o.SPEC,
    out: Path = o.OUT,
    measuring: Measuring,
    reporting: Reporting,
) -> int:
    """Average the weights of checkpoints (SWA, EMA, soups), and measure the BatchNorms afresh.

    With labels, it is scored both ways: before, with the mean of the checkpoints' statistics, and after, with those of the data.
    """
    from bnfold.verbs.parts import average as run

    if len(models) < 2:
        raise UsageError("average takes two models or more; `bnfold recalibrate` measures one's statistics")
    loading = measuring.loading
    ready_to_write((out, loading.suffixes(models[0])), (beside(out), [".npz"]), force=reporting.force, inputs=models)
    with Job(reporting, command="average") as job, measuring.running.fallback():
        provider = measuring.running.one_provider(*models)
        loaded = [loading.load(path, job) for path in models]
        batches, given = measuring.opened(data, loaded[0], job)
        labelled = measuring.labelled(batches, loaded[0], job, given["example"])
        made, report = run(loaded, batches, labelled=labelled, provider=provider, **measuring.settings(), **given)
        return finish(measuring, made, report, out, job, given["example"])


@command
def explain(
    *,
    what: str | None = o.argument(
        "[RULE|LAYER]", "An operator or a rule, or all of them; with MODEL, one of its layers.", values=o.values.operators
    ),
    model: Path | None = o.argument("[MODEL]", "The model that the layer is in.", read=o.model_file),
    loading: Loading,
    shaping: Shaping,
    reporting: Reporting,
    folding: Folding,
) -> None:
    """Say what can cross an operator, or why a BatchNorm stays and what would let it go."""
    from bnfold.verbs.explanations import explain as run

    if what and Path(what).is_file() and (model is None or not model.exists()):
        before = f"bnfold explain {model} {what}" if model else f"name one of its BatchNorms before it, which `bnfold inspect {what}` lists"
        raise UsageError(f"{what} is a file: {before}")
    with Job(reporting) as job:
        loaded = None if model is None else loading.load(model, job)
        example = None if loaded is None else shaping.call(loaded)
        job.finish(run(what or "", loaded, example=example, **(folding.options if loaded is not None else {})))
