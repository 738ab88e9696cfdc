"""Which integers a model's inputs take: random data stay within what they index, and reach all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import bnfold
from bnfold.backends.onnx.graph.ranges import inputs
from bnfold.data.random import random_feeds

TABLE = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
FLOAT, INT = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def node(op: str, reads: str, writes: str, **settings: Any) -> onnx.NodeProto:
    return helper.make_node(op, reads.split(), writes.split(), **settings)


def model(nodes: list[onnx.NodeProto], *, x: Any = None, shape: Any = ("N", 4), kind: int = INT, **arrays: Any) -> ir.Model:
    """Integers `i` go in, and with `x` floats of that shape beside them."""
    fed = [helper.make_tensor_value_info("i", kind, shape)]
    fed += [] if x is None else [helper.make_tensor_value_info("x", FLOAT, x)]
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in {"t": TABLE, **arrays}.items()]
    graph = helper.make_graph(nodes, "g", fed, [helper.make_tensor_value_info("y", FLOAT, None)], held)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


GATHER = node("Gather", "t j", "y")
LSTM = {"w": np.zeros((1, 12, 4), np.float32), "r": np.zeros((1, 12, 3), np.float32)}
TAKEN = {
    "a table": (model([node("Gather", "t i", "y")]), (-10, 9)),
    "a table behind a shift": (model([node("Add", "i two", "j"), GATHER], two=np.array(2)), (-12, 7)),
    "a table behind a difference": (model([node("Sub", "two i", "j"), GATHER], two=np.array(2)), (-7, 12)),
    "a table behind casts and views": (model([node("Cast", "i", "k", to=6), node("Flatten", "k", "j"), GATHER]), (-10, 9)),
    "bytes": (model([node("Cast", "i", "j", to=7), GATHER], kind=onnx.TensorProto.UINT8), (0, 9)),
    "two tables": (model([node("Gather", "t i", "a"), node("Gather", "u i", "b"), node("Add", "a b", "y")], u=TABLE[:6]), (-6, 5)),
    "a mask": (model([node("Cast", "i", "c", to=1), node("Mul", "c u", "y")], u=np.float32(2)), (0, 1)),
    "nodes of a graph": (model([node("Relu", "x", "h"), node("Gather", "h i", "y")], x=["n", 4], shape=[2, "e"]), (0, 15)),
    "classes": (model([node("OneHot", "i depth v", "y")], depth=np.array(7), v=np.array([0, 1], np.float32)), (-7, 6)),
    "what is compared": (model([node("Equal", "i five", "b"), node("Cast", "b", "y", to=1)], five=np.array(5)), (0, 6)),
    "elements": (model([node("GatherElements", "t i", "y", axis=1)], shape=[10, 3]), (-8, 7)),
}
TAKEN["lengths"] = (
    model([helper.make_node("LSTM", ["x", "w", "r", "", "i"], ["y"], hidden_size=3)], x=[6, "N", 4], shape=["N"], kind=6, **LSTM),
    (1, 6),
)


@pytest.mark.parametrize("name", TAKEN)
def test_integers_are_what_the_model_takes(name: str) -> None:
    made, ends = TAKEN[name]
    drawn = np.concatenate([random_feeds(inputs(made), batch=16, seed=seed)["i"].ravel() for seed in range(8)])
    assert (drawn.min(), drawn.max()) == ends


def test_a_shape_that_is_fed_is_one_that_fits() -> None:
    made = model([node("Reshape", "x i", "y")], x=["N", 4], shape=[2])
    assert random_feeds(inputs(made))["i"].tolist() == [0, -1]


def embedded(table: np.ndarray, *, twice: bool = False) -> ir.Model:
    """Rows of a table, and an activation, once or twice."""
    nodes = [node("Gather", "t i", "e"), node("MatMul", "e w", "h"), node("Relu", "h", "r")]
    w = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    return model([*nodes, node("Relu", "r", "y") if twice else node("Identity", "r", "y")], w=w, t=table)


def test_all_rows_of_a_table_are_read() -> None:
    wrong = TABLE.copy()
    wrong[5] += 3
    assert bnfold.verify(embedded(TABLE), embedded(TABLE, twice=True)).verdict == "equivalent"
    assert bnfold.verify(embedded(TABLE), embedded(wrong, twice=True)).verdict == "different"


torch = pytest.importorskip("torch")


class Rows(torch.nn.Module):
    def __init__(self, rows: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.table, self.rows = torch.nn.Embedding(10, 4), rows

    def forward(self, i: Any) -> Any:
        return self.rows(self.table, i)


TORCH: dict[str, tuple[Callable[[Any, Any], Any], tuple[int, int]]] = {
    "a table": (lambda table, i: table(i), (0, 9)),
    "a table behind a shift": (lambda table, i: table((i + 2).reshape(-1)), (-2, 7)),
    "a table that is indexed": (lambda table, i: table.weight[i], (-10, 9)),
    "a table that rows are picked from": (lambda table, i: table.weight.index_select(0, i.reshape(-1)), (0, 9)),
    "classes": (lambda table, i: torch.nn.functional.one_hot(i, 7).float(), (0, 6)),
    "a mask": (lambda table, i: table.weight.sum() * i.float(), (0, 1)),
    "what is compared": (lambda table, i: (i == 5).float(), (0, 6)),
}


@pytest.mark.parametrize("name", TORCH)
def test_integers_are_what_a_module_takes(name: str) -> None:
    from bnfold.backends.torch.export.trace import trace

    rows, ends = TORCH[name]
    specs = trace(Rows(rows).eval(), torch.zeros(2, 3, dtype=torch.int64)).specs
    drawn = np.concatenate([random_feeds(specs, batch=16, seed=seed)["i"].ravel() for seed in range(8)])
    assert (drawn.min(), drawn.max()) == ends


def test_integers_are_what_both_models_take(tmp_path: Any) -> None:
    net = Rows(lambda table, i: table(i)).eval()
    example = torch.zeros(2, 3, dtype=torch.int64)
    torch.onnx.export(net, (example,), tmp_path / "net.onnx", dynamo=False, input_names=["i"], dynamic_axes={"i": {0: "N"}})
    assert bnfold.verify(bnfold.load(tmp_path / "net.onnx"), net).verdict == "equivalent"  # which takes no negative ones
