"""How often `verify` passes a defect or takes a right fold for one, and how often what others use does.

    python -m tests.power [NAMES] [--results FILE.jsonl] [--seeds N] [--limit SECONDS] [--write-readme]

Each architecture runs in a process of its own. The results so far are kept in a file, so that a sweep goes on where it stopped.
Status 1 where `verify` errs: a right fold that it doesn't call equivalent, or a defect that it doesn't call different, unless this is
smaller than the stored type's rounding and the report's bound says so.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARKS = ("<!-- power -->", "<!-- /power -->")
HALF = ("float16", "bfloat16")
RIVALS = ("assert_close", "allclose 1e-3", "allclose", "Polygraphy")
Run = dict[str, Any]


def main() -> int:
    from .list import NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "bnfold-power.jsonl")
    parser.add_argument("--seeds", type=int, default=2, help="of weights, statistics and data")
    parser.add_argument("--limit", type=int, default=1800, help="seconds for one architecture")
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    args = parser.parse_args()
    names = args.names or NAMES
    done = {each["name"]: each for each in map(json.loads, args.results.read_text().splitlines())} if args.results.exists() else {}
    for name in names:
        if name not in done or "failed" in done[name]:
            done[name] = one(name, args.seeds, args.limit)
            with open(args.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(done[name]) + "\n")
        print(line(done[name]), flush=True)
    results = [done[name] for name in names]
    print("\n" + table(results))
    if args.write_readme:
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        start, end = (text.index(mark) for mark in MARKS)
        readme.write_text(text[: start + len(MARKS[0])] + "\n" + table(results) + "\n" + text[end:], encoding="utf-8")
    wrong = [text for result in results for text in errors(result)]
    for text in wrong:
        print(text)
    return 1 if wrong else 0


def one(name: str, seeds: int, limit: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.power.sweep", name, "--seeds", str(seeds)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = os.environ | one_thread | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": f"it took more than {limit} s"}
    if found.returncode:
        return {"name": name, "failed": (found.stderr.strip().splitlines() or ["?"])[-1][:300]}
    result: dict[str, Any] = json.loads(found.stdout.strip().splitlines()[-1])
    return result


def error(run: Run) -> bool:
    """Whether `verify` erred."""
    if run["kind"] == "right":
        return bool(run["verdict"] != "equivalent")
    return bool(run["kind"] == "defect" and run["verdict"] != "different" and not run["below"])


def errors(result: dict[str, Any]) -> list[str]:
    if "failed" in result:
        return [f"{result['name']}: not measured: {result['failed']}"]
    keys = ("route", "dtype", "seed", "kind", "what", "verdict", "reason")
    return [": ".join([result["name"], *(str(run[key]) for key in keys)]) for run in result["runs"] if error(run)]


def line(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"{result['name']}: FAILED: {result['failed']}"
    kinds = collections.Counter(run["kind"] for run in result["runs"])
    wrong = sum(map(error, result["runs"]))
    return f"{result['name']}: {kinds['right']} right folds, {kinds['defect']} defects, {wrong} errors [{result['seconds']} s]"


# --- the table ------------------------------------------------------------------------------------------------------------------


def table(results: Iterable[dict[str, Any]]) -> str:
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
