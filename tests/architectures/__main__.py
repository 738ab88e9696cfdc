"""The sweep over real architectures.

    python -m tests.architectures [NAMES] [--results FILE.jsonl] [--limit SECONDS] [--write-readme]

Each architecture runs in a process of its own. The results so far are kept in a file, so that a sweep goes on where it stopped.
A criterion that fails ends in status 1: in float64 the outputs differ by at most 1e-9 in every route, in float32 the verdict is
`equivalent`, and all routes keep the same BatchNorms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARKS = ("<!-- architectures -->", "<!-- /architectures -->")
ROUTES = ("onnx", "torch", "pt2")
EXACT = 1e-9


def main() -> int:
    from .list import NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "bnfold-architectures.jsonl")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one architecture")
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    args = parser.parse_args()
    names = args.names or NAMES
    done = {each["name"]: each for each in map(json.loads, args.results.read_text().splitlines())} if args.results.exists() else {}
    for name in names:
        if name not in done or "failed" in done[name]:
            done[name] = one(name, args.limit)
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
    bad = [result["name"] for result in results if trouble(result)]
    print(f"{len(results) - len(bad)} of {len(results)} architectures meet every criterion" + (f"; not: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


def one(name: str, limit: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.architectures.sweep", name]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": f"it took more than {limit} s"}
    if found.returncode:
        return {"name": name, "failed": (found.stderr.strip().splitlines() or ["?"])[-1][:300]}
    result: dict[str, Any] = json.loads(found.stdout.strip().splitlines()[-1])
    return result


def trouble(result: dict[str, Any]) -> str:
    """The criterion that an architecture misses; "" if it meets all."""
    if "failed" in result:
        return str(result["failed"])
    if any(result[route]["kept"] != result["torch"]["kept"] for route in ROUTES):
        return "the routes keep different ones"
    if max(result[route]["error"] for route in ROUTES) > EXACT:
        return "not exact"
    return "" if result["verdict"] == "equivalent" else f"the verdict is {result['verdict']}: {result['reason']}"


def line(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"{result['name']}: FAILED: {result['failed']}"
    counts = ", ".join(f"{route} {result[route]['before']}->{result[route]['after']} ({result[route]['error']:.0e})" for route in ROUTES)
    return f"{result['name']}: {counts}; {result['verdict']} {trouble(result)} [{result['seconds']} s]"


def table(results: list[dict[str, Any]]) -> str:
    rows = ["| architecture | BatchNorms | stay | why | error in float64 | verdict in float32 |", "|---|--:|--:|---|--:|---|"]
    for result in results:
        if "failed" in result:
            rows.append(f"| {result['name']} | | | | | not measured: {str(result['failed']).replace('|', '/')} |")
            continue
        here = result["torch"]
        stay = " / ".join(dict.fromkeys(str(result[route]["after"]) for route in ROUTES))
        why = "; ".join(f"{n} x {text}" for text, n in here["reasons"].items())
        worst = max(result[route]["error"] for route in ROUTES)
        rows.append(f"| {result['name']} | {here['before']} | {stay} | {why} | {worst:.0e} | {result['verdict']} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
