"""The float64 convolution of each channel by itself, against PyTorch's own."""

from __future__ import annotations

import itertools

import pytest
import torch

from bnfold.backends.torch.runtime import depthwise

aten = torch.ops.aten
SETTINGS = list(itertools.product((1, 2, 3), (1, 2), (0, 2), (1, 2), (True, False)))


@pytest.mark.parametrize(("axes", "function"), [(1, aten.conv1d.default), (2, aten.conv2d.default), (3, aten.conv3d.default)])
def test_all_settings(axes: int, function: torch._ops.OpOverload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "CACHE", 4096)  # so that there are several blocks of channels
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, *(9, 8, 7)[:axes], dtype=torch.float64, generator=generator)
    for size, stride, padding, dilation, biased in SETTINGS:
        weight = torch.randn(6, 1, *(size,) * axes, dtype=torch.float64, generator=generator)
        bias = torch.randn(6, dtype=torch.float64, generator=generator) if biased else None
        want = function(x, weight, bias, [stride], [padding], [dilation], 6)
        torch.testing.assert_close(depthwise.called(function, (x, weight, bias, [stride], [padding], [dilation], 6), {}), want)
        settings = ([stride] * axes, [padding] * axes, [dilation] * axes, False, [0] * axes, 6)
        torch.testing.assert_close(depthwise.called(aten.convolution.default, (x, weight, bias, *settings), {}), want)


def test_what_a_kernel_does_not_fit_into_is_left_to_pytorch() -> None:
    x, weight = torch.zeros(1, 2, 2, 2, dtype=torch.float64), torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        depthwise.called(aten.conv2d.default, (x, weight, None, [2, 2], [0, 0], [1, 1], 2), {})


def test_what_is_no_tensor_is_left_to_pytorch() -> None:
    with pytest.raises((RuntimeError, TypeError)):
        depthwise.called(aten.conv2d.default, (None, torch.zeros(2, 1, 3, 3), None, [1, 1], [0, 0], [1, 1], 2), {})


def test_it_serves_depthwise_convolutions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[int, ...]] = []
    monkeypatch.setattr(depthwise, "_by_taps", lambda **given: served.append(tuple(given["weight"].shape)))
    for shape, groups, dtype in (((6, 1, 3, 3), 6, torch.float64), ((12, 1, 3, 3), 6, torch.float64), ((6, 1, 3, 3), 6, torch.float32)):
        x, weight = torch.zeros(1, 6, 5, 5, dtype=dtype), torch.zeros(shape, dtype=dtype)
        depthwise.called(aten.conv2d.default, (x, weight, None, [1, 1], [0, 0], [1, 1], groups), {})
    assert served == [(6, 1, 3, 3)]
