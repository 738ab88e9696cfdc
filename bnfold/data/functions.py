"""The user's own Python: modules from files, and the functions in them that give data."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from bnfold.errors import DataError
from bnfold.text import first_line

_importing = threading.RLock()


def _forked() -> None:
    """In a child, which has no thread that could let go of the lock."""
    global _importing
    _importing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """What stands in a folder can be imported, by one thread at a time, and is searched for there no longer afterwards."""
    with _importing:
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):
                sys.path.remove(str(folder))


def module_of(file: Path, prefix: str) -> ModuleType:
    """The module of a Python file, run anew, in whose folder it finds what it imports. Raises whatever the file does.

    prefix: of its name in `sys.modules`, where dataclasses and pickle look it up; another file of the same name doesn't take its place.
    """
    file = file.resolve()
    name = f"{prefix}_{file.stem}"
    with importable(file.parent):
        if name in sys.modules and sys.modules[name].__file__ != str(file):
            name += f"_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
        found = importlib.util.spec_from_file_location(name, file)
        assert found is not None
        assert found.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    return module


def function_of(spec: str) -> Callable[[], Any] | None:
    """FILE.py:FUNCTION or MODULE:FUNCTION; None where it is neither. DataError where it can't be imported, or isn't there."""
    target, colon, name = spec.rpartition(":")
    if not (colon and target and name.isidentifier()):
        return None
    if target.endswith(".py") and not Path(target).is_file():
        raise DataError(f"{spec}: there is no file {target}")
    try:
        if target.endswith(".py"):
            module = module_of(Path(target), "_bnfold_data")
        else:
            with importable(Path.cwd()):
                module = importlib.import_module(target)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit, even with status 0
        raise DataError(f"{spec}: {target} can't be imported ({type(error).__name__}: {first_line(error)})") from error
    function: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(function):
        has = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise DataError(f"{spec}: {target} has no function {name!r}; it has {', '.join(has) or 'none'}")
    return function


def guarded(function: Callable[[], Any], spec: str) -> Callable[[], Any]:
    """The function, whose errors (and those of the iterator that it returns) become DataErrors with its name."""

    @contextlib.contextmanager
    def named(when: str = "", advice: str = "") -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            raise DataError(f"{spec} raised {type(error).__name__}{when}: {first_line(error)}{advice}") from error

    def items(iterator: Iterator[Any]) -> Iterator[Any]:
        end = object()
        for number in itertools.count(1):
            with named(f" instead of its batch {number}", "; see to it, and run again"):
                item = next(iterator, end)
            if item is end:
                return
            yield item

    def called() -> Any:
        with named():
            made = function()
            if isinstance(made, (tuple, Mapping)) or hasattr(made, "__array__") or not hasattr(made, "__iter__"):
                return made
            return items(iter(made))

    return called
