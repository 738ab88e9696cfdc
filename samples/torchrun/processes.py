"""Recalibration shared by several processes, which gives what one process gives.

    pip install torch onnxscript
    python samples/torchrun/processes.py [--processes N]

measures the BatchNorms of the digits sample in one process, then in N that torchrun starts (2 unless told otherwise), and compares the
statistics of both files. Half a minute or so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

DIGITS = Path(__file__).resolve().parents[1] / "digits"
METHODS = ("exact", "precise")


def recalibrated(out: Path, processes: int, method: str) -> dict[str, np.ndarray]:
    """Each BatchNorm's mean and variance, by name, as the command line measures them."""
    launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    data = ["--data", str(DIGITS / "calibration.npz"), "--method", method, "--batch-size", "24"]
    command = ["bnfold", "recalibrate", str(DIGITS / "digits.onnx"), *data, "-o", str(out), "--force", "-q"]
    subprocess.run([sys.executable, "-m", *launcher, *command], check=True, stdout=subprocess.DEVNULL)
    model = onnx.load(out)
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    return {name: arrays[name] for node in model.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:]}


def main(processes: int) -> dict[str, float]:
    """By method, the largest difference between the statistics of one process and of several, over the layer's largest."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            one, several = (recalibrated(Path(folder) / "fresh.onnx", number, method) for number in (1, processes))
            found[method] = max(float(np.abs(several[name] - one[name]).max() / np.abs(one[name]).max()) for name in one)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Recalibration by several processes.")
    parser.add_argument("--processes", type=int, default=2)
    number = parser.parse_args().processes
    print(f"| method | largest difference of {number} processes from one, over the layer's largest mean or variance |\n|---|--:|")
    for method, difference in main(number).items():
        print(f"| {method} | {difference:.1e} |")
