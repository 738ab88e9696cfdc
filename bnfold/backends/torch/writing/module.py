"""Write a plan into a copy of the user's module: new tensors by their qualified names, and modules in the place of BatchNorms."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Graph, Node, Param, Site
from bnfold.algebra.rounding import lost, rounded, too_small
from bnfold.folding.branches import Merge
from bnfold.folding.feasible import said_of_integers
from bnfold.folding.lower import Written
from bnfold.folding.plan import Planned
from bnfold.text import Notes

from ..export.copies import duplicate
from ..export.observers import is_fake_quantiser, is_on
from ..export.tensors import NUMPY, laid_out, to_tensor
from ..export.walk import arguments, frame, value_of, writes_into_shared
from ..lowering.lowering import TorchLowering
from ..lowering.module_host import ModuleHost
from ..lowering.narrowing import narrowed_layers
from ..lowering.places import Place, Slot, TorchNative
from .operators import CONSTANTS
from .removal import Removal, fills, unit_variance
from .surgery import FIRST, Surgery, owner_of, restructure


@dataclass(frozen=True, eq=False)
class Fold:
    """What is folded on one path through a module: its planned graph, and how the BatchNorms that fold are taken out.

    written: the modules in whose place there are operators from now on, with what these are.
    """

    ctx: TorchLowering
    graph: Graph
    removed: Mapping[Site, Removal]
    planned: Planned
    written: Mapping[str, Written]

    def updates(self) -> Iterator[Update]:
        written = {each.node for each in self.written.values()}
        for node, role, param in (each for each in self.graph.updates() if each[0] not in written):
            slot: Slot | None = param.slot
            if slot is None or not isinstance(slot.place, Place):
                raise RuntimeError(f"there is no way to write the {role} of {node.label} {node.name}")
            if param.tensor in self.ctx.codes:
                yield from requantised(self.ctx, node, param)
                continue
            exact = param.layout.stored(as_called(param.read(), role, [m for m in self.planned.merges if m.host is node]))
            dtype = node.native.new_dtype(node.params.values()) if param.tensor is None else param.tensor.dtype
            yield Update(node, slot.place, exact, dtype, param.tensor is None, param.flush, said=said_of_integers(node, param))

    def left(self, site: Site) -> Array:
        """The shift that a site's calls still add, by channel: 0 where they do nothing."""
        (node, *_), channels = site.nodes, site.channels
        shift = coefficients(node).shift if node in self.graph.nodes else np.zeros(())
        return np.broadcast_to(shift.ravel(), channels)

    def made_identity(self, removal: Removal) -> dict[str, str]:
        """The parameters of calls that stay, each with its role."""
        tensors = {} if removal.norm is None else removal.norm.tensors
        return {self.ctx.target(each): role for role, each in tensors.items()}


@dataclass(frozen=True, eq=False)
class Update:
    """A tensor that changes. exact: in float64; dtype: of the stored one; grows: whether there was none.

    quantiser: the fake quantiser that it belongs to, if so; axis: along which there is a scale for each channel from now on. said: of it.
    """

    node: Node
    place: Place
    exact: Array
    dtype: torch.dtype
    grows: bool = False
    flush: bool = False
    quantiser: str | None = None
    axis: int | None = None
    said: str = ""


def write_module(module: nn.Module, folds: Sequence[Fold], *, exact: bool = False) -> tuple[nn.Module, dict[Node, str], int]:
    """A folded copy of the module, a note for each node whose weights lost precision, and the bytes that untied weights add.

    folds: what is folded on each path through the module that is known; where two of them change the same, they change it alike. exact:
    all of it in float64 and on the CPU. Raises RuntimeError on an update that nothing here can write: it must never be lost.
    """
    result = duplicate(module)
    if exact:
        result = result.cpu().double()
    surgery = Surgery()
    notes = Notes()
    made: dict[str, Tensor] = {}

    def stored(node: Node, array: Array, dtype: torch.dtype, flush: bool) -> np.ndarray:
        """The array in its type, where it isn't to be exact; that some of it is too small for the type is noted."""
        found = array if exact and dtype.is_floating_point else rounded(array, NUMPY[dtype], flush=flush)
        if dtype.is_floating_point and (count := lost(array, found)):
            notes.add(node, too_small(count, array.size, node.name, found.dtype, flush=flush))
        return found

    for ctx, update in ((each.ctx, update) for each in folds for update in each.updates()):
        node, place = update.node, update.place
        array = stored(node, update.exact, update.dtype, update.flush)
        notes.add(node, update.said)
        if place.how == "plain":
            surgery.plain += [place.owner] * (place.owner not in surgery.plain)
            native: TorchNative = node.native
            computed = ctx.const(arguments(native.op)["weight"])
            assert computed is not None
            made.setdefault(f"{place.owner}.weight", to_tensor(computed.copy() if exact else rounded(computed, NUMPY[native.dtype])))
        elif place.how != "stored" and not update.grows:
            surgery.fixed[place.target] = place.how
        if update.quantiser is not None:
            surgery.quantisers[update.quantiser] = update.axis
        elif update.axis is not None:
            surgery.resized[place.target] = list(array.shape)
        if update.grows:
            surgery.biases[place.owner] = list(array.shape)
        made[place.target] = to_tensor(np.ascontiguousarray(array))
    hosts = [fold.ctx.host for fold in folds if isinstance(fold.ctx.host, ModuleHost)]
    made = _divided(hosts[0], surgery, made)
    for site, removal in (each for fold in folds for each in fold.removed.items()):
        if removal.path is not None:
            surgery.replaced[removal.path] = list(removal.kept)
            copies = any(writes_into_shared(node.native.end, node.native.operands[0]) for node in site.nodes)
            if copies and removal.path not in surgery.copied:
                surgery.copied.append(removal.path)
    for path, written in (each for fold in folds for each in fold.written.items()):
        inner = f"{path}.{FIRST}" if surgery.replaced.setdefault(path, []) else path
        surgery.operators[path] = {role: list(array.shape) for role, array in written.constants.items()}
        dtype = written.node.attrs.get("mixed") or written.node.native.dtype
        for role, array in written.constants.items():
            made[f"{inner}.{CONSTANTS[role]}"] = to_tensor(np.ascontiguousarray(stored(written.node, array, dtype, written.flush)))
    merges = [(m, m.branch) for fold in folds for m in fold.planned.merges if m.branch is not None]
    surgery.merged = {frame(branch.native.op): fills(m.add, m.kept_input) for m, branch in merges}
    surgery.replaced |= {frame(node.native.op): [] for fold in folds for node in fold.planned.chains.into}
    surgery.narrowed = dict(each for fold in folds for each in narrowed_layers(fold.planned))
    changed = [*made, *(name for fold in folds for each in fold.removed.values() for name in fold.made_identity(each))]
    places = {name: owner_of(result, name) for name in changed}
    surgery.persistent = [name for name, (owner, attribute) in places.items() if attribute in owner._non_persistent_buffers_set]
    tied = _tied(module)
    before = list(result.state_dict())
    restructure(result, surgery)
    after = set(result.state_dict())
    for name in before:
        stands = re.sub(r"(?:(^|\.)parametrizations\.(\w+)\.original\d*|(^|\.)(\w+)_(?:g|v|u|orig))$", r"\1\2\3\4", name)
        surgery.keys[name] = name if name in after else stands if stands in after else None
    held = {name for host in hosts for name in host.aliases}
    for target, tensor in made.items():
        _set(result, target, tensor, inside=target in held)
    surgery.untied, added = _tie_again(result, tied, made)
    for fold in folds:
        for site, removal in fold.removed.items():
            if removal.norm is not None:
                _make_identity(result, fold.made_identity(removal), removal.norm.epsilon, fold.left(site), held)
    return result, notes, added


def requantised(ctx: TorchLowering, node: Node, param: Param) -> Iterator[Update]:
    """What changes where a quantised weight does: what is rounded or the codes, the scales, the zero points, and what an observer saw."""
    assert param.tensor is not None
    root: Any = ctx.traced.model
    codes, factors = ctx.codes[param.tensor], None if param.update is None else param.factors(param.update)
    assert factors is not None
    made, place, zero = codes.exact().rescaled(factors), codes.places["scale"], codes.places.get("zero")
    told = made.said(param.tensor.name)
    if (source := made.codes if made.source is None else made.source) is not None:
        held = codes.places["source"]
        yield Update(node, held, np.asarray(source, np.float64), getattr(*owner_of(root, held.target)).dtype)
    if codes.quantised.apart:
        array = made.scale if made.axis is not None else codes.layout.stored(made.scale.reshape(value_of(codes.last.scale).shape))
        yield Update(node, place, array, getattr(*owner_of(root, place.target)).dtype, axis=made.axis, said=told)
        return
    quantiser = root.get_submodule(place.owner)

    def update(place: Place, array: Array, **more: Any) -> Update:
        old, array = getattr(*owner_of(root, place.target)), np.broadcast_to(array, made.scale.shape)
        return Update(node, place, array.reshape(tuple(old.shape) if array.size == old.numel() else -1), old.dtype, **more)

    if zero is not None:
        yield update(zero, made.zero)
    if not is_fake_quantiser(quantiser):
        yield update(place, made.scale, said=told)
        return
    if is_on(quantiser, "observer_enabled"):
        told += "; the observer that would set them anew is off from now on"
    yield update(place, made.scale, quantiser=place.owner, axis=made.axis, said=told)
    by = factors[tuple(slice(None, None, n) for n in made.blocks)]
    seen: list[Any] = [getattr(quantiser.activation_post_process, name, None) for name in ("min_val", "max_val")]
    if all(each is not None and each.numel() and each.isfinite().all() for each in seen):
        ends = [codes.last.grid(each).double().cpu().numpy() * np.where(by == 0, 1.0, by) for each in seen]
        for name, end in (("min_val", np.minimum(*ends)), ("max_val", np.maximum(*ends))):
            yield update(Place(f"{place.owner}.activation_post_process.{name}"), end)


def as_called(exact: Array, role: str, merges: Sequence[Merge]) -> Array:
    """The coefficients with which a host gives the merged sum by way of the code, in which the additions stay.

    Branches that are modules give zeros there. A value that is added itself is still added, so the host goes without it.
    """
    for m in reversed(merges):
        multiples = m.add.attrs.get("multiples", (1, 1))
        if m.branch is None and role == "weight":
            exact = exact - multiples[1 - m.kept_input] * m.delta
        exact = exact / multiples[m.kept_input]
    return exact


def _divided(host: ModuleHost, surgery: Surgery, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new tensors by name, where the names of one layer that change alike are one, and the others are to get copies of their own."""
    found = dict(made)
    layers: dict[str, dict[str, dict[str, Tensor]]] = {}
    for target, tensor in made.items():
        path, attribute = Place(target).owner, Place(target).attribute
        if host.own(path) == path and (path != host.canonical(path) or len(host.called(path)) > 1):
            layers.setdefault(host.canonical(path), {}).setdefault(path, {})[attribute] = tensor
    for first, by_name in layers.items():
        one, *others = by_name.values()
        if by_name.keys() == host.called(first) and all(_alike(one, other) for other in others):
            for path in by_name:
                for attribute in one:
                    del found[f"{path}.{attribute}"]
                if (size := surgery.biases.pop(path, None)) is not None:
                    surgery.biases[first] = size
            found |= {f"{first}.{attribute}": tensor for attribute, tensor in one.items()}
        else:
            surgery.divided += by_name
    return found


def _alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[k].shape == other[k].shape and torch.equal(one[k], other[k]) for k in one)


def _tied(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def _tie_again(root: nn.Module, tied: Sequence[Sequence[str]], made: Mapping[str, Tensor]) -> tuple[list[str], int]:
    """Let names that shared a parameter share the new one where it is the same for them; who no longer does, and the bytes added."""
    untied: list[str] = []
    added = 0
    for names in tied:
        left: dict[int, nn.Parameter] = {}
        for name in names:
            owner, attribute = owner_of(root, name)
            if (new := owner._parameters.get(attribute)) is None:
                continue
            same = next((p for p in left.values() if name in made and p.shape == new.shape and torch.equal(p, new)), new)
            owner._parameters[attribute] = same
            left[id(same)] = same
            untied += [name] if same is not next(iter(left.values())) else []
        added += sum(p.nbytes for p in list(left.values())[1:])
    return untied, added


def _set(root: nn.Module, target: str, tensor: Tensor, *, inside: bool) -> None:
    """Put a tensor in the place of a parameter or buffer, on its device and in its memory format; where others share it, for itself.

    inside: whether its numbers are written into the one that is there, since the code holds that one.
    """
    owner, attribute = owner_of(root, target)
    old = getattr(owner, attribute)
    if inside:
        with torch.no_grad():
            old.copy_(tensor)
        return
    tensor = laid_out(tensor.to(old.device), old)
    if attribute in owner._buffers:
        owner._buffers[attribute] = tensor
    else:
        owner._parameters[attribute] = nn.Parameter(tensor, old.requires_grad)


def _make_identity(root: nn.Module, roles: Mapping[str, str], epsilon: float, shift: Array, held: Collection[str]) -> None:
    """Give a BatchNorm parameters with which it adds a shift, 0 mostly, and does nothing else. roles: of each of them by its name."""
    numbers = {"gamma": torch.ones(()), "beta": torch.zeros(()), "mean": torch.zeros(())}
    if shift.any():
        holder, sign = ("beta", 1) if "beta" in roles.values() else ("mean", -1)
        numbers[holder] = torch.from_numpy(sign * shift)
    for name, role in roles.items():
        old = getattr(*owner_of(root, name))
        value = numbers[role] if role in numbers else unit_variance(epsilon, old.dtype)
        _set(root, name, value.to(old).expand(old.numel()).reshape(old.shape).clone(), inside=name in held)
