"""What a runtime's C++ prints past Python, on the process's own standard output and error: heard, and kept for whoever asks.

It goes to an unnamed file while `overhearing`, so nothing is loose on the terminal. Where the process dies meanwhile, by whatever
signal, a small helper process that waits for just that writes it to standard error: nothing is lost. (There is none on Windows.)
Python's own output is meant to stay where it is: the command line gives `sys.stderr` a descriptor of its own (`own_stderr`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

MOST = 1 << 16  # bytes that are kept of one hearing, the last ones
SEVERAL = 200  # hearings that are kept
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# What ONNX Runtime's log puts before each message: time, severity, place; and a path of its sources.
LOG = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ \[([VIWEF]):[^\]]*\] ?")

heard: deque[str] = deque(maxlen=SEVERAL)  # what was printed, run by run; `bnfold --debug` shows it

# Reads until whoever started it has closed its end: a byte before that says that all is well.
_HELPER = """
import os, sys
if not os.read(0, 1):
    text, at = b"", 0
    while chunk := os.pread(int(sys.argv[1]), 1 << 16, at):
        text, at = text + chunk, at + len(chunk)
    if text:
        os.write(2, b"bnfold: the process died while this was being said:\\n" + text.rstrip(b"\\n") + b"\\n")
"""


@dataclass
class Hearing:
    """What was printed in a stretch of time; complete when it is over."""

    text: str = ""

    def errors(self) -> list[str]:
        """The errors in ONNX Runtime's log, without its marks; where there are none, all that isn't of the log."""
        logged, loose = [], []
        for line in self.text.splitlines():
            line = COLOUR.sub("", line).strip()
            if (mark := LOG.match(line)) is None:
                loose += [line] if line else []
            elif mark[1] in "EF":
                logged.append(line[mark.end() :])
        return logged or loose


class _Ear:
    """The file of one process, and its helper. depth: how many are listening; the descriptors move with the first and the last."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.RLock()
        self.depth = 0
        self.moved: tuple[tuple[int, int], ...] = ()
        self.file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
        self.helper: subprocess.Popen[bytes] | None = None
        if os.name == "posix" and sys.executable:
            fd = self.file.fileno()
            command = [sys.executable, "-I", "-S", "-c", _HELPER, str(fd)]
            with contextlib.suppress(OSError):
                self.helper = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[fd], start_new_session=True
                )
                atexit.register(self._leave)

    def _leave(self) -> None:
        if self.helper is not None and self.helper.stdin is not None and os.getpid() == self.process:
            with contextlib.suppress(OSError):
                os.write(self.helper.stdin.fileno(), b".")
                self.helper.stdin.close()
                self.helper.wait(5)


_ear: _Ear | None = None
_guard = threading.Lock()


def _ears() -> _Ear | None:
    global _ear
    with _guard:
        if _ear is None or _ear.process != os.getpid():  # a forked process has an ear of its own
            try:
                _ear = _Ear()
            except OSError:
                return None
        return _ear


@contextlib.contextmanager
def overhearing() -> Iterator[Hearing]:
    """Hear what is printed past Python; kept in `heard` too. Of several at once, the one that ends last hears it all."""
    hearing, ear = Hearing(), _ears()
    if ear is None:
        yield hearing
        return
    with ear.lock:
        if not ear.depth:
            ear.moved = _move(ear.file.fileno())
        ear.depth += 1
    try:
        yield hearing
    finally:
        with ear.lock:
            ear.depth -= 1
            if not ear.depth:
                _back(ear.moved)
                hearing.text = _take(ear.file)
                if hearing.text.strip():
                    heard.append(hearing.text)


def _move(to: int) -> tuple[tuple[int, int], ...]:
    """Let descriptors 1 and 2 lead there; each with a copy of what it was, or nothing where a process has them closed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    before: list[tuple[int, int]] = []
    try:
        for fd in (1, 2):
            before.append((fd, os.dup(fd)))
            os.dup2(to, fd)
    except OSError:
        _back(tuple(before))
        return ()
    return tuple(before)


def _back(before: tuple[tuple[int, int], ...]) -> None:
    for fd, copy in before:
        os.dup2(copy, fd)
        os.close(copy)


def _take(file: IO[bytes]) -> str:
    """The file's text, which it then no longer has."""
    size = os.lseek(file.fileno(), 0, os.SEEK_END)
    if not size:
        return ""
    os.lseek(file.fileno(), max(0, size - MOST), os.SEEK_SET)
    data = os.read(file.fileno(), MOST)
    os.ftruncate(file.fileno(), 0)
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    return data.decode("utf-8", "replace")


def own_stderr() -> None:
    """Give Python's standard error a descriptor of its own, so that progress goes on while the runtime is overheard."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        if sys.stderr.fileno() == 2:
            sys.stderr.flush()
            again = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors, buffering=1)
            sys.stderr = again
