"""Networks whose inputs don't all have a sample axis: graphs go through whole, and what counts as a sample is no matter of order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from arrays import measure
from modules import Net, norm
from onnx import TensorProto, helper, numpy_helper
from opened import score
from torch import Tensor, nn

import bnfold
from bnfold.backends.open import open_model
from bnfold.data import InputSpec, as_batches
from bnfold.data.samples import fixed_size, sample_inputs
from bnfold.recalibration.methods import Prior
from bnfold.verbs.benchmark import bench

RNG = np.random.default_rng(0)
F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
Graph = tuple[np.ndarray, ...]


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def vector(n: int) -> np.ndarray:
    return RNG.random(n).astype(np.float32) + np.float32(0.5)


# --- graph networks, in both frameworks: the same weights, and what their BatchNorm sees ---------------------------------------

WEIGHT = normal(8, 4)


def neighbours(n: int) -> Graph:
    return normal(n, 4), RNG.integers(0, n, (n, 3))


def ends(n: int) -> Graph:
    return normal(n, 4), RNG.integers(0, n, 3 * n), RNG.integers(0, n, 3 * n)


def edges(n: int) -> Graph:
    return normal(n, 4), RNG.integers(0, n, (2, 3 * n))


def dense(n: int) -> Graph:
    return normal(n, 4), np.abs(normal(n, n))


Forward = Callable[..., Tensor]
GRAPHS: dict[str, tuple[Callable[[int], Graph], Forward, Callable[..., np.ndarray]]] = {
    "neighbours": (neighbours, lambda s, x, i: s.b(s.l(x[i].mean(1))).relu(), lambda x, i: x[i].mean(1) @ WEIGHT.T),
    "edges as vectors": (ends, lambda s, x, i, j: s.b(s.l(x[i] - x[j])).relu(), lambda x, i, j: (x[i] - x[j]) @ WEIGHT.T),
    "edges as rows": (edges, lambda s, x, e: s.b(s.l(x[e[0]] - x[e[1]])).relu(), lambda x, e: (x[e[0]] - x[e[1]]) @ WEIGHT.T),
    "a matrix": (dense, lambda s, x, a: (a @ s.b(s.l(a @ x))).relu(), lambda x, a: a @ (x @ WEIGHT.T)),
    "a matrix, once": (dense, lambda s, x, a: s.b(s.l(a @ x)).relu(), lambda x, a: a @ (x @ WEIGHT.T)),
    "summed by graph": (
        neighbours,
        lambda s, x, i: s.b(s.l(x[i].mean(1))).relu().mean(0, keepdim=True),
        lambda x, i: x[i].mean(1) @ WEIGHT.T,
    ),
}


def module(name: str) -> nn.Module:
    net = Net(GRAPHS[name][1], l=nn.Linear(4, 8, bias=False), b=norm(8, 1)).eval()
    with torch.no_grad():
        net.l.weight.copy_(torch.from_numpy(WEIGHT))
    return net


def onnx_neighbours(rows: tuple[str | None, str | None]) -> onnx.ModelProto:
    nodes = [("Gather", "x idx", "n", {}), ("ReduceMean", "n", "m", {"axes": [1], "keepdims": 0}), ("MatMul", "m W", "h", {})]
    nodes += [("BatchNormalization", "h s b mean var", "z", {}), ("Relu", "z", "y", {})]
    held = {"W": WEIGHT.T.copy(), "s": vector(8), "b": normal(8), "mean": normal(8), "var": vector(8)}
    inputs = {"x": (TensorProto.FLOAT, [rows[0], 4]), "idx": (TensorProto.INT64, [rows[1], 3])}
    return onnx_model(nodes, inputs, [rows[1], 8], held)


def onnx_model(nodes: Any, inputs: dict[str, Any], output: list[Any], held: dict[str, np.ndarray]) -> onnx.ModelProto:
    made = [helper.make_node(op, given.split(), [out], **attributes) for op, given, out, attributes in nodes]
    infos = [helper.make_tensor_value_info(name, *info) for name, info in inputs.items()]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, output)
    graph = helper.make_graph(made, "g", infos, [y], [numpy_helper.from_array(array, name) for name, array in held.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def found(model: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(model, nn.Module):
        return model.b.running_mean.numpy(), model.b.running_var.numpy()
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return arrays["mean"], arrays["var"]


def pooled(seen: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    every = np.concatenate(seen).astype(np.float64)
    return every.mean(0), every.var(0)


@pytest.mark.parametrize("method", ["exact", "precise"])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_several_sizes_are_pooled_as_one_list_of_nodes(name: str, method: str) -> None:
    make, _, seen = GRAPHS[name]
    graphs = [make(n) for n in (7, 9, 12)]
    want = pooled([seen(*graph) for graph in graphs])
    for options in ({}, {"batch_size": 2}):
        fresh, report = bnfold.recalibrate(module(name), graphs, method=method, **options)
        assert (report.samples, report.layers[0].count) == (3, sum(len(seen(*graph)) for graph in graphs))
        for one, other in zip(found(fresh), want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert any("each batch goes through as it is, and counts as one sample" in note for note in report.notes)
    assert bnfold.recalibrate(module(name), graphs[:1])[1].samples == 1


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_checked_as_it_was_given(name: str) -> None:
    graph = tuple(map(torch.from_numpy, GRAPHS[name][0](9)))
    net = module(name)
    fused, report = bnfold.fuse(net, example=graph)
    assert [layer.verdict for layer in report.layers] == ["folded"]
    assert report.verify.verdict == "equivalent"
    assert bnfold.verify(net, fused, [graph]).verdict == "equivalent"


@pytest.mark.parametrize("rows", [("N", "N"), ("N", "M"), (None, None)])
def test_graphs_in_onnx(rows: tuple[str | None, str | None]) -> None:
    model = onnx_neighbours(rows)
    graphs = [dict(zip(("x", "idx"), neighbours(n), strict=True)) for n in (7, 9, 12)]
    want = pooled([graph["x"][graph["idx"]].mean(1) @ WEIGHT.T for graph in graphs])
    for options in ({}, {"batch_size": 2}, {"method": "precise"}):
        fresh, report = bnfold.recalibrate(model, graphs, **options)
        assert (report.samples, report.layers[0].count) == (3, 28)
        for one, other in zip(found(fresh), want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    fused, report = bnfold.fuse(model, example=graphs[0])
    assert [layer.verdict for layer in report.layers] == ["folded"]
    assert bnfold.verify(model, fused, graphs).verdict == "equivalent"


def test_the_standard_error_is_that_of_graphs() -> None:
    graphs = [neighbours(n) for n in (7, 9, 12)]
    rows = [x[i].mean(1) @ WEIGHT.T for x, i in graphs]
    mean, _ = pooled(rows)
    n = np.array([len(each) for each in rows])[:, None]
    off = np.stack([each.mean(0) for each in rows]) - mean
    error = np.sqrt((n * n * off * off).sum(0) * 3 / 2) / n.sum()
    report = bnfold.recalibrate(module("neighbours"), graphs)[1]
    deviation = np.sqrt(pooled(rows)[1])
    assert report.layers[0].stderr == pytest.approx(float((error / deviation).max()), rel=1e-4)
    assert (error > measure(np.concatenate(rows)).standard_error()).any()  # nodes of one graph resemble each other, or don't


SEQUENCE = Net(lambda s, x: s.b(s.l(x.cumsum(0)).transpose(1, 2)), l=nn.Linear(4, 8), b=norm(8, 1))  # steps come first
CLOUD = Net(lambda s, x: s.b(s.l(x - x.mean(0))).relu(), l=nn.Linear(4, 8), b=norm(8, 1))


@pytest.mark.parametrize(("net", "batch"), [(SEQUENCE, normal(20, 3, 4)), (CLOUD, normal(20, 4))])
def test_one_input_whose_first_axis_counts_steps_or_points_is_not_cut(net: nn.Module, batch: np.ndarray) -> None:
    net.eval()
    with torch.no_grad():
        x = torch.from_numpy(batch)
        seen = net.l(x.cumsum(0)).transpose(1, 2) if net is SEQUENCE else net.l(x - x.mean(0))
    want = measure(seen.numpy())
    for data, options in ((batch, {}), (batch, {"batch_size": 4}), ([batch], {"batch_size": 4})):
        fresh, report = bnfold.recalibrate(net, data, **options)
        assert (report.samples, report.layers[0].count) == (1, want.count)
        np.testing.assert_allclose(found(fresh)[0], want.mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found(fresh)[1], want.variance(), rtol=1e-4)


def test_a_batchnorm_in_training_mode_makes_no_graph_of_samples() -> None:
    net = Net(lambda s, x: s.d(s.l(s.b(x))), l=nn.Linear(4, 8), b=norm(4, 1), d=nn.BatchNorm1d(8, track_running_stats=False)).eval()
    assert bnfold.recalibrate(net, normal(20, 4), freeze=True, batch_size=10)[1].samples == 20


def test_nodes_are_scored_with_their_graph() -> None:
    net = Net(lambda s, x, i: s.b(s.l(x[i].mean(1))), l=nn.Linear(4, 8), b=norm(8, 1)).eval()
    x, i = neighbours(30)
    wanted = net(torch.from_numpy(x), torch.from_numpy(i)).argmax(1).numpy()
    for data in ((x, i, wanted), as_batches((x, i, wanted), [spec("inputs_0", "n", 4), spec("inputs_1", "m", 3, kind=I64)])):
        scores = score(net, data, example=(x, i))
        assert scores is not None
        assert scores.right.all()


def test_a_graph_in_a_file(tmp_path: Path) -> None:
    onnx.save(onnx_neighbours(("N", "M")), tmp_path / "m.onnx")
    x, idx = neighbours(11)
    np.savez(tmp_path / "d.npz", x=x, idx=idx)
    code = "import sys; from bnfold.cli import run; sys.exit(run(sys.argv[1:]))"
    line = ["pipeline", "m.onnx", "--data", "d.npz", "--batch-size", "4", "-o", "p.onnx", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "counts as one sample" in done.stdout
    assert "equivalent, compared on" in done.stdout or '"verdict": "equivalent"' in done.stdout


# --- what holds no samples beside what does -------------------------------------------------------------------------------------


def scaled(order: tuple[str, str], first: Any = "K", batch: Any = "N") -> onnx.ModelProto:
    """x times a fed factor of one entry, then a BatchNorm."""
    inputs = {"k": (TensorProto.FLOAT, [first]), "x": (TensorProto.FLOAT, [batch, 3, 4, 4])}
    nodes = [("Mul", "x k", "z", {}), ("BatchNormalization", "z s b mean var", "y", {})]
    one, nought = np.ones(3, np.float32), np.zeros(3, np.float32)
    held = {"s": one, "b": nought, "mean": nought, "var": one}
    return onnx_model(nodes, {name: inputs[name] for name in order}, [batch, 3, 4, 4], held)


PICTURES = normal(64, 3, 4, 4) + 5


@pytest.mark.parametrize("first", ["K", None, 1])
@pytest.mark.parametrize("order", [("k", "x"), ("x", "k")])
def test_samples_are_those_of_the_inputs_that_hold_some(order: tuple[str, str], first: Any) -> None:
    model, k = scaled(order, first), np.ones(1, np.float32)
    for size in (1, 8, 63, 64):
        for batch_size in (None, 16):
            data = [{"k": k, "x": PICTURES[i : i + size]} for i in range(0, 64, size)]
            fresh, report = bnfold.recalibrate(model, data, method=Prior(strength=64), batch_size=batch_size)
            assert report.samples == 64
            np.testing.assert_allclose(found(fresh)[0], 0.5 * PICTURES.mean((0, 2, 3)), rtol=1e-5)
    assert bnfold.recalibrate(model, {"k": k, "x": PICTURES}, samples=20)[1].samples == 20


@pytest.mark.parametrize("order", [("k", "x"), ("x", "k")])
def test_a_fixed_batch_is_that_of_the_samples(order: tuple[str, str]) -> None:
    report = bnfold.recalibrate(scaled(order, 1, 8), {"k": np.ones(1, np.float32), "x": PICTURES})[1]
    assert (report.samples, report.layers[0].count) == (64, 64 * 16)


ANCHORED = Net(lambda s, x, a: s.b(s.l(x)).relu() @ a.t(), l=nn.Linear(4, 8), b=norm(8, 1))
MASKED = Net(lambda s, x, m: s.b(s.l(m @ x).transpose(1, 2)).relu(), l=nn.Linear(4, 8), b=norm(8, 1))


TIED = Net(lambda s, x, m: s.b(s.l((x @ x.transpose(1, 2) + m + m.t()) @ x).transpose(1, 2)).relu(), l=nn.Linear(4, 8), b=norm(8, 1))


@pytest.mark.parametrize(
    ("net", "samples", "other"),
    [
        (ANCHORED, normal(64, 4), normal(100, 8)),
        (MASKED, normal(64, 5, 4), np.abs(normal(5, 5))),  # as many rows as there are samples in a batch of 5
        (TIED, normal(64, 5, 4), normal(5, 5)),
    ],
)
def test_anchors_and_masks_are_no_samples(net: nn.Module, samples: np.ndarray, other: np.ndarray) -> None:
    net.eval()
    by_size = []
    for size in (4, 5, 16, 64):
        data = [(samples[i : i + size], other) for i in range(0, 64, size)]
        fresh, report = bnfold.recalibrate(net, data, method="prior")
        assert report.samples == 64
        by_size.append(found(fresh)[0])
    whole, report = bnfold.recalibrate(net, (samples, other), method="prior", batch_size=16)
    assert report.samples == 64
    for mean in (*by_size[1:], found(whole)[0]):
        np.testing.assert_allclose(mean, by_size[0], rtol=1e-4, atol=1e-5)


def test_words_beside_numbers_are_samples() -> None:
    net = Net(lambda s, x, i: s.b(s.l(x) + s.e(i)).relu(), l=nn.Linear(4, 8), e=nn.Embedding(30, 8), b=norm(8, 1)).eval()
    x, i = normal(40, 4), RNG.integers(0, 30, 40)
    data = (x, i)
    reports = [bnfold.recalibrate(net, data, batch_size=size)[1] for size in (4, 40)]
    assert [report.samples for report in reports] == [40, 40]
    assert reports[0].layers[0].stderr == pytest.approx(reports[1].layers[0].stderr)


def test_a_sample_of_several_rows_is_one_for_the_standard_error() -> None:
    """Words of a text, in a BatchNorm of rows: the error is that of texts, whatever the micro-batches."""
    net = Net(lambda s, x: s.b(s.l(x).flatten(0, 1)).relu(), l=nn.Linear(4, 8), b=norm(8, 1)).eval()
    texts = normal(24, 1, 4) + 0.1 * normal(24, 5, 4)
    seen = (torch.from_numpy(texts) @ net.l.weight.t() + net.l.bias).detach().numpy()
    want = measure(seen.transpose(0, 2, 1))
    for size in (1, 7, 24):
        report = bnfold.recalibrate(net, texts, batch_size=size)[1]
        assert (report.samples, report.layers[0].count) == (24, 120)
        assert report.layers[0].stderr == pytest.approx(float((want.standard_error() / np.sqrt(want.variance())).max()), rel=1e-4)


# --- the rule itself ------------------------------------------------------------------------------------------------------------


def spec(name: str, *shape: Any, kind: np.dtype[Any] = F32) -> InputSpec:
    return InputSpec(name, kind, shape)


def rows(f: Callable[..., Any]) -> Callable[..., dict[str, np.ndarray]]:
    def run(batch: Any) -> dict[str, np.ndarray]:
        try:
            return {"y": f(**batch)}
        except ValueError as error:  # as a runner says of data that don't fit
            raise bnfold.DataError(str(error)) from None

    return run


def test_what_a_trial_tells() -> None:
    x, y, points = normal(6, 2), normal(6, 2), np.array([0, 0, 1, 1, 2, 2])
    two = [spec("x", "n", 2), spec("y", "m", 2)]
    assert sample_inputs(two, {"x": x, "y": y}) == ({"x", "y"}, True)
    assert sample_inputs(two, {"x": x, "y": y[:5]}) == (set(), False)
    assert sample_inputs(two, {"x": x, "y": y[:5]}, rows(lambda x, y: x @ y.T)) == ({"x"}, True)
    assert sample_inputs(two, {"x": x, "y": y[:5]}, rows(lambda x, y: (x - x.mean(0)) @ y.T @ y)) == (set(), True)
    tree = [spec("x", "n", 2), spec("p", "n", kind=I64)]
    given = {"x": x, "p": points}
    assert sample_inputs(tree, given, rows(lambda x, p: x + x[np.minimum(p, len(x) - 1)])) == (set(), True)  # parents stand before children
    assert sample_inputs(tree, given, rows(lambda x, p: x + np.eye(3, 2)[p])) == ({"x", "p"}, True)
    assert sample_inputs(tree, given, rows(lambda x, p: x.sum(0))) == ({"x", "p"}, True)  # no output has rows
    assert sample_inputs(tree, given, rows(lambda x, p: x.sum(0)), sure=True) == (set(), True)
    with pytest.raises(bnfold.DataError, match="the numbers of samples differ: 'x' has 6, 'p' has 5; give as many of each"):
        sample_inputs(tree, {"x": x, "p": points[:5]})


def test_the_only_size_is_that_of_the_input_of_most_axes() -> None:
    picture, factor, anchors = spec("x", 8, 3, 4, 4), spec("k", 1), spec("a", 100, 4)
    for order in ([picture, factor, anchors], [factor, anchors, picture], [anchors, picture, factor]):
        assert fixed_size(order) == 8
    assert fixed_size([spec("x", 10, 4), spec("e", 2, 30, kind=I64)]) is None
    assert fixed_size([picture, spec("z", "n", 2)]) is None
    batches = list(as_batches([(normal(10, 4), np.zeros((2, 30), int))] * 2, [spec("x", 10, 4), spec("e", 2, 30, kind=I64)]))
    assert [batch.samples for batch in batches] == [1, 1]


def test_labels_of_nodes_go_along_whole() -> None:
    data = as_batches([(normal(5, 2), np.zeros((2, 9), int), np.arange(5))], [spec("x", "n", 2), spec("e", "m", "k", kind=I64)])
    ((batch, labels),) = data.labelled()
    assert batch.samples == 1
    assert labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("order", [("k", "x"), ("x", "k")])
def test_what_is_timed_says_how_many_samples_it_was(order: tuple[str, str]) -> None:
    for model, size in ((scaled(order), 5), (scaled(order, 1, 8), 8)):
        feeds = {"k": np.ones(1, np.float32), "x": PICTURES[:size]}
        assert bench(open_model(model), open_model(model), [feeds], rounds=2).batch_size == size
