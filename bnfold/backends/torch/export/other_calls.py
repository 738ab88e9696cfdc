"""Other calls of a module than the one that was traced: a few at other sizes, of which its code may make another path.

Besides the sizes by the trace's symbols (see `OtherSizes`), for axes that torch.export fixed although it was asked to leave them open, and
for other numbers of axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .call import Call
from .other_sizes import SAMPLES, OtherSizes
from .trace import Traced

MOST_CALLS = 24  # that are tried
MOST_NUMBERS = 4.0  # that they feed, in all, as a multiple of two samples of the example
FEW_NUMBERS = 1 << 16  # which cost little in any case

Shapes = Mapping[str, tuple[int, ...]]
Fixed = Mapping[tuple[str, int], int]  # the size of an input's axis


@dataclass(frozen=True, eq=False)
class OtherCall:
    """A call at other sizes. text: which; ranks: whether it has other numbers of axes, of which broadcasting may make more again; twin:
    another that runs likewise if the code means it, not where sizes are equal by chance."""

    call: Call
    text: str
    ranks: bool = False
    twin: Call | None = None


def other_calls(traced: Traced, *, small: bool = False) -> tuple[OtherCall, list[OtherCall]]:
    """A call of a module like the traced one, and a few at other sizes. small: see `OtherSizes`."""
    calls = _Calls(traced, small=small)
    return calls.traced(), calls.others() if traced.specs else []


def users_shapes(traced: Traced, call: Call) -> Shapes | None:
    """The shapes of the user's own call, of which the traced one may have been made by doubling it."""
    names = [op.name for op in traced.input_nodes]
    fits = len(names) == len(call.tensors)
    return dict(zip(names, (tuple(tensor.shape) for tensor in call.tensors), strict=True)) if fits else None


def shapes_text(traced: Traced, shapes: Shapes | None = None) -> str:
    """Shapes in words: those with which a module was called when it was traced, or others."""
    if shapes is None:
        leaves = pytree.tree_leaves(traced.program.example_inputs)
        pairs = zip(traced.flat_names, leaves, strict=True)
        shapes = {name: tuple(leaf.shape) for name, leaf in pairs if isinstance(leaf, Tensor)}
    texts = [f"{name} of shape ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})" for name, shape in shapes.items()]
    return ", ".join(texts)


class _Calls:
    def __init__(self, traced: Traced, *, small: bool) -> None:
        self._traced, self._small, self._sizes = traced, small, OtherSizes(traced, small=small)
        given = dict(zip(traced.flat_names, pytree.tree_leaves(traced.program.example_inputs), strict=True))
        self._tensors: dict[str, Tensor] = {op.name: given[op.name].detach() for op in traced.input_nodes}

    def traced(self) -> OtherCall:
        """The traced one, with a few samples."""
        return self._made(self._shapes({}) or {name: tuple(tensor.shape) for name, tensor in self._tensors.items()})

    def others(self) -> list[OtherCall]:
        found: list[OtherCall] = []
        usual = self._shapes({})
        seen = [usual]
        for call in () if self._small else self._traced.calls[:1]:
            if (shapes := users_shapes(self._traced, call)) is not None and shapes not in seen:
                seen.append(shapes)
                found.append(OtherCall(call, shapes_text(self._traced, shapes)))
        room = max(MOST_NUMBERS * _numbers(self._shapes(self._sizes.example) or {}), FEW_NUMBERS)
        for shapes, twin in self._all_shapes():
            if len(found) >= MOST_CALLS:
                break
            if shapes is not None and shapes not in seen and _numbers(shapes) <= room:
                seen.append(shapes)
                room -= _numbers(shapes)
                found.append(self._made(shapes, twin))
        return found

    def _made(self, shapes: Shapes, twin: Shapes | None = None) -> OtherCall:
        ranks = any(len(shape) != self._tensors[name].ndim for name, shape in shapes.items())
        return OtherCall(self._call(shapes), shapes_text(self._traced, shapes), ranks, None if twin is None else self._call(twin))

    def _call(self, shapes: Shapes) -> Call:
        return self._traced.call({name: _resized(self._tensors[name], shape) for name, shape in shapes.items()})

    def _all_shapes(self) -> Iterator[tuple[Shapes | None, Shapes | None]]:
        """The most telling first, each with a twin where it has one."""
        one = dict.fromkeys(self._sizes.batch, 1)
        yield self._shapes(one), None
        for values in self._sizes.guarded():
            yield self._shapes(values), None
        for k, values in enumerate(self._sizes.usual()):
            yield self._shapes({**values, **dict.fromkeys(self._sizes.batch, (1, 3, SAMPLES)[k % 3])}), None
        fixed, apart = self._fixed()
        for sizes in fixed:
            yield self._shapes(one, sizes), None
        yield from self._ranks()
        for values in self._sizes.beyond():
            yield self._shapes(values), None
        for sizes in apart:
            yield self._shapes(one, sizes), None

    def _fixed(self) -> tuple[list[Fixed], list[Fixed]]:
        """Other sizes for axes that were asked to be open and that came back with one size, those of equal size together and apart; and
        for one of several that came back with sizes that hang together. Then more for those apart, which may be equal by chance."""
        groups: dict[Any, list[tuple[str, int]]] = {}
        tied: dict[Any, list[tuple[str, int]]] = {}
        for name, sizes in self._sizes.shape.items():
            for axis, n in enumerate(sizes):
                if isinstance(n, int):
                    groups.setdefault((axis == 0, n), []).append((name, axis))
                for symbol in () if isinstance(n, int) else n.free_symbols:
                    tied.setdefault(symbol, []).append((name, axis))
        changes = (lambda n: n + 1, lambda n: n // 2, lambda n: 1, lambda n: 2 * n, lambda n: n - 1)
        together: list[Fixed] = [dict.fromkeys(places, change(n)) for change in changes for (_, n), places in groups.items()]
        several = {n: places for n, places in groups.items() if len(places) > 1}
        apart: list[Fixed] = [{place: change(n)} for change in changes for (_, n), places in several.items() for place in places]
        plus_one = sum(map(len, several.values()))
        hanging: list[Fixed] = [
            {(name, axis): self._tensors[name].shape[axis] + 1} for places in tied.values() if len(places) > 1 for name, axis in places
        ]
        return together + apart[:plus_one] + hanging, apart[plus_one:]

    def _ranks(self) -> Iterator[tuple[Shapes | None, Shapes | None]]:
        """Without the first axis, without the last, and with one more before the first, each at two sizes, since an axis may take another's
        place by chance."""
        model, batch, rest = self._traced.model, self._sizes.batch, self._sizes.rest
        assert isinstance(model, nn.Module)
        taken = {t.numel() for t in itertools.chain(model.parameters(), model.buffers()) if t.ndim == 1}
        if not batch or any(not t.ndim for t in self._tensors.values()):
            return
        others = [self._shapes({**dict.fromkeys(batch, 1), **{s: self._sizes.hints[s] + k for s in rest}}) for k in range(2)]
        if None not in others and (rest or all(t.ndim <= 2 for t in self._tensors.values())):
            dropped = [{name: shape[1:] for name, shape in shapes.items()} for shapes in others if shapes is not None]
            yield dropped[0], dropped[1] if rest else None
            if any(t.ndim > 2 for t in self._tensors.values()):
                one, other = (
                    {name: shape[: max(len(shape) - 1, 2)] for name, shape in shapes.items()} for shapes in others if shapes is not None
                )
                yield one, other
        free = [n for n in (3, 5, 7, 11, 13) if n not in taken][:2]
        added = [self._shapes(dict.fromkeys(batch, n)) for n in free]
        if len(free) == 2 and None not in added:
            one, other = ({name: (1, *shape) for name, shape in shapes.items()} for shapes in added if shapes is not None)
            yield one, other

    def _shapes(self, values: Mapping[Any, int], fixed: Fixed | None = None) -> Shapes | None:
        """Every input's shape for the sizes of some symbols and of some axes; None where there is none."""
        known = {**self._sizes.hints, **values}
        found = {}
        for name, sizes in self._sizes.shape.items():
            shape = [(fixed or {}).get((name, axis), n if isinstance(n, int) else n.subs(known)) for axis, n in enumerate(sizes)]
            try:
                found[name] = tuple(int(n) for n in shape)
            except TypeError:
                return None
            if any(n < 1 and old > 0 for n, old in zip(found[name], self._tensors[name].shape, strict=True)):
                return None
        return found


def _numbers(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _resized(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor's own numbers, fewer of them or again, so that indices stay what they were; floats vary a little.

    An example of nothing but equal floats, as people make them up, becomes random.
    """
    while tensor.ndim < len(shape):
        tensor = tensor[None]
    while tensor.ndim > len(shape):
        tensor = tensor[0]
    for axis, n in enumerate(shape):
        if not tensor.shape[axis]:  # there is nothing to take again
            return tensor.new_zeros(shape)
        tensor = tensor.index_select(axis, torch.arange(n, device=tensor.device) % tensor.shape[axis])
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor.clone()
    generator = torch.Generator().manual_seed(tensor.numel())
    if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
        return torch.randn(shape, generator=generator).to(tensor)
    return tensor * (0.75 + 0.5 * torch.rand(shape, generator=generator)).to(tensor)
