"""Which BatchNorms can be taken out of a module whose code stays as it is, and what stays in their place.

A module that is nothing but its BatchNorm becomes an Identity; one with an activation of its own (timm's BatchNormAct2d) keeps that. Both
are tried on random data before they are believed. A functional call in somebody's forward can't go: its parameters are made those of the
identity, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node as Op

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.graph import Node, Site
from bnfold.folding.branches import May

from ..export.call import Call
from ..export.copies import WAY_OUT, duplicate
from ..export.observers import settled_quantisers
from ..export.regions import kind_of
from ..export.walk import elements, frame, frames, mutates, operator_name
from ..lowering.chains import StoredNorm
from ..lowering.lowering import TorchLowering
from ..lowering.module_host import CONVOLUTIONS, ModuleHost
from ..lowering.places import Place
from .checks import Check, outputs, passed, same
from .surgery import remains

SIDE = 8  # the spatial sizes of what a module is tried on
IMMOVABLE = "it is computed in the forward of {}, which stays as it is"


@dataclass(frozen=True)
class Removal:
    """path: the module that makes way, for those of its own modules in `kept`; None for calls whose parameters become the identity's.

    calls: their operators. norm: their parameters.
    """

    path: str | None
    kept: tuple[str, ...] = ()
    calls: tuple[Op, ...] = ()
    norm: StoredNorm | None = None


def removals(ctx: TorchLowering, sites: list[Site]) -> dict[Site, Removal]:
    """How each site is taken out. A BatchNorm that can't be is refused; a constant operator that can't be is no site at all."""
    assert isinstance(ctx.host, ModuleHost)
    found: dict[Site, Removal] = {}
    readers = _readers(ctx, ctx.host)
    for site in list(sites):
        if site.refusal is not None:
            continue
        removal = _removal(ctx, ctx.host, site)
        others = _others(ctx.host, readers.get(removal.path or "", ()), removal.path, site) if removal is not None else []
        if others:
            site.refusal = f"its parameters are also read by a {kind_of(others[0]) or operator_name(others[0])}"
        elif removal is not None:
            found[site] = removal
        elif site.is_batchnorm:
            path, model = frame(site.nodes[0].native.op), ctx.traced.model
            site.refusal = IMMOVABLE.format(path or type(model).__name__) + f"; {WAY_OUT}" * isinstance(model, torch.fx.GraphModule)
        else:
            sites.remove(site)
    found |= _whole(ctx, ctx.host, found, readers)
    for site, removal in found.items():
        holder = None if removal.norm is None else removal.norm.shift_holder
        site.holds_shift = holder is not None and elements(holder) == site.channels
    return found


def _whole(ctx: TorchLowering, host: ModuleHost, found: Mapping[Site, Removal], readers: Mapping[str, list[Op]]) -> dict[Site, Removal]:
    """Of the modules whose call would stay, those that can go: with the identity's parameters they do what is left without them."""
    wanted: dict[tuple[str], tuple[Site, tuple[str, ...]]] = {}
    for site, removal in found.items():
        paths = {host.canonical(frame(op)) for op in removal.calls}
        path = next(iter(paths)) if len(paths) == 1 else ""
        if path and isinstance(host.module(path), nn.modules.batchnorm._BatchNorm) and not _others(host, readers.get(path, ()), path, site):
            others = [op for op in host.inside(path) if op not in removal.calls and not ctx.constants.is_constant(op)]
            wanted[(path,)] = site, _candidates(path, others)[0]
    answers = passed(host.root, host.example, {key: _stays_alike(kept) for key, (_, kept) in wanted.items()}) if wanted else {}
    gone = {site: Removal(key[0], kept) for key, (site, kept) in wanted.items() if answers.get(key)}
    for site in gone:
        site.note = ""
    return gone


def _stays_alike(kept: tuple[str, ...]) -> Check:
    """Whether a BatchNorm that does nothing leaves what those of its own modules do that are kept."""

    def check(module: nn.Module, call: Call) -> bool:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        before = outputs(module, call)
        ones = ((module.weight, 1.0), (module.bias, 0.0), (module.running_mean, 0.0), (module.running_var, 1.0 - module.eps))
        for tensor, number in ones:
            if tensor is not None:
                tensor.fill_(number)
        after = outputs(module, call)
        return not same(before, after) and same(after, outputs(remains(module, list(kept)), call))

    return check


def _removal(ctx: TorchLowering, host: ModuleHost, site: Site) -> Removal | None:
    calls = [op for node in site.nodes for op in node.native.operators]
    paths = {host.canonical(frame(op)) for op in calls}
    path = next(iter(paths))
    module = host.module(path)
    if len(paths) == 1 and path and module is not None:
        others = [op for op in host.inside(path) if op not in calls and not ctx.constants.is_constant(op) and op not in _items(ctx, calls)]
        if not others and type(module).__module__.startswith("torch.nn.modules."):
            return Removal(path)
        hooked: list[tuple[str, ...]] = [()] if module._forward_hooks else []  # which may be all that calls others
        for kept in hooked + _candidates(path, others):
            if all(_behaves(module, kept, node) for node in site.nodes[:1]):
                return Removal(path, kept)
    norm = site.nodes[0].attrs.get("stored")
    if norm is None or not _neutral(ctx, host, norm, calls):
        return None
    site.note = "its call stays in the forward, where it now does nothing"
    return Removal(None, calls=tuple(calls), norm=norm)


def _readers(ctx: TorchLowering, host: ModuleHost) -> dict[str, list[Op]]:
    """Who reads the tensors that each module holds itself; a tensor of several names is each reader's own, where it has one."""
    found: dict[str, list[Op]] = {}
    for op in ctx.program.graph.nodes:
        if (stored := ctx.constants.stored(op)) is None:
            continue
        for user in op.users:
            own, place = ctx.constants.owner(user, stored), host.weight(user, op)
            owner = place.owner if isinstance(place, Place) and own != frame(user) else own
            found.setdefault(host.canonical(owner), []).append(user)
    return found


def _others(host: ModuleHost, readers: Iterable[Op], path: str | None, site: Site) -> list[Op]:
    """Those of the readers of the module at a path that aren't the site's calls: a branch that calls it too, say."""
    if path is None:
        return []
    own = {*host.inside(path), *(op for node in site.nodes for op in node.native.operators)}
    return [reader for reader in readers if reader not in own and not operator_name(reader).startswith("_assert")]


def _items(ctx: TorchLowering, calls: list[Op]) -> set[Op]:
    return {item for op in calls for item in ctx.items(op).values()}


def _candidates(path: str, others: list[Op]) -> list[tuple[str, ...]]:
    prefix = f"{path}."
    inner = [f for op in others for f in frames(op)[::-1] if f.startswith(prefix)]
    children = tuple(dict.fromkeys(f.removeprefix(prefix).partition(".")[0] for f in inner))
    return [children] if others else [()]


def _behaves(module: nn.Module, kept: tuple[str, ...], node: Node) -> bool:
    """Whether the module computes what is left of it, behind the BatchNorm's map."""
    probes = node.inputs[0].probes
    if probes is None or any(n is None for n in probes[0]):
        return False
    shape: list[int] = [n or 1 if axis == 1 else 2 if axis == 0 else min(n or 1, SIDE) for axis, n in enumerate(probes[0])]
    x = np.random.default_rng(0).standard_normal(shape)
    try:
        with torch.no_grad():
            whole = settled_quantisers(duplicate(module)).cpu().double()
            left = settled_quantisers(duplicate(remains(module, list(kept)))).cpu().double()
            want = whole(torch.from_numpy(x.copy()))
            got = left(torch.from_numpy(np.asarray(coefficients(node)(x))))
    except Exception:  # the user's code may raise anything; a module that can't be tried isn't replaced
        return False
    return isinstance(want, Tensor) and isinstance(got, Tensor) and same([want], [got])


def may_merge(ctx: TorchLowering, ways: Mapping[Site, Removal]) -> May:
    """Whether a branch can go: its module, which is nothing else and is called once, then gives zeros to a sum that stays."""
    host = ctx.host
    assert isinstance(host, ModuleHost)
    whole = {site.nodes[0]: way for site, way in ways.items() if len(site.nodes) == 1}
    replaced = [node.native for site, way in ways.items() if way.path is not None and not way.kept for node in site.nodes]
    gone: dict[Op, Op] = {native.end: native.operands[0] for native in replaced}
    with_itself: set[Node | None] = set()  # hosts beside which their input is added: they can't become a branch themselves

    def may(add: Node, branch: Node | None, kept: int) -> bool:
        if len(add.native.operands) != 2 or branch in with_itself:
            return False
        if branch is None:  # the value itself stays in the sum, where the host is added to it
            if fills(add, kept):
                return False
            with_itself.add(add.inputs[kept].producer)
            gone[add.native.op] = add.native.operands[kept]
            return True
        op: Op = add.native.operands[1 - kept]
        while op is not branch.native.end:  # what stays between the branch and the sum must take the zeros for a tensor
            if op in gone:
                op = gone[op]
            elif op in ctx.idle:
                op = ctx.idle[op]
            else:
                return False
        if fills(add, kept) and branch.inputs[0].probes != branch.output.probes:
            return False  # who is added to in place must have the sum's shape
        if not _is_module(branch):
            return False
        gone[add.native.op] = add.native.operands[kept]
        return True

    def _is_module(branch: Node) -> bool:
        if branch.op == "Affine":
            way = whole.get(branch)
            return way is not None and way.path is not None and not way.kept
        path = frame(branch.native.op)
        others = [each for each in host.inside(path) if each is not branch.native.op and not ctx.constants.is_constant(each)]
        return bool(path) and isinstance(host.module(path), CONVOLUTIONS) and not others

    return may


def fills(add: Node, kept: int) -> bool:
    """Whether the host is added to its branch in place."""
    return mutates(add.native.op) and kept == 1


# --- calls in a forward --------------------------------------------------------------------------------------------------------


def _neutral(ctx: TorchLowering, host: ModuleHost, norm: StoredNorm, calls: list[Op]) -> bool:
    """Whether a BatchNorm's parameters can be made the identity's: they are stored by name, and nothing else reads them."""
    for tensor in norm.tensors.values():
        if ctx.constants.stored(tensor) is None or host.weight(calls[-1], tensor) is None:
            return False
        if any(reader not in calls and not operator_name(reader).startswith("_assert") for reader, _ in ctx.constants.ends(tensor)):
            return False
    return True


def unit_variance(epsilon: float, dtype: torch.dtype) -> Tensor:
    """The stored variance that gives 1 with epsilon added, in the arithmetic of the kernels (float32, or float64 for float64)."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    one, eps = torch.ones((), dtype=work), torch.tensor(epsilon, dtype=work)
    near = (one - eps).to(dtype)
    candidates = [near, torch.nextafter(near, torch.full_like(near, 2)), torch.nextafter(near, torch.zeros_like(near))]
    return next((v for v in candidates if bool(v.to(work) + eps == one)), near)
