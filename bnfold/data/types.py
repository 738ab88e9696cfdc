"""Whether values can go into a model's input, and in what type."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnfold.errors import DataError

if TYPE_CHECKING:
    from . import InputSpec

Array = npt.NDArray[Any]


def is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))  # ml_dtypes' types are of kind V


def check_type(dtype: np.dtype[Any], spec: InputSpec, where: str) -> None:
    """DataError unless the type converts without loss of meaning: float to float, integer to integer, text to text."""
    if dtype == spec.dtype or (is_float(dtype) and is_float(spec.dtype)) or (dtype.kind in "OUS" and spec.dtype.kind in "OUS"):
        return
    if dtype.kind in "iu" and spec.dtype.kind in "iu":
        return  # if the values fit, which `convert` checks
    advice = f"convert them with .astype({spec.dtype.name!r}) if that is right"
    if dtype.kind in "iub" and is_float(spec.dtype):
        advice = f"scale and normalise them as in training, say x.astype({spec.dtype.name!r}) / 255 for pixels"
    elif spec.dtype.kind in "iu" and is_float(dtype):
        advice = f"give the integers (pixels, tokens) before any scaling, as {spec.dtype}"
    elif np.can_cast(dtype, spec.dtype, "safe") and dtype.kind != "b":
        return
    raise DataError(f"{where}: input {spec.name!r} takes {spec.dtype}, the data are {dtype}; {advice}")


def convert(array: Array, spec: InputSpec, where: str, start: int) -> Array:
    """The array in the input's type; DataError for NaN, infinity and values that the type can't hold."""
    finite = spec.dtype.kind == "V" or spec.dtype.kind in "fc"
    with np.errstate(over="ignore", invalid="ignore"):
        made = np.ascontiguousarray(array, dtype=spec.dtype).reshape(array.shape)
    for values, what in (
        (array, "holds NaN or infinity; clean the data"),
        (made, f"holds values beyond the range of {spec.dtype}, which the model takes; scale the data"),
    ):
        if finite and not (good := np.isfinite(values)).all():
            at = np.argwhere(~good)
            raise DataError(f"{where}: input {spec.name!r}{f', sample {start + at[0][0]},' if array.ndim else ''} {what}")
        if array.dtype == made.dtype:
            break
    if array.dtype.kind in "iu" and array.dtype != made.dtype and not np.array_equal(array, made):
        raise DataError(f"{where}: input {spec.name!r} takes {spec.dtype}, and the data hold {array.dtype} values beyond its range")
    return made


def shape_text(shape: Iterable[object]) -> str:
    return "(" + ", ".join("?" if d is None else str(d) for d in shape) + ")"
