"""`verify` on seeded defects, which it must call different, and on right folds, which it must not.

Every fold here is made independently of bnfold (`networks.folded`).
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from networks import EPSILON, INPUTS, NETWORKS, STEPS, folded, model, small, weights
from onnx import helper
from opened import check_fold, verify

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
    assert "times what rounding explains (channel 2)" in report.reason


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
    assert verify(model(network, w), model(network, w)).levels.coefficients.verdict == "equivalent"
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
        ("node_stem", ("pads", [0, 0, 2, 2]), "node_stem"),
        ("node_grouped", ("strides", [2, 1]), "node_grouped"),
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
    for seed in range(5):
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


def test_scales_moved_between_layers_cancel():
    w = folded("residual", weights("residual"))
    w["stem.weight"], w["stem.bias"] = w["stem.weight"] * 2, w["stem.bias"] * 2
    w["body.weight"], w["grouped.weight"], w["body.bias"] = w["body.weight"], w["grouped.weight"] / 2, w["body.bias"] * 2
    report = verify(model("residual", weights("residual")), model("residual", w))
    assert report.verdict == "equivalent"
    assert report.levels.coefficients.verdict == "equivalent"
    assert report.levels.coefficients.reason == "scales were moved between layers, where they cancel"
