"""float16, bfloat16, float64 and mixed types; old opsets and their attributes (lines 43, 44)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .builder import Net
from .case import Theme
from .convolutions import conv_bn, conv_transpose_bn
from .forward import bn_conv
from .linear import gemm_bn, matmul_add_bn

CASES = Theme()


# --- types (line 43) -------------------------------------------------------------------------------------------

for dtype in ("float16", "bfloat16", "float64"):
    halves: dict[str, Any] = {"dtype": dtype, "double": False, "ort": dtype == "float16", "roundoffs": 64}
    halves["opset"] = 22 if dtype == "bfloat16" else 17  # Conv takes bfloat16 from opset 22 on
    for what, draw in (
        ("conv", conv_bn),
        ("conv without bias", partial(conv_bn, bias=False)),
        ("conv of two groups", partial(conv_bn, groups=2)),
        ("conv transpose", conv_transpose_bn),
        ("gemm with alpha and beta", partial(gemm_bn, alpha=0.7, beta=1.5)),
        ("gemm without bias", partial(gemm_bn, c=None)),
        ("matmul and Add", matmul_add_bn),
        ("BatchNorm before a conv", bn_conv),
    ):
        CASES.case(f"{what} in {dtype}", 43, draw=draw, **halves)

for dtype in ("float16", "bfloat16"):
    mixed: dict[str, Any] = {"dtype": dtype, "statistics": "float32", "double": False, "roundoffs": 64, "ort": False}
    newer = {"opset": 22 if dtype == "bfloat16" else 15}
    CASES.case(f"{dtype} data with float32 statistics and scale", 43, draw=conv_bn, **newer, **mixed)
    CASES.case(f"{dtype} data with float32 statistics, conv without bias", 43, draw=partial(conv_bn, bias=False), **newer, **mixed)
    CASES.case(f"{dtype} data with float32 statistics, gemm", 43, draw=gemm_bn, opset=22, **mixed)
    CASES.case(f"{dtype} data with float32 statistics, matmul", 4, 43, draw=lambda net: matmul(net), opset=15, after={"Add": 1}, **mixed)
    CASES.case(f"{dtype} data with float32 statistics, on the input", 43, 47, draw=lambda net: alone(net), left=1, reason="input", **mixed)


def matmul(net: Net) -> None:
    net.output(net.bn(net.op("MatMul", net.input("N", 4), net.matrix(4, 6)), 6))


def alone(net: Net) -> None:
    net.output(net.bn(net.input("N", 4, "H", "W"), 4))


@CASES.case("float16 data with float32 statistics alone, opset 14", 43, dtype="float16", opset=14, double=False, roundoffs=64, ort=False)
def _(net: Net) -> None:
    """Opset 14: mean and variance may be float32 where scale and bias are float16."""
    net.statistics = np.float32
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6))


@CASES.case("float32 data with float64 statistics", 43, opset=15, statistics="float64", ort=False)
def _(net: Net) -> None:
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6))


@CASES.case(
    "two BatchNorms of mixed types in a row", 33, 43, dtype="float16", statistics="float32", opset=15, double=False, roundoffs=64, ort=False
)
def _(net: Net) -> None:
    net.output(net.bn(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6), 6))


@CASES.case("a fold that overflows float16", 43, 48, dtype="float16", double=False, left=1, reason=r"overflow|range|float16|65504|large")
def _(net: Net) -> None:
    gamma, beta, mean, _ = net.bn_params(6)
    var = net.weight(np.array([1, 1, 1e-7, 1, 1, 1]), "var")
    w = net.weight(net.normal(6, 4, 3, 3) * 100, "filters")
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6, weight=w), params=[gamma, beta, mean, var], epsilon=1e-8))


@CASES.case(
    "a fold whose weights are too small for float16", 43, 48, dtype="float16", double=False, notes=r"too small|small", roundoffs=1e4
)
def _(net: Net) -> None:
    _, beta, mean, var = net.bn_params(6)
    w = net.weight(net.normal(6, 4, 3, 3) * 1e-4, "filters")
    tiny = net.weight(np.full(6, 1e-3), "gamma")
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6, weight=w), params=[tiny, beta, mean, var]))


# --- old opsets (line 44) -----------------------------------------------------------------------------------------


def old_bn(net: Net, *, cut: bool = False, **attrs: Any) -> None:
    net.output(net.bn(net.conv(net.input("N", 4, 7, 6), 4, 6), 6, **attrs))


CASES.case("opset 6, is_test", 44, draw=old_bn, opset=6, ort=False)
CASES.case("opset 6, training by default", 44, 45, draw=partial(old_bn, is_test=0), opset=6, ort=False, left=1, reason="training")
CASES.case("opset 7, spatial 1", 44, draw=partial(old_bn, spatial=1), opset=7)
CASES.case("opset 8, spatial 1", 44, draw=partial(old_bn, spatial=1), opset=8)
CASES.case("opset 7, momentum", 44, draw=partial(old_bn, momentum=0.1), opset=7)
CASES.case("opset 9, momentum", 44, draw=partial(old_bn, momentum=0.1), opset=9)


def spatial0(net: Net, *, behind: str, channels: tuple[int, ...] = (6, 2, 3)) -> None:
    """spatial=0: mean and variance of their own for each element (C, H, W)."""
    if behind == "gemm":
        y = net.reshape(net.gemm(net.input("N", 4), 4, int(np.prod(channels))), -1, *channels)
    elif behind == "input":
        y = net.input("N", *channels)
    else:
        y = net.conv(net.input("N", 4, channels[1] + 2, channels[2] + 2), 4, channels[0])
    net.output(net.bn(y, channels, spatial=0))


for opset in (7, 8):
    CASES.case(f"spatial 0 behind a gemm and a Reshape, opset {opset}", 44, draw=partial(spatial0, behind="gemm"), opset=opset, ort=False)
    CASES.case(
        f"spatial 0 behind a conv, opset {opset}",
        44,
        draw=partial(spatial0, behind="conv"),
        opset=opset,
        ort=False,
        left=1,
        reason=r"ax[ie]s",
    )
CASES.case("spatial 0 behind a conv, opset 6", 44, draw=partial(spatial0, behind="conv"), opset=6, ort=False, left=1, reason=r"ax[ie]s")


@CASES.case("spatial 0 on (N, C)", 44, opset=7, ort=False)
def _(net: Net) -> None:
    net.output(net.bn(net.gemm(net.input("N", 4), 4, 6), 6, spatial=0))


@CASES.case("spatial 0 with a parameter per channel (ArcFace)", 44, opset=7, ort=False, notes=r"spatial")
def _(net: Net) -> None:
    """Malformed, and in use: read as spatial 1."""
    net.output(net.bn(net.conv(net.input("N", 4, 7, 6), 4, 6), 6, spatial=0))


@CASES.case("spatial 0 before a Flatten and a gemm", 27, 44, opset=7, ort=False)
def _(net: Net) -> None:
    y = net.op("Flatten", net.bn(net.input("N", 3, 2, 2), (3, 2, 2), spatial=0))
    net.output(net.gemm(y, 12, 5))
