"""A folder that shows one difference by itself: both models' parts around it, what goes in, and a script that runs them.

The parts lie between the last values that agree and the first that differ. The script needs numpy and the models' own runtime alone.
"""

from __future__ import annotations

import inspect
import io
import pprint
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnfold._version import __version__
from bnfold.errors import InputError, UnsupportedError, UsageError
from bnfold.files import replacing
from bnfold.report import VerifyReport

from ..normal_form import Normal
from . import reproduce
from .held import SLACK, both_held, unit_of
from .localise import Located

if TYPE_CHECKING:
    from bnfold.data import Batch

Arrays = dict[str, npt.NDArray[Any]]
CLEAR = 10.0  # times the reference's own rounding: what an output must be off by to show the difference


def ready(folder: Path, *, force: bool) -> None:
    """Fail now where the bundle couldn't be written in the end."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise UsageError(f"{folder}: the folder isn't empty; give another name, or --force to replace it")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{folder}: {folder.absolute().parent} is not a folder; make it first")


def write(located: Located, folder: Path, *, force: bool = False) -> None:
    """Write the bundle whole or not at all. Raises UnsupportedError where the parts can't be cut out or don't show the difference."""
    ready(folder, force=force)
    if located.runtime is not None:
        files = _runtime(located)
    elif located.pair is None or located.pair.other is None or located.feeds is None:
        raise UnsupportedError("no bundle: the difference has no counterpart in both models")
    else:
        files = _Values(located, located.feeds).files()
    with replacing(folder) as (part,):
        part.mkdir()
        for name, content in files.items():
            (part / name).write_bytes(content)


def with_bundle(report: VerifyReport, located: Located | None, folder: Path, *, force: bool) -> VerifyReport:
    """The report with the bundle written, or with the reason why there is none."""
    if report.verdict != "different":
        return report
    try:
        if located is None:
            raise UnsupportedError("no bundle: the difference can't be laid to a layer")
        write(located, folder, force=force)
    except UnsupportedError as error:
        return replace(report, notes=(*report.notes, str(error)))
    return replace(report, bundle=str(folder))


@dataclass(frozen=True)
class _Side:
    """One model's part, as the script knows it. inputs: for each of its own, the array's name and type."""

    file: str
    inputs: dict[str, tuple[str, str]]
    output: str
    data: bytes

    def plain(self) -> dict[str, Any]:
        return {"file": self.file, "inputs": {name: list(given) for name, given in self.inputs.items()}, "output": self.output}


class _Values:
    """The parts on which a value differs; where only coefficients do, these beside it."""

    def __init__(self, located: Located, feeds: Batch) -> None:
        self.located, self.feeds = located, feeds
        sides = located.sides
        self.sides = (sides.reference, sides.candidate)
        agreeing = located.agreeing or tuple(p for p in sides.comparable() if p.node is not located.node)
        pair = located.pair
        assert pair is not None
        self.outputs = [side.stands.get(v) for side, v in zip(self.sides, (pair.reference, pair.candidate), strict=True)]
        mine = {sides.reference.stands[p.reference]: sides.candidate.stands[p.candidate] for p in agreeing}
        mine = {one: other for one, other in mine.items() if (one, other) != tuple(self.outputs)}
        self.shared = {**_inputs(*self.sides), **mine}

    def files(self) -> dict[str, bytes]:
        if None in self.outputs:
            raise UnsupportedError("no bundle: one of the models doesn't compute the value by itself")
        arrays, edges = self._arrays()
        made = [self._side(k, name, edges[k], arrays) for k, name in enumerate(("reference", "candidate"))]
        settings: dict[str, Any] = {side: each.plain() for side, each in zip(("REFERENCE", "CANDIDATE"), made, strict=True)}
        files = {each.file: each.data for each in made}
        right, wrong = (_run(each, arrays) for each in made)
        exact = self._exact()
        error = (
            float(np.abs(right - exact)[np.isfinite(right) & np.isfinite(exact)].max(initial=0.0)) if right.shape == exact.shape else 0.0
        )
        finite = np.isfinite(right)
        noise = max(error, self.located.sides.unit * float(np.abs(right[finite]).max(initial=0.0)), float(np.finfo(np.float32).tiny))
        off = _off(right, wrong)
        if off > CLEAR * noise:
            settings["LIMIT"] = float(np.sqrt(noise * off)) if np.isfinite(off) else CLEAR * noise
            files["reproduce.py"] = _script("values", settings)
        else:
            coefficients, settings["LIMIT"] = self._coefficients(), SLACK / 2
            settings["UNIT"] = self._roundoff
            files["coefficients.npz"] = _npz(coefficients)
            files["reproduce.py"] = _script("coefficients", settings)
        files["inputs.npz"] = _npz(arrays)
        files["README.txt"] = _readme(self.located, files)
        return files

    def _arrays(self) -> tuple[Arrays, list[list[str]]]:
        """The values at the edges of the parts by the reference's names, and each part's edge in its own."""
        back = {other: own for own, other in self.shared.items()}
        edges = [
            side.model.edge(str(output), stops)
            for side, output, stops in zip(self.sides, self.outputs, (set(self.shared), set(back)), strict=True)
        ]
        wanted = dict.fromkeys([*edges[0], *(back[name] for name in edges[1])])
        given = self.sides[0].model.own(self.feeds)
        types = self.sides[0].model.types(wanted)
        found = {name: given[name] for name in wanted if name in given}
        for name, array in self.sides[0].stream(self.feeds, [n for n in wanted if n not in found], exact=self.located.sides.exact):
            found[name] = np.ascontiguousarray(array.astype(types.get(name, np.float32) if array.dtype.kind in "fV" else array.dtype))
        if len(found) < len(wanted) or any(array.dtype.kind == "V" for array in found.values()):
            raise UnsupportedError("no bundle: what goes into the part is of a type that numpy can't store, or can't be computed")
        return {name: found[name] for name in wanted}, edges

    def _side(self, k: int, role: str, edge: list[str], arrays: Arrays) -> _Side:
        back = {other: own for own, other in self.shared.items()}
        keys = {name: name if k == 0 else back[name] for name in edge}
        types = self.sides[k].model.types(edge)
        given = {name: arrays[key].astype(types.get(name, arrays[key].dtype)) for name, key in keys.items()}
        output = str(self.outputs[k])
        part = self.sides[k].model.part(given, output)
        return _Side(role + part.suffix, {name: (keys[name], array.dtype.name) for name, array in given.items()}, output, part.data)

    def _exact(self) -> npt.NDArray[Any]:
        name = str(self.outputs[0])
        found = next((array for _, array in self.sides[0].stream(self.feeds, [name], exact=self.located.sides.exact)), np.zeros(0))
        return found.astype(np.float64)

    @property
    def _roundoff(self) -> float:
        pair = self.located.pair
        assert pair is not None
        assert pair.other is not None
        return unit_of(pair.node, pair.other)

    def _coefficients(self) -> Arrays:
        """What the fold should give, and what the candidate has, operator by operator."""
        pair = self.located.pair
        assert pair is not None
        assert pair.other is not None
        if (both := both_held(pair.node, pair.other)) is None:
            raise UnsupportedError("no bundle: neither an output nor a coefficient shows the difference")
        want, have = both
        summands = np.abs(want.bias)
        for site in self.located.sides.reference.sites.get(pair.node, []):
            if "norm" in site.attrs:
                norm = site.attrs["norm"]
                summands = summands + np.abs(norm.beta).max() + np.abs(norm.mean * norm.gamma / np.sqrt(norm.var + norm.epsilon)).max()
        return {
            "expected.weight": want.weight,
            "found.weight": have.weight,
            "size.weight": np.abs(want.weight),
            "expected.bias": want.bias,
            "found.bias": have.bias,
            "size.bias": summands,
        }


def _inputs(reference: Normal, candidate: Normal) -> dict[str, str]:
    """The models' inputs, each by its own name in both."""
    mine, theirs = ({name: own for own, name in side.fed.items()} for side in (reference, candidate))
    names = [name for side in (reference, candidate) for name in side.inputs]
    back = [{name: own for own, name in each.items()} for each in (mine, theirs)]
    return {back[0].get(name, name): back[1].get(name, name) for name in dict.fromkeys(names)}


def _runtime(located: Located) -> dict[str, bytes]:
    found = located.runtime
    side = _Side("candidate.onnx", {name: (name, a.dtype.name) for name, a in found.inputs.items()}, found.output, b"")
    noise = float(np.finfo(np.float32).eps) * float(np.abs(np.nan_to_num(found.expected.astype(np.float64))).max(initial=1.0))
    off = _off(found.expected.astype(np.float64), found.found.astype(np.float64))
    limit = float(np.sqrt(noise * off)) if np.isfinite(off) else CLEAR * noise
    files = {
        "candidate.onnx": found.model.SerializeToString(),
        "inputs.npz": _npz(found.inputs),
        "reproduce.py": _script("runtime", {"REFERENCE": side.plain(), "CANDIDATE": side.plain(), "LIMIT": limit}),
    }
    return {**files, "README.txt": _readme(located, files)}


def _run(side: _Side, arrays: Arrays) -> npt.NDArray[Any]:
    """The output of a part as the script gets it."""
    with tempfile.TemporaryDirectory(prefix="bnfold-") as folder:
        path = Path(folder, side.file)
        path.write_bytes(side.data)
        try:
            found: npt.NDArray[Any] = reproduce.run(path, side.plain(), arrays)
        except Exception as error:  # of whatever runtime it is
            raise UnsupportedError(f"no bundle: a part doesn't run by itself: {str(error)[:200]}") from None
    return found


def _off(right: npt.NDArray[Any], wrong: npt.NDArray[Any]) -> float:
    if right.shape != wrong.shape or (np.isfinite(right) != np.isfinite(wrong)).any():
        return float("inf")
    with np.errstate(all="ignore"):
        return float(np.abs(np.where(np.isfinite(right), right - wrong, 0.0)).max(initial=0.0))


def _npz(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    file, named = io.BytesIO(), dict[str, Any](arrays)
    np.savez(file, **named)
    return file.getvalue()


def _script(mode: str, settings: Mapping[str, Any]) -> bytes:
    """The module `reproduce` with its settings filled in."""
    source = inspect.getsource(reproduce)
    before, begin, rest = source.partition("# --- settings\n")
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
