"""Where two models part and why: each cause seeded in a small network and in a ResNet-18, in both frameworks where it makes sense."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from compare import feeds
from fuzz.graphs import build
from networks import EPSILON, NO_FAULT, folded, model, small, weights
from onnx import helper
from opened import verify

import bnfold
from bnfold.backends.onnx.files.load import from_proto
from bnfold.backends.onnx.model import OnnxModel
from bnfold.errors import InputError, UnsupportedError, UsageError
from bnfold.verification.diagnosis.localise import first_to_reach_an_output, localise
from bnfold.verification.diagnosis.sides import compare_values, sides_of

# --- ONNX, small ------------------------------------------------------------------------------------------------------------------


def pair(change=None, *, network="residual", epsilon=EPSILON, before=None, arithmetic=np.float64):
    """The network, and another tool's fold of it: made from changed weights (`before`), or changed afterwards (`change`)."""
    w = weights(network)
    source = dict(w)
    if before is not None:
        before(source)
    wrong = folded(network, {name: a.astype(np.float32) for name, a in source.items()}, arithmetic, epsilon)
    if change is not None:
        change(wrong)
    return model(network, w), model(network, wrong)


def times(role, factor):
    def change(w):
        for name in w:
            if name.endswith(role):
                w[name] = w[name] * factor

    return change


def swap(name, order, axis=0):
    def change(w):
        w[name] = np.take(w[name], order, axis)

    return change


def both(*changes):
    def change(w):
        for each in changes:
            each(w)

    return change


def stale(w):
    rng = np.random.default_rng(3)
    for name in w:
        if name.endswith(".mean"):
            w[name] = w[name] + rng.normal(0, 0.05, w[name].shape)
        if name.endswith(".var"):
            w[name] = w[name] * rng.uniform(0.8, 1.2, w[name].shape)


SWAPPED = [1, 0, *range(2, 8)]
CAUSES = {
    "epsilon": ({"epsilon": 1e-3}, "node_stem", "another epsilon: the candidate was folded with 0.001, BatchNorm node_stem_bn has 1e-05"),
    "epsilon that no output shows": ({"epsilon": 1.1e-5}, "node_stem", "another epsilon: the candidate was folded with 1.1e-05"),
    "unbiased": ({"before": times(".var", 4096 / 4095)}, "node_stem", "the unbiased variance: .* n = 4096"),
    "biased": ({"before": times(".var", 99 / 100)}, "node_stem", "the biased variance: .* n = 100"),
    "channels": ({"change": both(swap("stem.weight", SWAPPED), swap("stem.bias", SWAPPED))}, "node_stem", "channel order: .*, 0 and 1"),
    "channels of the weight": ({"change": swap("stem.weight", SWAPPED)}, "node_stem", "channels of the weight alone are swapped, 0 and 1"),
    "channels of the bias": (
        {"change": swap("stem.bias", [3, 1, 2, 0, 4, 5, 6, 7])},
        "node_stem",
        "the bias alone .* 0 and 3",
    ),
    "input channels": ({"change": swap("stem.weight", [0, 2, 1], 1)}, "node_stem", "input channels of the weight are swapped, 1 and 2"),
    "mean": ({"before": times(".mean", 0)}, "node_stem", r"the running mean isn't subtracted \(BatchNorm node_stem_bn\)"),
    "gamma": ({"before": lambda w: w.update({"stem_bn.gamma": np.ones(8)})}, "node_stem", "gamma is missing"),
    "beta": ({"before": times("stem_bn.beta", 0)}, "node_stem", "beta is missing"),
    "sign": ({"before": lambda w: w.update({"stem_bn.gamma": np.abs(w["stem_bn.gamma"])})}, "node_stem", "gamma has lost its sign"),
    "stale": ({"before": stale}, "node_stem", "statistics of another checkpoint: other running means and variances"),
    "groups": (
        {"change": lambda w: w.update({"grouped.weight": w["grouped.weight"].reshape(4, 2, -1).swapaxes(0, 1).reshape(8, 2, 2, 2)})},
        "node_grouped",
        "group order",
    ),
    "transposed": (
        {"change": lambda w: w.update({"grouped.weight": w["grouped.weight"].swapaxes(2, 3).copy()})},
        "node_grouped",
        "transposed weight: the kernel's height and width",
    ),
    "transposed channels": (
        {"change": lambda w: w.update({"second.weight": w["second.weight"].T.copy()}), "network": "square"},
        "node_second",
        "transposed weight: input and output channels",
    ),
    "NaN": (
        {"change": lambda w: w["stem.weight"].__setitem__((2, 0, 0, 0), np.nan)},
        "node_stem",
        r"weight holds nan at \(2, 0",
    ),
    "infinity": (
        {"change": lambda w: w["grouped.bias"].__setitem__(3, np.inf)},
        "node_grouped",
        r"bias holds inf at \(3\)",
    ),
    "one channel": (
        {"change": lambda w: w["grouped.weight"].__setitem__(2, w["grouped.weight"][2] * np.float32(1.001))},
        "node_grouped",
        r"nothing that was tried explains it; its weight is off in channel 2 \(1 of 8\)",
    ),
}


@pytest.fixture(autouse=True)
def square(monkeypatch):
    """A tabular network whose second matrix is square."""
    import networks

    monkeypatch.setitem(networks.SHAPES, "square", {"first": (6, 12), "second": (12, 12), "y": (12, 3)})
    monkeypatch.setitem(networks.STEPS, "square", networks.TABULAR)
    monkeypatch.setitem(networks.INPUTS, "square", ("N", 6))


@pytest.mark.parametrize("name", CAUSES)
def test_causes(name):
    how, layer, cause = CAUSES[name]
    report = verify(*pair(**how), oracle_only=True)
    assert (report.verdict, report.first_difference) == ("different", layer)
    found = report.difference
    assert found is not None
    assert found.layer == layer
    assert re.search(cause, found.cause), found


def test_in_the_stored_types_where_there_is_no_oracle(monkeypatch):
    def lacking(*_, **__):
        raise UnsupportedError("the float64 oracle lacks the operator")

    monkeypatch.setattr("bnfold.backends.onnx.oracle.evaluator.Oracle", lacking)
    subjects = [OnnxModel(m) for m in pair(**CAUSES["mean"][0])]
    found = localise(*subjects, subjects[0].random(batch=2, seed=0, input_shapes=None), None)
    assert found is not None
    assert not found.sides.exact
    assert found.difference.layer == "node_stem"
    assert "the running mean isn't subtracted" in found.difference.cause


# --- the runtime ------------------------------------------------------------------------------------------------------------------


def behind_a_transpose(*, written_out, deep=False):
    """MatMul -> Transpose -> BatchNormalization, or the BatchNorm as Mul and Add, between other operators."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(5, 5)), "v": np.ones(5), "u": rng.normal(size=(5, 5))}
    arrays |= {"s": rng.uniform(0.5, 1.5, 5), "t": rng.normal(size=5), "m": rng.normal(size=5)}
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="before"),
        helper.make_node("MatMul", ["r", "w"], ["a"], name="product"),
        helper.make_node("Transpose", ["a"], ["b"], name="turn", perm=[1, 0]),
    ]
    if written_out:
        gain = arrays["s"].astype(np.float32) / np.sqrt(np.float32(1) + np.float32(1e-5))
        arrays["gain"], arrays["shift"] = gain, arrays["t"].astype(np.float32) - gain * arrays["m"].astype(np.float32)
        nodes += [helper.make_node("Mul", ["b", "gain"], ["g"], name="scale"), helper.make_node("Add", ["g", "shift"], ["c"], name="shift")]
    else:
        nodes.append(helper.make_node("BatchNormalization", ["b", "s", "t", "m", "v"], ["c"], name="bn"))
    nodes.append(helper.make_node("Sigmoid", ["c"], ["d"], name="after"))
    for k in range(6 if deep else 0):
        nodes.append(helper.make_node("MatMul", [nodes[-1].output[0], "u"], [f"p{k}"], name=f"p{k}"))
        nodes.append(helper.make_node("Sigmoid", [f"p{k}"], [f"q{k}"], name=f"q{k}"))
    nodes[-1].output[0] = "y"
    return small(nodes, {k: a for k, a in arrays.items() if any(k in n.input for n in nodes)}, {"x": (5, 5)}, {"y": (5, 5)})


@pytest.mark.parametrize("deep", [False, True])
def test_an_optimisation_of_the_runtime_is_named(deep):
    """ONNX Runtime up to 1.31 fuses MatMul and BatchNormalization across the Transpose, along the wrong axis."""
    report = verify(behind_a_transpose(written_out=True, deep=deep), behind_a_transpose(written_out=False, deep=deep))
    off, on = report.levels.deployment
    assert off.verdict == "equivalent"
    if on.verdict == "equivalent":
        pytest.skip(NO_FAULT)
    assert report.verdict == "different"
    assert report.difference is not None
    assert "MatMul_BatchNormalization_Fusion" in report.difference.cause
    assert "MatMul product -> Transpose turn -> BatchNormalization bn" in report.difference.cause
    assert report.first_difference == report.difference.layer == "shift"


# --- bundles ----------------------------------------------------------------------------------------------------------------------

SHADOW = "raise ImportError('bnfold is not needed here')"


def reproduce(folder, status=1):
    """Run the bundle's script where bnfold can't be imported."""
    shadow = folder.parent / "shadow"
    shadow.mkdir(exist_ok=True)
    (shadow / "bnfold.py").write_text(SHADOW)
    done = subprocess.run(
        [sys.executable, str(folder / "reproduce.py")],
        env={**os.environ, "PYTHONPATH": str(shadow)},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder.parent,
    )
    assert done.returncode == status, (done.stdout, done.stderr)
    return done.stdout


BUNDLED = ["epsilon", "epsilon that no output shows", "channels", "mean", "groups", "NaN", "transposed channels", "one channel"]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundle_shows_the_difference_without_bnfold(name, tmp_path):
    how, layer, _ = CAUSES[name]
    folder = tmp_path / "bundle"
    report = verify(*pair(**how), oracle_only=True, bundle=folder)
    assert report.bundle == str(folder), report.notes
    assert {p.name for p in folder.iterdir()} >= {"reference.onnx", "candidate.onnx", "inputs.npz", "reproduce.py", "README.txt"}
    assert layer in (folder / "README.txt").read_text()
    assert "\ndifferent\n" in reproduce(folder)
    part = onnx.load(folder / "candidate.onnx")
    assert len(part.graph.node) <= 3
    onnx.save(part, folder / "reference.onnx")
    if name != "epsilon that no output shows":
        settings = (folder / "reproduce.py").read_text()
        theirs = re.search(r"CANDIDATE = (\{.*?\})\nLIMIT", settings, re.DOTALL)
        settings = re.sub(r"REFERENCE = \{.*?\}\nCANDIDATE", lambda _: f"REFERENCE = {theirs[1]}\nCANDIDATE", settings, flags=re.DOTALL)
        (folder / "reproduce.py").write_text(settings)
        assert "no difference" in reproduce(folder, 0)


def test_a_bundle_of_a_fault_of_the_runtime(tmp_path):
    models = behind_a_transpose(written_out=True), behind_a_transpose(written_out=False)
    report = verify(*models, bundle=tmp_path / "bundle")
    if report.verdict == "equivalent":
        pytest.skip(NO_FAULT)
    assert report.bundle
    assert "different" in reproduce(tmp_path / "bundle")


def test_a_bundle_goes_into_no_folder_that_holds_something(tmp_path):
    models = pair(**CAUSES["mean"][0])
    folder = tmp_path / "bundle"
    folder.mkdir()
    assert verify(*models, oracle_only=True, bundle=folder).bundle
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="the folder isn't empty"):
        verify(*models, oracle_only=True, bundle=folder)
    assert (folder / "mine.txt").exists()
    assert verify(*models, oracle_only=True, bundle=folder, force=True).bundle
    assert not (folder / "mine.txt").exists()
    with pytest.raises(UsageError, match="a file; name a folder"):
        verify(*models, bundle=folder / "README.txt")
    with pytest.raises(UsageError, match="is not a folder"):
        verify(*models, bundle=tmp_path / "nowhere" / "bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle"]


def test_a_bundle_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(InputError, match="No space left"):
        verify(*pair(**CAUSES["mean"][0]), oracle_only=True, bundle=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_no_bundle_of_what_is_equivalent(tmp_path):
    report = verify(*pair(), oracle_only=True, bundle=tmp_path / "bundle")
    assert (report.verdict, report.bundle, list(tmp_path.iterdir())) == ("equivalent", "", [])


# --- on the command line ------------------------------------------------------------------------------------------------------------


def test_verify_writes_a_bundle(tmp_path, monkeypatch, capsys):
    from bnfold.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name, made in zip(("one", "other"), pair(**CAUSES["mean"][0]), strict=True):
        bnfold.save(made, f"{name}.onnx")
    monkeypatch.setattr("sys.argv", ["bnfold", "verify", "one.onnx", "other.onnx", "--bundle", "bundle", "--report", "report.json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert "likely cause: the running mean isn't subtracted (BatchNorm node_stem_bn)" in shown.out
    assert "output, channel " in shown.out
    assert "written: bundle" in shown.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bundle"] == "bundle"
    assert report["difference"].keys() >= {"layer", "channel", "position", "expected", "found", "cause"}
    assert report["difference"]["layer"] == report["first_difference"] == "node_stem"
    assert "different" in reproduce(tmp_path / "bundle")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


# --- random networks ------------------------------------------------------------------------------------------------------------------


def test_right_folds_of_random_networks_part_nowhere():
    compared = 0
    for seed in range(60):
        network = build(seed)
        fused, _ = bnfold.fuse(network, check=False)
        sides = sides_of(*(OnnxModel(from_proto(m)) for m in (network, fused)))
        seen = compare_values(sides, feeds(network))
        assert first_to_reach_an_output(sides, seen) is None, seed
        compared += len(seen)
    assert compared > 500


def test_a_changed_weight_of_a_random_network_is_found():
    """The layer is the one that reads the weight, or what stands behind an Identity that does."""
    found = right = 0
    for seed in range(60, 110):
        network = build(seed)
        wrong, _ = bnfold.fuse(network, check=False)
        rng = np.random.default_rng(seed)
        used = {name for node in wrong.graph.node for name in node.input}
        floats = [t for t in wrong.graph.initializer if t.data_type in (1, 11) and t.name in used and np.prod(t.dims) > 1]
        if not floats:
            continue
        tensor = floats[rng.integers(len(floats))]
        array = onnx.numpy_helper.to_array(tensor).copy()
        array.flat[rng.integers(array.size)] += 0.5
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        report = verify(from_proto(network), from_proto(wrong), [feeds(network)], oracle_only=True)
        if report.verdict != "different":
            continue
        assert report.difference is not None, seed
        names = {tensor.name}
        for node in wrong.graph.node:
            if node.op_type in ("Identity", "Constant") and names & set(node.input):
                names |= set(node.output)
        readers = {node.name.removesuffix(".bias") for node in wrong.graph.node if names & set(node.input)}
        found += 1
        right += report.difference.layer in readers
    assert found > 30
    assert right >= 0.95 * found


# --- where it is laid -----------------------------------------------------------------------------------------------------------------


def shortcut(*, folded, extra=False):
    """Convolution, BatchNorm, activation, convolution, BatchNorm, and what goes in on top; `extra` with an activation before the sum."""
    rng = np.random.default_rng(0)
    arrays, nodes, last = {}, [], "x"
    for i in (1, 2):
        w, scale, shift = rng.normal(size=(4, 4, 1, 1)), rng.uniform(0.5, 1.5, 4), rng.normal(size=4)
        arrays |= {f"w{i}": w * scale.reshape(4, 1, 1, 1) if folded else w, f"b{i}": shift}
        if folded:
            nodes.append(helper.make_node("Conv", [last, f"w{i}", f"b{i}"], [f"n{i}"], name=f"conv{i}"))
        else:
            arrays |= {f"s{i}": scale, f"m{i}": np.zeros(4), f"v{i}": np.ones(4)}
            nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], name=f"conv{i}"))
            given = [f"c{i}", f"s{i}", f"b{i}", f"m{i}", f"v{i}"]
            nodes.append(helper.make_node("BatchNormalization", given, [f"n{i}"], name=f"bn{i}", epsilon=0.0))
        last = f"n{i}"
        if i == 1 or extra:
            nodes.append(helper.make_node("Relu", [last], [f"r{i}"], name=f"relu{i}"))
            last = f"r{i}"
    nodes.append(helper.make_node("Add", [last, "x"], ["sum"], name="sum"))
    nodes.append(helper.make_node("Relu", ["sum"], ["y"], name="end"))
    return small(nodes, arrays, {"x": (4, 4, 5, 5)}, {"y": (4, 4, 5, 5)})


def test_an_operator_too_many_is_laid_where_it_stands():
    assert verify(shortcut(folded=False), shortcut(folded=True)).verdict == "equivalent"
    report = verify(shortcut(folded=False), shortcut(folded=True, extra=True))
    assert (report.verdict, report.first_difference) == ("different", "conv2")
    assert report.difference.cause == "the candidate has Relu relu2 behind Conv conv2, which the reference hasn't"


def opaque(gain):
    """An operator of nobody's rules that holds a weight, and a BatchNorm behind it, or with a gain the same as one operator."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(4, 4)), "s": rng.uniform(1, 2, 4), "b": rng.normal(size=4), "m": rng.normal(size=4), "v": np.ones(4)}
    nodes = [
        helper.make_node("Einsum", ["x", "w", "one"], ["c"], name="opaque", equation="nk,ko,o->no"),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"], name="bn", epsilon=0.0),
    ]
    arrays["one"] = np.ones(4)
    if gain is not None:
        arrays["one"] = arrays["s"] * gain
        arrays["shift"] = arrays["b"] - arrays["m"] * arrays["s"]
        nodes[1:] = [helper.make_node("Add", ["c", "shift"], ["y"], name="add")]
    return small(nodes, arrays, {"x": (64, 4)}, {"y": (64, 4)})


def test_what_a_fold_by_hand_left_is_held_against_what_stands_behind_the_batchnorm():
    assert verify(opaque(None), opaque(np.ones(4))).verdict == "equivalent"
    report = verify(opaque(None), opaque(np.array([1, 1, 1.001, 1])))
    assert (report.verdict, report.difference.channel) == ("different", 2)


def product(*, computes=False, stores=False):
    """A product and an activation: whether it computes in half precision, between casts, and whether its weights are stored so."""
    kind = np.float16 if stores else np.float32
    arrays = {"w": np.random.default_rng(0).normal(size=(8, 6)).astype(kind), "b": np.random.default_rng(1).normal(size=6).astype(kind)}
    cast = {"x": computes, **dict.fromkeys(arrays, computes != stores)}
    nodes = [helper.make_node("Cast", [k], [f"{k}.in"], to=10 if computes else 1) for k, needed in cast.items() if needed]
    nodes += [helper.make_node("Gemm", [f"{k}.in" if needed else k for k, needed in cast.items()], ["h"], name="gemm")]
    nodes += [helper.make_node("Relu", ["h"], ["y.out" if computes else "y"], name="relu")]
    if computes:
        nodes += [helper.make_node("Cast", ["y.out"], ["y"], to=1)]
    fed, given = (helper.make_tensor_value_info(name, 1, ["N", size]) for name, size in (("x", 8), ("y", 6)))
    held = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [fed], [given], held)
    return from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


def test_a_candidate_in_half_precision_is_said_to_be():
    report = verify(product(), product(computes=True, stores=True))
    assert report.verdict == "different"
    assert report.reason.startswith("the candidate computes in float16 (")
    assert "the candidate computes in float16, the reference in float32" in report.difference.cause


def test_a_candidate_stored_in_half_precision_is_said_to_be():
    report = verify(product(), product(stores=True))
    assert report.verdict == "different"
    assert "the candidate stores its weights in float16, the reference in float32" in report.difference.cause


def test_a_candidate_that_computes_in_half_precision_with_the_references_weights_is_equivalent_with_a_note():
    report = verify(product(), product(computes=True))
    assert report.verdict == "equivalent"
    assert any("the candidate computes in float16" in text for text in (report.reason, *report.notes))
