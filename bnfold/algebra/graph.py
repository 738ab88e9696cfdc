"""The neutral view of a network: what the rules may see of an ONNX or a PyTorch graph, and no more.

A front-end lowers its own graph to this view, the planner decides on it, and the front-end writes the decided
updates back. Nothing here holds a weight: a `Param` reads it when asked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .affine import Affine, Array
from .layouts import AS_STORED, Layout, Places, taken
from .quantised import Quantised

T = TypeVar("T", bound=Hashable)


def reachable(start: Iterable[T], way: Callable[[T], Iterable[T]]) -> dict[T, None]:
    """All that a way leads to from some nodes of whatever graph, and these themselves; depth first."""
    found: dict[T, None] = {}
    stack = list(start)
    while stack:
        each = stack.pop()
        if each not in found:
            found[each] = None
            stack.extend(way(each))
    return found


@dataclass(eq=False)
class Value:
    """A tensor that flows. `probes` are its shapes at the probe sizes of the model's dynamic axes.

    Where the model is static there is one probe. A dimension is known if all probes agree on it, so a rule that
    holds at every probe doesn't lean on a size that the user may change. `fixed`: a constant that no node gives.
    `is_sized`: whether somebody reads its sizes, those of the data apart.
    """

    name: str
    probes: tuple[tuple[int | None, ...], ...] | None = None
    rank: int | None = None
    producer: Node | None = None
    users: list[tuple[Node, int]] = field(default_factory=list)  # (node, which of its inputs)
    is_output: bool = False
    is_sized: bool = False
    fixed: bool = False

    @property
    def sizes(self) -> tuple[int | None, ...] | None:
        """The size of each axis, None where it is dynamic; None altogether where not even the rank is known."""
        if self.probes is None:
            return None if self.rank is None else (None,) * self.rank
        return tuple(ns[0] if len(set(ns)) == 1 else None for ns in zip(*self.probes, strict=True))


@dataclass(eq=False)
class Tensor:
    """A stored constant that one or several operators read: a weight, a bias, a table.

    name: the stored name. read: the array in float64, in the stored layout.
    limit: the largest finite number of the stored type. cast_from: the same of the narrowest type that it was cast from, if it was: that
    one tells how it was rounded. integers: whether the model computes it from integers, which it no longer will where it is rewritten.
    raw: the array in the type in which it is stored, without a copy where that can be.
    """

    name: str
    read: Callable[[], Array]
    shape: tuple[int, ...]
    limit: float
    native: Any = None
    dtype: Any = None  # the stored type, the front-end's affair
    users: list[tuple[Node, str]] = field(default_factory=list)  # (node, parameter role)
    quantised: Quantised | None = None
    integers: bool = False
    cast_from: float | None = None
    raw: Callable[[], npt.NDArray[Any]] | None = None
    extents: dict[Any, Any] = field(default_factory=dict)  # by layout and axes, once somebody asked (see `blocks.measured`)


@dataclass(eq=False)
class Param:
    """One operator's view of a tensor, in the canonical layout of that operator, with the update that it awaits.

    A weight isn't replaced but mapped: `update` is an affine map over the canonical array, so a plan for a large model
    takes no memory, and a weight that absorbs several maps is rounded once. shape: the canonical shape. tensor: None for a
    parameter that the operator could have but hasn't (a bias): it then reads as `default`. slot: where the operator has it, the
    front-end's affair; refusal: why it can't have it, if so. remade: whether it is of another array than the stored one. flush: whether
    what is subnormal in its type is stored as 0.
    """

    tensor: Tensor | None
    shape: tuple[int, ...]
    layout: Layout = AS_STORED
    default: float = 0.0
    update: Affine | None = None
    slot: Any = None
    refusal: str = ""
    remade: bool = False
    flush: bool = False

    def read(self) -> Array:
        """The canonical array with its update, in float64."""
        return self.original() if self.update is None else self.update(self.original())

    def original(self) -> Array:
        """The same before anything was folded in."""
        return np.full(self.shape, self.default) if self.tensor is None else self.layout.canonical(self.tensor.read())

    def source(self) -> npt.NDArray[Any] | None:
        """The same in the type in which it is stored; None where it can't be had so, or would be rounded."""
        if self.tensor is None or self.tensor.raw is None or not self.layout.linear or self.layout.gain != 1:
            return None
        return self.layout.canonical(self.tensor.raw())

    def seen_as(self, shape: tuple[int, ...], layout: Layout) -> Param:
        """The same tensor in another canonical shape, from the one that it has here."""
        return Param(self.tensor, shape, layout.after(self.layout), slot=self.slot)

    def narrow(self, kept: Mapping[int, Places]) -> None:
        """Lose channels. kept: the places that are left, by axis of the canonical array."""
        rank = len(self.shape)
        self.update = None if self.update is None else self.update.map(lambda c: taken(c, kept, rank))
        if any(self.shape[axis] > 1 for axis in kept):
            self.layout = self.layout.fewer(self.shape, kept)
            self.shape = tuple(len(kept[i]) if i in kept and n > 1 else n for i, n in enumerate(self.shape))
            self.remade = self.tensor is not None

    def updated(self, by: Affine) -> Affine:
        return by if self.update is None else by.after(self.update)

    def factors(self, total: Affine) -> Array | None:
        """What a map multiplies the elements of the stored array by; None where that is not all that it does."""
        if self.tensor is None or total.shift.any() or not self.layout.linear:
            return None
        found = self.layout.stored(self.layout.canonical(np.ones(self.tensor.shape)) * total.scale)
        return found if found.shape == self.tensor.shape else None


@dataclass(frozen=True, eq=False)
class Norm:
    """A BatchNorm as its file states it: vectors of its channels in float64."""

    gamma: Array
    beta: Array
    mean: Array
    var: Array
    epsilon: float

    @property
    def unmeasured(self) -> str:
        """What its statistics look like, where no data can have given them, in a clause; "" where some can."""
        if self.var.size and not self.var.any():
            what = "its mean and its variance are" if not self.mean.any() else "its variance is"
            times = f"; it multiplies by 1/sqrt(epsilon), {self.epsilon**-0.5:.3g}" if self.epsilon > 0 else ""
            return f"{what} 0 in every channel, as where statistics were lost{times}"
        if self.var.size and not self.mean.any() and (self.var == 1).all():
            return "its mean is 0 and its variance 1 in every channel, as in a layer that never saw data"
        return ""


@dataclass(frozen=True)
class Window:
    """How a convolution slides, an entry per spatial axis. before, after: zeros padded on either side."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(eq=False)
class Node:
    """An operator. inputs: the values that flow in; params: its constants by role; attrs: what its rule asks for."""

    op: str
    name: str
    inputs: list[Value]
    outputs: list[Value]
    attrs: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Param] = field(default_factory=dict)
    native: Any = None
    index: int = -1  # its place in the topological order
    label: str = ""  # the operator's own name in its framework, for reasons ("AveragePool")

    def __post_init__(self) -> None:
        self.label = self.label or self.op
        for value in self.outputs:
            value.producer = self
        for i, value in enumerate(self.inputs):
            value.users.append((self, i))
        for role, param in self.params.items():
            if param.tensor is not None:
                param.tensor.users.append((self, role))

    @property
    def output(self) -> Value:
        return self.outputs[0]

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The axes of its canonical weight that tell outputs apart."""
        if self.op == "Contraction":
            return tuple(i for i, letter in enumerate(self.attrs["w"]) if letter in self.attrs["y"])
        return (0,)


@dataclass(eq=False)
class Site:
    """What folds together or not at all: every call of one BatchNorm layer (or one constant affine operator)."""

    name: str
    nodes: list[Node]
    channels: int
    is_batchnorm: bool = True
    separable: bool = True  # the calls could also fold one by one (ONNX), or stand and fall together (a module)
    refusal: str | None = None  # why it may not even be tried: training mode, NaN, negative variance
    note: str = ""  # what a user should know of it
    holds_shift: bool = False  # whether it can stay, and add its shift alone, where what it folds into has no place for that


Elementwise = Callable[[list[Array]], Array]  # of the activations that it reads, in float64


@dataclass(eq=False)
class Graph:
    """A network: its operators in topological order, and the sites to fold."""

    nodes: list[Node]
    sites: list[Site]
    clones: list[Node] = field(default_factory=list)  # operators doubled for sites that folded, in the order of their making
    copies_weights: bool = True  # whether the front-end can give a user of a shared weight its own copy
    one_scale: str = ""  # why a quantised weight that has one scale must keep it, "" where it needn't
    elementwise: Callable[[Node], Elementwise | None] = lambda node: None  # what an operator does to each element by itself, if it does
    rigid: Callable[[Node], str] = lambda node: "its sizes are fixed"  # why an operator can't take or give fewer channels, "" where it can

    def __post_init__(self) -> None:
        self.number()

    def number(self) -> None:
        """Number the nodes by their place."""
        for index, node in enumerate(self.nodes):
            node.index = index

    def bypass(self, node: Node) -> None:
        """Let the users of the node's output read its input instead, and take the node out."""
        source, output = node.inputs[0], node.output
        source.users = [(user, i) for user, i in source.users if user is not node]
        for user, i in output.users:
            user.inputs[i] = source
            source.users.append((user, i))
        source.is_output |= output.is_output
        source.is_sized |= output.is_sized
        self.take_out(node)

    def take_out(self, node: Node) -> None:
        """Take a node out of the order, which is that of the numbers."""
        del self.nodes[bisect_left(self.nodes, node.index, key=lambda each: each.index)]

    def depth(self) -> int:
        """How many operators with parameters stand behind each other, at most."""
        behind: dict[Value, int] = {}
        for node in self.nodes:
            count = max((behind.get(value, 0) for value in node.inputs), default=0) + bool(node.params)
            behind.update(dict.fromkeys(node.outputs, count))
        return max(behind.values(), default=0)

    def live(self) -> set[Node]:
        """The operators that reach an output of the model, and those of which nobody knows what else they do."""
        found: set[Node] = set()
        for node in reversed(self.nodes):
            if node.op == "Barrier" or any(v.is_output or any(user in found for user, _ in v.users) for v in node.outputs):
                found.add(node)
        return found

    def updates(self) -> Iterator[tuple[Node, str, Param]]:
        """Every parameter that awaits an update; a clamp's bounds are none: another operator takes its place (see `folding.clamps`)."""
        for node in (node for node in self.nodes if node.op != "Clamp"):
            for role, param in node.params.items():
                if param.update is not None or param.remade:
                    yield node, role, param

    @staticmethod
    def end(value: Value, left: set[Node]) -> Value:
        """Where a value comes from once the nodes on the way to it are gone. left: those that aren't."""
        while value.producer is not None and value.producer not in left and value.producer.inputs:
            value = value.producer.inputs[0]
        return value
