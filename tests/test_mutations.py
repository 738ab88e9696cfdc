"""`verify` on seeded defects, which it must call different, and on right folds, which it must not.

Every fold here is made independently of bnfold (`networks.folded`).
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from networks import EPSILON, INPUTS, NETWORKS, STEPS, folded, model, weights
from onnx import helper, numpy_helper

from bnfold.verify import check_fold, verify

FOLDED = {"residual": ("stem", "body", "grouped"), "tabular": ("first", "second"), "decoder": ("up", "y_conv")}
PLACES = [(network, layer) for network, layers in FOLDED.items() for layer in layers]


def pair(network, change, seed=0, dtype=np.float32):
    """The network, and its fold after `change(weights of the fold, original weights)`."""
    w = weights(network, seed, dtype)
    wrong = folded(network, w)
    change(wrong, w)
    return model(network, w), model(network, wrong)


def of_batchnorm(network, layer):
    return next(name for op, name, inputs, _ in STEPS[network] if op == "BatchNormalization" and inputs[0] == layer)


def out_axis(network, layer):
    return 0 if STEPS[network][[s[1] for s in STEPS[network]].index(layer)][0] == "Conv" else 1


@pytest.mark.parametrize(("network", "layer"), PLACES)
def test_weight_of_one_channel_off_by_a_thousandth(network, layer):
    def change(wrong, _):
        index = [slice(None)] * wrong[layer + ".weight"].ndim
        index[out_axis(network, layer)] = 2
        wrong[layer + ".weight"][tuple(index)] *= np.float32(1.001)

    report = verify(*pair(network, change))
    assert report.verdict == "different"
    assert report.first_difference == f"node_{layer}"
    assert report.levels.coefficients.verdict == report.levels.function.verdict == "different"
    assert "units of roundoff (channel 2)" in report.reason


@pytest.mark.parametrize(("network", "layer"), PLACES)
def test_bias_of_one_channel_off_by_a_thousandth_of_its_deviation(network, layer):
    def change(wrong, w):
        wrong[layer + ".bias"][1] += 1e-3 * abs(w[of_batchnorm(network, layer) + ".gamma"][1])

    report = verify(*pair(network, change))
    assert (report.verdict, report.first_difference) == ("different", f"node_{layer}")
    assert report.levels.function.verdict == "different"


@pytest.mark.parametrize(("network", "layer"), PLACES)
def test_two_channels_swapped(network, layer):
    def change(wrong, _):
        weight = wrong[layer + ".weight"]
        wrong[layer + ".weight"] = np.take(weight, [1, 0, *range(2, weight.shape[axis])], axis)

    axis = out_axis(network, layer)
    report = verify(*pair(network, change))
    assert (report.verdict, report.first_difference) == ("different", f"node_{layer}")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_epsilon_off_by_a_tenth_shows_in_the_coefficients(network, seed):
    w = weights(network, seed)
    report = verify(model(network, w), model(network, folded(network, w, epsilon=1.1 * EPSILON)))
    assert report.verdict == "different"
    assert report.levels.coefficients.verdict == "different"
    assert report.levels.coefficients.worst > 10


@pytest.mark.parametrize("network", NETWORKS)
def test_epsilon_of_a_batchnorm_that_stays(network):
    w = weights(network)
    assert verify(model(network, w), model(network, w)).verdict == "equivalent"
    report = verify(model(network, w), model(network, w, epsilon=1.1e-5))
    assert report.levels.coefficients.verdict == "different"


def stale(w, role, change):
    return {name: change(array).astype(array.dtype) if name.endswith(role) else array for name, array in w.items()}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("role", "change"),
    [
        (".var", lambda v: v * 4096 / 4095),  # unbiased
        (".mean", lambda m: 0 * m),  # not subtracted
        (".mean", lambda m: m + 0.01),  # stale
        (".var", lambda v: v * 1.02),
        (".var", np.square),  # sqrt forgotten somewhere
        (".gamma", np.abs),
        (".beta", lambda b: -b),
    ],
)
def test_wrong_statistics(network, role, change):
    w = weights(network)
    for arithmetic in (np.float64, np.float32):
        report = verify(model(network, w), model(network, folded(network, stale(w, role, change), arithmetic)), oracle_only=True)
        assert (report.verdict, report.levels.function.verdict) == ("different", "different")


def test_group_order():
    def change(wrong, _):
        wrong["grouped.weight"] = wrong["grouped.weight"].reshape(4, 2, 2, 2, 2).swapaxes(0, 1).reshape(8, 2, 2, 2)

    report = verify(*pair("residual", change))
    assert (report.verdict, report.first_difference) == ("different", "node_grouped")


def test_transposed_groups():
    def change(wrong, _):
        wrong["up.weight"] = wrong["up.weight"].reshape(2, 2, 3, 2, 2)[::-1].reshape(4, 3, 2, 2).copy()

    report = verify(*pair("decoder", change))
    assert (report.verdict, report.first_difference) == ("different", "node_up")


def padded(*, folded: bool, pads: int) -> ir.Model:
    """BatchNorm before a convolution; folded, its shift goes into the bias, which is wrong where zeros are padded."""
    rng = np.random.default_rng(0)
    w, b = rng.normal(0, 0.5, (4, 3, 3, 3)), rng.normal(size=4)
    s, t = rng.uniform(0.5, 1.5, 3), rng.normal(0, 0.3, 3)
    arrays = {"w": w, "b": b, "s": s, "t": t, "zero": np.zeros(3), "one": np.ones(3)}
    nodes = [
        helper.make_node("BatchNormalization", ["x", "s", "t", "zero", "one"], ["n"], name="bn", epsilon=0.0),
        helper.make_node("Conv", ["n", "w", "b"], ["c"], name="conv", pads=[pads] * 4),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    if folded:
        arrays = {"w": w * s.reshape(1, 3, 1, 1), "b": b + (w * t.reshape(1, 3, 1, 1)).sum((1, 2, 3))}
        nodes[:2] = [helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[pads] * 4)]
    return small(nodes, arrays, {"x": ("N", 3, 7, 7)}, {"y": None})


def small(nodes, arrays, inputs, outputs, opset=17, dtype=np.float32, domains=()) -> ir.Model:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array.astype(dtype), name) for name, array in arrays.items()],
    )
    if opset < 9:
        graph.input.extend(helper.make_tensor_value_info(name, kind, array.shape) for name, array in arrays.items())
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=3 if opset < 9 else 10))


def test_shift_through_padding():
    assert verify(padded(folded=False, pads=0), padded(folded=True, pads=0)).verdict == "equivalent"
    report = verify(padded(folded=False, pads=1), padded(folded=True, pads=1))
    assert report.verdict == "different"
    assert report.first_difference == "conv"


@pytest.mark.parametrize("where", ["stem.weight", "grouped.bias", "y.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_number_that_is_none(where, value):
    def change(wrong, _):
        wrong[where].flat[1] = value

    report = verify(*pair("residual", change))
    assert (report.verdict, report.first_difference) == ("different", f"node_{where.split('.')[0]}")
    assert "nan" in report.levels.function.reason or "inf" in report.levels.function.reason


@pytest.mark.parametrize(
    ("name", "attribute", "first"),
    [
        ("node_sum_relu", None, "node_sum_relu"),
        ("node_stem", ("pads", [0, 0, 2, 2]), "node_stem_bn"),  # the first value that both have
        ("node_grouped", ("strides", [2, 1]), "node_grouped_bn"),
    ],
)
def test_operator_changed(name, attribute, first):
    def edit(nodes):
        node = next(n for n in nodes if n.name == name)
        if attribute is None:
            node.op_type = "LeakyRelu"
        else:
            key, value = attribute
            kept = [a for a in node.attribute if a.name != key]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(key, value)])

    w = weights("residual")
    report = verify(model("residual", w), model("residual", folded("residual", w), edit=edit))
    assert (report.verdict, report.first_difference) == ("different", first)
    assert "times what rounded weights explain" in report.reason


# --- interfaces ---------------------------------------------------------------------------------------------------------------


def interface_pair(change):
    w = weights("residual")
    first, second = (
        model("residual", w, outputs=("y", "pool")),
        ir.to_proto(model("residual", folded("residual", w), outputs=("y", "pool"))),
    )
    change(second.graph)
    return first, ir.from_proto(second)


def rename_output(graph):
    for node in graph.node:
        node.output[:] = ["renamed" if name == "pool" else name for name in node.output]
        node.input[:] = ["renamed" if name == "pool" else name for name in node.input]
    graph.output[1].name = "renamed"


def retype_output(graph):
    graph.node.append(helper.make_node("Cast", ["pool"], ["pool64"], to=onnx.TensorProto.DOUBLE))
    rename = {"pool": "inner", "pool64": "pool"}
    for node in graph.node:
        node.output[:] = [rename.get(name, name) for name in node.output]
        node.input[:] = [rename.get(name, name) for name in node.input]
    graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


def reshape_output(graph):
    for node in graph.node:
        node.output[:] = ["inner" if name == "pool" else name for name in node.output]
        node.input[:] = ["inner" if name == "pool" else name for name in node.input]
    graph.node.append(helper.make_node("Squeeze", ["inner"], ["pool"]))
    graph.output[1].type.tensor_type.ClearField("shape")


def another_size(graph):
    graph.input[0].type.tensor_type.shape.dim[2].dim_value = 9


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda graph: graph.output.pop(), "output 'pool' is missing; the candidate has 'y'"),
        (rename_output, "output 'pool' is missing; the candidate has 'y', 'renamed'"),
        (retype_output, "output 'pool' is double instead of float"),
        (reshape_output, "output pool has shape (8, 8) instead of (8, 8, 1, 1)"),
        (another_size, "input 'x' has shape (N, 3, 9, 8) instead of (N, 3, 8, 8)"),
        (lambda graph: graph.output.reverse(), "the outputs come in another order: pool, y"),
    ],
)
def test_another_interface(change, reason):
    report = verify(*interface_pair(change))
    assert report.verdict == "different"
    assert report.reason == reason


def test_an_output_more_and_an_overridable_default_less():
    w = weights("tabular")
    report = verify(model("tabular", w), model("tabular", folded("tabular", w), outputs=("y", "second_relu_in"), edit=tap))
    assert (report.verdict, report.reason) == ("different", "the candidate has an output more, 'second_relu_in'")
    listed = ir.to_proto(model("tabular", w))
    listed.graph.input.append(helper.make_tensor_value_info("y.bias", onnx.TensorProto.FLOAT, [1]))
    report = verify(ir.from_proto(listed), model("tabular", w))
    assert (report.verdict, report.reason) == ("different", "input 'y.bias', whose default callers may override, is missing")


def tap(nodes):
    nodes.append(helper.make_node("Identity", ["first_relu"], ["second_relu_in"], name="tap"))


# --- right folds --------------------------------------------------------------------------------------------------------------

RIGHT = [(np.float32, np.float64), (np.float32, np.float32), (np.float16, np.float64), (np.float64, np.float64)]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("dtype", "arithmetic"), RIGHT)
def test_right_folds_are_equivalent(network, dtype, arithmetic):
    for seed in range(8):
        w = weights(network, seed, dtype)
        report = verify(model(network, w), model(network, folded(network, w, arithmetic)), seed=seed)
        assert report.verdict == "equivalent", (seed, report)
        assert report.levels.coefficients.worst <= (1 if arithmetic != dtype else 8)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("dtype", "arithmetic"), RIGHT)
def test_right_folds_are_equivalent_for_many_seeds(network, dtype, arithmetic):
    for seed in range(200):
        w = weights(network, seed, dtype)
        assert verify(model(network, w), model(network, folded(network, w, arithmetic)), seed=seed).verdict == "equivalent", seed


@pytest.mark.parametrize("network", NETWORKS)
def test_own_folds_are_within_one_unit(network):
    from bnfold.backends.onnx.fuse import fuse

    for seed in range(5):
        reference = model(network, weights(network, seed))
        fused, _ = fuse(reference)
        report = check_fold(reference, fused)
        assert report.verdict == "equivalent"
        assert report.levels.coefficients.worst <= 1
        assert report.levels.deployment == ()


@pytest.mark.parametrize("network", NETWORKS)
def test_check_fold_finds_a_defect_on_one_sample(network):
    layer = FOLDED[network][0]

    def change(wrong, _):
        wrong[layer + ".bias"][0] += 0.01

    data = np.random.default_rng(5).normal(size=(1, *INPUTS[network][1:])).astype(np.float32)
    assert check_fold(*pair(network, change)).verdict == "different"
    assert check_fold(*pair(network, change), data).verdict == "different"


def test_scales_moved_between_layers_are_another_form_of_the_function():
    w = folded("residual", weights("residual"))
    w["stem.weight"], w["stem.bias"] = w["stem.weight"] * 2, w["stem.bias"] * 2
    w["body.weight"], w["grouped.weight"], w["body.bias"] = w["body.weight"], w["grouped.weight"] / 2, w["body.bias"] * 2
    report = verify(model("residual", weights("residual")), model("residual", w))
    assert report.verdict == "equivalent"
    assert report.levels.coefficients.verdict == "skipped"
    assert report.levels.coefficients.reason.endswith("the same function in another form")


# --- neither ------------------------------------------------------------------------------------------------------------------


def test_a_network_that_answers_a_constant():
    w = weights("residual")
    w["y.weight"] = 0 * w["y.weight"]
    report = verify(model("residual", w), model("residual", folded("residual", w)))
    assert (report.verdict, report.reason) == (
        "inconclusive",
        "nothing was exercised: the reference answers the same whatever it is fed",
    )


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
    def empty(nodes):
        nodes[-1].output[0] = "inner"
        nodes.append(helper.make_node("Slice", ["inner", "none", "none"], ["y"]))

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


def with_gelu(nodes, domain="com.microsoft", op="Gelu"):
    next(n for n in nodes if n.name == "node_first_relu").op_type = op
    next(n for n in nodes if n.name == "node_first_relu").domain = domain


def test_noise_floor_where_the_oracle_lacks_an_operator():
    def imported(w):
        made = model("tabular", w, edit=with_gelu)
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
        made = model("tabular", w, edit=lambda nodes: with_gelu(nodes, "nobody.knows", "Mystery"))
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
    right = {"w": w * s.reshape(4, 1, 1, 1), "b": arrays["t"] - arrays["m"] * s}
    node = [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv")]
    stored = {name: array.astype(np.float32).astype(np.float64) for name, array in arrays.items()}
    right = {"w": stored["w"] * stored["s"].reshape(4, 1, 1, 1), "b": stored["t"] - stored["m"] * stored["s"]}
    report = verify(reference, small(node, right, *shapes, opset=6))
    assert report.verdict == "equivalent"
    assert {row.verdict for row in report.levels.deployment} == {"skipped"}
    right["b"][3] += 1e-3
    assert verify(reference, small(node, right, *shapes, opset=6)).verdict == "different"
