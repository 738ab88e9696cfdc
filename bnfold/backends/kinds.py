"""Of which kind a model is, without importing a framework: an object by its class, a file by its content, and not by its name.

Models may be named by where they come from, too: hf://OWNER/REPOSITORY/FILE, and timm:NAME.
"""

from __future__ import annotations

import contextlib
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

from bnfold.errors import ModelError, UnsupportedError, UsageError
from bnfold.files import DAMAGED_ZIP, neighbours, unreadable
from bnfold.text import first_line

# By the ends of the names in a zip archive, the first that fits.
ARCHIVES = (
    ("constants.pkl", "torchscript"),
    ("serialized_exported_program.json", "pt2"),
    ("archive_format", "pt2"),
    ("data.pkl", "pickle"),
)


LARGEST_INDEX = 1 << 26  # bytes
INDEX = "*.safetensors.index.json"


def kind_of(path: str | Path) -> str:
    """ "pickle" (a checkpoint or a module), "safetensors", "shards" (an index of such), "pt2", "torchscript", or "timm" for a name; "onnx"
    for all else, which its loader then judges."""
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
    if head.lstrip()[:1] == b"{" and path.stat().st_size <= LARGEST_INDEX and b'"weight_map"' in path.read_bytes():
        return "shards"
    return "pickle" if head[:1] == b"\x80" and 2 <= head[1] <= 5 else "onnx"


def check_readable(path: Path) -> None:
    """ModelError for what can't be read as a file, of which nobody knows the kind."""
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            raise ModelError(f"{path}: a TensorFlow SavedModel; convert it to ONNX with tf2onnx")
        raise ModelError(f"{path}: a folder, not a model file; name the file in it")
    if why := unreadable(path):
        raise ModelError(f"{path}: {why}{neighbours(path)}")


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


HUGGING_FACE = re.compile(r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")  # a path has one slash of two
ADDRESS = re.compile(r"[a-z]+:/{1,2}.*", re.IGNORECASE)
BESIDE = "preprocessor_config.json"


def is_timm(path: str | Path) -> bool:
    return str(path).startswith("timm:")


def local(name: str | Path) -> Path:
    """The file that is meant, which for hf:// is fetched, with what its weights are in and how images are prepared for it.

    UsageError for a name that can't be one; UnsupportedError without huggingface_hub; ModelError where it isn't there, or no network is.
    """
    text = re.sub("^hf:/{1,2}", "hf://", str(name))
    if (found := HUGGING_FACE.fullmatch(text)) is None:
        if text.startswith("hf:"):
            raise UsageError(f"{text}: write it as hf://OWNER/REPOSITORY/FILE, or hf://OWNER/REPOSITORY@REVISION/FILE")
        if len(text.partition(":")[0]) > 1 and ADDRESS.fullmatch(text):
            raise UsageError(f"{text}: an address, not a file; download it, or name it as hf://OWNER/REPOSITORY/FILE where it lies there")
        return _index_in(Path(name))
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UnsupportedError(f"{text}: fetching it needs huggingface_hub: pip install huggingface_hub, or download the file") from None
    file = found["file"]
    wanted = [file, f"{file}_data", f"{file}.data", BESIDE, f"{Path(file).parent}/{BESIDE}"]
    if file.endswith(INDEX[1:]):
        wanted.append(f"{file.removesuffix(INDEX[1:])}-*.safetensors")
    try:
        path = Path(snapshot_download(found["repo"], revision=found["revision"], allow_patterns=wanted)) / file
    except Exception as error:  # of the hub's own kinds, and of whatever carries its requests
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{text}: can't be fetched ({why}); is the name right, and is there a network?") from None
    if not path.is_file():
        raise ModelError(f"{text}: there is no file {file} in that repository")
    return path


def _index_in(path: Path) -> Path:
    """The index of a folder's safetensors files, where it holds a single one; else the path itself."""
    found = sorted(path.glob(INDEX)) if path.is_dir() else []
    return found[0] if len(found) == 1 else path
