"""A folder that shows one difference by itself: both models' parts around it, what goes in, and a script that runs them.

The parts lie between the last values that agree and the first that differ. The script needs numpy and the models' own runtime alone.
"""

from __future__ import annotations

import inspect
import io
import pprint
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold._version import __version__
from bnfold.errors import UnsupportedError, UsageError
from bnfold.files import Workplace, replacing
from bnfold.report import VerifyReport

from ..normal_form import Normal
from . import reproduce
from .sides import Located
from .weights import SLACK, both_planned, unit_of

Arrays = dict[str, npt.NDArray[Any]]
Stated = dict[str, Any]  # of one part, as the script knows it: its file, for each of its inputs the array's name and type, its output
CLEAR = 10.0  # times the reference's own rounding: what an output must be off by to show the difference


def ready(folder: Path, *, force: bool) -> None:
    """Fail now where the bundle couldn't be written in the end."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise UsageError(f"{folder}: the folder isn't empty; give another name, or --force to replace it")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"{folder}: {folder.absolute().parent} is not a folder; make it first")


def with_bundle(report: VerifyReport, located: Located | None, folder: Path, *, force: bool) -> VerifyReport:
    """The report with the bundle written, or with the reason why there is none."""
    if report.verdict != "different":
        return report
    try:
        if located is None:
            raise UnsupportedError("no bundle: the difference can't be laid to a layer")
        files = _values(located) if located.runtime is None else _runtime(located)
    except UnsupportedError as error:
        return replace(report, notes=(*report.notes, str(error)))
    files["README.txt"] = _readme(located, files)
    ready(folder, force=force)
    with replacing(folder) as (part,):
        part.mkdir()
        for name, content in files.items():
            (part / name).write_bytes(content)
    return replace(report, bundle=str(folder))


# --- two parts, whose values differ or whose coefficients do ----------------------------------------------------------------------------


def _values(located: Located) -> dict[str, bytes]:
    """The parts on which a value differs; where only coefficients do, these beside it."""
    sides, pair, feeds = located.sides, located.pair, located.feeds
    if pair is None or pair.other is None or feeds is None:
        raise UnsupportedError("no bundle: the difference has no counterpart in both models")
    both = sides.reference, sides.candidate
    mine, theirs = both[0].stands.get(pair.reference), both[1].stands.get(pair.candidate)
    if mine is None or theirs is None:
        raise UnsupportedError("no bundle: one of the models doesn't compute the value by itself")
    agreeing = located.agreeing or tuple(p for p in sides.comparable() if p.node is not located.node)
    known = {both[0].stands[p.reference]: both[1].stands[p.candidate] for p in agreeing}
    if known.get(mine) == theirs:
        del known[mine]
    known = {**_inputs(*both), **known}
    stops = set(known), set(known.values())
    edges = [side.model.edge(output, stop) for side, output, stop in zip(both, (mine, theirs), stops, strict=True)]
    keys = dict(zip(edges[0], edges[0], strict=True)), {other: name for name, other in known.items()}  # by own names the reference's

    given, wanted = both[0].model.own(feeds), dict.fromkeys([*edges[0], *(keys[1][name] for name in edges[1])])
    types = both[0].model.types(wanted)
    arrays = {name: given[name] for name in wanted if name in given}
    for name, array in both[0].stream(feeds, [n for n in wanted if n not in arrays], exact=sides.exact):
        arrays[name] = np.ascontiguousarray(array.astype(types.get(name, np.float32) if array.dtype.kind in "fV" else array.dtype))
    if len(arrays) < len(wanted) or any(array.dtype.kind == "V" for array in arrays.values()):
        raise UnsupportedError("no bundle: what goes into the part is of a type that numpy can't store, or can't be computed")
    arrays = {name: arrays[name] for name in wanted}

    files: dict[str, bytes] = {}
    settings: dict[str, Any] = {}
    outputs = []
    for role, side, output, edge, names in zip(("reference", "candidate"), both, (mine, theirs), edges, keys, strict=True):
        types = side.model.types(edge)
        fed = {name: arrays[names[name]].astype(types.get(name, arrays[names[name]].dtype)) for name in edge}
        part = side.model.part(fed, output)
        stated = _stated(role + part.suffix, {name: (names[name], array.dtype.name) for name, array in fed.items()}, output)
        settings[role.upper()], files[stated["file"]] = stated, part.data
        outputs.append(_run(stated, part.data, arrays))
    right, off = outputs[0], _off(*outputs)
    exact = next((array for _, array in both[0].stream(feeds, [mine], exact=sides.exact)), np.zeros(0)).astype(np.float64)
    finite = np.isfinite(right)
    error = np.abs(right - exact)[finite & np.isfinite(exact)].max(initial=0.0) if right.shape == exact.shape else 0.0
    noise = max(float(error), sides.unit * float(np.abs(right[finite]).max(initial=0.0)), float(np.finfo(np.float32).tiny))
    mode = "values" if off > CLEAR * noise else "coefficients"
    settings["LIMIT"] = _between(noise, off)
    if mode == "coefficients":
        settings |= {"LIMIT": SLACK / 2, "UNIT": unit_of(pair.node, pair.other)}
        files["coefficients.npz"] = _npz(_coefficients(located))
    return {**files, "reproduce.py": _script(mode, settings), "inputs.npz": _npz(arrays)}


def _coefficients(located: Located) -> Arrays:
    """What the fold should give, and what the candidate has."""
    pair = located.pair
    both = None if pair is None or pair.other is None else both_planned(pair.node, pair.other)
    if pair is None or both is None:
        raise UnsupportedError("no bundle: neither an output nor a coefficient shows the difference")
    want, have = both
    summands = np.abs(want.bias)
    for site in located.sides.reference.sites.get(pair.node, []):
        if "norm" in site.attrs:
            norm = site.attrs["norm"]
            summands = summands + np.abs(norm.beta).max() + np.abs(norm.mean * norm.gamma / np.sqrt(norm.var + norm.epsilon)).max()
    found = {"weight": (want.weight, have.weight, np.abs(want.weight)), "bias": (want.bias, have.bias, summands)}
    return {f"{what}.{role}": a for role, each in found.items() for what, a in zip(("expected", "found", "size"), each, strict=True)}


def _inputs(reference: Normal, candidate: Normal) -> dict[str, str]:
    """The models' inputs, each by its own name in both."""
    names = dict.fromkeys([*reference.inputs, *candidate.inputs])
    return {reference.fed.get(name, name): candidate.fed.get(name, name) for name in names}


def _run(stated: Stated, data: bytes, arrays: Arrays) -> npt.NDArray[Any]:
    """The output of a part as the script gets it."""
    with Workplace() as place:
        path = place.path / stated["file"]
        path.write_bytes(data)
        try:
            found: npt.NDArray[Any] = reproduce.run(path, stated, arrays)
        except Exception as error:  # of whatever runtime it is
            raise UnsupportedError(f"no bundle: a part doesn't run by itself: {str(error)[:200]}") from None
    return found


# --- one part, which a runtime's optimisation harms ---------------------------------------------------------------------------------------


def _runtime(located: Located) -> dict[str, bytes]:
    found = located.runtime
    stated = _stated("candidate.onnx", {name: (name, a.dtype.name) for name, a in found.inputs.items()}, found.output)
    right, wrong = found.expected.astype(np.float64), found.found.astype(np.float64)
    noise = float(np.finfo(np.float32).eps) * float(np.abs(np.nan_to_num(right)).max(initial=1.0))
    settings = {"REFERENCE": stated, "CANDIDATE": stated, "LIMIT": _between(noise, _off(right, wrong))}
    script = _script("runtime", settings)
    return {"candidate.onnx": found.model.SerializeToString(), "inputs.npz": _npz(found.inputs), "reproduce.py": script}


# --- the files --------------------------------------------------------------------------------------------------------------------------


def _off(right: npt.NDArray[Any], wrong: npt.NDArray[Any]) -> float:
    if right.shape != wrong.shape or (np.isfinite(right) != np.isfinite(wrong)).any():
        return float("inf")
    with np.errstate(all="ignore"):
        return float(np.abs(np.where(np.isfinite(right), right - wrong, 0.0)).max(initial=0.0))


def _between(noise: float, off: float) -> float:
    """A limit that tells the one from the other."""
    return float(np.sqrt(noise * off)) if np.isfinite(off) else CLEAR * noise


def _stated(file: str, inputs: Mapping[str, tuple[str, str]], output: str) -> Stated:
    return {"file": file, "inputs": {name: list(given) for name, given in inputs.items()}, "output": output}


def _npz(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    file, named = io.BytesIO(), dict[str, Any](arrays)
    np.savez(file, **named)
    return file.getvalue()


def _script(mode: str, settings: Mapping[str, Any]) -> bytes:
    """The module `reproduce` with its settings filled in."""
    before, begin, rest = inspect.getsource(reproduce).partition("# --- settings\n")
    _, end, after = rest.partition("# --- end of the settings\n")
    stated = {"MODE": mode, "REFERENCE": {}, "CANDIDATE": {}, "LIMIT": 0.0, "UNIT": 0.0, **settings}
    text = "".join(f"{name} = {pprint.pformat(value, width=120, sort_dicts=False)}\n" for name, value in stated.items())
    return "".join((before, begin, text, end, after)).encode()


def _readme(located: Located, files: Mapping[str, bytes]) -> bytes:
    shown = located.difference
    lines = [
        f"The first difference between two models, cut out by bnfold {__version__}.",
        "",
        f"layer: {shown.layer}",
        f"cause: {shown.cause}",
        "",
        "Run `python reproduce.py`: it runs both parts on inputs.npz and prints how far they are apart. It ends with status 1 where they",
        "differ by more than rounding, with 0 where they don't. It needs numpy, and onnxruntime for .onnx, torch for .pt2.",
        "",
        "Files: " + ", ".join(sorted({*files, "README.txt"})),
    ]
    return ("\n".join(lines) + "\n").encode()
