"""Read a PyTorch model: a checkpoint with its architecture, a network of timm's, a pickled module, or an exported program.

Nothing is unpickled unasked. A .pt2 file is a zip archive of JSON and raw tensors, but `torch.export.load` also unpickles parts of it, and
what it makes of the JSON is Python that is compiled and run (see `archive_json`). So each part is looked at first, by the reader that will
load it, and only what a plain export holds passes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bnfold.backends.metadata import KEY, attach, text_beside, text_in_archive
from bnfold.capture import quiet
from bnfold.data.open import imported
from bnfold.errors import BnfoldError, ModelError, UnsupportedError, UsageError
from bnfold.files import DAMAGED_ZIP
from bnfold.text import first_line, meant, one_line

from .archive_json import is_plain_text, payload_troubles, program_troubles
from .checkpoint import Say, put, state_in, state_of, surgery_of, unpickled

REMEDY = "give --trust-pickle if you trust where it comes from"
# What reading an archive raises whose parts aren't what they should be.
DAMAGED = (zipfile.BadZipFile, ValueError, OSError, EOFError, RuntimeError, LookupError, TypeError, AttributeError)
LARGEST_JSON = 1 << 28  # bytes
RATIO = 200  # of unpacked to packed, beyond which an entry is a bomb; archives of PyTorch aren't packed at all
# The entries of an archive that holds nothing but an exported program, below its root.
PROGRAM = re.compile(r"models/[\w-]+\.json")
PAYLOAD = re.compile(r"data/(weights/[\w-]+_weights|constants/[\w-]+_constants)_config\.json")
INPUTS = re.compile(r"data/sample_inputs/[\w-]+\.pt")
PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/[\w-]+|\.format_version|\.storage_alignment"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|extra/.*"
)
CODE = re.compile(r"(data/)?aotinductor/.*|.*\.(so|dll|dylib|cubin|hsaco|ptx|py|pyc|cpp|o)")


def check_archive(path: Path) -> None:
    """Raise ModelError for an archive that is damaged, or whose loading could run code of its own."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if trouble := next(_in_directory(entries), None) or next(_in_entries(path, entries), None):
            raise ModelError(f"{path}: {trouble}, which can run code when it is loaded; {REMEDY}")
    except DAMAGED as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise ModelError(f"{path}: a damaged exported program ({what}); export it again") from None


def _in_directory(entries: list[zipfile.ZipInfo]) -> Iterator[str]:
    """What the names and sizes of the entries give away."""
    if any(entry.filename == "serialized_exported_program.json" for entry in entries):
        yield "it is of the kind that PyTorch 2.7 and older wrote, which is unpickled"
    for entry in entries:
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            yield f"its entry {name!r} reaches outside the archive"
        if entry.file_size > RATIO * max(entry.compress_size, 1 << 16):
            yield f"its entry {name!r} unpacks to {entry.file_size:,} bytes"
        inner = name.partition("/")[2]
        if CODE.fullmatch(inner):
            yield f"it holds compiled or Python code ({name!r})"
        if not any(kind.fullmatch(inner) for kind in (PROGRAM, PAYLOAD, INPUTS, PLAIN)):
            yield f"it holds a pickled object, or something else that isn't known to be plain ({name!r})"
    if len({entry.filename.partition("/")[0] for entry in entries}) != 1:
        yield "its entries have several roots"


def _in_entries(path: Path, entries: list[zipfile.ZipInfo]) -> Iterator[str]:
    """What is in the entries, as PyTorch's own reader sees them: another reader may see another archive in the same file."""
    reader = torch._C.PyTorchFileReader(str(path))
    names = reader.get_all_records()
    stated = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
    sizes = getattr(reader, "get_record_size", stated.__getitem__)  # before PyTorch 2.11 the reader doesn't tell them
    if Counter(name.lower() for name in names) != Counter(entry.filename.partition("/")[2].lower() for entry in entries):
        yield "its table of contents can be read in two ways"
    if max(Counter(name.lower() for name in names).values()) > 1:
        yield "it holds several entries of one name"
    for name in names:
        if PROGRAM.fullmatch(name) or PAYLOAD.fullmatch(name):
            if sizes(name) > LARGEST_JSON:
                yield f"its entry {name!r} is too large to be looked at"
            found = json.loads(reader.get_record(name).decode("utf-8"))
            yield from (program_troubles if PROGRAM.fullmatch(name) else payload_troubles)(found)
        elif INPUTS.fullmatch(name) and (data := reader.get_record(name)):
            yield from _in_inputs(data, name)


def _in_inputs(data: bytes, name: str) -> Iterator[str]:
    """The arguments of the export. The names in them become part of the code of guards."""
    try:
        found = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # unpicklers raise what they like
        yield f"its example inputs are no plain tensors ({name!r})"
        return
    for place, _ in pytree.tree_flatten_with_path(found)[0]:
        if not all(is_plain_text(_key(step)) for step in place):
            yield f"its example inputs have names that aren't plain ({name!r})"


def _key(step: Any) -> str:
    return str(next((getattr(step, kind) for kind in ("key", "idx", "name") if hasattr(step, kind)), "'"))


# --- files -------------------------------------------------------------------------------------------------------------------------------


PACKAGES = {"quantized_decomposed": "torch.ao.quantization.fx._decomposed", "torchao": "torchao", "torchvision": "torchvision"}
NEEDS_ARCH = "weights without a network; say what builds it, with --arch package.module:factory or --arch FILE.py:FACTORY"


def load(
    path: str | Path,
    kind: str,
    *,
    arch: Arch | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    ignore_keys: Sequence[str] = (),
    say: Say = lambda text: None,
) -> nn.Module | ExportedProgram:
    """The model in a file. kind: what `kinds.kind_of` found; ignore_keys: see `api.load`; say: told of what was found where.

    Raises ModelError where the file can't be read, is unsafe, or doesn't fit its architecture; UsageError where that is missing or fails;
    UnsupportedError for TorchScript.
    """
    path = Path(path)
    if kind == "torchscript":
        raise UnsupportedError(
            f"{path}: a TorchScript archive, whose network can't be changed; give the checkpoint with --arch, or export the module to ONNX "
            f"or with torch.export"
        )
    if kind == "timm":
        return from_timm(str(path).removeprefix("timm:"), arch_args)
    if kind == "pt2":
        program = _program(path, trust_pickle)
        attach(program, text_in_archive(path))
        return program
    if kind in ("safetensors", "shards"):
        if arch is None:
            raise UsageError(f"{path}: {NEEDS_ARCH}")
        network = build(arch, arch_args)
        state, metadata = state_in(path, kind, say)
        surgery, certificate = surgery_of(metadata), metadata.get(KEY)
    else:
        found = unpickled(path, trust_pickle)
        if isinstance(found, Mapping):
            found = next((found[key] for key in ("ema", "model", "net", "network") if isinstance(found.get(key), nn.Module)), found)
        if isinstance(found, nn.Module):
            if arch is not None:
                say(f"{path}: a whole module, so --arch isn't used")
            return found.eval()
        if isinstance(found, ExportedProgram):
            raise ModelError(f"{path}: a pickled exported program; write it with torch.export.save")
        state, surgery = state_of(found, str(path), say)
        if arch is None:
            raise UsageError(f"{path}: {NEEDS_ARCH}")
        network, certificate = build(arch, arch_args), text_beside(found)
    module = put(state, network, surgery, str(path), say, ignore_keys).eval()
    attach(module, certificate)  # a factory may give a network that has another
    return module


def _program(path: Path, trust_pickle: bool) -> ExportedProgram:
    if not trust_pickle:
        check_archive(path)
    _register_operators(path)
    try:
        with quiet():
            return torch.export.load(path)
    except Exception as error:  # loading raises whatever the parts of an archive raise
        raise ModelError(
            f"{path}: torch {torch.__version__} can't load this exported program: {one_line(error)}; export it again with this version"
        ) from error


def _register_operators(path: Path) -> None:
    """Import the packages whose operators a program calls: torch doesn't know these before."""
    try:
        with zipfile.ZipFile(path) as archive:
            texts = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    except DAMAGED_ZIP:
        return  # which the loading says better
    for namespace, package in PACKAGES.items():
        if any(f"torch.ops.{namespace}.".encode() in text for text in texts):
            try:
                with quiet():
                    import_module(package)
            except ImportError as error:
                raise ModelError(
                    f"{path}: it calls operators of {package}, which can't be imported ({one_line(error)}); install it"
                ) from None


# --- networks that are made by name ---------------------------------------------------------------------------------------------------


Arch = str | Callable[..., nn.Module]


def build(arch: Arch, args: Mapping[str, Any] | None) -> nn.Module:
    """The network in evaluation mode. arch: "package.module:factory", "FILE.py:FACTORY", or the factory itself; args: by name.

    Raises UsageError where there is no such factory, where it fails, or where it gives no module.
    """
    name = arch if isinstance(arch, str) else getattr(arch, "__qualname__", repr(arch))
    factory = _found(arch) if isinstance(arch, str) else arch
    try:
        module = factory(**dict(args or {}))
    except Exception as error:  # the user's code may raise anything
        why = "" if isinstance(error, BnfoldError) else f"it fails with {type(error).__name__}: "
        raise UsageError(f"--arch {name}: {why}{one_line(error)}; see --arch-args for its arguments") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"--arch {name}: it gives an object of type {type(module).__name__}, not a torch.nn.Module")
    return module.eval()


def _found(arch: str) -> Callable[..., nn.Module]:
    place, colon, name = arch.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"--arch {arch}: write it as package.module:factory or FILE.py:FACTORY")
    if place.endswith(".py") and not Path(place).is_file():
        raise UsageError(f"--arch {place}: no such file")
    try:
        found: Any = imported(place, "bnfold_arch")
    except ModuleNotFoundError as error:
        raise UsageError(f"--arch {arch}: there is no module {error.name!r}; install it, or give the path of a file") from None
    except Exception as error:  # importing runs the user's code
        raise UsageError(f"--arch {arch}: importing it fails with {type(error).__name__}: {one_line(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"--arch {arch}: {place} has no {name!r}{meant(part, vars(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"--arch {arch}: {name!r} is of type {type(found).__name__}, which can't be called")
    factory: Callable[..., nn.Module] = found
    return factory


def from_timm(name: str, args: Mapping[str, Any] | None) -> nn.Module:
    """The network in evaluation mode, with its pretrained weights. args: of `timm.create_model`, such as {"pretrained": false}."""
    try:
        import timm
    except Exception as error:  # whatever its own imports raise
        why = f"it can't be imported ({first_line(error)}); install releases of torch, torchvision and timm that fit"
        why = "pip install timm" if isinstance(error, ImportError) else why
        raise UnsupportedError(f"timm:{name}: that needs timm: {why}") from None
    base = name.rpartition("/")[2].partition(".")[0]
    if not timm.is_model(base):
        raise UsageError(f"timm:{name}: timm has no such model{meant(base, timm.list_models())}")
    try:
        made: nn.Module = timm.create_model(name, **({"pretrained": True} | dict(args or {})))
    except Exception as error:  # fetching raises whatever carries the requests, and a constructor what it likes
        raise ModelError(
            f"timm:{name}: can't be made ({type(error).__name__}: {first_line(error)}); its weights need a network, unless with "
            """--arch-args '{"pretrained": false}'"""
        ) from None
    return made.eval()
