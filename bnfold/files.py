"""Files that commands write: whether they can be, before any work is done, and writing them whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .errors import InputError, UsageError


def ready_to_write(paths: Mapping[Path | None, Sequence[str]], *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Fail now where one of the files couldn't be written in the end. UsageError: another name is needed; InputError: another folder.

    paths: how the name of each may end; None is none. force: whether files of these names may be overwritten. inputs: those that are read.
    """
    for path, suffixes in paths.items():
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            such = f"{path.name.removesuffix(path.suffix) or 'out'}{suffixes[0]}"
            raise UsageError(f"{path}: the name must end in {' or '.join(suffixes)}, such as {such}")
        may_write(path, force=force, inputs=inputs)
        folder = path.absolute().parent
        if not folder.is_dir():
            raise InputError(f"{path}: {folder} is not a folder; make it first")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"{path}: can't write to {folder} ({error.strerror}); choose another folder") from None


def may_write(path: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """UsageError where it is a folder, or a file that mustn't be overwritten."""
    if path.is_dir():
        raise UsageError(f"{path}: a folder; name a file in it")
    if path.exists() and not force:
        what = "this is an input" if any(other.exists() and path.samefile(other) for other in inputs) else "the file exists"
        raise UsageError(f"{path}: {what}; give another name, or --force to overwrite it")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as (part,):
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """Where to write the files or the folder that take the targets' places once all are whole; on any error all is as before.

    The names end as the targets' do, and the last target changes last. Raises InputError for an OSError, whoever raised it.
    """
    mark, last = secrets.token_hex(4), targets[-1]
    parts, olds = (
        [target.absolute().with_name(f".{target.name}.{mark}{end or target.suffix}") for target in targets] for end in ("", ".before")
    )
    done: list[Path] = []
    try:
        yield parts
        for target, part, old in zip(targets, parts, olds, strict=True):
            if target.exists() and (target is not last or part.is_dir()):
                os.replace(target, old)  # it belongs to the last that is still there
            os.replace(part, target)
            done.append(target)
    except BaseException as error:
        for target, old in zip(targets, olds, strict=True):
            if old.exists():
                os.replace(old, target)
            elif target in done:
                target.unlink()
        if isinstance(error, OSError):
            raise InputError(f"{last}: can't be written ({error.strerror or error}); choose another folder") from None
        raise
    finally:
        for left in (*parts, *olds):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
