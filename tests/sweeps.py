"""What the sweeps over real architectures share: a process for each architecture, a file of the results so far, a table in tests/README.md.

A sweep that was interrupted goes on where it stopped, and what failed is tried again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]  # "name", and "failed" with the reason or what was measured


def options(package: str, about: str | None, limit: int) -> argparse.ArgumentParser:
    """Those of every sweep. package: its name within `tests`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / f"bnfold-{package}.jsonl")
    parser.add_argument("--limit", type=int, default=limit, help="seconds for one architecture")
    parser.add_argument("--write-readme", action="store_true", help="put the table into tests/README.md")
    return parser


def sweep(names: Iterable[str], file: Path, measure: Callable[[str], Result], line: Callable[[Result], str]) -> list[Result]:
    """The results of these architectures: those in the file, and the others measured, put there and printed. line: of what was measured."""
    done = {each["name"]: each for each in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    for name in names:
        if name not in done or "failed" in done[name]:
            done[name] = measure(name)
            with open(file, "a", encoding="utf-8") as results:
                results.write(json.dumps(done[name]) + "\n")
        failed = done[name].get("failed")
        print(line(done[name]) if failed is None else f"{name}: FAILED: {failed}", flush=True)
    return [done[name] for name in names]


def in_a_process(name: str, module: str, *arguments: str, limit: int, environment: Mapping[str, str] | None = None) -> Result:
    """What a module prints about one architecture as its last line, in JSON. limit: seconds."""
    command = [sys.executable, "-W", "ignore", "-m", module, name, *arguments]
    settings = os.environ | dict(environment or {})
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=settings)
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": f"it took more than {limit} s"}
    if found.returncode:
        return {"name": name, "failed": (found.stderr.strip().splitlines() or ["?"])[-1][:300]}
    result: Result = json.loads(found.stdout.strip().splitlines()[-1])
    return result


def publish(package: str, table: str, *, in_readme: bool) -> None:
    """Print the table, and put it between the package's marks in tests/README.md."""
    print("\n" + table)
    if not in_readme:
        return
    readme = ROOT / "tests" / "README.md"
    text = readme.read_text(encoding="utf-8")
    marks = f"<!-- {package} -->", f"<!-- /{package} -->"
    start, end = (text.index(mark) for mark in marks)
    readme.write_text(f"{text[:start]}{marks[0]}\n{table}\n{text[end:]}", encoding="utf-8")
