"""What every report is: a frozen dataclass whose `to_dict` is the JSON of the contract."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bnfold._version import __version__

# How a report is shown, by form. The package fills it in: a rendering knows all reports, and is imported when one is shown.
RENDERINGS: dict[str, Callable[[Report], str]] = {}


@dataclass(frozen=True)
class InputFile:
    """A file that went in, or a live object (path "", sha256 "")."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What every report says. seconds: wall-clock time of the whole verb."""

    schema: ClassVar[str]
    bnfold: str = __version__
    inputs: tuple[InputFile, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        """What the report comes to, as the command line shows it."""
        return RENDERINGS["text"](self)

    def _repr_html_(self) -> str:
        """All of it, for a notebook."""
        return RENDERINGS["html"](self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; a number that JSON can't say (NaN, infinity) becomes null."""
        return dict(_plain(self))


def _plain(x: Any) -> Any:
    if dataclasses.is_dataclass(x):
        nested = {f.name: _plain(getattr(x, f.name)) for f in dataclasses.fields(x) if "hidden" not in f.metadata}
        return {"schema": x.schema} | nested if isinstance(x, Report) else nested
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
