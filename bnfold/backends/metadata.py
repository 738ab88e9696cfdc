"""Where a model carries the text of its certificate: in memory, and in its file, of which no more is read than that."""

from __future__ import annotations

import mmap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnfold.errors import ModelError
from bnfold.files import DAMAGED_ZIP, unreadable

from .kinds import family, kind_of

KEY = "bnfold.certificate"
ATTRIBUTE = "_bnfold_certificate"  # of a PyTorch model: the same text
LONGEST = 1 << 24  # characters; a longer one is none
METADATA = 14  # the number of metadata_props in ModelProto


def files_of(model: Any, path: Path) -> list[Path]:
    """The model's file, and those beside it that hold its weights."""
    if family(model) != "onnx" or not hasattr(model.graph, "initializers"):
        if kind_of(path) != "shards":
            return [path]
        from .torch.files.checkpoint import shards_of

        return [path, *sorted(shards_of(path))]
    tensors = (value.const_value for value in model.graph.initializers.values())
    return [path, *sorted({Path(tensor.path) for tensor in tensors if hasattr(tensor, "path")})]


def attach(model: Any, text: str | None) -> None:
    """Write a certificate's text into a model that is ours; None takes it out."""
    if family(model) == "torch":
        if text is not None:
            setattr(model, ATTRIBUTE, text)
        elif hasattr(model, ATTRIBUTE):
            delattr(model, ATTRIBUTE)
        return
    props = model.metadata_props
    if not hasattr(props, "pop") or not hasattr(props, "items"):  # a proto's
        kept = [entry for entry in props if entry.key != KEY]
        del props[:]
        props.extend(kept)
        if text is not None:
            props.add(key=KEY, value=text)
    elif text is None:
        props.pop(KEY, None)
    else:
        props[KEY] = text


def text_of(model: Any) -> str | None:
    """The certificate's text in a model."""
    if family(model) == "torch":
        found = getattr(model, ATTRIBUTE, None)
        return found if isinstance(found, str) else None
    props = model.metadata_props
    if hasattr(props, "items"):
        text: str | None = props.get(KEY)
        return text
    return next((str(entry.value) for entry in props if entry.key == KEY), None)


def text_in(path: Path) -> str | None:
    """The certificate's text in a file. Raises ModelError where it can't be read."""
    kind = kind_of(path)
    if kind == "onnx":
        return _text_in_onnx(path)
    if kind == "safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                return (file.metadata() or {}).get(KEY)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: a damaged safetensors file ({error}); download or save it again") from None
    if kind == "pt2":
        return text_in_archive(path)
    if kind != "pickle":
        return None
    from .torch.files.checkpoint import unpickled

    return text_beside(unpickled(path, False))


def text_beside(found: Any) -> str | None:
    """The same of what a checkpoint holds."""
    text = found.get(KEY) if isinstance(found, Mapping) else None
    return text if isinstance(text, str) else None


def text_in_archive(path: Path) -> str | None:
    """The same of an exported program."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((entry for entry in archive.infolist() if entry.filename.partition("/")[2] == f"extra/{KEY}"), None)
            if entry is None or entry.file_size > LONGEST:
                return None if entry is None else ""
            return archive.read(entry).decode("utf-8", "replace")
    except DAMAGED_ZIP as error:
        raise ModelError(f"{path}: a damaged exported program ({error}); export it again") from None


def _text_in_onnx(path: Path) -> str | None:
    import onnx

    from .onnx.files import storage

    if why := unreadable(path):
        raise ModelError(f"{path}: {why}")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for field in storage.fields(data):  # type: ignore[arg-type]  # it is indexed as bytes are
                if field.number == METADATA and field.kind == storage.BYTES:
                    entry = onnx.StringStringEntryProto.FromString(data[field.start : field.end])
                    if entry.key == KEY:
                        return str(entry.value)
    except OSError as error:
        raise ModelError(f"{path}: can't be read ({error.strerror or error})") from None
    except Exception:  # an empty file, and whatever the parsers of protocol buffers raise
        raise ModelError(f"{path}: not an ONNX model, or a damaged one; export or download it again") from None
    return None
