"""What a change of the inside must leave as it is: written to a file, and held against it later.

    python -m tests.frozen --write FILE [--part names|commands|onnx|torch ...]
    python -m tests.frozen --compare FILE [--part ...]       status 1 where something differs

By public names and commands alone: signatures; the lines of `frozen.txt` with their status, what they say and the files that they write;
and on the matrix of cases, in ONNX and in PyTorch, what `fuse`, `recalibrate` and `verify` report, with a hash of each weight and of the
network around. Times, versions and folders are left out, and measured numbers are rounded to two digits, since the order of a sum moves
the rest. What is new is no difference. It takes three minutes on one core; without PyTorch what needs it is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import importlib.util
import inspect
import io
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import bnfold

from .cases import ALL
from .compare import SIZES, feeds, true_inputs

Found = dict[str, Any]  # by name, as JSON has it
HERE = Path(__file__).resolve().parent
DIGITS = HERE.parent / "samples" / "digits"
METHODS = ("exact", "precise", "ioffe-szegedy", "moving-average", "prior")
LEFT_OUT = {"seconds", "bnfold", "path", "sha256"}
NUMBER = re.compile(r"(?<![\w.])(\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+)(?![\w])")
MASKS = {r"[\d.]+ (?:ms|s|seconds)\b|time=\"[\d.]+\"": "TIME", r"\b[0-9a-f]{64}\b": "HASH", re.escape(bnfold.__version__): "VERSION"}
TORCH = importlib.util.find_spec("torch") is not None
NET = """
import torch
def make(width=4):
    torch.manual_seed(0)
    n = torch.nn
    net = n.Sequential(n.Conv2d(3, width, 3), n.BatchNorm2d(width), n.ReLU(), n.Conv2d(width, 2, 3), n.Sigmoid(), n.BatchNorm2d(2))
    for tensor in (t for t in net.state_dict().values() if t.is_floating_point()):
        tensor.uniform_(0.5, 1.5)
    return net
"""


def plain(value: Any) -> Any:
    """A report or a text as it is compared."""
    if isinstance(value, dict):
        return {key: plain(of) for key, of in value.items() if key not in LEFT_OUT}
    if isinstance(value, (list, tuple)):
        return [plain(of) for of in value]
    if isinstance(value, float):
        return float(f"{value:.2g}")
    if isinstance(value, str):
        for pattern, mask in {**MASKS, re.escape(os.getcwd()): "FOLDER", re.escape(str(HERE.parent)): "ROOT"}.items():
            value = re.sub(pattern, mask, value)
        return NUMBER.sub(lambda found: f"{float(found[0]):.2g}", value)
    return value


def digest(*parts: Any) -> str:
    return hashlib.sha256(b"".join(p if isinstance(p, bytes) else repr(p).encode() for p in parts)).hexdigest()


def weights(model: Any) -> Found:
    """A hash of each array of a model or a dict, by its name, and of the network around them."""
    if isinstance(model, dict):
        return {name: digest(str(array.dtype), array.shape, array.tobytes()) for name, array in model.items()}
    if isinstance(model, onnx.ModelProto):
        bare = copy.deepcopy(model)
        del bare.metadata_props[:]  # the certificate states versions and measured numbers
        arrays = {t.name: numpy_helper.to_array(t) for t in bare.graph.initializer}
        return weights(arrays) | {"the network": digest(bare.SerializeToString(deterministic=True))}
    import torch

    if isinstance(model, torch.export.ExportedProgram):
        network: Any = (model.graph_module.code, str(model.graph_signature))
        tensors = model.state_dict | {name: t for name, t in model.constants.items() if isinstance(t, torch.Tensor)}
    else:
        network = [(name, type(part).__name__, part.extra_repr(), part.training) for name, part in model.named_modules()]
        tensors = model.state_dict()
    raw = {name: (t.dtype, t.shape, t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}
    return {name: digest(*of) for name, of in raw.items()} | {"the network": digest(network)}


def said(verb: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Found, Any]:
    """What a verb reports, with the weights of what it gives back; or how it fails."""
    try:
        returned = verb(*arguments, **options)
    except Exception as error:
        return {"error": type(error).__name__, "text": plain(str(error))}, None
    model, report = returned if isinstance(returned, tuple) else (None, returned)
    return {"report": plain(report.to_dict())} | ({} if model is None else {"weights": weights(model)}), model


def names() -> Found:
    """The parameters of the public functions, with their kinds and defaults; the bases and statuses of the public errors."""
    public = {name: getattr(bnfold, name) for name in bnfold.__all__}
    functions = {name: inspect.signature(value).parameters.values() for name, value in public.items() if inspect.isfunction(value)}
    errors = {
        name: [base.__name__ for base in value.__mro__]
        for name, value in public.items()
        if inspect.isclass(value) and name.endswith("Error")
    }
    parameters = {name: [f"{p.kind.description} {p.replace(annotation=p.empty)}" for p in of] for name, of in functions.items()}
    return {"all": list(public), **parameters, **{name: [*of, public[name].exit_status] for name, of in errors.items()}}


def commands() -> Found:
    """The lines of the command line, in one folder."""
    for file in ("digits.onnx", "calibration.npz", "test.npz"):
        shutil.copy(DIGITS / file, file)
    Path("bad.onnx").write_bytes(Path("digits.onnx").read_bytes()[:1000])
    np.save("x.npy", np.random.default_rng(0).normal(0.5, 2, (24, 3, 9, 9)).astype(np.float32))
    lines = (HERE / "frozen.txt").read_text().splitlines()
    if TORCH:
        import torch

        Path("net.py").write_text(NET)
        exec(NET, there := {})
        torch.save(there["make"]().state_dict(), "net.pt")
    return {line: command(line) for line in lines if TORCH or "net" not in line}


def command(line: str) -> Found:
    from bnfold.cli import run

    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(line.split())
    shown = json.loads(out.getvalue()) if "--json" in line and status < 2 else out.getvalue().splitlines()
    if line.startswith("bench"):
        shown = sorted(shown)  # the fields; each is a time
    files = [path for path in sorted(Path().rglob("*.*")) if before.get(path) != path.stat().st_mtime_ns and "__" not in str(path)]
    told = {"status": status, "out": plain(shown), "err": plain(err.getvalue().splitlines())}
    return told | {"files": {str(path): file(path) for path in files}}


def file(path: Path) -> Any:
    """Hashes of what a file holds, or its text."""
    if path.suffix == ".onnx":
        return weights(onnx.load(path))
    if path.suffix == ".npz":
        return weights(dict(np.load(path)))
    if path.suffix == ".pt2":
        return weights(bnfold.load(path))
    if path.suffix in (".pt", ".safetensors"):
        import torch
        from safetensors.torch import load_file

        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        return weights({name: tensor.numpy() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)})
    return plain(json.loads(path.read_text()) if path.suffix == ".json" else path.read_text().splitlines())


def drawn_method(name: str, every: int) -> str | None:
    """By which method a case is recalibrated, if it is, as one in `every` are: by its name, so that new cases change nothing for others."""
    number = zlib.crc32(name.encode())
    return METHODS[number // every % len(METHODS)] if number % every == 0 else None


def in_onnx() -> Found:
    found = {}
    for case in ALL:
        model = case.build()
        batches = [feeds(model, SIZES | {"N": count}, below=case.below, seed=count) for count in (3, 2)]
        found[case.name] = verbs(model, batches, drawn_method(case.name, 4), clone=case.clone)
    return found


def in_torch() -> Found:
    """The cases that torch can express, as modules and as programs."""
    if not TORCH:
        return {}
    import torch

    from .twins import NotInTorchError, Twin

    torch.set_num_threads(1)
    found = {}
    for case in (case for case in ALL if case.double):
        drawn = case.build_double()
        with contextlib.suppress(NotInTorchError):
            twin = Twin(drawn).eval()
            method = drawn_method(case.name, 8)
            of = [feeds(drawn, SIZES | {"N": count}, below=case.below, seed=count) for count in (3, 2)]
            batches = [tuple(torch.from_numpy(np.array(array)) for array in data.values()) for data in of]
            dims = [enumerate(each.type.tensor_type.shape.dim) for each in true_inputs(drawn)]
            axes = tuple({k: torch.export.Dim.AUTO for k, dim in of if not dim.HasField("dim_value")} for of in dims)
            found[case.name] = verbs(twin, batches, method, example=batches[0], check=method is not None)
            program = torch.export.export(twin, batches[0], dynamic_shapes=(axes,))
            found[f"{case.name}, exported"] = verbs(program, batches, method, clone=case.clone, check=method is not None)
    return found


def verbs(model: Any, batches: list[Any], method: str | None, **options: Any) -> Found:
    """What `fuse` says of a case, and with a method, `recalibrate` by it and `verify` of the fold, and of the fold with a weight moved."""
    fused, result = said(bnfold.fuse, model, **options)
    found = {"fuse": fused}
    if method is not None:
        found["recalibrate"] = said(bnfold.recalibrate, model, batches, method=method)[0]
    if method is not None and result is not None:
        found["verify"] = said(bnfold.verify, model, result, batches)[0]
        move(result)
        found["verify, moved"] = said(bnfold.verify, model, result, batches)[0]
    return found


def move(model: Any) -> None:
    """Make the last weight of several numbers wrong in one of them."""
    if isinstance(model, onnx.ModelProto):
        for tensor in [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 1][-1:]:
            array = numpy_helper.to_array(tensor).copy()
            array.flat[0] += 0.1
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    else:
        state = model.state_dict if isinstance(model.state_dict, dict) else model.state_dict()
        for tensor in [t for t in state.values() if t.is_floating_point() and t.numel() > 1][-1:]:
            tensor.detach()[(0,) * tensor.ndim] += 0.1


PARTS: dict[str, Callable[[], Found]] = {"names": names, "commands": commands, "onnx": in_onnx, "torch": in_torch}


def differences(was: Any, now: Any, where: str) -> Iterator[str]:
    """What differs, each with where it stands."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key, value in was.items():
            yield from differences(value, now.get(key, "nothing"), f"{where} / {key}")
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for index, (one, other) in enumerate(zip(was, now, strict=True)):
            yield from differences(one, other, f"{where} / {index}")
    elif was != now:
        yield f"{where}\n    was {json.dumps(was)[:1000]}\n    now {json.dumps(now)[:1000]}"


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.frozen", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--write", type=Path, metavar="FILE")
    to.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; all unless given")
    args = parser.parse_args()
    path = (args.write or args.compare).absolute()
    os.environ.update(COLUMNS="120", NO_COLOR="1", GITHUB_ACTIONS="", GITHUB_STEP_SUMMARY="")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = json.loads(json.dumps({part: PARTS[part]() for part in args.part or PARTS}))
        os.chdir(HERE)
    if args.write:
        path.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    was = json.loads(path.read_text())
    lines = [line for part in found for line in differences(was.get(part), found[part], part)]
    print(*lines, f"{len(lines)} differences", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
