"""What a runtime's C++ prints past Python, on the process's own standard output and error: heard, and kept for whoever asks.

It goes to an unnamed file while `overhearing`, so nothing is loose on the terminal. Where the process dies meanwhile, by whatever
signal, a small helper process that waits for just that writes it to standard error: nothing is lost. (There is none on Windows.)
Python's own output is meant to stay where it is: the command line gives `sys.stderr` a descriptor of its own (`cli/streams.py`).

Descriptors belong to the whole process, which may have threads and fork: see `Switch`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

MOST = 1 << 16  # bytes that are kept of one hearing, the last ones
SEVERAL = 200  # hearings that are kept
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# What ONNX Runtime's log puts before each message: time, severity, place; and a path of its sources.
LOG = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ \[([VIWEF]):[^\]]*\] ?")

NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"  # ONNX Runtime reads it when it is imported

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


class Switch:
    """A setting of the whole process that several threads may want changed at once: the first changes it, the last puts it back.

    on: changes it, and gives what it was; off: takes that, and puts it back. alone: one thread at a time wants it, and the others wait. In
    a process that was forked meanwhile by a thread that doesn't want it changed, it is put back at once.
    """

    def __init__(self, on: Callable[[], Any], off: Callable[[Any], Any], *, alone: bool = False) -> None:
        self.lock = threading.RLock()
        self._turn = threading.RLock() if alone else None
        self._on, self._off, self._before = on, off, None
        self._users: list[int] = []  # threads
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self.lock.acquire, after_in_parent=self.lock.release, after_in_child=self._forked)

    def enter(self) -> None:
        if self._turn is not None:
            self._turn.acquire()
        with self.lock:
            if not self._users:
                self._before = self._on()
            self._users.append(threading.get_ident())

    def leave(self) -> bool:
        """Whether it is put back now."""
        with self.lock:
            self._users.remove(threading.get_ident())
            last = not self._users
            if last:
                self._off(self._before)
        if self._turn is not None:
            self._turn.release()
        return last

    def _forked(self) -> None:
        if self._users and threading.get_ident() not in self._users:
            self._off(self._before)
            self._turn = None if self._turn is None else threading.RLock()
        self._users = [user for user in self._users if user == threading.get_ident()]
        self.lock.release()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()


class _Ear:
    """The file of one process, and its helper."""

    def __init__(self) -> None:
        self.process = os.getpid()
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
                os.register_at_fork(after_in_child=self._close)

    def _leave(self) -> None:
        if self.helper is not None and self.helper.stdin is not None and os.getpid() == self.process:
            with contextlib.suppress(OSError):
                os.write(self.helper.stdin.fileno(), b".")
                self.helper.stdin.close()
                self.helper.wait(5)

    def _close(self) -> None:
        """In a forked process, which would keep the helper waiting after the end of its own."""
        if self.helper is not None and self.helper.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self.helper.stdin.close()


_ear: _Ear | None = None


def _listen() -> tuple[tuple[int, int], ...]:
    global _ear
    try:
        if _ear is None or _ear.process != os.getpid():  # a forked process has an ear of its own
            _ear = _Ear()
        return _move(_ear.file.fileno())
    except OSError:
        return ()


@contextlib.contextmanager
def overhearing() -> Iterator[Hearing]:
    """Hear what is printed past Python; kept in `heard` too. Of several at once, the one that ends last hears it all."""
    hearing = Hearing()
    _listening.enter()
    try:
        yield hearing
    finally:
        with _listening.lock:
            if _listening.leave() and _ear is not None and _ear.process == os.getpid():
                hearing.text = _take(_ear.file)
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


_listening = Switch(_listen, _back)


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


def _silence() -> str | None:
    before = os.environ.get(NO_TELEMETRY)
    os.environ[NO_TELEMETRY] = "1"
    return before


def _unsilence(before: str | None) -> None:
    if before is None:
        del os.environ[NO_TELEMETRY]
    else:
        os.environ[NO_TELEMETRY] = before


without_telemetry = Switch(_silence, _unsilence)  # of ONNX Runtime, while it is imported


def _unlogged() -> int:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    return before


without_warnings = Switch(_unlogged, logging.disable)  # that libraries log, such as what they try again


class _Muted:
    """A stream without what one thread writes."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else int(self._stream.write(text))


def _mute() -> tuple[Any, ...]:
    before = logging.root.manager.disable, warnings.catch_warnings(), sys.stdout, sys.stderr
    logging.disable(logging.CRITICAL)
    before[1].__enter__()
    warnings.simplefilter("ignore")
    sys.stdout, sys.stderr = map(_Muted, before[2:])  # torch.export prints whole graphs
    return before


def _unmute(before: tuple[Any, ...]) -> None:
    logging.disable(before[0])
    before[1].__exit__(None, None, None)
    sys.stdout, sys.stderr = before[2:]


# Without a framework's own remarks on what it does inside, and without what a model's code prints while it is only read. One thread at a
# time: what reads a model (torch.export and its kin) changes more that belongs to the whole process.
quiet = Switch(_mute, _unmute, alone=True)
