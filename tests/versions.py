"""The versions that pyproject.toml promises, tried: an environment with the oldest and one with the newest of everything, for each Python.

    python -m tests.versions [--python 3.10 ...] [--end oldest|newest|both|pinned] [--torch] [--keep DIR]
    python -m tests.versions --shortest       the oldest end alone, with the oldest Python that is found

Each is made from the package index, in a folder that goes afterwards, with bnfold installed as a user does it; then the README's digits
pipeline runs in it, its options are held against those here, and the core of the tests runs. What some commands write has to be the same,
byte for byte, whatever the order of hashes and the number of threads, and with the pinned versions whatever the Python. The oldest is each
requirement's own bound, or the first release after it that has a wheel for that Python; what these require in turn is the newest that pip
takes. PyTorch is left out without --torch, since it takes gigabytes. Status 1 where anything fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
SHORT = ("algebra/test_affine", "algebra/test_rules", "folding/test_catalogue")
CORE = (
    *SHORT,
    "backends/onnx/test_bad_models",
    "backends/onnx/test_load_save",
    "cli/test_cli",
    "folding/test_branches",
    "recalibration/test_recalibrate",
    "verification/test_verify",
)
TORCH = (
    *(f"backends/torch/test_torch_{name}" for name in ("archive", "files", "fuse")),
    "cli/test_torch_cli",
    "verification/test_torch_verify",
)
RUNNERS = ("pytest>=8", "hypothesis>=6.100")  # for the tests; they are no promise of bnfold's
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)>=([0-9.]+)")
SAME = (  # commands, run in a folder, all of whose files are compared; of reports all but times, and of figures three digits
    "recalibrate {}/digits.onnx --data {}/calibration.npz -o fresh.onnx --report fresh.json",
    "recalibrate {}/digits.onnx --data {}/calibration.npz --method precise --shard 0/2 --stats part.npz",
    "fuse fresh.onnx -o fused.onnx --report fused.json",
)
SETTINGS = tuple({"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads} for seed, threads in (("0", "1"), ("1", "2"), ("random", "2")))
OPTIONS = """
import json
from bnfold.cli.commands import command_line
commands = command_line().commands
print(json.dumps({name: sorted(p.name for p in command.params) for name, command in commands.items()}, sort_keys=True))
"""


class Failed(Exception):
    """What an environment did wrong."""


def bounds(extra: str = "") -> dict[str, str]:
    """The lowest versions that pyproject.toml states, by name: of what bnfold needs, or of an extra."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf"^{extra or 'dependencies'} = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return dict(REQUIREMENT.findall(found[1]))


def interpreters() -> dict[str, str]:
    """The Pythons that are found here, the running one among them, by version."""
    found = {f"{sys.version_info.major}.{sys.version_info.minor}": sys.executable}
    for version in PYTHONS:
        managed = sorted(Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser().glob(f"versions/{version}.*/bin/python"))
        for candidate in (shutil.which(f"python{version}"), *map(str, managed)):
            if version not in found and candidate and _version(candidate) == version:
                found[version] = candidate
    return dict(sorted(found.items(), key=lambda entry: int(entry[0].partition(".")[2])))


def _version(python: str) -> str:
    code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"  # a shim of pyenv for a version that isn't set ends in an error
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


class Environment:
    """A virtual environment in a folder."""

    def __init__(self, python: str, folder: Path) -> None:
        self.folder = folder
        run([python, "-m", "venv", str(folder)])
        self.python, self.bnfold = str(folder / "bin" / "python"), str(folder / "bin" / "bnfold")

    def install(self, end: str, extra: str) -> None:
        """bnfold with the oldest or the newest of what it requires."""
        constraints = self.folder / "constraints.txt"
        constraints.write_text((ROOT / "tests" / "constraints.txt").read_text() if end == "pinned" else "")
        if end == "oldest":
            promised = {**bounds(), **(bounds(extra) if extra else {})}
            constraints.write_text("".join(f"{name}=={self._first(name, bound)}\n" for name, bound in promised.items()))
        target = f"{ROOT}[{extra}]" if extra else str(ROOT)
        self.pip("install", "-q", "--prefer-binary", "-c", str(constraints), target, *RUNNERS)

    def _first(self, name: str, bound: str) -> str:
        """The first release from a bound on that has a wheel for this Python."""
        listed = self.pip("index", "versions", name)
        found = re.search(r"^Available versions: (.*)$", listed, re.MULTILINE)
        releases = [version for version in (found[1].split(", ") if found else []) if re.fullmatch(r"[0-9.]+", version)]
        for version in sorted((version for version in releases if _parts(version) >= _parts(bound)), key=_parts):
            with contextlib.suppress(Failed):
                self.pip("install", "-q", "--dry-run", "--no-deps", "--only-binary", ":all:", f"{name}=={version}")
                return version
        raise Failed(f"no release of {name} from {bound} on has a wheel for this Python")

    def pip(self, *arguments: str) -> str:
        return run([self.python, "-m", "pip", "--disable-pip-version-check", *arguments])

    def versions(self) -> str:
        """What is installed of what bnfold requires."""
        listed = dict(line.split("==") for line in self.pip("list", "--format", "freeze").split() if line.count("==") == 1)
        wanted = {_plain(name) for name in (*bounds(), *bounds("torch"), "click")}
        return ", ".join(f"{name} {version}" for name, version in listed.items() if _plain(name) in wanted)


def _parts(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def run(command: Sequence[str], *, folder: str | Path = ROOT, **environment: str) -> str:
    """What a command prints. Failed with its last lines where it fails."""
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env={**here, **environment}, cwd=folder, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip() and not line.startswith("WARNING: ")][-15:]
        raise Failed("\n    ".join([f"status {done.returncode}: {' '.join(command)}", *said]))
    return done.stdout


def digits() -> list[str]:
    """The arguments of the README's first command."""
    found = re.search(r"<!-- first:.*?```sh\n.*?bnfold (pipeline .*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1].split()


def written(python: str, settings: Mapping[str, str]) -> dict[str, str]:
    """A digest of each file that the commands of SAME write."""
    samples = ROOT / "samples" / "digits"
    with tempfile.TemporaryDirectory() as folder:
        for command in SAME:
            run([python, "-m", "bnfold", *command.replace("{}", str(samples)).split()], folder=folder, **settings)
        for report in Path(folder).glob("*.json"):
            untimed = json.loads(
                report.read_text(),
                object_hook=lambda part: {k: v for k, v in part.items() if k != "seconds"},
                parse_float=lambda number: f"{float(number):.3g}",
            )
            report.write_text(json.dumps(untimed))
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(folder).iterdir())}


def same(python: str, want: Mapping[str, str]) -> str:
    """How many files are the same whatever the settings, and as they are wanted. Failed with the names of those that aren't."""
    for settings in SETTINGS:
        made = written(python, settings)
        want = want or made
        if differing := [name for name in {**made, **want} if made.get(name) != want.get(name)]:
            raise Failed(f"other bytes in {', '.join(differing)} with {settings}")
    return f"{len(want)} files the same"


def check(environment: Environment, names: Sequence[str], want: Mapping[str, str]) -> Iterator[str]:
    """What was tried, in a few words each. Failed where something is wrong."""
    *arguments, out = digits()
    with tempfile.TemporaryDirectory() as folder:
        run([environment.bnfold, *arguments, str(Path(folder, out))])
    yield "digits"
    if run([environment.python, "-c", OPTIONS]) != run([sys.executable, "-c", OPTIONS]):
        raise Failed("its commands have other options than here")
    for command in ("pipeline", "verify"):
        said = run([environment.bnfold, command, "--help"], COLUMNS="200")
        if not ("The model" in said and "--data" in said):
            raise Failed(f"bnfold {command} --help lacks the help of an argument, or an option")
    yield "options"
    yield same(environment.python, want)
    files = [f"tests/{name}.py" for name in names]
    tests = run([environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not at_once", *files])
    yield tests.strip().splitlines()[-1].strip("= ")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", choices=PYTHONS, help="repeatable; all that are found unless given")
    parser.add_argument("--end", choices=("oldest", "newest", "both", "pinned"), default="both")
    parser.add_argument("--torch", action="store_true", help="with PyTorch, and its tests")
    parser.add_argument("--shortest", action="store_true")
    parser.add_argument("--keep", type=Path, help="a folder for the environments, which then stay")
    args = parser.parse_args()

    found = interpreters()
    asked = args.python or list(found)
    failed = [f"Python {version}: not found here" for version in asked if version not in found]
    asked = [version for version in asked if version in found]
    names = SHORT if args.shortest else CORE
    if args.shortest:
        asked, args.end = asked[:1], "oldest"
    ends = ("oldest", "newest") if args.end == "both" else (args.end,)
    want = written(sys.executable, SETTINGS[0]) if args.end == "pinned" else {}
    for version, end in ((version, end) for version in asked for end in ends):
        began, title = time.perf_counter(), f"Python {version}, the {end} of everything"
        folder = Path(tempfile.mkdtemp(prefix="bnfold-")) if args.keep is None else args.keep / f"{version}-{end}"
        try:
            environment = Environment(found[version], folder)
            environment.install(end, "torch" if args.torch else "")
            print(f"{title}: {environment.versions()}", flush=True)
            done = ", ".join(check(environment, (*names, *(TORCH if args.torch else ())), want))
            print(f"    {done}; {time.perf_counter() - began:.0f} s", flush=True)
        except Failed as error:
            failed.append(f"{title}: {error}")
            print(f"{title}: FAILED\n    {error}", flush=True)
        finally:
            if args.keep is None:
                shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(asked) * len(ends)} environments, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
