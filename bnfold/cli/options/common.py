"""Options that stand alone, each declared once for the commands that take it; the groups are in the files `options_*`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# Titles of the help's panels.
MODELS, DATA, STATISTICS, IMAGES, OUTPUT = "Models", "Data", "Statistics", "Images", "Output"


def option(*names: str, panel: str, **more: Any) -> Any:
    """An option in a panel of the help."""
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
    option(
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
    option(
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
    Path | None, option("--html", panel=OUTPUT, metavar="FILE.html", help="The report as a page: a table and a chart of the drift.")
]
Bundle = Annotated[
    Path | None,
    option("--bundle", panel=OUTPUT, metavar="DIR", help="Where the models differ, write the part that shows it, with a script."),
]
MemoryBudget = Annotated[
    str, typer.Option("--memory-budget", metavar="SIZE", help="Activations held in memory before they spill to disk.", rich_help_panel=DATA)
]
DataOrNot = Annotated[str | None, typer.Option("--data", metavar="DATA", help=DATA_FORMS, show_default=False)]
Restore = Annotated[
    Path | None,
    option("--restore", panel=STATISTICS, metavar="OUT.before.npz", help="Put the old statistics back that a recalibration kept."),
]
Shard = Annotated[
    str | None,
    option("--shard", panel=STATISTICS, metavar="I/N", help="Measure part I (from 0) of N only, for merge-stats; with --stats."),
]
Stats = Annotated[Path | None, option("--stats", panel=STATISTICS, metavar="FILE.npz", help="Where a part's measurements go.")]
Parts = Annotated[list[Path], typer.Argument(metavar="STATS...", help="What recalibrate --shard wrote.", show_default=False)]
