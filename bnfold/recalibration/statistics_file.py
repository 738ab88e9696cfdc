"""Statistics in files: the old ones beside a recalibrated model, and what parts of the data gave.

Both are .npz files without Python objects: arrays in float64, and a JSON text that says what they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnfold._version import __version__
from bnfold.algebra.affine import Array
from bnfold.errors import DataError, UsageError
from bnfold.files import DAMAGED_ZIP, bomb, replacing, unreadable
from bnfold.text import first_line

from .methods import METHODS, Accumulator, Method
from .moments import Moments
from .plan import BatchNorm, Measurement

OLD, PART, PROGRESS = "bnfold.statistics/1", "bnfold.part/1", "bnfold.progress/1"
WHAT = {
    OLD: "the old statistics of a recalibrated model",
    PART: "what a part of the data gave (--stats)",
    PROGRESS: "what a measurement keeps to go on from (--resume)",
}
MOMENTS = ("count", "mean", "m2", "samples", "weight", "spread")


def write(path: Path, before: Mapping[str, tuple[Array, Array]]) -> None:
    """Keep means and variances by layer, float64 [C] each: every narrower type fits into them exactly."""
    arrays = {
        f"{i}/{role}": array for i, pair in enumerate(before.values()) for role, array in zip(("mean", "variance"), pair, strict=True)
    }
    write_arrays(path, {"schema": OLD, "layers": list(before)}, arrays)


def read(path: Path) -> dict[str, tuple[Array, Array]]:
    """What `write` kept. DataError for another file."""
    head, arrays = read_arrays(path, OLD)
    try:
        return {name: (arrays[f"{i}/mean"], arrays[f"{i}/variance"]) for i, name in enumerate(head["layers"])}
    except KeyError as error:
        raise DataError(f"{path}: {error} is missing; the file is damaged") from None


def fingerprint(layers: Sequence[BatchNorm]) -> str:
    """Of the layers' names and old statistics: parts of the data must have been measured on one model."""
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(repr(layer.name).encode())
        digest.update(layer.mean.tobytes() + layer.variance.tobytes())
    return digest.hexdigest()


def write_part(path: Path, layers: Sequence[BatchNorm], measured: Measurement, method: Method, part: tuple[int, int], model: str) -> None:
    """Keep what one part of the data gave."""
    head = {
        "schema": PART,
        "method": method.name,
        "settings": dataclasses.asdict(method),
        "part": part,
        "model": model,
        "layers": [layer.name for layer in layers],
        "samples": measured.samples,
        "batches": measured.batches,
    }
    arrays: dict[str, Any] = {}
    for i, tally in enumerate(measured.tallies):
        arrays |= packed(tally.moments, str(i))
        arrays[f"{i}/batches"] = tally.batches
    write_arrays(path, head, arrays)


def read_parts(paths: Sequence[Path], layers: Sequence[BatchNorm]) -> tuple[Measurement, Method]:
    """All parts together. UsageError unless they are just the parts of one measurement of this model."""
    if not paths:
        raise UsageError("name the files that the parts were written to")
    found = [read_arrays(path, PART) for path in paths]
    first, model = found[0][0], fingerprint(layers)
    seen: dict[int, Path] = {}
    for path, (head, _) in zip(paths, found, strict=True):
        for key in ("method", "settings"):
            if head[key] != first[key]:
                raise UsageError(f"{path}: measured with other {key} ({head[key]}) than {paths[0]} ({first[key]})")
        if head["part"][1] != first["part"][1]:
            raise UsageError(f"{path}: one of {head['part'][1]} parts, and {paths[0]} is one of {first['part'][1]}")
        if head["model"] != model:
            raise UsageError(f"{path}: measured on another model, or on other layers of it")
        if (index := head["part"][0]) in seen:
            raise UsageError(f"{path}: part {index} was given already, by {seen[index]}; no sample may count twice")
        seen[index] = path
    if missing := [i for i in range(first["part"][1]) if i not in seen]:
        raise UsageError(f"of {first['part'][1]} parts, {', '.join(map(str, missing))} {'is' if len(missing) == 1 else 'are'} missing")
    method = METHODS[first["method"]](**first["settings"])
    in_order = [arrays for _, arrays in sorted(found, key=lambda each: each[0]["part"][0])]
    tallies = []
    for i, layer in enumerate(layers):
        total = method.start(layer.mean, layer.variance)
        for arrays in in_order:
            total = total + Accumulator(unpacked(arrays, str(i)), arrays[f"{i}/batches"], total.running)
        tallies.append(total)
    samples, batches = (sum(head[key] for head, _ in found) for key in ("samples", "batches"))
    return Measurement(tallies, samples, batches), method


def packed(moments: Moments, name: str) -> dict[str, Any]:
    """As arrays of a file."""
    return {f"{name}/{field}": np.asarray(getattr(moments, field)) for field in MOMENTS}


def unpacked(arrays: Mapping[str, Any], name: str) -> Moments:
    """What `packed` made arrays of."""
    values = {field: arrays[f"{name}/{field}"] for field in MOMENTS}
    return Moments(**{field: value if value.ndim else value.item() for field, value in values.items()})


def write_arrays(path: Path, head: dict[str, Any], arrays: dict[str, Any]) -> None:
    """A file of arrays and what they are, the same whatever the Python, which numpy's own `savez` isn't. head: with `schema`."""
    text = json.dumps({"schema": head["schema"], "bnfold": __version__} | head)
    with replacing(path) as (part,), zipfile.ZipFile(part, "w") as archive:
        for name, array in {"head": text, **arrays}.items():
            content = io.BytesIO()
            np.save(content, np.asarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())


def is_statistics(path: Path) -> bool:
    """Whether a file holds arrays, and no model, whatever its name; of what can't be opened that alone tells."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except DAMAGED_ZIP:
        return path.suffix.lower() == ".npz"


def read_arrays(path: Path, schema: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write_arrays` wrote. DataError for a file of another schema."""
    what = WHAT[schema]
    if why := unreadable(path):
        raise DataError(f"{path}: {why}; it should hold {what}")
    try:
        if not zipfile.is_zipfile(path):  # numpy takes what is no archive for a pickle, and says that
            raise ValueError("File is not a zip file")
        if too_much := bomb(path):
            raise ValueError(too_much)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        head = json.loads(str(arrays.pop("head", "{}")))
    except Exception as error:  # numpy raises what it likes, the errors of Python's tokenizer among them
        raise DataError(f"{path}: this isn't {what} ({first_line(error)})") from None
    found = head.get("schema") if isinstance(head, dict) else None
    if found != schema:
        raise DataError(f"{path}: this isn't {what}, but {repr(found) if found else 'arrays of something else'}")
    return head, arrays
