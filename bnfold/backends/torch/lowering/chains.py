"""A BatchNorm written out as arithmetic with constants: frozen statistics, a scale and a shift."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Node as Op

from bnfold.algebra import weights
from bnfold.algebra.graph import Norm

from ..export.walk import arguments, elements, frame, is_batchnorm, is_float, is_tensor, mutates, operator_name, value_of, written
from .arithmetic import close, composed, mapped, step
from .lowering import TorchLowering
from .places import plain_path

ROLES = ("gamma", "beta", "mean", "var")


@dataclass(frozen=True, eq=False)
class StoredNorm:
    """A BatchNorm by the tensors that its model holds, as far as it has them: gamma, beta, mean and var."""

    tensors: Mapping[str, Op]
    epsilon: float

    @property
    def shift_holder(self) -> Op | None:
        """The tensor that can hold any shift: beta, or else the mean."""
        return self.tensors.get("beta", self.tensors.get("mean"))


@dataclass(frozen=True, eq=False)
class Chain:
    """The operators of a BatchNorm that is written out, in order. norm: what its tensors are, where the arithmetic shows that.

    axis: of the channels.
    """

    ops: list[Op]
    norm: StoredNorm | None = None
    name: str = ""
    axis: int = 1

    @property
    def owner(self) -> str:
        """The module in whose forward it stands."""
        return frame(self.ops[0])


def frozen(ctx: TorchLowering) -> None:
    """Lower each BatchNorm whose forward is plain arithmetic (FrozenBatchNorm2d) as one map."""
    for chain in frozen_chains(ctx):
        _lower_chain(ctx, chain)


def frozen_chains(ctx: TorchLowering) -> list[Chain]:
    """Each such call: with a scale made of the root of a variance, or arithmetic with both running statistics of its module."""
    runs: list[list[Op]] = []
    for op in ctx.program.graph.nodes:
        if op.op != "call_function" or ctx.constants.is_constant(op) or step(ctx, op) is None:
            continue
        if mutates(op) and any(len(target.users) > 1 for target in written(op)):
            continue
        last = runs[-1] if runs else None
        if last and last[-1] is _source(ctx, op) and frame(last[-1]) == frame(op) and len(last[-1].users) == 1:
            last.append(op)
        else:
            runs.append([op])
    by_root = [_chains(ctx, run) for run in runs]
    rooted = {chain.owner for chains in by_root for chain in chains} | {frame(op) for op in ctx.program.graph.nodes if is_batchnorm(op)}
    others = ([Chain(run)] * (frame(run[0]) not in rooted and _statistics(ctx, run) is not None) for run in runs)
    return _named(ctx, [chain for chains, other in zip(by_root, others, strict=True) for chain in chains or other])


def _statistics(ctx: TorchLowering, run: list[Op]) -> tuple[Op, Op] | None:
    """The running mean and variance of the module in whose forward a run of arithmetic stands, where it is made with both."""
    constants = [source for op in run for source in op.all_input_nodes if ctx.constants.is_constant(source)]
    read = {ctx.target(root): root for each in constants for root in ctx.constants.roots(each)}
    mean, var = (read.get(f"{frame(run[0])}.{name}".lstrip(".")) for name in ("running_mean", "running_var"))
    return None if mean is None or var is None else (mean, var)


def normalises(ctx: TorchLowering, chain: Chain) -> bool:
    """Whether a BatchNorm that is made with its module's statistics maps their mean to one value, and divides by the variance's root."""
    if (statistics := _statistics(ctx, chain.ops)) is None:
        return False
    drawn = (
        [torch.full(value_of(each).shape, number).double() for each, number in zip(statistics, numbers, strict=True)]
        for numbers in ((0.0, 1e6), (1.0, 4e6))
    )
    one, other = (mapped(ctx, chain.ops, dict(zip(statistics, each, strict=True))) for each in drawn)
    if one is None or other is None:
        return False
    return np.allclose(one[0], 2 * other[0], rtol=1e-3) and np.allclose(one[1], other[0] + other[1], rtol=1e-3)


def _named(ctx: TorchLowering, chains: list[Chain]) -> list[Chain]:
    """The chains with names: what their tensors' begin with, or their modules'; their last operator's where that is several's."""
    layers: dict[str, set[tuple[str, ...]]] = {}  # by name, the tensors of those that would have it
    named: list[tuple[Chain, str]] = []
    for chain in chains:
        stored = [] if chain.norm is None else list(map(ctx.constants.stored, chain.norm.tensors.values()))
        targets = sorted(plain_path(each.target) for each in stored if each is not None and each.kind != "CONSTANT_TENSOR")
        alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*targets, strict=False))
        common = re.sub(r"[^._/]*$", "", "".join(letters[0] for letters in alike))
        name = re.sub(r"(?:(?<=[._/])|^)(?:running|moving)_$", "", common).rstrip("._/") or chain.owner
        layers.setdefault(name, set()).add(tuple(targets))
        named.append((chain, name))
    own = [name if name and len(layers[name]) == 1 else f"{chain.owner}.{chain.ops[-1].name}".lstrip(".") for chain, name in named]
    axes = [_axis(ctx, chain) for chain in chains]
    return [dataclasses.replace(chain, name=name, axis=axis) for chain, name, axis in zip(chains, own, axes, strict=True)]


def _axis(ctx: TorchLowering, chain: Chain) -> int:
    """The axis along which the constants of a BatchNorm vary; of one channel, that of the size 1."""
    sizes = [value_of(op).shape for op in chain.ops]
    shapes = [value_of(source).shape for op in chain.ops for source in op.all_input_nodes if ctx.constants.is_constant(source)]
    places = [len(sizes[0]) - len(shape) + axis for shape in shapes for axis, n in enumerate(shape) if n != 1]
    return places[0] if places else next((axis for axis, n in enumerate(sizes[0]) if axis and n == 1), 1)


def _chains(ctx: TorchLowering, run: list[Op]) -> list[Chain]:
    """The BatchNorms in a run of arithmetic with constants: what scales by a root, with one shift before it and one behind."""
    found: list[Chain] = []
    start = 0
    for scales, group in itertools.groupby(range(len(run)), lambda i: operator_name(run[i]) not in ("add", "sub")):
        places = list(group) if scales else []
        tensors = [i for i in places if len(run[i].all_input_nodes) > 1]
        if not any(_root(ctx, run[i]) is not None for i in places):
            continue
        first, end = tensors[0], tensors[-1] + 1  # a number before or behind it is no part of it
        before = first - (first == places[0] and first > start and len(run[first - 1].all_input_nodes) > 1)
        behind = end + (end == places[-1] + 1 and end < len(run) and len(run[end].all_input_nodes) > 1)
        parts = [run[i:j] for i, j in dict.fromkeys(((before, behind), (first, behind), (before, end), (first, end)))]
        norms = ((part, norm) for part in parts if (norm := _norm(ctx, part)) is not None)
        chain = Chain(*next(norms, (parts[0], None)))
        if chain.norm is None and (_power(ctx, chain.ops) == 1 or not (_is_all(ctx, run) or _power(ctx, chain.ops) == -1)):
            continue
        found.append(chain)
        start = run.index(chain.ops[-1]) + 1
    return found


def _is_all(ctx: TorchLowering, run: list[Op]) -> bool:
    """Whether a module's forward holds nothing else, so that the module is a BatchNorm; in a program there are no modules."""
    others = set(ctx.host.inside(frame(run[0]))) - set(run)
    return all(ctx.constants.is_constant(op) or not is_tensor(op) for op in others)


def _root(ctx: TorchLowering, op: Op) -> tuple[Op, float] | None:
    """A vector and the number that was added to it, where the constant of an operator is made of the root of that: variance, epsilon."""
    stack = [source for source in op.all_input_nodes if ctx.constants.is_constant(source)]
    while stack:
        maker = stack.pop()
        if operator_name(maker) in ("rsqrt", "sqrt", "pow"):
            under = maker.all_input_nodes[0] if maker.all_input_nodes else maker
            if operator_name(under) == "add" and len(under.all_input_nodes) == 1 and elements(under) != 1:
                numbers = [each for each in arguments(under).values() if isinstance(each, (int, float))]
                return under.all_input_nodes[0], float(numbers[0])
        stack += [source for source in maker.all_input_nodes if source.op == "call_function"]
    return None


def _power(ctx: TorchLowering, ops: list[Op]) -> int:
    """-1 where operators divide by the root of a stored vector, 1 where they undo that, 0 where they do neither, or divide by a length."""
    for op in ops:
        if (found := _root(ctx, op)) is None:
            continue
        vector, epsilon = found
        roots = ctx.constants.roots(vector)
        if len(roots) != 1 or elements(roots[0]) != elements(vector) or not is_float(roots[0]):
            continue
        drawn = (torch.full(value_of(roots[0]).shape, number, dtype=torch.float64) for number in (1.0, 4.0))
        one, other = (mapped(ctx, ops, {roots[0]: each}) for each in drawn)
        if one is not None and other is not None:
            low, high = np.sqrt((1 + epsilon, 4 + epsilon))
            return next((k for k in (-1, 1) if close(one[0] / low**k, other[0] / high**k)), 0)
    return 0


def _norm(ctx: TorchLowering, ops: list[Op]) -> StoredNorm | None:
    """What the stored tensors are in the map gamma*(x - mean)/sqrt(var + epsilon) + beta, if that is what the operators compute.

    Found by computing with other numbers in their places: random ones, and each doubled.
    """
    constants = [source for op in ops for source in op.all_input_nodes if ctx.constants.is_constant(source)]
    tensors = list(dict.fromkeys(root for each in constants for root in ctx.constants.roots(each)))
    under = [root for op in ops if (root := _root(ctx, op)) is not None]
    variances = {tensor: epsilon for vector, epsilon in under for tensor in ctx.constants.roots(vector)}
    if len(variances) != 1 or len(tensors) > len(ROLES) or not all(map(is_float, tensors)):
        return None
    ((variance, epsilon),) = variances.items()
    generator = torch.Generator().manual_seed(0)
    drawn = {each: torch.rand(value_of(each).shape, generator=generator, dtype=torch.float64) + 0.5 for each in tensors}
    found = {"var": variance}
    whole = mapped(ctx, ops, drawn)
    flat = {each: array.flatten().numpy() for each, array in drawn.items()}
    for each in tensors:
        other = mapped(ctx, ops, drawn | {each: 2 * drawn[each]}) if each is not variance else None
        if whole is None or other is None:
            continue
        (scale, shift), (theirs, moved) = whole, other
        roles = {
            "gamma": close(theirs, 2 * scale),
            "beta": close(theirs, scale) and close(moved - shift, flat[each]),
            "mean": close(theirs, scale) and close(shift - moved, scale * flat[each]),
        }
        found |= {role: each for role, holds in roles.items() if holds}
    if whole is None or len(found) != len(tensors):
        return None
    gamma, beta, mean = (
        flat[found[role]] if role in found else default for role, default in (("gamma", 1.0), ("beta", 0.0), ("mean", 0.0))
    )
    gain = gamma / np.sqrt(flat[variance] + epsilon)
    return StoredNorm(found, epsilon) if close(whole[0], gain) and close(whole[1], beta - mean * gain) else None


def _source(ctx: TorchLowering, op: Op) -> Op:
    return next(source for source in op.all_input_nodes if not ctx.constants.is_constant(source))


def _lower_chain(ctx: TorchLowering, chain: Chain) -> None:
    ops, norm = chain.ops, chain.norm
    x, whole = _source(ctx, ops[0]), composed(ctx, ops)
    assert whole is not None
    whole = whole.settled()
    if len(whole.varying) > 1 or ctx.value(x).sizes != ctx.value(ops[-1]).sizes:
        return
    ctx.done.update(ops)
    attrs: dict[str, Any] = {"gain": whole.scale, "shift": whole.shift}
    channels = max(whole.shape) if whole.varying else 1
    refusal = None
    if norm is not None:
        arrays = {role: ctx.constants.get(each) for role, each in norm.tensors.items()}
        channels = max(array.size for array in arrays.values() if array is not None)
        parameters = [arrays.get(role) for role in ROLES]
        refusal = weights.unusable([None if c is None else np.ravel(c) for c in parameters], norm.epsilon)
        filled = (default if c is None else c for c, default in zip(parameters, (1.0, 0.0, 0.0, 1.0), strict=True))
        gamma, beta, mean, var = (np.broadcast_to(np.ravel(c), channels) for c in filled)
        attrs |= {"norm": Norm(gamma, beta, mean, var, norm.epsilon), "dead": int((gamma == 0).sum()), "stored": norm}
    if refusal is None and not (np.isfinite(whole.scale).all() and np.isfinite(whole.shift).all()):
        refusal = "its scale or its shift is not finite"
    made = ctx.emit("Affine", ops[-1], [x], attrs)
    made.native.group = ops
    key: Any = ops[-1]
    statistics = (f"{chain.owner}.running_mean", f"{chain.owner}.running_var")
    if norm is not None:  # who reads the same tensors is one layer
        key = tuple(ctx.target(each) for each in norm.tensors.values())
    elif _is_all(ctx, ops) if not ctx.copies_weights else _holds(ctx, statistics):
        key = statistics
    ctx.site(key, made, channels, is_batchnorm=True, name=chain.name, refusal=refusal)


def _holds(ctx: TorchLowering, names: Collection[str]) -> bool:
    """Whether the model holds one of some tensors."""
    return any(stored.target in names for stored in map(ctx.constants.stored, ctx.program.graph.nodes) if stored is not None)
