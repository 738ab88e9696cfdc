"""Depthwise convolution in float64, for which PyTorch unfolds the input and multiplies matrices, a channel at a time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_aten = torch.ops.aten
CONVOLUTIONS = {_aten.convolution.default, _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default}
CACHE = 1 << 19  # bytes that are passed over several times at a stretch


def called(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator gives, without gradients."""
    if function in CONVOLUTIONS:
        names = [argument.name for argument in function._schema.arguments]
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        if _is_served(**given) and (made := _by_taps(**given)) is not None:
            return made
    return function(*args, **kwargs)


def _is_served(input: Any, weight: Any, *, groups: int = 1, transposed: bool = False, **_: Any) -> bool:
    """Whether it is a depthwise convolution of batches in float64, each channel by a kernel of its own."""
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
        return False  # as a file may say that has to be refused
    kinds = {(tensor.dtype, tensor.device.type, tensor.layout) for tensor in (input, weight)}
    own = weight.ndim > 2 and weight.shape[:2] == (groups, 1) and groups > 1 and not transposed
    return own and kinds == {(torch.float64, "cpu", torch.strided)} and input.ndim == weight.ndim and input.shape[1] == groups


def _by_taps(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
    **_: Any,
) -> Tensor | None:
    """Each tap of the kernels times what it sees of as many channels, [N, C, *in], as a cache holds, added up. None where a kernel is
    larger than the input, of which PyTorch will tell."""
    spatial = weight.ndim - 2
    stride, padding, dilation = (_for_each_axis(each, spatial) for each in (stride, padding, dilation))
    padded = functional.pad(input, [n for each in reversed(padding) for n in (each, each)])
    kernel, sizes = weight.shape[2:], padded.shape[2:]
    out = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(sizes, kernel, dilation, stride, strict=True)]
    if min(out) < 1:
        return None
    made = input.new_empty((*input.shape[:2], *out))
    block = max(1, CACHE // max(1, 8 * padded[:, 0].numel()))
    for first in range(0, input.shape[1], block):
        part, kernels, total = padded[:, first : first + block], weight[first : first + block], made[:, first : first + block]
        total[...] = 0 if bias is None else bias[first : first + block].reshape(-1, *(1,) * spatial)
        for tap in itertools.product(*map(range, kernel)):
            starts = [t * d for t, d in zip(tap, dilation, strict=True)]
            places = (slice(start, start + (n - 1) * s + 1, s) for start, n, s in zip(starts, out, stride, strict=True))
            seen: Any = (slice(None), slice(None), *places)
            weights: Any = (slice(None), 0, *tap)
            total.addcmul_(part[seen], kernels[weights].reshape(-1, *(1,) * spatial))
    return made


def _for_each_axis(setting: Sequence[int] | int, axes: int) -> list[int]:
    given = [setting] if isinstance(setting, int) else list(setting)
    return given * axes if len(given) == 1 else given
