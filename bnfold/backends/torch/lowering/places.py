"""Where new coefficients can be written: in an exported program anywhere, in a module by its names.

A module's code stays the user's: a weight is replaced by its qualified name, so all calls that read it get the new one, and an operator
can't grow what its code doesn't read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.fx import Node

from bnfold.algebra.graph import Param


@dataclass(frozen=True)
class Place:
    """A parameter or buffer by its qualified name.

    how: "stored" as it is; or computed in each call by a "parametrization", by the hook of "weight_norm", "spectral_norm" or "pruning",
    which has to go first; or by the forward of a subclass of a "plain" layer, which takes its place.
    """

    target: str
    how: str = "stored"

    @property
    def owner(self) -> str:
        return self.target.rpartition(".")[0]

    @property
    def attribute(self) -> str:
        return self.target.rpartition(".")[2]


def plain_path(name: str) -> str:
    """A tensor's name; of one with slashes, as Keras gives them, without the module's own affairs before it."""
    path, _, last = name.rpartition(".")
    if "/" not in last:
        return name
    return ".".join([*(part for part in path.split(".") if part and not part.startswith("_")), last])


@dataclass(frozen=True)
class Slot:
    """Where an operator's parameter lives. argument: its name in the operator's schema, or "Add" for an operator that has to grow one."""

    argument: str
    place: Place | Node


@dataclass(eq=False)
class TorchNative:
    """A neutral node's operator in the exported graph, and the arguments that are its activations.

    dtype: of what it computes; limit: the largest number of that. output: the node of its first output where that isn't the
    operator itself (an item of a tuple).
    """

    op: Node
    operands: list[Node]
    dtype: torch.dtype
    output: Node | None
    limit: float
    cloneable: bool
    group: list[Node] = field(default_factory=list)  # all operators that it stands for, where these are several
    clone_of: TorchNative | None = None  # the original, where the operator has still to be made
    readers: list[tuple[TorchNative, int]] = field(default_factory=list)  # (who, which activation) reads the clone instead

    @property
    def operators(self) -> list[Node]:
        return self.group or [self.op]

    @property
    def end(self) -> Node:
        """The node of its first output."""
        return self.op if self.output is None else self.output

    def new_dtype(self, params: Iterable[Param]) -> torch.dtype:
        """Of a parameter that it gets: the widest of its own and of what its others have, which autocast or its code may round for it."""
        kinds: list[torch.dtype] = [self.dtype, *(param.tensor.dtype for param in params if param.tensor is not None)]
        return max((kind for kind in kinds if kind.is_floating_point), key=lambda kind: kind.itemsize)


class Host(Protocol):
    """What the lowering asks. copies_weights: each user of a shared weight can get its own. grows: an operator may get an Add behind it."""

    copies_weights: bool
    grows: bool

    def weight(self, op: Node, argument: Node) -> Place | Node | None:
        """What is rewritten where `op` gets another constant for `argument`, the same for all who share it; None where nothing can be."""
        ...

    def inside(self, path: str) -> list[Node]:
        """The operators in the forward of the module at a path, those of its children included; none in a program."""
        ...

    def bias(self, op: Node, weight: Place | Node) -> Place | Node | None:
        """Where a bias goes that the operator hasn't; None where it can't have one."""
        ...


class ProgramHost:
    """An exported program: every argument of every operator can be another."""

    copies_weights = True
    grows = True

    def weight(self, op: Node, argument: Node) -> Place | Node | None:
        return argument

    def inside(self, path: str) -> list[Node]:
        return []

    def bias(self, op: Node, weight: Place | Node) -> Place | Node | None:
        return op
