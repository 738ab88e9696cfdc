"""Which integers the inputs of an exported program take (see `bnfold.backends.ranges`): where they go, and what is done with them there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node as Op

from bnfold.backends.ranges import LONGEST, AffineRange, RangeWalk
from bnfold.data.spec import Range

from .tensors import axis_of
from .walk import arguments, dtype_of, is_item, is_tensor, operator_name, stored_targets, tensor_named, value_of

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Operators whose first tensor's numbers come out as they went in.
THROUGH = {"to", "_to_copy", "view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select", "clone"}
THROUGH |= {"contiguous", "alias", "detach", "flatten", "repeat", "unflatten", "split", "chunk", "unbind", "cat", "stack", "where", "tile"}
THROUGH |= {"_unsafe_view", "split_with_sizes", "flip", "roll", "constant_pad_nd", "pad", "index_select", "gather", "index", "type_as"}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}


def integer_range(program: ExportedProgram, node: Op) -> Range | None:
    """Of one input; None where nothing is known, or it holds no integers."""
    return _Walk(program).follow(node) if dtype_of(node) in INTEGERS else None


class _Walk(RangeWalk[Op]):
    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self._program, self._stored = program, stored_targets(program)

    def steps(self, value: Op, as_: AffineRange) -> Iterator[tuple[Op, AffineRange]]:
        for user in value.users:
            if is_item(user):
                yield user, as_
            elif operator_name(user):
                yield from ((user, became) for became in self._step(user, value, as_))

    def _step(self, op: Op, source: Op, as_: AffineRange) -> list[AffineRange]:
        """What the numbers become behind an operator; what it asks of them is noted."""
        name, given = operator_name(op), arguments(op)
        if name in ("embedding", "embedding_bag") and given.get("indices") is source:
            self.index(as_, _size(given["weight"], 0), negative=False)
        elif name == "embedding_bag" and given.get("offsets") is source:
            self.between(as_, 0, 0)
        elif name in ("index_select", "gather", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill") and (
            given.get("index") is source
        ):
            self.index(as_, _size(given["self"], int(given["dim"])), negative=False)
        elif name in ("index", "index_put", "_index_put_impl", "_unsafe_index") and source in given["indices"]:
            for place, each in enumerate(given["indices"]):
                if each is source:
                    self.index(as_, _size(given["self"], place), negative=name != "_unsafe_index")
        elif name == "take" and given["index"] is source:
            self.index(as_, value_of(given["self"]).numel(), negative=False)
        elif name == "one_hot":
            self.index(as_, given["num_classes"] if isinstance(given["num_classes"], int) else None, negative=False)
        elif name == "_pack_padded_sequence" and given["lengths"] is source:
            axis = 1 if given["batch_first"] else 0
            self.length(as_, _size(given["input"], axis))
        elif name in ("item", "_local_scalar_dense"):
            self.between(as_, 1, LONGEST)
        elif name in COMPARISONS:
            self._compared(op, source, as_)
        elif name in ("remainder", "fmod", "clamp"):
            bounds = [given[key] for key in ("other", "min", "max") if isinstance(given.get(key), (int, float))]
            self.compared(as_, np.array([0, *bounds]) - (name != "clamp"))
        else:
            return self._through(op, name, source, as_)
        return []

    def _compared(self, op: Op, source: Op, as_: AffineRange) -> None:
        one, other = arguments(op)["self"], arguments(op)["other"]
        if (constant := self._constant(other if one is source else one)) is not None:
            self.compared(as_, constant)

    def _through(self, op: Op, name: str, source: Op, as_: AffineRange) -> list[AffineRange]:
        if name in ("add", "sub", "mul", "rsub", "neg"):
            return self._arithmetic(op, name, source, as_)
        if name not in THROUGH or not is_tensor(source) or dtype_of(op) is torch.bool:
            return []
        given = arguments(op)
        first = [given.get("self"), given.get("other") if name == "where" else None, *(given.get("tensors") or ())]
        return [as_] if any(each is source for each in first) else []

    def _arithmetic(self, op: Op, name: str, source: Op, as_: AffineRange) -> list[AffineRange]:
        given = arguments(op)
        if name == "neg":
            return self.arithmetic("mul", as_, -1, first=True)
        if float(given.get("alpha", 1) or 1) != 1:
            return []
        first = given["self"] is source
        other = self._constant(given["other"] if first else given["self"])
        return self.arithmetic(name.removeprefix("r"), as_, other, first=first == (name != "rsub"))

    def _constant(self, argument: Any) -> Any:
        """A number, or what the program holds."""
        if isinstance(argument, (int, float)):
            return argument
        if isinstance(argument, Op) and argument.name in self._stored:
            tensor = tensor_named(self._program, self._stored[argument.name])
            return tensor.detach().cpu().numpy() if isinstance(tensor, Tensor) and not tensor.is_floating_point() else None
        if isinstance(argument, Op) and operator_name(argument) == "arange":
            size = _size(argument, 0)
            return np.arange(size) if isinstance(size, int) else None
        return None


def _size(tensor: Any, axis: int) -> int | str | None:
    """The size of an axis, or its symbol."""
    value = value_of(tensor)
    if not isinstance(value, Tensor) or not -value.ndim <= axis < value.ndim:
        return None
    return axis_of(value.shape[axis])
