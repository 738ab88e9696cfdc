"""What `verify` says where a pair can't be judged, or not in the usual way."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
from cases import Net
from networks import as_max, folded, model, small, weights
from onnx import helper, numpy_helper
from opened import verify

import bnfold


def test_a_network_that_answers_a_constant():
    w = weights("residual")
    w["y.weight"] = 0 * w["y.weight"]
    reference, right = model("residual", w), folded("residual", w)
    assert verify(reference, model("residual", right)).verdict == "equivalent"  # its coefficients say so
    report = verify(reference, model("residual", right, edit=as_max("node_sum_relu")))
    assert report.levels.coefficients.verdict == "skipped"
    assert (report.verdict, report.reason) == (
        "inconclusive",
        "nothing was exercised: the reference answers the same whatever it is fed",
    )
    right["stem.weight"][0] *= 1.1
    assert verify(reference, model("residual", right)).verdict == "different"


def test_a_network_that_answers_a_constant_without_its_dead_channels():
    net = Net("all channels are dead")
    y = net.gemm(net.input("N", 5), 5, 3)
    params = net.bn_params(3)
    net.initializers[2].raw_data = bytes(12)
    net.output(net.op("Add", net.op("MatMul", net.bn(y, params=params), net.matrix(3, 4)), net.bias(4)))
    fused, report = bnfold.fuse(net.model(), drop_dead=True)
    assert report.dropped[0].dropped == 2
    assert bnfold.verify(net.model(), fused).verdict == "equivalent"


def test_both_sides_nan():
    w = weights("tabular")
    w["y.bias"][:] = np.nan
    report = verify(model("tabular", w), model("tabular", folded("tabular", w)))
    assert (report.verdict, report.reason) == ("inconclusive", "all outputs of both models are NaN or infinite")


def test_a_model_that_differs_from_itself():
    def noisy(nodes):
        nodes[-1].output[0] = "inner"
        nodes.append(helper.make_node("RandomNormalLike", ["inner"], ["noise"]))
        nodes.append(helper.make_node("Add", ["inner", "noise"], ["y"]))

    w = weights("tabular")
    report = verify(model("tabular", w, edit=noisy), model("tabular", folded("tabular", w), edit=noisy))
    assert (report.verdict, report.reason) == ("inconclusive", "the reference differs from itself between two runs, in output y")


def test_empty_outputs():
    nodes = [helper.make_node("Slice", ["x", "none", "none"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "empty",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([0]), "none")],
    )
    nothing = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))
    report = verify(nothing, nothing)
    assert (report.verdict, report.reason) == ("inconclusive", "all outputs are empty")


def with_own_operator(nodes, domain="com.microsoft", op="Trilu"):
    next(n for n in nodes if n.name == "node_first_relu").op_type = op
    next(n for n in nodes if n.name == "node_first_relu").domain = domain


def test_noise_floor_where_the_oracle_lacks_an_operator():
    def imported(w):
        made = model("tabular", w, edit=with_own_operator)
        made.opset_imports["com.microsoft"] = 1
        return made

    for seed in range(4):
        w = weights("tabular", seed)
        report = verify(imported(w), imported(folded("tabular", w)), seed=seed)
        assert report.verdict == "equivalent"
        assert report.levels.function.reason.startswith("by the noise of the stored type, since the float64 oracle lacks the operator")
        wrong = folded("tabular", w)
        wrong["second.bias"][0] += 1e-2
        assert verify(imported(w), imported(wrong), seed=seed).levels.function.verdict == "different"


def test_inconclusive_where_nothing_can_run_the_model():
    def imported(w):
        made = model("tabular", w, edit=lambda nodes: with_own_operator(nodes, "nobody.knows", "Mystery"))
        made.opset_imports["nobody.knows"] = 1
        return made

    w = weights("tabular")
    report = verify(imported(w), imported(folded("tabular", w)))
    assert report.verdict == "inconclusive"
    assert "Mystery" in report.reason
    assert report.levels.coefficients.verdict == "equivalent"
    assert {row.verdict for row in report.levels.deployment} == {"skipped"}


def test_opset_6_is_judged_without_a_runtime():
    rng = np.random.default_rng(0)
    w, s = rng.normal(size=(4, 3, 1, 1)), rng.uniform(0.5, 1.5, 4)
    arrays = {"w": w, "s": s, "t": rng.normal(size=4), "m": rng.normal(size=4), "v": np.ones(4)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", "s", "t", "m", "v"], ["y"], name="bn", epsilon=0.0, is_test=1),
    ]
    shapes = {"x": (2, 3, 5, 5)}, {"y": (2, 4, 5, 5)}
    reference = small(nodes, arrays, *shapes, opset=6)
    node = [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv")]
    stored = {name: array.astype(np.float32).astype(np.float64) for name, array in arrays.items()}
    right = {"w": stored["w"] * stored["s"].reshape(4, 1, 1, 1), "b": stored["t"] - stored["m"] * stored["s"]}
    report = verify(reference, small(node, right, *shapes, opset=6))
    assert report.verdict == "equivalent"
    assert {row.verdict for row in report.levels.deployment} == {"skipped"}
    right["b"][3] += 1e-3
    assert verify(reference, small(node, right, *shapes, opset=6)).verdict == "different"


def test_a_defect_shows_where_the_reference_itself_overflows_in_its_stored_type():
    w = weights("tabular", dtype=np.float16)
    w["y.weight"] = np.full_like(w["y.weight"], 60000.0)
    right = folded("tabular", w)
    assert verify(model("tabular", w), model("tabular", right)).verdict == "inconclusive"
    right["second.bias"][0] += np.float16(0.5)
    assert verify(model("tabular", w), model("tabular", right)).verdict == "different"


# --- what level 1 couldn't compare, and no data reached -----------------------------------------------------------------------------

TABLE, W = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((10, 8), (8, 8)))


def looked_up(table, *, again=False):
    """Rows of a table, a product and an activation; `again` with another one, which changes nothing but the form."""
    nodes = [helper.make_node("Gather", ["t", "i"], ["e"], name="rows"), helper.make_node("MatMul", ["e", "w"], ["h"])]
    return built(nodes, [("i", onnx.TensorProto.INT64, ["N", 4])], again=again, t=table, w=W)


def gated(second, *, again=False):
    """Two products with an activation between them, of which channel 1 never opens."""
    bias = np.array([0, -1000, 0, 0, 0, 0, 0, 0], np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"], name="gate"),
        *([helper.make_node("Relu", ["r"], ["r2"])] if again else []),
        helper.make_node("MatMul", ["r2" if again else "r", "v"], ["h"]),
    ]
    return built(nodes, [("x", onnx.TensorProto.FLOAT, ["N", 8])], again=again, w=W, b=bias, v=second)


def chosen(factor, *, again=False):
    """A branch that is never taken, for the largest of many numbers is positive."""
    y = [helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, None)]
    factors = [numpy_helper.from_array(np.array(factor, np.float32), "f")]
    other = helper.make_graph([helper.make_node("Mul", ["a", "f"], ["t"])], "other", [], y, factors)
    taken = helper.make_graph([helper.make_node("Neg", ["a"], ["t"])], "taken", [], y)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["h"], name="branch", then_branch=taken, else_branch=other),
    ]
    return built(nodes, [("x", onnx.TensorProto.FLOAT, ["N", 8])], again=again, w=W, zero=np.array(0, np.float32))


def built(nodes, inputs, *, again, **arrays):
    names = ["h", "s", "y"] if again else ["h", "y"]
    ends = [helper.make_node("Abs", [a], [b]) for a, b in itertools.pairwise(names)]
    graph = helper.make_graph(
        [*nodes, *ends],
        "g",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


def test_rows_that_no_data_read():
    ids = np.random.default_rng(1).choice([0, 1, 2, 3, 4, 6, 7, 8, 9], (16, 4))
    wrong = TABLE.copy()
    wrong[5] += 3
    report = verify(looked_up(TABLE), looked_up(wrong, again=True), [{"i": ids}])
    assert (report.verdict, "nothing read row 5 of the table of Gather rows" in report.reason) == ("inconclusive", True)
    assert verify(looked_up(TABLE), looked_up(TABLE, again=True), [{"i": ids}]).verdict == "equivalent"  # its coefficients say so


def test_a_channel_that_never_opens():
    wrong = W.copy()
    wrong[1] += 1
    report = verify(gated(W), gated(wrong, again=True))
    assert (report.verdict, "channel 1 of Relu gate never opened" in report.reason) == ("inconclusive", True)
    assert verify(gated(W), gated(W)).levels.coefficients.verdict == "equivalent"
    assert verify(gated(W), gated(wrong)).verdict == "different"


def test_a_branch_that_is_never_taken():
    report = verify(chosen(2), chosen(3, again=True))
    assert (report.verdict, "the condition of If branch was always True" in report.reason) == ("inconclusive", True)
    assert verify(chosen(2), chosen(2, again=True)).verdict == "equivalent"
    assert verify(chosen(2), chosen(3)).verdict == "different"
