"""What an operator shows besides its coefficients: that it can't be folded, numbers that are none, a border, other settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from bnfold.algebra.graph import Node, Window
from bnfold.algebra.settings import differing, differing_moves, operator

from ..coefficients import type_of
from ..normal_form import Normal
from ..pairing import NORMALISES

SETTINGS = ("groups", "window", "x", "w", "y", "axis", "axes", "signs", "factors")  # they decide which places an operator reads


def refused(candidate: Normal, p: Node, q: Node, mixes: Callable[[], bool]) -> Iterator[str]:
    """A BatchNorm of the candidate that no fold takes. mixes: whether the value depends on its batch."""
    for node in (q, *(u for u, _ in q.output.users)):
        if _is_left(node) and not _is_left(p):
            why = str(node.attrs.get("why", ""))
            name = candidate.name_of(node)
            if "training" in why or "each batch by itself" in why:
                told = "; its output for one sample depends on the others in its batch" * mixes()
                yield f"training mode: BatchNorm {name} of the candidate normalises each batch by itself{told}"
            elif why:
                yield f"BatchNorm {name} of the candidate can't be used: {why}"


def _is_left(node: Node) -> bool:
    """Whether it is a BatchNorm that stays where it is."""
    return node.op == "Barrier" and node.label in NORMALISES


def not_finite(p: Node, q: Node) -> Iterator[str]:
    """Coefficients that are no numbers where the reference's are."""
    for node in (q, *(u for u, _ in q.output.users if u.op == "Affine")):
        for role, param in node.params.items():
            array = param.read()
            if not np.isfinite(array).all():
                at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
                mine = p.params.get(role)
                if mine is None or np.isfinite(mine.read()).all():
                    yield f"the candidate's {role} holds {array[at]} at ({', '.join(map(str, at))})"


def at_the_border(p: Node, name: str) -> Iterator[str]:
    """What explains a map that is right inside. name: of the BatchNorm."""
    if p.op == "Conv":
        of = f"BatchNorm {name}" if normaliser(p) is not None else "a BatchNorm"
        yield (
            f"padding: the map is off at its border alone, as where the shift of {of} in front is folded into a convolution "
            "that pads with zeros"
        )


def normaliser(p: Node) -> Node | None:
    """The BatchNorm in front of an operator."""
    before = p.inputs[0].producer if p.inputs else None
    return before if before is not None and "norm" in before.attrs else None


def another_operator(p: Node, q: Node) -> Iterator[str]:
    """Unless both are such as a fold makes of one another."""
    if p.op == q.op and (p.op != "Barrier" or operator(p) == operator(q)):
        return
    if (before := _behind(q, p)) is not None:
        yield f"the candidate has {q.label} {q.name} behind {before.label} {before.name}, which the reference hasn't"
    elif (before := _behind(p, q)) is not None:
        yield f"the candidate lacks {p.label} {p.name}, which the reference has behind {before.label} {before.name}"
    elif {p.op, q.op} != {"Contraction", "Affine"} and not (_holds(p) and _holds(q)):
        yield f"the candidate has {q.label} {q.name} where the reference has {p.label} {p.name}"


def _behind(extra: Node, other: Node) -> Node | None:
    """What stands before an operator that the other model lacks, if that is the other model's own."""
    before = extra.inputs[0].producer if len(extra.inputs) == 1 and not extra.params else None
    alike = before is not None and before.op == other.op and before.params.keys() == other.params.keys()
    return before if alike and before is not None and (before.op != "Barrier" or operator(before) == operator(other)) else None


def _holds(node: Node) -> bool:
    return node.op in ("Conv", "Contraction", "Affine") and bool(node.params)


def other_settings(p: Node, q: Node) -> Iterator[str]:
    """Of two operators of one kind."""
    if p.op != q.op:
        return
    for key in SETTINGS:
        if p.attrs.get(key) != q.attrs.get(key):
            yield f"the candidate's {q.label} {q.name} has other settings: {key} {_shown(q.attrs.get(key))} for {_shown(p.attrs.get(key))}"
    found, _ = differing_moves(p, q) if p.op == "Move" else differing(p, q)
    for each in found:
        yield f"other settings: {each.text}"


def narrower(reference: Normal, candidate: Normal) -> Iterator[str]:
    """Where the candidate computes in a type that holds less than the reference's."""
    one, other = (min(side.limits, default=np.inf) for side in (reference, candidate))
    if other < one:
        yield f"the candidate computes in {type_of(other)}, the reference in {type_of(one)}"


def _shown(value: object) -> str:
    if isinstance(value, Window):
        return f"(stride {value.stride}, dilation {value.dilation}, padding {value.before} and {value.after})"
    return str(value)
