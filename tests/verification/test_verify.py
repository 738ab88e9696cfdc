"""What `verify` is made of: pairing, units of roundoff, yardsticks, data, providers; and what it says in unusual cases."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from networks import INPUTS, NETWORKS, NO_FAULT, folded, model, small, weights
from onnx import TensorProto, helper, numpy_helper
from opened import check_fold, verify

import bnfold
from bnfold.algebra.rounding import roundoff
from bnfold.backends.onnx.fuse import fuse
from bnfold.backends.onnx.model import OnnxModel
from bnfold.errors import DataError, DeviceError, UnsupportedError, UsageError
from bnfold.verification.coefficients import correspond
from bnfold.verification.noise import Errors, Noise, deviation, variation, worst_part
from bnfold.verification.roundoff import precision
from bnfold.verification.yardstick import Scale, Truth, deployed_ratio, function_ratio


def right(network="residual", seed=0):
    w = weights(network, seed)
    return model(network, w), model(network, folded(network, w))


# --- level 1 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_precision_of_a_type_follows_from_its_largest_number(dtype):
    info = ml_dtypes.finfo(dtype)
    unit, tiny = precision(float(info.max))
    assert unit == float(info.eps) / 2 == roundoff(np.dtype(dtype))
    assert tiny == float(info.smallest_subnormal) / 2


def plans(*models):
    return [OnnxModel(m).plan() for m in models]


@pytest.mark.parametrize("network", NETWORKS)
def test_every_array_is_paired_and_rounded_once(network):
    found = correspond(*plans(*right(network)))
    assert found.unpaired == ""
    assert found.mismatches == ()
    assert found.checked >= 4
    assert 0.3 < found.worst <= 1


def test_pairing_goes_by_data_flow_not_by_names():
    reference, candidate = right()
    for k, node in enumerate(candidate.graph):
        node.name = f"n{k}"
        for output in node.outputs:
            if not output.is_graph_output():
                output.name = f"v{output.name[::-1]}"
    found = correspond(*plans(reference, candidate))
    assert found.unpaired == ""
    assert found.worst <= 1


def test_operands_of_a_sum_may_swap_and_identities_may_go():
    def edit(nodes):
        add = next(n for n in nodes if n.op_type == "Add")
        add.input[:] = [add.input[1], "copy"]
        nodes.insert(nodes.index(add), helper.make_node("Identity", ["body_bn"], ["copy"]))

    w = weights("residual")
    report = verify(model("residual", w), model("residual", folded("residual", w), edit=edit))
    assert report.levels.coefficients.verdict == "equivalent"
    assert report.verdict == "equivalent"


def test_a_product_and_a_sum_are_a_gemm():
    def edit(nodes):
        for node in [n for n in nodes if n.op_type == "Gemm"]:
            node.op_type = "MatMul"
            bias = node.input.pop()
            after = helper.make_node("Add", [node.output[0] + "_product", bias], list(node.output), name=node.name + "_add")
            node.output[0] += "_product"
            nodes.insert(nodes.index(node) + 1, after)

    w = weights("tabular")
    for one, other in ((None, edit), (edit, None)):
        report = verify(model("tabular", w, edit=one), model("tabular", folded("tabular", w), edit=other))
        assert report.verdict == "equivalent"
        assert report.levels.coefficients.verdict == "equivalent"
        assert report.levels.coefficients.checked == 6


def test_structures_that_differ_are_skipped_with_the_place():
    def edit(nodes):
        next(n for n in nodes if n.name == "node_stem_relu").op_type = "Elu"

    w = weights("residual")
    report = verify(model("residual", w), model("residual", folded("residual", w), edit=edit))
    assert report.levels.coefficients.verdict == "skipped"
    place = "Relu node_stem_relu stands where the candidate has Elu node_stem_relu"
    assert report.levels.coefficients.reason == f"{place}; 3 of 3 BatchNorms could be certified"
    assert (report.verdict, report.first_difference) == ("different", "node_stem_relu")


def test_a_bias_is_judged_by_its_summands():
    """beta - s*mean cancels here to a thousandth: float32 arithmetic is right to the summands, not to the difference."""
    for seed in range(20):
        w = weights("residual", seed)
        s = w["stem_bn.gamma"] / np.sqrt(w["stem_bn.var"] + np.float32(1e-5))
        w["stem_bn.mean"] = (w["stem_bn.mean"] + 100).astype(np.float32)
        w["stem_bn.beta"] = ((w["stem_bn.mean"] - w["stem.bias"]) * s * np.float32(1.001)).astype(np.float32)
        found = correspond(*plans(model("residual", w), model("residual", folded("residual", w, np.float32))))
        assert found.report().verdict == "equivalent"


def test_subnormal_coefficients_are_allowed_their_absolute_rounding():
    w = weights("tabular")
    w["second_bn.gamma"] = (w["second_bn.gamma"] * 1e-39).astype(np.float32)
    found = correspond(*plans(model("tabular", w), model("tabular", folded("tabular", w))))
    assert found.report().verdict == "equivalent"
    assert found.worst <= 1


# --- levels 2 and 3 -------------------------------------------------------------------------------------------------------------


def test_deviation():
    nan, inf = np.nan, np.inf
    error, problem = deviation(np.array([1.0, nan, inf, -inf]), np.array([1.5, nan, inf, -inf]))
    assert (error.tolist(), problem) == ([0.5, 0, 0, 0], "")
    assert deviation(np.array([1.0, 2.0]), np.array([1.0, nan]))[1] == "is nan at (1), where the reference gives 2"
    assert deviation(np.array([[nan]]), np.array([[3.0]]))[1] == "is 3 at (0, 0), where the reference gives nan"
    assert "infinite with the other sign" in deviation(np.array([inf]), np.array([-inf]))[1]
    assert deviation(np.zeros((2, 3)), np.zeros((2, 1)))[1] == "has shape (2, 1) instead of (2, 3)"
    error, problem = deviation(np.array([3, 4]), np.array([3, 5]))
    assert (error.tolist(), problem) == ([0, 1], "")
    assert deviation(np.array(["a", "b"]), np.array(["a", "c"]))[0].tolist() == [0, 1]


def test_a_bad_channel_shows_among_louder_ones():
    rng = np.random.default_rng(0)
    want = rng.normal(size=(4, 16, 5, 5)) * np.geomspace(1e-4, 1, 16).reshape(1, 16, 1, 1)
    noise = np.square(1e-7 * want * rng.normal(size=want.shape))
    error = np.abs(1e-7 * want * rng.normal(size=want.shape))
    assert worst_part(want, error, noise)[0] < 5
    error[:, 2] += 1e-3 * np.abs(want[:, 2])
    ratio, where = worst_part(want, error, noise)
    assert ratio > 1e3
    assert where == "at 2 along axis 1"


def test_a_reference_without_error_gives_no_infinite_ratio():
    exact, scale = Errors(), Scale(largest=1.0, floor=2.0**-24, count=100, discrete=False)
    exact.add(np.zeros(100))
    candidate = Errors()
    candidate.add(np.full(100, 2.0**-24))
    assert 0 < deployed_ratio(candidate, exact, Noise([exact]), scale) < 1
    assert 0 < function_ratio(candidate, Noise([exact]), scale) <= 1
    assert deployed_ratio(exact, exact, Noise([exact]), Scale(0.0, 0.0, 100, False)) == 0


def test_few_independent_numbers_widen_the_yardstick():
    def runs(values):
        tallies = []
        for value in values:
            tallies.append(Errors())
            tallies[-1].add(np.array([value]))
        return Noise(tallies)

    assert runs([1.0, 1.01, 0.99]).rms == pytest.approx(1.0, abs=0.03)
    assert not runs([1.0, 1.01, 0.99]).scatters
    assert runs([0.1, 1.0, 2.0]).rms > 3
    assert runs([0.1, 1.0, 2.0]).scatters


def test_integers_may_flip_where_moved_weights_flip_them():
    scale, flips, none = Scale(1.0, 1e-4, 1000, True), Errors(), Errors()
    flips.add((np.arange(1000) < 3).astype(float))
    none.add(np.zeros(1000))
    assert function_ratio(flips, Noise([flips]), scale) == pytest.approx(1)
    assert function_ratio(flips, Noise([none]), scale) > 10


def test_variation():
    assert variation(np.array([1.0, 2.0]), np.array([1.0, 2.1])) == pytest.approx(0.05)
    assert variation(np.array([1.0, np.inf]), np.array([1.0 + 1e-13, np.inf])) < 1e-12
    assert variation(np.array([1, 2]), np.array([1, 3])) == np.inf
    assert variation(np.zeros(2), np.zeros(2)) == 0 < variation(np.zeros(2), np.ones(2))


def test_what_is_held_of_the_reference_is_bounded():
    truth = Truth(lambda feeds: {"y": feeds["x"]}, [{"x": np.zeros(1000)} for _ in range(50)], most_bytes=100_000)
    assert len(truth.feeds) == 7


def test_weights_move_by_whole_units_in_the_last_place():
    subject = OnnxModel(model("residual", weights("residual")))
    before = {name: v.const_value.numpy() for name, v in subject.model.graph.initializers.items()}
    after = {name: v.const_value.numpy() for name, v in subject._moved(3).graph.initializers.items()}
    moved = np.concatenate([(after[name] != before[name]).ravel() for name in before])
    assert 0.05 < moved.mean() < 0.12
    for name in before:
        assert (np.abs(after[name] - before[name]) <= np.spacing(np.abs(before[name]))).all()
    assert all(np.array_equal(v.const_value.numpy(), before[name]) for name, v in subject.model.graph.initializers.items())


# --- the verb -------------------------------------------------------------------------------------------------------------------


def test_report():
    stages = []
    report = verify(*right(), progress=lambda stage, done, total: stages.append(stage))
    assert report.verdict == "equivalent"
    assert report.seconds > 0
    assert stages[:4] == ["weights", "outputs, reference", "outputs, rounded weights", "outputs, candidate"]
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["schema"] == "bnfold.verify/1"
    assert {(row["provider"], row["optimisation"], row["verdict"]) for row in plain["levels"]["deployment"]} == {
        ("cpu", "off", "equivalent"),
        ("cpu", "on", "equivalent"),
    }
    assert plain["outputs"][0]["name"] == "y"
    assert plain["outputs"][0]["max_rel"] < 1e-6
    assert "arrays are what exact arithmetic gives, rounded once" in report.reason


def test_same_arguments_same_report():
    one, two = (verify(*right("tabular"), seed=7).to_dict() for _ in range(2))
    one.pop("seconds"), two.pop("seconds")
    assert one == two


def test_the_public_verb_takes_protos_and_oracle_only_leaves_level_3_out():
    reference, candidate = (ir.to_proto(m) for m in right("tabular"))
    assert bnfold.verify(reference, candidate).verdict == "equivalent"
    assert verify(*right("tabular"), oracle_only=True).levels.deployment == ()


def test_neither_model_is_changed():
    models = right()
    before = [ir.to_proto(m).SerializeToString(deterministic=True) for m in models]
    verify(*models)
    check_fold(*models)
    assert [ir.to_proto(m).SerializeToString(deterministic=True) for m in models] == before


def test_users_data():
    models = right("tabular")
    data = np.random.default_rng(1).normal(size=(20, *INPUTS["tabular"][1:])).astype(np.float32)
    for batches in (data, {"x": data}, [data[:8], data[8:]], ({"x": batch} for batch in np.split(data, 5))):
        assert verify(*models, batches, samples=10).verdict == "equivalent"
    with pytest.raises(DataError, match="'x'"):
        verify(*models, {"nobody": data, "someone": data})
    with pytest.raises(UsageError, match="samples must be at least 1, not 0"):
        verify(*models, data, samples=0)


def test_no_more_of_the_users_data_is_read_than_needed():
    drawn = []

    def batches():
        for k in range(1000):
            drawn.append(k)
            yield np.random.default_rng(k).normal(size=(8, 6)).astype(np.float32)

    assert verify(*right("tabular"), batches()).verdict == "equivalent"
    assert len(drawn) < 20


def test_providers():
    with pytest.raises(UsageError, match="no execution provider is called 'cpuu'; did you mean cpu"):
        verify(*right("tabular"), providers=("cpuu",))
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(DeviceError, match="execution provider cuda is not in this ONNX Runtime"):
            verify(*right("tabular"), providers=("cpu", "cuda"))


def test_something_that_is_no_model():
    with pytest.raises(UnsupportedError, match=r"a builtins.int is not a kind of model"):
        verify(1, 2)


def test_a_candidate_that_fixes_the_batch():
    reference, candidate = right("tabular")
    fixed = ir.to_proto(candidate)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert verify(reference, ir.from_proto(fixed)).verdict == "equivalent"


def test_a_candidate_that_does_not_run():
    w = weights("tabular")
    wrong = folded("tabular", w)
    wrong["second.weight"] = wrong["second.weight"][:-1]
    report = verify(model("tabular", w), model("tabular", wrong))
    assert report.verdict == "different"


@pytest.mark.parametrize("network", NETWORKS)
def test_one_sample_is_enough(network):
    for seed in range(6):
        assert verify(*right(network, seed), samples=1, seed=seed).verdict == "equivalent"


def test_optimisation_that_harms_the_reference_too_is_no_fault_of_the_candidate():
    """ONNX Runtime up to 1.31 fuses MatMul and BatchNormalization across the Transpose, along the wrong axis."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.normal(size=(5, 5)),
        "s": rng.uniform(0.5, 1.5, 5),
        "t": rng.normal(size=5),
        "m": rng.normal(size=5),
        "v": np.ones(5),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0]),
            helper.make_node("BatchNormalization", ["b", "s", "t", "m", "v"], ["y"]),
        ],
        "chance",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 5])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    reference = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    report = verify(reference, reference)
    off, on = report.levels.deployment
    assert (report.verdict, off.verdict) == ("inconclusive", "equivalent")  # it is one model, so no fold is judged
    assert report.reason.startswith("nothing is folded")
    if on.verdict == "equivalent":
        pytest.skip(NO_FAULT)
    assert on.ratio > 2
    assert on.verdict == "skipped"
    assert "changes the reference itself by as much" in on.reason


def test_optimisation_that_refuses_the_reference_too_is_no_fault_of_the_candidate():
    """Optimising, ONNX Runtime infers shapes anew, and refuses a Range between vectors of one number, which it would run."""
    one, three = (np.array([n], np.int64) for n in (1, 3))
    arrays = {"w": np.ones((3, 3, 1, 1), np.float32), **dict.fromkeys("smtv", np.full(3, 0.7, np.float32)), "one": one, "end": three}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("BatchNormalization", ["a", *"smtv"], ["b"]),
        helper.make_node("Concat", ["one", "end"], ["both"], axis=0),
        helper.make_node("Slice", ["both", "one", "end"], ["last"]),
        helper.make_node("Range", ["one", "last", "one"], ["steps"]),
        helper.make_node("Cast", ["steps"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 4, 2]) for name in "xy"]
    graph = helper.make_graph(nodes, "steps", info[:1], info[1:], [numpy_helper.from_array(a, name) for name, a in arrays.items()])
    reference = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    report = verify(reference, fuse(reference)[0])
    off, on = report.levels.deployment
    assert (report.verdict, off.verdict) == ("equivalent", "equivalent")
    if on.verdict == "equivalent":
        pytest.skip(NO_FAULT)
    assert on.verdict == "skipped"
    assert "doesn't run the reference either (ONNX Runtime can't run this model" in on.reason


@pytest.mark.parametrize("seed", [52, 63, 67, 113, 130, 150, 174, 212])
def test_a_sigmoid_far_from_0_is_known_by_its_distance_from_a_half(seed):
    """ONNX Runtime gives multiples of 3e-8 for it, whichever: the reference may be lucky, and a right fold not."""
    rng = np.random.default_rng(seed)
    arrays = {
        "w": rng.normal(size=(2, 3, 1, 1)) * 0.1,
        "s": rng.uniform(0.5, 1.5, 2),
        "t": rng.normal(size=2) * 0.1 - 17,
        "m": rng.normal(size=2) * 0.1 + 200,
        "b": rng.normal(size=2) + 200,
        "v": rng.uniform(0.5, 2, 2),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"]),
        helper.make_node("BatchNormalization", ["a", *"stmv"], ["c"]),
        helper.make_node("Tile", ["c", "times"], ["d"]),
        helper.make_node("Sigmoid", ["d"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    tensors.append(numpy_helper.from_array(np.array([1, 1, 64, 32]), "times"))
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [1, 3, 1, 2]), ("y", [1, 2, 64, 64]))]
    graph = helper.make_graph(nodes, "far", info[:1], info[1:], tensors)
    reference = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert verify(reference, fuse(reference)[0], samples=1).verdict == "equivalent"


def test_first_difference_sees_through_values_that_a_fold_renames():
    """Our own fold keeps the name of a value that it scales; what is wrong comes only later."""
    rng = np.random.default_rng(2)
    shapes = {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1)}
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    arrays |= {"s": rng.uniform(0.5, 1.5, 4), "t": rng.normal(size=4), "m": rng.normal(size=4), "q": np.ones(4)}

    def network(op):
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["a"], name="first"),
            helper.make_node("MaxPool", ["a"], ["b"], name="pool", kernel_shape=[2, 2]),
            helper.make_node("BatchNormalization", ["b", "s", "t", "m", "q"], ["c"], name="bn"),
            helper.make_node(op, ["c"], ["d"], name="activation"),
            helper.make_node("Conv", ["d", "v"], ["y"], name="last"),
        ]
        info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", c, None, None]) for name, c in (("x", 3), ("y", 4))]
        tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
        graph = helper.make_graph(nodes, "renamed", info[:1], info[1:], tensors)
        return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))

    fused, report = fuse(network("Elu"))
    assert report.layers[0].verdict == "folded"
    report = verify(network("Relu"), fused)
    assert (report.verdict, report.first_difference) == ("different", "activation")


def test_names_may_change_places():
    """However many operators read an input, it is renamed once."""
    nodes = [helper.make_node("Add", ["a", "b"], ["c"]), helper.make_node("Mul", ["c", "a"], ["y"])]
    (plan,) = plans(small(nodes, {}, {"a": (2, 3), "b": (2, 3)}, {"y": (2, 3)}))
    renamed = plan.renamed({"a": "b", "b": "a"}, {"y": "z"})
    assert [[v.name for v in node.inputs] for node in renamed.graph.nodes] == [["b", "a"], ["c", "b"]]
    assert list(renamed.outputs) == ["z"]
