"""bnfold's commands on ONNX files against onnxslim and onnxsim: processor time and memory of whole processes, in interleaved rounds.

    python -m tests.bench.fuse [NAMES or FILES] [--rounds 5] [--only COMMAND ...]

A name is that of an architecture of `tests.architectures`, exported with its BatchNorms for samples of 3 x 224 x 224. Each round runs every
command once, so that all see the same load of the machine; a ratio is the median of the rounds' ratios. Time is user and system time with
one thread (OMP_NUM_THREADS=1), memory the largest resident set that the system saw (wait4; Linux counts what this process holds when it
starts another, so nothing large is imported here). Reading and writing the file with onnx alone is the floor.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

NAMES = ["resnet50", "mobilenet_v2", "densenet121", "convmixer_768_32", "efficientnet_b0"]
WANTED = {"fuse --no-verify": ("onnxslim", 0.6), "fuse": ("onnxsim", 1.0), "verify": ("onnxsim", 2.0)}  # at most, of whose time
FLOOR = "onnx load+save"


class Run(NamedTuple):
    seconds: float
    megabytes: float


def commands(source: Path, folder: Path) -> dict[str, list[str]]:
    """What is run, by name; each but the last writes the file of its name in the folder."""
    tools = Path(sys.executable).parent
    plain = "import onnx, sys; onnx.save(onnx.load(sys.argv[1]), sys.argv[2])"
    bnfold = [sys.executable, "-m", "bnfold"]

    def out(name: str) -> str:
        return str(folder / f"{name}.onnx")

    return {
        FLOOR: [sys.executable, "-c", plain, str(source), out(FLOOR)],
        "onnxslim": [str(tools / "onnxslim"), str(source), out("onnxslim")],
        "onnxsim": [str(tools / "onnxsim"), str(source), out("onnxsim")],
        "fuse --no-verify": [*bnfold, "fuse", "--no-verify", str(source), "-o", out("fuse --no-verify"), "--force"],
        "fuse": [*bnfold, "fuse", str(source), "-o", out("fuse"), "--force"],
        "verify": [*bnfold, "verify", str(source), out("fuse")],
    }


def measured(command: list[str]) -> Run:
    """Time and memory of a process. Raises RuntimeError where it fails."""
    silence = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_DUP2, 1, 2)]
    pid = os.posix_spawn(command[0], command, os.environ | {"OMP_NUM_THREADS": "1"}, file_actions=silence)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return Run(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[FLOOR, "onnxslim", "onnxsim", *WANTED], metavar="COMMAND")
    args = parser.parse_args()
    print("| network | MB | command | CPU s | peak MB | over the floor | over | time | memory | wanted |")
    print("|---|--:|---|--:|--:|--:|---|--:|--:|--:|")
    for name in args.names:
        made = [sys.executable, "-m", "tests.bench.models", name]
        source = Path(name) if name.endswith(".onnx") else Path(subprocess.check_output(made, text=True).splitlines()[-1])
        with tempfile.TemporaryDirectory() as folder:
            runs = {key: command for key, command in commands(source, Path(folder)).items() if key in args.only}
            taken: dict[str, list[Run]] = {key: [] for key in runs}
            for i in range(args.rounds + 1):
                for key, command in runs.items():
                    run = measured(command)
                    if i:  # the first round fills the caches
                        taken[key].append(run)
        table(source, taken)


def table(source: Path, taken: dict[str, list[Run]]) -> None:
    def ratio(key: str, other: str, of: int) -> str:
        if other not in taken:
            return ""
        found = [one[of] / base[of] for one, base in zip(taken[key], taken[other], strict=True)]
        return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"

    for key, runs in taken.items():
        seconds, megabytes = (statistics.median(column) for column in zip(*runs, strict=True))
        other, most = WANTED.get(key, ("", ""))
        figures = (f"{seconds:.2f}", f"{megabytes:.0f}", ratio(key, FLOOR, 0), other, ratio(key, other, 0), ratio(key, other, 1), most)
        print(f"| {source.stem} | {source.stat().st_size / 1e6:.0f} | {key} | {' | '.join(map(str, figures))} |", flush=True)


if __name__ == "__main__":
    main()
