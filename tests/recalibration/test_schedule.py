"""What runs in which stage, and what waits in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from cases.builder import Net
from onnx import TensorProto, helper, numpy_helper
from single import normal
from torch import nn

import bnfold
from bnfold.recalibration import schedule as stages
from bnfold.recalibration.moments import Pointwise
from bnfold.recalibration.schedule import NormCall, Operation, cut

# x -> narrow -> bn1 -> wide -> bn2 -> last -> bn3: in the second stage `wide` is measured, in the third it is normalised.
CHAIN = [("narrow", "x"), ("bn1", "narrow"), ("wide", "bn1"), ("bn2", "wide"), ("last", "bn2"), ("bn3", "last")]
SIZES = {"x": 30, "narrow": 10, "bn1": 10, "wide": 100, "bn2": 100, "last": 10, "bn3": 10}


def chain(work: int | None, sizes: dict[str, int] | None, readers: int = 1) -> list[tuple[list[str], list[str]]]:
    """What each stage runs and what waits behind it, by name; every operator is called what it makes."""
    found = [(name, (source,)) for name, source in CHAIN]
    found += [(f"reader{i}", ("wide", "bn3")) for i in range(1, readers)] + [(f"bn{i + 3}", (f"reader{i}",)) for i in range(1, readers)]
    operations = [Operation(name, reads, (name,), work=work if name == "wide" else None) for name, reads in found]
    calls = [NormCall(name, reads[0], i) for i, (name, reads) in enumerate(found) if name.startswith("bn")]
    cuts, dependent = cut(operations, calls, sizes)
    assert not dependent
    return [(each.nodes, each.keeps) for each in cuts]


def test_a_cheap_operator_runs_again_rather_than_have_its_large_value_wait() -> None:
    once = [(["narrow"], ["narrow"]), (["bn1", "wide"], ["wide"]), (["bn2", "last"], [])]
    again = [(["narrow"], ["narrow"]), (["bn1", "wide"], ["bn1"]), (["wide", "bn2", "last"], [])]
    assert chain(0, None) == chain(None, SIZES) == once
    assert chain(90 * stages.PER_BYTE, SIZES) == again
    assert chain(90 * stages.PER_BYTE + 1, SIZES) == once, "what is held in its place counts"
    assert chain(0, SIZES | {"wide": 10}) == once, "nothing is saved"
    assert chain(0, {name: size for name, size in SIZES.items() if name != "bn1"}) == once, "a size that isn't known"


def test_a_value_that_several_later_stages_read_waits() -> None:
    assert chain(0, SIZES, readers=2)[1] == (["bn1", "wide"], ["wide"])


def test_what_waits_anyway_costs_nothing() -> None:
    """Two convolutions and their concatenation, as in a DenseNet: the parts are read again later."""
    joins = [("ab", ("a", "b")), ("bn1", ("ab",)), ("c", ("bn1",)), ("abc", ("a", "b", "c")), ("bn2", ("abc",))]
    found = [("a", ("x",)), ("b", ("x",)), *joins]
    operations = [Operation(name, reads, (name,), work=0 if name in ("ab", "abc") else None) for name, reads in found]
    calls = [NormCall("bn1", "ab", 0), NormCall("bn2", "abc", 1)]
    cuts, _ = cut(operations, calls, {"a": 4, "b": 4, "ab": 8, "bn1": 8, "c": 4, "abc": 12, "bn2": 12, "x": 4})
    assert [(each.nodes, each.keeps) for each in cuts] == [(["a", "b", "ab"], ["a", "b"]), (["ab", "bn1", "c", "abc"], [])]


class Inverted(nn.Module):
    """Inverted residuals, then a dense block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(24, 3)
        self.down, self.block = inverted(2), inverted(1)
        self.dense = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(4 * i), nn.ReLU(), nn.Conv2d(4 * i, 4, 3, padding=1)) for i in (1, 2))
        self.turned = nn.Sequential(nn.ConvTranspose2d(12, 24, 2, stride=2), nn.BatchNorm2d(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.stem(x))
        x = x + self.block(x)
        for layer in self.dense:
            x = torch.cat([x, layer(x)], 1)
        return self.head(self.turned(x).relu().mean((2, 3)))


def inverted(stride: int) -> nn.Module:
    wide = nn.Sequential(nn.Conv2d(4, 24, 1), nn.BatchNorm2d(24), nn.ReLU6(), nn.Conv2d(24, 24, 3, stride, 1, groups=24))
    return nn.Sequential(*wide, nn.BatchNorm2d(24), nn.ReLU6(), nn.Conv2d(24, 4, 1), nn.BatchNorm2d(4))


def as_module() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return Inverted().eval(), [torch.randn(n, 3, 12, 11) for n in (3, 3, 2)]


def as_onnx() -> tuple[Any, Any]:
    net = Net("inverted")
    x = net.conv(net.input("N", 3, 12, 11), 3, 4)
    for stride in (2, 1):
        wide = net.relu(net.bn(net.conv(x, 4, 24, 1), 24))
        wide = net.relu(net.bn(net.conv(wide, 24, 24, groups=24, pads=1, strides=[stride] * 2), 24))
        narrow = net.bn(net.conv(wide, 24, 4, 1), 4)
        x = narrow if stride == 2 else net.op("Add", x, narrow)
    for i in (1, 2):
        x = net.op("Concat", x, net.conv(net.relu(net.bn(x, 4 * i)), 4 * i, 4, pads=1), axis=1)
    pooled = net.op("Flatten", net.op("GlobalAveragePool", net.bn(x, 12)))
    net.output(net.bn(net.gemm(pooled, 12, 30), 30))
    return ir.from_proto(net.model()), [{"x": normal(n, 3, 12, 11, dtype=np.float32)} for n in (3, 3, 2)]


@pytest.mark.parametrize("make", [as_module, as_onnx])
@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_what_runs_again_gives_the_same_and_holds_less(
    make: Callable[[], tuple[Any, Any]], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pointwise, "pays", lambda *_: False)
    held = {}
    statistics = {}
    for per_byte in (-1, stages.PER_BYTE):
        monkeypatch.setattr(stages, "PER_BYTE", per_byte)
        model, data = make()
        calibrated, report = bnfold.recalibrate(model, data, memory_budget=budget)
        held[per_byte] = report.held_bytes
        statistics[per_byte] = stored(calibrated)
    assert held[stages.PER_BYTE] < 0.7 * held[-1]
    assert statistics[-1].keys() == statistics[stages.PER_BYTE].keys()
    for name, array in statistics[-1].items():
        np.testing.assert_array_equal(statistics[stages.PER_BYTE][name], array, err_msg=name)


def stored(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    if isinstance(model, nn.Module):
        return {name: buffer.numpy() for name, buffer in model.named_buffers()}
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_what_runs_again_gives_the_same_in_other_types(dtype: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session may hand a half-precision value on unrounded; what waits is rounded."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    arrays = {"w": np.random.default_rng(1).normal(size=(24, 4, 1, 1))}
    for name in ("a", "b"):
        arrays |= {f"{name}{i}": np.full(24, i % 2) for i in range(1, 5)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"]),
        helper.make_node("BatchNormalization", ["y", "a1", "a2", "a4", "a3"], ["a"]),
        helper.make_node("BatchNormalization", ["a", "b1", "b2", "b4", "b3"], ["b"]),
    ]
    x, b = helper.make_tensor_value_info("x", dtype, ["n", 4, 9, 9]), helper.make_tensor_value_info("b", dtype, None)
    stored = [numpy_helper.from_array(array.astype(kind), name) for name, array in arrays.items()]
    proto = helper.make_model(helper.make_graph(nodes, "g", [x], [b], stored), opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    data = [{"x": (np.random.default_rng(2).normal(size=(3, 4, 9, 9)) + 100).astype(kind)}] * 2
    found = []
    for per_byte in (-1, stages.PER_BYTE):
        monkeypatch.setattr(stages, "PER_BYTE", per_byte)
        calibrated, _ = bnfold.recalibrate(ir.from_proto(proto), data)
        found.append({name: value.const_value.numpy() for name, value in calibrated.graph.initializers.items()})
    for name in ("a4", "a3", "b4", "b3"):
        np.testing.assert_allclose(
            found[0][name].astype(np.float64), found[1][name].astype(np.float64), rtol=1e-12, atol=1e-12, err_msg=name
        )


def test_methods_that_need_no_waiting_run_nothing_twice(staged: list[str]) -> None:
    model, data = as_onnx()
    bnfold.recalibrate(model, data, method="precise")
    assert staged
    assert len(staged) == len(set(staged))
