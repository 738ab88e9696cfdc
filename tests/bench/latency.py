"""One sample at a time through what went in, what bnfold makes of it, and what other tools make of it, in interleaved rounds.

    python -m tests.bench.latency [NAMES] [--runtimes onnxruntime,openvino,eager,compile] [--threads 1,2] [--rounds 15] [--size 224]

A ratio is a tool's time over bnfold's, so that above 1 bnfold's is the faster one: the median of the rounds' ratios, with its 95 %
interval by a bootstrap over rounds. In a round every model runs for at least 20 ms, in an order that turns. ONNX Runtime as it is by
default, with new sessions for each round, since its optimiser puts the operators of one file into another order each time; its offline
file is what it writes with all optimisations on. Status 1 where all of an interval lies below 0.98. The tools that
aren't installed (`pip install '.[rivals]'`) are left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from tests.architectures.list import make
from tests.power.models import exported
from tests.rivals.tools import by_fx, by_onnxsim, by_onnxslim, by_runtime, own, silent

NAMES = """
mobileone_s0 mobileone_s1 repvgg_a0 fastvit_t8 repvit_m0_9 repghostnet_050 ghostnet_100 resnet18 resnet50 mobilenet_v2
mobilenet_v3_large efficientnet_b0 densenet121 shufflenet_v2_x1_0 regnet_y_400mf levit_128s
""".split()  # noqa: SIM905 - a list of names reads best without quotes
FILES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bnfold": ("bnfold", own),
    "what went in": ("bnfold", lambda model: model),
    "onnxsim": ("onnxsim", by_onnxsim),
    "onnxslim": ("onnxslim", by_onnxslim),
    "ONNX Runtime, offline": ("onnxruntime", by_runtime("ALL")),
}
RUNTIMES = ("onnxruntime", "openvino", "eager", "compile")
FLOOR, ROUND = 0.98, 0.02
Calls = dict[str, Callable[[], object]]


def onnx_calls(runtime: str, files: Mapping[str, Path], x: torch.Tensor, threads: int) -> Calls:
    def call(path: Path) -> Callable[[], object]:
        if runtime == "openvino":
            import openvino

            settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
            request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
            return lambda: request.infer([x.numpy()])
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": x.numpy()})

    ours = {name: path for name, path in files.items() if runtime == "onnxruntime" or "Runtime" not in name}  # its own operators are in it
    return {name: call(path) for name, path in ours.items()}


def torch_calls(runtime: str, module: torch.nn.Module, x: torch.Tensor, threads: int) -> Calls:
    torch.set_num_threads(threads)
    calls: Calls = {}
    for name, fold in {"bnfold": own, "what went in": lambda m, _: m, "torch.fx": by_fx}.items():
        try:
            with silent():
                made = fold(module, x)
                made = torch.compile(made) if runtime == "compile" else made
                made(x)
        except Exception as error:
            if name == "bnfold":
                raise
            print(f"{name}: {type(error).__name__}", file=sys.stderr)
            continue
        calls[name] = lambda made=made: made(x)
    return calls


def rounds_of(make: Callable[[], Calls], rounds: int, *, anew: bool) -> dict[str, list[float]]:
    """Seconds of one call, by round. anew: whether what is called is made for each round."""
    calls = _warm(make())
    names = list(calls)
    repeats = {name: max(1, round(ROUND / _taken(calls[name], 1))) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        calls = _warm(make()) if anew and number else calls
        turn = number % len(names)
        for name in (names[turn:] + names[:turn])[:: 1 if number % 2 else -1]:
            found[name].append(_taken(calls[name], repeats[name]))
    return found


def _warm(calls: Calls) -> Calls:
    for call in calls.values():
        call()
    return calls


def _taken(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def ratio(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """The median of the rounds' ratios, and its interval."""
    each = np.array(theirs) / np.array(ours)
    drawn = np.median(each[np.random.default_rng(0).integers(0, len(each), (1000, len(each)))], axis=1)
    return float(np.median(each)), *map(float, np.quantile(drawn, (0.025, 0.975)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    runtimes = [each for each in args.runtimes.split(",") if find_spec({"eager": "torch", "compile": "torch"}.get(each, each))]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    print(f"batch 1, {args.size} pixels, {args.rounds} rounds, {os.cpu_count()} cores, load {load:.1f} at the beginning\n")
    print("| architecture | runtime | threads | bnfold, ms | the others' time over bnfold's |\n|---|---|--:|--:|---|")
    lowest: list[tuple[float, float, str]] = []
    for name in args.names:
        module, x = make(name)[0], torch.randn(1, 3, args.size, args.size)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            files = {}
            source = exported(module, tuple(x.shape[1:]), torch.float32)
            for tool in (tool for tool, (package, _) in FILES.items() if find_spec(package)):
                files[tool] = Path(folder, f"{len(files)}.onnx")
                with silent():
                    onnx.save(FILES[tool][1](source), files[tool])
            for runtime in runtimes:
                for threads in map(int, args.threads.split(",")):
                    of_modules = runtime in ("eager", "compile")
                    what: Any = module if of_modules else files
                    make_calls = partial(torch_calls if of_modules else onnx_calls, runtime, what, x, threads)
                    times = rounds_of(make_calls, args.rounds, anew=runtime == "onnxruntime")
                    ratios = {tool: ratio(each, times["bnfold"]) for tool, each in times.items() if tool != "bnfold"}
                    lowest += [(r, high, f"{name}, {runtime}, {threads}, {tool}") for tool, (r, _, high) in ratios.items()]
                    said = "; ".join(f"{tool} {r:.2f} ({low:.2f} to {high:.2f})" for tool, (r, low, high) in ratios.items())
                    print(f"| {name} | {runtime} | {threads} | {1e3 * statistics.median(times['bnfold']):.1f} | {said} |", flush=True)
    below = [f"{r:.2f} ({where})" for r, high, where in lowest if high < FLOOR]
    print(f"\nbelow {FLOOR}: {'; '.join(below) or 'none'}; the lowest: {min(lowest)[0]:.2f} ({min(lowest)[2]})")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
