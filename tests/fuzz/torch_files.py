"""Sound files of PyTorch with one thing or two made wrong: each must load and come out right, or be refused in one line.

What is changed: bytes, the entries of an archive, its JSON, its pickle, a table of tensors, the tensors themselves. A failure is an
exception that isn't a BnfoldError, a run that takes too long, and a folded network that computes something else than the one that was
read.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import random
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from modules import lively, run
from torch import Tensor, nn

import bnfold

from .found import Found, Say, watched

NEAR = 1e-3  # of the largest output
STRANGE = (-(2**63), -1, 0, 1, 2, 7, 2**31, 2**62, 10**30, 0.5, -1e300, "", "x", "weight", "../x", None, True, [], {}, [[]], {"as_int": 3})
# What a mutation raises of a file that is broken already.
BROKEN = (
    zipfile.BadZipFile,
    ValueError,
    LookupError,
    StopIteration,
    RuntimeError,
    TypeError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
)
Mutation = Callable[[bytes, random.Random], bytes]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(216, 5),
    )
    return lively(nn.Sequential(*layers)).eval()


def example() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@functools.cache
def seeds() -> dict[str, bytes]:
    """One file of each form, by its suffix."""
    from safetensors.torch import save as safetensors

    net, files = network(), {}
    for suffix, legacy in ((".pth", False), (".bin", True)):
        stream = io.BytesIO()
        torch.save(net.state_dict(), stream, _use_new_zipfile_serialization=not legacy)
        files[suffix] = stream.getvalue()
    files[".safetensors"] = safetensors(net.state_dict())
    for suffix, axes in ((".pt2", None), (".open.pt2", ({0: torch.export.Dim.AUTO},))):
        stream = io.BytesIO()
        torch.export.save(torch.export.export(net, (example(),), dynamic_shapes=axes), stream)
        files[suffix] = stream.getvalue()
    return files


# --- bytes, archives, JSON -----------------------------------------------------------------------------------------------------------


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes, a stretch of zeros, the end cut off, or a piece put elsewhere."""
    changed, which = bytearray(data), rng.random()
    at = rng.randrange(len(data))
    if which < 0.5:
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif which < 0.65:
        changed[at : at + 16] = bytes(16)
    elif which < 0.85:
        del changed[at:]
    else:
        changed[at:at] = data[: rng.randrange(1, 64)]
    return bytes(changed)


def archive_entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED, twice: str = "") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        if twice:
            archive.writestr(twice.upper(), entries[twice])
    return stream.getvalue()


def change_archive(data: bytes, rng: random.Random) -> bytes:
    """An entry that is gone, renamed, doubled, empty, another's or packed."""
    entries = archive_entries(data)
    name, other = rng.sample(sorted(entries), 2)
    which = rng.randrange(7)
    if which == 0:
        del entries[name]
    elif which == 1:
        entries[rng.choice(("x/" + name, name + ".py", "archive/../" + name, name.replace("archive", "b"), "archive/new"))] = entries.pop(
            name
        )
    elif which == 2:
        entries[name] = entries[other]
    elif which == 3:
        entries[name] = b""
    elif which == 4:
        entries[name] = change_bytes(entries[name] or b"x", rng)
    return written(entries, zipfile.ZIP_DEFLATED if which == 5 else zipfile.ZIP_STORED, name if which == 6 else "")


def changed_json(found: Any, rng: random.Random) -> Any:
    """One place in it is gone, doubled, or something else."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            places.append((value, key))
            walk(each)

    walk(found)
    if not places:
        return found
    parent, key = rng.choice(places)
    which = rng.random()
    if which < 0.2:
        del parent[key]
    elif which < 0.3 and isinstance(parent, list):
        parent.append(parent[key])
    elif which < 0.4:
        parent[key] = rng.choice(places)[0]
    elif which < 0.6 and isinstance(parent[key], int):
        parent[key] += rng.choice((-1, 1, 7))
    else:
        parent[key] = rng.choice(STRANGE)
    return found


def change_json(data: bytes, rng: random.Random) -> bytes:
    """A program, or a table of its tensors."""
    entries = archive_entries(data)
    name = rng.choice([name for name in entries if name.endswith(".json") and entries[name]])
    with contextlib.suppress(ValueError, RecursionError):  # one that holds itself
        entries[name] = json.dumps(changed_json(json.loads(entries[name]), rng)).encode()
    return written(entries)


def change_pickle(data: bytes, rng: random.Random) -> bytes:
    """A few bytes of the pickle in an archive."""
    entries = archive_entries(data)
    name = next(name for name in entries if name.endswith("data.pkl"))
    entries[name] = change_bytes(entries[name], rng)
    return written(entries)


def change_header(data: bytes, rng: random.Random) -> bytes:
    """The table of a safetensors file, or its length."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    text = json.dumps(changed_json(header, rng)).encode()
    told = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) - 1, 2**40))
    return told.to_bytes(8, "little") + text + rest


def change_tensor(data: bytes, rng: random.Random) -> bytes:
    """A checkpoint whose tensors are others, whole in itself."""
    state: dict[str, Any] = dict(torch.load(io.BytesIO(data), weights_only=True))
    key = rng.choice(sorted(state))
    tensor = state[key]
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64)
    state[key] = rng.choice(
        [
            lambda: tensor.to(rng.choice(kinds)),
            lambda: tensor.reshape(-1),
            lambda: tensor[None],
            lambda: tensor.reshape(-1)[:0],
            lambda: torch.full_like(tensor, rng.choice((0, 1, -1))),
            lambda: tensor * rng.choice((0, 1000000)) / rng.choice((1, 0.0, 1e-30)),
            lambda: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape),
            lambda: tensor.to_sparse(),
            lambda: rng.choice(STRANGE),
            lambda: {key: tensor},
            lambda: torch.tensor(1.0).expand(1 << 40),
        ]
    )()
    if rng.random() < 0.2:
        del state[key]
    if rng.random() < 0.2:
        state[f"{rng.choice(('module.', 'x.', ''))}{key}.more"] = tensor
    stream = io.BytesIO()
    torch.save({"state_dict": state} if rng.random() < 0.3 else state, stream)
    return stream.getvalue()


MUTATIONS: dict[str, list[Mutation]] = {
    ".pth": [change_bytes, change_archive, change_pickle, change_tensor, change_tensor],
    ".bin": [change_bytes],
    ".safetensors": [change_bytes, change_header, change_header],
    ".pt2": [change_bytes, change_archive, change_json, change_json, change_json],
    ".open.pt2": [change_archive, change_json, change_json],
}


def mutant(seed: int) -> tuple[bytes, str, str]:
    """The file of a seed, its suffix, and what was done to it."""
    rng = random.Random(seed)
    suffix = rng.choice(list(MUTATIONS))
    data, done = seeds()[suffix], []
    for _ in range(rng.choice((1, 1, 2))):
        mutate = rng.choice(MUTATIONS[suffix])
        with contextlib.suppress(*BROKEN):
            data = mutate(data, rng)
            done.append(mutate.__name__)
    return data, suffix, f"{suffix} {', '.join(done)}"


# --- what must hold ------------------------------------------------------------------------------------------------------------------


def tried(seed: int, *, save: Path | None = None, say: Say | None = None) -> Found:
    """What becomes of the file of a seed: "folded", "kept", or the error's kind and text."""
    data, suffix, done = mutant(seed)
    found = Found(seed)
    if save is not None:
        save.write_bytes(data)
    with tempfile.TemporaryDirectory() as folder, watched(found, done, say):
        path = Path(folder, f"mutant{suffix}")
        path.write_bytes(data)
        found.became, found.problem = outcome(path)
        found.problem = found.problem and f"{done}: {found.problem}"
    return found


def outcome(path: Path) -> tuple[str, str]:
    """What became of a file, and what is wrong with that."""
    given = example()
    try:
        model = bnfold.load(path, arch=network)
        bnfold.inspect(model, example=given)
        fused, report = bnfold.fuse(model, example=given)
        bnfold.save(fused, path.with_name(f"fused{path.suffix}"), example=given, as_state=True)
    except bnfold.BnfoldError as error:
        return f"{type(error).__name__}: {error}", ""
    became = "folded" if any(layer.verdict == "folded" for layer in report.layers) else "kept"
    with contextlib.suppress(RuntimeError, AssertionError, ValueError):  # a program that can't be run as it is
        want = run(model, given)
        got = run(fused, given)
        if [t.shape for t in want] != [t.shape for t in got]:
            return became, "the folded network's outputs have other shapes"
        for a, b in zip(want, got, strict=True):
            both = a.isfinite() & b.isfinite()
            off = float((a - b)[both].abs().max()) if both.any() else 0.0
            if off > NEAR * max(float(a[both].abs().max()) if both.any() else 0.0, 1e-6):
                return became, f"the folded network computes something else: off by {off:.2g}"
    with contextlib.suppress(bnfold.BnfoldError):
        bnfold.recalibrate(model, [given], example=given)
    with contextlib.suppress(bnfold.BnfoldError):
        bnfold.verify(model, fused, [given], example=given)
    return became, ""
