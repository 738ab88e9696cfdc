"""Where new coefficients can be written, and which BatchNorms can be taken out: in an exported program anywhere, in a module by its names.

A module's code stays the user's: a weight is replaced by its qualified name, so all calls that read it get the new one, and an operator
can't grow what its code doesn't read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn.utils import parametrize

from .constants import Constants
from .walk import frame, frames

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WITH_BIAS = (*CONVOLUTIONS, nn.Linear, nn.LayerNorm)


@dataclass(frozen=True)
class Place:
    """A parameter or buffer by its qualified name.

    how: "stored" as it is; or computed in each call by "parametrization", "weight_norm" or "spectral_norm", which has to go first; or by
    the forward of a subclass of a "plain" layer, which takes its place.
    """

    target: str
    how: str = "stored"

    @property
    def owner(self) -> str:
        return self.target.rpartition(".")[0]

    @property
    def attribute(self) -> str:
        return self.target.rpartition(".")[2]


class Host(Protocol):
    """What the lowering asks. copies_weights: each user of a shared weight can get its own. grows: an operator may get an Add behind it."""

    copies_weights: bool
    grows: bool

    def weight(self, op: Node, argument: Node) -> Place | Node | None:
        """What is rewritten where `op` gets another constant for `argument`, the same for all who share it; None where nothing can be."""
        ...

    def bias(self, op: Node, weight: Place | Node) -> Place | Node | None:
        """Where a bias goes that the operator hasn't; None where it can't have one."""
        ...


class ProgramHost:
    """An exported program: every argument of every operator can be another."""

    copies_weights = True
    grows = True

    def weight(self, op: Node, argument: Node) -> Place | Node | None:
        return argument

    def bias(self, op: Node, weight: Place | Node) -> Place | Node | None:
        return op


class ModuleHost:
    """A module. program: its data flow."""

    copies_weights = False
    grows = False

    def __init__(self, module: nn.Module, program: ExportedProgram, constants: Constants) -> None:
        self._constants = constants
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._first: dict[int, str] = {}  # the first of the names that a module has
        for path, each in self._modules.items():
            self._first.setdefault(id(each), path)
        self._inside: dict[str, list[Node]] = {}  # the operators in each module's forward, those of its children included
        for node in program.graph.nodes:
            for path in dict.fromkeys(map(self.canonical, frames(node)) if node.op == "call_function" else ()):
                self._inside.setdefault(path, []).append(node)

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
        return path if module is None else self._first[id(module)]

    def weight(self, op: Node, argument: Node) -> Place | Node | None:
        stored = self._constants.stored(argument)
        path = self.canonical(frame(op))
        owner = self._modules.get(path)
        if stored is not None:
            for name, own in owner._parameters.items() if owner is not None else ():
                if own is not None and own.shape == stored.tensor.shape and own.data_ptr() == stored.tensor.data_ptr():
                    return Place(f"{path}.{name}".lstrip("."))  # a tied weight has several names: this module's own can be untied
            place = Place(".".join(filter(None, (self.canonical(Place(stored.target).owner), Place(stored.target).attribute))))
            return place if stored.kind != "CONSTANT_TENSOR" and self._registered(place.target) else None
        if owner is None or not path or not isinstance(owner, (*CONVOLUTIONS, nn.Linear)):
            return None
        how = _how_computed(owner)
        if how == "parametrization" and len(owner.parametrizations) > 1:  # type: ignore[arg-type]
            return None
        if how == "plain" and any(node is not op and not self._constants.is_constant(node) for node in self.inside(path)):
            return None
        return Place(f"{path}.weight", how)

    def _registered(self, target: str) -> bool:
        place = Place(target)
        owner = self._modules.get(place.owner)
        return owner is not None and (place.attribute in owner._parameters or place.attribute in owner._buffers)

    def bias(self, op: Node, weight: Place | Node) -> Place | Node | None:
        path = self.canonical(frame(op))
        owner = self._modules.get(path)
        if not isinstance(weight, Place) or owner is None or weight.owner != path or weight.attribute != "weight":
            return None
        if not isinstance(owner, WITH_BIAS) or getattr(owner, "bias", self) is not None:
            return None
        return Place(f"{path}.bias", weight.how) if weight.how == "plain" or _reads_bias(owner) else None


def _how_computed(owner: nn.Module) -> str:
    if parametrize.is_parametrized(owner, "weight"):
        return "parametrization"
    hooks = {type(hook).__name__ for hook in owner._forward_pre_hooks.values()}
    return "weight_norm" if "WeightNorm" in hooks else "spectral_norm" if "SpectralNorm" in hooks else "plain"


def _reads_bias(owner: nn.Module) -> bool:
    """Whether the class's forward hands on `self.bias`: that of torch's own layers does, and another says so by name."""
    forward = type(owner).forward
    return forward.__module__.startswith("torch.nn.modules.") or "bias" in getattr(getattr(forward, "__code__", None), "co_names", ())
