"""Read a PyTorch model: a checkpoint with its architecture, a network of timm's, a pickled module, or an exported program.

Nothing is unpickled unasked.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from bnfold.backends.metadata import KEY, attach, text_beside, text_in_archive
from bnfold.capture import quiet, without_warnings
from bnfold.data.open import imported
from bnfold.errors import BnfoldError, ModelError, UnsupportedError, UsageError
from bnfold.files import DAMAGED_ZIP, neighbours
from bnfold.text import first_line, meant, one_line

from .archive import check_archive
from .checkpoint import Say, put, state_in, state_of, surgery_of, unpickled

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
        if arch is not None:
            say(f"{path}: an exported program holds its network, so --arch isn't used")
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
        raise UsageError(f"--arch {place}: no such file{neighbours(place)}")
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
        with without_warnings():
            made: nn.Module = timm.create_model(name, **({"pretrained": True} | dict(args or {})))
    except Exception as error:  # fetching raises whatever carries the requests, and a constructor what it likes
        raise ModelError(
            f"timm:{name}: can't be made ({type(error).__name__}: {first_line(error)}); its weights need a network, unless with "
            """--arch-args '{"pretrained": false}'"""
        ) from None
    return made.eval()
