"""What the three levels of `verify` come to, and the one sentence that says why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bnfold.report import Coefficients, Deployment, Function, Levels, OutputError, Verdict
from bnfold.report.words import facts

from .coefficients import Correspondence
from .comparison import Comparison
from .function import Deviation
from .inputs import sample_count
from .preconditions import constant, dead_layer, unreached, unsteady_oracle
from .yardstick import Truth


@dataclass(frozen=True)
class Findings:
    """What each level found. correspondence: None where level 1 was skipped; same: whether both sides are one model.

    ran: whether levels 2 and 3 were asked for. elsewhere: whether the two part at other sizes than those that were fed; notes: what
    couldn't be compared there. deviations: the outputs on level 2; ratios: on level 3; unsteady: why the reference is no function of its
    inputs there.
    """

    coefficients: Coefficients
    correspondence: Correspondence | None
    same: bool
    function: Function
    ran: bool = True
    elsewhere: bool = False
    notes: tuple[str, ...] = ()
    truth: Truth | None = None
    deviations: Mapping[str, Deviation] = field(default_factory=dict)
    rows: tuple[Deployment, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    unsteady: str = ""

    @property
    def certified(self) -> bool:
        """Whether level 1 has paired all of both networks, and every coefficient is right: then nothing depends on what data reach."""
        return self.coefficients.verdict == "equivalent" and not self.coefficients.uncertified

    @property
    def levels(self) -> Levels:
        return Levels(self.coefficients, self.function, self.rows)

    @property
    def samples(self) -> int:
        """How many were compared."""
        return sum(map(sample_count, self.truth.feeds)) - self.truth.copies if self.truth is not None else 0

    @property
    def outputs(self) -> tuple[OutputError, ...]:
        return tuple(
            OutputError(name, each.errors.peak, each.error, self.ratios.get(name, 0.0 if self.rows else each.ratio))
            for name, each in self.deviations.items()
        )

    def reason(self, verdict: Verdict) -> str:
        """Of the first level that came to a verdict, "" where none did; of the next one as well, where level 1 doesn't say how much."""
        found = [(self.coefficients.verdict, self.coefficients.reason), (self.function.verdict, self.function.reason)]
        found += [(row.verdict, f"{row.name}: {row.reason}") for row in self.rows]
        reasons = [reason for each, reason in found if each == verdict]
        level = self.correspondence
        how = level is not None and (not level.mismatches or level.mismatches[0].setting)
        return "; ".join(filter(None, reasons[: 2 if how and self.coefficients.verdict == "different" else 1]))


def verdict(both: Comparison, found: Findings) -> tuple[Verdict, str]:
    """The verdict and its reason."""
    if reason := inconclusive(both, found):
        return "inconclusive", reason
    if reason := found.reason("different"):
        return "different", reason
    return "equivalent", summary(found)


def inconclusive(both: Comparison, found: Findings) -> str:
    """Why nothing is concluded, "" where something is: the one place where that is decided.

    A difference counts unless the reference is no function of its inputs. What nobody exercised isn't called equivalent.
    """
    function, truth, different = found.function, found.truth, bool(found.reason("different"))
    levels = (function.verdict, *(row.verdict for row in found.rows))
    if not found.ran:
        if found.coefficients.verdict == "skipped":
            return found.coefficients.reason
        return summary(found) if found.same else ""
    if found.unsteady:
        return found.unsteady
    doubtful = "different" in levels or (both.thorough and not any(row.verdict != "skipped" for row in found.rows))
    if doubtful and truth is not None and truth.feeds and (reason := unsteady_oracle(both.reference, truth)):
        return reason
    if different or (not both.thorough and _certified(found)):
        return ""
    if reason := found.reason("inconclusive"):
        return reason
    if truth is None or not truth.feeds:
        return "nothing was exercised: there are no samples"
    if not truth.feeds[0]:
        return "nothing was exercised: the model has no inputs"
    certain = found.coefficients.verdict == "equivalent"
    if both.thorough and not found.certified and (reason := constant(both.reference, truth, both.unit, certain=certain)):
        return f"nothing was exercised: {reason}"
    if "equivalent" not in levels:
        return f"neither model's outputs could be compared: {function.reason}"
    if not both.thorough:
        return ""
    if found.same:
        return summary(found)
    if not certain and (dead := dead_layer(both.reference, truth)):
        return f"not all was exercised: on these data {dead} gives the same whatever it is fed"
    if not certain and (missed := _unreached(both, found, truth)):
        return f"not all was exercised, and level 1 couldn't compare it: {missed}"
    return ""


def _certified(found: Findings) -> bool:
    """Whether a fold through which no data could be run is known to be right by its coefficients alone, which is enough to write it."""
    truth = found.truth
    ran = truth is not None and bool(truth.feeds) and bool(truth.feeds[0])
    return not ran and found.certified and found.coefficients.certified > 0


def _unreached(both: Comparison, found: Findings, truth: Truth) -> str:
    sides = (("reference", both.reference), ("candidate", both.candidate))
    for (which, side), (graph, left) in zip(sides, found.correspondence.left if found.correspondence is not None else (), strict=False):
        if missed := unreached(side, graph, left, truth.feeds):
            return f"{missed} (in the {which})"
    return ""


def summary(found: Findings) -> str:
    """What was found where nothing is wrong."""
    parts, level = [], found.correspondence
    if level is not None and level.unfolded:
        counted = f"the candidate has as many BatchNorms as the reference, {found.coefficients.batchnorms}"
        parts.append(f"nothing is folded: {counted}{', and is the same model: there is no fold to judge' if found.same else ''}")
        if found.same:
            return parts[0]
    parts += [f"{what}: {text}" for what, text in facts(found.levels, found.outputs, found.samples, "")]
    if not found.ran and level is not None:
        parts.insert(-1, f"all {level.paired} operators are set alike")
    return "; ".join(parts)
