"""The options of what a fold may do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from bnfold.errors import UsageError
from bnfold.folding.options import Lowering, Target

from . import rare

FOLDING = "Folding"


def one_of(words: Any, text: str, option: str) -> str:
    """One of the words of a Literal."""
    if text not in get_args(words):
        raise UsageError(f"{option} {text}: write {' or '.join(get_args(words))}")
    return text


@dataclass(frozen=True)
class Folding:
    """See `FoldOptions`, by whose names these go."""

    clone: bool = rare("--clone", "Double an operator whose output is read elsewhere, if that lets a BatchNorm fold.", FOLDING)
    keep_per_tensor: bool = rare(
        "--keep-per-tensor", "Leave a BatchNorm where its fold would make a quantised weight's one scale one for each channel.", FOLDING
    )
    clamps: bool = rare(
        "--clamps", "Let BatchNorms pass a ReLU or another clip, which becomes a maximum with a bound for each channel.", FOLDING
    )
    norm_affine: bool = rare(
        "--norm-affine", "Move scale and shift of layer, group, instance and RMS normalisations into all that reads them too.", FOLDING
    )
    drop_dead: bool = rare(
        "--drop-dead", "Take channels out that are constant (gamma is 0), with their filters in the layers on both sides, exactly.", FOLDING
    )
    merge_linear: bool = rare(
        "--merge-linear", "Let linear layers in a row be one where that takes fewer multiply-adds, or as many, exactly.", FOLDING
    )
    equalise: bool = rare(
        "--equalise", "Then move scales between layers until the ranges of their channels match, for integers with one scale.", FOLDING
    )
    lower: Lowering | None = rare(
        "--lower",
        "Write what stays for targets without BatchNorm, exactly: as Mul and Add, or as a depthwise convolution of one tap.",
        FOLDING,
        "mul-add|depthwise",
        read=partial(one_of, Lowering),
    )
    flush_subnormals: bool = rare("--flush-subnormals", "Write new weights that are subnormal in their type as 0.", FOLDING)
    target: Target | None = rare(
        "--target",
        "Tell what of the new weights would overflow, or lose its digits, in the type to come.",
        FOLDING,
        "TYPE",
        read=partial(one_of, Target),
    )

    @property
    def options(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
