"""The mean of several modules' weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bnfold.errors import ModelError, UnsupportedError

from ..export.copies import duplicate


def average(models: Sequence[Any], shares: Sequence[float]) -> nn.Module:
    """A copy of the first module with the mean of all their parameters and buffers, in float64; integers are the first one's.

    Raises ModelError where the others have other weights, UnsupportedError where one is no module.
    """
    if not all(isinstance(model, nn.Module) for model in models):
        raise UnsupportedError("exported programs aren't averaged, nor modules with other kinds of models: give the checkpoints")
    states = [model.state_dict() for model in models]
    for state in states[1:]:
        if odd := next((name for name in states[0].keys() ^ state.keys()), None):
            raise ModelError(f"the models are of different networks: one of them has no weight {odd}")
        if odd := next((name for name, tensor in states[0].items() if tensor.shape != state[name].shape), None):
            raise ModelError(f"the models are of different networks: {odd} has another shape in one of them")
    made = duplicate(models[0])
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if tensor.is_floating_point():
                mean = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
                tensor.copy_(mean)
    return made
