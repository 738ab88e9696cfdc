"""`bnfold fuse` against onnxslim and onnxsim on a ResNet-50 file of 100 MB: whole processes, in interleaved rounds.

    python -m tests.bench.fuse [--depth 50] [--exporter dynamo|torchscript] [--rounds 5]

Each round runs every command once, so that all see the same load of the machine; a ratio is the median of the rounds' ratios to
onnxslim, with its range. Time is the wall clock from start to exit, memory the largest resident set that the system saw (wait4; Linux
counts what this process holds when it starts another, so nothing large is imported here). Reading and writing the file with onnx alone is
the yardstick.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TARGETS = "at most 0.7 of onnxslim's time and 0.7 of its memory, and at least its folds"


class Run(NamedTuple):
    seconds: float
    megabytes: float


def commands(source: Path, folder: Path) -> dict[str, list[str]]:
    """What is run, by name; each writes the file of its name in the folder."""
    tools = Path(sys.executable).parent
    plain = "import onnx, sys; onnx.save(onnx.load(sys.argv[1]), sys.argv[2])"
    passed = "import sys; from bnfold.backends.onnx.files.load import load, save; save(load(sys.argv[1]), sys.argv[2], force=True)"

    def out(name: str) -> str:
        return str(folder / f"{name}.onnx")

    return {
        "onnxslim": [str(tools / "onnxslim"), str(source), out("onnxslim")],
        "bnfold": [sys.executable, "-m", "bnfold", "fuse", "--no-verify", str(source), "-o", out("bnfold"), "--force"],
        "onnxsim": [str(tools / "onnxsim"), str(source), out("onnxsim")],
        "onnx load+save": [sys.executable, "-c", plain, str(source), out("onnx load+save")],
        "bnfold load+save": [sys.executable, "-c", passed, str(source), out("bnfold load+save")],
    }


def measured(command: list[str]) -> Run:
    """Time and memory of a process. Raises RuntimeError where it fails."""
    silence = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_DUP2, 1, 2)]
    os.sync()  # bnfold waits until its file is on the disk; it needn't wait for the files that others left in the cache
    start = time.perf_counter()
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=silence)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return Run(seconds, usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10))


def batchnorms(path: Path) -> int:
    count = "import onnx, sys; print(sum(n.op_type == 'BatchNormalization' for n in onnx.load(sys.argv[1]).graph.node))"
    return int(subprocess.check_output([sys.executable, "-c", count, str(path)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--exporter", choices=["dynamo", "torchscript"], default="torchscript")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    made = subprocess.check_output([sys.executable, "-m", "tests.bench.models", str(args.depth), args.exporter], text=True)
    source = Path(made.splitlines()[-1])
    size = source.stat().st_size / 1e6
    print(
        f"ResNet-{args.depth} from torch's {args.exporter} exporter, {size:.0f} MB, {batchnorms(source)} BatchNorms; {args.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: command for name, command in commands(source, Path(folder)).items() if Path(command[0]).exists()}
        taken: dict[str, list[Run]] = {name: [] for name in runs}
        for i in range(args.rounds + 1):
            for name, command in runs.items():
                run = measured(command)
                if i:  # the first round fills the caches
                    taken[name].append(run)
        print(f"{'':18}{'seconds':>22}{'MB':>7}   {'time / onnxslim':>20}   {'memory / onnxslim':>20}   BatchNorms left")
        for name, of in taken.items():
            times, sizes = ([r[k] for r in of] for k in (0, 1))
            ratios = [_spread([r[k] / base[k] for r, base in zip(of, taken["onnxslim"], strict=True)]) for k in (0, 1)]
            left = batchnorms(Path(folder, f"{name}.onnx"))
            print(f"{name:18}{_spread(times):>22}{statistics.median(sizes):7.0f}   {ratios[0]:>20}   {ratios[1]:>20}   {left}")
    print(f"wanted of bnfold: {TARGETS}")


def _spread(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f}..{max(numbers):.2f})"


if __name__ == "__main__":
    main()
