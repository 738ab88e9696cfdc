"""A callback for Lightning that measures the BatchNorms afresh when training ends.

    pip install pytorch-lightning torch scikit-learn
    python samples/callbacks/lightning_callback.py

trains the network of the digits sample for an epoch with its poor momentum, and prints the accuracy before and after. With the package
`lightning`, import `lightning.pytorch`. Takes ten seconds or so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnfold

sys.path.append(str(Path(__file__).resolve().parents[1] / "digits"))
from recipe import accuracy
from train import Network, digits


class Recalibrate(pl.Callback):
    """At the end of training, statistics of the training data go into the module, before it is tested or saved by hand.

    network: the name of the attribute that holds the network, which the first item of each batch goes into. samples: how many are measured
    on, by default all. calibration: further arguments of `bnfold.recalibrate`. `report` is what it says.
    """

    def __init__(self, network: str = "network", samples: int | None = None, **calibration: Any) -> None:
        self.network, self.samples, self.calibration = network, samples, calibration
        self.report: bnfold.RecalibrateReport | None = None

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        network = module.get_submodule(self.network)
        was = network.training
        batches = (batch[0] for batch in trainer.train_dataloader)
        fresh, self.report = bnfold.recalibrate(network.eval(), batches, samples=self.samples, **self.calibration)
        network.load_state_dict(fresh.state_dict())
        network.train(was)


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main() -> list[float]:
    """The accuracy without the callback, and with it."""
    x, y, *test = digits()
    found = []
    for callbacks in ([], [Recalibrate(samples=512)]):
        pl.seed_everything(2, verbose=False)
        module = Digits()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet)
        trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, drop_last=True))
        found.append(accuracy(module.network, *test))
    return found


if __name__ == "__main__":
    print("accuracy without the callback {:.1%}, with it {:.1%}".format(*main()))
