"""How often `verify` passes a defect or takes a right fold for one, and how often what others use does.

    python -m tests.power [NAMES] [--results FILE.jsonl] [--seeds N] [--limit SECONDS] [--write-readme]

Each architecture runs in a process of its own. The results so far are kept in a file, so that a sweep goes on where it stopped.
Status 1 where `verify` errs: a right fold that it doesn't call equivalent, or a defect that it doesn't call different, unless this is
smaller than the stored type's rounding and the report's bound says so.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Iterable
from typing import Any

from sweeps import Result, in_a_process, options, publish, sweep

from tests.power.list import NAMES

HALF = ("float16", "bfloat16")
RIVALS = ("assert_close", "allclose 1e-3", "allclose", "Polygraphy")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
Run = dict[str, Any]


def main() -> int:
    parser = options("power", __doc__, limit=1800)
    parser.add_argument("--seeds", type=int, default=2, help="of weights, statistics and data")
    args = parser.parse_args()

    def measure(name: str) -> Result:
        return in_a_process(name, "tests.power.sweep", "--seeds", str(args.seeds), limit=args.limit, environment=ONE_THREAD)

    results = sweep(args.names or NAMES, args.results, measure, line)
    publish("power", table(results), in_readme=args.write_readme)
    wrong = [text for result in results for text in errors(result)]
    for text in wrong:
        print(text)
    return 1 if wrong else 0


def error(run: Run) -> bool:
    """Whether `verify` erred."""
    if run["kind"] == "right":
        return bool(run["verdict"] != "equivalent")
    return bool(run["kind"] == "defect" and run["verdict"] != "different" and not run["below"])


def errors(result: Result) -> list[str]:
    if "failed" in result:
        return [f"{result['name']}: not measured: {result['failed']}"]
    keys = ("route", "dtype", "seed", "kind", "what", "verdict", "reason")
    return [": ".join([result["name"], *(str(run[key]) for key in keys)]) for run in result["runs"] if error(run)]


def line(result: Result) -> str:
    kinds = collections.Counter(run["kind"] for run in result["runs"])
    wrong = sum(map(error, result["runs"]))
    return f"{result['name']}: {kinds['right']} right folds, {kinds['defect']} defects, {wrong} errors [{result['seconds']} s]"


# --- the table ------------------------------------------------------------------------------------------------------------------


def table(results: Iterable[Result]) -> str:
    """False alarms, then missed defects: of verify, and of the others on the same pairs."""
    measured = [result for result in results if "failed" not in result]
    runs = [run for result in measured for run in result["runs"]]
    head = ["| | runs | `bnfold verify` | found by level | " + " | ".join(RIVALS) + " |", "|---|--:|--:|---|" + "--:|" * len(RIVALS)]
    rows = [f"| **right folds called wrong** | | | |{' |' * len(RIVALS)}"]
    right = [run for run in runs if run["kind"] == "right"]
    for tool in dict.fromkeys(run["what"] for run in right):
        for dtype, some in _by_type([run for run in right if run["what"] == tool]):
            rows.append(_row(f"{tool}, {dtype}", some, error, "", lambda run, rival: run["rivals"][rival]))
    rows.append(_row("all", right, error, "", lambda run, rival: run["rivals"][rival]))
    rows.append(f"| **defects missed** | | | |{' |' * len(RIVALS)}")
    defects = [run for run in runs if run["kind"] == "defect"]
    for title in dict.fromkeys(run["what"] for run in defects):
        for dtype, some in _by_type([run for run in defects if run["what"] == title]):
            rows.append(_row(f"{title}, {dtype}", some, error, _levels(some), lambda run, rival: not run["rivals"][rival]))
    rows.append(_row("all", defects, error, _levels(defects), lambda run, rival: not run["rivals"][rival]))
    return "\n".join([*head, *rows])


def _by_type(runs: list[Run]) -> list[tuple[str, list[Run]]]:
    split = [("float32", [r for r in runs if r["dtype"] not in HALF]), ("half precision", [r for r in runs if r["dtype"] in HALF])]
    return [(name, some) for name, some in split if some]


def _row(title: str, runs: list[Run], wrong: Callable[[Run], bool], levels: str, alarm: Callable[[Run, str], bool]) -> str:
    others = [str(sum(alarm(run, rival) for run in runs)) for rival in RIVALS]
    below = sum(bool(run.get("below")) for run in runs)
    own = f"{sum(map(wrong, runs))}" + (f" (and {below} below rounding)" if below else "")
    return f"| {title} | {len(runs)} | {own} | {levels} | " + " | ".join(others) + " |"


def _levels(runs: list[Run]) -> str:
    """How often each level found the defect."""
    counts = collections.Counter(level for run in runs for level in run["levels"])
    names = {"interface": "0", "coefficients": "1", "function": "2", "deployment": "3"}
    return ", ".join(f"{number}: {counts[name]}" for name, number in names.items() if counts[name])


if __name__ == "__main__":
    sys.exit(main())
