"""Whether an exported program's archive can be loaded without running code that it brings along.

A .pt2 file is a zip archive of JSON and raw tensors, but `torch.export.load` also unpickles parts of it, and what it makes of the JSON is
Python that is compiled and run (see `archive_json`). So each part is looked at first, by the reader that will load it, and only what a
plain export holds passes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bnfold.errors import ModelError
from bnfold.text import one_line

from .archive_json import is_plain_text, payload_troubles, program_troubles

REMEDY = "give --trust-pickle if you trust where it comes from"
# What reading an archive raises whose parts aren't what they should be.
DAMAGED = (zipfile.BadZipFile, ValueError, OSError, EOFError, RuntimeError, LookupError, TypeError, AttributeError)
LARGEST_JSON = 1 << 28  # bytes
RATIO = 200  # of unpacked to packed, beyond which an entry is a bomb; archives of PyTorch aren't packed at all
# The entries of an archive that holds nothing but an exported program, below its root.
PROGRAM = re.compile(r"models/[\w-]+\.json")
PAYLOAD = re.compile(r"data/(weights/[\w-]+_weights|constants/[\w-]+_constants)_config\.json")
INPUTS = re.compile(r"data/sample_inputs/[\w-]+\.pt")
PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/[\w-]+|\.format_version|\.storage_alignment"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|extra/.*"
)
CODE = re.compile(r"(data/)?aotinductor/.*|.*\.(so|dll|dylib|cubin|hsaco|ptx|py|pyc|cpp|o)")


def check_archive(path: Path) -> None:
    """Raise ModelError for an archive that is damaged, or whose loading could run code of its own."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if trouble := next(_in_directory(entries), None) or next(_in_entries(path, entries), None):
            raise ModelError(f"{path}: {trouble}, which can run code when it is loaded; {REMEDY}")
    except DAMAGED as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise ModelError(f"{path}: a damaged exported program ({what}); export it again") from None


def _in_directory(entries: list[zipfile.ZipInfo]) -> Iterator[str]:
    """What the names and sizes of the entries give away."""
    if any(entry.filename == "serialized_exported_program.json" for entry in entries):
        yield "it is of the kind that PyTorch 2.7 and older wrote, which is unpickled"
    for entry in entries:
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            yield f"its entry {name!r} reaches outside the archive"
        if entry.file_size > RATIO * max(entry.compress_size, 1 << 16):
            yield f"its entry {name!r} unpacks to {entry.file_size:,} bytes"
        inner = name.partition("/")[2]
        if CODE.fullmatch(inner):
            yield f"it holds compiled or Python code ({name!r})"
        if not any(kind.fullmatch(inner) for kind in (PROGRAM, PAYLOAD, INPUTS, PLAIN)):
            yield f"it holds a pickled object, or something else that isn't known to be plain ({name!r})"
    if len({entry.filename.partition("/")[0] for entry in entries}) != 1:
        yield "its entries have several roots"


def _in_entries(path: Path, entries: list[zipfile.ZipInfo]) -> Iterator[str]:
    """What is in the entries, as PyTorch's own reader sees them: another reader may see another archive in the same file."""
    reader = torch._C.PyTorchFileReader(str(path))
    names = reader.get_all_records()
    stated = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
    sizes = getattr(reader, "get_record_size", stated.__getitem__)  # before PyTorch 2.11 the reader doesn't tell them
    if Counter(name.lower() for name in names) != Counter(entry.filename.partition("/")[2].lower() for entry in entries):
        yield "its table of contents can be read in two ways"
    if max(Counter(name.lower() for name in names).values()) > 1:
        yield "it holds several entries of one name"
    for name in names:
        if PROGRAM.fullmatch(name) or PAYLOAD.fullmatch(name):
            if sizes(name) > LARGEST_JSON:
                yield f"its entry {name!r} is too large to be looked at"
            found = json.loads(reader.get_record(name).decode("utf-8"))
            yield from (program_troubles if PROGRAM.fullmatch(name) else payload_troubles)(found)
        elif INPUTS.fullmatch(name) and (data := reader.get_record(name)):
            yield from _in_inputs(data, name)


def _in_inputs(data: bytes, name: str) -> Iterator[str]:
    """The arguments of the export. The names in them become part of the code of guards."""
    try:
        found = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # unpicklers raise what they like
        yield f"its example inputs are no plain tensors ({name!r})"
        return
    for place, _ in pytree.tree_flatten_with_path(found)[0]:
        if not all(is_plain_text(_key(step)) for step in place):
            yield f"its example inputs have names that aren't plain ({name!r})"


def _key(step: Any) -> str:
    return str(next((getattr(step, kind) for kind in ("key", "idx", "name") if hasattr(step, kind)), "'"))
