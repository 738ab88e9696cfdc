"""Options in groups: a command takes dataclasses, and Typer sees their fields, one option each."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any


class Interrupted(Exception):
    """Ctrl-C, in a class that the parser lets through."""


def grouped(command: Callable[..., int]) -> Callable[..., int]:
    """The command as Typer wants it: each parameter that is a dataclass replaced by its fields."""
    hints = inspect.get_annotations(command, eval_str=True)  # get_type_hints hides the options whose default is None in Python 3.10
    groups = {name: kind for name, kind in hints.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    parameters: list[Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _fields(groups[parameter.name])
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))

    @functools.wraps(command)
    def flat(**given: Any) -> int:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
        try:
            return command(**given)
        except KeyboardInterrupt:
            raise Interrupted from None

    del flat.__wrapped__  # else its signature would be the one that is seen
    flat.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": int}
    return flat


def _fields(group: type[Any]) -> list[Parameter]:
    hints = inspect.get_annotations(group, eval_str=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]
