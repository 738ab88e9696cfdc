"""What folding changes in a module's structure, apart from its weights: so that an unfolded network can be given the folded one's form."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook

from bnfold.errors import ModelError

from ..export.copies import duplicate, shared_twin
from ..export.observers import per_channel
from .operators import operators
from .simulated import simulated

ATTRIBUTE = "_bnfold_surgery"  # of a folded module: its `Surgery`
FIRST = "first"  # what stands before those of a module's own that stay


@dataclass
class Surgery:
    """Changes by the qualified names of modules.

    simulated: layers that simulated a fold, and were replaced by what they simulate.
    divided: names of a layer with several that got a copy of their own.
    untied: names of parameters that shared one, and have their own now.
    replaced: BatchNorms that are gone, each with the names of its own modules that stay (an activation), none for an Identity.
    operators: those of the replaced in whose place there are operators with constants, each with their shapes.
    merged: branches whose weights went into another branch of their sum, each with whether it must keep its shape.
    plain: layers whose subclass computed its weight in each call, now of torch's own class.
    fixed: weights that a parametrization or a hook (weight_norm, spectral_norm, pruning) computed, now stored, and which it was.
    biases: the layers that got a bias, with its size.
    quantisers: fake quantisers of folded weights, which observe nothing from now on, each with the axis along which it got a scale for
    each channel, None for one that stays as it is.
    resized: the tensors that got another shape, with it: one scale that became several.
    keys: for every name in the unfolded state dict the one in the folded, None where it is gone.
    persistent: buffers that changed, and that a state dict left out.
    narrowed: layers that lost channels, or hold others, each with the shapes of its tensors, its number of groups under "groups", and what
    else it is set to.
    copied: those of the replaced whose output somebody writes into, while their input is still needed.
    """

    simulated: list[str] = field(default_factory=list)
    divided: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    replaced: dict[str, list[str]] = field(default_factory=dict)
    operators: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    merged: dict[str, bool] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    fixed: dict[str, str] = field(default_factory=dict)
    biases: dict[str, list[int]] = field(default_factory=dict)
    quantisers: dict[str, int | None] = field(default_factory=dict)
    resized: dict[str, list[int]] = field(default_factory=dict)
    persistent: list[str] = field(default_factory=list)
    narrowed: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    keys: dict[str, str | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Surgery:
        """Raises ModelError for what no `to_dict` wrote."""
        try:
            return cls(**{key: given[key] for key in (f.name for f in fields(cls)) if key in given})
        except TypeError as error:
            raise ModelError(f"the file's record of what was folded is damaged: {error}") from None


class Copy(nn.Module):
    """A copy of the input, for somebody who writes into it."""

    def forward(self, x: Tensor) -> Tensor:
        """[...] to [...]."""
        return x.clone()


class Zero(nn.Module):
    """A branch of a sum whose weights went into another branch: what it still adds is 0.

    full: whether as a tensor of the input's shape, for a sum that is formed in place; else as a number.
    """

    def __init__(self, full: bool = False) -> None:
        super().__init__()
        self.full = full

    def forward(self, x: Tensor) -> Tensor:
        """[...] to [], which broadcasts, or to [...]."""
        return torch.zeros_like(x) if self.full else x.new_zeros(())

    def extra_repr(self) -> str:
        return f"full={self.full}"


def rebuild(module: nn.Module, surgery: Surgery) -> nn.Module:
    """A copy of an unfolded module in the folded one's form, ready to load its weights. Raises ModelError where the two don't fit."""
    return restructure(duplicate(module), surgery)


def restructure(module: nn.Module, surgery: Surgery) -> nn.Module:
    """The same, in place."""
    for path in surgery.simulated:
        layer = _at(module, path)
        replace(module, path, with_hooks(simulated(layer), layer))
    for path in surgery.divided:
        setattr(*owner_of(module, path), shared_twin(_at(module, path)))
    for target in surgery.untied:
        owner, attribute = owner_of(module, target)
        if (own := owner._parameters.get(attribute)) is not None:
            owner._parameters[attribute] = nn.Parameter(own.detach().clone(), own.requires_grad)
    for path in surgery.plain:
        replace(module, path, plain(_at(module, path)))
    for target, how in surgery.fixed.items():
        fix(*owner_of(module, target), how)
    for target in surgery.persistent:
        owner, attribute = owner_of(module, target)
        owner._non_persistent_buffers_set.discard(attribute)
    for target, size in surgery.resized.items():
        owner, attribute = owner_of(module, target)
        old = getattr(owner, attribute)
        made = old.detach().new_zeros(size)
        setattr(owner, attribute, nn.Parameter(made, old.requires_grad) if attribute in owner._parameters else made)
    for path, size in surgery.biases.items():
        owner = _at(module, path)
        weight = next(t for t in (*owner.parameters(), *owner.buffers()) if t.is_floating_point())
        owner.bias = nn.Parameter(torch.zeros(size, dtype=weight.dtype, device=weight.device), weight.requires_grad)
    for path, sizes in surgery.narrowed.items():
        narrow(_at(module, path), sizes)
    for path, axis in surgery.quantisers.items():
        quantiser = _at(module, path)
        switch = quantiser.observer_enabled
        assert isinstance(switch, Tensor)
        quantiser.observer_enabled = torch.zeros_like(switch)
        if axis is not None:
            per_channel(quantiser, axis)
    for path, kept in surgery.replaced.items():
        first: nn.Module | None = Copy() if path in surgery.copied else None
        if (shapes := surgery.operators.get(path)) is not None:
            tensors = (each for owner in (_at(module, path), module) for each in (*owner.parameters(), *owner.buffers()))
            first = operators(shapes, next(each for each in tensors if each.is_floating_point()))
        replace(module, path, remains(_at(module, path), kept, first))
    for path, full in surgery.merged.items():
        replace(module, path, Zero(full))
    setattr(module, ATTRIBUTE, surgery)
    return module


def remains(module: nn.Module, kept: list[str], first: nn.Module | None = None) -> nn.Module:
    """What is left of a module without its BatchNorm: an Identity, or those of its own modules that stay, with the module's hooks.

    first: what stands before those. Hooks find the module's own modules where they were: torch.ao's call a fake quantiser there.
    """
    children = dict(module.named_children())
    left = nn.Identity() if first is None else first
    if kept:
        before = [] if first is None else [(FIRST, first)]
        left = nn.Sequential(OrderedDict([*before, *((name, children[name]) for name in kept)]))
    for name, child in children.items() if module._forward_hooks or module._forward_pre_hooks else ():
        if name not in left._modules:
            left.add_module(name, child)
    left.train(module.training)
    return with_hooks(left, module)


def with_hooks(new: nn.Module, old: nn.Module) -> nn.Module:
    """The hooks of the module whose place the new one takes."""
    kinds = "forward_hooks forward_pre_hooks forward_hooks_with_kwargs forward_pre_hooks_with_kwargs forward_hooks_always_called"
    for name in [*kinds.split(), "backward_hooks", "backward_pre_hooks"]:
        setattr(new, f"_{name}", getattr(old, f"_{name}"))
    return new


def replace(root: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module in the place of another for whoever holds that, by a name or in a list of its own: the old one becomes the new one.

    Where Python can't change an object's class (it has slots, say), wherever it is registered.
    """
    old = _at(root, path)
    try:
        old.__class__ = type(new)
    except TypeError:
        for name, module in list(root.named_modules(remove_duplicate=False)):
            if module is old and name:
                setattr(*owner_of(root, name), new)
        return
    vars(old).clear()
    vars(old).update(vars(new))


def plain(module: nn.Module) -> nn.Module:
    """torch's own layer in the place of a subclass that computes its weight, with the same settings."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    kind = next(
        base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules.") and not base.__name__.startswith("_")
    )
    bias = getattr(module, "bias", None) is not None
    with torch.device("meta"):
        if kind is nn.Linear:
            made: nn.Module = nn.Linear(module.in_features, module.out_features, bias)  # type: ignore[arg-type]
        else:
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
            made = kind(**{name: getattr(module, name) for name in names}, bias=bias)
    made.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if isinstance(own := getattr(module, "bias", None), Tensor):
        made.bias = nn.Parameter(own.detach().clone(), own.requires_grad)
    made.train(module.training)
    return with_hooks(made, module)


def narrow(layer: nn.Module, sizes: Mapping[str, list[int]]) -> None:
    """Let a convolution or a linear layer have other channels, and another kernel. sizes: see `Surgery.narrowed`."""
    for name, size in sizes.items():
        if (old := layer._parameters.get(name)) is not None and [*old.shape] != size:
            layer._parameters[name] = nn.Parameter(old.detach().new_zeros(size), old.requires_grad)
    (groups,), (first, second, *_) = sizes["groups"], sizes["weight"]
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = first, second
        return
    made, read = (second * groups, first) if getattr(layer, "transposed", False) else (first, second * groups)
    settings = {name: tuple(sizes[name]) for name in ("stride", "padding", "dilation") if name in sizes}
    stated = {"out_channels": made, "in_channels": read, "groups": groups, "kernel_size": tuple(sizes["weight"][2:]), **settings}
    for name, value in stated.items():
        setattr(layer, name, value)


def fix(module: nn.Module, attribute: str, how: str) -> None:
    """Store the weight that a parametrization or a hook computes."""
    if how == "parametrization":
        _fix_parametrized(module, attribute)
    elif how == "pruning":
        prune.remove(module, attribute)  # type: ignore[no-untyped-call]
    elif how == "weight_norm":
        torch.nn.utils.remove_weight_norm(module, attribute)
    else:
        torch.nn.utils.remove_spectral_norm(module, attribute)
        hooks = module._load_state_dict_pre_hooks  # where torch's own function leaves one that asks for the old weights
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
                del hooks[key]


def _fix_parametrized(module: nn.Module, attribute: str) -> None:
    """Not by torch's own remove_parametrizations: it takes the weight from the class, which all copies of the module share."""
    value, cls = getattr(module, attribute).detach().clone(), type(module)
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    trained = [t for t in lists[attribute].parameters(recurse=False) if t.requires_grad]
    del lists[attribute]
    if len(lists):
        left = {name: each for name, each in vars(cls).items() if name not in (attribute, "__dict__", "__weakref__")}
        module.__class__ = type(cls.__name__, cls.__bases__, left)
    else:
        del module._modules["parametrizations"]
        module.__class__ = cls.__mro__[1]
    module.register_parameter(attribute, nn.Parameter(value, bool(trained)))


def owner_of(root: nn.Module, target: str) -> tuple[nn.Module, str]:
    """Whose attribute a qualified name is, and which."""
    path, _, attribute = target.rpartition(".")
    return _at(root, path), attribute


def _at(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise ModelError(f"the architecture has no module {path!r}, which the folded network had: is this the right one?") from None
