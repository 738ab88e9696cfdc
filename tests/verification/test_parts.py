"""A batch that a model fixes is compared a few rows at a time, where each is computed by itself, and only there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from cases.builder import Net
from torch import nn

import bnfold

BATCH, FIXED = 400, (400, 3, 12, 12)
AT_A_TIME = "rows at a time"


def flat(net, x):
    return net.gemm(net.reshape(net.reduce("Mean", x, 2, 3), BATCH, 8), 8, 5)


# What a network ends in, and whether its rows are known to be samples.
ENDS = {
    "sizes that name the batch": (flat, True),
    "a class token": (
        lambda net, x: net.op(
            "Concat",
            net.op("Expand", net.weight(net.normal(1, 1, 8)), net.ints(BATCH, 1, 8)),
            net.transpose(net.reshape(x, BATCH, 8, -1), 0, 2, 1),
            axis=1,
        ),
        True,
    ),
    "a softmax over the rows": (lambda net, x: net.op("Softmax", flat(net, x), axis=0), False),
    "less the mean of the rows": (lambda net, x: net.op("Sub", x, net.reduce("Mean", x, 0)), False),
    "a constant of as many rows": (lambda net, x: net.op("Mul", x, net.weight(net.normal(BATCH, 1, 1, 1))), False),
    "only some rows": (lambda net, x: net.slice(x, 0, 100, BATCH), False),
    "rows in another order": (lambda net, x: net.slice(x, 0, -1, -BATCH - 1, -1), False),
    "rows joined": (lambda net, x: net.reshape(x, BATCH // 2, 16, -1), False),
    "the mean of all": (lambda net, x: net.reduce("Mean", x, 0, 1, 2, 3), False),
}


def network(end):
    net = Net(end)
    x = net.relu(net.bn(net.conv(net.input(*FIXED), 3, 8, 3), 8))
    net.output(ENDS[end][0](net, x))
    return net.model()


@pytest.mark.parametrize("end", ENDS)
def test_rows_of_a_fixed_batch(end):
    model, parts = network(end), ENDS[end][1]
    fused, report = bnfold.fuse(model)
    assert report.verify is not None
    assert report.verify.verdict == "equivalent"
    assert report.verify.samples == (2 if parts else BATCH)
    assert (AT_A_TIME if parts else "compared whole") in report.verify.notes[-1]
    assert fused.graph.input[0] == model.graph.input[0]  # what is written takes what it took


@pytest.mark.parametrize("end", ["a softmax over the rows", "sizes that name the batch"])
def test_an_example_of_a_fixed_batch(end):
    example = [np.random.default_rng(0).normal(size=FIXED).astype(np.float32)]
    _, report = bnfold.fuse(network(end), example=example)
    assert (report.verify.verdict, report.verify.samples) == ("equivalent", 2 if ENDS[end][1] else BATCH)


def test_sizes_that_the_file_leaves_open():
    net = Net("open")
    net.output(net.relu(net.bn(net.conv(net.input(BATCH, 3, "H", "W"), 3, 8, 3), 8)))
    model = net.model()
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    assert bnfold.fuse(model)[1].verify.samples == 2


def test_a_name_that_is_taken():
    model = network("sizes that name the batch")
    told = next(node for node in model.graph.node if node.op_type == "Reshape")
    model.graph.initializer.add(name=f"{told.output[0]}:sizes", data_type=1, dims=[1], float_data=[1.0])
    _, report = bnfold.fuse(model)
    assert report.verify.samples == 2


def test_parts_and_their_data():
    model = network("sizes that name the batch")
    fused, _ = bnfold.fuse(model)
    whole = bnfold.verify(model, fused, [np.random.default_rng(0).normal(size=FIXED).astype(np.float32)])
    assert (whole.verdict, whole.samples) == ("equivalent", 32)
    assert any("batch of 400 that the model fixes was compared 4 rows at a time" in note for note in whole.notes)
    wrong = ir.from_proto(fused)
    weight = next(v for v in wrong.graph.initializers.values() if v.const_value.shape == (8, 3, 3, 3))
    array = weight.const_value.numpy().copy()
    array[3] *= 1.01
    weight.const_value = ir.tensor(array, name=weight.name)
    found = bnfold.verify(model, ir.to_proto(wrong))
    assert (found.verdict, found.difference.channel) == ("different", 3)


class Network(nn.Module):
    def __init__(self, over_rows):
        super().__init__()
        self.conv, self.bn, self.over_rows = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), over_rows
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3)).view(x.shape[0], -1)
        return x.softmax(0) if self.over_rows else x.softmax(1)


@pytest.mark.parametrize("over_rows", [False, True])
def test_rows_of_a_program(over_rows):
    torch.manual_seed(0)
    program = torch.export.export(Network(over_rows).eval(), (torch.randn(FIXED),))
    fused, report = bnfold.fuse(program)
    assert (report.verify.verdict, report.verify.samples) == ("equivalent", BATCH if over_rows else 2)
    assert fused.example_inputs[0][0].shape == FIXED
