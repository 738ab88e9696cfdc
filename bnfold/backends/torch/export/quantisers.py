"""The operators that quantise to integer codes, dequantise them, or do both at once.

What they compute in float64 is (code - zero) * scale, with the codes of the numbers as they are stored: these are no matter of precision.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node as Op

from bnfold.algebra.quantised import Blocks

from .walk import arguments, dtype_of, is_item, operator_name, value_of

NAMES = re.compile(r"(?:aten::_?|quantized_decomposed::|torchao::)(fake_quantize|quantize|dequantize)_(?!.*(?:float8|token))")

ROUND = {"round", "floor", "ceil", "trunc", "sign"}
# What may stand between these and a scale: bounds, zero points, a way past the gradient, another layout.
AROUND = {"clamp", "clamp_min", "clamp_max", "hardtanh", "minimum", "maximum", "add", "sub", "to", "_to_copy", "type_as"}
AROUND |= {"detach", "alias", "clone", "contiguous", "view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze"}
LOOKUPS = {"index", "index_select", "take", "embedding"}  # in a vector: what each code stands for


@dataclass(frozen=True, eq=False)
class Quantiser:
    """A call of one. kind: "fake_quantize", "quantize", "dequantize", or "mul" where that scales integers. bounds: of the codes.

    source, scale, zero: nodes, tensors or numbers, as they were given; no zero for 0. axis: of its scales, None where it has one or blocks
    of them. blocks: the sizes of what has a scale of its own, by axis.
    """

    kind: str
    source: Any
    scale: Any
    zero: Any
    bounds: tuple[float, float]
    axis: int | None
    blocks: Blocks

    def grid(self, numbers: Tensor) -> Tensor:
        """Scales or zeros in the rank of what is quantised."""
        if numbers.numel() == 1 or self.axis is not None:
            return numbers.reshape([-1 if i == self.axis and numbers.numel() > 1 else 1 for i in range(len(self.shape))])
        return numbers.reshape([n // size for n, size in zip(self.shape, self.blocks, strict=True)])

    @property
    def shape(self) -> tuple[int, ...]:
        value = value_of(self.source) if isinstance(self.source, Op) else self.source
        return tuple(value.shape)

    def exact(self, returned: Any, value: Callable[[Any], Any]) -> Any:
        """In float64, what the call gives. returned: by the numbers as they are stored; of a call that dequantises, nothing."""
        scale, zero = (self._spread(value(given)) for given in (self.scale, 0.0 if self.zero is None else self.zero))
        if self.kind == "quantize":
            return returned
        if self.kind == "dequantize":
            return (value(self.source).double() - zero) * scale
        first = returned if isinstance(returned, Tensor) else returned[0]
        made = ((first.double() / scale + zero).round() - zero) * scale
        return made if isinstance(returned, Tensor) else (made, *returned[1:])

    def _spread(self, given: Any) -> Tensor:
        grid = self.grid(torch.as_tensor(given).double())
        for axis, size in enumerate(self.blocks):
            if size > 1 and grid.shape[axis] > 1:
                grid = grid.repeat_interleave(size, axis)
        return grid


@cache
def quantises(target: Any) -> re.Match[str] | None:
    """Which of the operators that quantise it is, by its name; None where it is none."""
    return NAMES.match(target._schema.name) if isinstance(target, torch._ops.OpOverload) else None


def described(target: Any, given: Mapping[str, Any]) -> Quantiser | None:
    """What an operator does with its arguments, by their names in its schema; None where it is no quantiser, or one of another kind."""
    found = quantises(target)
    if found is None:
        return None
    source, scale = (next(given[name] for name in names if name in given) for names in (("self", "input"), ("scale", "scales")))
    zero = next((given[name] for name in ("zero_point", "zero_points") if name in given), None)
    low, high = given.get("quant_min"), given.get("quant_max")
    kind = given.get("output_dtype") if found[1] == "quantize" else given.get("input_dtype")
    if (low is None or high is None) and isinstance(kind, torch.dtype) and not kind.is_floating_point:
        low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        return None
    shape = tuple((value_of(source) if isinstance(source, Op) else source).shape)
    axis = int(given["axis"]) % len(shape) if "per_channel" in found.string and "axis" in given else None
    sizes = [*(1,) * (len(shape) - 1), given["group_size"]] if "group_size" in given else given.get("block_size")
    if sizes is None:
        sizes = shape if axis is None else [1 if i == axis else n for i, n in enumerate(shape)]
    blocks = tuple(n if size == -1 else size for size, n in zip(sizes, shape, strict=True))
    return Quantiser(found[1], source, scale, zero, (float(low), float(high)), axis, blocks)


def quantiser(node: Any) -> Quantiser | None:
    """The same of a node of a graph, or of that of whose outputs it is the first."""
    if not isinstance(node, Op) or node.op != "call_function":
        return None
    if is_item(node):
        return quantiser(node.args[0]) if node.args[1] == 0 else None
    return described(node.target, arguments(node)) if quantises(node.target) else None


def scaled_integers(node: Op) -> Quantiser | None:
    """The same of a product of integers, stored or rounded by operators of other kinds, and of a scale of fewer numbers."""
    given = arguments(node) if operator_name(node) == "mul" else {}
    whole = [key for key in given if _is_whole(given[key])]
    if len(whole) != 1 or (shape := tuple(value_of(given[whole[0]]).shape)) != tuple(value_of(node).shape) or len(shape) < 2:
        return None
    scale = given["other" if whole == ["self"] else "self"]
    sizes = tuple(value_of(scale).shape) if isinstance(scale, Op) else ()
    blocks = tuple(n if size == 1 else 1 for n, size in zip(shape, (1,) * (len(shape) - len(sizes)) + sizes, strict=True))
    bounds = (-float("inf"), float("inf"))
    return None if sizes == shape else Quantiser("mul", given[whole[0]], scale, None, bounds, None, blocks)


def _is_whole(node: Any) -> bool:
    kind, name = dtype_of(node), operator_name(node) if isinstance(node, Op) else ""
    if kind is None or name in ROUND or not kind.is_floating_point:
        return kind is not None
    if name == "where":  # one of two numbers
        return all(not isinstance(each, Op) or value_of(each).numel() == 1 for each in list(arguments(node).values())[1:])
    if (name in LOOKUPS and value_of(node.args[0]).ndim > 1) or (name in ("mul", "div") and len(node.all_input_nodes) > 1):
        return False
    return name in AROUND | LOOKUPS | {"mul", "div"} and any(map(_is_whole, node.all_input_nodes))
