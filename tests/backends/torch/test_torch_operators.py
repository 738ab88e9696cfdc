"""Operators beside those of the matrix of cases: of other namespaces, and with constants that ONNX states in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import lively
from torch import Tensor, nn

import bnfold

SCHEMA = (
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, SymInt pad_h, "
    "SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor"
)


def deformed(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *settings: Any) -> Tensor:
    """A deformable convolution (Dai et al. 2017, equation 2; masks by Zhu et al. 2019), one tap after the other."""
    (sh, sw, ph, pw, dh, dw, groups, parts, masked), (n, c, h, w) = settings, x.shape
    out, fan, kh, kw = weight.shape
    size = offset.shape[2:]
    moved, counts = offset.reshape(n, parts, kh * kw, 2, *size), mask.reshape(n, parts, kh * kw, *size) if masked else None
    taps = []
    for k in range(kh * kw):
        rows = torch.arange(size[0])[:, None] * sh - ph + k // kw * dh
        columns = torch.arange(size[1]) * sw - pw + k % kw * dw
        for p, part in enumerate(x.chunk(parts, 1)):
            places = (2 * (columns + moved[:, p, k, 1]) / (w - 1) - 1, 2 * (rows + moved[:, p, k, 0]) / (h - 1) - 1)
            tap = F.grid_sample(part, torch.stack(places, -1), align_corners=True)
            taps.append(tap if counts is None else tap * counts[:, p, None, k])
    seen = torch.stack(taps).reshape(kh * kw, parts, n, c // parts, *size).permute(2, 1, 3, 0, 4, 5)
    seen = seen.reshape(n, groups, fan, kh * kw, *size)
    y = torch.einsum("ngikhw,goik->ngohw", seen, weight.reshape(groups, out // groups, fan, -1))
    return y.reshape(n, out, *size) + bias[:, None, None]


@pytest.fixture(scope="module", autouse=True)
def torchvision_operator() -> None:
    """torchvision's operator, which has to be loaded with its compiled part."""
    if hasattr(torch.ops.torchvision, "deform_conv2d"):
        return
    torch.library.define(f"torchvision::{SCHEMA.partition('(')[0]}", SCHEMA.partition("deform_conv2d")[2])
    torch.library.impl("torchvision::deform_conv2d", "CompositeExplicitAutograd")(deformed)
    torch.library.register_fake("torchvision::deform_conv2d")(
        lambda x, weight, offset, *others: x.new_empty(x.shape[0], weight.shape[0], *offset.shape[2:])
    )


class Deformable(nn.Module):
    """A deformable convolution as torchvision.ops.DeformConv2d is one, and a BatchNorm behind or before it."""

    def __init__(self, *, masked: bool, groups: int = 1, before: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4 // groups, 3, 3)), nn.Parameter(torch.randn(6))
        self.places, self.counts = nn.Conv2d(4, 18, 3, padding=1), nn.Conv2d(4, 9, 3, padding=1)
        self.norm = norm(4 if before else 6)
        self.masked, self.groups, self.before = masked, groups, before

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.places(x), self.counts(x).sigmoid() if self.masked else x.new_zeros(len(x), 1)
        y = self.norm(x.sigmoid()) if self.before else x
        y = torch.ops.torchvision.deform_conv2d(y, self.weight, offset, mask, self.bias, 1, 1, 1, 1, 1, 1, self.groups, 1, self.masked)
        return y if self.before else self.norm(y)


class Taken(nn.Module):
    """A convolution, a move by constant places along an axis, and a BatchNorm."""

    def __init__(self, places: Tensor, axis: int, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), norm(channels)
        self.register_buffer("places", places)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.take_along_dim(self.conv(x), self.places, self.axis))


class Spelled(nn.Module):
    """An einsum of one operand behind a linear layer, and a BatchNorm."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.linear, self.norm, self.equation = nn.Linear(4, 6), norm(6), equation

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.einsum(self.equation, self.linear(x)))


class Sampled(nn.Module):
    """A convolution that is read at places that another one computes, and a BatchNorm behind or before that."""

    def __init__(self, padding: str, *, before: bool = False) -> None:
        super().__init__()
        self.conv, self.places, self.norm = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 2, 3), norm(5)
        self.padding, self.before = padding, before

    def forward(self, x: Tensor) -> Tensor:
        y, grid = self.conv(x), self.places(x).tanh().permute(0, 2, 3, 1)
        y = F.grid_sample(self.norm(y) if self.before else y, 2 * grid, padding_mode=self.padding, align_corners=False)
        return y if self.before else self.norm(y)


def norm(channels: int) -> nn.Module:
    found = nn.BatchNorm2d(channels) if channels != 6 else nn.SyncBatchNorm(channels)  # which takes any rank
    for tensor in (found.weight, found.bias, found.running_mean, found.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return found


def folded(model: nn.Module, *shape: int) -> str:
    """What is said of its BatchNorm by both routes, once both compute what the model does. "" where it folds."""
    torch.manual_seed(0)
    model, x = model.eval().double(), torch.randn(*shape, dtype=torch.float64)
    reasons = set()
    for given, options in ((model, {"example": x}), (torch.export.export(model, (x,)), {})):
        result, report = bnfold.fuse(given, **options)
        run = result if isinstance(result, nn.Module) else result.module()
        torch.testing.assert_close(run(x), model(x), rtol=0, atol=1e-12)
        reasons.add(report.layers[0].reason)
    assert len(reasons) == 1
    return reasons.pop()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_deformable_convolution(masked: bool, groups: int) -> None:
    assert folded(Deformable(masked=masked, groups=groups), 2, 4, 7, 8) == ""


def test_a_batchnorm_before_a_deformable_convolution() -> None:
    assert "it reads zeros beyond the border" in folded(Deformable(masked=True, before=True), 2, 4, 7, 8)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_interpolation_at_computed_places(padding: str, before: bool) -> None:
    said = folded(Sampled(padding, before=before), 2, 3, 7, 8)
    assert ("it pads with one constant" in said) if padding == "zeros" and not before else said == ""


def test_places_along_the_channels() -> None:
    places = torch.tensor([4, 0, 2]).reshape(1, 3, 1, 1)
    assert folded(Taken(places, 1, 3), 2, 3, 6, 7) == ""


def test_places_along_another_axis() -> None:
    assert folded(Taken(torch.randint(0, 4, (1, 1, 3, 5)), 2, 5), 2, 3, 6, 7) == ""


def test_places_that_differ_from_one_pixel_to_the_next_mix_channels() -> None:
    assert "different maps" in folded(Taken(torch.randint(0, 5, (2, 4, 4, 5)), 1, 4), 2, 3, 6, 7)


@pytest.mark.parametrize("equation", ["nlc->ncl", "n...c->nc...", "nlmc->ncml", "bll...->b...l"])
def test_an_einsum_of_one_operand(equation: str) -> None:
    assert folded(Spelled(equation), *((2, 5, 4) if equation.startswith(("nlc-", "n...")) else (2, 5, 5, 4))) == ""


class Windows(nn.Module):
    """Time-delay layers, as speech networks have them: a BatchNorm, windows over what came before, and a linear layer."""

    def __init__(self, cut: Callable[[Tensor], Tensor], fan: int, channels: int) -> None:
        super().__init__()
        self.norm, self.linear, self.cut = norm(channels), nn.Linear(fan, 4), cut

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.cut(self.norm(x)))


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a multiple": lambda x, y: torch.add(x, y, alpha=2.5),
    "nothing of it": lambda x, y: torch.add(x, y, alpha=0),
    "less a multiple": lambda x, y: torch.sub(x, y, alpha=0.5),
    "from a multiple": lambda x, y: torch.rsub(x, y, alpha=-3),
    "a multiple beside zeros": lambda x, y: torch.add(torch.zeros_like(y), y, alpha=2),
}


@pytest.mark.parametrize("kind", SUMS)
def test_sums_with_multiples(kind: str) -> None:
    """Of two convolutions, which become one where they can."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), lively(nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(SUMS[kind](self.one(x), self.two(x)))
            return found

    assert ("zeros_like blocks" in folded(Sum(), 2, 3, 5, 5)) == ("zeros" in kind)


def test_windows_of_a_sequence() -> None:
    assert folded(Windows(lambda x: x.unfold(2, 3, 2).movedim(1, 2).flatten(2), 18, 6), 2, 6, 9) == ""


def test_columns_of_windows() -> None:
    plain = lambda x: F.unfold(x, (3, 2), dilation=(2, 1), stride=(1, 2)).mT  # noqa: E731
    assert folded(Windows(plain, 30, 5), 2, 5, 8, 7) == ""
    padded = lambda x: F.unfold(x, 3, padding=1).mT  # noqa: E731
    assert "it pads with zeros" in folded(Windows(padded, 45, 5), 2, 5, 8, 7)


class Graph(nn.Module):
    """A layer of a graph network (Kipf & Welling 2017, equation 2), its weights per edge left out, and a BatchNorm."""

    def __init__(
        self,
        gather: Callable[[Tensor, Tensor, Tensor], Tensor],
        start: Callable[[Tensor], Tensor] = lambda x: x.new_zeros(len(x), 6),
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.linear, self.norm, self.gather, self.start = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), gather, start
        self.bias = nn.Parameter(torch.randn(6)) if bias else None
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.running_mean)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 2, 4, 3, 1], [1, 0, 0, 3, 3, 4, 4]]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        y = self.gather(self.start(x), x.index_select(0, self.edges[0]), self.edges[1])
        return torch.tanh(self.norm(y if self.bias is None else y + self.bias))


GATHERED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "scatter_add": lambda zeros, sent, ends: zeros.scatter_add_(0, ends[:, None].expand_as(sent), sent),
    "index_add": lambda zeros, sent, ends: zeros.index_add(0, ends, sent, alpha=2),
    "mean": lambda zeros, sent, ends: zeros.scatter_reduce_(0, ends[:, None].expand_as(sent), sent, "mean", include_self=False),
    "amax": lambda zeros, sent, ends: zeros.scatter_reduce(0, ends[:, None].expand_as(sent), sent, "amax", include_self=False),
}


@pytest.mark.parametrize("kind", GATHERED)
def test_what_comes_along_edges(kind: str) -> None:
    assert folded(Graph(GATHERED[kind]), 5, 4) == ""
    assert "its shift is not zero" in folded(Graph(GATHERED[kind], bias=False), 5, 4)


@pytest.mark.parametrize("start", [torch.zeros_like, lambda x: torch.full_like(x, 0.0), lambda x: x.new_full(x.shape, 0)])
def test_what_comes_along_edges_starts_from_zeros_as_large_as_the_layers_output(start: Callable[[Tensor], Tensor]) -> None:
    assert folded(Graph(GATHERED["index_add"], start), 5, 4) == ""


def test_what_comes_along_edges_and_is_not_known_to_start_from_zero() -> None:
    assert "known to be zero" in folded(Graph(lambda zeros, sent, ends: zeros.fill_(1.5).index_add(0, ends, sent)), 5, 4)
    twice = Graph(lambda zeros, sent, ends: zeros.index_add_(0, ends, sent).index_add_(0, ends.flip(0), sent))
    assert "known to be zero" in folded(twice, 5, 4)
    product = folded(Graph(lambda zeros, sent, ends: zeros.scatter_reduce(0, ends[:, None].expand_as(sent), sent, "prod")), 5, 4)
    assert "it reduces by prod" in product


def test_an_untrained_bias_takes_the_shift() -> None:
    """Neighbours by a matrix that is given: the scale goes into the layer, and the shift into an addition of zeros."""

    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bias, self.norm = nn.Linear(4, 6, bias=False), nn.Parameter(torch.zeros(6)), lively(nn.BatchNorm1d(6))

        def forward(self, x: Tensor, near: Tensor) -> Tensor:
            found: Tensor = self.norm(near @ self.linear(x) + self.bias)
            return found

    given = (torch.randn(7, 4).double(), torch.rand(7, 7).double())
    net = Neighbours().double().eval()
    fused, report = bnfold.fuse(torch.export.export(net, given), check=False)
    assert report.batchnorms.after == 0
    torch.testing.assert_close(fused.module()(*given), net(*given), rtol=1e-12, atol=1e-12)


def test_a_channel_stays_of_what_another_operator_is_as_large_as() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.other = nn.Conv2d(3, 4, 1), lively(nn.BatchNorm2d(4)), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.one(x))
            found: Tensor = self.other(torch.cat([y, torch.zeros_like(y)], 1))
            return found

    net, x = Beside().double().eval(), torch.randn(2, 3, 4, 4).double()
    net.norm.weight.data[1] = 0
    fused, report = bnfold.fuse(torch.export.export(net, (x,)), drop_dead=True, check=False)
    assert report.batchnorms.after == 0
    torch.testing.assert_close(fused.module()(x), net(x), rtol=1e-12, atol=1e-12)
