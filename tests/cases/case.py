"""What a case is: a drawing of a network, and what must become of its BatchNorms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx

from .builder import Net


@dataclass(frozen=True)
class Case:
    """One situation of the catalogue.

    name: unique. lines: numbers of the catalogue's lines. draw: draws the network on an empty `Net`.
    left: how many BatchNorms stay, 0 where all of them fold; reason: a regular expression that the reason of each that stays matches.
    clone: what `fuse` is told. after: how often some operators occur afterwards. adds_bytes: whether a shared weight must be copied
    (None: not asked). notes: a regular expression that some note of the report matches.
    opset, ir, dtype, statistics: how the model is stored. double: whether the drawing also makes sense in float64.
    roundoffs: how far a right fold may move an output, in unit roundoffs of the stored type times the output's largest magnitude.
    below: integer inputs are drawn from 0 to below - 1. ort: whether ONNX Runtime's CPU provider can run the model.
    lively: whether each BatchNorm's coefficients show in the outputs (not so where a scale is 0 on purpose).
    torch: the same network as a module, given `torch.nn`, and the shapes of its inputs in `example`; None where torch can't say it.
    """

    name: str
    lines: tuple[int, ...]
    draw: Callable[[Net], None]
    left: int = 0
    reason: str = ""
    clone: bool = False
    after: Mapping[str, int] = field(default_factory=dict)
    adds_bytes: bool | None = None
    notes: str = ""
    opset: int = 17
    ir: int | None = None
    dtype: str = "float32"
    statistics: str | None = None
    double: bool = True
    roundoffs: float = 32.0
    below: int = 4
    ort: bool = True
    lively: bool = True
    torch: Callable[[Any], Any] | None = None
    example: tuple[tuple[int, ...], ...] = ()

    def build(self) -> onnx.ModelProto:
        """The model as it is stored."""
        net = Net(self.name, opset=self.opset, ir=self.ir, dtype=self.dtype, statistics=self.statistics)
        self.draw(net)
        return net.model()

    def build_double(self) -> onnx.ModelProto:
        """The same drawing, data and weights in float64."""
        net = Net(self.name, opset=self.opset, ir=self.ir, dtype="float64")
        self.draw(net)
        return net.model()

    def __str__(self) -> str:
        return self.name


class Theme(list[Case]):
    """The cases of one file; `case` adds one, as a call or as a decorator of the drawing."""

    def case(self, name: str, *lines: int, draw: Callable[[Net], None] | None = None, **options: Any) -> Callable[..., Any]:
        def add(drawing: Callable[[Net], None]) -> Callable[[Net], None]:
            self.append(Case(name, lines, drawing, **options))
            return drawing

        return add if draw is None else add(draw)
