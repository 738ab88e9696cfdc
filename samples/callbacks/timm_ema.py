"""A recipe for timm: an average of the weights over training (EMA), whose BatchNorms are measured afresh before it is folded.

    pip install timm torch scikit-learn
    python samples/callbacks/timm_ema.py

trains timm's smallest ResNet on the digits for two epochs, and prints the accuracy of the model, of the average as timm leaves it, and of
the average recalibrated and folded. Takes half a minute or so.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import bnfold

sys.path.append(str(Path(__file__).resolve().parents[1] / "digits"))
from recipe import accuracy, digits

STEPS, BATCH, DECAY = 120, 16, 0.98


def main() -> list[float]:
    """The accuracy as trained; averaged; averaged and recalibrated; and folded."""
    torch.manual_seed(0)
    x, y, *test = digits()
    model = timm.create_model("resnet10t", in_chans=1, num_classes=10)
    ema = ModelEmaV3(model, decay=DECAY)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.002)
    model.train()
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()
        ema.update(model)
    fresh, _ = bnfold.recalibrate(ema.module.eval(), x)
    folded, report = bnfold.fuse(fresh, example=x[:2])
    print(report)
    return [accuracy(each, *test) for each in (model, ema.module, fresh, folded)]


if __name__ == "__main__":
    print("accuracy as trained {:.1%}, averaged {:.1%}, recalibrated {:.1%}, folded {:.1%}".format(*main()))
