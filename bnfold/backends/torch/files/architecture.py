"""Networks that are made by name: by a function of the user's, for a checkpoint's weights, or by timm."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bnfold.data.functions import importable, module_of
from bnfold.errors import BnfoldError, ModelError, UnsupportedError, UsageError
from bnfold.text import first_line, meant, one_line

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
    try:
        if place.endswith(".py") and not Path(place).is_file():
            raise UsageError(f"--arch {place}: no such file")
        if place.endswith(".py"):
            found: Any = module_of(Path(place), "bnfold_arch")
        else:
            with importable(Path.cwd()):
                found = importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise UsageError(f"--arch {arch}: there is no module {error.name!r}; install it, or give the path of a file") from None
    except UsageError:
        raise
    except Exception as error:  # importing runs the user's code
        raise UsageError(f"--arch {arch}: importing it fails with {type(error).__name__}: {one_line(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"--arch {arch}: {place} has no {name!r}{meant(part, vars(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"--arch {arch}: {name!r} is of type {type(found).__name__}, which can't be called")
    return found  # type: ignore[no-any-return]


def from_timm(name: str, args: Mapping[str, Any] | None) -> nn.Module:
    """The network in evaluation mode, with its pretrained weights. args: of `timm.create_model`, such as {"pretrained": false}."""
    try:
        import timm
    except Exception as error:  # whatever its own imports raise
        why = "that needs timm: pip install timm" if isinstance(error, ImportError) else f"timm can't be imported ({first_line(error)})"
        raise UnsupportedError(f"timm:{name}: {why}") from None
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
