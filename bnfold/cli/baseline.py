"""A verdict against an earlier one: what got worse, by more than noise.

A row is worse where its error ratio is above 1 and more than 1.5 times the baseline's. Up to 1 the candidate errs no more than the
reference itself, and there is nothing to complain of. The ratio of one pair of models on one machine repeats exactly; what moves it is
other data, and sums in another order, on other processors or by another release of the runtime. On the digits sample, over 25 draws of
random data and 15 parts of its images, the largest ratio of a row was at most 1.4 times its smallest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bnfold.errors import InputError
from bnfold.report import Accuracy, PipelineReport, Report, VerifyReport, deployment_name

from .render.rows import Row, levels, verified

TIMES, HARMLESS = 1.5, 1.0
ERRORS = 2.0  # standard errors of the difference by which accuracy may fall
RANK = {"equivalent": 0, "inconclusive": 1, "different": 2}


class Baseline:
    """An earlier report in a file. Raises InputError where it can't be read or isn't one of this command's."""

    def __init__(self, path: Path, schema: str) -> None:
        self.path = path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: the baseline can't be read ({error.strerror})") from None
        except (ValueError, RecursionError):
            raise InputError(f"{path}: the baseline is not JSON; give a file that --report wrote") from None
        actual = found.get("schema") if isinstance(found, dict) else None
        if actual != schema:
            what = f"its schema is {actual}, not {schema}" if isinstance(actual, str) else "it has no schema"
            raise InputError(f"{path}: not a baseline for this command, for {what}; give a file that --report of the same command wrote")
        try:
            self._read(found)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path}: the baseline is damaged; give a file that --report wrote") from None

    def _read(self, found: dict[str, Any]) -> None:
        """What is compared later, taken apart now, so that a damaged file shows before any work is done."""
        self.accuracy = _accuracy(found.get("accuracy_after"))
        verdict: dict[str, Any] | None = found["verify"] if found["schema"] == PipelineReport.schema else found
        self.verdict = None if verdict is None else _verdict(verdict["verdict"])
        self.levels: dict[str, str] = {}
        self.rows: dict[str, tuple[str, float]] = {}
        self.outputs: dict[str, float] = {}
        if verdict is None:
            return
        self.levels["coefficients"] = _text(verdict["levels"]["coefficients"]["verdict"])
        self.levels["function, in float64"] = _text(verdict["levels"]["function"]["verdict"])
        for row in verdict["levels"]["deployment"]:
            name = deployment_name(_text(row["provider"]), _text(row["optimisation"]), _text(row.get("precision", "full")))
            self.rows[name] = (_text(row["verdict"]), _ratio(row["ratio"]))
        measured = not self.rows or any(ratio for _, ratio in self.rows.values())
        self.outputs = {_text(o["name"]): _ratio(o["error_ratio"]) for o in verdict["outputs"]} if measured else {}

    def compare(self, report: Report) -> list[Row]:
        """A row for each thing compared: equivalent (no worse), worse, or skipped (new, or gone). InputError: nothing is the same."""
        return [*self._verdicts(verified(report)), *(self._accuracy(report) if isinstance(report, PipelineReport) else ())]

    def _verdicts(self, report: VerifyReport | None) -> Iterator[Row]:
        if report is None or self.verdict is None:
            if report is not None or self.verdict is not None:
                yield _skipped("verdict", "gone" if report is None else "new")
            return
        yield _ranked("verdict", report.verdict, self.verdict)
        for row in levels(report):
            if row.suite != "deployment" and {row.verdict, self.levels[row.name]} <= RANK.keys():
                yield _ranked(row.name, row.verdict, self.levels[row.name])
        rows = {row.name: row for row in report.levels.deployment}
        measured = not rows or any(row.ratio for row in rows.values())
        outputs = {output.name: output.error_ratio for output in report.outputs} if measured else {}
        for what, ours, theirs in (("output", outputs, self.outputs), ("provider", rows, self.rows)):
            if ours and theirs and not ours.keys() & theirs.keys():
                raise InputError(
                    f"{self.path}: the baseline is for other rows: its {what}s are {_some(theirs)}, here they are {_some(ours)}; "
                    "compare like with like, or make a new one with --report"
                )
        now = {name: (row.verdict, row.ratio) for name, row in rows.items()}
        yield from _ratios(now, self.rows)
        as_rows = [{f"output {name}": ("", ratio) for name, ratio in each.items()} for each in (outputs, self.outputs)]
        yield from _ratios(*as_rows)

    def _accuracy(self, report: PipelineReport) -> Iterator[Row]:
        now, then = report.accuracy_after, self.accuracy
        if now is None or then is None:
            if now is not then:
                yield _skipped("accuracy", "gone" if now is None else "new")
            return
        allowed = ERRORS * math.hypot(now.stderr, then.stderr)
        text = f"{now.accuracy:.2%}, {then.accuracy:.2%} in the baseline"
        worse = then.accuracy - now.accuracy > allowed
        more = f": lower by {(then.accuracy - now.accuracy) * 100:.2g} points, more than two standard errors ({allowed * 100:.2g})"
        yield Row("baseline", "accuracy", "worse" if worse else "equivalent", reason=text + more * worse)


def _ranked(name: str, now: str, then: str) -> Row:
    text = now if now == then else f"{now}, {then} in the baseline"
    return Row("baseline", name, "worse" if RANK[now] > RANK[then] else "equivalent", reason=text)


def _ratios(now: Mapping[str, tuple[str, float]], then: Mapping[str, tuple[str, float]]) -> Iterator[Row]:
    for name, (verdict, ratio) in now.items():
        if name not in then:
            yield _skipped(name, "new")
        elif unmeasured := [
            where for where, v in (("here", verdict), ("in the baseline", then[name][0])) if v in ("skipped", "inconclusive")
        ]:
            yield Row("baseline", name, "skipped", reason=f"not measured {' nor '.join(unmeasured)}")
        else:
            before = then[name][1]
            worse = ratio > HARMLESS and ratio > TIMES * before
            by = f", {ratio / before:.3g} times that" if worse and before and math.isfinite(ratio) else ""
            text = f"errs {ratio:.3g} times as much as the reference, {before:.3g} in the baseline{by}"
            yield Row("baseline", name, "worse" if worse else "equivalent", reason=text)
    for name in [name for name in then if name not in now]:
        yield _skipped(name, "gone")


def _skipped(name: str, why: str) -> Row:
    return Row("baseline", name, "skipped", reason={"new": "new: not in the baseline", "gone": "gone: only in the baseline"}[why])


def _some(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _accuracy(found: Any) -> Accuracy | None:
    if found is None:
        return None
    return Accuracy(_number(found["accuracy"]), _number(found["stderr"]), int(_number(found["samples"])))


def _verdict(found: Any) -> str:
    if found not in RANK:
        raise ValueError(found)
    return _text(found)


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError(found)
    return found


def _number(found: Any) -> float:
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise TypeError(found)
    return float(found)


def _ratio(found: Any) -> float:
    """A ratio; what JSON can't say is infinite."""
    return math.inf if found is None else _number(found)
