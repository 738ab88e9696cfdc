"""The standard streams of a process that is the command line."""

from __future__ import annotations

import atexit
import codecs
import contextlib
import io
import os
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from bnfold.errors import InputError


def completing() -> bool:
    """Whether a shell reads what may come next on its line, in the way of Typer's scripts."""
    return "_BNFOLD_COMPLETE" in os.environ


PLAIN = "bnfold.plain"  # how what an encoding lacks is written
_OTHERS = {"±": "+-", "²": "^2", **dict.fromkeys("▌▋▊▉█", "#"), **dict.fromkeys("▏▎▍", "")}


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for the character that can't be written."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1
    found = _OTHERS.get(error.object[error.start])
    return (str(codecs.backslashreplace_errors(error)[0]) if found is None else found), error.end


codecs.register_error(PLAIN, _plain)


def open_streams() -> None:
    """Let the standard streams lead nowhere that a process was started without: a file that it opens would take their places."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free, so this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115 - for as long as the process runs


def may_be_terminal(stream: Any) -> bool:
    """Whether Rich has to be asked if the stream is a terminal: it is one, or somebody says that it be taken for one."""
    return bool({"FORCE_COLOR", "TTY_COMPATIBLE"} & os.environ.keys()) or stream.isatty()


def fitted(line: str) -> str:
    """A line for standard error, which breaks between words where that is a terminal."""
    if not sys.stderr.isatty():
        return line
    with contextlib.suppress(OSError, ValueError):  # a terminal may not know its width, or take it for 0
        return textwrap.fill(line, os.get_terminal_size(sys.stderr.fileno()).columns, break_long_words=False, break_on_hyphens=False)
    return line


def own_stderr() -> None:
    """Give Python's standard error a descriptor of its own, so that progress goes on while the runtime is overheard.

    It takes whatever is written, though nobody may read it any more, or its disk be full: that is nothing to stop for.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):
        if (before := sys.stderr).fileno() == 2:
            before.flush()
            raw = io.BufferedWriter(_Lossy(os.dup(2), "w"))
            own = sys.stderr = io.TextIOWrapper(raw, before.encoding, before.errors, line_buffering=True)

            def back() -> None:
                sys.stderr = before
                own.close()

            atexit.register(back)


class _Lossy(io.FileIO):
    """A file that drops what it can't write."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


@contextlib.contextmanager
def reader_may_leave(stream: Any) -> Iterator[None]:
    """Write to a stream whose reader may have left, as in `bnfold ... | head`: nothing is wrong then, and nothing more is read.

    Raises InputError where it can't be written for another reason, such as a full disk.
    """
    try:
        yield
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # what is left in Python's buffer goes there
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            raise InputError(f"the results can't be written ({error.strerror or error}); see to where standard output goes") from None
