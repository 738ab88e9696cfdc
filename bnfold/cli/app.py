"""The application that the commands belong to: its help, and an example for each."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from bnfold._version import __version__
from bnfold.errors import UsageError
from bnfold.text import listed, meant, some

from .options import grouped

# One for each command; they run as they stand in a clone of the repository.
SAMPLE = "samples/digits/digits.onnx"
EXAMPLES = {
    "inspect": f"bnfold inspect {SAMPLE}",
    "recalibrate": f"bnfold recalibrate {SAMPLE} --data samples/digits/calibration.npz -o fresh.onnx",
    "merge-stats": f"bnfold merge-stats {SAMPLE} part-0.npz part-1.npz -o merged.onnx",
    "fuse": f"bnfold fuse {SAMPLE} -o fused.onnx",
    "verify": f"bnfold verify {SAMPLE} fused.onnx",
    "pipeline": f"bnfold pipeline {SAMPLE} --data samples/digits/calibration.npz --eval samples/digits/test.npz -o ready.onnx",
    "bench": f"bnfold bench {SAMPLE} fused.onnx",
    "average": f"bnfold average {SAMPLE} fresh.onnx --data samples/digits/calibration.npz --eval samples/digits/test.npz -o mean.onnx",
    "explain": "bnfold explain MaxPool",
}

PARSER_ERROR: Any = typer.BadParameter.__mro__[1]  # in whichever module Typer keeps it
RANGE = re.compile(r"; x>=[\d.]+|  \[x>=[\d.]+\]")  # that a count is a count
NAMES = 21  # columns of a help page for options; a longer one has a line of its own


class Command(TyperCommand):
    """One whose help is short: a line for most options, in sections without boxes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Without giving up a value in silence, as where two data sets are named."""
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        try:
            values, left, given = self.make_parser(ctx).parse_args(args=[*args])
            self._all_used(values, left, given)
            return super().parse_args(ctx, args)
        except PARSER_ERROR as error:
            said = self._restated(error)
            raise UsageError(f"{said}{' See' if said.endswith('?') else '; see'} '{ctx.command_path} --help'") from None

    def _all_used(self, values: Mapping[str, Any], left: Sequence[str], given: Sequence[Any]) -> None:
        for each in given:
            if isinstance(value := values.get(each.name or ""), str) and value in self._known:
                raise UsageError(f"{_name(each)} takes a value, {each.metavar or 'N'}, and {value} is an option")
        once = [each for each in given if each.param_type_name == "option" and not each.is_flag and not each.multiple]
        if twice := next((each for each in once if once.count(each) > 1), None):
            raise UsageError(f"{_name(twice)} is given twice, and takes one value")
        if left:
            takes = listed(_placeholder(each) for each in self.params if each.param_type_name == "argument")
            out = next((f"; the file to write is -o {each.metavar}" for each in self.params if "-o" in each.opts and each not in given), "")
            raise UsageError(f"too many arguments ({some(left)}): {self.name} takes {takes}{out}")

    @cached_property
    def _known(self) -> dict[str, Any]:
        """The options by each of their names."""
        return {name: each for each in self.params if each.param_type_name == "option" for name in (*each.opts, *each.secondary_opts)}

    def _restated(self, error: Any) -> str:
        """What the parser found wrong."""
        name = getattr(error, "option_name", "")
        if (found := self._known.get(name)) is not None:
            return f"{name} takes no value" if found.is_flag else f"{name} takes a value, {found.metavar or 'N'}"
        if name:
            return f"{name}: no such option{meant(name, self._known)}"
        parameter = getattr(error, "param", None)
        if parameter is not None and not error.message:
            metavar = f" {parameter.metavar}" * (parameter.param_type_name == "option")
            return f"{_name(parameter)}{metavar} is missing"
        return str(error.format_message()).rstrip(".")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *(_placeholder(each) for each in self.params if each.param_type_name == "argument")]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for each in self.get_params(ctx):
            if (record := each.get_help_record(ctx)) is None:
                continue
            is_option = each.param_type_name == "option"
            title = getattr(each, "rich_help_panel", None) or ("Options" if is_option else "Arguments")
            name, text = record if is_option else (_placeholder(each), str(vars(each)["help"]))
            sections.setdefault(title, []).append((name.ljust(NAMES), RANGE.sub("", text)))
        formatter.write("\n")
        for title, records in sections.items():
            formatter.write_heading(title)
            with formatter.indentation():
                formatter.write_dl(records, col_max=NAMES)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Without line breaks, so that the example can be copied."""
        formatter.write(f"\n{self.epilog}\n")


def _name(parameter: Any) -> str:
    return _placeholder(parameter) if parameter.param_type_name == "argument" else str(parameter.opts[0])


def _placeholder(argument: Any) -> str:
    return argument.metavar if argument.required or argument.metavar.startswith("[") else f"[{argument.metavar}]"


app = typer.Typer(
    name="bnfold",
    help="Recalibrate, fold and verify the BatchNorm layers of trained networks.",
    epilog="Exit status: 0 done or equivalent; 1 the check failed; 2 usage; 3 an input can't be read, or is unsafe or invalid; "
    "4 nothing to do, or unsupported; 5 a device or provider is not available; 6 inconclusive; 70 a defect of bnfold; 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


_commands: dict[str, Callable[..., int | None]] = {}  # by their names


def command_line(*, everything: bool = False, only: str = "") -> Any:
    """The parser of the command line. everything: whether its help shows what few need, too. only: the one command that it will have to
    parse, where that is known."""
    part = copy.copy(app)
    part.registered_commands = []
    for name in [only] if only in _commands else _commands:
        function = _commands[name]
        about = " ".join((function.__doc__ or "").partition("\n\n")[0].split())
        part.command(name, cls=Command, short_help=about, epilog=f"Example: {EXAMPLES[name]}")(grouped(function))
    made: Any = typer.main.get_command(part)
    made.commands = {name: made.commands[name] for name in EXAMPLES if name in made.commands}
    _convert_less(made)
    for each in made.commands.values():
        _convert_less(each)
        for parameter in each.params:
            parameter.hidden = parameter.hidden and not everything
        if not everything and any(getattr(parameter, "hidden", False) for parameter in each.params):
            each.epilog += f"\nMore options: bnfold {each.name} --help-all"
    return made


def _convert_less(command: Any) -> None:
    """Let a command take texts, paths and what isn't given as they are: for its conversion Typer imports as much as NumPy."""
    whole = command.get_params  # with the option for its help

    def parameters(context: Any) -> list[Any]:
        found: list[Any] = whole(context)
        declared = signature(command.callback, eval_str=True).parameters
        for parameter in (each for each in found if "process_value" not in vars(each)):
            kind, info = get_args(declared[parameter.name].annotation) if parameter.name in declared else (None, None)
            kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
            parameter.process_value = partial(_value, parameter, parameter.process_value, kinds, info)
        return found

    command.get_params = parameters


def _value(parameter: Any, convert: Callable[..., Any], kinds: tuple[Any, ...], info: Any, context: Any, value: Any) -> Any:
    name = _name(parameter)
    if value == "" or (isinstance(value, (list, tuple)) and "" in value):
        raise UsageError(f"{name}: an empty text; is a variable unset?")
    if value is None and not parameter.required:
        value = () if parameter.multiple or parameter.nargs != 1 else None
        return value if parameter.callback is None else parameter.callback(context, parameter, value)
    if parameter.callback is None and type(value) is str and Path in kinds:
        return Path(value)
    if parameter.callback is None and type(value) in kinds:
        return value
    try:
        return convert(context, value)
    except PARSER_ERROR as error:
        if not {int, float} & {*kinds} or value is None:
            raise
        what = "a whole number" if int in kinds else "a number"
        least, most = info.min, info.max
        bounds = "" if least is None else f", {least:g} or more" if most is None else f" from {least:g} to {most:g}"
        raise UsageError(f"{name} {value}: write {what}{bounds}") from error


def command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """A command of the application; its options are made when it is to be parsed."""
    _commands[function.__name__.replace("_", "-")] = function
    return function


@app.callback(invoke_without_command=True)
def _main(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"bnfold {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
