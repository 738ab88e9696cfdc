"""Two networks operator by operator: what folded, merged and differs is marked, and every layer's error is that of its values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from cases.builder import Net
from onnx import helper, numpy_helper

import bnfold
from bnfold.report import VerifyReport

DATA = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)


def branches() -> onnx.ModelProto:
    """x -> conv_a -> bn_a -+-> add -> relu -> y, and conv_b -> bn_b beside conv_a: one convolution when folded."""
    rng = np.random.default_rng(1)
    arrays = {"wa": rng.standard_normal((4, 3, 3, 3)), "wb": rng.standard_normal((4, 3, 1, 1))}
    for bn in "ab":
        arrays |= {f"{name}{bn}": rng.uniform(0.5, 1.5, 4) for name in ("gamma", "beta", "mean", "var")}
    nodes = [
        helper.make_node("Conv", ["x", "wa"], ["ca"], "conv_a", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "wb"], ["cb"], "conv_b"),
    ]
    for bn in "ab":
        inputs = [f"c{bn}", *(f"{name}{bn}" for name in ("gamma", "beta", "mean", "var"))]
        nodes.append(helper.make_node("BatchNormalization", inputs, [f"n{bn}"], f"bn_{bn}"))
    nodes += [helper.make_node("Add", ["na", "nb"], ["s"], "add"), helper.make_node("Relu", ["s"], ["y"], "relu")]
    values = [helper.make_tensor_value_info("x", 1, ["N", 3, 8, 8]), helper.make_tensor_value_info("y", 1, ["N", 4, 8, 8])]
    stored = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def compared(candidate: onnx.ModelProto) -> VerifyReport:
    return bnfold.verify(branches(), candidate, [DATA], by_layer=True)


def test_what_became_of_each_operator() -> None:
    fused, _ = bnfold.fuse(branches())
    rows = {row.reference: row for row in compared(fused).graph}
    marks = {name: (row.candidate, row.mark, row.note) for name, row in rows.items()}
    assert marks["conv_a"] == ("conv_a", "holds", "bn_a")
    assert marks["bn_a"] == (None, "folded", "conv_a")
    assert marks["conv_b"] == marks["add"] == (None, "merged", "conv_a")
    assert marks["bn_b"][:2] == (None, "folded")
    assert marks["relu"] == ("relu", "same", "")
    order = [row.reference for row in compared(fused).graph]
    assert [order[i] for i in rows["add"].reads] == ["bn_a", "bn_b"]
    assert [order[i] for i in rows["relu"].candidate_reads] == ["conv_a"]


def test_what_differs_is_marked_where_it_begins() -> None:
    fused, _ = bnfold.fuse(branches())
    weight = next(each for each in fused.graph.initializer if each.dims[:] == [4, 3, 3, 3])
    array = numpy_helper.to_array(weight).copy()
    array[2] *= 1.01
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    report = compared(fused)
    assert report.verdict == "different"
    assert [row.reference for row in report.graph if row.mark == "differs"] == ["conv_a"]
    assert all(each.candidate > 1000 * each.reference for each in report.layers)


def test_errors_are_those_of_the_values() -> None:
    """Of the last layer they can be worked out from the model's outputs."""
    fused, _ = bnfold.fuse(branches())
    report = compared(fused)
    want = exact(branches())
    last = report.layers[-1]
    assert last.name == "relu"
    for model, found in ((branches(), last.reference), (fused, last.candidate)):
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings(), providers=["CPUExecutionProvider"])
        got = session.run(None, {"x": DATA})[0].astype(np.float64)
        assert found == pytest.approx(np.sqrt(np.square(got - want).mean() / np.square(want).mean()), rel=1e-3)


def settings() -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return made


def exact(model: onnx.ModelProto) -> np.ndarray:
    """The output by numpy, in float64."""
    stored = {each.name: numpy_helper.to_array(each).astype(np.float64) for each in model.graph.initializer}
    x = DATA.astype(np.float64)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    values = {"a": np.einsum("nchwij,ocij->nohw", windows, stored["wa"]), "b": np.einsum("nchw,oc->nohw", x, stored["wb"][:, :, 0, 0])}
    total = 0.0
    for bn, value in values.items():
        gamma, beta, mean, var = (stored[f"{name}{bn}"][:, None, None] for name in ("gamma", "beta", "mean", "var"))
        total = total + gamma * (value - mean) / np.sqrt(var + 1e-5) + beta
    return np.maximum(total, 0.0)


def test_why_a_layer_has_no_error_is_said() -> None:
    """ONNX Runtime has no convolution in float64."""
    net = Net("in float64", dtype="float64")
    net.output(net.bn(net.conv(net.input("N", 3, 6, 6), 3, 4), 4))
    report = bnfold.fuse(net.model(), by_layer=True)[1].verify
    assert report is not None
    assert report.layers == ()
    assert any(note.startswith("errors aren't told layer by layer: ") for note in report.notes)


def test_moved_scales_are_no_errors() -> None:
    net = Net("equalised")
    net.output(net.conv(net.op("Relu", net.bn(net.conv(net.input("N", 3, 6, 6), 3, 4), 4)), 4, 3))
    report = bnfold.fuse(net.model(), by_layer=True, equalise=True)[1].verify
    assert report is not None
    assert (report.layers, report.verdict) == ((), "equivalent")
    assert "errors aren't told layer by layer: scales were moved between layers" in report.notes[0]


def test_without_being_asked_nothing_is_compared_by_layer(digits: Path) -> None:
    model = bnfold.load(digits)
    report = bnfold.verify(model, bnfold.fuse(model)[0])
    assert (report.layers, report.graph) == ((), ())
    assert "graph" not in report.to_dict()
