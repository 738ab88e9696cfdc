"""Networks that no package has: where BatchNorm stands beside other things than two-dimensional convolutions."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """Ronneberger, Fischer & Brox 2015, with BatchNorm and transposed convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def twice(a: int, b: int) -> nn.Module:
            layers = [(nn.Conv2d(i, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)) for i in (a, b)]
            return nn.Sequential(*(layer for each in layers for layer in each))

        self.down = nn.ModuleList([twice(3, width), twice(width, 2 * width), twice(2 * width, 4 * width)])
        ups = [(4 * width, 2 * width), (2 * width, width)]
        self.up = nn.ModuleList([nn.Sequential(nn.ConvTranspose2d(a, b, 2, 2), nn.BatchNorm2d(b)) for a, b in ups])
        self.merge = nn.ModuleList([twice(a, b) for a, b in ups])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x)
            if i < 2:
                skips.append(x)
                x = nn.functional.max_pool2d(x, 2)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


def unet() -> nn.Module:
    return UNet()


def tabular() -> nn.Module:
    """Ioffe & Szegedy 2015 before and behind linear layers."""
    return nn.Sequential(
        nn.BatchNorm1d(13),
        nn.Linear(13, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.BatchNorm1d(16),
        nn.Linear(16, 3),
    )


class Crepe(nn.Module):
    """Kim et al. 2018: Conv-ReLU-BN-pool on a waveform."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [1, 16, 8, 8]
        self.convs = nn.ModuleList([nn.Conv2d(a, b, (16, 1)) for a, b in itertools.pairwise(sizes)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(b) for b in sizes[1:]])
        self.head = nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.functional.pad(x, (0, 0, 7, 8))
            x = nn.functional.max_pool2d(norm(torch.relu(conv(x))), (2, 1))
        return torch.sigmoid(self.head(x.mean((2, 3))))


def crepe() -> nn.Module:
    return Crepe()


class Recurrent(nn.Module):
    """BatchNorm before an LSTM, as in speech models (Amodei et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 12, 5, padding=2), nn.BatchNorm1d(12)
        self.between = nn.BatchNorm1d(12)
        self.lstm = nn.LSTM(12, 10, batch_first=True, bidirectional=True)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(torch.relu(self.norm(self.conv(x))))
        return self.head(self.lstm(x.transpose(1, 2))[0])


def recurrent() -> nn.Module:
    return Recurrent()


class PointNet(nn.Module):
    """Qi et al. 2017: shared layers over points, a transform of the input, a maximum over all points."""

    def __init__(self) -> None:
        super().__init__()

        def shared(*sizes: int) -> nn.Module:
            layers = [(nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
            return nn.Sequential(*(layer for each in layers for layer in each))

        self.look = shared(3, 16, 32)
        self.turn = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 9))
        self.points = shared(3, 16, 32, 64)
        self.head = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        turn = self.turn(self.look(x).amax(2)).reshape(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
        return self.head(self.points(torch.matmul(turn, x)).amax(2))


def pointnet() -> nn.Module:
    return PointNet()
