"""What a fold may do beyond what costs nothing and changes no operator but those that it folds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Lowering = Literal["mul-add", "depthwise"]
Target = Literal["float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class FoldOptions:
    """The options of a fold, by the names that `bnfold.fuse`, `bnfold.inspect` and `bnfold.pipeline.pipeline` take.

    clone: a convolution that something else reads too may be doubled, so that its BatchNorm can fold; a module's code allows no such thing.
    keep_per_tensor: a BatchNorm stays that would make one scale for each channel of a quantised weight's one for all.
    clamps: BatchNorms also pass a ReLU, ReLU6 or another clip, which becomes a maximum and a minimum with bounds for each channel; in a
    module, where it is a module that is called once. A runtime may have fused a ReLU with the convolution before it, and not a maximum.
    norm_affine: the scale and shift of layer, group, instance and RMS normalisations move into what reads them, where all of that can take
    them; no BatchNorm is needed.
    drop_dead: channels that hold the same number whatever goes in (gamma is 0, mostly) leave the layers that make and read them, where
    all of these can do without; no BatchNorm is needed. In a module that takes layers of PyTorch's own, each called once.
    merge_linear: linear operators in a row become one where that takes fewer multiply-adds, or as many; no BatchNorm is needed.
    equalise: the ranges of weights are then made to match, for integers with one scale a tensor (see `equalise`); no BatchNorm is needed.
    lower: what stays of BatchNorms is written as operators that every target has, in the same arithmetic: "mul-add" a multiplication and an
    addition by constants, "depthwise" a convolution of one tap for each channel (where there are channels behind a batch axis, and one to
    three spatial axes; else as "mul-add").
    flush_subnormals: new weights that are below the smallest normal number of the type in which they are stored (1.2e-38 in float32,
    6.1e-5 in float16) become 0, as targets have it that compute without such numbers; how many is told.
    target: the type to which the model will be converted: what would overflow there, or lose its digits, is told.
    Raises ValueError for another word.
    """

    clone: bool = False
    keep_per_tensor: bool = False
    clamps: bool = False
    norm_affine: bool = False
    drop_dead: bool = False
    merge_linear: bool = False
    equalise: bool = False
    lower: Lowering | None = None
    flush_subnormals: bool = False
    target: Target | None = None

    def __post_init__(self) -> None:
        for name, value, words in (("lower", self.lower, get_args(Lowering)), ("target", self.target, get_args(Target))):
            if value is not None and value not in words:
                raise ValueError(f"{name} is {value!r}; it is one of {', '.join(words)}, or None")


PLAIN = FoldOptions()
