"""The state dict in what training scripts save, and putting it into a network; safetensors files, one, or several with an index.

An index (`model.safetensors.index.json`) says which file holds which weight: {"weight_map": {NAME: FILE, ...}}, perhaps with metadata
beside it, as huggingface_hub and transformers write it.
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnfold.backends.kinds import LARGEST_INDEX
from bnfold.errors import ModelError
from bnfold.files import DAMAGED_ZIP, bomb, contents, unreadable
from bnfold.text import one_line, some

from ..export.observers import fit_quantisers
from ..writing.surgery import Surgery, rebuild

RECORD = "bnfold"  # where a folded state dict keeps what was folded
# Where training scripts nest the state dict, what they mean by default first.
NESTS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "generator", "backbone"),
    *("model_ema", "ema_state_dict", "state_dict_ema", "ema", "ema_model", "student", "teacher", "shadow"),
)
PREFIXES = tuple(
    f"{name}."
    for name in ["module", "_orig_mod", "model", "net", "network", "backbone", "encoder", "ema", "student", "teacher", "_forward_module"]
)
COUNTERS = ("total_ops", "total_params")  # buffers that a profiler (thop) leaves in each module
SHOWN = 3  # names of each kind in an error

Say = Callable[[str], None]


def state_of(found: Any, where: str, say: Say) -> tuple[dict[str, Tensor], Surgery | None]:
    """The state dict in a checkpoint, and what was folded in it. Raises ModelError where there is none."""
    surgery = None
    path: list[str] = []
    while isinstance(found, Mapping) and not _is_state(found):
        if isinstance(record := found.get(RECORD), Mapping):
            surgery = Surgery.from_dict(record)
        nests = [key for key in NESTS if isinstance(found.get(key), Mapping) and _holds_tensors(found[key])]
        if not nests:
            break
        if len(nests) > 1:
            say(f"{where} also holds {', '.join(map(repr, nests[1:]))}, which isn't used")
        path.append(nests[0])
        found = found[nests[0]]
    if not isinstance(found, Mapping) or not _is_state(found):
        content = ", ".join(map(repr, list(found)[:6])) if isinstance(found, Mapping) else type(found).__name__
        raise ModelError(f"{where}: no state dict in it (it holds {content}); save model.state_dict()")
    if path:
        say(f"{where}: the weights are those under {'.'.join(path)!r}")
    return {str(key): value for key, value in found.items() if isinstance(value, Tensor)}, surgery


def _is_state(found: Mapping[Any, Any]) -> bool:
    """Weights by name; beside them a training script's own numbers may stand, but no deeper dicts of tensors."""
    tensors = [key for key, value in found.items() if isinstance(value, Tensor)]
    others = [value for value in found.values() if isinstance(value, Mapping) and _holds_tensors(value)]
    return bool(tensors) and not others and len(tensors) >= len(found) / 2


def _holds_tensors(found: Any) -> bool:
    return isinstance(found, Mapping) and any(isinstance(v, Tensor) or _holds_tensors(v) for v in found.values())


def surgery_of(metadata: Mapping[str, str] | None) -> Surgery | None:
    """What was folded, from the metadata of a safetensors file."""
    text = (metadata or {}).get(RECORD)
    if text is None:
        return None
    try:
        return Surgery.from_dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ModelError(f"the file's record of what was folded is damaged: {error}") from None


def put(
    state: dict[str, Tensor], module: nn.Module, surgery: Surgery | None, where: str, say: Say, ignore: Sequence[str] = ()
) -> nn.Module:
    """The network with these weights, in their types. ignore: patterns of names that may be there and mean nothing.

    Raises ModelError with a short list where they don't fit.
    """
    if surgery is not None:
        module = rebuild(module, surgery)
        say(f"{where}: the weights are of a network that bnfold folded, and so is the network now")
    wanted = module.state_dict()
    state = _without_ignored(state, wanted, ignore, where, say)
    state, prefix = _without_prefixes(state, wanted)
    if prefix:
        say(f"{where}: the names of the weights begin with {prefix!r}, which was left out")
    fit_quantisers(module, state)
    wanted = module.state_dict()
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in state and name not in counters]
    extra = [name for name in state if name not in wanted and not name.endswith("num_batches_tracked") and name != "n_averaged"]
    odd = [name for name in state if name in wanted and not is_lazy(wanted[name]) and state[name].shape != wanted[name].shape]
    shapes = [f"{name} {tuple(state[name].shape)} for {tuple(wanted[name].shape)}" for name in odd]
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad and name in state]
    whole = [name for name in trained if not (state[name].is_floating_point() or state[name].is_complex())]
    types = [f"{name} {str(state[name].dtype).removeprefix('torch.')}" for name in whole]
    what = {
        f"of {len(wanted)} are missing": missing,
        "aren't in the architecture": extra,
        "have another shape": shapes,
        "aren't floating-point numbers": types,
    }
    if parts := [f"{len(names)} {text} ({_few(names)})" for text, names in what.items() if names]:
        remedy = "give the --arch that they were trained with"
        if extra:
            remedy += f", or pass over what means nothing to it with --ignore-keys PATTERN, such as {shlex.quote(_pattern(extra[0]))}"
        raise ModelError(f"{where}: the weights don't fit the architecture: {'; '.join(parts)}; {remedy}")
    fitting = {name: tensor for name, tensor in state.items() if name in wanted}
    module.load_state_dict(fitting, strict=False, assign=True)
    return module


def _without_ignored(
    state: dict[str, Tensor], wanted: Mapping[str, Any], patterns: Sequence[str], where: str, say: Say
) -> dict[str, Tensor]:
    """The state without what the user passes over, and without profilers' counters, which the architecture lacks as it stands."""
    counters = {name for name in COUNTERS if not any(key.rpartition(".")[2] == name for key in wanted)}
    asked = [key for key in state if any(fnmatchcase(key, pattern) for pattern in patterns) and not _is_wanted(key, wanted)]
    found = [key for key in state if key not in asked and key.rpartition(".")[2] in counters]
    for keys, what in ((asked, "passed over, as asked"), (found, "counters of a profiler, passed over")):
        if keys:
            say(f"{where}: {what}: {_few(keys)}")
    for pattern in (pattern for pattern in patterns if not any(fnmatchcase(key, pattern) for key in asked)):
        if any(fnmatchcase(key, pattern) for key in state):
            say(f"{where}: {pattern!r} matches weights of the architecture alone, and none of these is passed over")
        else:
            say(f"{where}: no key matches {pattern!r}")
    return {key: tensor for key, tensor in state.items() if key not in {*asked, *found}}


def _is_wanted(key: str, wanted: Mapping[str, Any]) -> bool:
    """Whether the architecture has a weight of this name, perhaps behind a wrapper's prefix."""
    parts = key.split(".")
    return any(".".join(parts[i:]) in wanted for i in range(len(parts)))


def _pattern(key: str) -> str:
    """What matches all keys of a layer."""
    layer = key.rpartition(".")[0]
    return f"*{layer}.*" if layer else key


def _without_prefixes(state: dict[str, Tensor], wanted: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Prefixes of wrappers go, as long as more names fit without them."""
    gone = ""
    while True:
        for prefix in PREFIXES:
            inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            rest = [name for name in state if not name.startswith(prefix) and name != "n_averaged"]
            if inside and not rest and _fit(inside, wanted) >= _fit(state, wanted) and not _fit(state, wanted):
                state, gone = inside, gone + prefix
                break
        else:
            return state, gone


def _fit(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> int:
    return sum(name in wanted for name in state)


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def unpickled(path: Path, trust_pickle: bool) -> Any:
    """The object in a pickle. Without trust, of plain types and tensors alone."""
    mapped = zipfile.is_zipfile(path)
    try:
        if what := bomb(path):
            raise ModelError(f"{path}: {what}; save it again")
    except DAMAGED_ZIP as error:
        raise ModelError(f"{path}: can't be read as a PyTorch file ({one_line(error)}); download or save it again") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if not trust_pickle:
            what = _what(str(error))
            raise ModelError(
                f"{path}: a pickle that holds more than weights{what}, and could run code when it is loaded; give --trust-pickle if you "
                f"trust where it comes from, or save model.state_dict() and give --arch"
            ) from None
    except Exception as error:  # a damaged file raises anything
        raise ModelError(f"{path}: can't be read as a PyTorch file ({one_line(error)}); download or save it again") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs any code
        why = f"{type(error).__name__}: {one_line(error)}"
        own = re.search(r"Can't get attribute '(\w+)' on <module '(?:bnfold\.)?__main__'", str(error))
        if own is not None:
            raise ModelError(
                f"{path}: {own[1]} is a class of the very program that saved it, where no other finds it; save model.state_dict(), and "
                f"give --arch FILE.py:{own[1]}, the file that has the class"
            ) from error
        raise ModelError(f"{path}: can't be unpickled ({why}); is what it was saved with installed?") from error


def _what(text: str) -> str:
    """The class that the unpickler refused, from its message."""
    found = re.search(r"(?:GLOBAL|global) ([\w.]+)", text)
    return "" if found is None else f" ({found[1]})"


# --- safetensors ----------------------------------------------------------------------------------------------------------------------


def shards_of(path: Path) -> dict[Path, list[str]]:
    """The files of an index, each with the names of its weights. They must lie beside it, or where it is a link, beside what that leads to.

    Raises ModelError where one doesn't, or isn't there; InputError where the index can't be read.
    """
    try:
        found: Any = json.loads(contents(path, LARGEST_INDEX, "the index"))
        places = found["weight_map"]
        if not places or not all(isinstance(each, str) for each in places.values()):
            raise ValueError("its weight_map is empty, or says something else than names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{path}: no index of safetensors files: it has no weight_map of names; download or save it again") from None
    shards: dict[Path, list[str]] = {}
    for name, file in places.items():
        shards.setdefault(path.with_name(_plain(path, name, file)), []).append(name)
    homes = {path.absolute().parent.resolve(), path.resolve().parent}
    for shard, names in shards.items():
        if why := unreadable(shard):
            raise ModelError(f"{path}: {shard.name}, which holds {len(names)} of its weights, is missing ({why}); copy it there")
        if shard.resolve().parent not in homes:
            raise ModelError(f"{path}: {shard.name} is a link out of its folder, which is not safe; put a copy in its place")
    return shards


def _plain(path: Path, weight: str, file: str) -> str:
    if not file or "\0" in file or file in (".", "..") or PureWindowsPath(file).name != file:  # which knows both kinds of slash
        raise ModelError(f"{path}: the index places {weight!r} outside of its folder ({file!r}), which is not safe")
    return file


def state_in(path: Path, kind: str, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights, and the metadata of the file where it is a single one. kind: "safetensors", or "shards" of an index."""
    if kind == "safetensors":
        return _read(path, None, path, say)
    state: dict[str, Tensor] = {}
    for shard, names in shards_of(path).items():
        state.update(_read(shard, names, path, say)[0])
    return state, {}


def _read(shard: Path, names: Iterable[str] | None, index: Path, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """names: the weights that are asked for; all of them where it is None."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="pt") as file:
            there = list(file.keys())
            if names is not None:
                _compare(index, shard, set(names), set(there), say)
            return {name: file.get_tensor(name) for name in (there if names is None else names)}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shard}: a damaged safetensors file ({error}); download or save it again") from None


def _compare(index: Path, shard: Path, wanted: set[str], there: set[str], say: Callable[[str], None]) -> None:
    if missing := sorted(wanted - there):
        raise ModelError(f"{index}: {shard.name} doesn't hold {some(missing, SHOWN)}; download or save all files again")
    if more := sorted(there - wanted):
        say(f"{index}: {shard.name} also holds {some(more, SHOWN)}, which the index doesn't name there, and which isn't used")
