"""Options that are written down: in bnfold.toml, or under [tool.bnfold] in pyproject.toml, of the working directory or the next one above.

    batch-size = 32                       # for every command that has the option
    [pipeline]
    eval = "test.npz"                     # for one
    [recipe.imagenet]
    mean = [0.485, 0.456, 0.406]          # with --recipe imagenet

The command line goes before a recipe, a recipe before a command's table, and that before what is for all.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnfold.errors import InputError, UsageError
from bnfold.files import contents
from bnfold.text import listed, meant

LONGEST = 1 << 20  # bytes
RECIPES = "recipe"
# A file that came with somebody's sources can't say what may be run, or be lost. arch-args: a factory may load the file that one names.
NEVER = {"trust-pickle", "force", "recipe", "arch", "arch-args"}
# Nor what needs no check: a verdict is worth what the one who reads it knows to have been asked.
WAIVERS = {"no-verify", "accept-harm", "force-random", "coefficients-only", "allow-cpu-fallback", "baseline"}
# A provider, its device, options that are numbers or switches: another value may be a library, a plugin or a cache of engines.
OPTION = r"(?:\w+=(?:\d[\d.]*|[Tt]rue|[Ff]alse)|(?:device_type|precision)=\w+)"
PROVIDER = re.compile(rf"\w+(?::(?:\d+|{OPTION}(?:,{OPTION})*))?")


def defaults(parser: Callable[[], Any], arguments: Sequence[str], say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """What is written down, by command and parameter, as the parser takes defaults.

    parser: makes that of all commands. say: told where that was.

    InputError for a file that isn't TOML, UsageError for what is no option.
    """
    path, found = nearest(Path.cwd())
    recipe = _asked(arguments)
    if path is None:
        if recipe:
            raise UsageError(f"--recipe {recipe}: there is no bnfold.toml, and no pyproject.toml with [tool.bnfold], here or above")
        return {}
    recipes = found.get(RECIPES, {}) if isinstance(found, Mapping) else None
    if not isinstance(recipes, Mapping):
        raise UsageError(f"{path}: {'bnfold' if recipes is None else RECIPES} is no table; write options below [...], a line each")
    if recipe and recipe not in recipes:
        there = listed(recipes) or "none"
        raise UsageError(f"--recipe {recipe}: {path} has no such recipe; it has {there}{meant(recipe, recipes)}")
    options = {name: dict(_options(command)) for name, command in parser().commands.items()}
    every = {option for each in options.values() for option in each}
    tables = {name: table for name, table in found.items() if isinstance(table, Mapping) and name != RECIPES}
    for name in tables:
        if name not in options:
            raise UsageError(f"{path}: [{name}]: there is no such command{meant(name, options)}")
        _check(path, f"[{name}]: ", tables[name], set(options[name]))
    plain = {name: value for name, value in found.items() if name not in (*tables, RECIPES)}
    for name, each in (("", plain), *((f"[{RECIPES}.{name}]: ", each) for name, each in recipes.items())):
        _check(path, name, each, every)
    say(f"options of {path}" + (f", recipe {recipe}" if recipe else ""))
    made: dict[str, dict[str, Any]] = {}
    for name, known in options.items():
        settings = {**plain, **tables.get(name, {}), **recipes.get(recipe, {})}
        made[name] = {known[key].name: _value(path, key, value, known[key]) for key, value in settings.items() if key in known}
    return made


def nearest(folder: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """The file that counts in a folder, and what it says."""
    for each in (folder, *folder.parents):
        for name in ("bnfold.toml", "pyproject.toml"):
            if not (each / name).is_file():
                continue
            found = _read(each / name)
            if name == "bnfold.toml":
                return each / name, found
            tools = found.get("tool", {})
            if isinstance(tools, Mapping) and "bnfold" in tools:
                return each / name, tools["bnfold"]
    return None, {}


def _read(path: Path) -> Mapping[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    held = contents(path, LONGEST, "the file of options")
    try:
        return tomllib.loads(held.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if path.name == "pyproject.toml" and b"tool.bnfold" not in held:
            return {}  # other tools will say so
        raise InputError(f"{path}: not TOML ({error})") from None


def _asked(arguments: Sequence[str]) -> str:
    """The recipe, which must be known before anything is parsed."""
    for place, argument in enumerate(arguments):
        if argument == "--recipe" and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith("--recipe="):
            return argument.partition("=")[2]
    return ""


def _options(command: Any) -> Iterator[tuple[str, Any]]:
    """The options of a command by their names."""
    for parameter in command.params:
        for name in parameter.opts:
            if name.startswith("--") and name != "--help":
                yield name[2:], parameter


def _check(path: Path, where: str, table: Any, known: set[str]) -> None:
    if not isinstance(table, Mapping):
        raise UsageError(f"{path}: {where}a table of options is expected")
    for name in table:
        if name in NEVER:
            raise UsageError(f"{path}: {where}{name}: that is asked for on the command line, each time")
        if name not in known:
            raise UsageError(f"{path}: {where}there is no option {name!r}{meant(name, known)}")
        if name in WAIVERS:
            raise UsageError(f"{path}: {where}{name} waives a check: give --{name} on the command line, each time")


def _value(path: Path, name: str, value: Any, parameter: Any) -> Any:
    """A value as the parser would get it: texts, but for switches; several for what is repeatable, else with commas between them."""
    if isinstance(value, bool) != bool(parameter.is_flag) or isinstance(value, Mapping):
        kind = "true or false" if parameter.is_flag else "a text, a number or a list"
        raise UsageError(f"{path}: {name} = {value!r}: {kind} is expected")
    if isinstance(value, bool):
        return value
    texts = [str(each) for each in (value if isinstance(value, list) else [value])]
    if any(_may_run(name, text) for text in texts):
        raise UsageError(f"{path}: {name} = {value!r} may name code to run: that is asked for on the command line, each time")
    return texts if parameter.multiple else ",".join(texts)


def _may_run(name: str, text: str) -> bool:
    """Whether the value of an option could be code: a function of a file or a module, or what a provider loads."""
    if name in ("data", "eval"):
        return text.rpartition(":")[2].isidentifier() and ":" in text  # as `data.open` reads it
    return name == "provider" and PROVIDER.fullmatch(text) is None
