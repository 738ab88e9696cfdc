"""The options of the commands: how they are declared, and what their values mean.

An option is declared once, as the default of a parameter or of a group's field. A command takes groups (dataclasses) and single
options by keyword, and Typer sees one parameter for each option.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import partial, update_wrapper
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin

import typer

from bnfold.backends.kinds import local
from bnfold.errors import UsageError
from bnfold.text import meant

from .values import Values, offered, words

# Titles of the help's panels.
MODELS, DATA, STATISTICS, IMAGES, OUTPUT = "Models", "Data", "Statistics", "Images", "Output"
DECLARED, READ = "typer", "read"  # keys of a field's metadata


def option(
    names: str,
    help: str,
    panel: str | None = None,
    metavar: str | None = None,
    *,
    default: Any = MISSING,
    read: Callable[..., Any] | None = None,
    values: Values | None = None,
    **more: Any,
) -> Any:
    """An option. names: as "-o --output"; panel: of the help; read: makes the value of a text and the option's name; values: what a shell
    offers, else the words of the metavar; more: as `typer.Option` has it. Without a default it must be given, but for a type that has None
    in it, and for bool, which is False.
    """
    settings = {"show_default": default not in (MISSING, None)} | more
    values = values or words(metavar or "")
    settings |= {} if values is None else {"autocompletion": offered(values)}
    made = typer.Option(*names.split(), help=help, rich_help_panel=panel, metavar=metavar or ("N" if "min" in more else None), **settings)
    return dataclasses.field(default=default, metadata={DECLARED: made, READ: read and partial(read, option=names.split()[-1])})


rare = partial(option, hidden=True)  # what few need, and --help-all shows beside the others


def argument(metavar: str, help: str, read: Callable[..., Any] | None = None, values: Values | None = None) -> Any:
    """An argument, which must be given unless its type has None in it. read, values: as for `option`, of each of a list."""
    made = typer.Argument(metavar=metavar, help=help, show_default=False, autocompletion=values and offered(values))
    return dataclasses.field(metadata={DECLARED: made, READ: read and partial(read, option=metavar)})


class Interrupted(Exception):
    """Ctrl-C, in a class that the parser lets through."""


def grouped(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """The command as Typer wants it: each parameter that is a dataclass replaced by its fields."""
    hints = inspect.get_annotations(command, eval_str=True)
    declared = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    parameters = list(_parameters(declared, hints))

    def flat(**given: Any) -> int | None:
        try:
            return command(**{name: _value(name, field, hints[name], given) for name, field in declared.items()})
        except KeyboardInterrupt:
            raise Interrupted from None

    made: Any = update_wrapper(flat, command)
    del made.__wrapped__  # else its signature would be the one that is seen
    made.__signature__ = inspect.Signature(parameters, return_annotation=None)
    made.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return cast(Callable[..., int | None], made)


def _parameters(declared: Mapping[str, Any], hints: Mapping[str, Any]) -> Iterator[Parameter]:
    for name, field in declared.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            yield from _parameters(*_fields(kind))
            continue
        optional = type(None) in get_args(kind)
        if field.metadata.get(READ):
            kind = list[str] if get_origin(kind) is list else str | None if optional else str
        unset = None if optional else False if kind is bool else Parameter.empty
        default = unset if field.default is MISSING else field.default
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, field.metadata[DECLARED]])


def _fields(group: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    hints: dict[str, Any] = {}
    for kind in reversed(group.__mro__):  # get_type_hints would hide the options whose default is None in Python 3.10
        hints |= inspect.get_annotations(kind, eval_str=True)
    return {field.name: field for field in dataclasses.fields(group)}, hints


def _value(name: str, field: Any, kind: Any, given: Mapping[str, Any]) -> Any:
    """The value of a parameter; that of a group out of its fields'."""
    if dataclasses.is_dataclass(kind):
        declared, hints = _fields(kind)
        return cast(type, kind)(**{name: _value(name, each, hints[name], given) for name, each in declared.items()})
    read = field.metadata.get(READ)
    if read is None or given[name] is None:
        return given[name]
    return [read(text) for text in given[name]] if get_origin(kind) is list else read(given[name])


# --- texts of the command line to values; all raise UsageError, which names the option ----------------------------------------------

TYPES = ("float32", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class Shape:
    """An input's sizes, and one of TYPES where it was named; float32 stands for the floating-point type that the model has."""

    sizes: tuple[int, ...]
    dtype: str | None = None


def shapes(given: Iterable[str], names: Sequence[str], option: str) -> dict[str, Shape]:
    """Shapes by input name, from "NAME=1,3,224,224" or "NAME=1,16:int64"; without NAME where there is one input. names: the model's."""
    found = {}
    for text in given:
        name, equals, shape = text.rpartition("=")
        sizes, colon, dtype = shape.partition(":")
        if not equals and len(names) != 1:
            raise UsageError(f"{option} {text}: the model has {len(names)} inputs ({', '.join(names)}); write NAME={text}")
        name = name if equals else names[0]
        if name not in names:
            raise UsageError(f"{option} {text}: the model has no input '{name}'; its inputs are {', '.join(names)}{meant(name, names)}")
        if not re.fullmatch(r"[0-9]{1,9}([,x][0-9]{1,9})*", sizes):
            raise UsageError(f"{option} {text}: not a shape; write it like 1,3,224,224")
        if re.match("0+([,x]|$)", sizes):
            raise UsageError(f"{option} {text}: no samples; the first number is how many go through at once, 1 or more")
        if colon and dtype not in TYPES:
            raise UsageError(f"{option} {text}: {dtype!r} is no type for an input; give one of {', '.join(TYPES)}")
        found[name] = Shape(tuple(int(n) for n in re.split("[,x]", sizes)), dtype or None)
    return found


def size_in_bytes(text: str, option: str) -> int:
    """Bytes of "512M", "2G", "1000": powers of 1024."""
    match = _matched(r"(?i)(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text, option, "not a size; write it like 512M or 2G")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers from "0.485,0.456,0.406"."""
    try:
        return tuple(float(n) for n in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: not numbers; write them like 0.485,0.456,0.406") from None


def height_and_width(text: str, option: str) -> tuple[int, int]:
    """(height, width) from "224" or "224,320"."""
    advice = "not a size; write it like 224, or 224,320 for height and width"
    match = _matched(r"([1-9]\d*)(?:[,x]([1-9]\d*))?", text, option, advice)
    return int(match[1]), int(match[2] or match[1])


def resize(text: str, option: str) -> int | tuple[int, int]:
    """The shorter side from "256", (height, width) from "256,320", and 0 for none."""
    advice = "not a size; write it like 256 for the shorter side, 256,320 for height and width, or 0 for none"
    match = _matched(r"(\d+)|(0*[1-9]\d*)[,x]([1-9]\d*)", text, option, advice)
    return int(match[1]) if match[1] else (int(match[2]), int(match[3]))


def counts(text: str, option: str) -> list[int]:
    """Numbers of samples from "100,250"."""
    _matched(r"[1-9]\d*(,[1-9]\d*)*", text, option, "write a number, 1 or more, or several with commas between, such as 100,250")
    return [int(n) for n in text.split(",")]


def part(text: str, option: str) -> tuple[int, int]:
    """(which, of how many) from "0/4"."""
    advice = "write it like 0/4, the first of four parts, up to 3/4"
    match = _matched(r"(\d+)/([1-9]\d*)", text, option, advice)
    if int(match[1]) >= int(match[2]):
        raise UsageError(f"{option} {text}: {advice}")
    return int(match[1]), int(match[2])


def pairs(given: Iterable[str] | None, option: str) -> dict[str, str]:
    """Names by names, from "A=B" each."""
    found = {}
    for text in given or ():
        name, equals, other = text.partition("=")
        if not (name and equals and other):
            raise UsageError(f"{option} {text}: write it like REFERENCE=CANDIDATE, the names of one {option.rpartition('-')[2]} in both")
        found[name] = other
    return found


def model_file(text: str, option: str) -> Path:
    """The file of a model, fetched where it is named by where it lies."""
    return local(text)


def json_object(text: str, option: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{option} {text}: not a JSON object; write it like '{{\"depth\": 18}}'")
    return found


def _matched(pattern: str, text: str, option: str, advice: str) -> re.Match[str]:
    if (match := re.fullmatch(pattern, text.strip())) is None:
        raise UsageError(f"{option} {text}: {advice}")
    return match


# --- options and arguments of several commands --------------------------------------------------------------------------------------

MODEL = argument("MODEL", "The model: .onnx, .pt2, a checkpoint with --arch; hf://OWNER/REPO/FILE or timm:NAME.", read=model_file)
REFERENCE = argument("REFERENCE", "The model that is right.", read=model_file)
CANDIDATE = argument("CANDIDATE", "The model to compare with it.", read=model_file)
OUT = option("-o --output", "The file to write.", metavar="OUT")
FORMS = (
    "Arrays (.npy, .npz, ...), images (a folder, tar shards), tables (.parquet), "
    "FILE.py:FUNCTION or MODULE:FUNCTION that returns batches, or random."
)
SPEC = option("--data", FORMS, metavar="DATA")
SPEC_OR_RANDOM = option("--data", f"{FORMS} Default: random.", metavar="DATA")
STRICT = option("--strict", "Fail, and write nothing, if a BatchNorm stays.")
MAP_INPUT = rare("--map-input", "Which of the candidate's inputs is which; repeatable.", MODELS, "NAME=NAME")
MAP_OUTPUT = rare("--map-output", "The same of outputs; repeatable.", MODELS, "NAME=NAME")
BASELINE = rare(
    "--baseline", "An earlier --report of the same command: fail where something got worse, by more than noise.", OUTPUT, "REPORT.json"
)
