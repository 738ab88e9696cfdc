"""What kind of model a file holds, by its content: without importing a framework, and without believing its name."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path

# By the ends of the names in a zip archive, the first that fits.
ARCHIVES = (
    ("constants.pkl", "torchscript"),
    ("serialized_exported_program.json", "pt2"),
    ("archive_format", "pt2"),
    ("data.pkl", "pickle"),
)


def kind_of(path: str | Path) -> str:
    """ "pickle" (a checkpoint or a module), "safetensors", "pt2" or "torchscript"; "onnx" for all else, which its loader then judges."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError:
        return "onnx"
    if head.startswith(b"PK\x03\x04"):
        with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for ending, kind in ARCHIVES:
                if any(name.endswith(ending) for name in names):
                    return kind
        return "onnx"
    if head[8:10] == b'{"' and 2 <= int.from_bytes(head[:8], "little") <= max(path.stat().st_size - 8, 0):
        return "safetensors"
    return "pickle" if head[:1] == b"\x80" and 2 <= head[1] <= 5 else "onnx"
