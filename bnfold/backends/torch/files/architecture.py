"""The network that a checkpoint's weights belong to: a function that the user names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bnfold.data.functions import importable, module_of
from bnfold.errors import BnfoldError, UsageError
from bnfold.text import meant, one_line

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
