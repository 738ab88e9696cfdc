"""Weights that are quantised, as the algebra knows them: rounded when the model runs, or stored as integer codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import Node as Op

from bnfold.algebra.affine import Array, Blocked
from bnfold.algebra.layouts import AS_STORED, Layout
from bnfold.algebra.quantised import FloatSource, Quantised, spread
from bnfold.algebra.rounding import limits, rounded

from ..export.constants import ProgramConstants
from ..export.observers import is_fake_quantiser, is_symmetric
from ..export.quantisers import Quantiser, quantiser, scaled_integers
from ..export.tensors import NUMPY, to_tensor
from ..export.walk import FLOATS, dtype_of, operator_name, value_of
from ..runtime.widen import widened
from ..writing.derived import Derived, derived, rounded_by
from .module_host import ModuleHost
from .places import Host, Place

COPIES = {"to", "_to_copy", "type_as", "view", "reshape", "unsqueeze", "permute", "transpose", "t", "detach", "contiguous", "clone"}
ALIKE = 1e-6  # what a way past the gradient leaves between two codes that are one
KIND = np.dtype(np.float32)  # in which all quantisers have their scales


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantised weight. node: what dequantises, or scales integers. last: how; first: what quantises to its codes, None where these are
    stored, or made by operators of other kinds.

    places: where a module holds its "source" (what is rounded, or the codes), its "scale" and its "zero". layout: from the scale as it is
    stored there to that which is read.
    """

    node: Op
    last: Quantiser
    first: Quantiser | None
    quantised: Quantised
    places: Mapping[str, Place] = field(default_factory=dict)
    layout: Layout = AS_STORED

    def placed(self, constants: ProgramConstants, host: ModuleHost, op: Op) -> Codes:
        """The same in a module, for an operator that reads it. Blocked where one of them isn't stored, but for a zero point of 0."""
        if self.quantised.apart:
            return self._scaled(constants, host, op)
        given = {"source": (self.first or self.last).source, "scale": self.last.scale, "zero": self.last.zero}
        found = {role: host.weight(op, each) for role, each in given.items() if isinstance(each, Op)}
        places = {role: place for role, place in found.items() if isinstance(place, Place)}
        if missing := [role for role in ("source", "scale") if role not in places]:
            what = "what is rounded to its integers" if missing == ["source"] else "its scale"
            raise Blocked(f"is quantised, and {what} is no parameter or buffer of the module")
        if self.first is not None and (self.first.scale, self.first.zero) != (self.last.scale, self.last.zero):
            raise Blocked("is quantised and dequantised by scales that are stored twice")
        owner = host.module(places["scale"].owner)
        one_scale = one_zero = ""
        if owner is None or not is_fake_quantiser(owner):
            one_scale, one_zero = "the module's code rounds by one", "the module's code knows no other zero point"
        elif is_symmetric(owner):
            one_zero = "a symmetric scheme has one zero point"
        return dataclasses.replace(
            self, places=places, quantised=dataclasses.replace(self.quantised, small=False, one_scale=one_scale, one_zero=one_zero)
        )

    def _scaled(self, constants: ProgramConstants, host: ModuleHost, op: Op) -> Codes:
        """The same, of integers of which nothing changes: their scale is all that has to be stored, with what is divided by it first."""
        found = host.derived(op, self.node)
        assert found is not None
        place, how = found
        places, source = {"scale": place}, None
        if (divided := rounded_by(constants, self.node, how)) is not None:
            if not isinstance(its := host.weight(op, divided), Place):
                raise Blocked("is quantised, and what is rounded to its integers is no parameter or buffer of the module")
            places["source"], source = its, self._divided(constants, divided, how)
        kinds = [NUMPY[kind] for kind in (dtype_of(how.root), *how.dtypes) if kind is not None]
        kind = min(kinds, key=lambda kind: float(limits(kind).max))
        laid_out = how.layout is not AS_STORED or place.target in (*host.aliases, *host.aliases.values())
        one_scale = "the module's code has no other form of it" if laid_out else ""
        quantised = dataclasses.replace(self.quantised, kind=kind, one_scale=one_scale, source=source)
        return dataclasses.replace(self, places=places, layout=how.layout, quantised=quantised)

    def _divided(self, constants: ProgramConstants, divided: Op, how: Derived) -> FloatSource:
        """What the module's own code divides by the scale and rounds."""

        def codes(array: npt.NDArray[Any], scale: npt.NDArray[Any], zero: Array) -> Array:
            laid_out = how.layout.stored(scale) if scale.size == value_of(how.root).numel() else scale
            stored = ((op, each.astype(NUMPY[dtype_of(op) or torch.float32])) for op, each in ((divided, array), (how.root, laid_out)))
            numbers = {op: widened(to_tensor(np.ascontiguousarray(each))) for op, each in stored}
            found = constants.with_numbers(numbers).get(self.last.source)
            assert found is not None
            return np.where(np.abs(found - whole) < ALIKE, whole, found)

        whole, read = self.quantised.read(), constants.get(divided)
        assert read is not None
        made = rounded(read, NUMPY[dtype_of(divided) or torch.float32])
        return FloatSource(lambda: made, [codes])

    def same_as(self, other: Codes | None) -> bool:
        """Whether both stand for the same numbers: two calls of a layer, say."""
        if other is None or self.quantised.apart != other.quantised.apart:
            return False
        return not self.quantised.apart or np.array_equal(self.quantised.read(), other.quantised.read())

    def exact(self) -> Quantised:
        """The same, whose new scales aren't rounded."""
        return dataclasses.replace(self.quantised, kind=np.dtype(np.float64))


def codes_of(constants: ProgramConstants, node: Op) -> Codes:
    """How a quantised constant is stored. Blocked, in a clause behind its name, where it may not change."""
    last = quantiser(node) or scaled_integers(node)
    assert last is not None
    shape, apart = tuple(map(int, last.shape)), last.kind == "mul"
    scale, zero = (_grid(constants, last, each) for each in (last.scale, last.zero))
    array = constants.get(node)
    if scale is None or zero is None or array is None:
        raise Blocked("is quantised by scales that aren't constants")
    blocks = last.blocks if scale.size > 1 else shape
    zero = np.broadcast_to(zero, scale.shape)
    first = last if last.kind == "fake_quantize" else quantiser(last.source)
    if first is not None and first is not last and not _agrees(constants, first, last):
        first = None
    read = None if first is None else constants.get(first.source)
    source = None
    if first is not None and read is not None:
        stored = rounded(read, NUMPY[dtype_of(first.source) or torch.float32])
        source = FloatSource(lambda: stored, [partial(_rounding, bounds=last.bounds, times=times) for times in _QUOTIENTS])

    def codes() -> Array:
        assert array is not None
        if apart and (stored := constants.get(last.source)) is not None:
            return stored
        found: Array = np.rint(array / spread(scale, blocks, shape) + spread(zero, blocks, shape))
        return found

    code = _type_of(last) if first is not None else NUMPY[dtype_of(last.source) or torch.int32]
    kind, small = NUMPY[dtype_of(node) or torch.float32] if apart else KIND, len(shape) == 1  # a bias
    how = Quantised(codes, shape, scale, zero, blocks, code, *last.bounds, kind, small=small, source=source, apart=apart)
    return Codes(node, last, first, how)


def _type_of(found: Quantiser) -> np.dtype[Any]:
    """The narrowest type that holds the codes of a quantiser."""
    low, high = found.bounds
    kinds = map(np.dtype, ("int8", "uint8", "int16", "uint16"))
    return next((kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max), np.dtype("int32"))


def knows(constants: ProgramConstants, host: Host, op: Op, argument: Op) -> bool:
    """Whether the scales of a constant that an operator reads may take a map, or have to."""
    found, inside = derived(constants, argument), isinstance(host, ModuleHost)
    if constants.is_quantised(argument):
        return inside or (found is not None and (quantiser(found.root) or scaled_integers(found.root)) is not None)
    if found is None or scaled_integers(found.root) is None or not isinstance(host, ModuleHost):
        return found is not None and scaled_integers(found.root) is not None
    computed = host.computed(op, argument)
    return computed is not None and computed[0].how != "plain"


def read(constants: ProgramConstants, host: Host, op: Op, argument: Op) -> tuple[str, Codes, Layout]:
    """The name of a quantised constant that an operator reads, how it is stored, and how it is laid out there. Blocked as above."""
    found = derived(constants, argument)
    if found is None or (quantiser(found.root) is None and scaled_integers(found.root) is None):
        raise Blocked("its weight is quantised, and computed further behind that")
    codes = codes_of(constants, found.root)
    source = (codes.first or codes.last).source
    roots = sorted(constants.roots(source), key=lambda root: -value_of(root).numel())
    stored = constants.stored(roots[0]) if roots else None
    name = source.name if stored is None else stored.target
    try:
        return name, codes.placed(constants, host, op) if isinstance(host, ModuleHost) else codes, found.layout
    except Blocked as blocked:
        raise Blocked(f"{name} {blocked}") from None


def kinds(argument: Op) -> list[torch.dtype]:
    """The float types that a constant has and had on its way from where it is stored, which only copied and cast it."""
    dtypes = [dtype_of(argument)]
    while operator_name(argument) in COPIES and isinstance(source := argument.args[0], Op):
        dtypes.append(dtype_of(argument := source))
    return [dtype for dtype in dtypes if dtype in FLOATS]


def coarsest(*arguments: Any) -> torch.dtype:
    """The type with the fewest digits of those in which some constants, numbers aside, are or were."""
    found = (kind for each in arguments if isinstance(each, Op) for kind in kinds(each))
    return max(found, key=lambda kind: torch.finfo(kind).eps)


def _grid(constants: ProgramConstants, found: Quantiser, given: Any) -> Array | None:
    """The scales or zeros, in the weight's rank."""
    array = constants.get(given) if isinstance(given, Op) else np.asarray(0.0 if given is None else given)
    return None if array is None else found.grid(torch.as_tensor(array)).double().numpy()


def _agrees(constants: ProgramConstants, one: Quantiser, other: Quantiser) -> bool:
    """Whether the codes that one gives mean to the other what they mean to it."""
    pairs = ([_grid(constants, one, each) for each in pair] for pair in ((one.scale, other.scale), (one.zero, other.zero)))
    same = all(a is not None and b is not None and np.array_equal(a, b) for a, b in pairs)
    return one.kind == "quantize" and one.bounds == other.bounds and one.blocks == other.blocks and same


def _rounding(
    array: npt.NDArray[Any], scale: npt.NDArray[Any], zero: Array, *, bounds: tuple[float, float], times: Callable[[Any, Any], Any]
) -> Array:
    with np.errstate(all="ignore"):
        found: Array = np.clip(np.rint(times(array.astype(np.float32), scale.astype(np.float32))) + zero, *bounds)
    return found


_QUOTIENTS: tuple[Callable[[Any, Any], Any], ...] = (lambda x, scale: x * (np.float32(1) / scale), np.divide)  # PyTorch's, and ONNX's
