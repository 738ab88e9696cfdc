"""Where a verdict goes besides the terminal: files for CI, the summary and the annotations of a job on GitHub, an earlier report.

Against an earlier report, a row is worse where its error ratio is above 1 and more than 1.5 times the baseline's. Up to 1 the candidate
errs no more than the reference itself, and there is nothing to complain of. The ratio of one pair of models on one machine repeats exactly;
what moves it is other data, and sums in another order, on other processors or by another release of the runtime. On the digits sample, over
25 draws of random data and 15 parts of its images, the largest ratio of a row was at most 1.4 times its smallest.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bnfold.errors import CheckError, InputError
from bnfold.files import contents, ready_to_write, write_text
from bnfold.report import Deployment, PipelineReport, Report
from bnfold.report.render import Row, folded, rows, verified
from bnfold.text import printable

from .options import OUTPUT, rare

if TYPE_CHECKING:
    from bnfold.report.render import Part

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


# --- files, summaries and annotations ---------------------------------------------------------------------------------------------------


Say = Callable[[str], None]

DOUBTFUL = ("different", "inconclusive")


@dataclass(frozen=True)
class Checking:
    """Where a verdict goes besides."""

    junit: Path | None = rare("--junit", "Write the verdict as JUnit XML.", OUTPUT, "FILE.xml")
    markdown: Path | None = rare("--markdown", "Write the verdict as Markdown.", OUTPUT, "FILE.md")


class Check:
    """One run's. files: the models, of which the last is the one in question. strict: whether a BatchNorm that stays is a failure.

    baseline: an earlier report, read at once; with one, `verify` fails only where something got worse.
    """

    def __init__(
        self, command: str, where: Checking, *files: Path, force: bool, strict: bool = False, baseline: Path | None = None
    ) -> None:
        self.command, self.where, self.files, self.strict = command, where, [printable(str(path)) for path in files], strict
        ready_to_write({where.junit: [".xml"], where.markdown: [".md"]}, force=force, inputs=files)
        self.summary = os.environ.get("GITHUB_STEP_SUMMARY")
        self.baseline = None if baseline is None else Baseline(baseline, f"bnfold.{command}/1")
        self.compared: list[Row] = []
        self._given = False

    @property
    def pages(self) -> list[Path]:
        """The files that it writes."""
        return [path for path in (self.where.junit, self.where.markdown) if path is not None]

    # --- an earlier report ------------------------------------------------------------------------------------------------------

    def compare(self, report: Report) -> str:
        """What is worse than in the baseline, in one line; empty where nothing is. InputError: the two have nothing in common."""
        self.compared = [] if self.baseline is None else self.baseline.compare(report)
        found = "; ".join(f"{row.name}: {row.reason}" for row in self.worse)
        return f"worse than the baseline: {found}" if found else ""

    @property
    def worse(self) -> list[Row]:
        return [row for row in self.compared if row.verdict == "worse"]

    def outcome(self) -> list[str]:
        """What couldn't be compared, and how much is no worse."""
        if self.baseline is None:
            return []
        same = sum(row.verdict == "equivalent" for row in self.compared)
        skipped = [f"baseline: {row.name}: {row.reason}" for row in self.compared if row.verdict == "skipped"]
        return [*skipped, f"baseline: {same} of {len(self.compared)} rows are no worse than in {self.baseline.path}"]

    def status(self, status: int) -> int:
        """The exit status of `verify`, whose own is `status`."""
        return status if self.baseline is None else int(bool(self.worse))

    # --- files and annotations ---------------------------------------------------------------------------------------------------

    def finished(self, report: Report, say: Say) -> None:
        """Give out what a report says, whatever its verdict. say: told if the job summary, which nobody asked for, can't be written."""
        from bnfold.report.render.ci import on_github
        from bnfold.report.render.documents import summary

        self._given = True
        fused = folded(report)
        failed = fused.failure if fused is not None and self.strict else ""
        page = summary(self.command, self.files, report, self.compared, failed)
        self._write([*map(self._judged, rows(report)), *self.compared], page, report.seconds, say)
        if on_github():
            kept = fused.kept if fused is not None else ()
            stay = [(False, f"{layer.name or '(no name)'} stays", layer.reason or "it stays") for layer in kept]
            self._annotate([*([(True, "a BatchNorm stays", failed)] if failed else []), *self._verdict(report), *stay])

    def ended(self, error: Exception, say: Say) -> None:
        """The same for a run that an error ended before there was a report. What can't be written then is said too."""
        from bnfold.report.render.documents import failure

        if self._given:
            return
        text = str(error) if hasattr(error, "exit_status") else f"{type(error).__name__}: {str(error)[:300]}".rstrip(": ")
        row = Row("run", "run", "failed" if isinstance(error, CheckError) else "broken", reason=" ".join(text.split()))
        try:
            self._write([row], failure(self.command, self.files, row.reason), 0.0, say)
        except InputError as second:
            say(str(second))

    def _judged(self, row: Row) -> Row:
        """A row as the exit status has it: a BatchNorm that mustn't stay, or a difference that the baseline has too."""
        if self.strict and row.verdict == "kept":
            return dataclasses.replace(row, verdict="failed")
        if self._excused and row.verdict in DOUBTFUL:
            reason = f"{row.verdict}; see the baseline" + (f": {row.reason}" if row.reason else "")
            return dataclasses.replace(row, verdict="skipped", reason=reason)
        return row

    @property
    def _excused(self) -> bool:
        return self.command == "verify" and self.baseline is not None

    def _write(self, found: list[Row], page: list[Part], seconds: float, say: Say) -> None:
        from bnfold.report.render.ci import append, markdown

        if self.where.junit is not None:
            from bnfold.report.render.ci import junit

            write_text(self.where.junit, junit(self.command, Path(self.files[-1]).stem, found, seconds))
        if self.where.markdown is not None:
            write_text(self.where.markdown, markdown(page))
        if self.summary:
            try:
                append(Path(self.summary), page)
            except InputError as error:
                say(str(error))

    def _verdict(self, report: Report) -> list[tuple[bool, str, str]]:
        """Whether it is an error, title and text of what is to be said of the verdict, and of each row that got worse."""
        found, verdict = [], verified(report)
        if verdict is not None and verdict.verdict in DOUBTFUL:
            found.append((verdict.verdict == "different" and not self._excused, verdict.verdict, verdict.reason or verdict.verdict))
        return [*found, *((True, "worse than the baseline", f"{row.name}: {row.reason}") for row in self.worse)]

    def _annotate(self, found: Sequence[tuple[bool, str, str]]) -> None:
        """At most MOST annotations, of which one is left for an error that may come yet."""
        from bnfold.report.render.ci import MOST, annotate

        shown = found if len(found) < MOST else found[: MOST - 2]
        for wrong, title, text in shown:
            annotate("error" if wrong else "warning", f"{self.files[-1]}: {title}", text)
        if len(found) > len(shown):
            annotate("warning", f"{self.files[-1]}: more", f"{len(found) - len(shown):,} more findings; the report names them all")
