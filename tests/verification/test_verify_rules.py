"""What `verify` says of pairs that once misled it, or that only its words tell apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from cases.builder import Net
from networks import as_max, folded, model, small, weights
from onnx import helper, numpy_helper
from opened import verify

import bnfold
from bnfold.backends.onnx.model import OnnxModel
from bnfold.cli import run
from bnfold.verification.coefficients import correspond

ROOT = Path(__file__).resolve().parents[2]

# --- coefficients in half precision ---------------------------------------------------------------------------------------------


def test_one_layers_error_is_no_other_form_of_the_function():
    """A variance of 32/31 in one layer shifts its outputs by less than half-precision weights explain, but nothing undoes it."""
    w = weights("decoder", dtype=np.float16)
    wrong = dict(w, **{"up_bn.var": (w["up_bn.var"] * 32 / 31).astype(np.float16)})
    report = verify(model("decoder", w), model("decoder", folded("decoder", wrong)))
    assert (report.verdict, report.first_difference) == ("different", "node_up")
    assert report.levels.coefficients.verdict == "different"


def depthwise(seed: int, arithmetic: Any, channel: int | None = None) -> tuple[ir.Model, ir.Model]:
    """A depthwise convolution with 9 numbers a channel in float16, and its fold worked out in `arithmetic`; one channel off by 1e-3."""
    rng = np.random.default_rng(seed)
    n = 32
    arrays = {
        "w": rng.normal(0, 0.5, (n, 1, 3, 3)),
        "gamma": rng.uniform(0.5, 1.5, n),
        "beta": rng.normal(size=n),
        "mean": rng.normal(size=n),
        "var": rng.uniform(0.5, 2, n),
    }
    arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
    a = {name: array.astype(arithmetic) for name, array in arrays.items()}
    s = (a["gamma"] / np.sqrt(a["var"] + arithmetic(1e-5))).astype(arithmetic)
    right = {"w": a["w"] * s.reshape(n, 1, 1, 1), "b": a["beta"] - a["mean"] * s}
    if channel is not None:
        right["w"][channel] *= arithmetic(1.001)
    conv = {"pads": [1] * 4, "group": n}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", **conv),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y"], name="bn", epsilon=1e-5),
    ]
    after = [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", **conv)]
    return _half(nodes, arrays, n), _half(after, {k: v.astype(np.float16) for k, v in right.items()}, n)


def _half(nodes: list[Any], arrays: dict[str, np.ndarray], channels: int) -> ir.Model:
    kind = onnx.TensorProto.FLOAT16
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("x", kind, ["N", channels, 6, 6])],
        [helper.make_tensor_value_info("y", kind, ["N", channels, 6, 6])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


def plans(*models: ir.Model) -> list[Any]:
    return [OnnxModel(m).plan() for m in models]


@pytest.mark.parametrize("channel", [0, 13, 31])
def test_a_channel_that_is_off_by_two_roundings_stands_out_among_others_rounded_once(channel):
    found = correspond(*plans(*depthwise(channel, np.float64, channel)))
    assert found.worst < 4
    assert f"(channel {channel}), where the other channels are within 1" in found.report().reason
    assert verify(*depthwise(channel, np.float32, channel)).verdict == "different"


@pytest.mark.parametrize("arithmetic", [np.float16, np.float32, np.float64])
def test_no_channel_of_a_right_fold_stands_out_whatever_it_was_worked_out_in(arithmetic):
    for seed in range(150):
        found = correspond(*plans(*depthwise(seed, arithmetic)))
        assert found.report().verdict == "equivalent", seed


def test_units_of_roundoff_are_told_from_another_form_in_bfloat16():
    """1 % is a unit or two there: no proof that scales were moved."""
    from bnfold.verification.coefficients import ANOTHER_FORM, ANOTHER_FORM_UNITS

    assert float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps) / 2 * ANOTHER_FORM_UNITS > 10 * ANOTHER_FORM


@pytest.mark.parametrize("wrong", [0.0, 0.01])
def test_a_weight_that_is_cast_counts_as_rounded_where_it_is_stored(wrong):
    """ONNX Runtime's own form: weights in float16, cast to float32, in which it computes; one of them is below float16's normal range."""
    rng = np.random.default_rng(0)
    w, gamma, var = rng.normal(size=(8, 3, 3, 3)), rng.uniform(0.5, 2, 8), rng.uniform(0.5, 2, 8)
    w[3, 1, 1, 1] = 9e-7
    w = w.astype(np.float16)
    gamma, var = gamma.astype(np.float32), var.astype(np.float32)
    scale = gamma / np.sqrt(var.astype(np.float64) + 1e-5)
    fused = w * scale[:, None, None, None]
    fused[5] *= 1 + wrong
    zeros = np.zeros(8, np.float32)

    def network(weight: np.ndarray, *statistics: np.ndarray) -> ir.Model:
        nodes = [helper.make_node("Cast", ["w"], ["cast"], to=onnx.TensorProto.FLOAT), helper.make_node("Conv", ["x", "cast"], ["y"])]
        arrays = {"w": weight.astype(np.float16)}
        if statistics:
            nodes[1].output[0] = "c"
            nodes.append(helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y"]))
            arrays |= dict(zip(("gamma", "beta", "mean", "var"), statistics, strict=True))
        x, y = (
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", c, *hw])
            for name, c, hw in (("x", 3, (8, 8)), ("y", 8, (6, 6)))
        )
        graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(array, name) for name, array in arrays.items()])
        return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))

    found = bnfold.verify(network(w, gamma, zeros, zeros, var), network(fused))
    coefficients = found.levels.coefficients
    assert (found.verdict, coefficients.verdict) == (("different",) * 2 if wrong else ("equivalent",) * 2), found.reason
    assert wrong or coefficients.worst <= 1.01


@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_that_is_cast_down_counts_as_rounded_by_the_cast(turned):
    """Stored in float64, computed in float32."""
    w = np.random.default_rng(0).normal(size=(8, 3, 3, 3))
    w = w.astype(np.float32) if turned else w
    models = []
    for kind in (np.float32, np.float64):
        net = Net("cast down", opset=17)
        stored = net.constant(w.astype(kind), "w")
        net.output(net.relu(net.op("Conv", net.input("n", 3, 8, 8), stored if kind is np.float32 else net.op("Cast", stored, to=1))))
        models.append(ir.from_proto(net.model()))
    found = bnfold.verify(*(models[::-1] if turned else models))
    assert found.levels.coefficients.worst <= 1.01, found.reason
    assert found.verdict == "equivalent", found.reason


# --- recalibrated, unfolded, folded by others -----------------------------------------------------------------------------------


def recalibrated(w):
    return {name: (array * 1.05 + 0.02).astype(array.dtype) if name.endswith((".mean", ".var")) else array for name, array in w.items()}


def test_a_recalibrated_model_is_told_from_a_wrong_fold():
    w = weights("residual")
    report = verify(model("residual", w), model("residual", recalibrated(w)))
    assert report.verdict == "different"
    assert report.reason.startswith("the statistics differ in 3 of 3 BatchNorms, and nothing else does: a recalibration, not a defect")
    w2 = recalibrated(w)
    w2["y.weight"] = w2["y.weight"] + np.float32(0.01)
    assert "recalibration" not in verify(model("residual", w), model("residual", w2)).reason


def test_a_fold_of_a_recalibrated_model_is_too():
    w = weights("residual")
    report = verify(model("residual", w), model("residual", folded("residual", recalibrated(w))))
    assert report.verdict == "different"
    assert "the statistics or the epsilons seem to differ in 3 layers" in report.reason
    one = dict(w, **{"stem_bn.var": (w["stem_bn.var"] * 1.05).astype(np.float32)})
    assert "statistics" not in verify(model("residual", w), model("residual", folded("residual", one))).reason


def test_nothing_folded_is_said():
    w = weights("residual")
    report = verify(model("residual", w), model("residual", w))
    assert report.verdict == "inconclusive"
    text = "nothing is folded: the candidate has as many BatchNorms as the reference, 3, and is the same model: there is no fold to judge"
    assert report.reason.startswith(text)
    assert verify(model("residual", w), model("residual", folded("residual", w))).verdict == "equivalent"


def normalised(*, epsilon=1e-5, gamma=1.0, mean=0.0):
    """A convolution and a BatchNorm."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(4, 3, 1, 1)), "gamma": gamma * np.ones(4), "beta": np.ones(4), "mean": mean + rng.normal(size=4)}
    arrays["var"] = rng.uniform(0.1, 0.5, 4)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("BatchNormalization", ["a", "gamma", "beta", "mean", "var"], ["b"], name="bn", epsilon=epsilon),
        helper.make_node("Sigmoid", ["b"], ["y"], name="end"),
    ]
    return small(nodes, arrays, {"x": (4, 3, 5, 5)}, {"y": (4, 4, 5, 5)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mean": 0.1}, "the statistics differ in 1 of 1 BatchNorms, and nothing else does: a recalibration"),
        (
            {"epsilon": 1e-3},
            "epsilon differs in 1 of 1 BatchNorms (1e-05 in bn, 0.001 in the candidate), and nothing else does: all",
        ),
        ({"gamma": 1.1}, "gamma differs in 1 of 1 BatchNorms, and nothing else does: all statistics agree"),
    ],
)
def test_what_of_a_batchnorm_differs(change, told):
    report = verify(normalised(), normalised(**change))
    assert report.verdict == "different"
    assert report.reason.startswith(told)
    assert "was folded" not in report.difference.cause


def test_how_many_batchnorms_could_be_certified():
    w = weights("residual")
    report = verify(model("residual", w), model("residual", folded("residual", w)))
    assert (report.levels.coefficients.certified, report.levels.coefficients.batchnorms) == (3, 3)
    report = verify(model("residual", w), model("residual", folded("residual", w), edit=as_max("node_sum_relu")))
    assert report.verdict == "equivalent"
    assert (report.levels.coefficients.verdict, report.levels.coefficients.certified) == ("skipped", 3)  # what precedes it is found again

    def edit(nodes):
        as_max("node_stem_relu")(nodes)
        as_max("node_sum_relu")(nodes)

    report = verify(model("residual", w), model("residual", folded("residual", w), edit=edit))
    assert (report.levels.coefficients.verdict, report.levels.coefficients.certified) == ("skipped", 2)
    assert "2 of 3 BatchNorms could be certified" in report.reason
    assert len(report.levels.coefficients.uncertified) == 1
    assert all(name in report.reason for name in report.levels.coefficients.uncertified)


# --- what the data don't exercise -----------------------------------------------------------------------------------------------


def dead_branch(*, seed: int, folded: bool, wrong: bool = False) -> ir.Model:
    """x -> Conv -> BatchNorm, shifted far below zero -> Relu -> Conv, beside a branch that lives."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=(4, 4, 1, 1)) for name in ("w", "v", "u")}
    arrays |= {"gamma": rng.uniform(0.5, 1.5, 4), "beta": np.full(4, -1000.0), "mean": np.zeros(4), "var": np.ones(4)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="first"),
        helper.make_node("BatchNormalization", ["a", "gamma", "beta", "mean", "var"], ["b"], name="bn", epsilon=0.0),
        helper.make_node("Relu", ["b"], ["c"], name="relu"),
        helper.make_node("Conv", ["c", "v"], ["d"], name="second"),
        helper.make_node("Conv", ["x", "u"], ["e"], name="beside"),
        helper.make_node("Add", ["d", "e"], ["y"], name="sum"),
    ]
    if folded:
        arrays["w"] = arrays["w"].astype(np.float32) * arrays["gamma"].astype(np.float32).reshape(4, 1, 1, 1) * (3 if wrong else 1)
        nodes[:3] = [
            helper.make_node("Conv", ["x", "w", "beta"], ["b"], name="first"),
            helper.make_node("Relu", ["b"], ["r"], name="relu"),
            helper.make_node("Max", ["r", "r"], ["c"], name="max"),
        ]
    return small(nodes, arrays, {"x": (2, 4, 5, 5)}, {"y": (2, 4, 5, 5)})


@pytest.mark.parametrize("wrong", [False, True])
def test_a_fold_that_nothing_behind_it_shows_is_inconclusive(wrong):
    report = verify(dead_branch(seed=0, folded=False), dead_branch(seed=0, folded=True, wrong=wrong))
    assert report.verdict == "inconclusive"
    assert report.reason == "not all was exercised: on these data relu gives the same whatever it is fed"


def test_its_coefficients_are_enough_where_they_can_be_compared():
    report = verify(dead_branch(seed=0, folded=False), dead_branch(seed=0, folded=False))
    assert report.levels.coefficients.verdict == "equivalent"
    assert report.reason.startswith("nothing is folded")


def test_saturated_outputs_are_inconclusive():
    w = weights("residual")
    w["y.bias"] = np.full_like(w["y.bias"], 1e9)
    report = verify(model("residual", w), model("residual", folded("residual", w), edit=as_max("node_sum_relu")))
    assert report.verdict == "inconclusive"
    assert report.reason.startswith("nothing was exercised: the reference's answers differ by less than its stored type tells")


def test_one_of_two_outputs_without_a_number():
    def edit(nodes):
        nodes.append(helper.make_node("Log", ["minus"], ["second"], name="log"))
        nodes.insert(-1, helper.make_node("Neg", ["square"], ["minus"]))
        nodes.insert(-2, helper.make_node("Exp", ["y"], ["square"]))

    w = weights("residual")
    report = verify(model("residual", w, edit=edit, outputs=("y", "second")), model("residual", w, edit=edit, outputs=("y", "second")))
    assert (report.verdict, report.reason) == ("inconclusive", "all numbers of output second of both models are NaN or infinite")


def test_dropout_in_training_mode():
    def edit(nodes):
        node = next(n for n in nodes if n.name == "node_sum_relu")
        node.output[0] = "inner"
        place = nodes.index(node) + 1
        nodes.insert(place, helper.make_node("Dropout", ["inner", "ratio", "on"], ["sum_relu"], name="dropout"))
        nodes.insert(0, helper.make_node("Constant", [], ["ratio"], value=numpy_helper.from_array(np.array(0.5, np.float32))))
        nodes.insert(0, helper.make_node("Constant", [], ["on"], value=numpy_helper.from_array(np.array(True))))

    w = weights("residual")
    report = verify(model("residual", w, edit=edit), model("residual", folded("residual", w), edit=edit))
    assert (report.verdict, report.reason) == ("inconclusive", "the reference differs from itself between two runs, in output y")


# --- other sizes ----------------------------------------------------------------------------------------------------------------


def pooled(*, ceil_mode: int, size: Any = ("h", "w")) -> ir.Model:
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(4, 3, 1, 1)), "s": rng.uniform(0.5, 1.5, 4), "t": rng.normal(size=4), "m": rng.normal(size=4)}
    arrays["v"] = np.ones(4)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("BatchNormalization", ["a", "s", "t", "m", "v"], ["b"], name="bn"),
        helper.make_node("AveragePool", ["b"], ["c"], name="pool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=ceil_mode),
        helper.make_node("GlobalAveragePool", ["c"], ["y"], name="all"),
    ]
    return small(nodes, arrays, {"x": ("N", 3, *size)}, {"y": None})


def test_a_defect_that_hides_at_even_sizes():
    report = verify(pooled(ceil_mode=0), pooled(ceil_mode=1))
    assert report.verdict == "different"
    assert verify(pooled(ceil_mode=0), pooled(ceil_mode=0)).levels.function.verdict == "equivalent"
    even = np.random.default_rng(1).normal(size=(8, 3, 64, 64)).astype(np.float32)
    assert verify(pooled(ceil_mode=0), pooled(ceil_mode=1), even).verdict == "equivalent"  # on these data they are


def test_sizes_that_the_reference_does_not_take_are_left_out():
    def fixed(*, folded: bool) -> ir.Model:
        made = ir.to_proto(pooled(ceil_mode=0))
        made.graph.node.insert(0, helper.make_node("Reshape", ["x", "shape"], ["r"]))
        made.graph.node[1].input[0] = "r"
        made.graph.initializer.append(numpy_helper.from_array(np.array([-1, 3, 64, 64]), "shape"))
        return ir.from_proto(made)

    assert verify(fixed(folded=False), fixed(folded=True)).levels.function.verdict == "equivalent"


# --- the coefficients alone -----------------------------------------------------------------------------------------------------


def test_coefficients_only(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "model.onnx", "-o", "fused.onnx", "-q"]) == 0
    assert run(["verify", "model.onnx", "fused.onnx", "--coefficients-only"]) == 0
    assert "neither model was run" in capsys.readouterr().out
    assert run(["verify", "model.onnx", "another.onnx", "--coefficients-only"]) == 1
    assert run(["verify", "model.onnx", "gone.onnx", "--coefficients-only"]) == 6
    assert run(["verify", "model.onnx", "fused.onnx", "--coefficients-only", "--data", "x.npy"]) == 2
    report = bnfold.verify(bnfold.load("model.onnx"), bnfold.load("fused.onnx"), coefficients_only=True)
    assert report.levels.function.verdict == "skipped"
    assert report.levels.deployment == ()
    assert report.reason.endswith("neither model was run")


def test_coefficients_only_needs_no_torch(here: Path) -> None:
    onnx.save(bnfold.fuse(onnx.load("model.onnx"))[0], "fused.onnx")
    code = (
        "import sys; from bnfold.cli import run; "
        "assert run(['verify', 'model.onnx', 'fused.onnx', '--coefficients-only', '-q']) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_an_output_of_another_name_pairs_by_its_place_which_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong pair can't make two models equivalent that aren't; with another number of outputs there is no place to go by."""
    made = onnx.load("model.onnx")
    made.graph.node.append(helper.make_node("Neg", ["y"], ["negative"]))
    made.graph.output.append(helper.make_tensor_value_info("negative", 1, ["batch", 4, 6, 6]))
    onnx.save(made, "two.onnx")
    made, renaming = bnfold.fuse(made)[0], {"y": "a", "negative": "b"}
    for node in made.graph.node:
        node.output[:] = [renaming.get(name, name) for name in node.output]
        node.input[:] = [renaming.get(name, name) for name in node.input]
    for output in made.graph.output:
        output.name = renaming[output.name]
    onnx.save(made, "renamed.onnx")
    made.graph.output.reverse()
    onnx.save(made, "swapped.onnx")
    for more in ([], ["--coefficients-only"]):
        assert run(["verify", "two.onnx", "renamed.onnx", "-q", *more]) == 0
        assert "the candidate's outputs have other names, and were paired: 'y' with 'a', 'negative' with 'b'" in capsys.readouterr().out
    assert run(["verify", "two.onnx", "swapped.onnx", "-q"]) == 1
    assert run(["verify", "two.onnx", "swapped.onnx", "-q", "--map-output", "y=a"]) == 0
    assert run(["verify", "model.onnx", "renamed.onnx", "-q"]) == 1
    assert run(["verify", "two.onnx", "swapped.onnx", "-q", "--map-output", "yy=b"]) == 2
    err = capsys.readouterr().err
    assert "the reference has no output 'yy'; it has y and negative" in err
    assert "did you mean" not in err
    assert run(["verify", "two.onnx", "swapped.onnx", "-q", "--map-output", "negativ=a"]) == 2
    assert "it has y and negative; did you mean 'negative'?" in capsys.readouterr().err
    assert run(["verify", "two.onnx", "swapped.onnx", "-q", "--map-output", "y"]) == 2
    assert "--map-output y: write it like REFERENCE=CANDIDATE" in capsys.readouterr().err
