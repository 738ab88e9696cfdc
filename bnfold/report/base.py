"""What every report is: a frozen dataclass whose `to_dict` is the JSON of the contract."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bnfold._version import __version__


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
