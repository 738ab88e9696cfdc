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


@dataclass(frozen=True)
class Comparison:
    """One verification. made_up: whether the data are random, so that it isn't the models' fault if they don't fit.

    thorough: with several runs for the yardstick, and a look at whether the reference is a function of its inputs at all.
    """

    reference: Model
    candidate: Model
    progress: Progress
    made_up: bool
    thorough: bool = True

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
        by_name = {port.name: port for port in have}
        for port in want:
            if port.name not in by_name:
                return f"{what} {port.name!r} is missing; the candidate has {', '.join(map(repr, by_name)) or 'none'}"
            if reason := _ports(what, port, by_name[port.name]):
                return reason
        if more := by_name.keys() - {port.name for port in want}:
            return f"the candidate has an {what} more, {min(more)!r}"
        if reference.kind == candidate.kind and [port.name for port in want] != [port.name for port in have]:
            return f"the {what}s come in another order: {', '.join(port.name for port in have)}"
    defaults = {port.name: port for port in theirs[1]}
    for port in mine[1]:
        if port.name not in defaults:
            return f"input {port.name!r}, whose default callers may override, is missing"
        if reason := _ports("input", port, defaults[port.name]):
            return reason
    return ""


def interface_notes(reference: Model, candidate: Model) -> tuple[str, ...]:
    """What a caller of the candidate has to know, though it computes the same."""
    notes = []
    mine, theirs = reference.ports(), candidate.ports()
    for what, names, want, have in (
        ("input", candidate.own_inputs, mine[0], theirs[0]),
        ("output", candidate.own_outputs, mine[2], theirs[2]),
    ):
        said = {name: last_name(name) for pair in names.items() for name in pair}
        moved = [(name, other) for name, other in names.items() if name != other and not (said[name] and said[name] == said[other])]
        if moved and (len(names) > 1 or moved[0][0] != "output"):
            pairs = ", ".join(f"{name!r} with {other!r}" for name, other in moved)
            notes.append(f"the candidate's {what}s have other names, and are paired by their places: {pairs}")
        if [port.name for port in want] != [port.name for port in have]:
            order = ", ".join(names.get(port.name, port.name) for port in have)
            notes.append(f"the candidate's {what}s come in another order, and are paired by their names: {order}")
    by_name = {port.name: port.shape for port in theirs[0]}
    for port in mine[0]:
        axes = list(enumerate(zip(port.shape or (), by_name.get(port.name) or (), strict=False)))
        for fixed, opened, place in (("candidate", "reference", 1), ("reference", "candidate", 0)):
            known = [(axis, sizes[place], sizes[1 - place]) for axis, sizes in axes]
            found = [(axis, size) for axis, size, other in known if isinstance(size, int) and not isinstance(other, int)]
            if found:
                told = ", ".join(f"axis {axis} to {size}" for axis, size in found)
                notes.append(f"input {port.name!r} is open in the {opened}, and fixed in the {fixed}: {told}")
    return tuple(notes)


def _ports(what: str, want: Port, have: Port) -> str:
    if want.dtype != have.dtype:
        return f"{what} {want.name!r} is {have.dtype} instead of {want.dtype}"
    if want.shape is None or have.shape is None:
        return ""
    fixed = [isinstance(m, int) and isinstance(n, int) and m != n for m, n in zip(want.shape, have.shape, strict=False)]
    if len(want.shape) != len(have.shape) or any(fixed):
        texts = ["(" + ", ".join("?" if d is None else str(d) for d in shape) + ")" for shape in (have.shape, want.shape)]
        return f"{what} {want.name!r} has shape {texts[0]} instead of {texts[1]}"
    return ""
