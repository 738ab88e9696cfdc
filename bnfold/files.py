"""Files that commands write: whether they can be, before any work is done, and writing them whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import InputError, UsageError


def ready_to_write(path: Path, *, suffixes: Sequence[str], force: bool, inputs: Iterable[Path]) -> None:
    """Fail now where the result couldn't be written in the end. UsageError: another name is needed; InputError: another folder.

    suffixes: how the name may end. force: whether a file of this name may be overwritten. inputs: the files that are read.
    """
    if path.suffix.lower() not in suffixes:
        such = f"{path.name.removesuffix(path.suffix) or 'out'}{suffixes[0]}"
        raise UsageError(f"{path}: the name must end in {' or '.join(suffixes)}, such as {such}")
    if path.is_dir():
        raise UsageError(f"{path}: a folder; name a file in it")
    if path.exists() and not force:
        if any(other.exists() and path.samefile(other) for other in inputs):
            raise UsageError(f"{path}: this is an input; give another name, or --force to overwrite it")
        raise UsageError(f"{path}: the file exists; give another name, or --force to overwrite it")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"{path}: {folder} is not a folder; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{path}: can't write to {folder} ({error.strerror}); choose another folder") from None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror}); choose another folder") from None
    finally:
        part.unlink(missing_ok=True)
