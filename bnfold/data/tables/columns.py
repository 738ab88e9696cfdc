"""Which column goes into which input, and which one holds the labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bnfold.errors import DataError

from ..source import LABELS
from ..spec import InputSpec
from .tars import KEYS

CLASSES = ("label", "labels", "cls", "target", "targets", "class", "y", "fine_label", "coarse_label", "category", *KEYS)


def of_inputs(features: Mapping[str, Any], inputs: Sequence[InputSpec], spec: str, column: str | None) -> dict[str, str]:
    """The column of each input. DataError where there is none, or where it could be one of several."""
    has = ", ".join(f"{name!r} ({_type(feature)})" for name, feature in features.items() if not name.startswith("__")) or "none"
    usable = {name: feature for name, feature in features.items() if is_image(feature) or _is_numbers(feature)}
    found: dict[str, str] = {}
    if column is not None:
        if len(inputs) != 1:
            raise DataError(f"--column {column}: that is for a model with one input, and this one has {len(inputs)}; name columns as these")
        if column not in usable:
            raise DataError(f"{spec}: no column {column!r} that holds images or numbers; it has {has}")
        return {inputs[0].name: column}
    for one in inputs:
        exact = [name for name in usable if name == one.name] or [name for name in usable if name.rpartition(".")[0] == one.name]
        if exact:
            found[one.name] = exact[0]
    if len(inputs) == 1 and not found:
        images = [name for name in usable if is_image(usable[name])] if len(inputs[0].shape) == 4 else []
        numbers = [name for name in usable if _is_numbers(usable[name]) and name not in (*CLASSES, *LABELS) and not name.startswith("__")]
        fitting = images or [name for name in numbers if not _is_integer(usable[name])] or numbers
        if len(fitting) > 1:
            raise DataError(
                f"{spec}: columns {', '.join(map(repr, fitting))} could all be input {inputs[0].name!r}; name one: --column {fitting[0]}"
            )
        if fitting:
            found[inputs[0].name] = fitting[0]
    if missing := [one.name for one in inputs if one.name not in found]:
        raise DataError(f"{spec}: no column for input {', '.join(map(repr, missing))}; it has {has}; name columns of arrays as the inputs")
    return found


def of_labels(features: Mapping[str, Any], chosen: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """The column of the labels, and notes."""
    names = [name for name in CLASSES if name in features and name not in chosen.values()]
    whole = [name for name in names if _is_integer(features[name])]
    if whole:
        return whole[0], [f"the labels are those of column {whole[0]!r}, not of {', '.join(map(repr, whole[1:]))}"] if whole[1:] else []
    if names:
        return None, [f"the labels aren't used: classes are integers, and column {names[0]!r} holds {_type(features[names[0]])}"]
    return None, []


def is_image(feature: Any) -> bool:
    """Images as `datasets` marks them, or bytes as others write them."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _is_numbers(feature: Any) -> bool:
    while hasattr(feature, "feature"):  # a list
        feature = feature.feature
    if isinstance(feature, list) and len(feature) == 1:
        return _is_numbers(feature[0])
    return bool(re.fullmatch(r"u?int\d+|float\d+|bool", str(getattr(feature, "dtype", ""))))


def _is_integer(feature: Any) -> bool:
    return (
        not hasattr(feature, "feature")
        and not hasattr(feature, "shape")
        and bool(re.fullmatch(r"u?int\d+", str(getattr(feature, "dtype", ""))))
    )


def _type(feature: Any) -> str:
    if is_image(feature):
        return "image"
    if hasattr(feature, "feature"):
        return f"list of {_type(feature.feature)}"
    return str(getattr(feature, "dtype", type(feature).__name__))
