"""The doors for data: what a user of the library has at hand, and what the command line's DATA names, the user's own Python too."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bnfold.data.files import files_in_table
from bnfold.errors import DataError, UsageError
from bnfold.files import neighbours
from bnfold.text import counted, first_line, meant

from . import files
from .batches import Data
from .corrupt import MAX_BAD
from .samples import Run, few
from .source import Chunk, Flat, Request, Source, check_data, from_object, from_stream, is_samples, peek
from .spec import Array, InputSpec

if TYPE_CHECKING:
    from .images.options import ImageOptions

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


def imported(place: str, prefix: str) -> ModuleType:
    """The module of FILE.py (see `module_of`), or of a name that is known here, or in the working folder."""
    if place.endswith(".py"):
        return module_of(Path(place), prefix)
    with importable(Path.cwd()):
        return importlib.import_module(place)


def function_of(spec: str) -> Callable[[], Any] | None:
    """FILE.py:FUNCTION or MODULE:FUNCTION; None where it is neither. DataError where it can't be imported, or isn't there."""
    target, colon, name = spec.rpartition(":")
    if not (colon and target and name.isidentifier()):
        return None
    if target.endswith(".py") and not Path(target).is_file():
        raise DataError(f"{spec}: there is no file {target}")
    try:
        module = imported(target, "_bnfold_data")
    except (Exception, SystemExit) as error:  # a script without a main guard may exit, even with status 0
        advice = "; install it, or give FILE.py:FUNCTION" if isinstance(error, ModuleNotFoundError) else ""
        raise DataError(f"{spec}: {target} can't be imported ({type(error).__name__}: {first_line(error)}){advice}") from error
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
            raise DataError(f"{spec} raised {type(error).__name__}{when}: {_said(error)}{advice}") from error

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


def _said(error: BaseException) -> str:
    """What an error says, that of another process too: PyTorch's loaders put that process's traceback first, or meet its end."""
    if isinstance(error, (EOFError, ConnectionError)):
        return f"{first_line(error)}: a process that loads the data may have died, perhaps for want of memory"
    if "Original Traceback" not in str(error):
        return first_line(error)
    return str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")


FORMS = (
    "a .npy, .npz, .safetensors, .pt, .pth, .tar or .parquet file, a folder of images, of such files or of save_to_disk, "
    "FILE.py:FUNCTION, MODULE:FUNCTION or random"
)


def as_batches(
    obj: Any,
    inputs: Sequence[InputSpec],
    *,
    batch_size: int | None = None,
    samples: int | None = None,
    run: Run | None = None,
    flat: Flat | None = None,
) -> Data:
    """Data from what a library's user has at hand.

    obj: an array or tensor of samples; a mapping or tuple of such (a tuple in the inputs' order, its labels last); an iterable of
    batches, each of one of these forms (a list, a DataLoader, a generator); or a function without arguments that returns any of them,
    called for each pass.
    An item without a sample axis is one sample. batch_size: 8 for arrays; an iterable's own batches are kept unless a size is given or the
    model takes one only. A generator can be iterated once. run: see `Data`. flat: what takes an item in the form in which a
    model is called apart (see `Flat`).
    """
    if isinstance(obj, Data):
        return obj.fed(inputs, batch_size=batch_size, samples=samples, run=run)
    check_data(obj)
    whole = is_samples(obj, inputs, flat)
    source = (from_object if whole else from_stream)(obj, inputs, f"the {type(obj).__name__} given", flat)
    return Data(source, inputs, batch_size=batch_size, samples=samples, run=run)


def open_data(
    spec: str,
    inputs: Sequence[InputSpec],
    *,
    batch_size: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    images: ImageOptions | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    max_bad: int | str = MAX_BAD,
    column: str | None = None,
    flat: Flat | None = None,
) -> Data:
    """The command line's DATA. DataError for what isn't there, can't be read or isn't one of the forms.

    spec: a .npy, .npz, .safetensors, .pt or .pth file; tar shards or Parquet files, by a pattern or as a folder; a folder of images, of
    .npy files or of `datasets`' save_to_disk; FILE.py:FUNCTION or MODULE:FUNCTION (any form of `as_batches`, made anew for each pass); or
    `random`. samples: at most so many, the first ones, but a random choice by `seed` in a folder of images or of save_to_disk. images: how
    images are prepared. input_shapes: whole shapes by input name, where the model's are dynamic. max_bad: see `Data`. column: the
    one of a table that goes into the model, where several could.
    """
    if seed < 0:
        raise UsageError(f"the seed is {seed}; it must be 0 or more")
    request = Request(spec, inputs, batch_size, samples, seed, images, input_shapes or {}, column, flat)
    return Data(_source(request), inputs, batch_size=batch_size, samples=samples, max_bad=max_bad)


def first_of(spec: str) -> Any:
    """Two samples of a file of arrays (all of them where it isn't plain which those are), or the first batch of a function, in whatever
    form they are; None where only a model shapes them.
    """
    path = Path(spec)
    if path.is_file():
        if path.suffix == ".py":
            raise DataError(f"{spec}: name the function in it that returns batches, as {spec}:FUNCTION")
        if path.suffix.lower() not in files.READERS:
            return None
        found = files.read(path)
        return few(dict(found), 2) if isinstance(found, Mapping) else found[:2]
    function = None if path.is_dir() else function_of(spec)
    return None if function is None else peek(function)[0]


def _source(request: Request) -> Source:
    tables = None if request.spec == "random" else files_in_table(request.spec)
    if request.spec == "random":
        from .random import random_source

        source = random_source(request)
    elif tables is not None:
        from .tables.source import table_source

        for file in tables:
            files.check_beginning(file)
        source = table_source(request, tables)
    elif Path(request.spec).is_dir():
        source = _folder(request)
    else:
        source = _file_or_function(request)
    unused = []
    if request.column is not None and tables is None:
        unused.append(f"{source.description}: this is no table, so --column {request.column} isn't used")
    if request.images is not None and not source.images:
        unused.append(f"{source.description}: these are no image files, so the image options aren't used")
    return replace(source, notes=(*source.notes, *unused), files=lambda: tables or _files(request.spec))


def _files(spec: str) -> Iterator[Path]:
    """The files that data are read from: one, those of a folder, or the one that a function stands in."""
    path = Path(spec)
    if path.is_dir():
        yield from sorted(found for found in path.rglob("*") if found.is_file())
    elif (path := path if path.is_file() else Path(spec.rpartition(":")[0])).is_file():
        yield path


def _file_or_function(request: Request) -> Source:
    spec, path = request.spec, Path(request.spec)
    if path.exists():
        if not path.is_file():
            raise DataError(f"{spec}: a device or pipe, not a file; give {FORMS}")
        if path.suffix == ".py":
            raise DataError(f"{spec}: name the function in it that returns batches, as {spec}:FUNCTION")
        if path.suffix.lower() not in files.READERS:
            raise DataError(f"{spec}: bnfold reads no {path.suffix or 'nameless'} files; give {FORMS}")
        return from_object(files.read(path), request.inputs, str(path), request.flat)
    function = function_of(spec)
    if function is None:
        if "://" in spec:
            raise DataError(f"{spec}: an address, not a file; download it, or give {FORMS}")
        near = meant(spec, ["random"]) or neighbours(spec)
        raise DataError(f"{spec}: there is no such file or folder{near or f'; give {FORMS}'}")
    return from_stream(guarded(function, spec), request.inputs, spec, request.flat)


def _folder(request: Request) -> Source:
    """A folder of .npy files, one sample or one batch each, or of images."""
    path = Path(request.spec)
    paths = sorted(path.glob("*.npy"))
    if not paths:
        from .images.pipeline import folder_source

        return folder_source(request)
    spec = request.only_input("a folder of .npy files serves", "an .npz file")

    def chunks() -> Iterator[Chunk]:
        for file in paths:
            array: Array = files.read(file)
            single = array.ndim == len(spec.shape) - 1
            yield Chunk({spec.name: array[None] if single else array}, None, str(file), single)

    return Source(chunks, f"{path}: {counted(len(paths), '.npy file')}")
