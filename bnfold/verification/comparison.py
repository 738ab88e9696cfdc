"""Two models, made comparable: called by the same names, and whether they take and give the same kinds of things at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from bnfold.data.spec import Port
from bnfold.errors import UnsupportedError, UsageError
from bnfold.model import Model
from bnfold.recalibration.plan import Progress
from bnfold.text import listed, meant


def silent(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody sees."""


@dataclass(frozen=True)
class Comparison:
    """One verification. made_up: whether the data are random, so that it isn't the models' fault if they don't fit.
    data: what they are. by_layer: whether every layer is compared, too.

    thorough: with several runs for the yardstick, and a look at whether the reference is a function of its inputs at all. brief: whether
    one sample does where level 1 answers for all: nobody asked for more, and each is large, so that it shows many roundings.
    """

    reference: Model
    candidate: Model
    made_up: bool
    thorough: bool = True
    brief: bool = False
    providers: tuple[str, ...] = ()
    data: str = ""
    by_layer: bool = False
    seed: int = 0
    progress: Progress = silent

    @property
    def unit(self) -> float:
        """Unit roundoff of the coarser of their types."""
        return max(self.reference.roundoff, self.candidate.roundoff)

    @property
    def arithmetic(self) -> float:
        """Unit roundoff of the coarsest type in which one of them computes."""
        return max(self.reference.arithmetic, self.candidate.arithmetic)

    def unrounded(self) -> Comparison | None:
        """The same of both models without the rounding of activations; None unless both round some."""
        reference, candidate = self.reference.unrounded(), self.candidate.unrounded()
        return None if reference is None or candidate is None else replace(self, reference=reference, candidate=candidate)

    @cached_property
    def depth(self) -> int:
        """How many linear operators of the reference stand behind each other; 1 where that can't be told."""
        try:
            return max(self.reference.plan().graph.depth(), 1)
        except UnsupportedError:
            return 1


Names = Mapping[str, str]  # of the candidate's, by the reference's


def alike(reference: Model, candidate: Model, inputs: Names | None = None, outputs: Names | None = None) -> tuple[Model, Model]:
    """Both models, made to speak of their inputs and outputs by the reference's names.

    inputs, outputs: which of the candidate's is which of the reference's, as far as a user says so; UsageError for names that aren't there.
    A wrong pair can't make two models equivalent that aren't, so the others pair by their names and, where these differ, by their places.
    """
    if reference.kind != candidate.kind:
        reference, candidate = reference.beside(candidate), candidate.beside(reference)
    mine, theirs = reference.ports(), candidate.ports()
    asked = (("input", 0, inputs or {}), ("output", 2, outputs or {}))
    names = [{**_asked(what, mine[i], theirs[i], given), **_paired(mine[i], theirs[i], given)} for what, i, given in asked]
    renamed = any(mine != theirs for each in names for mine, theirs in each.items())
    return reference, candidate.renamed(*names) if renamed else candidate


def _asked(what: str, mine: list[Port], theirs: list[Port], given: Names) -> Names:
    for which, ports, names in (("reference", mine, [*given]), ("candidate", theirs, [*given.values()])):
        known = [port.name for port in ports]
        if unknown := [name for name in names if name not in known]:
            raise UsageError(f"the {which} has no {what} {unknown[0]!r}; it has {listed(known)}{meant(unknown[0], known)}")
        if len(set(names)) < len(names):
            raise UsageError(f"one {what} of the {which} is named twice; name each once")
    return given


def _paired(mine: list[Port], theirs: list[Port], given: Names) -> dict[str, str]:
    """For each other name of the reference's the candidate's: the same where there is one, else what stands at its place of the rest."""
    mine = [port for port in mine if port.name not in given]
    theirs = [port for port in theirs if port.name not in given.values()]
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
    ports = (("input", mine[0], theirs[0], candidate.own_inputs), ("output", mine[2], theirs[2], candidate.own_outputs))
    for what, want, have, paired in ports:
        names, others = [port.name for port in want], [port.name for port in have]
        if reason := _missing(what, " is missing; the candidate has " + (", ".join(map(repr, others)) or "none"), want, have):
            return reason
        if more := set(others) - set(names):
            return f"the candidate has an {what} more, {min(more)!r}"
        if reference.kind == candidate.kind and names != others and not paired:
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
            notes.append(f"the candidate's {what}s have other names, and were paired: {pairs}")
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
