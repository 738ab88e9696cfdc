"""Train the sample model: a small residual network with BatchNorm on scikit-learn's handwritten digits.

    pip install torch onnx scikit-learn
    python samples/digits/train.py [FOLDER] [--seed N]

writes `digits.onnx`, `calibration.npz` and `test.npz` into FOLDER (this one by default), in about ten seconds.

The batches are small (4 images) and the momentum is 0.9. TensorFlow writes the share of the *old* statistics where
PyTorch writes that of the *new* batch, so a recipe's 0.9, carried over as it stands, leaves in each BatchNorm the mean
and variance of hardly more than the last four images. Nothing is changed after training: this is what comes out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SEED = 2
BATCH = 4
MOMENTUM = 0.9  # the share of the newest batch in the running statistics
EPOCHS = 3
LEARNING_RATE = 0.01
CALIBRATION = 512  # training images that are written, of 1,257


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=MOMENTUM)


class Block(nn.Module):
    """The basic block of He et al. 2016: two 3x3 convolutions and a skip, which is projected where the shape changes.

    groups: of the second convolution; as many as channels make it depthwise.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, groups=groups, bias=False)
        self.bn2 = norm(c_out)
        self.skip = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.skip = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), norm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.skip(x))


class Network(nn.Module):
    """Images (N, 1, 8, 8) in [0, 1] to logits (N, 10)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = norm(width)
        self.block1 = Block(width, width)
        self.block2 = Block(width, 2 * width, stride=2)
        self.block3 = Block(2 * width, 2 * width, groups=2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.head(x.mean((2, 3)))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels: 70 % and 30 %, each class in proportion."""
    data = load_digits()
    images = (data.images / 16).astype(np.float32)[:, None]
    parts = train_test_split(images, data.target, test_size=0.3, stratify=data.target, random_state=0)
    x, x_test, y, y_test = map(torch.from_numpy, parts)
    return x, y, x_test, y_test


def train(model: Network, x: Tensor, y: Tensor) -> None:
    """Adam at a constant learning rate; a last batch that isn't full is left out."""
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            if len(batch) < BATCH:
                continue
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()


def export(model: Network, path: Path) -> None:
    """One ONNX file with its BatchNorms, which both exporters fold by default.

    `training=PRESERVE` on a model in evaluation mode leaves them alone, and gives a graph without further ado. The newer
    exporter keeps them with `optimize=False`, but then every convolution's missing bias becomes five nodes.
    """
    torch.onnx.export(
        model,
        (torch.zeros(1, 1, 8, 8),),
        path,
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        opset_version=17,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )


def main(folder: Path, seed: int = SEED) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # so that sums are always added in the same order
    x, y, x_test, y_test = digits()
    model = Network()
    train(model, x, y)
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(f"accuracy on {len(x_test)} test images: {accuracy:.1%}")
    folder.mkdir(parents=True, exist_ok=True)
    export(model, folder / "digits.onnx")
    np.savez_compressed(folder / "calibration.npz", image=x[:CALIBRATION].numpy())
    np.savez_compressed(folder / "test.npz", image=x_test.numpy(), labels=y_test.numpy())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train and export the sample model.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.seed)
