"""How the inputs and outputs of two models correspond, whatever frameworks they come from."""

from __future__ import annotations

import re

from bnfold.model import Model, Port


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
