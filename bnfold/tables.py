"""Tar shards, Parquet files and data sets that were saved to disk, read by the `datasets` library, without a network.

A row is a sample. A column of images is decoded by `images.Pipeline`, one of numbers or lists of numbers goes in as it is.
"""

from __future__ import annotations

import bisect
import glob
import importlib
import itertools
import json
import logging
import os
import re
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .bad import CorruptError
from .data import LABELS, Array, Batch, Chunk, InputSpec, Source
from .errors import DataError
from .images import has_images, resolve, shaped

if TYPE_CHECKING:
    from .images import ImageOptions, Pipeline

FORMS = (".tar", ".parquet")
CLASSES = ("label", "labels", "cls", "target", "targets", "class", "y", "fine_label", "coarse_label", "category")
SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val"}
TAR_EXTRAS = ("__key__", "__url__")
ROWS = 64  # that are read at once
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_LOCK = threading.RLock()


def files_in_table(spec: str) -> list[Path] | None:
    """The files of a table, none for a folder of save_to_disk; None where the data are of another form."""
    folder = Path(spec)
    if not folder.is_dir():
        return files_of(spec)
    if is_saved(folder):
        return []
    others = any(folder.glob("*.npy")) or not any(p.suffix.lower() in FORMS for p in folder.iterdir()) or has_images(folder)
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


@dataclass(frozen=True)
class Table:
    """Rows in arrow tables, opened anew for every pass.

    features: what `datasets` takes the columns for. total: the number of rows, where that is known; count: what finds it out otherwise.
    row: what a row is called, by its place and the columns that it was read with. extras: columns to be read for that.
    """

    open: Callable[[list[str]], Iterator[Any]]
    features: Mapping[str, Any]
    what: str
    row: Callable[[int, Mapping[str, Any]], str]
    total: int | None = None
    count: Callable[[], int] | None = None
    extras: tuple[str, ...] = ()


def table_source(
    spec: str,
    files: Sequence[Path],
    inputs: Sequence[InputSpec],
    *,
    samples: int | None,
    seed: int,
    options: ImageOptions | None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    column: str | None = None,
) -> Source:
    """Samples of shards, or, where there are no `files`, of the folder that save_to_disk wrote.

    samples: that many by a shuffle from `seed` of a folder of save_to_disk; the first ones of shards, which are read in order. column: the
    one for a model's only input, where several could be it. DataError where the library is missing or what it reads doesn't fit.
    """
    library = _library(spec)
    if not files:
        table = _saved(library, spec, samples, seed)
    elif files[0].suffix.lower() == ".parquet":
        table = _parquet(library, spec, files)
    else:
        table = _tars(library, spec, files)
    chosen = _columns(table.features, inputs, spec, column)
    label, notes = _label(table.features, inputs, chosen)
    wanted = list(dict.fromkeys([*chosen.values(), *([] if label is None else [label])]))
    names = ", ".join(f"column {name!r}" for name in chosen.values())
    if samples is not None and files and (table.total is None or samples < table.total):
        notes.append(f"{spec}: the first {samples} samples are taken, in the order of the files")
    described = f"{spec}: {table.what}, {names}"
    pictures = [name for name in chosen.values() if _is_image(table.features[name])]
    if not pictures:
        chunks = partial(_arrays, table, wanted, chosen, label, spec)
        return Source(chunks, described, tuple(notes), table.total, count=table.count)
    if len(inputs) != 1:
        raise DataError(f"{spec}: images serve a model with one input, and this one has {len(inputs)}; give arrays, or FILE.py:FUNCTION")
    pipeline, assumed = resolve(shaped(inputs[0], input_shapes), options)
    chunks = partial(_images, table, wanted, pictures[0], inputs[0].name, label, pipeline)
    return Source(chunks, f"{described}: {pipeline}", (*notes, *assumed), table.total, pictures=True, count=table.count)


# Reading


def _library(spec: str) -> Any:
    try:
        importlib.import_module("pyarrow")
        return importlib.import_module("datasets")
    except ImportError as error:
        what = "isn't installed" if error.name in ("datasets", "pyarrow") else f"can't be imported ({error})"
        raise DataError(f"{spec}: reading it needs the datasets library, which {what}; install bnfold[datasets]") from None


@contextmanager
def _alone(library: Any) -> Iterator[None]:
    """The library without a network, progress bars and a log of its own, for as long as this lasts, in one thread at a time."""
    hub, log = importlib.import_module("huggingface_hub.constants"), logging.getLogger("datasets")
    with _LOCK:
        yield from _switched(library, hub, log)


def _switched(library: Any, hub: Any, log: logging.Logger) -> Iterator[None]:
    flags = [(owner, name) for owner in (library.config, hub) for name in OFFLINE if hasattr(owner, name)]
    before, level, bars = [getattr(owner, name) for owner, name in flags], log.level, library.are_progress_bars_disabled()
    variables = {name: os.environ.get(name) for name in OFFLINE}
    try:
        for owner, name in flags:
            setattr(owner, name, True)
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
        log.setLevel(logging.CRITICAL)
        library.disable_progress_bars()
        yield
    finally:
        for (owner, name), value in zip(flags, before, strict=True):
            setattr(owner, name, value)
        for name, text in variables.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text
        log.setLevel(level)
        if not bars:
            library.enable_progress_bars()


@contextmanager
def _reading(library: Any, spec: str) -> Iterator[None]:
    """`_alone`, with the library's errors as DataErrors of one line."""
    try:
        with _alone(library):
            yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of any kind: each of its readers has its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise DataError(f"{spec}: can't be read ({type(error).__name__}: {lines[0][:300].rstrip('.')})") from None


def _rows(library: Any, spec: str, dataset: Any) -> Iterator[Any]:
    """The arrow tables of a data set."""
    with _reading(library, spec):
        tables = iter(dataset.with_format("arrow").iter(batch_size=ROWS))
    while True:
        with _reading(library, spec):
            table = next(tables, None)
        if table is None:
            return
        yield table


def _streamed(library: Any, spec: str, kind: str, files: Sequence[Path], **more: Any) -> Any:
    """The rows of files, as the library streams them: nothing is copied, and only locks are written, to a folder that is gone at once."""
    paths = [glob.escape(os.path.abspath(path)) for path in files]
    with _reading(library, spec), tempfile.TemporaryDirectory(prefix="bnfold-") as cache:
        return library.load_dataset(kind, data_files={"train": paths}, split="train", streaming=True, cache_dir=cache, **more)


def _saved(library: Any, spec: str, samples: int | None, seed: int) -> Table:
    with _reading(library, spec):
        states = [json.loads(path.read_text("utf-8")) for path in Path(spec).glob("state.json")]
        if states and not states[0]["_data_files"]:  # which the library can't read
            raise DataError(f"{spec}: there are no samples; give at least one")
        dataset = library.load_from_disk(spec)
        if hasattr(dataset, "keys"):
            names = sorted(dataset.keys())
            if len(names) != 1:
                raise DataError(
                    f"{spec}: it holds the splits {', '.join(names) or 'of none'}; name one, say {Path(spec) / (names or ['x'])[0]}"
                )
            dataset = dataset[names[0]]
        rows = len(dataset)
        chosen = None
        if samples is not None and 0 < samples < rows:
            chosen = np.random.default_rng(seed).permutation(rows)[:samples]
            dataset = dataset.select(chosen)

    def name(place: int, row: Mapping[str, Any]) -> str:
        return f"{spec}, row {place if chosen is None else chosen[place]}"

    what = _counted(rows, "row") if chosen is None else f"{samples} of {_counted(rows, 'row')}"
    return Table(lambda wanted: _rows(library, spec, dataset.select_columns(wanted)), dataset.features, what, name, len(dataset))


def _parquet(library: Any, spec: str, files: Sequence[Path]) -> Table:
    parquet = importlib.import_module("pyarrow.parquet")
    ends: list[int] = []
    for path in files:
        with _reading(library, str(path)):
            ends.append((ends[-1] if ends else 0) + parquet.read_metadata(path).num_rows)
    with _reading(library, str(files[0])):
        features = library.Features.from_arrow_schema(parquet.read_schema(files[0]))

    def name(place: int, row: Mapping[str, Any]) -> str:
        number = bisect.bisect_right(ends, place)
        return f"{files[number]}, row {place - (ends[number - 1] if number else 0)}"

    def open_(wanted: list[str]) -> Iterator[Any]:
        return _rows(library, spec, _streamed(library, spec, "parquet", files, columns=wanted, batch_size=ROWS))

    return Table(open_, features, f"{_counted(ends[-1], 'row')} in {_counted(len(files), 'file')}", name, ends[-1])


def _tars(library: Any, spec: str, files: Sequence[Path]) -> Table:
    sizes: dict[str, int] = {}

    def samples_in(path: str | Path) -> int:
        path = os.path.abspath(path)
        if path not in sizes:
            sizes[path] = _samples_in(path)
        return sizes[path]

    held = list(itertools.dropwhile(lambda path: not samples_in(path), files))
    if not held:
        raise DataError(f"{spec}: there are no samples; give at least one")
    dataset = _streamed(library, spec, "webdataset", held)

    def open_(wanted: list[str]) -> Iterator[Any]:
        """Every shard is looked over before it is used: the library takes one that is cut or damaged for one that ends there."""
        for table in _blamed(_rows(library, spec, dataset.select_columns([*wanted, *TAR_EXTRAS])), held, samples_in):
            start = 0
            for url, rows in itertools.groupby(table["__url__"].to_pylist()):
                samples_in(url)
                yield table.slice(start, length := len(list(rows)))
                start += length
        for path in files:
            samples_in(path)

    def name(place: int, row: Mapping[str, Any]) -> str:
        return f"{row['__url__']}: {row['__key__']}"

    return Table(
        open_,
        dataset.features or {},
        _counted(len(files), "tar file"),
        name,
        count=lambda: sum(map(samples_in, files)),
        extras=TAR_EXTRAS,
    )


def _blamed(rows: Iterator[Any], files: Sequence[Path], check: Callable[[Path], int]) -> Iterator[Any]:
    """The rows; an error is that of the file that is to blame, where one is cut or damaged."""
    try:
        yield from rows
    except DataError:
        for path in files:
            check(path)
        raise


def _samples_in(path: str) -> int:
    """The number of samples in a tar file: neighbours whose names differ only behind the first dot. DataError unless it is whole."""
    samples, last = 0, None
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                key = (folder, base.partition(".")[0])
                if member.isreg() and not base.startswith((".", "__")) and "." in base:
                    samples, last = samples + (key != last), key
                archive.members = []  # type: ignore[attr-defined]  # the list that it keeps of all, which nobody reads here
            end = archive.offset
        with open(path, "rb") as file:
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{path}: can't be read as .tar ({error}); fetch or make it again") from None
    if not block:
        raise DataError(f"{path}: the archive is cut off after {_counted(samples, 'sample')}; fetch or make it again")
    if any(block):
        raise DataError(f"{path}: the archive is damaged behind {_counted(samples, 'sample')}; fetch or make it again")
    return samples


# Columns


def _columns(features: Mapping[str, Any], inputs: Sequence[InputSpec], spec: str, column: str | None) -> dict[str, str]:
    """The column of each input. DataError where there is none, or where it could be one of several."""
    has = ", ".join(f"{name!r} ({_type(feature)})" for name, feature in features.items() if not name.startswith("__")) or "none"
    usable = {name: feature for name, feature in features.items() if _is_image(feature) or _is_numbers(feature)}
    found: dict[str, str] = {}
    if column is not None:
        if len(inputs) != 1:
            raise DataError(f"--column {column}: that is for a model with one input, and this one has {len(inputs)}; name columns as these")
        if column not in usable:
            raise DataError(f"{spec}: no column {column!r} that holds images or numbers; it has {has}")
        return {inputs[0].name: column}
    for one in inputs:
        exact = [name for name in usable if name == one.name] or [name for name in usable if name.rpartition(".")[0] == one.name]
        if exact:
            found[one.name] = exact[0]
    if len(inputs) == 1 and not found:
        images = [name for name in usable if _is_image(usable[name])] if len(inputs[0].shape) == 4 else []
        numbers = [name for name in usable if _is_numbers(usable[name]) and name not in (*CLASSES, *LABELS) and not name.startswith("__")]
        fitting = images or [name for name in numbers if not _is_integer(usable[name])] or numbers
        if len(fitting) > 1:
            raise DataError(
                f"{spec}: columns {', '.join(map(repr, fitting))} could all be input {inputs[0].name!r}; name one: --column {fitting[0]}"
            )
        if fitting:
            found[inputs[0].name] = fitting[0]
    if missing := [one.name for one in inputs if one.name not in found]:
        raise DataError(f"{spec}: no column for input {', '.join(map(repr, missing))}; it has {has}; name columns of arrays as the inputs")
    return found


def _label(features: Mapping[str, Any], inputs: Sequence[InputSpec], chosen: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """The column of the labels, and notes."""
    names = [name for name in CLASSES if name in features and name not in chosen.values()]
    whole = [name for name in names if _is_integer(features[name])]
    if whole:
        return whole[0], [f"the labels are those of column {whole[0]!r}, not of {', '.join(map(repr, whole[1:]))}"] if whole[1:] else []
    if names:
        return None, [f"the labels aren't used: classes are integers, and column {names[0]!r} holds {_type(features[names[0]])}"]
    return None, []


def _is_image(feature: Any) -> bool:
    """Images as `datasets` marks them, or bytes as others write them."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _is_numbers(feature: Any) -> bool:
    while hasattr(feature, "feature"):  # a list
        feature = feature.feature
    if isinstance(feature, list) and len(feature) == 1:
        return _is_numbers(feature[0])
    return bool(re.fullmatch(r"u?int\d+|float\d+|bool", str(getattr(feature, "dtype", ""))))


def _is_integer(feature: Any) -> bool:
    return (
        not hasattr(feature, "feature")
        and not hasattr(feature, "shape")
        and bool(re.fullmatch(r"u?int\d+", str(getattr(feature, "dtype", ""))))
    )


def _type(feature: Any) -> str:
    if _is_image(feature):
        return "image"
    if hasattr(feature, "feature"):
        return f"list of {_type(feature.feature)}"
    return str(getattr(feature, "dtype", type(feature).__name__))


# Rows to samples


def _images(table: Table, wanted: list[str], column: str, name: str, label: str | None, pipeline: Pipeline) -> Iterator[Chunk]:
    """One chunk for each row, which is decoded when it is needed."""

    def make(cell: Any, where: str) -> Batch:
        found = cell.as_py()
        content, path = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (found, None)
        if content is None and path and os.path.isfile(path):
            content = Path(path)
        if not content:
            raise CorruptError(where, "there is no image")
        return {name: pipeline(content, where)[None]}

    start = 0
    for part in table.open(wanted):
        labels = _labels(part, label, table.what)
        names = {extra: part[extra].to_pylist() for extra in table.extras}
        for row, cell in enumerate(part[column]):
            where = table.row(start + row, {extra: values[row] for extra, values in names.items()})
            yield Chunk({}, None if labels is None else labels[row : row + 1], where, single=True, make=partial(make, cell, where))
        start += part.num_rows


def _arrays(table: Table, wanted: list[str], chosen: Mapping[str, str], label: str | None, spec: str) -> Iterator[Chunk]:
    """One chunk for the rows that were read at once, or, where their shapes differ, for each row."""
    start = 0
    for part in table.open(wanted):
        where = f"{spec}, from row {start}"
        labels = _labels(part, label, where)
        found = {name: _numbers(_whole(part[column]), f"{where}, column {column!r}") for name, column in chosen.items()}
        arrays = {name: values for name, values in found.items() if not isinstance(values, list)}
        if len(arrays) == len(found):
            yield Chunk(arrays, labels, where)
        for row in range(part.num_rows if len(arrays) < len(found) else 0):
            one = {name: values[row][None] for name, values in found.items()}
            yield Chunk(one, None if labels is None else labels[row : row + 1], f"{spec}, row {start + row}", single=True)
        start += part.num_rows


def _labels(part: Any, label: str | None, where: str) -> Array | None:
    if label is None:
        return None
    if part[label].null_count:
        raise DataError(f"{where}: some rows have no label in column {label!r}; give all of them one, or leave the column out")
    made: Array = part[label].to_numpy()
    return made


def _whole(column: Any) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _numbers(array: Any, where: str) -> Array | list[Array]:
    """An arrow array as numpy's, without a copy where that can be; a list of arrays where their shapes differ."""
    if array.null_count:
        raise DataError(f"{where}: some rows hold nothing; fill them or leave them out")
    if hasattr(array, "to_numpy_ndarray"):
        made: Array = array.to_numpy_ndarray()
        return made
    if hasattr(array, "storage"):
        return _numbers(array.storage, where)
    if not hasattr(array, "flatten") or not hasattr(array.type, "value_type"):
        flat: Array = array.to_numpy(zero_copy_only=False)
        return flat
    sizes = {len(array[0])} if hasattr(array.type, "list_size") and len(array) else set(array.value_lengths().to_pylist())
    inner = _numbers(array.flatten(), where) if len(sizes) == 1 else []
    if not isinstance(inner, list):
        return inner.reshape(len(array), *sizes, *inner.shape[1:])
    rows = [_numbers(row.values, where) for row in array]
    alike = [row for row in rows if not isinstance(row, list)]
    if len(alike) < len(rows):
        raise DataError(f"{where}: the lists in a row are of different lengths; make them alike")
    return alike


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
