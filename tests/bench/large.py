"""Time and memory of the commands on an ONNX model of some gigabytes, whose weights lie in several files.

    python -m tests.bench.large [--gigabytes 2] [--files 4] [--rounds 3] [--only fuse,verify] [--folder FOLDER]

Convolutions with a BatchNorm behind each. Time is that of a whole process, in interleaved rounds with copying the model's files and
waiting until they are on the disk; memory the largest that the process had of its own (RssAnon: without the files that it maps), over that
of the same command on a model of one layer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

CHANNELS, KERNEL = 512, 3  # 9 MiB a weight

EVERY = 40
POLL = 0.01  # seconds


def draw(folder: Path, gigabytes: float, files: int) -> Path:
    """The model; the largest weight has 144 MiB."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    parts = [open(folder / f"weights{i}.bin", "wb") for i in range(files)]  # noqa: SIM115 - closed below
    nodes, stored, written, layer, x = [], [], 0, 0, "x"
    while written < gigabytes * 1e9 or not layer:
        wide = layer % EVERY == EVERY - 1
        shape = (CHANNELS, CHANNELS, KERNEL, KERNEL) if not wide else (CHANNELS, CHANNELS, 3 * KERNEL + 3, 3 * KERNEL + 3)
        weight = rng.standard_normal(shape, dtype=np.float32)
        weight *= np.float32(2 / weight[0].size) ** 0.5
        file = parts[layer % files]
        tensor = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", Path(file.name).name), ("offset", file.tell()), ("length", weight.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        file.write(weight.tobytes())
        stored.append(tensor)
        norm = [
            rng.uniform(0.5, 1.5, CHANNELS),
            rng.normal(0, 0.1, CHANNELS),
            rng.normal(0, 0.1, CHANNELS),
            rng.uniform(0.5, 1.5, CHANNELS),
        ]
        stored += [numpy_helper.from_array(a.astype(np.float32), f"n{layer}.{i}") for i, a in enumerate(norm)]
        nodes.append(helper.make_node("Conv", [x, f"w{layer}"], [f"c{layer}"], f"conv{layer}", auto_pad="SAME_UPPER"))
        nodes.append(helper.make_node("BatchNormalization", [f"c{layer}", *(f"n{layer}.{i}" for i in range(4))], [f"b{layer}"]))
        nodes.append(helper.make_node("Relu", [f"b{layer}"], [f"r{layer}"]))
        x, written, layer = f"r{layer}", written + weight.nbytes, layer + 1
    for part in parts:
        part.close()
    ends = [helper.make_tensor_value_info(name, 1, ["N", CHANNELS, 2, 2]) for name in ("x", x)]
    model = helper.make_model(helper.make_graph(nodes, "large", ends[:1], ends[1:], stored), opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def copied(source: Path, folder: Path) -> float:
    """Seconds to copy the model's files, until they are on the disk."""
    start = time.perf_counter()
    for file in source.parent.iterdir():
        shutil.copyfile(file, folder / file.name)
        with open(folder / file.name, "r+b") as made:
            os.fsync(made.fileno())
    return time.perf_counter() - start


def run(*arguments: str | Path) -> tuple[float, float]:
    """Seconds and largest RssAnon, in MiB, of a command. Raises RuntimeError where it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "bnfold", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    largest = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        largest = max(largest, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
        time.sleep(POLL)
    seconds = time.perf_counter() - start
    if process.wait():
        raise RuntimeError(f"{' '.join(map(str, arguments))} ended with status {process.returncode}")
    return seconds, largest / 1024


def commands(model: Path, out: Path) -> dict[str, tuple[str | Path, ...]]:
    """What is run, in order: verify takes what fuse made."""
    data = model.parent / "data.npy"
    if not data.exists():
        np.save(data, np.random.default_rng(0).standard_normal((8, CHANNELS, 2, 2), dtype=np.float32))
    return {
        "inspect": ("inspect", model),
        "fuse --no-verify": ("fuse", model, "-o", out / "fused.onnx", "--no-verify", "--force"),
        "fuse": ("fuse", model, "-o", out / "fused.onnx", "--force"),
        "verify --coefficients-only": ("verify", model, out / "fused.onnx", "--coefficients-only"),
        "verify": ("verify", model, out / "fused.onnx"),
        "recalibrate": ("recalibrate", model, "--data", data, "-o", out / "fresh.onnx", "--force"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--folder", type=Path, help="where the files go; by default a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    for name in ("large-out", "small-out", "copy"):
        (folder / name).mkdir()
    model, small = draw(folder / "large", args.gigabytes, args.files), draw(folder / "small", 0, 1)
    wanted = args.only.split(",") if args.only else list(commands(small, folder))
    chosen = {name: command for name, command in commands(model, folder / "large-out").items() if name in wanted}
    at_rest = {name: run(*command)[1] for name, command in commands(small, folder / "small-out").items() if name in chosen}
    copies: list[float] = []
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for _ in range(args.rounds):
        for name, command in chosen.items():
            copies.append(copied(model, folder / "copy"))
            taken[name].append(run(*command))
    copy = statistics.median(copies)
    size = sum(file.stat().st_size for file in model.parent.iterdir())
    print(f"{size / 1e9:.2f} GB in {args.files} files, copied in {copy:.1f} s ({min(copies):.1f} to {max(copies):.1f})")
    print("| command | seconds | times the copy | memory of its own, MiB | over a small model's |\n|---|--:|--:|--:|--:|")
    for name, runs in taken.items():
        seconds, own = statistics.median(each for each, _ in runs), max(each for _, each in runs)
        print(f"| {name} | {seconds:.1f} | {seconds / copy:.2f} | {own:.0f} | {own - at_rest[name]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
