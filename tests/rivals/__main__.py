"""What bnfold and other tools leave of the BatchNorms in the same networks, what they get wrong, and what that takes.

    python -m tests.rivals [--count 12 | --models NAMES] [--cases 742] [--tools NAMES] [--limit SECONDS] [--jobs 1]

The networks: rows of the catalogue (`tests/cases`), drawn as ONNX files and, where PyTorch can say it, as modules; and architectures of
`tests/architectures`, as ONNX files and modules. Each tool runs in processes of its own: one for the rows of the catalogue, one for each
architecture. A row that ends the process, or takes longer than --limit, is a crash, and the next process goes on behind it. A tool whose
package isn't installed (`pip install '.[rivals]'`) is said so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from sweeps import ROOT, Result, publish

from .judge import names
from .tools import TOOLS

CRASHED, INVALID, WRONG = "crashed", "invalid", "wrong"


def run(tool: str, networks: Sequence[str], limit: int) -> Iterator[Result]:
    """What a tool makes of each network. limit: seconds for one of them."""
    waiting = list(networks)
    while waiting:
        command = [sys.executable, "-W", "ignore", "-m", "tests.rivals.tools", tool, *waiting]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            said: list[str] = []
            listening = threading.Thread(target=lambda lines, kept: kept.extend(lines), args=(process.stderr, said))
            listening.start()
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            while waiting:
                timer = threading.Timer(limit, process.kill)
                timer.start()
                line = next((line for line in lines if line.startswith("{")), "")
                timer.cancel()
                if not line:
                    break
                waiting.pop(0)
                yield json.loads(line)
            process.kill()
            listening.join()
        if waiting:
            why = f"more than {limit} s, or the process ended: {(said or ['no word'])[-1].strip()[:200]}"
            yield {"tool": tool, "name": waiting.pop(0), CRASHED: why, "seconds": 0.0, "megabytes": 0.0}


def file_of(name: str) -> str:
    """An architecture as an ONNX file with its BatchNorms, made once."""
    path = Path(tempfile.gettempdir(), "bnfold-rivals", f"{name}.onnx")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-W", "ignore", "-c", EXPORT, name, str(path)], cwd=ROOT, check=True, capture_output=True)
    return str(path)


EXPORT = """
import sys, onnx, torch, tests.architectures
from tests.architectures.list import make
from tests.power.models import exported
onnx.save(exported(*make(sys.argv[1]), torch.float32), sys.argv[2])
"""


def rows(tool: str, architectures: Sequence[str], cases: int, limit: int) -> tuple[list[Result], list[Result]]:
    """What came of the catalogue, and of the architectures."""
    of_modules = TOOLS[tool].of_modules
    found: tuple[list[Result], list[Result]] = [], []
    for result in run(tool, names(of_modules=of_modules)[:cases], limit):
        found[0].append(told(result))
    for name in architectures:
        found[1].extend(map(told, run(tool, [name if of_modules else file_of(name)], limit)))
    return found


def told(result: Result) -> Result:
    """A result, of which what is wrong is printed, unless it is that BatchNorms are left."""
    for trouble in (CRASHED, INVALID, WRONG):
        if trouble in result:
            print(f"{result['tool']}: {Path(result['name']).stem}: {trouble}: {result[trouble]}", file=sys.stderr, flush=True)
    return result


def line(tool: str, where: str, results: Sequence[Result]) -> str:
    """A row of the table. Where a tool fails, or its model is invalid, all BatchNorms count as left."""
    left = sum(r["before"] if CRASHED in r or INVALID in r else r["left"] for r in results)
    counts = " | ".join(str(sum(trouble in r for r in results)) for trouble in (WRONG, CRASHED, INVALID))
    most = "" if where == "catalogue" else f"{max(r['megabytes'] for r in results):.0f}"
    total = sum(r["before"] for r in results)
    return f"| {tool} | {where} | {len(results)} | {total} | {left} | {counts} | {sum(r['seconds'] for r in results):.1f} | {most} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.rivals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=12, help="of architectures: every so manieth, so that all families are among them")
    parser.add_argument("--models", nargs="*", help="architectures by their names, in the place of --count")
    parser.add_argument("--cases", type=int, default=10**6, help="at most so many rows of the catalogue")
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=list(TOOLS), metavar="TOOL", help=", ".join(TOOLS))
    parser.add_argument("--limit", type=int, default=120, help="seconds for one network")
    parser.add_argument("--jobs", type=int, default=1, help="tools at once")
    parser.add_argument("--write-readme", action="store_true", help="put the table into tests/README.md")
    args = parser.parse_args()
    chosen = args.models if args.models is not None else spread(args.count)
    table = ["| | of the | networks | BatchNorms | left | wrong | failed | invalid | CPU s | peak MB |", f"|---|---|{'--:|' * 8}"]
    here = [tool for tool in args.tools if find_spec(TOOLS[tool].package) is not None]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(here, pool.map(lambda tool: rows(tool, chosen, args.cases, args.limit), here), strict=True))
    all_rows = [(TOOLS[tool].of_modules, r) for tool, parts in found.items() for part in parts for r in part]
    known = {(kind, r["name"]): r["before"] for kind, r in all_rows if "before" in r}
    for kind, r in all_rows:
        r.setdefault("before", known.get((kind, r["name"]), 0))
    bad = 0
    for tool in args.tools:
        if tool not in found:
            table.append(f"| {tool} | not installed |{' |' * 8}")
            continue
        table += [line(tool, where, part) for where, part in zip(("catalogue", "architectures"), found[tool], strict=True) if part]
        if tool.startswith("bnfold"):
            bad += sum(any(trouble in r for trouble in (CRASHED, INVALID, WRONG)) for part in found[tool] for r in part)
    publish("rivals", "\n".join(table), in_readme=args.write_readme)
    print(f"bnfold: {bad} wrong, failed or invalid; architectures: {' '.join(chosen) or 'none'}")
    return 1 if bad else 0


def spread(count: int) -> list[str]:
    from architectures.list import NAMES

    return NAMES[:: max(1, len(NAMES) // count)][:count] if count else []


if __name__ == "__main__":
    sys.exit(main())
