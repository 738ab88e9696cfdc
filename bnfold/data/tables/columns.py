"""Which column of a table goes into which input, and which one holds the labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bnfold.errors import DataError

from ..source import LABELS
from ..spec import InputSpec
from .tars import KEYS

CLASSES = ("label", "labels", "cls", "target", "targets", "class", "y", "fine_label", "coarse_label", "category", *KEYS)
WHOLE = re.compile(r"u?int\d+")
NUMBERS = re.compile(r"(list of )*(u?int\d+|float\d+|bool)")


def of_inputs(columns: Mapping[str, str], inputs: Sequence[InputSpec], spec: str, column: str | None) -> dict[str, str]:
    """The column of each input. DataError where there is none, or where it could be one of several."""
    has = ", ".join(f"{name!r} ({kind})" for name, kind in columns.items() if not name.startswith("__")) or "none"
    usable = [name for name, kind in columns.items() if kind == "image" or NUMBERS.fullmatch(kind)]
    if column is not None:
        if len(inputs) != 1:
            raise DataError(f"--column {column}: that is for a model with one input, and this one has {len(inputs)}; name columns as these")
        if column not in usable:
            raise DataError(f"{spec}: no column {column!r} that holds images or numbers; it has {has}")
        return {inputs[0].name: column}
    found: dict[str, str] = {}
    for one in inputs:
        exact = [name for name in usable if name == one.name] or [name for name in usable if name.rpartition(".")[0] == one.name]
        if exact:
            found[one.name] = exact[0]
    if len(inputs) == 1 and not found:
        images = [name for name in usable if columns[name] == "image"] if len(inputs[0].shape) == 4 else []
        numbers = [name for name in usable if columns[name] != "image" and name not in (*CLASSES, *LABELS) and not name.startswith("__")]
        fitting = images or [name for name in numbers if not WHOLE.fullmatch(columns[name])] or numbers
        if len(fitting) > 1:
            raise DataError(
                f"{spec}: columns {', '.join(map(repr, fitting))} could all be input {inputs[0].name!r}; name one: --column {fitting[0]}"
            )
        found = dict(zip([inputs[0].name], fitting, strict=False))
    if missing := [one.name for one in inputs if one.name not in found]:
        raise DataError(f"{spec}: no column for input {', '.join(map(repr, missing))}; it has {has}; name columns of arrays as the inputs")
    return found


def of_labels(columns: Mapping[str, str], chosen: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """The column of the labels, and notes."""
    names = [name for name in CLASSES if name in columns and name not in chosen.values()]
    whole = [name for name in names if WHOLE.fullmatch(columns[name])]
    if whole:
        return whole[0], [f"the labels are those of column {whole[0]!r}, not of {', '.join(map(repr, whole[1:]))}"] if whole[1:] else []
    if names:
        return None, [f"the labels aren't used: classes are integers, and column {names[0]!r} holds {columns[names[0]]}"]
    return None, []
