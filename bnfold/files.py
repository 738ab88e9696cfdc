"""Files: what may be read as one, whether one can be written, before any work is done, and writing it whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import shutil
import stat
import tempfile
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError, UsageError
from .text import meant

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

# What Python's zipfile raises for damaged archives, names that are no text and kinds of compression that it doesn't know among them.
DAMAGED_ZIP = (zipfile.BadZipFile, OSError, ValueError, EOFError, LookupError, RuntimeError)
WORKPLACE = re.compile(r"\.bnfold-[0-9a-f]{16}")


def unreadable(path: str | Path) -> str:
    """Why a path can't be read as a file, in a clause; "" where it can. A pipe or a device may keep its reader for ever."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return f"can't be read ({getattr(error, 'strerror', None) or error})"
    return "" if stat.S_ISREG(mode) else "a folder, not a file" if stat.S_ISDIR(mode) else "a device or pipe, not a file"


def neighbours(path: str | Path) -> str:
    """`; did you mean 'a/net.onnx'?` for a path that a user gave and that isn't there, where its name is nearly that of what is."""
    if os.path.lexists(path):
        return ""
    folder, name = os.path.split(path)
    try:
        return meant(name, os.listdir(folder or "."), os.path.join(folder, ""), alike=0.8)
    except (OSError, ValueError):
        return ""


def contents(path: Path, most: int, what: str) -> bytes:
    """The bytes of a small file of the user's. InputError where it can't be read, or is longer than `most`. what: it is, for the text."""
    try:
        if why := unreadable(path):
            raise InputError(f"{path}: {what} can't be read ({why}){neighbours(path)}")
        with open(path, "rb") as file:
            found = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path}: {what} can't be read ({error.strerror})") from None
    if len(found) > most:
        raise InputError(f"{path}: {what} has more than {most:,} bytes; is this the right file?")
    return found


def most_unpacked(packed: int, least: int = 1 << 31) -> int:
    """How many bytes may come of so many packed ones. Data seldom shrink to a tenth; what grows more, past `least`, is a bomb."""
    return max(20 * packed, least)


def bomb(path: Path) -> str:
    """What is wrong with an archive that unpacks to far more than it is, in a clause; "" where nothing is. Raises BadZipFile, OSError."""
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        made, size = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
    return f"it has {size:,} bytes and would unpack to {made:,}" if made > most_unpacked(size) else ""


def ready_to_write(*outputs: tuple[Path | None, Sequence[str]], force: bool, inputs: Iterable[Path] = ()) -> None:
    """UsageError now where one of the files couldn't be written in the end: another name is needed, or another folder.

    outputs: each file, None for none, and how its name may end. force: whether files of these names may be overwritten. inputs: those that
    are read.
    """
    taken = set()
    for path, suffixes in outputs:
        if path is None:
            continue
        if (place := path.absolute()) in taken:
            raise UsageError(f"{path}: two files would have this name; give one of them another")
        taken.add(place)
        if path.suffix.lower() not in suffixes:
            such = f"{path.name.removesuffix(path.suffix) or 'out'}{suffixes[0]}"
            raise UsageError(f"{path}: the name must end in {' or '.join(suffixes)}, such as {such}")
        may_write(path, force=force, inputs=inputs)
        folder = path.absolute().parent
        if not folder.is_dir():
            raise UsageError(f"{path}: {folder} is not a folder; make it first")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UsageError(f"{path}: can't write to {folder} ({error.strerror}); choose another folder") from None


def may_write(path: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """UsageError where it is a folder, or a file that mustn't be overwritten."""
    if path.is_dir():
        raise UsageError(f"{path}: a folder; name a file in it")
    if path.exists() and not force:
        what = "this is an input" if any(other.exists() and path.samefile(other) for other in inputs) else "the file exists"
        raise UsageError(f"{path}: {what}; give another name, or --force to overwrite it")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. What UTF-8 can't hold of a path gets the escapes that Python and JSON have for it."""
    with replacing(path) as (part,):
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """Where to write the files or the folder that take the targets' places once all are whole; on any error all is as before.

    The names are the targets', in a workplace beside them, and the last target changes last. Raises InputError for an OSError, whoever
    raised it.
    """
    last, done = targets[-1], list[Path]()
    try:
        with Workplace(last.absolute().parent) as place:
            parts, olds = ([place.path / which / target.name for target in targets] for which in ("new", Workplace.OLD))
            for folder in (parts[0].parent, olds[0].parent):
                folder.mkdir()
            try:
                yield parts
                for part in parts:
                    _to_disk(part)
                for target, part, old in zip(targets, parts, olds, strict=True):
                    if target.exists() and (target is not last or part.is_dir()):
                        os.replace(target, old)  # it belongs to the last that is still there
                    os.replace(part, target)
                    done.append(target)
            except BaseException:
                for target, old in zip(targets, olds, strict=True):
                    if old.exists():
                        os.replace(old, target)
                    elif target in done:
                        target.unlink()
                raise
    except OSError as error:
        raise InputError(f"{last}: can't be written ({error.strerror or error}); choose another folder") from None


def _to_disk(path: Path) -> None:
    """See to it that what was written is on the disk before anything takes that for granted."""
    for file in path.iterdir() if path.is_dir() else (path,):
        with open(file, "r+b") as opened:
            os.fsync(opened.fileno())


class Workplace:
    """A folder for files in the making, which goes when it is left; what a process that was killed left is cleared away by the next one.

    A process holds a lock on its workplace, which ends with it, however it ends. Where there are no such locks (on Windows, in some file
    systems) nothing is cleared away. folder: where it lies; without one, where temporary files do. Use as a context manager, or `close`.
    """

    OLD = "old"  # in it: what was moved out of a place that something new takes

    def __init__(self, folder: Path | None = None) -> None:
        where = Path(tempfile.gettempdir()) if folder is None else folder
        _clear(where)
        while True:
            self.path = where / f".bnfold-{secrets.token_hex(8)}"
            self.path.mkdir(mode=0o700)
            with contextlib.suppress(FileNotFoundError, BlockingIOError):  # another process took it for a dead one's, and clears it away
                self._left = weakref.finalize(self, _leave, self.path, locked(self.path), os.getpid())
                return

    def close(self) -> None:
        self._left()

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _leave(folder: Path, lock: int | None, process: int) -> None:
    if os.getpid() == process:  # not in one that was forked from it
        shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def locked(folder: Path) -> int | None:
    """A lock on a folder; None where there are none. BlockingIOError: another process has it. FileNotFoundError: it is gone."""
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)
    except OSError as error:
        os.close(lock)
        if isinstance(error, (BlockingIOError, FileNotFoundError)):
            raise
        return None
    return lock


def _clear(folder: Path) -> None:
    """Remove the workplaces of dead processes. What they had moved out of its place goes back there."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        found = [Path(entry) for entry in entries if WORKPLACE.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
        for path in found:
            with contextlib.suppress(OSError):
                if (lock := locked(path)) is None:
                    continue
                old = path / Workplace.OLD
                for each in old.iterdir() if old.is_dir() else ():
                    if not (folder / each.name).exists():
                        os.replace(each, folder / each.name)
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


class HeldErrors(io.RawIOBase):
    """A file for a writer that doesn't survive an OSError, as PyTorch's: the first is held, what follows is dropped, `close` raises it."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - it lives as long as this object
        self._error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence) if self._error is None else 0

    def write(self, data: Any) -> int:
        try:
            if self._error is None:
                self._file.write(data)
        except OSError as error:
            self._error = error
        return memoryview(data).nbytes

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            self._file.close()
        except OSError as error:
            self._error = self._error or error
        if self._error is not None:
            raise self._error
