"""What the user's data can be, as batches by input name.

Everything ends in a `Source`: samples by number, which `Data` cuts into batches again and again, so that a second pass sees the same data.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import BnfoldError, DataError, UsageError

if TYPE_CHECKING:
    from .images import ImageOptions

Batch = dict[str, npt.NDArray[Any]]
LABELS = ("labels", "label", "targets", "target", "y")
BATCH = 8  # samples that go through a network at once, unless told otherwise
AHEAD = 4  # threads that read images before they are wanted


@dataclass(frozen=True)
class InputSpec:
    """An input of a model: its type, and its shape, where a name or None stands for a dynamic axis."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@dataclass
class Data:
    """Batches by input name, from the start at each iteration. labels: one for each sample, where there are any."""

    batches: Callable[[], Iterator[Batch]]
    description: str
    labels: npt.NDArray[Any] | None = None
    samples: int | None = None
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()


def open_data(
    spec: str,
    inputs: list[InputSpec],
    *,
    batch_size: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    images: ImageOptions | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Data:
    """The command line's DATA. Raises DataError where it can't be read or doesn't fit the model's inputs."""
    if spec == "random":
        return _random(inputs, batch_size, samples or 64, seed, input_shapes)
    path = Path(spec)
    if not path.exists() and ":" in spec:
        return _function(spec, inputs, batch_size, samples)
    if not path.exists():
        raise DataError(
            f"{spec}: no such file or folder; DATA is a .npy, .npz, .safetensors or .pt file, a folder, FILE.py:FUNCTION or random"
        )
    if path.is_dir():
        return _folder(path, inputs, batch_size, samples, seed, images)
    readers = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".pt": _pt, ".pth": _pt}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{spec}: a {path.suffix or 'nameless'} file isn't data that bnfold reads; make it .npy, .npz, .safetensors or .pt")
    try:
        found = reader(path)
    except BnfoldError:
        raise
    except Exception as error:  # each format raises its own
        text = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: damaged, or not a {path.suffix} file ({text})") from None
    return _from_arrays(found, inputs, batch_size, samples, str(path))


def as_batches(obj: Any, inputs: list[InputSpec], *, batch_size: int | None = None, samples: int | None = None) -> Data:
    """What a library user gives: an array, a tuple or dict of arrays (all the data), or an iterable of such batches."""
    if isinstance(obj, Data):
        return obj
    if isinstance(obj, Mapping) or _is_array(obj):
        return _from_arrays(_named(obj, inputs, "the data"), inputs, batch_size, samples, "the data")
    if not isinstance(obj, Iterable):
        raise DataError(f"the data: expected arrays, or an iterable of batches, got {type(obj).__name__}")
    return _from_iterable(lambda: iter(obj), inputs, batch_size, samples, "the data", again=not isinstance(obj, Iterator))


# --- arrays, whole ---------------------------------------------------------------------------------------------------------------


def _npy(path: Path) -> Batch:
    return {"": np.load(path, mmap_mode="r", allow_pickle=False)}


def _npz(path: Path) -> Batch:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _safetensors(path: Path) -> Batch:
    from safetensors.numpy import load_file

    return dict(load_file(path))


def _pt(path: Path) -> Batch:
    try:
        import torch
    except ImportError:
        raise DataError(f"{path}: reading a .pt file takes PyTorch; install it, or save the data as .npz") from None
    found = torch.load(path, weights_only=True, map_location="cpu")
    if isinstance(found, Mapping):
        return {str(name): _array(value) for name, value in found.items()}
    if isinstance(found, (tuple, list)):
        return {str(i): _array(value) for i, value in enumerate(found)}
    return {"": _array(found)}


def _from_arrays(found: Batch, inputs: list[InputSpec], batch_size: int | None, samples: int | None, where: str) -> Data:
    """All the data in memory (or mapped), cut into batches."""
    arrays, labels, notes = _assigned(found, inputs, where)
    for spec in inputs:
        arrays[spec.name] = _fitted(arrays[spec.name], spec, where, notes)
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{where}: the inputs have different numbers of samples ({', '.join(f'{k}: {n}' for k, n in counts.items())})")
    count = min(next(iter(counts.values())), samples or sys.maxsize)
    if count == 0:
        raise DataError(f"{where}: no samples in it")
    size = _batch_size(inputs, batch_size, notes)
    used = _used(count, size, inputs, where, notes)
    if labels is not None and len(labels) < used:
        raise DataError(f"{where}: {len(labels)} labels for {used} samples")

    def batches() -> Iterator[Batch]:
        for start in range(0, used, size):
            stop = min(start + size, used)
            yield {spec.name: _typed(np.asarray(arrays[spec.name][start:stop]), spec, where) for spec in inputs}

    return Data(batches, f"{used} samples from {where}, {size} at a time", None if labels is None else labels[:used], used, notes)


def _assigned(found: Batch, inputs: list[InputSpec], where: str) -> tuple[Batch, npt.NDArray[Any] | None, list[str]]:
    """Arrays by input name, and the labels among what is left over."""
    names = [spec.name for spec in inputs]
    rest = {name: array for name, array in found.items() if name not in names}
    arrays = {name: array for name, array in found.items() if name in names}
    labels = next((np.asarray(rest.pop(name)).ravel() for name in LABELS if name in rest), None)
    missing = [name for name in names if name not in arrays]
    if len(missing) == 1 and len(rest) == 1 and len(names) == 1:
        arrays[missing.pop()] = rest.popitem()[1]
    elif missing and len(missing) == len(rest) == len(names) and set(rest) == {str(i) for i in range(len(names))}:
        arrays = dict(zip(names, rest.values(), strict=True))
        rest, missing = {}, []
    if missing:
        raise DataError(
            f"{where}: no array for input '{missing[0]}'; it holds {', '.join(found) or 'nothing'}, the model takes {', '.join(names)}"
        )
    notes = [f"{where}: array '{name}' is no input of the model and is left out" for name in rest]
    return arrays, labels, notes


# --- folders ------------------------------------------------------------------------------------------------------------------------


def _folder(
    path: Path, inputs: list[InputSpec], batch_size: int | None, samples: int | None, seed: int, images: ImageOptions | None
) -> Data:
    from .images import SUFFIXES

    files = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
    arrays = [p for p in files if p.suffix.lower() == ".npy"]
    pictures = [p for p in files if p.suffix.lower() in SUFFIXES]
    if len(inputs) != 1:
        raise DataError(
            f"{path}: a folder feeds one input, the model takes {', '.join(s.name for s in inputs)}; use .npz or FILE.py:FUNCTION"
        )
    if arrays and not pictures:
        spec = inputs[0]

        def stored() -> Iterator[Any]:
            for file in arrays:
                try:
                    array = np.load(file, allow_pickle=False)
                except (OSError, ValueError) as error:
                    raise DataError(f"{file}: damaged, or not a .npy file ({' '.join(str(error).split())[:100]})") from None
                yield {spec.name: array[None] if array.ndim == len(spec.shape) - 1 else array}

        return _from_iterable(stored, inputs, batch_size, samples, str(path))
    if not pictures:
        raise DataError(f"{path}: no images and no .npy files in it")
    return _pictures(path, pictures, inputs[0], batch_size, samples, seed, images)


def _pictures(
    folder: Path, files: list[Path], spec: InputSpec, batch_size: int | None, samples: int | None, seed: int, options: ImageOptions | None
) -> Data:
    """Images, read a few ahead of use; the sub-folders, in sorted order, are their labels."""
    from .images import ImageOptions, Pipeline

    pipeline = Pipeline(options or ImageOptions(), spec.shape)
    notes = list(pipeline.notes)
    classes = sorted({p.relative_to(folder).parts[0] for p in files if len(p.relative_to(folder).parts) > 1})
    labelled = bool(classes) and all(len(p.relative_to(folder).parts) > 1 for p in files)
    chosen = files
    if samples is not None and samples < len(files):
        picked = np.random.default_rng(seed).choice(len(files), samples, replace=False)
        chosen = [files[i] for i in sorted(picked)]
    size = _batch_size([spec], batch_size, notes)
    used = _used(len(chosen), size, [spec], str(folder), notes)
    chosen = chosen[:used]

    def batches() -> Iterator[Batch]:
        with ThreadPoolExecutor(AHEAD) as pool:
            pending = [pool.submit(pipeline, file, spec.dtype) for file in chosen[: 2 * size]]
            for start in range(0, used, size):
                batch = [pending.pop(0).result() for _ in range(min(size, used - start))]
                begin = start + 2 * size
                pending += [pool.submit(pipeline, file, spec.dtype) for file in chosen[begin : begin + size]]
                yield {spec.name: np.stack(batch)}

    labels = np.array([classes.index(p.relative_to(folder).parts[0]) for p in chosen]) if labelled else None
    kinds = f" in {len(classes)} classes" if labelled else ""
    how = f", {used} of them drawn with seed {seed}" if len(chosen) < len(files) else ""
    return Data(batches, f"{len(files)} images from {folder}{kinds}{how}; {pipeline}", labels, used, notes)


# --- iterables and functions ------------------------------------------------------------------------------------------------------------


def _function(spec: str, inputs: list[InputSpec], batch_size: int | None, samples: int | None) -> Data:
    module_name, _, name = spec.rpartition(":")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name)
            if not path.is_file():
                raise DataError(f"{spec}: no such file {module_name}")
            loader = importlib.util.spec_from_file_location(path.stem, path)
            assert loader is not None
            assert loader.loader is not None
            module = importlib.util.module_from_spec(loader)
            sys.path.insert(0, str(path.resolve().parent))
            try:
                loader.loader.exec_module(module)
            finally:
                sys.path.pop(0)
        else:
            module = importlib.import_module(module_name)
        function = getattr(module, name)
    except BnfoldError:
        raise
    except AttributeError:
        raise DataError(f"{spec}: {module_name} has no function '{name}'") from None
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"{spec}: can't be imported ({type(error).__name__}: {' '.join(str(error).split())[:150]})") from None

    def call() -> Iterator[Any]:
        try:
            found = function()
            yield from ([found] if isinstance(found, Mapping) or _is_array(found) else found)
        except BnfoldError:
            raise
        except Exception as error:  # the user's code again
            raise DataError(f"{spec}: failed ({type(error).__name__}: {' '.join(str(error).split())[:150]})") from None

    return _from_iterable(call, inputs, batch_size, samples, spec)


def _from_iterable(
    make: Callable[[], Iterator[Any]],
    inputs: list[InputSpec],
    batch_size: int | None,
    samples: int | None,
    where: str,
    *,
    again: bool = True,
) -> Data:
    """Batches as somebody makes them, cut anew to the batch size."""
    notes: list[str] = []
    size = _batch_size(inputs, batch_size, notes)
    passes = 0

    def batches() -> Iterator[Batch]:
        nonlocal passes
        passes += 1
        if passes > 1 and not again:
            raise DataError(f"{where}: an iterator can be read once only; give a list, or a function that makes the batches")
        held: list[Batch] = []
        seen = 0
        for item in make():
            found, _, _ = _assigned(_named(item, inputs, where), inputs, where)
            batch = {s.name: _typed(np.asarray(_fitted(found[s.name], s, where, [])), s, where) for s in inputs}
            count = len(next(iter(batch.values())))
            if samples is not None and seen + count > samples:
                batch = {name: array[: samples - seen] for name, array in batch.items()}
                count = samples - seen
            seen += count
            if held and any(a.shape[1:] != held[0][name].shape[1:] for name, a in batch.items()):
                yield from _cut(held, size, last=True)  # sizes change from here on
                held = []
            held.append(batch)
            whole = list(_cut(held, size, last=False))
            yield from whole
            if samples is not None and seen >= samples:
                break
        if not seen:
            raise DataError(f"{where}: no samples in it")
        fixed = isinstance(inputs[0].shape[0], int) if inputs[0].shape else False
        for rest in _cut(held, size, last=True):
            if not fixed or len(next(iter(rest.values()))) == size:
                yield rest

    labels = _labels(make, samples) if again else None
    return Data(batches, f"batches from {where}, {size} samples at a time", labels, samples if labels is None else len(labels), notes)


def _cut(held: list[Batch], size: int, *, last: bool) -> Iterator[Batch]:
    """Batches of `size` from the front of what is held; what is left stays held (or comes too, if it is the last)."""
    total = sum(len(next(iter(b.values()))) for b in held)
    if total < size and not (last and total):
        return
    joined = {name: np.concatenate([b[name] for b in held]) if len(held) > 1 else held[0][name] for name in held[0]}
    held.clear()
    stop = total if last else total - total % size
    for start in range(0, stop, size):
        yield {name: array[start : min(start + size, stop)] for name, array in joined.items()}
    if stop < total:
        held.append({name: array[stop:] for name, array in joined.items()})


def _labels(make: Callable[[], Iterator[Any]], samples: int | None) -> npt.NDArray[Any] | None:
    """The labels that dicts carry beside the inputs, if the first does."""
    found: list[npt.NDArray[Any]] = []
    for item in make():
        if not isinstance(item, Mapping) or "labels" not in item:
            return None
        found.append(_array(item["labels"]).ravel())
        if samples is not None and sum(map(len, found)) >= samples:
            break
    return np.concatenate(found)[:samples] if found else None


# --- random -----------------------------------------------------------------------------------------------------------------------------


def _random(inputs: list[InputSpec], batch_size: int | None, samples: int, seed: int, shapes: Mapping[str, tuple[int, ...]] | None) -> Data:
    from .backends.onnx.feeds import random_feeds

    notes: list[str] = ["random data exercise the network, they don't stand for real data"]
    size = _batch_size(inputs, batch_size, notes)
    used = _used(samples, size, inputs, "random", notes)
    given = None if shapes is None else dict(shapes)

    def batches() -> Iterator[Batch]:
        for number, start in enumerate(range(0, used, size)):
            yield random_feeds(inputs, batch=min(size, used - start), seed=seed + number, input_shapes=given)

    return Data(batches, f"{used} random samples, seed {seed}, {size} at a time", None, used, notes)


# --- what the model takes -----------------------------------------------------------------------------------------------------------------


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) or (hasattr(x, "shape") and (hasattr(x, "detach") or hasattr(x, "__array__")))


def _array(x: Any) -> npt.NDArray[Any]:
    """An array of whatever holds one; a torch tensor without importing torch."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":
            x = x.float()
        return np.asarray(x.numpy())
    return np.asarray(x)


def _named(item: Any, inputs: list[InputSpec], where: str) -> Batch:
    """One batch (or all the data) by name: a dict as it is, an array or tuple in the order of the inputs."""
    if isinstance(item, Mapping):
        return {str(name): _array(value) for name, value in item.items()}
    if _is_array(item):
        item = (item,)
    if not isinstance(item, (tuple, list)):
        raise DataError(f"{where}: a batch is an array, a tuple or a dict by input name, not {type(item).__name__}")
    if len(item) < len(inputs):
        raise DataError(f"{where}: {len(item)} arrays in a batch, the model takes {len(inputs)} ({', '.join(s.name for s in inputs)})")
    named = {spec.name: _array(value) for spec, value in zip(inputs, item, strict=False)}
    if len(item) == len(inputs) + 1:  # (images, labels), as data loaders give them
        named["labels"] = _array(item[-1])
    return named


def _fitted(array: npt.NDArray[Any], spec: InputSpec, where: str, notes: list[str]) -> npt.NDArray[Any]:
    """The array with a batch axis, if its shape fits the input's."""
    wanted = list(spec.shape)
    if array.ndim == len(wanted) - 1 and all(not isinstance(w, int) or w == n for w, n in zip(wanted[1:], array.shape, strict=True)):
        notes.append(f"{where}: '{spec.name}' has no batch axis, so it is taken as one sample")
        array = array[None]
    fits = array.ndim == len(wanted) and all(not isinstance(w, int) or w == n for w, n in zip(wanted[1:], array.shape[1:], strict=True))
    if not fits:
        shown = ["N", *(w if isinstance(w, int) else (w or "?") for w in wanted[1:])]
        raise DataError(f"{where}: input '{spec.name}' takes shape {shown}, the data have {list(array.shape)}".replace("'N'", "N"))
    kind, other = spec.dtype.kind, array.dtype.kind
    floats = ("f", "V")
    if (
        array.dtype != spec.dtype
        and not (other in floats and kind in floats)
        and not np.can_cast(array.dtype, spec.dtype, "safe" if kind in "iub" else "no")
    ):
        advice = "convert and scale them to floats first" if other in "iub" else "convert them first"
        raise DataError(f"{where}: input '{spec.name}' takes {spec.dtype}, the data are {array.dtype}; {advice}")
    return array


def _typed(array: npt.NDArray[Any], spec: InputSpec, where: str) -> npt.NDArray[Any]:
    """The array in the input's type, without a NaN or infinity."""
    with np.errstate(over="ignore"):
        typed = np.ascontiguousarray(array, dtype=spec.dtype)
    if typed.dtype.kind in ("f", "V") and not np.isfinite(typed.astype(np.float32, copy=False)).all():
        raise DataError(f"{where}: the data for input '{spec.name}' hold NaN or infinity (or overflow {spec.dtype}); clean them first")
    return typed


def _batch_size(inputs: list[InputSpec], wanted: int | None, notes: list[str]) -> int:
    """What goes through at once: the model's own fixed batch, else what is wanted."""
    fixed = {spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)}
    if len(fixed) == 1:
        [size] = (n for n in fixed if isinstance(n, int))
        if wanted not in (None, size):
            notes.append(f"the model's batch size is fixed at {size}, so --batch-size {wanted} is not used")
        return size
    if wanted is not None and wanted < 1:
        raise UsageError(f"a batch size of {wanted} makes no sense")
    return wanted or BATCH


def _used(count: int, size: int, inputs: list[InputSpec], where: str, notes: list[str]) -> int:
    """How many samples fill whole batches, where the model's batch is fixed."""
    if not any(spec.shape and isinstance(spec.shape[0], int) for spec in inputs):
        return count
    used = count - count % size
    if not used:
        raise DataError(f"{where}: {count} samples don't fill the model's fixed batch of {size}")
    if used < count:
        notes.append(f"{where}: the last {count - used} of {count} samples don't fill the model's fixed batch of {size} and are left out")
    return used
