"""Folding of PyTorch models: the user's module keeps its class and its names, and a program its interface; both routes fold alike."""

from __future__ import annotations

import copy
import functools
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import Net, difference, folded, kept, lively, norm, run, weight
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from vision import package

import bnfold
from bnfold.backends.torch.export.sizes import Sizes
from bnfold.backends.torch.export.trace import trace
from bnfold.backends.torch.writing.surgery import ATTRIBUTE, Surgery, rebuild

IMAGE = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def siamese() -> nn.Module:
    return Net(lambda s, x: s.b(s.c(x)).relu() + s.d(s.c(2 * x)).relu(), c=nn.Conv2d(3, 4, 3), b=norm(4), d=norm(4))


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), norm(4, 1), nn.ReLU(), nn.Linear(4, 4), norm(4, 1))
    net[3].weight = net[0].weight
    return net


def two_names() -> nn.Module:
    net = Net(lambda s, x: s.c(s.other(x)).relu() + s.b(s.a(x + 1)), a=nn.Conv2d(3, 3, 1), b=norm(3), c=norm(3))
    net.other = net.a
    return net


class Masked(nn.Conv2d):
    """Its weight is computed from what is stored, in a way that can be undone."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("mask", (torch.arange(self.weight.numel()) % 3 > 0).reshape(self.weight.shape).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.weight * self.mask).to(x.dtype), self.bias, self.stride, self.padding)


class Checked(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            raise ValueError("empty")
        return super().forward(x)


class Unread(nn.Conv2d):
    """A bias given to it would do something else."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight)
        return y if self.bias is None else y + 2 * self.bias.view(-1, 1, 1)


class Shift(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.k = weight(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.k


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def pruned(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        prune.l1_unstructured(layer, name, 0.5)
    return layer


def parametrized(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        parametrize.register_parametrization(layer, name, Doubled())
    return layer


# name: (network, its input, BatchNorms that stay in the module, and in the program)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, int, int]] = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)), IMAGE, 0, 0),
    "no bias": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm(4)), IMAGE, 0, 0),
    "no affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, affine=False)), IMAGE, 0, 0),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding="same"), norm(6)), IMAGE, 0, 0),
    "before it": (lambda: nn.Sequential(norm(3), nn.Conv2d(3, 4, 3)), IMAGE, 0, 0),
    "before padding": (lambda: nn.Sequential(norm(3), nn.Conv2d(3, 4, 3, padding=1)), IMAGE, 1, 1),
    "circular padding": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), norm(4)), IMAGE, 0, 0),
    "before circular padding": (lambda: nn.Sequential(norm(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), IMAGE, 0, 0),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3, groups=3, stride=2, output_padding=1), norm(6)), IMAGE, 0, 0),
    "transposed, as many in as out": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 3, 2), norm(3)), IMAGE, 0, 0),
    "two in a row": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), norm(4)), IMAGE, 0, 0),
    "called twice": (lambda: Net(lambda s, x: s.b(s.c(x)).relu() + s.b(s.c(2 * x)).relu(), c=nn.Conv2d(3, 4, 3), b=norm(4)), IMAGE, 0, 0),
    "one convolution, two norms": (siamese, IMAGE, 2, 0),
    "tied weights": (tied, torch.randn(3, 4), 0, 0),
    "a module of two names": (two_names, IMAGE, 0, 0),
    "a weight that is also read": (
        lambda: Net(lambda s, x: s.b(s.a(x)) + s.a.weight.sum(), a=nn.Conv2d(3, 3, 1), b=norm(3)),
        IMAGE,
        1,
        0,
    ),
    "a linear layer in between": (
        lambda: nn.Sequential(norm(5, 1), nn.Linear(5, 6), norm(6, 1), nn.ReLU(), nn.Dropout(), nn.Linear(6, 4, bias=False), norm(4, 1)),
        torch.randn(4, 5),
        0,
        0,
    ),
    "rows of a linear layer": (lambda: nn.Sequential(nn.Linear(4, 4), norm(4, 1)), torch.randn(2, 4, 4), 1, 1),
    "columns of a linear layer": (
        lambda: Net(lambda s, x: s.b(s.l(x).transpose(1, 2)).transpose(1, 2), l=nn.Linear(4, 4), b=norm(4, 1)),
        torch.randn(2, 4, 4),
        0,
        0,
    ),
    "a product without a bias": (lambda: Net(lambda s, x: s.b(x @ s.w), w=weight(4, 5), b=norm(5, 1)), torch.randn(2, 4), 1, 0),
    "addmm": (
        lambda: Net(lambda s, x: s.b(torch.addmm(s.k, x, s.w, beta=2, alpha=0.5)), w=weight(4, 5), k=weight(5), b=norm(5, 1)),
        torch.randn(2, 4),
        0,
        0,
    ),
    "einsum": (lambda: Net(lambda s, x: s.b(torch.einsum("nk,ko->no", x, s.w)), w=weight(4, 5), b=norm(5, 1)), torch.randn(2, 4), 1, 0),
    "a functional convolution": (
        lambda: Net(lambda s, x: s.b(F.conv2d(x, s.w, s.k)), w=weight(4, 3, 3, 3), k=weight(4), b=norm(4)),
        IMAGE,
        0,
        0,
    ),
    "a functional convolution without a bias": (
        lambda: Net(lambda s, x: s.b(F.conv2d(x, s.w)), w=weight(4, 3, 3, 3), b=norm(4)),
        IMAGE,
        1,
        0,
    ),
    "recurrent": (
        lambda: Net(lambda s, x: s.l(s.b(x).transpose(1, 2))[0], b=norm(5, 1), l=nn.LSTM(5, 3, 2, batch_first=True, bidirectional=True)),
        torch.randn(2, 5, 6),
        0,
        0,
    ),
    "recurrent without a bias": (
        lambda: Net(lambda s, x: s.l(s.b(x).transpose(1, 2))[0], b=norm(5, 1), l=nn.GRU(5, 3, bias=False)),
        torch.randn(2, 5, 6),
        1,
        1,
    ),
    "embedding": (
        lambda: Net(lambda s, x: s.b(s.e(x).transpose(1, 2)), b=norm(4, 1), e=nn.Embedding(9, 4)),
        torch.randint(0, 9, (2, 5)),
        0,
        0,
    ),
    "concatenated": (
        lambda: Net(lambda s, x: s.b(torch.cat([s.c(x), s.d(x)], 1)), c=nn.Conv2d(3, 4, 3), d=nn.Conv2d(3, 2, 3), b=norm(6)),
        IMAGE,
        0,
        0,
    ),
    "shuffled": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ChannelShuffle(2), norm(8), nn.PixelShuffle(2), norm(2)), IMAGE, 0, 0),
    "split, and written in place": (
        lambda: Net(lambda s, x: torch.cat([s.b(y).relu_() for y in s.c(x).chunk(2, 1)], 1), c=nn.Conv2d(3, 4, 3), b=norm(2)),
        IMAGE,
        0,
        0,
    ),
    "through a head": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), norm(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        IMAGE,
        0,
        0,
    ),
    "a scale of a layer": (
        lambda: Net(lambda s, x: s.b(s.c(x) * s.g.view(1, -1, 1, 1)), c=nn.Conv2d(3, 4, 3), b=norm(4), g=weight(4)),
        IMAGE,
        0,
        0,
    ),
    "upsampled": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear"), norm(4)), IMAGE, 0, 0),
    "another normalisation": (lambda: nn.Sequential(nn.GroupNorm(1, 3), norm(3), nn.InstanceNorm2d(3, affine=True), norm(3)), IMAGE, 0, 0),
    "a gate": (
        lambda: Net(lambda s, x: s.b(s.c(x) * torch.sigmoid(s.c(x).mean((2, 3), keepdim=True))), c=nn.Conv2d(3, 4, 3), b=norm(4)),
        IMAGE,
        1,
        1,
    ),
    "parallel branches": (
        lambda: Net(lambda s, x: s.a(s.c(x)) + s.b(x), a=norm(3), b=norm(3), c=nn.Conv2d(3, 3, 3, padding=1, bias=False)),
        IMAGE,
        0,
        0,
    ),
    "parallel branches, summed in place": (
        lambda: Net(lambda s, x: s.b(x).add_(s.a(s.c(x))), a=norm(3), b=norm(3), c=nn.Conv2d(3, 3, 3, padding=1, bias=False)),
        IMAGE,
        0,
        0,
    ),
    "parallel branches, called in the forward": (
        lambda: Net(
            lambda s, x: F.batch_norm(s.c(x), s.m, s.v) + F.batch_norm(s.d(x), s.m, s.v),
            c=nn.Conv2d(3, 4, 3),
            d=nn.Conv2d(3, 4, 3),
            m=torch.randn(4),
            v=torch.rand(4) + 0.5,
        ),
        IMAGE,
        0,
        0,
    ),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), norm(4)), IMAGE, 0, 0),
    "weight_norm by a hook": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), norm(4, 1)), torch.randn(5, 3), 0, 0),
    "spectral_norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), norm(4)), IMAGE, 0, 0),
    "a subclass that calls its base": (lambda: nn.Sequential(Checked(3, 4, 3, bias=False), norm(4)), IMAGE, 0, 0),
    "a subclass whose bias does something else": (lambda: nn.Sequential(Unread(3, 4, 3, bias=False), norm(4)), IMAGE, 1, 0),
    "a convolution of one's own, without a bias": (
        lambda: nn.Sequential(Net(lambda s, x: F.conv2d(x, s.weight, s.bias).clone(), weight=weight(4, 3, 3, 3), bias=None), norm(4)),
        IMAGE,
        0,
        0,
    ),
    "pruned": (lambda: nn.Sequential(pruned(nn.Conv2d(3, 4, 3), "weight", "bias"), norm(4)), IMAGE, 0, 0),
    "pruned, without a bias": (lambda: nn.Sequential(pruned(nn.Conv2d(3, 4, 3, bias=False), "weight"), norm(4)), IMAGE, 0, 0),
    "parametrized, weight and bias": (lambda: nn.Sequential(parametrized(nn.Conv2d(3, 4, 3), "weight", "bias"), norm(4)), IMAGE, 0, 0),
    "parametrized, and the weight read elsewhere": (
        lambda: Net(lambda s, x: s.b(s.c(x)) + F.conv2d(x, s.c.weight), c=parametrized(nn.Conv2d(3, 4, 3), "weight"), b=norm(4)),
        IMAGE,
        1,
        0,
    ),
    "masked": (lambda: nn.Sequential(Masked(3, 4, 3), norm(4)), IMAGE, 0, 0),
    "masked, without a bias": (lambda: nn.Sequential(Masked(3, 4, 3, bias=False), norm(4)), IMAGE, 0, 0),
    "scaled and turned": (
        lambda: Net(lambda s, x: s.b(F.linear(x, (s.w * 0.3).t().contiguous(), s.k / 7)), w=weight(5, 4), k=weight(4), b=norm(4, 1)),
        torch.randn(3, 5),
        0,
        0,
    ),
    "scaled by what it is itself": (
        lambda: Net(lambda s, x: s.b(F.conv2d(x, s.w * s.w.norm(), s.k)), w=weight(4, 3, 1, 1), k=weight(4), b=norm(4)),
        IMAGE,
        1,
        0,
    ),
    "a scale that a weight is computed from too": (
        lambda: Net(
            lambda s, x: s.b(x * s.g + s.k).sigmoid() + F.conv2d(x, s.w * s.g),
            w=weight(3, 3, 1, 1),
            g=weight(3, 1, 1),
            k=weight(3, 1, 1),
            b=norm(3),
        ),
        IMAGE,
        1,
        1,
    ),
    "one call of a convolution shifted": (
        lambda: Net(
            lambda s, x: s.b(s.d(s.k(s.c(x)).tanh())) + s.c(x + 1),
            c=nn.Conv2d(3, 4, 3, bias=False),
            k=Shift(4),
            d=nn.Conv2d(4, 4, 1),
            b=norm(4),
        ),
        IMAGE,
        0,
        0,
    ),
    "a weight that is an output": (lambda: Net(lambda s, x: (s.b(s.c(x)), s.c.weight), c=nn.Conv2d(3, 4, 3), b=norm(4)), IMAGE, 1, 0),
    "a part of the batch each": (
        lambda: Net(
            lambda s, x: torch.cat([s.b(z) for y in s.c(x).chunk(3) for z in y.hsplit(1)]).sigmoid(), c=nn.Conv2d(3, 4, 3), b=norm(4)
        ),
        torch.randn(7, 3, 5, 5),
        0,
        0,
    ),
    "a part of the batch, the rest as it is": (
        lambda: Net(lambda s, x: torch.cat([s.b(y) if i else y for i, y in enumerate(s.c(x).chunk(3))]), c=nn.Conv2d(3, 4, 3), b=norm(4)),
        torch.randn(7, 3, 5, 5),
        2,
        2,
    ),
    "the rows of a computed half": (
        lambda: Net(lambda s, x: s.b(s.c(x).tensor_split([x.shape[0] // 2])[1]).sigmoid(), c=nn.Conv2d(3, 4, 3), b=norm(4)),
        torch.randn(8, 3, 5, 5),
        0,
        0,
    ),
    "the middle row of each": (
        lambda: Net(lambda s, x: s.b(s.c(x).select(2, x.shape[2] // 2)).sigmoid(), c=nn.Conv2d(3, 4, 3), b=norm(4, 1)),
        IMAGE,
        0,
        0,
    ),
    "a head that fixes the size": (
        lambda: nn.Sequential(nn.PReLU(3), norm(3), nn.Dropout(), nn.Flatten(), nn.Linear(3 * 48, 5)),
        torch.randn(2, 3, 6, 8),
        0,
        0,
    ),
    "rows in an order that the data decide": (
        lambda: Net(lambda s, x: s.b(s.c(x)[x.sum((1, 2, 3)).argsort()]).sigmoid(), c=nn.Conv2d(3, 4, 3), b=norm(4)),
        IMAGE,
        0,
        0,
    ),
    "channels in a constant order": (
        lambda: Net(
            lambda s, x: s.b(torch.take_along_dim(s.c(x)[:, s.p], s.p.view(1, -1, 1, 1), 1).index_select(1, s.p)).sigmoid(),
            c=nn.Conv2d(3, 4, 3),
            b=norm(4),
            p=torch.tensor([2, 0, 3, 1]),
        ),
        IMAGE,
        0,
        0,
    ),
    "pixels of two constant arrays": (
        lambda: Net(
            lambda s, x: s.b(s.c(x)[:, :, s.p[:, None], s.p]).sigmoid(), c=nn.Conv2d(3, 4, 3), b=norm(4), p=torch.tensor([2, 0, 3, 1])
        ),
        IMAGE,
        0,
        0,
    ),
    "channels in an order that the data decide": (
        lambda: Net(lambda s, x: s.b(s.c(x)[:, x[0, :, 0, 0].argsort()]).sigmoid(), c=nn.Conv2d(3, 3, 3), b=norm(3)),
        IMAGE,
        1,
        1,
    ),
    "the network is a norm": (lambda: norm(3), IMAGE, 1, 1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_routes_fold_alike(name: str) -> None:
    make, example, in_module, in_program = CASES[name]
    (copied, report), (_, other) = folded(make().eval(), example)
    assert (report.batchnorms.after, other.batchnorms.after) == (in_module, in_program)
    assert len(kept(report)) == 0 or in_module
    left = [m for m in copied.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(left) == len(kept(report))


def test_a_norm_at_several_places_goes_from_all_of_them() -> None:
    shared = norm(4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), shared), nn.ReLU()).eval()
    (fused, report), _ = folded(net, IMAGE)
    (layer,) = report.layers
    assert (layer.name, layer.verdict, layer.into) == ("1", "folded", ("0", "3.0"))
    assert [layer.name for layer in bnfold.recalibrate(net, [IMAGE])[1].layers] == ["1"]
    assert [type(fused.get_submodule(path)) for path in ("1", "3.1")] == [nn.Identity, nn.Identity]
    assert sorted(fused.state_dict()) == ["0.bias", "0.weight", "3.0.bias", "3.0.weight"]
    again = rebuild(net, Surgery.from_dict(getattr(fused, ATTRIBUTE).to_dict()))
    again.load_state_dict(fused.state_dict())

    shared = norm(3)  # all of its calls fold, or none
    (fused, report), _ = folded(nn.Sequential(shared, nn.Sigmoid(), nn.Conv2d(3, 3, 3), shared).eval(), IMAGE)
    assert list(kept(report).values()) == [report.layers[0].reason]
    assert fused[0] is fused[3]
    assert isinstance(fused[0], nn.BatchNorm2d)

    shared, filters = norm(4), (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))  # one call into the layer before it, one into that behind it
    (fused, report), _ = folded(nn.Sequential(filters[0], shared, nn.Sigmoid(), shared, filters[1]).eval(), IMAGE)
    assert [(layer.name, layer.verdict, layer.into) for layer in report.layers] == [("1", "folded", ("0", "4"))]


def test_statistics_that_two_norms_share_make_no_layer_of_them() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 1), norm(4)).eval()
    net[4].running_mean, net[4].running_var = net[1].running_mean, net[1].running_var
    (_, report), _ = folded(net, IMAGE, double=False)  # a conversion would part them
    assert [(layer.name, layer.into) for layer in report.layers] == [("1", ("0",)), ("4", ("3",))]


def test_a_batch_in_parts_folds_for_every_number_of_parts() -> None:
    class Ghost(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.bn, self.size = norm(4, 1), size

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.bn(y) for y in x.chunk(-(-x.shape[0] // self.size))])

    for size in (16, 3):
        net = nn.Sequential(nn.Linear(5, 4, bias=False), Ghost(size), nn.GLU()).eval()
        fused, report = bnfold.fuse(net, example=torch.randn(8, 5))
        assert report.batchnorms.after == 0
        assert isinstance(fused[1].bn, nn.Identity)
        for rows in (1, 2, 8, 16, 31, 100):
            x = torch.randn(rows, 5)
            assert difference(run(net, x), run(fused, x)) < 1e-5


def test_a_weight_that_fixes_a_product_of_sizes_fixes_neither_of_them() -> None:
    net = nn.Sequential(nn.PReLU(3), norm(3), nn.Flatten(), nn.Linear(3 * 48, 5)).eval()
    first, second = (probe for probe in Sizes(trace(net, torch.randn(2, 3, 6, 8)).program).probes)
    batch, height, width = first
    assert second[batch] != first[batch]
    assert second[height] * second[width] == first[height] * first[width] == 48
    assert second[height] != first[height]
    fused, _ = bnfold.fuse(net, example=torch.randn(2, 3, 6, 8))
    for sizes in ((4, 12), (48, 1), (1, 48)):
        x = torch.randn(2, 3, *sizes)
        assert difference(run(net, x), run(fused, x)) < 1e-5


def test_a_norm_that_folds_goes_where_its_own_code_does_nothing_else() -> None:
    class Steps(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1)).view(x.shape)

    class Active(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(super().forward(x))

    net = Net(
        lambda s, x: s.d(s.a(s.c(x.flatten(0, 1)).unflatten(0, x.shape[:2])).flatten(0, 1).sigmoid()),
        c=nn.Conv2d(3, 4, 3),
        a=lively(Steps(4)),
        d=nn.Sequential(nn.Conv2d(4, 4, 1), lively(Active(4))),
    )
    (fused, report), _ = folded(net.eval(), torch.randn(2, 3, 3, 6, 7))
    assert report.batchnorms.after == 0
    assert isinstance(fused.a, nn.Identity)
    assert report.layers[0].notes == ()
    assert isinstance(fused.d[1], Active)
    assert "does nothing" in report.layers[1].notes[0]


def test_the_class_the_names_and_the_modes_stay() -> None:
    class Mine(nn.Sequential):
        answer = 42

    net = Mine(nn.Conv2d(3, 4, 3, bias=False), norm(4), nn.Dropout(), nn.ReLU()).eval()
    net[0].weight.requires_grad_(False)
    fused, _ = bnfold.fuse(net, example=IMAGE, check=False)
    assert type(fused) is Mine
    assert [type(m) for m in fused] == [nn.Conv2d, nn.Identity, nn.Dropout, nn.ReLU]
    assert list(fused.state_dict()) == ["0.weight", "0.bias"]
    assert not fused[0].weight.requires_grad
    assert not any(m.training for m in fused.modules())
    assert net[0].bias is None
    assert isinstance(net[1], nn.BatchNorm2d)


@pytest.mark.parametrize(("conv", "dims", "last"), [(nn.Conv2d, 2, torch.channels_last), (nn.Conv3d, 3, torch.channels_last_3d)])
def test_the_memory_format_stays(conv: Any, dims: int, last: torch.memory_format, tmp_path: Path) -> None:
    fold = pruned(conv(4, 6, 2, bias=False), "weight")
    net = nn.Sequential(conv(2, 4, 3), norm(4, dims), nn.ReLU(), fold, norm(6, dims), nn.ReLU(), conv(6, 3, 1), norm(3, dims)).eval()
    net.to(memory_format=last)
    x = torch.randn(2, 2, *(5,) * dims).to(memory_format=last)
    net(x)
    fused, report = bnfold.fuse(net, example=x, check=False)
    assert report.batchnorms.after == 0
    program, _ = bnfold.fuse(trace(net, x).program, check=False)
    bnfold.save(fused, tmp_path / "fused.pth")
    saved = torch.load(tmp_path / "fused.pth")["state_dict"]
    for place in (0, 3, 6):
        want = net[place].weight.stride()
        assert not net[place].weight.is_contiguous() or place == 6
        assert fused[place].weight.stride() == saved[f"{place}.weight"].stride() == want
    weights = {t.shape: t.stride() for t in program.state_dict.values() if t.ndim > 2}
    assert all(weights[net[place].weight.shape] == net[place].weight.stride() for place in (0, 3, 6))


def test_a_layer_of_several_names_gets_a_copy_at_each_that_changes() -> None:
    net = two_names().eval()
    fused, report = bnfold.fuse(net, example=IMAGE)
    assert report.batchnorms.after == 0
    assert fused.a is not fused.other
    assert report.bytes_added == sum(p.nbytes for p in net.a.parameters())
    again = rebuild(net, Surgery.from_dict(getattr(fused, ATTRIBUTE).to_dict()))
    again.load_state_dict(fused.state_dict())
    assert difference(run(fused, IMAGE), run(again, IMAGE)) == 0

    alike = Net(lambda s, x: s.b(s.other(x)).relu() + s.b(s.a(x + 1)), a=nn.Conv2d(3, 3, 1), b=norm(3)).eval()
    alike.other = alike.a
    fused, report = bnfold.fuse(alike, example=IMAGE)
    assert (report.batchnorms.after, report.bytes_added) == (0, 0)
    assert fused.a is fused.other

    net = two_names().eval()
    net.__dict__["kept"] = [net.a]
    assert bnfold.fuse(net, example=IMAGE)[1].batchnorms.after == 2
    net = two_names().eval()
    both = net.run
    net.run = lambda s, x: both(s, x) + s.a.weight.sum()
    assert bnfold.fuse(net, example=IMAGE)[1].batchnorms.after == 2


def test_weights_that_change_apart_are_loaded_apart() -> None:
    x = torch.randn(3, 4)
    fused, _ = bnfold.fuse(tied().eval(), example=x)
    again = rebuild(tied().eval(), Surgery.from_dict(getattr(fused, ATTRIBUTE).to_dict()))
    again.load_state_dict(fused.state_dict())
    assert difference(run(fused, x), run(again, x)) == 0


def test_weights_that_change_alike_stay_tied() -> None:
    net = nn.Sequential(nn.Linear(4, 4), norm(4, 1), nn.ReLU(), nn.Linear(4, 4), norm(4, 1)).eval()
    net[3].weight = net[0].weight
    net[4] = net[1]
    fused, report = bnfold.fuse(net, example=torch.randn(3, 4), check=False)
    assert report.batchnorms.after == 0
    assert fused[3].weight is fused[0].weight
    assert fused[3].bias is not fused[0].bias
    assert report.bytes_added == 0


def test_hooks_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU()).eval()
    seen: list[torch.Tensor] = []
    net[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    net[2].register_forward_hook(lambda module, inputs, output: output * 2)
    fused, report = bnfold.fuse(net, example=IMAGE, check=False)
    assert report.batchnorms.after == 0
    seen.clear()
    want = run(net, IMAGE)
    got = run(fused, IMAGE)
    assert len(seen) == 2
    assert difference(want, got) < 1e-5
    assert float((seen[0] - seen[1]).abs().max()) < 1e-5


def test_a_norm_with_an_activation_keeps_it() -> None:
    layers = package("timm.layers")
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), lively(layers.BatchNormAct2d(4, act_layer=nn.SiLU)), nn.Conv2d(4, 2, 1)).eval()
    (fused, report), (_, other) = folded(net, IMAGE)
    assert (report.batchnorms.after, other.batchnorms.after) == (0, 0)
    assert isinstance(fused[1].act, nn.SiLU)


@pytest.mark.parametrize("kind", ["torchvision.ops:FrozenBatchNorm2d", "timm.layers:FrozenBatchNormAct2d"])
def test_frozen_statistics(kind: str) -> None:
    module, _, name = kind.partition(":")
    frozen = lively(getattr(package(module), name)(4))
    (_, report), (_, other) = folded(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), frozen, nn.ReLU()).eval(), IMAGE)
    assert (report.batchnorms.before, report.batchnorms.after) == (1, 0)
    assert (other.batchnorms.before, other.batchnorms.after) == (1, 0)
    assert [layer.name for layer in report.layers] == ["1"]


@pytest.mark.parametrize("name", ["StdConv2d", "ScaledStdConv2d"])
def test_a_layer_that_standardises_its_weight_becomes_a_plain_one(name: str) -> None:
    layers = package("timm.layers")
    net = nn.Sequential(getattr(layers, name)(3, 4, 3, padding=1, stride=2), norm(4)).eval()
    (fused, report), _ = folded(net, IMAGE)
    assert report.batchnorms.after == 0
    assert type(fused[0]) is nn.Conv2d
    assert fused[0].stride == (2, 2)


def test_a_call_in_the_forward_does_nothing_afterwards() -> None:
    parts = {"m": torch.randn(4), "v": torch.rand(4) + 0.5, "g": weight(4), "k": weight(4)}
    net = Net(lambda s, x: F.batch_norm(s.c(x), s.m, s.v, s.g, s.k), c=nn.Conv2d(3, 4, 3), **parts).eval()
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        fused, report = bnfold.fuse(copy.deepcopy(net).to(kind), example=IMAGE, check=False)
        assert report.batchnorms.after == 0
        assert "does nothing" in report.layers[0].notes[0]
        x = torch.randn(2, 4, 5, 5, dtype=kind)
        assert torch.equal(F.batch_norm(x, fused.m, fused.v, fused.g, fused.k), x)


def test_what_is_written_in_place_doesnt_reach_what_else_is_read() -> None:
    """Without the BatchNorm, relu_ would write into the convolution's output, which the other branch still reads."""
    net = Net(
        lambda s, x: (lambda y: s.d(s.b(y).relu_()) + y)(s.c(x)), c=nn.Conv2d(3, 4, 3), b=norm(4, positive=True), d=nn.Conv2d(4, 4, 1)
    )
    net.eval().b.bias.data.zero_()
    net.b.running_mean.zero_()
    (_, report), (_, other) = folded(net, IMAGE)
    assert (report.batchnorms.after, other.batchnorms.after) == (0, 0)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda b: b.train(), "training mode"),
        (lambda b: b.running_var.__setitem__(2, -1.0), r"running variance is negative \(-1\) in channel 2"),
        (lambda b: b.weight.data.__setitem__(1, float("nan")), "gamma is nan in channel 1"),
        (lambda b: b.running_mean.__setitem__(0, float("inf")), "running mean is inf in channel 0"),
    ],
)
def test_what_is_sick_stays(spoil: Callable[[Any], Any], reason: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)).eval()
    spoil(net[1])
    for model in (net, bnfold.backends.torch.export.trace.trace(net, IMAGE).program):
        report = bnfold.inspect(model, example=IMAGE)
        (found,) = kept(report).values()
        assert __import__("re").search(reason, found), found


def test_statistics_of_the_batch_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert "track_running_stats=False" in kept(bnfold.inspect(net, example=IMAGE))["1"]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(kind: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm(4)).eval()
    half = copy.deepcopy(net).to(kind)
    fused, _ = bnfold.fuse(half, example=IMAGE, check=False)
    exact = copy.deepcopy(half).double()
    want, _ = bnfold.fuse(exact, example=IMAGE, check=False)
    assert fused[0].weight.dtype == fused[0].bias.dtype == kind
    assert torch.equal(fused[0].weight, want[0].weight.to(kind))
    assert torch.equal(fused[0].bias, want[0].bias.to(kind))


def test_statistics_in_float32_beside_half_weights() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False).half(), norm(4)).eval()
    fused, report = bnfold.fuse(net, example=IMAGE.half(), check=False)
    assert report.batchnorms.after == 0
    assert fused[0].bias.dtype == torch.float16


def test_nested_inputs_and_outputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.b = nn.Conv2d(3, 4, 3), norm(4)

        def forward(self, batch: dict[str, Any], *, scale: float = 1.0) -> dict[str, Any]:
            return {"logits": self.b(self.c(batch["image"])) * scale, "rest": (batch["more"][0] + 1, None)}

    batch = {"image": IMAGE.double(), "more": [torch.randn(2, 2).double()]}
    (_, report), (program, _) = folded(Nested().eval(), (batch,))
    assert report.batchnorms.after == 0
    assert bnfold.backends.torch.export.trace.trace(program).names == ["output.logits", "output.rest.0"]


def test_a_program_keeps_its_interface_and_its_dynamic_axes() -> None:
    net = nn.Sequential(norm(3), nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(inplace=True)).eval()
    before = torch.export.export(net, (IMAGE,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    after, report = bnfold.fuse(before, check=False)
    assert report.batchnorms.after == 0
    assert after.call_spec.in_spec == before.call_spec.in_spec
    assert str(after.range_constraints) == str(before.range_constraints)
    assert sorted(after.state_dict) == ["1.bias", "1.weight"]
    buffer = io.BytesIO()
    torch.export.save(after, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer)
    for size in (2, 7):
        x = torch.randn(size, 3, 9, 8)
        assert difference(run(before, x), run(again, x)) < 1e-5
    assert sorted(before.state_dict) != sorted(after.state_dict)


def test_core_aten_programs_fold_too() -> None:
    net = nn.Sequential(norm(3), nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 6, 5), norm(5, 1)).double().eval()
    program = torch.export.export(net, (IMAGE.double(),)).run_decompositions()
    fused, report = bnfold.fuse(program, check=False)
    assert (report.batchnorms.before, report.batchnorms.after) == (3, 0)
    assert difference(run(net, IMAGE.double()), run(fused, IMAGE.double())) < 1e-12


def test_an_unfolded_network_takes_the_folded_ones_form() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(3, 4, 3, bias=False)),
            norm(4),
            nn.ReLU(),
            Net(lambda s, x: s.a(s.c(x)) + s.b(x), a=norm(4), b=norm(4), c=nn.Conv2d(4, 4, 3, padding=1, bias=False)),
        ).eval()

    fused, report = bnfold.fuse(make(), example=IMAGE, check=False)
    assert report.batchnorms.after == 0
    surgery = Surgery.from_dict(getattr(fused, ATTRIBUTE).to_dict())
    again = rebuild(make(), surgery)
    again.load_state_dict(fused.state_dict())
    assert difference(run(fused, IMAGE), run(again, IMAGE)) == 0


def test_a_network_that_cant_be_exported_is_refused_by_name() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), Odd()).eval()
    with pytest.raises(bnfold.UnsupportedError, match=r"torch.export can't read Sequential, in its module 2 \(Odd\): .*; give an example"):
        bnfold.fuse(net, example=IMAGE)


def test_a_cumulative_average_in_training_mode_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None))
    with pytest.raises(bnfold.UnsupportedError, match=r"module 1 \(BatchNorm2d, a cumulative average in training mode: call eval"):
        bnfold.fuse(net, example=torch.randn(2, 3, 8, 8))


def test_an_example_is_asked_for() -> None:
    with pytest.raises(
        bnfold.UsageError, match="Sequential doesn't say what it takes: give an example of its input, such as example=batch"
    ):
        bnfold.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)).eval())


def test_lazy_layers_must_have_met_a_batch() -> None:
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval()
    with pytest.raises(bnfold.UsageError, match="lazy parameters without a shape yet: call it once on a batch"):
        bnfold.fuse(net, example=IMAGE)
    net(IMAGE)
    assert bnfold.fuse(lively(net), example=IMAGE, check=False)[1].batchnorms.after == 0


def test_torchscript_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)).eval()
    script = torch.jit.script(net)
    for verb in (bnfold.inspect, bnfold.fuse):
        with pytest.raises(bnfold.UnsupportedError, match=r"RecursiveScriptModule is TorchScript, .* or export it to ONNX"):
            verb(script, example=IMAGE)
    with pytest.raises(bnfold.UnsupportedError, match=r"Sequential holds TorchScript \(0\), which can't be read: give the module"):
        bnfold.verify(nn.Sequential(script, nn.ReLU()), net, IMAGE)


def test_nothing_to_do() -> None:
    with pytest.raises(bnfold.NothingToDoError, match="the model holds no BatchNorm"):
        bnfold.fuse(nn.Conv2d(3, 4, 3), example=IMAGE)


class _Branches(nn.Module):
    """Two convolutions and their input in a sum, a BatchNorm behind it, and a ReLU in its way."""

    def __init__(self, combine: Callable[..., Tensor]) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 4, 1)
        self.three = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = lively(nn.BatchNorm2d(4))
        self.register_buffer("gate", torch.rand(4, 1, 1))
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.combine(self, x)))


@pytest.mark.parametrize(
    ("combine", "branches"),
    [
        (lambda m, x: m.one(x) - m.three(x), ("three", "one")),
        (lambda m, x: m.three(x) - m.one(x), ("three", "one")),
        (lambda m, x: m.three(x) + x, ("three", "identity")),
        (lambda m, x: x - m.three(x), ("three", "identity")),
        (lambda m, x: m.three(x) - x, ("three", "identity")),
        (lambda m, x: m.three(x) + m.one(x) + x, ("three", "one", "identity")),
        (lambda m, x: m.one(x) - (x - m.three(x)), ("three", "identity", "one")),
        (lambda m, x: m.other(x) - (x - m.three(x)), None),
        (lambda m, x: x + 0.25 * (m.three(x) - x), None),
        (lambda m, x: x + m.gate * (m.three(x) - x), None),
        (lambda m, x: (m.three(x) + x) - (m.other(x) - x), None),
    ],
)
def test_a_value_added_to_branches_stays_in_the_code_and_leaves_the_kernel(
    combine: Callable[..., Tensor], branches: tuple[str, ...] | None
) -> None:
    module = _Branches(combine).double().eval()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    fused, report = bnfold.fuse(module, example=x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), module(x), rtol=1e-12, atol=1e-12)
    if branches is not None:
        assert isinstance(fused.bn, nn.Identity)
        assert [set(m.branches) for m in report.merged] == [set(branches)]


def test_reading_a_network_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither torch.export's graph, where the data decide what is computed, nor what the model's own code prints."""

    def forward(s: Any, x: Tensor) -> Tensor:
        print("here I am")
        y = s.b(s.c(x))
        return y[y > 0] if y.sum() > 0 else y

    module = Net(forward, c=nn.Conv2d(3, 4, 3), b=norm(4)).eval()
    with pytest.raises(bnfold.UnsupportedError, match=r"torch\.export can't read Net"):
        bnfold.fuse(module, example=IMAGE)
    assert capfd.readouterr() == ("", "")


def _with_deepcopy(method: Callable[..., Any]) -> nn.Module:
    """A BatchNorm that copies itself so."""
    return lively(type("Own", (nn.BatchNorm2d,), {"__deepcopy__": method})(4))


def _raises(module: nn.Module, memo: Any) -> Any:
    raise RuntimeError("not me")


def _sharing(module: nn.Module, memo: Any) -> Any:
    made = copy.copy(module)
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    return made


def _hooked(net: nn.Module) -> Any:
    held = {}.keys()
    net.c.register_forward_hook(functools.partial(lambda held, *a: None, held))


UNCOPIED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a view of a dict": (lambda m: setattr(m, "names", {}.keys()), r"its attribute names has no deep copy \(cannot pickle 'dict_keys'"),
    "a generator, deeper": (lambda m: setattr(m.c, "steps", (i for i in ())), r"its attribute c\.steps has no deep copy"),
    "a lock in a list": (lambda m: setattr(m, "held", [threading.Lock()]), "its attribute held has no deep copy"),
    "an open file": (lambda m: setattr(m, "log", open(os.devnull)), "its attribute log has no deep copy"),  # noqa: SIM115
    "computed tensors in a list": (lambda m: setattr(m, "cache", [2 * m.c.weight]), "its attribute cache has no deep copy"),
    "what a hook holds": (_hooked, r"its hooks, c\._forward_hooks, have no deep copy"),
    "a copy that fails": (lambda m: setattr(m, "b", _with_deepcopy(_raises)), r"its module b \(Own\) has no deep copy \(not me\)"),
    "itself": (lambda m: setattr(m, "b", _with_deepcopy(lambda s, memo: s)), r"of its module b \(Own\) gives the module itself"),
    "another": (lambda m: setattr(m, "b", _with_deepcopy(lambda s, memo: nn.Identity())), r"of its module b \(Own\) gives something else"),
    "the same tensors": (lambda m: setattr(m, "b", _with_deepcopy(_sharing)), r"of its module b \(Own\) shares weight with the original"),
}


@pytest.mark.parametrize("what", UNCOPIED)
def test_a_module_that_cant_be_copied_is_told_what_is_in_the_way(what: str) -> None:
    hinder, text = UNCOPIED[what]
    net = nn.Module.eval(Net(lambda s, x: s.b(s.c(x)), c=nn.Conv2d(3, 4, 3), b=norm(4)))
    hinder(net)
    net.eval()
    for verb in (lambda: bnfold.fuse(net, example=IMAGE), lambda: bnfold.recalibrate(net, [IMAGE])):
        with pytest.raises(bnfold.UnsupportedError, match=f"can't be copied.*{text}"):
            verb()


def test_a_function_that_an_attribute_holds_is_no_hindrance() -> None:
    net = Net(lambda s, x: s.act(s.b(s.c(x))), c=nn.Conv2d(3, 4, 3), b=norm(4)).eval()
    net.act = lambda x: x.relu()
    assert [layer.verdict for layer in bnfold.fuse(net, example=IMAGE)[1].layers] == ["folded"]


# --- values that are computed from weights alone, and written into ------------------------------------------------------------------


def row(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1, 1, 1)


WRITTEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "(variance + epsilon).rsqrt_()": lambda s, x: (x - row(s.m)) * ((row(s.v) + 1e-3).rsqrt_() * row(s.g)) + row(s.m),
    "several in a row": lambda s, x: x * (row(s.v) + 1e-3).rsqrt_().mul_(row(s.g)).neg_(),
    "a power of another schema": lambda s, x: x * (row(s.v) + 1).pow_(-0.5),
    "a number from it": lambda s, x: x - torch.rsub((row(s.v) + 0).mul_(2), 1),
    "filled": lambda s, x: x * (row(s.v) + 0).fill_(2.0),
    "through a view": lambda s, x: x * row(s.v.clone().view(2, 2).mul_(2).view(-1)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_into_a_computed_constant(name: str) -> None:
    parts = {"v": torch.rand(4) + 0.5, "m": torch.randn(4), "g": torch.rand(4) + 0.5}
    forward = WRITTEN[name]
    model = Net(lambda s, x: forward(s, s.b(s.c(x))), c=nn.Conv2d(3, 4, 3), b=norm(4), **parts).eval()
    (_, report), (program, other) = folded(model, IMAGE)
    assert all("it is computed in the forward of" in reason for reason in kept(report).values())  # of what is no BatchNorm's formula
    assert not kept(other)
    assert not any("mul." in str(op.target) or "sub." in str(op.target) for op in program.graph.nodes)


class WrittenOut(nn.Module):
    """A BatchNorm in arithmetic, by names of its own, as Keras writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("mean", "variance", "gamma", "beta"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        scale = (row(self.variance) + 1e-3).rsqrt_() * row(self.gamma)
        return torch.subtract(x, row(self.mean)).mul_(scale).add_(row(self.beta))


def test_a_batchnorm_written_out_under_names_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), WrittenOut(4), nn.ReLU()).eval()
    for given in (model, torch.export.export(model, (IMAGE,), strict=False)):
        result, report = bnfold.fuse(given, example=IMAGE)
        assert [(layer.name, layer.channels, layer.verdict, layer.into) for layer in report.layers] == [("1", 4, "folded", ("0",))]
        assert difference(run(given, IMAGE), run(result, IMAGE)) < 1e-5
        (measured,) = bnfold.recalibrate(given, [IMAGE])[1].layers
        assert (measured.name, measured.count) == ("1", IMAGE[:, 0, :-2, :-2].numel())
    (copied, _), (program, _) = folded(model, IMAGE)
    assert isinstance(copied[1], nn.Identity)
    assert not any("mul" in str(op.target) or "add" in str(op.target) for op in program.graph.nodes)


def test_what_is_written_into_a_stored_tensor_stays() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        s.v.mul_(1.5)  # the next call reads it
        return s.b(s.c(x)) * row(s.v)  # type: ignore[no-any-return]

    model = Net(forward, c=nn.Conv2d(3, 4, 3), b=norm(4), v=torch.ones(4)).eval()
    program = torch.export.export(model, (IMAGE,), strict=False)
    result, _ = bnfold.fuse(program, example=IMAGE, check=False)
    module = result.module()
    torch.testing.assert_close(1.5 * module(IMAGE), module(IMAGE))


class Step:
    """Who holds a layer beside the module that registers it."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with an activation of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [norm, lambda n: lively(NormAct(n))], ids=["plain", "with an activation"])
def test_layers_that_a_list_of_the_modules_own_calls(kind: Callable[[int], nn.Module]) -> None:
    net = Net(lambda s, x: functools.reduce(lambda y, step: step.layer(y), s.steps, x).relu(), c=nn.Conv2d(3, 4, 3, bias=False), b=kind(4))
    net.steps = [Step(net.c), Step(net.b)]
    net.eval()
    before, (copied, report) = run(net, IMAGE), bnfold.fuse(net, example=IMAGE)
    assert [(layer.verdict, layer.into) for layer in report.layers] == [("folded", ("c",))]
    assert copied.steps[1].layer is copied.b
    assert not any(isinstance(each, nn.BatchNorm2d) for each in copied.modules())
    assert difference(before, run(copied, IMAGE)) < 1e-5
    assert type(net.b) is type(kind(4))
    assert difference(before, run(net, IMAGE)) == 0


class Rebuilt(nn.Module):
    """A network that is copied by making it anew from its settings and its numbers, as Keras models are."""

    def __init__(self, prefix: str = "", mode: bool = False, numbers: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.prefix = prefix
        self.add_module(f"{prefix}c", nn.Conv2d(3, 4, 3))
        self.add_module(f"{prefix}b", norm(4))
        self.steps = list(self.children())
        self.train(mode)
        for mine, given in zip(self.state_dict().values(), (numbers or {}).values(), strict=False):
            mine.copy_(given)

    def settings(self) -> tuple[Any, ...]:
        return self.prefix, True, copy.deepcopy(self.state_dict())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.settings()

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda y, step: step(y), self.steps, x).relu()


def test_a_module_that_copies_itself_whole() -> None:
    net = Rebuilt()
    with pytest.raises(
        bnfold.UnsupportedError,
        match=r"Rebuilt can't be folded as a module.*its __reduce__ gives something else for b.*an exported program",
    ):
        bnfold.fuse(net, example=IMAGE)
    measured, _ = bnfold.recalibrate(net, [IMAGE])
    torch.testing.assert_close(measured.steps[1].running_mean, net.steps[0](IMAGE).mean((0, 2, 3)))
    program, _ = bnfold.fuse(torch.export.export(net, (IMAGE,)))
    assert bnfold.verify(net, program, example=IMAGE).verdict == "equivalent"


def test_a_module_that_copies_itself_as_it_is() -> None:
    program = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)).eval())  # a GraphModule copies itself
    copied, report = bnfold.fuse(program, example=IMAGE)
    assert [layer.verdict for layer in report.layers] == ["folded"]
    assert difference(run(program, IMAGE), run(copied, IMAGE)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (lambda s: ("other_", False), r"its __reduce__ gives something else for c"),
        (lambda s: ("", False), "its __reduce__ gives c.weight other values"),
    ],
    ids=["names", "values"],
)
def test_a_module_whose_own_copy_is_another(settings: Callable[[Any], tuple[Any, ...]], text: str) -> None:
    net = type("Other", (Rebuilt,), {"settings": settings})()
    for verb in (lambda: bnfold.fuse(net, example=IMAGE), lambda: bnfold.inspect(net, example=IMAGE)):
        with pytest.raises(bnfold.UnsupportedError, match=rf"can't be copied.*{text}.*as an exported program \(torch\.export\.export\)"):
            verb()
    result, report = bnfold.fuse(torch.export.export(net, (IMAGE,)))
    assert [layer.verdict for layer in report.layers] == ["folded"]
    assert difference(run(net, IMAGE), run(result, IMAGE)) < 1e-5


def test_a_keras_model_folds_as_an_exported_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("keras was imported with another back-end")
    layers = keras.layers
    net = keras.Sequential([keras.Input((9, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()])
    net.eval()
    image = IMAGE.permute(0, 2, 3, 1)
    program = torch.export.export(net, (image,))
    result, report = bnfold.fuse(program)
    assert (report.batchnorms.before, report.batchnorms.after) == (1, 0)
    assert difference(run(program, image), run(result, image)) < 1e-5


def _of_a_list(s: Any, x: Tensor) -> Tensor:
    return s.b(F.conv2d(x, *s.own))  # type: ignore[no-any-return]


def _statistics_of_a_list(s: Any, x: Tensor) -> Tensor:
    return F.batch_norm(s.c(x), *s.own)


@pytest.mark.parametrize(
    ("forward", "own"),
    [(_of_a_list, ("c.weight", "c.bias")), (_statistics_of_a_list, ("b.running_mean", "b.running_var", "b.weight", "b.bias"))],
    ids=["weights", "statistics"],
)
def test_tensors_that_a_list_of_the_modules_own_holds(forward: Callable[[Any, Tensor], Tensor], own: tuple[str, ...]) -> None:
    net = Net(forward, c=nn.Conv2d(3, 4, 3), b=norm(4)).eval()
    named = dict([*net.named_parameters(), *net.named_buffers()])
    net.own = [named[name] for name in own]
    before, (copied, report) = run(net, IMAGE), bnfold.fuse(net, example=IMAGE)
    assert [layer.verdict for layer in report.layers] == ["folded"]
    assert difference(before, run(copied, IMAGE)) < 1e-5
    assert difference(before, run(net, IMAGE)) == 0
    now = dict([*copied.named_parameters(), *copied.named_buffers()])
    if forward is _of_a_list:
        assert copied.own[0] is now["c.weight"]
    measured, _ = bnfold.recalibrate(net, [IMAGE])
    torch.testing.assert_close(measured.b.running_mean, net.c(IMAGE).mean((0, 2, 3)))
    torch.testing.assert_close(run(measured, IMAGE)[0].mean((0, 2, 3)), net.b.bias.detach())


def test_a_tensor_of_a_list_that_is_also_read_by_its_name() -> None:
    net = Net(lambda s, x: s.b(F.conv2d(x, s.own[0])) + s.c(x), c=nn.Conv2d(3, 4, 3, bias=False), b=norm(4)).eval()
    net.own = [net.c.weight]
    net.other = net.c  # the weight has two names
    copied, report = bnfold.fuse(net, example=IMAGE)
    assert [layer.verdict for layer in report.layers] == ["kept"]
    assert difference(run(net, IMAGE), run(copied, IMAGE)) == 0


def test_layers_that_a_module_holds_under_no_name() -> None:
    net = Net(lambda s, x: s.own[1](s.own[0](x)), c=nn.Conv2d(3, 4, 3))
    net.own = [nn.Conv2d(3, 4, 3).eval(), norm(4).eval()]
    net.eval()
    _, report = bnfold.fuse(net, example=IMAGE)
    assert [(layer.verdict, layer.reason) for layer in report.layers] == [
        ("kept", "it is computed in the forward of Net, which stays as it is")
    ]
    with pytest.raises(bnfold.NothingToDoError, match="the module holds them under no name"):
        bnfold.recalibrate(net, [IMAGE])


def test_a_convolution_whose_groups_are_computed_from_sizes() -> None:
    net = Net(lambda s, x: s.b(F.conv2d(x, s.w, None, 1, 0, 1, x.shape[1] // 3)), b=norm(4), w=weight(4, 3, 3, 3)).eval()
    program = torch.export.export(net, (IMAGE,), dynamic_shapes={"inputs": ({1: torch.export.Dim.AUTO},)}, strict=False)
    _, report = bnfold.fuse(program, example=IMAGE)
    assert [layer.verdict for layer in report.layers] == ["kept"]
    assert "its settings are computed from the sizes of the input" in report.layers[0].reason
    _, report = bnfold.fuse(net, example=IMAGE)  # there the channels are those of the example
    assert "its code has no place for one" in report.layers[0].reason
    assert bnfold.verify(net, copy.deepcopy(net), example=IMAGE).verdict != "different"


@pytest.mark.parametrize("persistent", [True, False])
def test_a_folded_program_counts_for_itself(persistent: bool) -> None:
    """A buffer that a program writes into is not the argument's any more."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4))
            self.register_buffer("calls", torch.zeros(()), persistent=persistent)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.body(x) + self.calls

    x = torch.randn(2, 3, 6, 6)
    program = torch.export.export(Counting().eval(), (x,))
    fused, report = bnfold.fuse(program)
    assert report.batchnorms.after == 0
    (calls,) = (t for each in (program.state_dict, program.constants) for name, t in each.items() if name.endswith("calls"))
    before = calls.clone()
    fused.module()(x)
    assert torch.equal(calls, before)
