"""A module as the place where new coefficients are written: its code stays, its tensors go by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn.utils import parametrize, prune
from torch.utils import _pytree as pytree

from bnfold.algebra.layouts import AS_STORED

from ..export.constants import ProgramConstants
from ..export.copies import duplicate
from ..export.quantisers import scaled_integers
from ..export.trace import Traced
from ..export.walk import arguments, frame, frames, mutates, operator_name, value_of, viewed
from ..writing.checks import WITH_BIAS, Check, bias_check, passed
from ..writing.derived import Derived, derived, scale_of
from .places import Place

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CLIPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
COMPUTED = re.compile(r"(?:(?P<owner>.*)\.)?parametrizations\.(?P<attribute>\w+)\.(?:original\d*|\d+\..*)")
HOOKS = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm"}


class ModuleHost:
    """A module. program: its data flow, as it is lowered; traced: as it was read."""

    copies_weights = False
    grows = False

    def __init__(self, module: nn.Module, program: ExportedProgram, constants: ProgramConstants, traced: Traced) -> None:
        self._constants, self._program, self.root, self.example, self.aliases = constants, program, module, traced.example, traced.aliases
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._names: dict[int, list[str]] = {}  # all names that a module has
        for path, each in self._modules.items():
            self._names.setdefault(id(each), []).append(path)
        self._inside: dict[str, list[Node]] = {}  # the operators in each module's forward, those of its children included
        for node in program.graph.nodes:
            for path in dict.fromkeys(map(self.canonical, frames(node)) if node.op == "call_function" else ()):
                self._inside.setdefault(path, []).append(node)
        self._computed: dict[Node, Place | None] = {}

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All modules, by all their names."""
        return self._modules

    def module(self, path: str) -> nn.Module | None:
        return self._modules.get(path)

    def inside(self, path: str) -> list[Node]:
        return self._inside.get(self.canonical(path), [])

    def canonical(self, path: str) -> str:
        """One name for a module that is registered under several."""
        module = self._modules.get(path)
        return path if module is None else self._names[id(module)][0]

    def own(self, path: str) -> str:
        """The name at which a layer can have weights of its own: each of several, where its calls go by names that lead to it alone."""
        module = self._modules.get(path)
        if module is None or len(self._names[id(module)]) == 1:
            return path
        return path if self._divisible[id(module)] else self.canonical(path)

    def called(self, path: str) -> set[str]:
        """The names by which a module is called."""
        return self._called.get(id(self._modules.get(path)), set())

    @cached_property
    def _called(self) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for node in self._program.graph.nodes:
            for path in frames(node) if node.op == "call_function" else ():
                if path in self._modules:
                    found.setdefault(id(self._modules[path]), set()).add(path)
        return found

    @cached_property
    def _divisible(self) -> dict[int, bool]:
        """For each module of several names whether every one by which it is called can get a copy."""
        found = {}
        for key, names in self._names.items():
            module = self._modules[names[0]]
            parents = {".".join(parts[:i]) for name in self._called.get(key, ()) for parts in [name.split(".")] for i in range(len(parts))}
            alone = all(len(self._names[id(self._modules[parent])]) == 1 for parent in parents)
            leaf = not module._modules and not module._buffers
            found[key] = alone and leaf and key not in self._referenced and not self._read_from_outside(module)
        return found

    @cached_property
    def _referenced(self) -> set[int]:
        """Modules that others hold in another way than by a name: in a list, say."""
        values = [value for module in self._modules.values() for name, value in vars(module).items() if name != "_modules"]
        return {id(leaf) for leaf in pytree.tree_leaves(values) if isinstance(leaf, nn.Module)}

    def _read_from_outside(self, module: nn.Module) -> bool:
        """Whether code other than the module's own reads its parameters."""
        own = {parameter.data_ptr() for parameter in module._parameters.values() if parameter is not None}
        stored = ((node, self._constants.stored(node)) for node in self._program.graph.nodes)
        readers = (user for node, each in stored if each is not None and each.tensor.data_ptr() in own for user in node.users)
        return any(self._modules.get(frame(user)) is not module for user in readers)

    def weight(self, op: Node, argument: Node) -> Place | Node | None:
        stored = self._constants.stored(argument)
        if stored is None:
            if argument not in self._computed:
                self._computed[argument] = self._attribute(argument)
            return self._computed[argument]
        if stored.target in self.aliases:
            return Place(self.aliases[stored.target])
        own = self._own_name(op, argument)
        if own is not None:
            return own  # a tied weight has several names: this module's own can be untied
        place = Place(".".join(filter(None, (self.canonical(Place(stored.target).owner), Place(stored.target).attribute))))
        return place if stored.kind != "CONSTANT_TENSOR" and self._registered(place.target) else None

    def _own_name(self, op: Node, argument: Node) -> Place | None:
        """The name that a stored tensor has in the module in whose forward the operator stands."""
        stored, path = self._constants.stored(argument), self.own(frame(op))
        owner = self._modules.get(path)
        for name, own in owner._parameters.items() if owner is not None and stored is not None else ():
            if own is not None and own.shape == stored.tensor.shape and own.data_ptr() == stored.tensor.data_ptr():  # type: ignore[union-attr]
                return Place(f"{path}.{name}".lstrip("."))
        return None

    def _registered(self, target: str) -> bool:
        place = Place(target)
        owner = self._modules.get(place.owner)
        return owner is not None and (place.attribute in owner._parameters or place.attribute in owner._buffers)

    # --- computed weights ----------------------------------------------------------------------------------------------------------

    def _attribute(self, argument: Node) -> Place | None:
        """The attribute that a parametrization or a hook computes, where that is the argument."""
        found = {self._mechanism(root) for root in self._constants.roots(argument)} - {None}
        if len(found) != 1:
            return None
        (place,) = found
        assert place is not None
        owner = duplicate(self._modules[place.owner]).eval()
        with torch.no_grad():
            for hook in list(owner._forward_pre_hooks.values()):
                if computed_by(hook) == (place.attribute, place.how):
                    hook(owner, ())
            now, value = getattr(owner, place.attribute, None), self._constants.get(argument)
        if not isinstance(now, Tensor) or value is None or now.shape != value.shape:
            return None
        close = 1e-9 if now.dtype == torch.float64 else 1e-4 if now.dtype == torch.float32 else 1e-1
        off = np.abs(now.double().cpu().numpy() - value).max(initial=0.0)
        return place if off <= close * np.abs(value).max(initial=0.0) else None

    def _mechanism(self, root: Node) -> Place | None:
        """The computed attribute that a stored tensor is kept for."""
        stored = self._constants.stored(root)
        if stored is None:
            return None
        if match := COMPUTED.fullmatch(stored.target):
            path, attribute = self.canonical(match["owner"] or ""), match["attribute"]
            owner = self._modules.get(path)
            known = owner is not None and parametrize.is_parametrized(owner, attribute)
            return Place(f"{path}.{attribute}".lstrip("."), "parametrization") if known else None
        path = self.canonical(Place(stored.target).owner)
        owner = self._modules.get(path)
        for hook in owner._forward_pre_hooks.values() if owner is not None else ():
            attribute, how = computed_by(hook)
            if how and re.fullmatch(rf"{re.escape(attribute)}_(?:g|v|u|orig|mask)", Place(stored.target).attribute):
                return Place(f"{path}.{attribute}".lstrip("."), how)
        return None

    def _plain(self, op: Node, argument: Node) -> Place | None:
        """The weight of a subclass of torch's own layer, whose forward computes it and does nothing else but call the operator."""
        path = self.canonical(frame(op))
        owner = self._modules.get(path)
        if owner is None or not path or not isinstance(owner, (*CONVOLUTIONS, nn.Linear)) or parametrize.is_parametrized(owner):
            return None
        given = arguments(op)
        if given.get("weight") is not argument or not (given["bias"] is None or self._constants.stored(given["bias"]) is not None):
            return None
        if any(node is not op and not self._constants.is_constant(node) for node in self.inside(path)):
            return None
        return Place(f"{path}.weight", "plain")

    def computed(self, op: Node, argument: Node) -> tuple[Place, Derived] | None:
        """Where a weight is rewritten that a module's code computes, and how it comes from what is stored there."""
        found, plain = self.derived(op, argument), self._plain(op, argument)
        lacks_bias = arguments(op).get("bias", op) is None
        if found is None or (plain is not None and lacks_bias and self.bias(op, found[0]) is None):
            return None if plain is None else (plain, Derived(argument, AS_STORED, ()))
        return found

    def derived(self, op: Node, argument: Node) -> tuple[Place, Derived] | None:
        """The stored tensor from which the code computes a weight in steps that can be undone, or the scale of its integers."""
        found = derived(self._constants, argument)
        if found is not None and scaled_integers(found.root) is not None:
            found = scale_of(self._constants, found.root)
        place = None if found is None else self.weight(op, found.root)
        return (place, found) if found is not None and isinstance(place, Place) else None

    def readers(self, place: Place) -> list[tuple[Node, Node]]:
        """Who reads a parameter, and what they read: itself, or what is computed from it."""
        return self._readers.get(place.target, [])

    @cached_property
    def _readers(self) -> dict[str, list[tuple[Node, Node]]]:
        found: dict[str, list[tuple[Node, Node]]] = {}
        for node in self._program.graph.nodes:
            if self._constants.stored(node) is None:
                continue
            if (computed := self._mechanism(node)) is not None:
                found.setdefault(computed.target, []).extend(self._constants.ends(node))
            for user in node.users:
                if isinstance(named := self.weight(user, node), Place):
                    ends = self._constants.ends(user) if self._constants.is_constant(user) else [(user, node)]
                    found.setdefault(named.target, []).extend(ends)
        return found

    # --- a module that another one replaces ------------------------------------------------------------------------------------------

    def why_not_replaced(self, op: Node, kinds: tuple[type[nn.Module], ...] = CLIPS) -> str:
        """Why no other module can stand in the place of the one that an operator is the call of, "" where one can. kinds: of modules."""
        module = self._modules.get(frame(op))
        if not isinstance(module, kinds):
            return "the code calls it as a function"
        if len(self.inside(frame(op))) > 1 or len(self._names[id(module)]) > 1:
            return "the code calls its module in several places"
        x = op.all_input_nodes[0]
        if getattr(module, "inplace", False) and not (mutates(op) and len(x.users) == 1 and viewed(x) is None):
            return "it writes into what others may read"
        return ""

    # --- a bias that isn't there yet -------------------------------------------------------------------------------------------------

    def bias(self, op: Node, weight: Place | Node) -> Place | Node | None:
        assert isinstance(weight, Place)
        path = self.own(frame(op))
        owner = self._modules.get(weight.owner)
        if owner is None or getattr(owner, "bias", self) is not None or "bias" in owner._buffers:
            return None
        place = Place(f"{weight.owner}.bias".lstrip("."), weight.how)
        if weight.how == "plain" or (weight.owner == path and reads_bias(owner)):
            return place
        return place if self._takes_bias.get((path, weight.owner)) else None

    @cached_property
    def _takes_bias(self) -> dict[tuple[str, str], bool]:
        """For each module whose own code calls an operator without a bias, whether one given to the weight's owner arrives there."""
        checks: dict[tuple[str, str], Check] = {}
        for op in self._program.graph.nodes:
            given = arguments(op) if operator_name(op) in WITH_BIAS else {}
            weight = given.get("weight")
            if given.get("bias", op) is not None or not isinstance(weight, Node) or not self._constants.is_constant(weight):
                continue
            found = self.derived(op, weight) if self._constants.stored(weight) is None else None
            place = self.weight(op, weight) if found is None else found[0]
            path = self.own(frame(op))
            inner = isinstance(place, Place) and f"{place.owner}.".startswith(f"{path}." if path else "")
            if not isinstance(place, Place) or not inner or getattr(self._modules.get(place.owner), "bias", self) is not None:
                continue
            own = place.owner.removeprefix(path).lstrip(".")
            name = place.attribute if found is None and place.how == "stored" else None
            checks[path, place.owner] = bias_check(own, name, tuple(value_of(weight).shape), op)
        return passed(self.root, self.example, checks) if checks else {}


def computed_by(hook: object) -> tuple[str, str]:
    """The attribute that a hook computes, and how; empty for another hook."""
    if isinstance(hook, prune.BasePruningMethod):
        return str(hook._tensor_name), "pruning"
    how = HOOKS.get(type(hook).__name__, "")
    return (str(getattr(hook, "name", "")), how) if how else ("", "")


def reads_bias(owner: nn.Module) -> bool:
    """Whether a layer's forward is torch's own, which hands `self.bias` on to the operator."""
    own = [getattr(type(owner), name, None) for name in ("forward", "_conv_forward")]
    theirs = ("torch.nn.modules.", "torch.ao.nn.qat.", "torch.ao.nn.intrinsic.qat.")
    plain = all(each is None or each.__module__.startswith(theirs) for each in own)
    return plain and isinstance(owner, (*CONVOLUTIONS, nn.Linear, nn.LayerNorm)) and not {"forward", "_conv_forward"} & vars(owner).keys()
