"""Files of arrays (.npy, .npz, .safetensors, .pt and .pth), and which files hold tables: tar shards, Parquet, what save_to_disk wrote."""

from __future__ import annotations

import glob
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.errors import DataError
from bnfold.files import bomb, most_unpacked, neighbours, unreadable
from bnfold.text import first_line

from .images.pipeline import find


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
    except Exception as error:  # readers raise what they like, numpy the errors of Python's tokenizer
        reason = first_line(error)
    if any(sign in reason for sign in ("allow_pickle", "Python objects", "weights_only", "Weights only")):
        reason = "it holds Python objects, which could run code when read; save plain arrays"
    raise DataError(f"{path}: can't be read as {form} ({reason})")


def _npz(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # numpy takes what is no archive for a pickle, and says that
        raise ValueError("this is no zip archive, or a damaged one")
    with np.load(path, allow_pickle=False) as file:
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


FORMS = (".tar", ".parquet")
SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val"}


def files_in_table(spec: str) -> list[Path] | None:
    """The files of a table, none for a folder of save_to_disk; None where the data are of another form."""
    folder = Path(spec)
    if not folder.is_dir():
        return files_of(spec)
    if is_saved(folder):
        return []
    others = any(folder.glob("*.npy")) or not any(p.suffix.lower() in FORMS for p in folder.iterdir()) or any(find(folder))
    return None if others else files_in(folder) or None


def files_of(spec: str) -> list[Path] | None:
    """The .tar or .parquet files that a name or a pattern (`*`, `?`, `[...]`, `{000..009}`, `{a,b}`) stands for; None for any other."""
    if Path(spec).suffix.lower() not in FORMS:
        return None
    if Path(spec).is_file():
        return [Path(spec)]
    found = []
    for name in _braces(spec):
        paths = sorted(glob.glob(name)) if glob.has_magic(name) else [name] if Path(name).is_file() else []
        if not paths:
            raise DataError(f"{spec}: there is no file {name}" if name != spec else f"{spec}: there is no such file{neighbours(spec)}")
        found += [Path(path) for path in paths]
    return found


def _braces(text: str) -> Iterator[str]:
    """`a-{08..10}` is a-08, a-09 and a-10, `{a,b}` is a and b, as in a shell."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if match is None:
        yield text
        return
    if match[3] is not None:
        parts = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        width = len(match[1]) if match[1].startswith("0") else 0
        parts = [f"{n:0{width}d}" for n in range(first, last + 1)]
    for part in parts:
        yield from _braces(text[: match.start()] + part + text[match.end() :])


def files_in(folder: Path) -> list[Path]:
    """The shards in a folder, which are of one kind and of one split; none where it holds no such files."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in FORMS and p.is_file() and not p.name.startswith("."))
    kinds = sorted({p.suffix.lower() for p in paths})
    if len(kinds) > 1:
        raise DataError(f"{folder}: it holds {' and '.join(kinds)} files; name those of one kind, say {folder / f'*{kinds[0]}'}")
    words = {p: re.split(r"[^a-z]", p.name.lower())[0] for p in paths}
    splits = {SPLITS.get(word, "") for word in words.values()}
    if len(splits) > 1:
        first = next(p for p in paths if words[p] in SPLITS)
        raise DataError(
            f"{folder}: its files are of several splits ({', '.join(sorted(set(words.values())))}); name those of one, "
            f"say {folder / (first.name[: len(words[first])] + '*' + first.suffix)}"
        )
    return paths


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote the folder with save_to_disk."""
    return (folder / "dataset_dict.json").is_file() or ((folder / "dataset_info.json").is_file() and (folder / "state.json").is_file())
