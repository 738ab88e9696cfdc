"""Files of arrays: .npy, .npz, .safetensors, .pt and .pth."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.errors import DataError
from bnfold.files import bomb, most_unpacked, unreadable
from bnfold.text import first_line


def read(path: Path) -> Any:
    """The file's array, or its arrays by name. DataError for one that isn't what its name says, or that would run code when read."""
    form = path.suffix.lower()
    try:
        check_beginning(path)
        if what := bomb(path):
            raise DataError(f"{path}: {what}; save it without compression")
        return READERS[form](path)
    except DataError:
        raise
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError, AttributeError, TypeError, RuntimeError, MemoryError) as error:
        reason = first_line(error)
    except Exception as error:
        # safetensors' and pickle's own errors derive from Exception alone
        if type(error).__module__.partition(".")[0] not in ("safetensors", "pickle", "_pickle"):
            raise
        reason = first_line(error)
    if any(sign in reason for sign in ("allow_pickle", "Python objects", "weights_only", "Weights only")):
        reason = "it holds Python objects, which could run code when read; save plain arrays"
    raise DataError(f"{path}: can't be read as {form} ({reason})")


def _npz(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("this is no zip archive")
        return dict(file)


def _safetensors(path: Path) -> Any:
    import ml_dtypes  # noqa: F401 - gives numpy the bfloat16 that safetensors asks it for
    from safetensors.numpy import load_file

    return load_file(path)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise DataError(
            f"{path}: reading it needs PyTorch, which isn't installed: pip install torch onnxscript, or save it as .npy or .npz"
        ) from None
    found = torch.load(path, map_location="cpu", weights_only=True)
    size = path.stat().st_size
    if (made := _stands_for(found, {})) > most_unpacked(size):
        raise DataError(f"{path}: it has {size:,} bytes and stands for {made:,.0f}, some of its numbers for many; save plain arrays")
    return found


def _stands_for(found: Any, seen: dict[int, float]) -> float:
    """The bytes that it takes where nothing stands for more than one thing. seen: what is known of containers; one in itself is endless."""
    if not isinstance(found, (list, tuple, dict)):
        return float(getattr(found, "nbytes", 8))
    if id(found) not in seen:
        seen[id(found)] = math.inf
        seen[id(found)] = 8.0 + sum(_stands_for(each, seen) for each in (found.values() if isinstance(found, dict) else found))
    return seen[id(found)]


READERS: dict[str, Callable[[Path], Any]] = {
    ".npy": lambda path: np.load(path, mmap_mode="r", allow_pickle=False),
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _torch,
    ".pth": _torch,
}
# How such files begin: numpy and PyTorch take anything else for a pickle, and would say that of a web page too.
BEGINNINGS = {".parquet": (b"PAR1",), ".npy": (b"\x93NUMPY",), ".npz": (b"PK",), ".pt": (b"PK", b"\x80"), ".pth": (b"PK", b"\x80")}


def check_beginning(path: Path) -> None:
    """DataError for a file that doesn't begin as its name says."""
    form = path.suffix.lower()
    if why := unreadable(path):
        raise DataError(f"{path}: can't be read as {form} ({why})")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: can't be read as {form} ({first_line(error)})") from None
    if not head:
        raise DataError(f"{path}: the file is empty")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: this is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise DataError(f"{path}: this is a web page, not a {form} file; download the file itself")
    if not head.startswith(BEGINNINGS.get(form, b"")):
        raise DataError(f"{path}: can't be read as {form} (it doesn't begin as such a file does)")
