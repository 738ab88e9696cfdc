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
from typing import Any, TypeVar

from bnfold.errors import InputError
from bnfold.files import contents
from bnfold.report import Deployment, PipelineReport, Report
from bnfold.report.render import Row

T = TypeVar("T")
LONGEST = 1 << 26  # bytes of a report, beyond which it is none
TIMES, HARMLESS = 1.5, 1.0
ERRORS = 2.0  # standard errors of the difference by which accuracy may fall
RANK = {"equivalent": 0, "inconclusive": 1, "different": 2}


class Figures:
    """What is compared, of a report as JSON. Raises KeyError, TypeError, ValueError or AttributeError where it isn't one.

    levels: the verdict, and that of the two levels. rows: verdict and ratio by what was deployed; outputs likewise, where they were
    measured.
    """

    def __init__(self, found: dict[str, Any]) -> None:
        scores = found.get("accuracy_after")
        self.accuracy = None if scores is None else (_number(scores["accuracy"]), _number(scores["stderr"]))
        verdict = found["verify"] if found["schema"] == PipelineReport.schema else found
        self.levels: dict[str, str] = {}
        self.rows: dict[str, tuple[str, float]] = {}
        self.outputs: dict[str, tuple[str, float]] = {}
        if verdict is None:
            return
        if verdict["verdict"] not in RANK:
            raise ValueError(verdict["verdict"])
        self.levels["verdict"] = verdict["verdict"]
        for name, level in (("coefficients", "coefficients"), ("function, in float64", "function")):
            self.levels[name] = _text(verdict["levels"][level]["verdict"])
        for row in verdict["levels"]["deployment"]:
            precision = _text(row.get("precision", "full"))
            deployed = Deployment(_text(row["provider"]), _text(row["optimisation"]), _ratio(row["ratio"]), precision=precision)
            self.rows[deployed.name] = (_text(row["verdict"]), deployed.ratio)
        outputs = {_text(o["name"]): ("", _ratio(o["error_ratio"])) for o in verdict["outputs"]}
        self.outputs = outputs if not self.rows or any(ratio for _, ratio in self.rows.values()) else {}


class Baseline:
    """An earlier report in a file. Raises InputError where it can't be read or isn't one of this command's."""

    def __init__(self, path: Path, schema: str) -> None:
        self.path = path
        try:
            found = json.loads(contents(path, LONGEST, "the baseline"))
        except (ValueError, RecursionError):
            raise InputError(f"{path}: the baseline is not JSON; give a file that --report wrote") from None
        actual = found.get("schema") if isinstance(found, dict) else None
        if actual != schema:
            what = f"its schema is {actual}, not {schema}" if isinstance(actual, str) else "it has no schema"
            raise InputError(f"{path}: not a baseline for this command, for {what}; give a file that --report of the same command wrote")
        try:
            self.then = Figures(found)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path}: the baseline is damaged; give a file that --report wrote") from None

    def compare(self, report: Report) -> list[Row]:
        """A row for each thing compared: equivalent (no worse), worse, or skipped (new, or gone). InputError: nothing is the same."""
        now, then = Figures(report.to_dict()), self.then
        for what, ours, theirs in (("output", now.outputs, then.outputs), ("provider", now.rows, then.rows)):
            if ours and theirs and not ours.keys() & theirs.keys():
                raise InputError(
                    f"{self.path}: the baseline is for other rows: its {what}s are {_names(theirs)}, here they are {_names(ours)}; "
                    "compare like with like, or make a new one with --report"
                )
        found = list(_verdicts(now.levels, then.levels))
        if now.levels and then.levels:
            found += [*_ratios(now.rows, then.rows), *_ratios(now.outputs, then.outputs, "output ")]
        return found + list(_accuracy(now.accuracy, then.accuracy))


def _verdicts(now: Mapping[str, str], then: Mapping[str, str]) -> Iterator[Row]:
    yield from _new_or_gone("verdict", now or None, then or None)
    for name, one in now.items():
        other = then.get(name)
        if one in RANK and other in RANK:
            text = one if one == other else f"{one}, {other} in the baseline"
            yield Row("baseline", name, "worse" if RANK[one] > RANK[other] else "equivalent", reason=text)


def _ratios(now: Mapping[str, tuple[str, float]], then: Mapping[str, tuple[str, float]], what: str = "") -> Iterator[Row]:
    for name in [*now, *(name for name in then if name not in now)]:
        one, other = now.get(name), then.get(name)
        yield from _new_or_gone(what + name, one, other)
        if one is None or other is None:
            continue
        where = [where for where, (word, _) in (("here", one), ("in the baseline", other)) if word in ("skipped", "inconclusive")]
        if where:
            yield Row("baseline", what + name, "skipped", reason=f"not measured {' nor '.join(where)}")
            continue
        ratio, before = one[1], other[1]
        worse = ratio > HARMLESS and ratio > TIMES * before
        by = f", {ratio / before:.3g} times that" if worse and before and math.isfinite(ratio) else ""
        text = f"errs {ratio:.3g} times as much as the reference, {before:.3g} in the baseline{by}"
        yield Row("baseline", what + name, "worse" if worse else "equivalent", reason=text)


def _accuracy(now: tuple[float, float] | None, then: tuple[float, float] | None) -> Iterator[Row]:
    yield from _new_or_gone("accuracy", now, then)
    if now is not None and then is not None:
        allowed, fell = ERRORS * math.hypot(now[1], then[1]), then[0] - now[0]
        more = f": lower by {fell * 100:.2g} points, more than two standard errors ({allowed * 100:.2g})" if fell > allowed else ""
        text = f"{now[0]:.2%}, {then[0]:.2%} in the baseline{more}"
        yield Row("baseline", "accuracy", "worse" if fell > allowed else "equivalent", reason=text)


def _new_or_gone(name: str, now: T | None, then: T | None) -> Iterator[Row]:
    if (now is None) != (then is None):
        yield Row("baseline", name, "skipped", reason="gone: only in the baseline" if now is None else "new: not in the baseline")


def _names(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


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
