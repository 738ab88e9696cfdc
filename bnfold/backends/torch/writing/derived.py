"""Weights that the code computes from one stored tensor in steps that can be undone: `weight * scale`, `weight.t()`, `weight.to(x.dtype)`.

Such a weight is rewritten through its steps: the stored tensor becomes the one from which the code computes the new weight. Every step
is read off by running it, as `bnfold.algebra.movement` does: one that moves elements, on their numbers; a product, by its factor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from bnfold.algebra.affine import Array, Blocked
from bnfold.algebra.graph import reachable
from bnfold.algebra.layouts import AS_STORED, Layout

from ..export.constants import ProgramConstants
from ..export.quantisers import quantiser, scaled_integers
from ..export.walk import arguments, dtype_of, is_float, operator_name, value_of
from ..runtime.widen import reads_bits

SAME = {"alias", "clone", "contiguous", "detach", "lift_fresh_copy", "positive", "to", "_to_copy", "type_as"}
MOVES = {
    *("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "view_copy", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis", "permute_copy"),
    *("flip", "roll", "index_select", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
}


@dataclass(frozen=True)
class Derived:
    """root: the stored constant, or what a quantiser or the scale of integers gives. layout: from its array to the computed one, and back.

    dtypes: of what stands on the way.
    """

    root: Node
    layout: Layout
    dtypes: tuple[torch.dtype, ...]


def derived(constants: ProgramConstants, argument: Node) -> Derived | None:
    """How a computed constant comes from one stored tensor; None where the steps can't be undone."""
    if constants.stored(argument) is not None or quantiser(argument) is not None or scaled_integers(argument) is not None:
        return Derived(argument, AS_STORED, ())
    name, dtype = operator_name(argument), dtype_of(argument)
    if dtype is None or not is_float(argument):
        return None
    given = {key: value for key, value in arguments(argument).items() if isinstance(value, Node)} if name else {}
    for key in ("self", "other") if name in ("mul", "div", "neg", *SAME, *MOVES) else ():
        source = given.get(key)
        found = derived(constants, source) if source is not None and is_float(source) and (key, name) != ("other", "div") else None
        if source is None or found is None or (name in ("mul", "div") and len(given) > 1 and not _is_main(constants, found, argument)):
            continue
        others = [other for each, other in given.items() if each != key]
        if name not in SAME and any(_depends(other, found.root) for other in others):
            continue
        step = _step(constants, argument, source, name)
        return None if step is None else Derived(found.root, step.after(found.layout), (*found.dtypes, dtype))
    return None


def scale_of(constants: ProgramConstants, product: Node) -> Derived | None:
    """The stored tensor that integers are multiplied by, and how it gets there; None where it does anything else on the way.

    The code may divide by it first what it rounds to these integers (`rounded_by`).
    """
    how = scaled_integers(product)
    found = derived(constants, how.scale) if how is not None and isinstance(how.scale, Node) else None
    if found is None or constants.stored(found.root) is None:
        return None
    stack = [found.root]
    products: list[Node] = []
    others: list[Node] = []
    while stack:
        node = stack.pop()
        for user in filter(constants.is_constant, node.users):
            if operator_name(user) in SAME | MOVES:
                stack += [user] * (user.args[0] is node)  # else it tells a type alone
            else:
                scales = (other := scaled_integers(user)) is not None and other.scale is node
                (products if scales else others).append(user)
    rounding = [scaled_integers(each) for each in products if rounded_by(constants, each, found) is not None]
    before = reachable([each.source for each in rounding if each is not None], lambda node: node.all_input_nodes)
    return found if all(each in before for each in others) else None


def rounded_by(constants: ProgramConstants, product: Node, scale: Derived) -> Node | None:
    """The stored float array of the product's size that its code divides by its scale and rounds; None where there is no such one."""
    how = scaled_integers(product)
    assert how is not None
    roots = constants.roots(how.source) if isinstance(how.source, Node) else []
    size = value_of(product).numel()
    found = [root for root in roots if root is not scale.root and is_float(root) and value_of(root).numel() == size > 1]
    return found[0] if len(found) == 1 and scale.root in roots else None


def _is_main(constants: ProgramConstants, found: Derived, product: Node) -> bool:
    """Whether a factor is the weight, and the other one its scale or its mask: a parameter of the product's size."""
    stored = constants.stored(found.root)
    return stored is not None and stored.kind == "PARAMETER" and stored.tensor.numel() == value_of(product).numel()


def _depends(node: Any, root: Node) -> bool:
    return isinstance(node, Node) and (node is root or any(_depends(source, root) for source in node.all_input_nodes))


def _step(constants: ProgramConstants, op: Node, source: Node, name: str) -> Layout | None:
    if reads_bits(op):
        return None
    if name in SAME:
        return AS_STORED
    if name in MOVES:
        return _moved(constants, op, source)
    if name == "neg":
        return _scaled(np.asarray(-1.0), tuple(value_of(op).shape))
    other = next(value for key, value in arguments(op).items() if key in ("self", "other") and value is not source)
    factor = constants.get(other) if isinstance(other, Node) else np.asarray(other, np.float64)
    if factor is None or factor.dtype.kind not in "fiub" or arguments(op).get("rounding_mode") is not None:
        return None
    if name == "div" and (factor == 0).any():
        return None
    return _scaled(1 / factor if name == "div" else factor.astype(np.float64), tuple(value_of(op).shape))


def _moved(constants: ProgramConstants, op: Node, source: Node) -> Layout | None:
    """A rearrangement, by the numbers of the elements; None where some are left out or doubled."""
    shape = tuple(value_of(source).shape)
    numbers = torch.arange(int(np.prod(shape))).reshape(shape)
    args, kwargs = pytree.tree_map(
        lambda leaf: numbers if leaf is source else constants.tensor(leaf) if isinstance(leaf, Node) else leaf, (op.args, dict(op.kwargs))
    )
    assert callable(op.target)
    ids: npt.NDArray[np.int64] = op.target(*args, **kwargs).numpy()
    if not np.array_equal(np.sort(ids.ravel()), np.arange(numbers.numel())):
        return None

    def back(w: Array) -> Array:
        _require_size(w, ids.size)
        found = np.empty(ids.size)
        found[ids.ravel()] = w.ravel()
        return found.reshape(shape)

    return Layout(f"moved {shape} {_digest(ids)}", lambda w: w.ravel()[ids], back)


def _scaled(factor: Array, shape: tuple[int, ...]) -> Layout | None:
    """A product with a constant. Where that is zero the weight is zero whatever is stored, and no other number can be had."""
    if not np.isfinite(factor).all() or np.broadcast_shapes(factor.shape, shape) != shape:
        return None

    def back(w: Array) -> Array:
        _require_size(w, int(np.prod(shape)))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where((factor == 0) & (w == 0), 0.0, np.where(factor == 0, np.nan, w / factor))

    gain = float(factor.ravel()[0]) if factor.size == 1 else 0.0
    return Layout(f"times {_digest(factor)}", lambda w: w * factor, back, linear=gain != 0, gain=gain or 1.0)


def _require_size(w: Array, size: int) -> None:
    if w.size != size:
        raise Blocked("the code that computes a weight from it needs it in the shape that it has")


def _digest(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
