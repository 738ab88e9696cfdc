"""Where the windows of convolutions and pools lie. A window starts at `output * stride` on the padded input and steps by the dilation.

Output sizes follow docs/Operators.md of the onnx repository (Conv, ConvTranspose, AveragePool, MaxPool).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .registry import Array


@dataclass(frozen=True)
class Windows:
    """Where windows lie, one number per spatial axis. before, after: padding (`after` is what the last window needs)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    out: tuple[int, ...]

    def taps(self) -> Iterator[tuple[tuple[int, ...], tuple[slice[int, int, int], ...]]]:
        """Each element of the kernel, and the slice of the padded input that all windows together see there."""
        for tap in itertools.product(*map(range, self.kernel)):
            starts = [k * d for k, d in zip(tap, self.dilations, strict=True)]
            yield tap, tuple(slice(a, a + (o - 1) * s + 1, s) for a, o, s in zip(starts, self.out, self.strides, strict=True))

    def shifts(self, grid: Sequence[int]) -> tuple[int, list[tuple[tuple[int, ...], int]]]:
        """What the taps see of an image that lies flat: so many numbers at a stretch, in which `placed` finds the outputs, and where each
        tap's begin.

        Where windows step by more than one, the image comes as its phases (see `phases`) one behind the other, each of the size `grid`.
        """
        steps = [math.prod(grid[i + 1 :]) for i in range(len(grid))]
        found = []
        for tap, place in self.taps():
            phase = start = 0
            for slice_, stride, step in zip(place, self.strides, steps, strict=True):
                phase = phase * stride + slice_.start % stride
                start += slice_.start // stride * step
            found.append((tap, phase * math.prod(grid) + start))
        return 1 + sum((n - 1) * step for n, step in zip(self.out, steps, strict=True)), found

    def placed(self, stretches: Array, grid: Sequence[int]) -> Array:
        """[..., *out], a view of [..., length] as `shifts` has it, without what lies where rows wrap."""
        steps = [stretches.strides[-1] * math.prod(grid[i + 1 :]) for i in range(len(grid))]
        shape, strides = (*stretches.shape[:-1], *self.out), (*stretches.strides[:-1], *steps)
        return np.lib.stride_tricks.as_strided(stretches, shape, strides, writeable=False)


def phases(x: Array, strides: Sequence[int]) -> tuple[Array, list[int]]:
    """[C, *size] flat, and the size of one phase, of which the axes are multiples: all elements whole strides apart."""
    grid = [size // stride for size, stride in zip(x.shape[1:], strides, strict=True)]
    if max(strides) > 1:
        n = len(grid)
        x = x.reshape(len(x), *(d for pair in zip(grid, strides, strict=True) for d in pair))
        x = x.transpose(0, *range(2, 2 * n + 1, 2), *range(1, 2 * n + 1, 2))
    return x.reshape(len(x), -1), grid


def windows(
    sizes: Sequence[int],
    kernel: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
) -> Windows:
    """Where they lie by the attributes of an operator."""
    n = len(sizes)
    strides, dilations = tuple(strides or (1,) * n), tuple(dilations or (1,) * n)
    pads = tuple(pads or (0,) * 2 * n) if auto_pad in ("NOTSET", "") else (0,) * 2 * n
    before, after, out = [], [], []
    for i, (size, k, s, d) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        extent = (k - 1) * d + 1
        begin, end = pads[i], pads[n + i]
        if auto_pad.startswith("SAME"):
            count = -(-size // s)
            total = max(0, (count - 1) * s + extent - size)
            begin = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
            end = total - begin
        else:
            room = size + begin + end - extent
            count = room // s + 1
            # A window may be cut off by the end, but none may start behind the input and its leading padding.
            if ceil_mode and room % s and count * s < size + begin:
                count += 1
        if count <= 0:
            raise ValueError(f"a window of {extent} doesn't fit into {size} elements padded by {begin} and {end}")
        before.append(begin)
        after.append(max(end, (count - 1) * s + extent - size - begin))
        out.append(count)
    return Windows(tuple(kernel), strides, dilations, tuple(before), tuple(after), tuple(out))


def pad(x: Array, at: Windows, fill: float) -> Array:
    """The input with its padding; a negative one cuts."""
    sides = list(zip(at.before, at.after, strict=True))
    cut: Any = (slice(None), slice(None), *(slice(max(0, -b), s - max(0, -a)) for (b, a), s in zip(sides, x.shape[2:], strict=True)))
    widths = [(0, 0), (0, 0), *((max(0, b), max(0, a)) for b, a in sides)]
    x = x[cut]
    return np.pad(x, widths, constant_values=fill) if any(map(any, widths)) else x
