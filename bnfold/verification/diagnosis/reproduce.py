"""Run two parts of models on the same inputs and print how far they are apart: exit status 1 where it is further than rounding.

It needs numpy, and onnxruntime for .onnx, torch for .pt2. bnfold, which wrote it, isn't needed.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

# MODE: "values" compares the outputs; "runtime" those without and with ONNX Runtime's optimisation; "coefficients" what is stored.
# --- settings
MODE = "values"
REFERENCE: dict[str, Any] = {}
CANDIDATE: dict[str, Any] = {}
LIMIT = 0.0
UNIT = 0.0
# --- end of the settings


def run(path: Path, side: dict[str, Any], arrays: dict[str, Any], optimise: bool = False) -> Any:
    """The output of one part, in float64. Without optimisation a runtime computes what the file says."""
    feeds = {name: arrays[key].astype(kind) for name, (key, kind) in side["inputs"].items()}
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = session.run([side["output"]], feeds)[0]
    else:
        import torch

        module = torch.export.load(path).module()
        with torch.no_grad():
            found = module(*(torch.from_numpy(np.array(array)) for array in feeds.values()))[0].double().numpy()
    return found.astype(np.float64)


def outputs(folder: Path) -> bool:
    """Compare the outputs of both parts; whether they differ."""
    arrays = dict(np.load(folder / "inputs.npz"))
    one = run(folder / REFERENCE["file"], REFERENCE, arrays)
    other = run(folder / CANDIDATE["file"], CANDIDATE, arrays, optimise=MODE == "runtime")
    if one.shape != other.shape:
        print(f"the shapes differ: {one.shape} and {other.shape}")
        return True
    with np.errstate(all="ignore"):
        error = np.where(np.isfinite(one) & np.isfinite(other), np.abs(one - other), 0.0)
    error = np.where(np.isfinite(one) != np.isfinite(other), np.inf, error)
    at = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    print(f"outputs: {one[at]:.9g} and {other[at]:.9g} at {at}, off by {error[at]:.3g}")
    if MODE != "coefficients":
        print(f"more than {LIMIT:.3g} is no rounding")
    return bool(error[at] > LIMIT)


def coefficients(folder: Path) -> bool:
    """Compare what a right fold gives with what the candidate has, in units of roundoff; whether they differ."""
    stored, worst = np.load(folder / "coefficients.npz"), 0.0
    for role in ("weight", "bias"):
        want, have, size = (stored[f"{each}.{role}"] for each in ("expected", "found", "size"))
        units = np.abs(have - want) / (UNIT * np.maximum(size, np.finfo(np.float32).tiny))
        at = tuple(int(i) for i in np.unravel_index(int(units.argmax()), units.shape))
        print(f"{role}: {want[at]:.9g} and {have[at]:.9g} at {at}, off by {units[at]:.3g} units of roundoff")
        worst = max(worst, float(units[at]))
    print(f"more than {LIMIT:.3g} units are no rounding")
    return worst > LIMIT


def main() -> int:
    """The exit status."""
    folder = Path(__file__).resolve().parent
    differ = outputs(folder)
    if MODE == "coefficients":
        differ = coefficients(folder)
    print("different" if differ else "no difference")
    return int(differ)


if __name__ == "__main__":
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    sys.exit(main())
