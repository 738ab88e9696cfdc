"""Whether an exported program's archive can be loaded without running code that it brings along.

A .pt2 file is a zip archive of JSON and raw tensors, but `torch.export.load` also unpickles parts of it, evaluates its size expressions as
Python (sympy.sympify), calls whatever attribute of torch its operators name, and imports modules that its structure names. So each part is
looked at first, and only what a plain export holds passes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...errors import ModelError

REMEDY = "give --trust-pickle if you trust where it comes from"
LARGEST_JSON = 1 << 28  # bytes
RATIO = 200  # of unpacked to packed, beyond which an entry is a bomb; archives of PyTorch aren't packed at all
# What sizes are made of: symbols, numbers, and the functions of sympy and of torch.utils._sympy.
FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        "Symbol Add Mul Pow Rational Float Integer "
        "Mod PythonMod FloorDiv CleanDiv CeilDiv CeilToInt FloorToInt IntTrueDiv FloatTrueDiv Max Min Abs "
        "Where Eq Ne Lt Le Gt Ge And Or Not ToFloat TruncToInt RoundToInt ModularIndexing LShift RShift "
        "PowByNatural FloatPow ceiling floor sqrt int_oo oo Integer Identity NonNegative True False Piecewise ",
    )
)
EXPRESSION = re.compile(r"[\w\s+\-*/%(),<>=&|~^!]*")
SYMBOL = re.compile(r"[a-z]{1,12}\d*|unbacked_\w+")  # s77, u0, and what is said of a symbol: positive, integer
TARGETS = re.compile(
    r"torch\.ops\.[\w.]+|_operator\.\w+|math\.\w+|torch\._?sym_\w+|torch\._higher_order_ops[\w.]*|#.*|(?!torch|_operator|math)[\w.]*"
)
PICKLES = (".pkl", "serialized_constants.pt", "serialized_state_dict.pt")
IMPORTS = ("builtins", "collections", "torch.")


def check_archive(path: Path) -> None:
    """Raise ModelError for an archive that is damaged, or whose loading could run code of its own."""
    try:
        with zipfile.ZipFile(path) as archive:
            if trouble := next(_troubles(archive), None):
                raise ModelError(f"{path}: {trouble}, which can run code when it is loaded; {REMEDY}")
    except (zipfile.BadZipFile, UnicodeDecodeError, json.JSONDecodeError, OSError, EOFError) as error:
        raise ModelError(f"{path}: a damaged exported program ({error}); export it again") from None


def _troubles(archive: zipfile.ZipFile) -> Iterator[str]:
    entries = archive.infolist()
    for entry in entries:
        name = entry.filename
        if name.startswith("/") or ".." in name.split("/"):
            yield f"its entry {name!r} reaches outside the archive"
        if entry.file_size > RATIO * max(entry.compress_size, 1 << 16):
            yield f"its entry {name!r} unpacks to {entry.file_size:,} bytes"
        last = name.rpartition("/")[2]
        if name.endswith((".so", ".dll", ".dylib", ".cubin", ".py", ".pyc")):
            yield f"it holds compiled or Python code ({name!r})"
        if last.startswith(("custom_obj_", "opaque_obj_")) or name.endswith(
            (".pkl", "serialized_constants.pt", "serialized_state_dict.pt")
        ):
            yield f"it holds a pickled object ({name!r})"
    for entry in entries:
        if entry.filename.endswith(".json"):
            if entry.file_size > LARGEST_JSON:
                yield f"its entry {entry.filename!r} is too large to be looked at ({entry.file_size:,} bytes)"
                continue
            yield from _in_json(json.loads(archive.read(entry)), entry.filename)
        elif "sample_inputs" in entry.filename.split("/") and entry.file_size:
            try:
                torch.load(io.BytesIO(archive.read(entry)), weights_only=True)
            except Exception:  # unpicklers raise what they like
                yield f"its example inputs are no plain tensors ({entry.filename!r})"


def _in_json(value: Any, where: str, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _in_json(each, where, str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _in_json(each, where, key)
    elif key == "use_pickle" and value:
        yield f"it holds pickled tensors ({where!r})"
    elif isinstance(value, str) and key == "expr_str" and not _is_size(value):
        yield f"it holds an expression that is no size ({value[:60]!r})"
    elif isinstance(value, str) and key == "target" and ("__" in value.replace("__and__", "") or not TARGETS.fullmatch(value)):
        yield f"it calls {value[:60]!r}"
    elif isinstance(value, str) and key in ("in_spec", "out_spec", "treespec") and value:
        yield from _in_spec(value)


def _is_size(text: str) -> bool:
    """Whether an expression is made of symbols, numbers and known functions alone: no attribute, no text, no other call."""
    bare = re.sub(r"'\w+'", "s0", re.sub(r"\d+\.?\d*(?:e[+-]?\d+)?", "0", text))
    called = set(re.findall(r"([A-Za-z_]\w*)\s*\(", bare))
    plain = set(re.findall(r"[A-Za-z_]\w*", bare)) - called
    return bool(EXPRESSION.fullmatch(bare)) and called <= FUNCTIONS and all(SYMBOL.fullmatch(n) or n in FUNCTIONS for n in plain)


def _in_spec(text: str) -> Iterator[str]:
    for name in re.findall(r'"([A-Za-z_]\w*(?:\.\w+)+)"', text.replace('\\"', '"')):
        if not name.startswith(IMPORTS):
            yield f"its inputs or outputs are of a type of their own ({name!r})"
