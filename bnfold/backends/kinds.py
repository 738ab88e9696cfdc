"""Of which kind a model is, without importing a framework: an object by its class, a file by its content, and not by its name."""

from __future__ import annotations

import contextlib
import sys
import zipfile
from pathlib import Path
from typing import Any

from bnfold.errors import ModelError, UnsupportedError, UsageError
from bnfold.files import DAMAGED_ZIP, unreadable

from .hub import is_timm

# By the ends of the names in a zip archive, the first that fits.
ARCHIVES = (
    ("constants.pkl", "torchscript"),
    ("serialized_exported_program.json", "pt2"),
    ("archive_format", "pt2"),
    ("data.pkl", "pickle"),
)


def kind_of(path: str | Path) -> str:
    """ "pickle" (a checkpoint or a module), "safetensors", "pt2", "torchscript", or "timm" for a name; "onnx" for all else, which its
    loader then judges."""
    if is_timm(path):
        return "timm"
    path = Path(path)
    if unreadable(path):
        return "onnx"
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError:
        return "onnx"
    if head.startswith(b"PK\x03\x04"):
        with contextlib.suppress(*DAMAGED_ZIP), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for ending, kind in ARCHIVES:
                if any(name.endswith(ending) for name in names):
                    return kind
        return "onnx"
    if head[8:10] == b'{"' and 2 <= int.from_bytes(head[:8], "little") <= max(path.stat().st_size - 8, 0):
        return "safetensors"
    return "pickle" if head[:1] == b"\x80" and 2 <= head[1] <= 5 else "onnx"


def check_readable(path: Path) -> None:
    """ModelError for what can't be read as a file, of which nobody knows the kind."""
    if path.is_dir():
        raise ModelError(f"{path}: a folder, not a model file; name the file in it")
    if why := unreadable(path):
        raise ModelError(f"{path}: {why}")


def family(model: Any) -> str:
    """ "onnx" for an onnx_ir.Model or an onnx.ModelProto, "torch" for a torch.nn.Module, an ExportedProgram or the `Traced` of either.

    Raises UsageError for a path, UnsupportedError for anything else. Who holds a model has imported its framework, so none is here.
    """
    if (onnx := sys.modules.get("onnx")) is not None and isinstance(model, onnx.ModelProto):
        return "onnx"
    if (ir := sys.modules.get("onnx_ir")) is not None and isinstance(model, ir.Model):
        return "onnx"
    if (torch := sys.modules.get("torch")) is not None and isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        return "torch"
    if (trace := sys.modules.get(f"{__package__}.torch.export.trace")) is not None and isinstance(model, trace.Traced):
        return "torch"
    if isinstance(model, (str, Path)):
        raise UsageError(f"a model is expected, not a path: bnfold.load({str(model)!r})")
    raise UnsupportedError(
        f"a {type(model).__module__}.{type(model).__qualname__} is not a kind of model that bnfold knows: "
        "give a torch.nn.Module, an ExportedProgram, an onnx_ir.Model or an onnx.ModelProto"
    )
