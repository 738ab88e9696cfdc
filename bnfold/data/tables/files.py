"""Which files hold tables: tar shards and Parquet files, by name, by pattern or in a folder, and what save_to_disk wrote."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from bnfold.errors import DataError

from ..images.folder import find

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
            raise DataError(f"{spec}: there is no file {name}" if name != spec else f"{spec}: there is no such file")
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
