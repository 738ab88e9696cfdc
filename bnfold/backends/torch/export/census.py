"""Every BatchNorm that a PyTorch model holds: operators, those in branches and loops too, and modules, called or not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.fx import Node as Op

from bnfold.algebra.graph import Site
from bnfold.folding.plan import Listed
from bnfold.report import Layer

from ..lowering.lowering import TorchLowering
from ..lowering.module_host import ModuleHost
from .regions import inner_operators, kind_of
from .walk import arguments, frame, is_batchnorm

BODIES = {
    "cond": "a branch of torch.cond",
    "while_loop": "the body of a while_loop",
    "scan": "the body of a scan",
    "map_impl": "the body of a map",
    "wrap_with_autocast": "a region under autocast",
}


def of_constants(ctx: TorchLowering) -> list[Op]:
    """The operators that normalise constants alone: a weight, mostly."""
    return [op for op in ctx.program.graph.nodes if is_batchnorm(op) and ctx.constants.is_constant(op)]


def computed(op: Op) -> Layer:
    """What became of one of those in a program."""
    return Layer(frame(op) or op.name, _channels(op), "folded", (), "", ("it normalises constants alone, so it was computed once",))


def batchnorms(ctx: TorchLowering, lowered: Collection[Op]) -> list[Listed]:
    """All of them: by their operators, and those modules to which no such operator belongs by their names.

    lowered: the operators that sites stand for.
    """
    inner = [(each, _owner(ctx, each.op, each.outer)) for each in inner_operators(ctx.program) if is_batchnorm(each.op)]
    found = [Listed(op, frame(op) or op.name, _channels(op), "its output isn't used") for op in _operators(ctx)]
    found += [Listed(each.op, owner or each.op.name, _channels(each.op), _inside(each.holder)) for each, owner in inner]
    if not isinstance(ctx.host, ModuleHost):
        return found
    owners = {path for op in (*_operators(ctx), *lowered) for path in (frame(op), _owner(ctx, op))} | {owner for _, owner in inner}
    return [*found, *_modules(ctx, ctx.host, {ctx.host.canonical(path) for path in owners})]


def operators(sites: Iterable[Site]) -> set[Op]:
    """Those that the sites stand for."""
    return {op for site in sites for node in site.nodes for op in node.native.operators}


def _operators(ctx: TorchLowering) -> list[Op]:
    """Those of the outermost graph; one that normalises a weight is a part of that weight."""
    return [op for op in ctx.program.graph.nodes if is_batchnorm(op) and not ctx.constants.is_constant(op)]


def _modules(ctx: TorchLowering, host: ModuleHost, lowered: Collection[str]) -> Iterator[Listed]:
    statistics = (ctx.constants.stored(each) for op in _operators(ctx) for each in op.all_input_nodes)
    used = {stored.tensor.data_ptr() for stored in statistics if stored is not None}  # by code that holds them under no name
    read = {owner for op in ctx.program.graph.nodes if op.users and (owner := ctx.target(op).rpartition(".")[0])}
    for path, module in host.modules.items():
        mean: Tensor | None = getattr(module, "running_mean", None)
        if not _normalises(module) or path != host.canonical(path) or path in lowered or (mean is not None and mean.data_ptr() in used):
            continue
        if inside := host.inside(path):
            alone = all(map(ctx.constants.is_constant, inside))
            why = "it normalises constants alone" if alone else "its forward is its own, and holds no BatchNorm that bnfold knows"
        elif path in read:
            why = "it isn't called itself: its parameters are read elsewhere"
        else:
            why = "the call that was traced doesn't reach it"
        yield Listed(path, path, getattr(module, "num_features", 0 if mean is None else mean.numel()), why)


def _normalises(module: nn.Module) -> bool:
    """Whether it is a BatchNorm, or somebody's own class with running statistics (which InstanceNorm may have too)."""
    buffers = module._buffers
    own = isinstance(buffers.get("running_mean"), Tensor) and isinstance(buffers.get("running_var"), Tensor)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (own and not isinstance(module, nn.modules.batchnorm._NormBase))


def _inside(holder: Op) -> str:
    kind = kind_of(holder)
    return f"it stands in {BODIES.get(kind, f'the graph of a {kind}')}, which runs as a whole"


def _owner(ctx: TorchLowering, op: Op, outer: dict[Op, Any] | None = None) -> str:
    """The qualified name of whom an operator's statistics, or else its gamma, belong to."""
    for argument in map(arguments(op).get, ("running_mean", "weight")) if is_batchnorm(op) else ():
        stored = ctx.constants.stored(argument if outer is None or argument is None else outer.get(argument))
        if stored is not None and "." in stored.target:
            return ctx.constants.owner(op, stored)
    return ""


def _channels(op: Op) -> int:
    return int(arguments(op)["input"].meta["val"].shape[1])
