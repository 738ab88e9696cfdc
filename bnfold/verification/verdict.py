"""What the three levels of `verify` come to, and the one sentence that says why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bnfold.report import Coefficients, Deployment, Function, Levels, OutputError, Verdict

from .coefficients import Correspondence
from .comparison import Comparison
from .determinism import EXACT, unsteady_oracle
from .function import Measured
from .inputs import another
from .preconditions import dead_layer, unreached
from .yardstick import FLOOR, Truth

FEW_NAMES = 3  # of BatchNorms, in a sentence


@dataclass(frozen=True)
class Findings:
    """What each level found. correspondence: None where level 1 was skipped; same: whether both sides are one model.

    measured: the outputs on level 2; ratios: on level 3; unsteady: why the reference is no function of its inputs there.
    """

    coefficients: Coefficients
    correspondence: Correspondence | None
    same: bool
    function: Function
    truth: Truth | None = None
    measured: Mapping[str, Measured] = field(default_factory=dict)
    rows: tuple[Deployment, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    unsteady: str = ""

    @property
    def levels(self) -> Levels:
        return Levels(self.coefficients, self.function, self.rows)

    @property
    def outputs(self) -> tuple[OutputError, ...]:
        return tuple(
            OutputError(name, m.tally.peak, m.error, self.ratios.get(name, 0.0 if self.rows else m.ratio))
            for name, m in self.measured.items()
        )


def verdict(both: Comparison, found: Findings) -> tuple[Verdict, str]:
    """The verdict and its reason. What nobody exercised isn't called equivalent."""
    function, truth = found.function, found.truth
    ran = {row.verdict for row in found.rows} - {"skipped"}
    doubtful = "different" in {function.verdict, *ran} or (both.thorough and not ran)
    if found.unsteady:
        return "inconclusive", found.unsteady
    if doubtful and truth is not None and truth.feeds and (reason := unsteady_oracle(both.reference, truth)):
        return "inconclusive", reason
    named = [(found.coefficients.verdict, found.coefficients.reason), (function.verdict, function.reason)]
    named += [(row.verdict, f"{row.name}: {row.reason}") for row in found.rows]
    for wanted in ("different", "inconclusive"):
        reasons = [reason for each, reason in named if each == wanted]
        if reasons:
            return wanted, "; ".join(filter(None, reasons[: 2 if _says_how(found) else 1]))
    if truth is None or not truth.feeds:
        return "inconclusive", "nothing was exercised: there are no samples"
    if not truth.feeds[0]:
        return "inconclusive", "nothing was exercised: the model has no inputs"
    certain = found.coefficients.verdict == "equivalent"
    if both.thorough and (reason := _constant(both, truth, certain=certain)):
        return "inconclusive", f"nothing was exercised: {reason}"
    if "equivalent" not in (function.verdict, *(row.verdict for row in found.rows)):
        return "inconclusive", f"neither model's outputs could be compared: {function.reason}"
    if both.thorough and found.same:
        return "inconclusive", summary(found)
    if both.thorough and not certain and (dead := dead_layer(both.reference, truth)):
        return "inconclusive", f"not all was exercised: on these data {dead} gives the same whatever it is fed"
    if both.thorough and not certain and (missed := _unreached(both, found, truth)):
        return "inconclusive", f"not all was exercised, and level 1 couldn't compare it: {missed}"
    return "equivalent", summary(found)


def _unreached(both: Comparison, found: Findings, truth: Truth) -> str:
    level = found.correspondence
    if level is None or level.graphs is None:
        return ""
    sides = (("reference", both.reference), ("candidate", both.candidate))
    for (which, side), graph, left in zip(sides, level.graphs, level.left, strict=True):
        if missed := unreached(side, graph, left, truth.feeds):
            return f"{missed} (in the {which})"
    return ""


def _says_how(found: Findings) -> bool:
    """Whether level 1 says what is otherwise, but not by how much it matters."""
    level = found.correspondence
    return found.coefficients.verdict == "different" and level is not None and (not level.mismatches or level.mismatches[0].setting)


def _constant(both: Comparison, truth: Truth, *, certain: bool) -> str:
    """How the reference answers one thing to everything. certain: whether the coefficients are known to be right.

    Then it is enough that the data reach the outputs at all, however little they do there.
    """
    if truth.constant(lambda batch: another(both.reference, batch), FLOOR if certain else EXACT):
        return "the reference answers the same whatever it is fed"
    if not certain and truth.constant(lambda batch: another(both.reference, batch), both.unit):
        return "the reference's answers differ by less than its stored type tells (saturated?)"
    return ""


def summary(found: Findings) -> str:
    """What was found where nothing is wrong."""
    coefficients, parts = found.coefficients, []
    if found.correspondence is not None and found.correspondence.unfolded:
        counted = f"the candidate has as many BatchNorms as the reference, {coefficients.batchnorms}"
        same = ", and is the same model: there is no fold to judge" if found.same else ""
        parts.append(f"nothing is folded: {counted}{same}")
    if coefficients.verdict == "equivalent" and not coefficients.checked:
        parts.append("no operator holds coefficients")
    elif coefficients.verdict == "equivalent":
        parts.append(f"{coefficients.checked} arrays are within {coefficients.worst:.2g} units of roundoff")
    elif coefficients.batchnorms:
        left = coefficients.uncertified
        names = f", not {', '.join(left[:FEW_NAMES])}{' ...' * (len(left) > FEW_NAMES)}" if left else ""
        counted = f"{coefficients.certified} of {coefficients.batchnorms} BatchNorms"
        parts.append(f"{counted} could be certified by their coefficients{names}")
    if found.measured:
        worst = max(found.measured.values(), key=lambda m: m.ratio)
        share = f" ({worst.yardstick:.0e} of the largest number)"
        parts.append(f"outputs differ by {worst.ratio:.2g} times what rounded weights explain{share}")
    if ratios := [row.ratio for row in found.rows if row.verdict == "equivalent"]:
        parts.append(f"deployed, the candidate errs at most {max(ratios):.2g} times as much as the reference")
    parts += dict.fromkeys(row.reason for row in found.rows if row.verdict == "skipped" and row.ratio)
    return "; ".join(parts)
