"""The certificate that a folded model carries: what it was made from, what was folded, and the verdict of the check with its figures.

It is JSON of the schema `bnfold.certificate/1`, under the key `bnfold.certificate`: in an ONNX file's metadata_props, in a safetensors
file's metadata, beside the weights in a .pth, among the extra files of a .pt2. It changes nothing that computes. Its claim is
about the files whose hashes it states: a model with statistics measured afresh loses it, and what came before is kept under `earlier`.
Anyone can write anything into a file, so the claim is worth what `bnfold verify FUSED --against ORIGINAL` finds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ._version import __version__
from .backends.metadata import LONGEST, attach, files_of, text_in, text_of
from .errors import NO_BATCHNORM, CheckError, InputError, ModelError, UnsupportedError
from .text import encodable, listed

if TYPE_CHECKING:
    from .model import Model
    from .report import FuseReport, VerifyReport

SCHEMA = "bnfold.certificate/1"
MOST_EARLIER = 8


# --- what a model came from -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """A file as it was when it was loaded."""

    path: Path
    size: int
    changed: int

    def stated(self) -> dict[str, str]:
        """Its name and hash; no hash where it isn't that file any more."""
        same = _stat(self.path) == (self.size, self.changed)
        return {"name": self.path.name, "sha256": sha256(self.path) if same else ""}


@dataclass(frozen=True)
class _Origin:
    files: tuple[_File, ...]
    recalibrated: bool = False


_origins: WeakKeyDictionary[Any, _Origin] = WeakKeyDictionary()


def loaded(model: Any, path: Path) -> Any:
    """Note which files a model was read from."""
    found = [(file, _stat(file)) for file in files_of(model, path)]
    _origins[model] = _Origin(tuple(_File(file.absolute(), *stat) for file, stat in found if stat is not None))
    return model


def folder_of(model: Any) -> Path:
    """Where the file lies that a model was read from; the working directory where it wasn't."""
    files = _origin(model).files
    return files[0].path.parent if files else Path.cwd()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _origin(model: Any) -> _Origin:
    try:
        return _origins.get(model, _Origin(()))
    except TypeError:  # a proto can't be told from its equals
        return _Origin(())


# --- in a model -----------------------------------------------------------------------------------------------------------------------


def folded(model: Any, fused: Any, report: FuseReport) -> None:
    """Write the certificate of a fold into its result. model: what was folded, `fused`: a new one, of onnx_ir or PyTorch."""
    origin = _origin(model)
    norms = [layer for layer in report.layers if layer.batchnorm]
    layers = {verdict: [layer.name for layer in norms if layer.verdict == verdict] for verdict in ("folded", "lowered", "kept")}
    found = {
        "schema": SCHEMA,
        "bnfold": __version__,
        "made_by": "fuse",
        "inputs": [file.stated() for file in origin.files],
        "recalibrated": origin.recalibrated,
        "batchnorms": {"before": report.batchnorms.before, "after": report.batchnorms.after},
        **layers,
        "constants": [layer.name for layer in report.layers if not layer.batchnorm],
        "merged": [merged.into for merged in report.merged],
        "composed": {each.into: [*each.layers] for each in report.composed if each.into and not each.behind},
        "dropped": {each.name: each.dropped for each in report.dropped if each.dropped},
        "clamped": [*report.clamped],
        "equalised": sorted({name for each in report.equalised if each.factor != 1 for name in each.layers}),
        "verdict": _verdict(report.verify),
        "earlier": _earlier(model),
    }
    _put(fused, found)
    _origins[fused] = origin


def kept(fused: Any, files: Iterable[Path]) -> None:
    """Put into the certificate of what a pipeline made that it was folded from the recalibrated model, now that this is in these files.

    What the recalibrated one was made of is said before that, so that nobody holds the result against the wrong one.
    """
    if (found := certificate(fused)) is None:
        return
    before = {key: found[key] for key in ("schema", "bnfold", "inputs", "recalibrated")} | {"made_by": "recalibrate", "verdict": None}
    inputs = [{"name": path.name, "sha256": sha256(path)} for path in files]
    _put(fused, {**found, "inputs": inputs, "recalibrated": False, "earlier": [before, *found["earlier"]]})


def nothing_to_fold(model: Model) -> str:
    """What to say of a model that holds no BatchNorm: that bnfold folded them, where it did."""
    try:
        found = certificate(model.source)
    except ModelError:
        found = None
    counts = found.get("batchnorms") if found is not None else None
    if not isinstance(counts, Mapping):
        return model.nothing_to_fold
    names = ", ".join(_stated(found or {})) or "a model in memory"
    return f"{NO_BATCHNORM}; bnfold has folded it already ({counts.get('before')} BatchNorms before, from {names})"


def verified(fused: Any, report: VerifyReport) -> None:
    """Put a fuller verdict into the certificate of a model that was just made."""
    if (found := certificate(fused)) is not None:
        _put(fused, {**found, "made_by": "pipeline", "verdict": _verdict(report)})


def recalibrated(model: Any, fresh: Any) -> Any:
    """The copy with new statistics: it claims no more to be what its file was, and states what did."""
    origin = _Origin(_origin(model).files, True)
    if earlier := _earlier(model):
        inputs = [file.stated() for file in origin.files]
        made = {"schema": SCHEMA, "bnfold": __version__, "made_by": "recalibrate", "inputs": inputs, "recalibrated": True, "verdict": None}
        _put(fresh, {**made, "earlier": earlier})
    _origins[fresh] = origin
    return fresh


def _verdict(report: VerifyReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    text = json.dumps(report.to_dict())
    plain = json.loads(text, parse_float=lambda number: float(f"{float(number):.3g}"))  # the rest is another numpy's to decide
    return {key: plain[key] for key in ("verdict", "reason", "levels", "outputs")}


def _earlier(model: Any) -> list[dict[str, Any]]:
    """The model's own certificate and those before it, the latest first, without the names of layers."""
    try:
        own = certificate(model)
    except ModelError:
        own = None
    if own is None:
        return []
    before = own.get("earlier")
    names = ("earlier", "folded", "lowered", "kept", "constants", "merged", "composed", "dropped", "clamped", "equalised", "verdict")
    brief = {key: value for key, value in own.items() if key not in names}
    verdict = own.get("verdict")
    brief["verdict"] = verdict.get("verdict") if isinstance(verdict, Mapping) else None
    return [brief, *(before if isinstance(before, list) else [])][:MOST_EARLIER]


def _put(model: Any, found: dict[str, Any]) -> None:
    text = json.dumps(found, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    attach(model, encodable(text))


# --- reading it -----------------------------------------------------------------------------------------------------------------------


def certificate(model_or_path: Any) -> dict[str, Any] | None:
    """The certificate of a model, or of a model's file, as a dict; None where there is none.

    Of a file no more is read than that. Raises ModelError where the file can't be read, or its certificate isn't one.
    """
    if isinstance(model_or_path, (str, Path)):
        path = Path(model_or_path)
        return _parsed(text_in(path), f"{path}: ")
    return _parsed(text_of(model_or_path), "")


def _parsed(text: str | None, where: str) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text) if len(text) <= LONGEST else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not str(found.get("schema", "")).startswith("bnfold.certificate/"):
        raise ModelError(f"{where}the certificate in it is damaged: it is no JSON of the schema {SCHEMA}; fold the model again")
    return found


# --- holding it against the original ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What a certificate claims of an original whose hash it states. stated: its verdict, None where it was made without a check."""

    stated: str | None

    def held(self, report: VerifyReport) -> VerifyReport:
        """The report of the verification that was run again, with whether the claim holds."""
        import dataclasses

        from .report import Certified

        now = report.verdict
        holds = now == "equivalent" and self.stated in (now, None)
        said = f"the certificate's verdict ({self.stated})" if self.stated else "the certificate holds no verdict; the one made now is"
        text = f"{said} {'still holds' if holds else f'does not hold: it is now {now}'}" if self.stated else f"{said} {now}"
        return dataclasses.replace(report, certificate=Certified(self.stated, holds, text))


def claim(fused: Any, path: Path, original: Any, original_path: Path) -> Claim:
    """What the certificate of a folded model claims of an original.

    Raises ModelError where there is none, CheckError where it states other files than the original's, UnsupportedError where it claims no
    equivalence with them.
    """
    try:
        found = certificate(fused)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    if found is None:
        raise ModelError(f"{path}: no certificate in it; bnfold fuse and bnfold pipeline write one, and other tools may drop it")
    stated = _stated(found)
    for file in files_of(original, original_path):
        actual = _hash(file)
        if actual not in stated.values() and any(actual in _stated(each).values() for each in _entries(found)):
            raise UnsupportedError(
                f"{file}: {path} was folded from {listed(stated)}, whose statistics were measured afresh on the way from this; hold it "
                "against that"
            )
        if actual not in stated.values():
            files = ", ".join(f"{hash_ or 'no hash'} ({name})" for name, hash_ in stated.items()) or "no file"
            raise CheckError(f"{file}: not what {path} was made from: its SHA-256 is {actual}, and the certificate states {files}")
    if found.get("recalibrated"):
        raise UnsupportedError(
            f"{path}: its certificate states {original_path}, but claims no equivalence with it, for the statistics were measured afresh "
            f"in between; run bnfold pipeline with --keep-recalibrated FILE, and hold the folded one against that file"
        )
    verdict = found.get("verdict")
    said = verdict.get("verdict") if isinstance(verdict, Mapping) else None
    return Claim(said if isinstance(said, str) else None)


def _entries(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What came before."""
    earlier = found.get("earlier")
    return [entry for entry in earlier if isinstance(entry, Mapping)] if isinstance(earlier, list) else []


def _stated(found: Mapping[str, Any]) -> dict[str, str]:
    inputs = found.get("inputs")
    entries: Iterable[Any] = inputs if isinstance(inputs, list) else ()
    return {str(entry.get("name")): str(entry.get("sha256", "")) for entry in entries if isinstance(entry, Mapping)}


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
