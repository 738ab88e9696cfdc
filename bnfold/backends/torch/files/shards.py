"""Safetensors files: one, or several with an index (`model.safetensors.index.json`) that says which holds which weight.

An index is {"weight_map": {NAME: FILE, ...}}, perhaps with metadata beside it, as huggingface_hub and transformers write it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from torch import Tensor

from bnfold.backends.kinds import LARGEST_INDEX
from bnfold.errors import ModelError
from bnfold.files import contents, unreadable


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
        raise ModelError(f"{index}: {shard.name} doesn't hold {', '.join(_few(missing))}; download or save all files again")
    if more := sorted(there - wanted):
        say(f"{index}: {shard.name} also holds {', '.join(_few(more))}, which the index doesn't name there, and which isn't used")


def _few(names: list[str]) -> Iterator[str]:
    yield from (repr(name) for name in names[:3])
    if len(names) > 3:
        yield f"and {len(names) - 3} more"
