"""Networks that timm makes, by their names there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bnfold.errors import ModelError, UnsupportedError, UsageError
from bnfold.text import first_line, meant


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
