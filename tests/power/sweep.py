"""One architecture: right folds and seeded defects, in every type. Prints a line of JSON.

python -m tests.power.sweep NAME [--seeds N]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import torch
from opened import verify

import bnfold
from bnfold.backends.onnx.files.load import from_proto
from bnfold.backends.onnx.model import OnnxModel
from bnfold.backends.onnx.oracle.evaluator import Oracle
from bnfold.backends.onnx.runtime.session import Session
from bnfold.backends.torch.export.tensors import flat_outputs, to_numpy
from bnfold.backends.torch.export.trace import trace
from bnfold.backends.torch.model import TorchModel
from bnfold.backends.torch.runtime.session import precise
from bnfold.report import VerifyReport
from bnfold.verification.roundoff import LIMIT
from tests.power.defects import DEFECTS, Net, OnnxNet, Site, TorchNet
from tests.power.list import AS_MODULES, FUSES, IN_HALF, LIGHT
from tests.power.models import ONNX_FOLDS, TORCH_FOLDS, RememberedOnnx, RememberedTorch, exported, light, network, own
from tests.power.rivals import RIVALS

SAMPLES, BATCH = 4, 2
RIGHT = 1e-4  # of the largest output, in float64: rounding of float32 weights changes less, a wrong fold more
DTYPES = {"onnx": ("float32", "float16"), "torch": ("float32", "float16", "bfloat16")}
Outputs = dict[str, np.ndarray]
Side = OnnxModel | TorchModel


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args(arguments)
    print(json.dumps(sweep(args.name, seeds=args.seeds)))


def sweep(name: str, *, seeds: int = 1, routes: tuple[str, ...] = ("onnx", "torch"), dtypes: tuple[str, ...] = ()) -> dict[str, Any]:
    """All runs of one architecture. The first seed meets every defect, the others right folds only."""
    warnings.simplefilter("ignore")
    start, runs = time.perf_counter(), []
    for route in routes:
        if route == "torch" and name not in AS_MODULES:
            continue
        found: dict[str, bool] = {}  # whether a tool's float32 fold is right
        for dtype in dtypes or DTYPES[route][: None if name in IN_HALF else 1]:
            for seed in range(seeds if dtype != "bfloat16" else 1):
                for run in (_onnx if route == "onnx" else _torch)(name, seed, dtype, found):
                    runs.append({"route": route, "dtype": dtype, "seed": seed, **run})
    return {"name": name, "runs": runs, "seconds": round(time.perf_counter() - start, 1)}


# --- the two routes -------------------------------------------------------------------------------------------------------------


def _onnx(name: str, seed: int, dtype: str, right: dict[str, bool]) -> Iterator[dict[str, Any]]:
    if name in LIGHT:
        proto, shape = light(name)
    else:
        module, shape = network(name, seed, getattr(torch, dtype))
        proto = exported(module, shape, getattr(torch, dtype))
    reference = RememberedOnnx(from_proto(proto))
    data = _data(shape, dtype, seed, 1 if name in LIGHT else BATCH)
    want = Oracle(from_proto(proto)).run({"x": data[0][:1]})["y"]
    first = _onnx_outputs(proto, data)
    folded, report = bnfold.fuse(proto, check=False)
    for tool, fold in ONNX_FOLDS.items():
        if right.get(tool) is False or (name in LIGHT and tool in FUSES):
            continue
        try:
            made = folded if tool == "bnfold" else fold(proto)
            if tool not in right:
                right[tool] = _is_right(made, want, data[0][:1])
            if not right[tool]:
                yield {"kind": "wrong", "what": tool}
                continue
            got = _onnx_outputs(made, data)
        except Exception as error:  # a tool may raise anything, and write what nothing can load
            right[tool] = False
            yield {"kind": "failed", "what": tool, "reason": str(error)[:200]}
            continue
        yield _right(tool, seed, reference, reference.beside(made), first, got)
    if not seed and name not in LIGHT:
        yield from _defects(
            name,
            dtype,
            OnnxNet(proto),
            OnnxNet(folded),
            report,
            lambda net: OnnxNet(own(net.model)),
            lambda one, other: (
                verify(reference, reference.beside(other.model), **_sizes())
                if one.model is proto
                else verify(from_proto(one.model), from_proto(other.model), **_sizes())
            ),
            lambda net: _onnx_outputs(net.model, data),
        )


def _torch(name: str, seed: int, dtype: str, right: dict[str, bool]) -> Iterator[dict[str, Any]]:
    module, shape = network(name, seed, getattr(torch, dtype))
    data = _data(shape, dtype, seed)
    example = torch.from_numpy(data[0].astype(np.float32)).to(getattr(torch, dtype))
    reference = RememberedTorch(trace(module, example))
    first = _torch_outputs(module, data, dtype)
    folded, report = bnfold.fuse(module, example=example, check=False)
    double = example.double()
    for tool, fold in TORCH_FOLDS.items():
        if right.get(tool) is False:
            continue
        try:
            if tool not in right:
                exact = network(name, seed, torch.float64)[0]
                right[tool] = _near(exact(double).detach().numpy(), fold(exact, double)(double).detach().numpy())
            if not right[tool]:
                yield {"kind": "wrong", "what": tool}
                continue
            made = folded if tool == "bnfold" else fold(module)
            got = _torch_outputs(made, data, dtype)
        except Exception as error:  # torch.fx can't trace every network
            right[tool] = False
            yield {"kind": "failed", "what": tool, "reason": str(error)[:200]}
            continue
        yield _right(tool, seed, reference, reference.beside(made), first, got)
    if not seed:
        yield from _defects(
            name,
            dtype,
            TorchNet(module),
            TorchNet(folded),
            report,
            lambda net: TorchNet(own(net.model, example)),
            lambda one, other: (
                verify(reference, reference.beside(other.model), **_sizes())
                if one.model is module
                else verify(one.model, other.model, example=example, **_sizes())
            ),
            lambda net: _torch_outputs(net.model, data, dtype),
        )


def _sizes() -> dict[str, int]:
    return {"samples": SAMPLES, "batch_size": BATCH}


# --- what is recorded -----------------------------------------------------------------------------------------------------------


def _right(tool: str, seed: int, reference: Side, candidate: Side, want: Outputs, got: Outputs) -> dict[str, Any]:
    if candidate.identity() == reference.identity():  # the tool folds nothing here, and `verify` says so
        return {"kind": "unchanged", "what": tool}
    report = verify(reference, candidate, seed=seed, **_sizes())
    return {"kind": "right", "what": tool, **_judged(report), "rivals": _alarms(want, got)}


def _defects(
    name: str,
    dtype: str,
    net: Net,
    folded: Net,
    report: Any,
    fold: Callable[[Any], Any],
    judge: Callable[[Any, Any], VerifyReport],
    outputs: Callable[[Any], Outputs],
) -> Iterator[dict[str, Any]]:
    merged = {branch for m in report.merged for branch in m.branches}
    folds = [layer for layer in report.layers if layer.verdict == "folded" and len(layer.into) == 1]
    sites = [Site(layer.name, layer.into[0], layer.into[0] in merged) for layer in folds]
    usable = []
    for site in sites:
        try:
            net.norm(site.norm), folded.weight(site.into), net.weight(site.into)
            usable.append(site)
        except (KeyError, AttributeError):  # a layer whose weights aren't stored as such
            continue
    # Where none folds, what is wrong with a BatchNorm that stays.
    usable = usable or [Site(layer.name, "") for layer in report.layers if layer.verdict == "kept"]
    answers = outputs(net)
    for title, make in DEFECTS.items():
        rng = np.random.default_rng(zlib.crc32(f"{name} {dtype} {title}".encode()))
        seeded = make(net, folded, usable, fold, rng) if usable else None
        if seeded is None:
            continue
        found = _judged(judge(seeded.reference, seeded.candidate))
        # A stored number is itself rounded by up to one unit, so what is smaller than the limit and that may lie within the limit. Where
        # the coefficients can't be compared, what rounded weights explain of the outputs is the bound that the report states.
        certified = found["worst"] is not None and found["worst"] <= LIMIT
        lost = certified if seeded.size <= LIMIT + 1 else found["uncertified"] and dtype != "float32"
        below = found["verdict"] == "equivalent" and lost
        alarms = _alarms(answers if seeded.reference is net else outputs(seeded.reference), outputs(seeded.candidate))
        size = float(seeded.size) if np.isfinite(seeded.size) else None
        yield {"kind": "defect", "what": title, **found, "size": size, "below": below, "rivals": alarms}


def _judged(report: VerifyReport) -> dict[str, Any]:
    levels = report.levels
    found = [name for name in ("coefficients", "function") if getattr(levels, name).verdict == "different"]
    found += ["deployment"] if any(row.verdict == "different" for row in levels.deployment) else []
    if report.verdict == "different" and not found:
        found = ["interface"]
    worst = levels.coefficients.worst
    return {
        "verdict": report.verdict,
        "levels": found,
        "reason": report.reason,
        "uncertified": levels.coefficients.verdict == "skipped" and "another form" not in levels.coefficients.reason,
        "worst": worst if np.isfinite(worst) else None,
        "seconds": round(report.seconds, 2),
    }


def _alarms(want: Outputs, got: Outputs) -> dict[str, bool]:
    return {rival: bool(alarm(want, got)) for rival, alarm in RIVALS.items()}


# --- runs -----------------------------------------------------------------------------------------------------------------------


def _data(shape: tuple[int, ...], dtype: str, seed: int, batch: int = BATCH) -> list[np.ndarray]:
    rng = np.random.default_rng(100 + seed)
    kind = np.float32 if dtype == "bfloat16" else np.dtype(dtype)
    return [rng.standard_normal((batch, *shape)).astype(kind) for _ in range(SAMPLES // batch)]


def _onnx_outputs(model: onnx.ModelProto, data: list[np.ndarray]) -> Outputs:
    session = Session(from_proto(model), provider="cpu", optimise=False)
    return _joined([session.run({"x": x}) for x in data])


def _torch_outputs(module: torch.nn.Module, data: list[np.ndarray], dtype: str) -> Outputs:
    with precise():
        return _joined(
            [
                {k: to_numpy(v).astype(np.float32 if dtype == "bfloat16" else dtype) for k, v in flat_outputs(module(x)).items()}
                for x in (torch.from_numpy(x).to(getattr(torch, dtype)) for x in data)
            ]
        )


def _joined(outputs: list[Outputs]) -> Outputs:
    return {name: np.concatenate([o[name] for o in outputs]) for name in outputs[0]}


def _is_right(made: onnx.ModelProto, want: np.ndarray, x: np.ndarray) -> bool:
    """By the float64 oracle; by the runtime where the oracle hasn't got the tool's own operators."""
    model = from_proto(made)
    try:
        got = Oracle(model).run({"x": x})["y"]
    except bnfold.errors.UnsupportedError:
        got = Session(model, provider="cpu", optimise=False).run({"x": x})["y"]
    return _near(want, got)


def _near(want: np.ndarray, got: np.ndarray) -> bool:
    return bool(np.abs(want - got).max() <= RIGHT * np.abs(want).max())


if __name__ == "__main__":
    main(sys.argv[1:])
