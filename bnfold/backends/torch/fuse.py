"""Fuse a PyTorch model: lower, plan, write.

A module has more paths than the one that was traced, and its code stays as it is. So what is folded folds alike on every path that is
known: on all calls that the example states, and at those other sizes at which a first folded copy differed from the original.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from bnfold.errors import BnfoldError
from bnfold.folding.options import PLAIN, FoldOptions
from bnfold.folding.plan import kept, plan
from bnfold.report import Counts, FuseReport, Layer

from .export.census import batchnorms, computed, of_constants, operators
from .export.copies import WAY_OUT, duplicate, require_copies
from .export.other_calls import OtherCall, shapes_text
from .export.regions import has_regions
from .export.trace import Traced, at_its_sizes, trace
from .lowering.table import lowering
from .writing.checks import DifferentialTest, users_call
from .writing.module import write_module
from .writing.paths import Allowed, Path, conflict, path_of, plain_name
from .writing.program import copy_program, write_program
from .writing.reading import read_folded
from .writing.simulated import note, simulating
from .writing.surgery import ATTRIBUTE, Surgery, restructure

MOST_PATHS = 8  # of a module that are found by trying
MOST_TRIES = 32  # to find out which folds don't hold elsewhere, where that can't be traced
FEW_NAMES = 8
OTHERWISE = "the module's own code, or a hook, looks at it or at what it folds into: folded, it computes something else"
NOT_MOVED = (
    "no ranges are equalised, no normalisation gives up its scale, no channel leaves and no layers in a row become one: the code has paths "
    "that wouldn't agree, or looks at weights"
)
WRITTEN_OUT = "the program's regions (torch.no_grad(), torch.autocast, checkpoints) are written out: it computes the same without them"


def fuse(traced: Traced, options: FoldOptions = PLAIN) -> tuple[nn.Module | ExportedProgram | Traced, FuseReport]:
    """A folded copy of the model, and what became of each BatchNorm. Where nothing folds, an unchanged copy. With its data flow, where that
    needn't be read anew.

    No operator is doubled in a module's code, which stays as it is.
    """
    if isinstance(traced.model, nn.Module):
        return _of_module(traced, traced.model, Allowed(True, options))
    ctx = lowering(traced)
    graph = ctx.graph()
    met = operators(site for site in graph.sites if site.is_batchnorm)
    others = kept(batchnorms(ctx, met), met)
    planned = plan(graph, options)
    constants = of_constants(ctx)
    others = [*map(computed, constants), *others]
    if not planned.changes and not constants:
        return copy_program(traced.model), planned.report({}, bytes_added=0, others=others)
    fused, notes, added = write_program(ctx, graph, planned, constants)
    said = (WRITTEN_OUT,) * has_regions(traced.model) + (traced.note,) * bool(traced.note)
    return fused, planned.report(notes, bytes_added=added, others=others, said=said)


def _of_module(traced: Traced, module: nn.Module, allowed: Allowed) -> tuple[nn.Module | Traced, FuseReport]:
    """Where its layers simulate a fold, they become what they simulate first."""
    if not (layers := simulating(module)):
        return _Folding(traced, module, allowed).result()
    plain = restructure(duplicate(module), Surgery(simulated=list(layers)))
    made, report = _Folding(trace(plain, traced), plain, allowed).result()
    fused: Any = made.model if isinstance(made, Traced) else made
    surgery: Surgery = getattr(fused, ATTRIBUTE, None) or Surgery()
    surgery.simulated = list(layers)
    left = plain.state_dict()
    surgery.keys = {name: surgery.keys.get(name, name) if name in left else None for name in module.state_dict()}
    setattr(fused, ATTRIBUTE, surgery)
    simulated = tuple(Layer(f"{path}.bn", each.bn.num_features, "folded", (path,), "", (note(each),)) for path, each in layers.items())
    counts = Counts(report.batchnorms.before + len(simulated), report.batchnorms.after)
    return made, dataclasses.replace(report, layers=(*simulated, *report.layers), batchnorms=counts)


class _Folding:
    """The folding of one module. refused: sites that don't fold on all paths, and why. allowed: what else is done."""

    def __init__(self, traced: Traced, module: nn.Module, allowed: Allowed) -> None:
        self._traced, self._module = traced, module
        others = [(f"call {k} of the example", each) for k, each in enumerate(traced.others, 2)]
        self._read = [("its first call" if others else shapes_text(traced), traced), *others]
        own = users_call(traced)
        if own is not None and (found := self._traced_at(own)) is not None:
            self._read.append((own.text, found))
        self._refused: dict[str, str] = {}
        self._allowed = allowed
        self._said = ""

    def result(self) -> tuple[nn.Module | Traced, FuseReport]:
        paths = self._agreed()
        test = DifferentialTest(self._traced) if _changes(paths) else None
        known: list[OtherCall] = []
        while test is not None and _changes(paths) and (other := test.differing(self._exact(paths, test))) is not None:
            unread = other not in (*known, *test.traced) and len(known) < MOST_PATHS
            if unread and (traced := self._traced_at(other)) is not None:
                self._read.append((other.text, traced))
            else:
                self._blame(test, other, paths)
            known.append(other)
            paths = self._agreed()
        if not _changes(paths):
            return duplicate(self._module), self._report(paths, {}, 0)
        fused, notes, added = write_module(self._module, [path.fold for path in paths])
        require_copies(fused)
        read = None
        if len(paths) == 1 and test is not None and test.exact:
            read = read_folded(self._traced, paths[0].fold, fused, test.traced[0].call)
        return read or fused, self._report(paths, notes, added)

    def _agreed(self) -> list[Path]:
        """All paths, so planned that they fold alike."""
        while True:
            paths = [path_of(text, traced, self._refused, self._allowed) for text, traced in self._read]
            if (found := conflict(paths)) is None:
                return paths
            self._refuse(found.refused)

    def _refuse(self, found: Mapping[str, str]) -> None:
        """Let some sites stay; none: do less (see `_restrict`)."""
        before = self._allowed, len(self._refused)
        if not found:
            self._restrict()
        self._refused |= {name: reason for name, reason in found.items() if name not in self._refused}
        if before == (self._allowed, len(self._refused)):
            raise RuntimeError(f"what must stay was folded again: {', '.join(found)}")

    @property
    def _does_more(self) -> bool:
        options = self._allowed.options
        return options.equalise or options.norm_affine or options.drop_dead or options.merge_linear

    def _restrict(self) -> None:
        """Do less: equalise no ranges, drop no channels and leave normalisations and layers in a row alone, or else merge no branches."""
        merging, options = self._allowed
        more = self._does_more
        self._said = self._said or NOT_MOVED * more
        less = dataclasses.replace(options, equalise=False, norm_affine=False, drop_dead=False, merge_linear=False)
        self._allowed = Allowed(merging and more, less)

    def _exact(self, paths: list[Path], test: DifferentialTest) -> nn.Module:
        return write_module(self._module, [path.fold for path in paths], exact=test.exact)[0]

    def _traced_at(self, other: OtherCall) -> Traced | None:
        try:
            return at_its_sizes(self._traced, other.call)
        except BnfoldError:
            return None

    def _blame(self, test: DifferentialTest, other: OtherCall, paths: list[Path]) -> None:
        """Refuse the folds for whose sake a copy differs from the original, by leaving out the others; all that are left where it takes
        too many tries."""
        tries = 0

        def holds(names: set[str]) -> bool:
            nonlocal tries
            tries += 1
            rest = dict.fromkeys(everything - names, "")
            alone = [path_of(text, traced, self._refused | rest, self._allowed) for text, traced in self._read]
            if conflict(alone) is not None:
                return False
            return not _changes(alone) or test.differing(self._exact(alone, test), [other]) is None

        def guilty(names: list[str]) -> list[str]:
            if tries >= MOST_TRIES or holds(set(names)):
                return names if tries >= MOST_TRIES else []
            half = len(names) // 2
            return guilty(names[:half]) + guilty(names[half:]) if half else names

        everything = {plain_name(o.site.name) for path in paths for o in path.planned.outcomes if o.folded}
        while self._does_more or (self._allowed.merging and any(path.planned.merges for path in paths)):
            self._restrict()
            if holds(everything):
                return
        found = guilty(sorted(everything)) or sorted(everything)
        why = f"the folded copy gives something else than the module with {other.text}"
        way = f"; {WAY_OUT}" * isinstance(self._module, GraphModule)
        self._refuse(dict.fromkeys(found, OTHERWISE + way if other in test.traced else why))

    def _report(self, paths: list[Path], notes: Any, added: int) -> FuseReport:
        first, *others = (path.planned.report(notes, bytes_added=added) for path in paths)
        known = {plain_name(layer.name) for layer in first.layers}
        layers, merged, before, after = list(first.layers), list(first.merged), first.batchnorms.before, first.batchnorms.after
        lowered = first.lowered
        for path, report in zip(paths[1:], others, strict=True):
            into = {layer.name: layer.into for layer in report.layers if layer.verdict == "folded"}
            layers = [dataclasses.replace(each, into=tuple(dict.fromkeys((*each.into, *into.get(each.name, ()))))) for each in layers]
            more = [layer for layer in report.layers if plain_name(layer.name) not in known]
            sites = {plain_name(layer.name) for layer in more}
            calls = [
                (len(o.site.nodes), o.verdict) for o in path.planned.outcomes if o.site.is_batchnorm and plain_name(o.site.name) in sites
            ]
            layers += more
            merged += [each for each in report.merged if each not in merged]
            known |= sites
            before += sum(n for n, _ in calls)
            after += sum(n for n, verdict in calls if verdict == "kept")
            lowered += sum(n for n, verdict in calls if verdict == "lowered")
        ctx = paths[0].fold.ctx
        met = operators(o.site for o in paths[0].planned.outcomes if o.site.is_batchnorm)
        elsewhere = {layer.name for layer in layers[len(first.layers) :]}
        unmet = [layer for layer in kept(batchnorms(ctx, met), met) if layer.name not in elsewhere]
        said = [self._traced.note, unexercised(self._traced) if first.changes or after < before or merged else "", self._said]
        return dataclasses.replace(
            first,
            layers=(*layers, *unmet),
            merged=tuple(merged),
            batchnorms=Counts(before + len(unmet), after + len(unmet)),
            lowered=lowered,
            notes=(*first.notes, *(text for text in said if text)),
        )


def _changes(paths: list[Path]) -> bool:
    return any(path.planned.changes for path in paths)


def unexercised(traced: Traced) -> str:
    """Which arguments of a module's forward had one value, that is no tensor, or one structure in all calls: no trace shows what another
    does."""
    assert isinstance(traced.model, nn.Module)
    try:
        signature = inspect.signature(traced.model.forward)
    except (TypeError, ValueError):
        return ""
    seen: dict[str, list[Any]] = {}
    for call in traced.calls:
        bound = signature.bind(*call.args, **call.kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD and value:
                for key, each in value.items():
                    seen.setdefault(key, []).append(each)
            elif kind is not inspect.Parameter.VAR_POSITIONAL or not value:
                seen.setdefault({kind.VAR_KEYWORD: "**", kind.VAR_POSITIONAL: "*"}.get(kind, "") + name, []).append(value)
    names = [name for name, values in seen.items() if _fixed(values)]
    if not names:
        return ""
    listed = ", ".join(f"{name}={_brief(seen[name][0])}" for name in names[:FEW_NAMES]) + " ..." * (len(names) > FEW_NAMES)
    return (
        f"not exercised: forward was called with {listed} alone, and with other values its code may take another path, on which the folded "
        f"copy is not known to be right; to have it looked at, give several calls as the example: [(x,), {{...}}]"
    )


def _fixed(values: list[Any]) -> bool:
    if any(map(_holds_tensors, values)):
        return not isinstance(values[0], Tensor) and len({str(pytree.tree_structure(value)) for value in values}) == 1
    return all(type(value) is type(values[0]) and value == values[0] for value in values)


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _brief(value: Any) -> str:
    if _holds_tensors(value):
        return f"a {type(value).__name__}" + (f" of {len(value)}" if hasattr(value, "__len__") else "")
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
