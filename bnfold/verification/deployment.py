"""Level 3 of `verify`: both models in their stored types on each provider, against the reference's float64 oracle (see `yardstick`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from bnfold.errors import DataError, UnsupportedError
from bnfold.report import Deployment
from bnfold.running import Runner

from .comparison import Comparison
from .noise import Errors
from .preconditions import unsteady
from .yardstick import DEPLOYED_LIMIT, HALF_LIMIT, Truth, chance, deployed_ratio

MOVES = {"Identity", "Move", "Crop", "Lookup"}  # what gives the numbers that it takes
STEADY = 100.0  # units of roundoff within which two runs of one model agree, whatever the order of their sums


class Deployments:
    """One row for each provider, precision and optimisation.

    ratios: the worst error of each output over the reference's; unsteady: why the reference is no function of its inputs, "" where it is.
    """

    def __init__(self, both: Comparison, truth: Truth | None, lacking: str) -> None:
        """truth: None where none can be had. lacking: why."""
        self.both, self.truth, self.lacking = both, truth, lacking
        self.limit = HALF_LIMIT if both.arithmetic > 2.0**-20 else DEPLOYED_LIMIT
        self.rows: list[Deployment] = []
        self.ratios: dict[str, float] = {}
        self.unsteady = ""

    @cached_property
    def _sigmoids(self) -> set[str]:
        """The outputs of which runtimes know no more than their distance from 1/2: far from 0 they give 0 or 1e-7 for a sigmoid of 4e-8."""
        try:
            outputs = dict(self.both.reference.plan().outputs)
        except UnsupportedError:
            return set()
        for name, value in outputs.items():
            while value.producer is not None and value.producer.op in MOVES:
                value = value.producer.inputs[0]
            outputs[name] = value
        return {name for name, value in outputs.items() if value.producer is not None and value.producer.label.lower() == "sigmoid"}

    def run(self, provider: str) -> None:
        """Add the rows of a provider. Where there are two precisions, the first decides, and the other is for the user to know."""
        first, *more = max((side.precisions(provider) for side in (self.both.candidate, self.both.reference)), key=len)
        self.rows += self._rows(provider, first)
        for precision in more:
            self.rows += map(_undecisive, Deployments(self.both, self.truth, self.lacking)._rows(provider, precision))

    def _rows(self, provider: str, precision: str) -> list[Deployment]:
        both, truth = self.both, self.truth
        rows = [Deployment(provider, option, 0.0, precision=precision, limit=self.limit) for option in both.candidate.optimisations]
        try:
            reference = both.reference.session(provider, both.reference.optimisations[0], precision=precision)
            if truth is None:
                raise UnsupportedError(self.lacking)
            both.progress(f"as deployed, {provider}", 0, None)
            own = truth.compare(reference.run)
        except (UnsupportedError, DataError) as error:
            return [dataclasses.replace(row, verdict="skipped", reason=str(error)) for row in rows]
        if reason := unsteady(reference.run, reference.run, truth, STEADY * both.arithmetic):
            self.unsteady = reason
            return [dataclasses.replace(row, verdict="inconclusive", reason=reason) for row in rows]
        return [self._row(truth, own, row) for row in rows]

    def _row(self, truth: Truth, own: Mapping[str, Errors], row: Deployment) -> Deployment:
        provider, option = row.provider, row.optimisation
        self.both.progress(f"as deployed, {provider}, optimisation {option}", 0, None)
        try:
            candidate = self.both.candidate.session(provider, option, precision=row.precision)
            errors = truth.compare(candidate.run)
        except (UnsupportedError, DataError) as error:
            reason = f"the reference runs, the candidate doesn't: {error}"
            row = dataclasses.replace(row, ratio=np.inf, verdict="different", reason=reason)
        else:
            row = dataclasses.replace(row, **self._judged(truth, errors, own), **_placed(candidate, provider))
        if row.verdict == "different" and option in self.both.reference.optimisations[1:]:
            return self._excused(truth, row)
        return row

    def _judged(self, truth: Truth, errors: Mapping[str, Errors], own: Mapping[str, Errors]) -> dict[str, Any]:
        """Of a row, what comes of the candidate's errors. own: the reference's."""
        worst, reason = 0.0, ""
        for name, each in errors.items():
            if own[name].problem:  # the reference itself doesn't give what it should there
                continue
            ratio = np.inf if each.problem else self._ratio(truth, name, each, own[name])
            self.ratios[name] = max(self.ratios.get(name, 0.0), ratio)
            if ratio > worst:
                worst = ratio
                reason = each.problem or f"output {name} errs {ratio:.3g} times as much as the reference (at most {self.limit:g})"
        broken = [each.problem for each in own.values() if each.problem]
        if len(broken) == len(own):
            return {"verdict": "inconclusive", "reason": f"the reference itself fails there: {broken[0]}"}
        return {"ratio": worst, **({"verdict": "different", "reason": reason} if worst > self.limit else {})}

    def _excused(self, truth: Truth, row: Deployment) -> Deployment:
        """Where the runtime's optimisation does as much harm to the reference, the candidate isn't to blame, and the row says nothing."""

        def run(side: Any) -> Any:
            try:
                return truth.compare(side.session(row.provider, row.optimisation, precision=row.precision).run)
            except (UnsupportedError, DataError) as error:
                return str(error)

        own, errors = run(self.both.reference), run(self.both.candidate)
        if isinstance(own, str) and isinstance(errors, str):
            refused = f"with it the runtime doesn't run the reference either ({own}): switch it off"
            return dataclasses.replace(row, verdict="skipped", reason=refused)
        if isinstance(own, str) or isinstance(errors, str):
            return row
        if any(each.problem or self._ratio(truth, name, each, own[name]) > self.limit for name, each in errors.items()):
            return row
        changes = f"the runtime's optimisation changes the reference itself by as much ({row.ratio:.3g} times its error without)"
        return dataclasses.replace(row, verdict="skipped", reason=f"{changes}: switch it off")

    def _ratio(self, truth: Truth, name: str, candidate: Errors, reference: Errors) -> float:
        noise, scale = truth.noise[name], truth.scale(name, self.both.arithmetic)
        if name in self._sigmoids:
            scale = dataclasses.replace(scale, floor=max(scale.floor, self.both.arithmetic / 2))
        ratio = deployed_ratio(candidate, reference, noise, scale)
        if ratio <= self.limit or candidate.problem:
            return ratio
        # In a deep network a few more roundings are no defect; few numbers, or those few of many that err (near a pole), err by chance.
        return deployed_ratio(candidate, reference, noise, scale, truth.roundings()) / chance(noise.spread or scale.count)


def _placed(runner: Runner, provider: str) -> dict[str, Any]:
    """Of a row, what its runner says of where it ran; asked for the CPU, there is nowhere else."""
    placement = getattr(runner, "placement", None)
    if placement is None or not placement.of:
        return {"share": 1.0} if provider == "cpu" else {}
    return {"share": placement.nodes / placement.of, "nodes": placement.nodes, "of": placement.of, "counted": placement.source}


def _undecisive(row: Deployment) -> Deployment:
    """A row that doesn't decide: what is wrong with it is said, and no more."""
    if row.verdict not in ("different", "inconclusive"):
        return row
    return dataclasses.replace(row, verdict="skipped", reason=f"{row.reason}; float32 in full decides, see the other rows")
