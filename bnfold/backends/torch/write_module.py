"""Write a plan into a copy of the user's module: new tensors by their qualified names, and modules in the place of BatchNorms."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node as Op

from ...affine import Array
from ...graph import Graph, Node, Site
from ...merge import Merge
from ...rounding import lost, rounded
from .constants import Constants
from .lower import Lowering, Native
from .places import Place
from .removal import Removal, fills, unit_variance
from .surgery import Surgery, restructure
from .trace import NUMPY, duplicate, laid_out, to_tensor
from .walk import arguments, frame, writes_into_shared


def write_module(
    ctx: Lowering, module: nn.Module, graph: Graph, removed: Mapping[Site, Removal], merges: Sequence[Merge] = ()
) -> tuple[nn.Module, dict[Node, str], int]:
    """A folded copy of the module, a note for each node whose weights lost precision, and the bytes that untied weights add.

    Raises RuntimeError on an update that nothing here can write: it must never be lost.
    """
    result = duplicate(module)
    surgery = Surgery()
    notes: dict[Node, str] = {}
    made: dict[str, Tensor] = {}
    for node, role, param in graph.updates():
        native: Native = node.native
        slot = native.slots.get(role)
        if slot is None or not isinstance(slot.place, Place):
            raise RuntimeError(f"there is no way to write the {role} of {node.label} {node.name}")
        exact = param.layout.stored(as_called(param.read(), role, [m for m in merges if m.host is node]))
        dtype = native.dtype if param.tensor is None else param.tensor.dtype
        array = rounded(exact, NUMPY[dtype])
        if count := lost(exact, array):
            notes[node] = f"{count} of the {exact.size} coefficients of {node.name} are too small for {array.dtype}"
        place = slot.place
        if place.how == "plain":
            surgery.plain += [place.owner] * (place.owner not in surgery.plain)
            computed = ctx.const(arguments(native.op)["weight"])
            assert computed is not None
            made.setdefault(f"{place.owner}.weight", to_tensor(rounded(computed, NUMPY[native.dtype])))
        elif place.how != "stored" and param.tensor is not None:
            surgery.fixed[place.target] = place.how
        if param.tensor is None:
            surgery.biases[place.owner] = list(array.shape)
        made[place.target] = to_tensor(np.ascontiguousarray(array))
    for site, removal in removed.items():
        if removal.path is not None:
            surgery.replaced[removal.path] = list(removal.kept)
            if any(writes_into_shared(_output(node), node.native.operands[0]) for node in site.nodes):
                surgery.copied.append(removal.path)
    for m in merges:
        if m.branch is not None:
            surgery.merged[frame(m.branch.native.op)] = fills(m.add, m.kept_input)
    tied = _tied(module)
    before = list(result.state_dict())
    restructure(result, surgery)
    after = set(result.state_dict())
    for name in before:
        stands = re.sub(r"(?:(^|\.)parametrizations\.(\w+)\.original\d*|(^|\.)(\w+)_(?:g|v|u|orig))$", r"\1\2\3\4", name)
        surgery.keys[name] = name if name in after else stands if stands in after else None
    for target, tensor in made.items():
        _set(result, target, tensor)
    added = _tie_again(result, tied, made)
    for removal in removed.values():
        for call in removal.calls:
            _make_identity(ctx.constants, result, call)
    return result, notes, added


def as_called(exact: Array, role: str, merges: Sequence[Merge]) -> Array:
    """The coefficients with which a host gives the merged sum by way of the code, in which the additions stay.

    Branches that are modules give zeros there. A value that is added itself is still added, so the host goes without it.
    """
    for m in reversed(merges):
        signs = m.add.attrs.get("signs", (1, 1))
        if m.branch is None and role == "weight":
            exact = exact - signs[1 - m.kept_input] * m.delta
        exact = signs[m.kept_input] * exact
    return exact


def _output(node: Node) -> Op:
    native: Native = node.native
    return native.output if native.output is not None else native.op


def _tied(module: nn.Module) -> dict[str, str]:
    """For each name under which a parameter stands for at least the second time, the first."""
    first: dict[int, str] = {}
    named = ((name, first.setdefault(id(p), name)) for name, p in module.named_parameters(remove_duplicate=False))
    return {name: known for name, known in named if name != known}


def _tie_again(root: nn.Module, tied: Mapping[str, str], made: Mapping[str, Tensor]) -> int:
    """Let names that shared a parameter share the new one where it is the same for both; the bytes that the others add."""
    added = 0
    for name in made.keys() & tied.keys():
        first, tensor = tied[name], made[name]
        if first in made and made[first].shape == tensor.shape and torch.equal(made[first], tensor):
            owner, other = (root.get_submodule(Place(each).owner) for each in (name, first))
            owner._parameters[Place(name).attribute] = other._parameters[Place(first).attribute]
        else:
            added += tensor.nbytes
    return added


def _set(root: nn.Module, target: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, on its device and in its memory format; where others share it, for itself."""
    place = Place(target)
    owner = root.get_submodule(place.owner)
    old = getattr(owner, place.attribute)
    tensor = laid_out(tensor.to(old.device), old)
    if place.attribute in owner._buffers:
        owner._buffers[place.attribute] = tensor
    else:
        owner._parameters[place.attribute] = nn.Parameter(tensor, old.requires_grad)


def _make_identity(constants: Constants, root: nn.Module, call: Op) -> None:
    """Give a functional batch_norm parameters with which it does nothing."""
    given = arguments(call)
    for name, number in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", None)):
        stored = constants.stored(given[name])
        if stored is None:
            continue
        value = unit_variance(float(given["eps"]), stored.tensor.dtype) if number is None else torch.tensor(number)
        _set(root, stored.target, torch.full_like(stored.tensor.detach(), 0) + value.to(stored.tensor.dtype).to(stored.tensor.device))
