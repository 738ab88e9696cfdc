"""What other samples share: the digits, and their network trained by a usual recipe (batches of 32, BatchNorms with a momentum of 0.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from train import Network, digits

__all__ = ["Network", "accuracy", "digits", "epoch", "trained"]
BATCH, LEARNING_RATE = 32, 0.003


def epoch(model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One pass over the images in random order; a last batch that isn't full is left out."""
    model.train()
    for batch in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()


def trained(seed: int, x: Tensor, y: Tensor, epochs: int = 12, make: Callable[[], nn.Module] = Network) -> nn.Module:
    """A network in evaluation mode, of the digits sample unless another is given: Adam, its rate falling along a cosine."""
    torch.manual_seed(seed)
    model = make()
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.momentum = 0.1
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        epoch(model, optimiser, x, y)
        schedule.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that are told right, in evaluation mode."""
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())
