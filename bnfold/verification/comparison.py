"""Two models, made comparable: called by the same names, and whether they take and give the same kinds of things at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from bnfold.data.spec import Port
from bnfold.errors import UnsupportedError
from bnfold.model import Model

if TYPE_CHECKING:
    from bnfold.recalibration.protocol import Progress


def silent(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody sees."""


@dataclass(frozen=True)
class Comparison:
    """One verification. made_up: whether the data are random, so that it isn't the models' fault if they don't fit.

    thorough: with several runs for the yardstick, and a look at whether the reference is a function of its inputs at all.
    """

    reference: Model
    candidate: Model
    made_up: bool
    thorough: bool = True
    providers: tuple[str, ...] = ()
    seed: int = 0
    progress: Progress = silent

    @property
    def unit(self) -> float:
        """Unit roundoff of the coarser of their types."""
        return max(self.reference.roundoff, self.candidate.roundoff)

    @cached_property
    def depth(self) -> int:
        """How many linear operators of the reference stand behind each other; 1 where that can't be told."""
        try:
            return max(self.reference.plan().graph.depth(), 1)
        except UnsupportedError:
            return 1


def alike(reference: Model, candidate: Model) -> tuple[Model, Model]:
    """Both models, made to speak of their inputs and outputs by the reference's names."""
    mixed = reference.kind != candidate.kind
    if mixed:
        reference, candidate = reference.beside(candidate), candidate.beside(reference)
    names = [_paired(reference.ports()[i], candidate.ports()[i]) if i == 0 or mixed else {} for i in (0, 2)]
    renamed = any(mine != theirs for each in names for mine, theirs in each.items())
    return reference, candidate.renamed(*names) if renamed else candidate


def _paired(mine: list[Port], theirs: list[Port]) -> dict[str, str]:
    """For each name of the reference's the candidate's: the same where there is one, else what stands at the same place among the rest."""
    if len(mine) != len(theirs) or {port.name for port in mine} == {port.name for port in theirs}:
        return {}
    left, found = [port.name for port in theirs], {}
    for says in (_whole_name, last_name):
        ours, known = ([says(name) for name in names] for names in ([port.name for port in mine], [port.name for port in theirs]))
        for port, name in zip(mine, ours, strict=True):
            if port.name not in found and name and ours.count(name) == known.count(name) == 1:
                own = theirs[known.index(name)].name
                if own in left:
                    found[port.name] = own
                    left.remove(own)
    rest = [port.name for port in mine if port.name not in found]
    return found | dict(zip(rest, left, strict=True))


def _whole_name(name: str) -> str:
    """What a name says, without how a framework puts it; "" for a number, which says nothing."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.removeprefix("output.").lower()).strip("_")
    return "" if plain.replace("_", "").isdigit() or name == "output" else plain


def last_name(name: str) -> str:
    """The same of the last part, of what lies in another thing."""
    return _whole_name(re.split(r"[./]", name)[-1])


def interface_difference(reference: Model, candidate: Model) -> str:
    """How what callers see of the two differs, "" where it doesn't."""
    mine, theirs = reference.ports(), candidate.ports()
    for what, want, have in (("input", mine[0], theirs[0]), ("output", mine[2], theirs[2])):
        names, others = [port.name for port in want], [port.name for port in have]
        if reason := _missing(what, " is missing; the candidate has " + (", ".join(map(repr, others)) or "none"), want, have):
            return reason
        if more := set(others) - set(names):
            return f"the candidate has an {what} more, {min(more)!r}"
        if reference.kind == candidate.kind and names != others:
            return f"the {what}s come in another order: {', '.join(others)}"
    return _missing("input", ", whose default callers may override, is missing", mine[1], theirs[1])


def _missing(what: str, missing: str, want: list[Port], have: list[Port]) -> str:
    """What of the reference's the candidate lacks, or has of another type or shape."""
    by_name = {port.name: port for port in have}
    for port in want:
        other, name = by_name.get(port.name), f"{what} {port.name!r}"
        if other is None:
            return name + missing
        if port.dtype != other.dtype:
            return f"{name} is {other.dtype} instead of {port.dtype}"
        if port.shape is None or other.shape is None:
            continue
        fixed = [isinstance(m, int) and isinstance(n, int) and m != n for m, n in zip(port.shape, other.shape, strict=False)]
        if len(port.shape) != len(other.shape) or any(fixed):
            texts = ["(" + ", ".join("?" if d is None else str(d) for d in shape) + ")" for shape in (other.shape, port.shape)]
            return f"{name} has shape {texts[0]} instead of {texts[1]}"
    return ""


def interface_notes(reference: Model, candidate: Model) -> tuple[str, ...]:
    """What a caller of the candidate has to know, though it computes the same."""
    notes = []
    mine, theirs = reference.ports(), candidate.ports()
    for what, own, place in (("input", candidate.own_inputs, 0), ("output", candidate.own_outputs, 2)):
        names, others = [port.name for port in mine[place]], [port.name for port in theirs[place]]
        moved = [(name, other) for name, other in own.items() if name != other and (last_name(name) or "-") != last_name(other)]
        if moved and (len(own) > 1 or moved[0][0] != "output"):
            pairs = ", ".join(f"{name!r} with {other!r}" for name, other in moved)
            notes.append(f"the candidate's {what}s have other names, and are paired by their places: {pairs}")
        if names != others:
            order = ", ".join(own.get(name, name) for name in others)
            notes.append(f"the candidate's {what}s come in another order, and are paired by their names: {order}")
    shapes = {port.name: port.shape or () for port in theirs[0]}
    for port in mine[0]:
        for fixed, opened, sizes in (
            ("candidate", "reference", zip(shapes.get(port.name, ()), port.shape or (), strict=False)),
            ("reference", "candidate", zip(port.shape or (), shapes.get(port.name, ()), strict=False)),
        ):
            if found := [f"axis {i} to {n}" for i, (n, other) in enumerate(sizes) if isinstance(n, int) and not isinstance(other, int)]:
                notes.append(f"input {port.name!r} is open in the {opened}, and fixed in the {fixed}: {', '.join(found)}")
    return tuple(notes)
