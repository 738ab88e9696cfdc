"""The command line's DATA: files, folders, functions and random data, as sources of samples."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfold.errors import DataError, UsageError
from bnfold.text import counted, first_line

from .batches import BATCH_SIZE
from .forms import Flat, from_object, from_stream
from .samples import few
from .source import Chunk, Source
from .spec import Array, InputSpec
from .tables.files import files_in_table
from .tables.source import table_source

if TYPE_CHECKING:
    from .images import ImageOptions

FORMS = (
    "a .npy, .npz, .safetensors, .pt, .pth, .tar or .parquet file, a folder of images, of such files or of save_to_disk, "
    "FILE.py:FUNCTION, MODULE:FUNCTION or random"
)


def open_source(
    spec: str,
    inputs: Sequence[InputSpec],
    *,
    batch_size: int | None,
    samples: int | None,
    seed: int,
    images: ImageOptions | None,
    input_shapes: Mapping[str, Sequence[int]] | None,
    column: str | None = None,
    flat: Flat | None = None,
) -> Source:
    """The source that `spec` names (see `data.open_data`). DataError for what isn't there, can't be read or isn't one of the forms."""
    if seed < 0:
        raise UsageError(f"the seed is {seed}; it must be 0 or more")
    files = files_in_table(spec) if spec != "random" else None
    if spec == "random":
        source = _random(inputs, batch_size, samples, seed, input_shapes)
    elif files is not None:
        for file in files:
            _beginning(file)
        source = table_source(spec, files, inputs, samples=samples, seed=seed, options=images, input_shapes=input_shapes, column=column)
    elif Path(spec).is_dir():
        source = _folder(Path(spec), inputs, samples, seed, images, input_shapes)
    else:
        source = _file_or_function(spec, inputs, flat)
    unused = []
    if column is not None and files is None:
        unused.append(f"{source.description}: this is no table, so --column {column} isn't used")
    if images is not None and not source.pictures:
        unused.append(f"{source.description}: these are no image files, so the image options aren't used")
    return replace(source, notes=(*source.notes, *unused))


def _file_or_function(spec: str, inputs: Sequence[InputSpec], flat: Flat | None) -> Source:
    path = Path(spec)
    if path.exists():
        if not path.is_file():
            raise DataError(f"{spec}: a device or pipe, not a file; give {FORMS}")
        if path.suffix.lower() not in READERS:
            raise DataError(f"{spec}: bnfold reads no {path.suffix or 'nameless'} files; give {FORMS}")
        return from_object(_read(path), inputs, str(path), flat)
    target, colon, function = spec.rpartition(":")
    if colon and target and function.isidentifier():
        return from_stream(_guarded(_function(target, function, spec), spec), inputs, spec, flat)
    raise DataError(f"{spec}: there is no such file or folder; give {FORMS}")


def first_of(spec: str) -> Any:
    """Two samples of a file of arrays (all of them where it isn't plain which those are), or the first batch of a function, in whatever
    form they are; None where only a model shapes them.
    """
    path = Path(spec)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            return None
        found = _read(path)
        return few(dict(found), 2) if isinstance(found, Mapping) else found[:2]
    if path.is_dir() or ":" not in spec:
        return None
    target, _, name = spec.rpartition(":")
    made = _function(target, name, spec)()
    if isinstance(made, Mapping) or hasattr(made, "__array__") or hasattr(made, "detach"):
        return made
    if isinstance(made, tuple) and made and hasattr(made[0], "__array__"):
        return made
    return next(iter(made), None)


def _npy(path: Path) -> Any:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _npz(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("this is no zip archive")
        return {name: file[name] for name in file.files}


def _safetensors(path: Path) -> Any:
    import ml_dtypes  # noqa: F401 - gives numpy the bfloat16 that safetensors asks it for
    from safetensors.numpy import load_file

    return load_file(path)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise DataError(
            f"{path}: reading it needs PyTorch, which isn't installed; install bnfold[torch], or save it as .npy or .npz"
        ) from None
    return torch.load(path, map_location="cpu", weights_only=True)


READERS: dict[str, Callable[[Path], Any]] = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".pt": _torch, ".pth": _torch}
# How such files begin: numpy and PyTorch take anything else for a pickle, and would say that of a web page too.
BEGINNINGS = {".parquet": (b"PAR1",), ".npy": (b"\x93NUMPY",), ".npz": (b"PK",), ".pt": (b"PK", b"\x80"), ".pth": (b"PK", b"\x80")}


def _beginning(path: Path) -> None:
    """DataError for a file that doesn't begin as its name says."""
    form = path.suffix.lower()
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


def _read(path: Path) -> Any:
    """The file's arrays. DataError for a file that isn't what its name says, or that would run code when read."""
    form = path.suffix.lower()
    try:
        _beginning(path)
        return READERS[form](path)
    except DataError:
        raise
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        reason = first_line(error)
    except Exception as error:
        # safetensors' and pickle's own errors derive from Exception alone
        if type(error).__module__.partition(".")[0] not in ("safetensors", "pickle", "_pickle"):
            raise
        reason = first_line(error)
    if any(sign in reason for sign in ("allow_pickle", "Python objects", "weights_only", "Weights only")):
        reason = "it holds Python objects, which could run code when read; save plain arrays"
    raise DataError(f"{path}: can't be read as {form} ({reason})")


def _folder(
    path: Path,
    inputs: Sequence[InputSpec],
    samples: int | None,
    seed: int,
    images: ImageOptions | None,
    input_shapes: Mapping[str, Sequence[int]] | None,
) -> Source:
    files = sorted(path.glob("*.npy"))
    if not files:
        from .images import folder_source

        return folder_source(path, inputs, samples=samples, seed=seed, options=images, input_shapes=input_shapes)
    if len(inputs) != 1:
        raise DataError(f"{path}: a folder of .npy files serves a model with one input, and this one has {len(inputs)}; give an .npz file")
    spec = inputs[0]

    def chunks() -> Iterator[Chunk]:
        for file in files:
            array: Array = _read(file)
            single = array.ndim == len(spec.shape) - 1
            yield Chunk({spec.name: array[None] if single else array}, None, str(file), single)

    return Source(chunks, f"{path}: {counted(len(files), '.npy file')}")


def _function(target: str, name: str, spec: str) -> Callable[[], Any]:
    """FUNCTION of FILE.py or of MODULE, whose own folder (or the working one) may hold what it imports."""
    file = Path(target)
    if target.endswith(".py") and not file.is_file():
        raise DataError(f"{spec}: there is no file {target}")
    try:
        if target.endswith(".py"):
            found = importlib.util.spec_from_file_location(f"_bnfold_data_{file.stem}", file.resolve())
            assert found is not None
            assert found.loader is not None
            module = importlib.util.module_from_spec(found)
            with _importable(file.resolve().parent):
                sys.modules[found.name] = module  # dataclasses and pickle look their module up there
                found.loader.exec_module(module)
        else:
            with _importable(Path.cwd()):
                module = importlib.import_module(target)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit, even with status 0
        raise DataError(f"{spec}: {target} can't be imported ({type(error).__name__}: {first_line(error)})") from error
    function = getattr(module, name, None)
    if not callable(function):
        has = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise DataError(f"{spec}: {target} has no function {name!r}; it has {', '.join(has) or 'none'}")
    made: Callable[[], Any] = function
    return made


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _guarded(function: Callable[[], Any], spec: str) -> Callable[[], Any]:
    """The function, whose errors (and those of the iterator that it returns) become DataErrors with its name."""

    def failed(error: BaseException) -> DataError:
        return DataError(f"{spec} raised {type(error).__name__}: {first_line(error)}")

    def items(iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except (Exception, SystemExit) as error:
                raise failed(error) from error
            yield item

    def called() -> Any:
        try:
            made = function()
            if isinstance(made, (tuple, Mapping)) or hasattr(made, "__array__") or not hasattr(made, "__iter__"):
                return made
            return items(iter(made))
        except (Exception, SystemExit) as error:
            raise failed(error) from error

    return called


def _random(
    inputs: Sequence[InputSpec], batch_size: int | None, samples: int | None, seed: int, input_shapes: Mapping[str, Sequence[int]] | None
) -> Source:
    """Batches of `random.random_feeds`, each from a seed of its own; two batches unless a number of samples is given."""
    from .random import random_feeds

    if (batch_size is not None and batch_size < 1) or (samples is not None and samples < 1):
        raise UsageError("the batch size and the number of samples must be 1 or more")
    shapes = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}
    given = [shapes[s.name][0] for s in inputs if shapes.get(s.name) and s.shape]
    first = [s.shape[0] for s in inputs if s.shape]
    dynamic = any(not isinstance(n, int) for n in first)
    usual = batch_size or min(samples or BATCH_SIZE, BATCH_SIZE)
    size = max(given) if given else usual if dynamic or not first else next(n for n in first if isinstance(n, int))
    count = -(-samples // size) if samples is not None else 2

    def chunks() -> Iterator[Chunk]:
        shared: dict[str, Array] = {}
        for number in range(count):
            state = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            feeds = random_feeds(inputs, batch=size, seed=state, input_shapes=shapes)
            for s in inputs:
                if not s.shape or (dynamic and isinstance(s.shape[0], int)):
                    feeds[s.name] = shared.setdefault(s.name, feeds[s.name])
            yield Chunk(dict(feeds), None, f"random batch {number + 1}")

    example = next(chunks())
    notes = []
    for s in inputs:
        free = [axis for axis, n in enumerate(s.shape) if axis and not isinstance(n, int)]
        if free and s.name not in shapes:
            taken = "x".join(str(n) for n in example.arrays[s.name].shape)
            notes.append(f"input {s.name!r} has dynamic axes; {taken} is taken (--input-shape {s.name}=... gives another)")
    # Of several inputs it may show only when they are fed which of them hold samples, and how many.
    return Source(chunks, f"random, seed {seed}", tuple(notes), count * size if len(inputs) == 1 else None, keep=True)
