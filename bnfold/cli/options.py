"""The options that several commands share, each declared once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError

if TYPE_CHECKING:
    from ..images import ImageOptions

MODEL, DATA, OUTPUT = "Models", "Data", "Output"

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The model file (.onnx).", show_default=False)]
Reference = Annotated[Path, typer.Argument(metavar="REFERENCE", help="The model that is right.", show_default=False)]
Candidate = Annotated[Path, typer.Argument(metavar="CANDIDATE", help="The model to compare with it.", show_default=False)]
Out = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Where to write the result.", show_default=False)]
MaybeOut = Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT", help="Where to write the result.", show_default=False)]
Arch = Annotated[
    str | None, typer.Option("--arch", metavar="MODULE:FACTORY", help="What builds the network of a checkpoint.", rich_help_panel=MODEL)
]
ArchArgs = Annotated[str | None, typer.Option("--arch-args", metavar="JSON", help="Arguments of --arch.", rich_help_panel=MODEL)]
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help="Load files that can run code.", rich_help_panel=MODEL)]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape", metavar="[NAME=]1,3,224,224", help="Shape of an input with dynamic axes; repeatable.", rich_help_panel=MODEL
    ),
]
DATA_HELP = "FILE.npy|npz|safetensors|pt, a folder of images or .npy files, FILE.py:FUNCTION, or random."
Data = Annotated[str, typer.Option("--data", metavar="DATA", help=DATA_HELP, rich_help_panel=DATA, show_default=False)]
MaybeData = Annotated[str | None, typer.Option("--data", metavar="DATA", help=DATA_HELP, rich_help_panel=DATA, show_default=False)]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Samples that go through the network at once.", rich_help_panel=DATA)
]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Use at most this many samples.", rich_help_panel=DATA)]
Seed = Annotated[int, typer.Option("--seed", help="For everything random.", rich_help_panel=DATA)]
Preprocess = Annotated[
    Path | None,
    typer.Option("--preprocess", metavar="CONFIG.json", help="A preprocessing config of timm or Hugging Face.", rich_help_panel=DATA),
]
ImageSize = Annotated[int | None, typer.Option("--image-size", min=1, help="Height and width that the network gets.", rich_help_panel=DATA)]
Resize = Annotated[int | None, typer.Option("--resize", min=1, help="Shorter side before the crop.", rich_help_panel=DATA)]
Mean = Annotated[str | None, typer.Option("--mean", metavar="R,G,B", help="Subtracted from each channel.", rich_help_panel=DATA)]
Std = Annotated[str | None, typer.Option("--std", metavar="R,G,B", help="Divides each channel.", rich_help_panel=DATA)]
Scale = Annotated[float | None, typer.Option("--scale", help="Multiplies the pixel values, before mean and std.", rich_help_panel=DATA)]
Interpolation = Annotated[
    str | None, typer.Option("--interpolation", help="nearest, bilinear, bicubic, lanczos, ...", rich_help_panel=DATA)
]
MemoryBudget = Annotated[
    str,
    typer.Option("--memory-budget", metavar="SIZE", help="Activations held before they spill to disk (512M, 2G).", rich_help_panel=DATA),
]
Device = Annotated[str, typer.Option("--device", help="For PyTorch models: cpu or cuda.", rich_help_panel=MODEL)]
Provider = Annotated[
    list[str] | None,
    typer.Option(
        "--provider", help="ONNX Runtime execution provider: cpu, cuda, tensorrt, openvino, ...; repeatable.", rich_help_panel=MODEL
    ),
]
Json = Annotated[bool, typer.Option("--json", help="The report on standard output, and nothing else.", rich_help_panel=OUTPUT)]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.json", help="Write the report to a file.", rich_help_panel=OUTPUT)
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)]


def size_in_bytes(text: str) -> int:
    """Bytes of "512M", "2G", "1000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"--memory-budget {text}: expected a size such as 512M or 2G")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


def shapes(given: list[str] | None, names: list[str]) -> dict[str, tuple[int, ...]] | None:
    """--input-shape as shapes by input name; a shape without a name is the only input's."""
    if not given:
        return None
    found = {}
    for text in given:
        name, equals, numbers = text.rpartition("=")
        if not equals and len(names) != 1:
            raise UsageError(f"--input-shape {text}: the model has {len(names)} inputs ({', '.join(names)}); write NAME={text}")
        name = name if equals else names[0]
        if name not in names:
            raise UsageError(f"--input-shape {text}: the model has no input '{name}'; its inputs are {', '.join(names)}")
        try:
            found[name] = tuple(int(n) for n in re.split(r"[,x]", numbers))
        except ValueError:
            raise UsageError(f"--input-shape {text}: expected numbers such as 1,3,224,224") from None
    return found


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """A comma-separated list of numbers."""
    if text is None:
        return None
    try:
        return tuple(float(n) for n in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers such as 0.485,0.456,0.406") from None


def json_object(text: str | None, option: str) -> dict[str, Any] | None:
    """A JSON object."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{option} {text}: expected a JSON object such as '{{\"depth\": 18}}'")
    return found


def images(
    preprocess: Path | None,
    size: int | None,
    resize: int | None,
    mean: str | None,
    std: str | None,
    scale: float | None,
    interpolation: str | None,
) -> ImageOptions | None:
    """The image options: what is given on the command line goes before what the config says."""
    import dataclasses

    given = {
        "size": None if size is None else (size, size),
        "resize": resize,
        "mean": numbers(mean, "--mean"),
        "std": numbers(std, "--std"),
        "scale": scale,
        "interpolation": interpolation,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if preprocess is None and not given:
        return None
    from ..images import ImageOptions

    base = ImageOptions() if preprocess is None else ImageOptions.from_config(preprocess)
    return dataclasses.replace(base, **given)  # type: ignore[arg-type]
