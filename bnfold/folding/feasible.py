"""Whether a draft can be written: what sharing, integers and stored types allow."""

from __future__ import annotations

import numpy as np

from bnfold.algebra.affine import Affine, Array, Blocked, NoBias
from bnfold.algebra.blocks import measured
from bnfold.algebra.graph import Graph, Node, Param, Site
from bnfold.algebra.quantised import Rescaled, least, said_of_scale

Draft = dict[tuple[Node, str], Affine]


def checked(graph: Graph, site: Site, draft: Draft) -> Draft:
    """The draft without its empty updates; Blocked where it can't be written. The one place where sharing is decided.

    A weight that several operators use may change only if it changes alike for all of them, or if the front-end can give
    each its own copy, for which a constant operator isn't reason enough.
    """
    draft = {key: update for key, update in draft.items() if not _is_empty(key[0].params[key[1]], update)}
    for (node, role), update in draft.items():
        param = node.params[role]
        if node.attrs.get("grows_add") and role in ("bias", "beta") and _is_new(param) and not site.is_batchnorm:
            raise Blocked(f"{node.name} has no bias, and a constant operator isn't worth a new one")
        if param.refusal:
            raise (NoBias if role == "bias" else Blocked)(f"{node.name} has no {role}, and {param.refusal}")
        if graph.one_scale and node.attrs.get("scales_integers") and _becomes_several(param, update):
            raise Blocked(f"{node.name} is one scale, and {graph.one_scale}")
        if not (graph.copies_weights and site.is_batchnorm):
            _fits_sharers(node, role, draft)
        try:
            made = np.broadcast_shapes(update.shape, param.shape)
        except ValueError:
            made = None
        if made is None or (role == "weight" and made != param.shape):  # of operators that no data can pass
            raise Blocked(f"the map's coefficients don't fit the {role} of {node.name}, whose shape is {param.shape}")
        rescaled(graph, node, role, update)
        fits_type(node, role, param, update)
    return draft


def _fits_sharers(node: Node, role: str, draft: Draft) -> None:
    """Blocked unless all who read a parameter get it changed alike. One that isn't there yet is read wherever the layer's others are."""
    param, update = node.params[role], draft[node, role]
    if param.tensor is not None:
        name, uses = param.tensor.name, param.tensor.users
    else:
        name = f"the {role}"
        stored = [(other, each.tensor) for other, each in node.params.items() if each.tensor is not None]
        uses = [(user, role) for other, tensor in stored for user, theirs in tensor.users if theirs == other]
    for user, other in uses:
        twin = draft.get((user, other))
        if twin is None or user.params[other].layout.name != param.layout.name or not twin.same_as(update):
            raise Blocked(f"{name} of {node.name} is shared with {user.name}")


def _is_new(param: Param) -> bool:
    return param.tensor is None and param.update is None


def _is_empty(param: Param, update: Affine) -> bool:
    if _is_new(param):
        return bool((update(param.default) == param.default).all())
    return update.is_identity


def rescaled(graph: Graph, node: Node, role: str, update: Affine | None = None) -> Rescaled | None:
    """What its update, and one more, make of a quantised parameter; None where it isn't quantised, or is small and becomes floats.

    Blocked where its codes can't take the map. One scale becomes several along the operator's outputs alone: elsewhere no runtime
    computes with them.
    """
    param = node.params[role]
    total = param.update if update is None else param.updated(update)
    if param.tensor is None or total is None or (quantised := param.tensor.quantised) is None:
        return None
    try:
        if (factors := param.factors(total)) is None:
            raise Blocked("is quantised, and its integers take no shift")
        one_scale = graph.one_scale or ("" if _along_outputs(node, role, total) else "scales can't vary along the axis that is summed over")
        return quantised.rescaled(factors, one_scale)
    except Blocked as blocked:
        if quantised.small:
            return None
        raise Blocked(f"{param.tensor.name} {blocked}") from None


def said_of_integers(node: Node, param: Param, *, multiplied: bool = False) -> str:
    """What is to be said of the integers that a parameter scales, or is computed from, where it is rewritten, or multiplied by floats."""
    if node.attrs.get("scales_integers") and param.update is not None:
        return said_of_scale(node.name, grown=_becomes_several(param, param.update))
    tensor = param.tensor
    if tensor is None:
        return ""
    if tensor.quantised is not None:
        return f"{tensor.name}, which was stored as integers, becomes floats: a shift is no whole number of its steps"
    if multiplied:
        return f"{tensor.name} is multiplied by a factor for each channel, and none of the integers that it is computed from changes"
    return f"{tensor.name}, which was computed from integers, becomes floats" if tensor.integers else ""


def _becomes_several(param: Param, update: Affine) -> bool:
    return bool(param.shape.count(1) == len(param.shape) and update.varying)


def multiplied(param: Param) -> Array | None:
    """What an array that is computed from integers is multiplied by from now on; None where its update does more, or is of its size."""
    if param.tensor is None or not param.tensor.integers or param.update is None or (factors := param.factors(param.update)) is None:
        return None
    found = least(factors)
    return found if found.size < factors.size else None


def _along_outputs(node: Node, role: str, total: Affine) -> bool:
    """Whether a map varies only along those axes of a parameter that are the operator's outputs."""
    if role == "weight" and node.op == "Conv":
        return total.varying in ((), (0,))
    if role == "weight" and node.op == "Contraction":
        return all(node.attrs["w"][axis] in node.attrs["y"] for axis in total.varying)
    return True


def fits_type(node: Node, role: str, param: Param, update: Affine) -> None:
    """Blocked where a coefficient would overflow its stored type, or would be no number; a quantised one, that in which it is computed."""
    limit = node.attrs["limit"] if param.tensor is None else param.tensor.limit
    if param.tensor is not None and param.tensor.quantised is not None:
        limit = min(limit, node.attrs["limit"])
    total = param.updated(update)
    if param.tensor is not None and param.layout.linear:
        largest = measured(param, node.output_axes if role == "weight" else ()).largest.max(initial=0)
        bound = largest * np.abs(total.scale).max(initial=0) + np.abs(total.shift).max(initial=0)
        if bound < limit * param.layout.gain:
            return
    with np.errstate(all="ignore"):
        stored = param.layout.stored(total(param.original()))
    bad = ~(np.abs(stored) <= limit)
    if bad.any():
        name = param.tensor.name if param.tensor is not None else f"the {role} of {node.name}"
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        value = stored[where]
        what = "would be no number" if np.isnan(value) else f"would be {value:.3g}, beyond the largest {limit:.3g} of its type"
        raise Blocked(f"element {list(where)} of {name} {what}")
