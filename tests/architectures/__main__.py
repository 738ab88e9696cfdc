"""The sweep over real architectures.

    python -m tests.architectures [NAMES] [--results FILE.jsonl] [--limit SECONDS] [--write-readme]

Each architecture runs in a process of its own. The results so far are kept in a file, so that a sweep goes on where it stopped.
A criterion that fails ends in status 1: in float64 the outputs differ by at most 1e-9 in every route, in float32 the verdict is
`equivalent` (`inconclusive` where nothing folds), and all routes keep the same BatchNorms, and none with `--lower mul-add`.
"""

from __future__ import annotations

import sys

from sweeps import Result, in_a_process, options, publish, sweep

ROUTES = ("onnx", "torch", "pt2")
EXACT = 1e-9


def main() -> int:
    from .list import NAMES

    args = options("architectures", __doc__, limit=600).parse_args()
    names = args.names or NAMES
    results = sweep(names, args.results, lambda name: in_a_process(name, "tests.architectures.sweep", limit=args.limit), line)
    publish("architectures", table(results), in_readme=args.write_readme)
    bad = [result["name"] for result in results if trouble(result)]
    print(f"{len(results) - len(bad)} of {len(results)} architectures meet every criterion" + (f"; not: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


def trouble(result: Result) -> str:
    """The criterion that an architecture misses; "" if it meets all."""
    if "failed" in result:
        return str(result["failed"])
    if any(result[route]["kept"] != result["torch"]["kept"] for route in ROUTES):
        return "the routes keep different ones"
    if any(result[route].get("lowered") for route in ROUTES):
        return "some stay with --lower mul-add"
    if max(result[route]["error"] for route in ROUTES) > EXACT:
        return "not exact"
    folds = any(result[route]["after"] < result[route]["before"] for route in ROUTES)
    expected = "equivalent" if folds else "inconclusive"  # of a model and itself there is nothing to say
    return "" if result["verdict"] == expected else f"the verdict is {result['verdict']}: {result['reason']}"


def line(result: Result) -> str:
    counts = ", ".join(f"{route} {result[route]['before']}->{result[route]['after']} ({result[route]['error']:.0e})" for route in ROUTES)
    return f"{result['name']}: {counts}; {result['verdict']} {trouble(result)} [{result['seconds']} s]"


def table(results: list[Result]) -> str:
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
