"""BatchNorms that a file writes out as arithmetic with constants: `inspect` counts them, by the root of the variance that scales."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import Net
from cases.builder import Value
from compare import difference, feeds, run_double

import bnfold

FORMS = ("divided", "by rsqrt", "by a power", "without epsilon", "laid out anew")


def written(net: Net, x: Value, form: str, shape: tuple[int, ...] = (6, 1, 1)) -> Value:
    """gamma * (x - mean) / sqrt(var + epsilon) + beta, as exporters write it."""
    gamma, beta, mean, var = (net.weight(a.reshape(shape)) for a in (net.normal(6), net.normal(6), net.normal(6), net.rng.uniform(1, 2, 6)))
    if form == "laid out anew":
        var = net.reshape(net.weight(net.rng.uniform(1, 2, 6)), *shape)
    spread = var if form == "without epsilon" else net.op("Add", net.scalar(1e-3), var)
    root = net.op("Pow", spread, net.scalar(0.5)) if form == "by a power" else net.op("Sqrt", spread)
    if form == "by rsqrt":
        scale = net.op("Mul", net.op("Reciprocal", root), gamma)
        return net.op("Add", net.op("Mul", x, scale), net.op("Sub", beta, net.op("Mul", mean, scale)))
    return net.op("Add", net.op("Mul", net.op("Div", net.op("Sub", x, mean), root), gamma), beta)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("behind", ["conv", "matmul"])
def test_it_is_counted_and_folds(form: str, behind: str) -> None:
    net = Net(f"{form} {behind}", dtype="float64")
    if behind == "conv":
        net.output(written(net, net.conv(net.input("N", 4, 8, 8), 4, 6), form))
    else:
        net.output(written(net, net.op("MatMul", net.input("N", 4), net.matrix(4, 6)), form, (6,)))
    model = net.model()
    report = bnfold.inspect(model)
    assert (report.batchnorms.before, report.batchnorms.after) == (1, 0)
    assert [layer.notes for layer in report.layers if layer.batchnorm] == [("written out as arithmetic",)]
    fused, _ = bnfold.fuse(model)
    assert difference(run_double(model, feeds(model)), run_double(fused, feeds(model))) < 1e-12


def test_one_that_stays_is_told_with_its_reason(tmp_path: Path) -> None:
    net = Net("stays")
    net.output(written(net, net.op("Sigmoid", net.input("N", 6, 4, 4)), "by rsqrt"))
    bnfold.save(net.model(), tmp_path / "m.onnx")
    (layer,) = bnfold.inspect(net.model()).layers
    assert (layer.verdict, layer.channels) == ("kept", 6)
    assert "Sigmoid" in layer.reason
    command = [sys.executable, "-m", "bnfold", "fuse", "m.onnx", "-o", "out.onnx", "--strict"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1


@pytest.mark.parametrize("form", ["multiplied by the root", "divided by its inverse", "divided by a negative power"])
def test_what_undoes_the_scale_of_a_batchnorm_is_none(form: str) -> None:
    """As quantised layers do that simulate a fold while they train."""
    net = Net(form)
    var = net.op("Add", net.weight(net.rng.uniform(1, 2, (6, 1, 1))), net.scalar(1e-3))
    root = net.op("Sqrt", var)
    if form == "multiplied by the root":
        y = net.op("Mul", net.conv(net.input("N", 4, 8, 8), 4, 6), root)
    elif form == "divided by its inverse":
        y = net.op("Div", net.conv(net.input("N", 4, 8, 8), 4, 6), net.op("Div", net.weight(net.normal(6, 1, 1)), root))
    else:
        y = net.op("Div", net.conv(net.input("N", 4, 8, 8), 4, 6), net.op("Pow", var, net.scalar(-0.5)))
    net.output(net.bn(y, 6))
    assert bnfold.inspect(net.model()).batchnorms.before == 1


def test_other_roots_make_no_batchnorm() -> None:
    """A layer norm, whose variance is computed; the length of a weight; a number."""
    net = Net("roots")
    x = net.input("N", 4)
    d = net.op("Sub", x, net.reduce("Mean", x, 1))
    y = net.op("Div", d, net.op("Sqrt", net.op("Add", net.reduce("Mean", net.op("Mul", d, d), 1), net.scalar(1e-3))))
    v = net.matrix(4, 6)
    length = net.op("Sqrt", net.op("Add", net.op("ReduceSum", net.op("Mul", v, v), net.ints(0)), net.scalar(1e-9)))
    y = net.op("Mul", net.op("MatMul", y, v), net.op("Div", net.weight(np.ones((1, 6))), length))
    net.output(net.op("Div", y, net.op("Sqrt", net.scalar(6.0))))
    report = bnfold.inspect(net.model())
    assert report.batchnorms.before == 0
    assert not [layer for layer in report.layers if layer.batchnorm]
