"""Lowering, as every front-end does it: a table says for each operator which function emits its neutral nodes.

Such a function reads its operator's arguments, and raises `Blocked` where no map may cross: the operator then becomes a barrier. What
the operators of both front-ends have in common is in `geometry` and `weights`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy.typing as npt

from .affine import Blocked
from .graph import Elementwise, Graph, Node, Param, Site, Tensor, Value
from .layouts import Layout
from .settings import Settings

Op = Any  # an operator of a framework's graph
Ref = Any  # a value there: what an operator reads or gives
Key = Any  # by which an operator knows an argument: its number in ONNX, its name in PyTorch
Sizes = tuple["int | None", ...]
NO_RULE = "no rule lets a map cross it"


class Lowering(ABC):
    """The state of one lowering. operators: the function of each, by name; settings: what the first level of `verify` compares.

    copies_weights: whether each user of a shared weight can get its own. constants: the front-end's, which know what is one and its value.
    """

    copies_weights = True
    constants: Any

    def __init__(self, operators: Mapping[str, Callable[[Any, Op], object]], settings: Callable[..., Settings]) -> None:
        self._operators, self._settings = operators, settings
        self.nodes: list[Node] = []
        self.sites: dict[Any, Site] = {}
        self._values: dict[Ref, Value] = {}
        self._tensors: dict[Any, Tensor] = {}

    # --- what a front-end knows of its graph -----------------------------------------------------------------------------------

    @abstractmethod
    def arg(self, op: Op, key: Key) -> Ref:
        """An argument; None where it is absent."""

    @abstractmethod
    def keys(self, op: Op, refs: Iterable[Ref]) -> list[Key]:
        """By which the operator knows the values that it reads."""

    @abstractmethod
    def outputs(self, op: Op) -> dict[int, Ref]:
        """What an operator gives, by its place: all that somebody may read."""

    @abstractmethod
    def ends(self, op: Op) -> tuple[list[Ref], list[Value]]:
        """The activations that an operator reads and all that it gives, where it is a barrier."""

    @abstractmethod
    def new_value(self, ref: Ref) -> Value: ...

    @abstractmethod
    def shape(self, ref: Ref) -> tuple[int, ...]:
        """That of a constant."""

    @abstractmethod
    def dtype(self, ref: Ref) -> Any: ...

    @abstractmethod
    def name(self, op: Op) -> str: ...

    @abstractmethod
    def label(self, op: Op) -> str: ...

    @abstractmethod
    def native(self, op: Op, inputs: list[Ref], keys: list[Key], output: Ref | None) -> Any:
        """What the writers find of an operator at its node, with the largest number of its type, and whether it can be doubled."""

    @abstractmethod
    def param(self, op: Op, key: Key, shape: tuple[int, ...] | None = None, layout: Layout | None = None, *, role: str = "weight") -> Param:
        """A constant argument as a parameter in its canonical shape. Raises `Blocked` where it can't be rewritten."""

    @abstractmethod
    def bias(self, op: Op, key: Key, weight: Param, shape: tuple[int, ...], stored: tuple[int, ...] | None = None) -> Param:
        """The bias at an argument, or one that the operator could have (`Param.refusal` where it can't). stored: the shape of a new one."""

    @abstractmethod
    def slot_behind(self, op: Op) -> Any:
        """Where an Add behind the operator is noted; None where none can grow."""

    @abstractmethod
    def elementwise(self, node: Node) -> Elementwise | None:
        """See `Graph`. Of an operator that reads nothing but activations and numbers."""

    @abstractmethod
    def rigid(self, node: Node) -> str:
        """See `Graph`."""

    def layer_of(self, op: Op, node: Node, param: Param) -> tuple[Any, str]:
        """What makes calls of an affine operator with a constant operand one layer, and its name."""
        return node, node.name

    def title(self, op: Op, ref: Ref) -> str:
        """What a constant operand is called."""
        return self.name(op)

    # --- what the operators' functions use -------------------------------------------------------------------------------------

    def is_constant(self, ref: Ref) -> bool:
        return bool(self.constants.is_constant(ref))

    def const(self, ref: Ref) -> npt.NDArray[Any] | None:
        """A constant, floats in float64; None where there is none, or it isn't constant."""
        found: npt.NDArray[Any] | None = self.constants.get(ref)
        return found

    def value(self, ref: Ref) -> Value:
        if ref is None:
            raise Blocked("an input that it needs is left out")
        if ref not in self._values:
            self._values[ref] = self.new_value(ref)
        return self._values[ref]

    def rank(self, ref: Ref, what: str = "its input") -> int:
        """Raises `Blocked` where it isn't known."""
        rank = self.value(ref).rank
        if rank is None:
            raise Blocked(f"the rank of {what} isn't known")
        return rank

    def coefficient(self, op: Op, key: Key, shape: tuple[int, ...], layout: Layout | None = None) -> Param | None:
        """The constant operand of an affine operator; None where it stays as it is."""
        try:
            return self.param(op, key, shape, layout, role="constant")
        except Blocked:
            return None

    def around(self, x: Ref, y: Ref) -> list[tuple[Sizes, Sizes]]:
        """The sizes of two values at each probe. Raises `Blocked` where they aren't known."""
        before, after = self.value(x).probes, self.value(y).probes
        if before is None or after is None:
            raise Blocked("the shapes around it aren't known")
        return list(zip(before, after, strict=True))

    def set_rank(self, ref: Ref, rank: int) -> None:
        """Tell a rank that the front-end's own inference didn't find."""
        if self.value(ref).rank is None:
            self.value(ref).rank = rank

    def set_size(self, ref: Ref, axis: int, size: int) -> None:
        """The same of a size."""
        value = self.value(ref)
        if value.probes is not None:
            value.probes = tuple(
                (*sizes[:axis], size if sizes[axis] is None else sizes[axis], *sizes[axis + 1 :]) for sizes in value.probes
            )

    def output(self, op: Op) -> Ref:
        """The first output."""
        found = self.outputs(op).get(0)
        if found is None:
            raise Blocked("its output isn't used")
        return found

    def emit(
        self,
        kind: str,
        op: Op,
        inputs: Iterable[Ref],
        attrs: Mapping[str, Any] | None = None,
        params: dict[str, Param] | None = None,
        *,
        output: Ref | None = None,
        more: Iterable[Ref] = (),
    ) -> Node:
        """Add a neutral node. output: the operator's first unless stated. more: outputs that carry no map."""
        inputs, output = list(inputs), self.output(op) if output is None else output
        keys = self.keys(op, inputs)
        native = self.native(op, inputs, keys, output)
        attrs = {"limit": native.limit, "cloneable": native.cloneable, **(attrs or {})}
        sources = [self.operand(op, ref, key) for ref, key in zip(inputs, keys, strict=True)]
        return self.add(kind, op, sources, [self.value(output), *map(self.value, more)], attrs, params or {}, native)

    def add(
        self, kind: str, op: Op, inputs: list[Value], outputs: list[Value], attrs: dict[str, Any], params: dict[str, Param], native: Any
    ) -> Node:
        """Add a neutral node of these values."""
        slots = [param.slot for role, param in params.items() if role != "fill"]
        attrs = {"settings": partial(self._settings, self, op, native, slots), **attrs}
        self.nodes.append(Node(kind, self.name(op), inputs, outputs, attrs, params, native, label=self.label(op)))
        return self.nodes[-1]

    def operand(self, op: Op, ref: Ref, key: Key) -> Value:
        """An activation; a constant operand becomes a node of its own, which can absorb a map."""
        if not self.is_constant(ref):
            return self.value(ref)
        shape = self.shape(ref)
        value = Value(getattr(ref, "name", None) or "", (shape,), len(shape), fixed=True)
        param = self.coefficient(op, key, shape)
        if param is not None and param.tensor is not None:
            native, attrs = self.native(op, [], [], ref), {"limit": param.tensor.limit}
            self.nodes.append(Node("Constant", self.title(op, ref), [], [value], attrs, {"value": param}, native))
            value.fixed = False
        return value

    def barrier(self, op: Op, why: str) -> None:
        """A node that no map crosses."""
        inputs, outputs = self.ends(op)
        if outputs:
            native = self.native(op, inputs, self.keys(op, inputs), None)
            self.add("Barrier", op, [self.value(ref) for ref in inputs], outputs, {"why": why}, {}, native)

    def site(
        self, key: Any, node: Node, channels: int, *, is_batchnorm: bool, name: str = "", refusal: str | None = None, note: str = ""
    ) -> None:
        """Register an affine node as something to fold; nodes with the same key are calls of one layer."""
        found = self.sites.get(key)
        if found is not None and (found.refusal == refusal or not self.copies_weights):
            found.nodes.append(node)
            found.refusal = found.refusal or refusal
            return
        key = key if found is None else node
        self.sites[key] = Site(name or node.name, [node], channels, is_batchnorm, self.copies_weights, refusal, note)

    # --- the walk ----------------------------------------------------------------------------------------------------------------

    def lower(self, op: Op, name: str, why: str = "") -> None:
        """Lower one operator, by its name in the table. why: no map may cross it in any case."""
        try:
            function = self._operators.get(name)
            if why or function is None:
                raise Blocked(why or NO_RULE)
            function(self, op)
        except Blocked as blocked:
            self.barrier(op, str(blocked))

    def finished(self) -> Graph:
        nodes = [node for node in self.nodes if node.op != "Constant" or node.outputs[0].users]
        graph = Graph(nodes, list(self.sites.values()), copies_weights=self.copies_weights)
        graph.elementwise, graph.rigid = self.elementwise, self.rigid
        return graph
