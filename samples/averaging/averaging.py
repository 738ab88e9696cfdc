"""Weights averaged, and BatchNorms measured afresh: two networks of different origin, and the epochs of one (SWA).

    pip install torch scikit-learn
    python samples/averaging/averaging.py

trains the network of the digits sample twice from different beginnings, brings the second one's channels into the order of the first's, and
averages both, at three widths; then it goes on training one of them, and averages what comes out of each epoch. Prints two tables, in a
minute or so.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import bnfold

sys.path.append(str(Path(__file__).resolve().parents[1] / "digits"))
from recipe import Network, accuracy, digits, epoch, trained

EPOCHS = 6
WIDTHS = (16, 32, 48)  # channels of the first block
BATCHES = (2, 32, 512)
TITLES = ("two networks", "statistics averaged", "measured afresh"), ("epochs averaged", "update_bn", "bnfold.recalibrate")
# Layers whose channels are of one order, since sums or a depthwise layer join them: what makes them, a BatchNorm that sees them all, and
# what reads them.
ORDERS = (
    (("stem", "bn", "block1.conv2", "block1.bn2"), "block1.bn2", ("block1.conv1", "block2.conv1", "block2.skip.0")),
    (("block1.conv1", "block1.bn1"), "block1.bn1", ("block1.conv2",)),
    (("block2.conv1", "block2.bn1"), "block2.bn1", ("block2.conv2",)),
    (
        (*("block2.conv2", "block2.bn2", "block2.skip.0", "block2.skip.1"), *(f"block3.{n}" for n in ("conv1", "bn1", "conv2", "bn2"))),
        "block2.bn2",
        ("block3.conv1", "head"),
    ),
)


def channels(model: nn.Module, name: str, x: Tensor) -> np.ndarray:
    """What each channel of a layer is for these images, of mean 0 and length 1: (C, N * H * W)."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *given: found.append(given[-1]))
    with torch.no_grad():
        model(x)
    handle.remove()
    rows = found[0].transpose(0, 1).flatten(1).double().numpy()
    rows = rows - rows.mean(1, keepdims=True)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12)


def aligned(model: nn.Module, other: nn.Module, x: Tensor) -> nn.Module:
    """The other model with its channels in the order in which they go best with the first one's: the same function."""
    state = {name: value.clone() for name, value in other.state_dict().items()}
    for makers, seen, readers in ORDERS:
        _, order = linear_sum_assignment(-channels(model, seen, x) @ channels(other, seen, x).T)
        for name in state:
            layer, _, kind = name.rpartition(".")
            if layer in makers and kind != "num_batches_tracked":
                state[name] = state[name][order]
            if layer in readers and kind == "weight":
                state[name] = state[name][:, order]
    result = copy.deepcopy(other)
    result.load_state_dict(state)
    return result


Rows = Iterator[tuple[str, float, float]]


def scores(models: list[nn.Module], x: Tensor, test: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The accuracy of the mean of the models, with the mean of their statistics, and with statistics measured on the images."""
    _, report = bnfold.average(models, x, labelled=[test])
    return report.accuracy_before.accuracy, report.accuracy_after.accuracy


def two_networks(widths: Sequence[int] = WIDTHS) -> Rows:
    x, y, *test = digits()
    for width in widths:
        first, second = (trained(seed, x, y, EPOCHS, partial(Network, width)) for seed in (0, 1))
        yield f"{width} channels, the first and the second alone", accuracy(first, *test), accuracy(second, *test)
        yield f"{width} channels, averaged", *scores([first, second], x, test)
        yield f"{width} channels, aligned and averaged", *scores([first, aligned(first, second, x)], x, test)


def swa() -> Rows:
    """The accuracy of the mean of some epochs' weights, with statistics of PyTorch's update_bn and of bnfold, by the size of batches."""
    x, y, *test = digits()
    model = trained(0, x, y, EPOCHS)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.003)
    mean = AveragedModel(model)
    for _ in range(EPOCHS):
        epoch(model, optimiser, x, y)
        mean.update_parameters(model)
    yield "as they are: of the last epoch alone; of the mean, unmeasured", accuracy(model, *test), accuracy(mean.module, *test)
    for batch in BATCHES:
        update_bn(x.split(batch), mean)
        fresh, _ = bnfold.recalibrate(mean.module, x, batch_size=batch)
        yield f"batches of {batch}", accuracy(mean, *test), accuracy(fresh, *test)


def table(titles: Sequence[str], rows: Rows) -> str:
    lines = (f"| {name} | {one:.1%} | {other:.1%} |" for name, one, other in rows)
    return "\n".join([f"| {' | '.join(titles)} |", "|---|--:|--:|", *lines])


if __name__ == "__main__":
    print(table(TITLES[0], two_networks()), end="\n\n")
    print(table(TITLES[1], swa()))
