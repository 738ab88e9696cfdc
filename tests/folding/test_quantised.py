"""Weights that are stored as integers: of a fold, not one integer may change but for its sign, also where they are rounded in the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cases import Case, Net
from cases.quantised import CASES, SHAPES, drawn, layer
from compare import batchnorms, difference, feeds, run_double, run_stored
from onnx import TensorProto, helper

import bnfold
from bnfold.algebra.affine import Blocked
from bnfold.algebra.quantised import Quantised

OTHER = ("dead", "factors", "Mul", "in a row", "without a scale")
FOLDED = [case for case in CASES if not case.left and case.ort and not any(word in case.name for word in OTHER)]


def integers(model: onnx.ModelProto) -> list[tuple[np.ndarray, np.ndarray]]:
    """The codes of every quantised weight, and how far they are from their zeros, as ONNX Runtime computes them."""
    probe, known, found = onnx.ModelProto(), {t.name for t in model.graph.initializer}, []
    probe.CopyFrom(model)
    del probe.graph.output[:]
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in known:
            attributes = {a.name: a.i for a in node.attribute}
            found.append((attributes.get("axis", 1), attributes.get("block_size", 0), len(node.input) > 2))
            for name in (node.input[0], *node.input[2:]):
                wide = f"wide {len(probe.graph.output)}"
                probe.graph.node.append(helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT))
                probe.graph.output.append(helper.make_tensor_value_info(wide, TensorProto.FLOAT, None))
        if node.op_type == "Constant" or (node.input and all(name in known for name in node.input)):
            known |= set(node.output)
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, 4
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays, pairs = iter(session.run(None, feeds(model))), []
    for axis, block, has_zero in found:
        codes = next(arrays)
        zero = next(arrays) if has_zero else np.zeros(())
        if block and zero.ndim:
            zero = np.repeat(zero, block, axis).take(range(codes.shape[axis]), axis)
        elif zero.ndim:
            zero = zero.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)])
        pairs.append((codes, codes - zero))
    return [pair for pair in pairs if pair[0].ndim > 1]


@pytest.mark.parametrize("case", FOLDED, ids=str)
def test_no_integer_changes_but_for_its_sign(case: Case) -> None:
    model = case.build()
    fused, report = bnfold.fuse(model)
    assert report.verify is not None
    assert report.verify.verdict == "equivalent", report.verify.reason
    before, after = integers(model), integers(fused)
    assert len(after) >= len(before) > 0
    for new in after:
        assert any(old[0].shape == new[0].shape and _alike(old, new) for old in before)


@pytest.mark.parametrize("case", [case for case in CASES if "that a Mul scales" in case.name], ids=str)
def test_a_scale_that_a_mul_holds_takes_the_sign_too(case: Case) -> None:
    """Nothing that makes the integers changes: not the scale that they are divided by either, of which the Mul gets a copy."""
    model = case.build()
    fused, report = bnfold.fuse(model)
    assert report.verify is not None
    assert report.verify.verdict == "equivalent", report.verify.reason
    before, after = ({t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, fused))
    (scale,) = (name for name in after if name.startswith(("s_", "w_0.scale")) and not np.array_equal(after[name], before.get(name)))
    assert (after[scale] < 0).any(), "where the BatchNorm is negative"
    assert all(np.array_equal(array, after[name]) for name, array in before.items() if name.startswith(("w", "q", "filters", "table")))
    assert bnfold.verify(model, fused).verdict == "equivalent"
    wrong = onnx.ModelProto()
    wrong.CopyFrom(fused)
    spoilt = next(t for t in wrong.graph.initializer if t.name == scale)
    spoilt.CopyFrom(onnx.numpy_helper.from_array(after[scale] * np.float32(1.001), scale))
    assert bnfold.verify(model, wrong).verdict == "different"


def _alike(old: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether all are as far from their zeros as they were, and those that keep their sign are equal."""
    same = (np.sign(old[1]) == np.sign(new[1])) & (old[1] != 0)
    return bool((np.abs(old[1]) == np.abs(new[1])).all() and (old[0] == new[0])[same].all())


def test_one_scale_can_be_kept() -> None:
    net = Net("one scale", opset=19)
    drawn(net, axis=None)
    model = net.model()
    kept, report = bnfold.fuse(model, keep_per_tensor=True)
    assert report.batchnorms.after == 1
    assert "--keep-per-tensor" in report.layers[0].reason
    assert kept == model
    net = Net("one scale for equal factors", opset=19)
    x, flat = net.input("N", 4, "H", "W"), [net.weight(np.full(6, value)) for value in (-0.5, 0.25, 0.1, 2.0)]
    net.output(net.bn(layer(net, x, axis=None), 6, params=flat))
    model = net.model()
    fused, report = bnfold.fuse(model, keep_per_tensor=True)
    assert batchnorms(fused) == 0, report.layers[0].reason
    assert all(t.dims in ([], [1]) for t in fused.graph.initializer if t.data_type == 1 and "scale" in t.name)


def quantised(codes: np.ndarray, *, one_zero: str = "", scale: float = 0.5, kind: str = "float32") -> Quantised:
    grid, zero = np.full((len(codes), 1), scale), np.zeros((len(codes), 1))
    blocks = (1, codes.shape[1])
    return Quantised(lambda: codes, codes.shape, grid, zero, blocks, np.dtype(np.int8), -128, 127, np.dtype(kind), one_zero=one_zero)


def test_what_codes_cannot_take_is_said() -> None:
    codes = np.array([[1.0, 2.0], [-128.0, 3.0]])
    minus = np.array([[-1.0, -1.0], [-2.0, -2.0]])
    made = quantised(codes).rescaled(minus)
    assert (made.mirrored, made.negated) == (1, 2)
    np.testing.assert_array_equal(made.zero, [[0], [-1]])
    np.testing.assert_array_equal(made.codes, [[-1, -2], [127, -4]])
    with pytest.raises(Blocked, match="channel 1 would need the negative of -128; it has no zero point"):
        quantised(codes, one_zero="it has no zero point").rescaled(minus)
    with pytest.raises(Blocked, match="a scale of it would be 5e-09, which float16 can't hold"):
        quantised(codes, kind="float16").rescaled(np.full((2, 2), 1e-8))
    with pytest.raises(Blocked, match="would be no number"):
        quantised(codes).rescaled(np.full((2, 2), np.nan))


def test_a_weight_near_a_step_keeps_its_code() -> None:
    """Of floats that lie at the middle of two steps, the rounding of both the new weight and the new scale decides."""
    net = Net("ties", opset=13)
    codes = net.rng.integers(-100, 100, SHAPES["Conv"]) + 0.5
    scale = net.rng.uniform(0.01, 0.03, 6).astype(np.float32)
    w = net.constant((codes * scale.reshape(-1, 1, 1, 1)).astype(np.float32))
    ends = net.constant(scale), net.constant(np.zeros(6, np.int8))
    w = net.op("DequantizeLinear", net.op("QuantizeLinear", w, *ends, axis=0), *ends, axis=0)
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), w), 6, positive=True))
    model = net.model()
    fused, _ = bnfold.fuse(model)
    np.testing.assert_array_equal(integers(fused)[0][0], integers(model)[0][0])
    assert difference(run_stored(model, feeds(model)), run_stored(fused, feeds(fused))) < 1e-5
    assert [node.op_type for node in fused.graph.node] == ["QuantizeLinear", "DequantizeLinear", "Conv"]
    moved = dict(zip(("w", "scale"), fused.graph.node[0].input[:2], strict=True))
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in fused.graph.initializer}
    found = arrays[moved["w"]] / arrays[moved["scale"]].reshape(-1, 1, 1, 1)
    assert (np.abs(found - integers(fused)[0][0]) < 0.1).any(), "some had to be moved to the middle of their step"


def test_a_zero_point_that_is_cast_leaves_the_rounding_as_runtimes_do_it() -> None:
    """Quotients of float32 lie at the middle of two steps that aren't there in float64."""
    net = Net("cast", opset=13)
    scale = net.rng.uniform(0.01, 0.03, 6).astype(np.float32)
    w = net.constant(((net.rng.integers(-100, 100, SHAPES["Conv"]) + 0.5) * scale.reshape(-1, 1, 1, 1)).astype(np.float32))
    ends = net.constant(scale), net.op("Cast", net.constant(np.zeros(6, np.int32)), to=3)
    w = net.op("DequantizeLinear", net.op("QuantizeLinear", w, *ends, axis=0), *ends, axis=0)
    net.output(net.op("Conv", net.input("N", 4, "H", "W"), w))
    model = net.model()
    assert difference(run_double(model, feeds(model)), run_stored(model, feeds(model))) < 1e-6


def halved(scale: float, gain: float, *, scale_type: type = np.float32, cast: bool = True) -> onnx.ModelProto:
    """A layer of 6 channels in half precision, whose int8 filter has one scale, and that a BatchNorm multiplies by one number."""
    net = Net("halved", opset=19, dtype="float16" if cast else "float32")
    stored = net.constant(net.rng.integers(1, 128, SHAPES["Conv"]).astype(np.int8))
    w = net.op("DequantizeLinear", stored, net.constant(np.array(scale, scale_type)))
    w = net.op("Cast", w, to=TensorProto.FLOAT16) if cast else w
    params = [net.weight(np.full(6, value)) for value in (gain, 0, 0, 0.99)]
    net.output(net.bn(net.op("Conv", net.input("N", 4, 9, 9), w), 6, params=params))
    return net.model()


def test_what_is_stored_is_judged_and_not_what_it_stands_for() -> None:
    """The scales are what is rounded; what runtimes make of them and of the integers must be a number in its own type, too."""
    tiny = bnfold.fuse(halved(1e-5, 0.01), check=False)[1]
    assert tiny.layers[0].verdict == "folded", tiny.layers[0].reason
    assert not any("too small" in note for note in tiny.layers[0].notes), "all weights are subnormal in half precision, and no scale is"
    small = bnfold.fuse(halved(1e-4, 1e-3, scale_type=np.float16), check=False)[1]
    assert "a scale of it would be 1e-07, which float16 can't hold" in small.layers[0].reason, "its weights would be normal but for one"
    large = bnfold.fuse(halved(10.0, 1e3), check=False)[1]
    assert "beyond the largest 6.55e+04 of its type" in large.layers[0].reason
    assert bnfold.fuse(halved(10.0, 1e3, cast=False))[1].layers[0].verdict == "folded"


@pytest.mark.parametrize(("scale", "told"), [(1e-4, True), (0.1, False)])
def test_a_target_is_held_against_the_scales(scale: float, told: bool) -> None:
    notes = bnfold.fuse(halved(scale, 1e-3, cast=False), target="float16")[1].notes
    assert any("--target float16: the weight of Conv_node_0 has scales 1 too small for it" in note for note in notes) == told
    assert len(notes) == told


# --- what onnxruntime.quantization writes ------------------------------------------------------------------------------------------------


def dynamic(tmp_path: Path, layer: str, *, bias: bool = True, **how: Any) -> onnx.ModelProto:
    quantization = pytest.importorskip("onnxruntime.quantization")
    net = Net(f"dynamic {layer}", opset=17)
    if layer == "Conv":
        y = net.conv(net.input("N", 4, 8, 8), 4, 6, bias=bias)
    else:
        y = net.op("MatMul", net.input("N", 4), net.matrix(4, 6))
        y = net.op("Add", y, net.bias(6)) if bias else y
    net.output(net.bn(y, 6))
    onnx.save(net.model(), tmp_path / "float.onnx")
    kind = quantization.QuantType.QUInt8 if layer == "Conv" else quantization.QuantType.QInt8
    quantization.quantize_dynamic(tmp_path / "float.onnx", tmp_path / "integers.onnx", weight_type=kind, **how)
    return onnx.load(tmp_path / "integers.onnx")


@pytest.mark.parametrize(
    ("layer", "bias", "per_channel"),
    [("Conv", True, False), ("Conv", False, False), ("MatMul", True, False), ("MatMul", True, True), ("MatMul", False, True)],
)
def test_dynamic_products_take_a_map_in_their_scales(layer: str, bias: bool, per_channel: bool, tmp_path: Path) -> None:
    model = dynamic(tmp_path, layer, bias=bias, per_channel=per_channel)
    fused, report = bnfold.fuse(model)
    assert batchnorms(fused) == 0, report.layers[0].reason
    assert report.verify is not None
    assert (report.verify.verdict, report.verify.levels.coefficients.verdict) == ("equivalent", "equivalent"), report.verify.reason
    assert "none of which changes" in report.layers[0].notes[0]
    assert ("one scale becomes one for each channel" in report.layers[0].notes[0]) != per_channel
    whole = [{t.name: t.raw_data for t in m.graph.initializer if t.data_type in (2, 3)} for m in (model, fused)]
    assert whole[0] == whole[1] != {}
    assert bnfold.verify(model, fused).verdict == "equivalent"
    if not per_channel:
        kept, report = bnfold.fuse(model, keep_per_tensor=True)
        assert batchnorms(kept) == 1
        assert "--keep-per-tensor leaves it one" in report.layers[0].reason


def test_a_quantised_operator_is_a_barrier_with_a_reason(tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]  # it is imported where it is installed
        def __init__(self) -> None:
            self.batches = iter([feeds(float_model, {"N": 8}, seed=seed) for seed in range(3)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    net = Net("static", opset=17)
    net.output(net.bn(net.conv(net.input("N", 4, 8, 8), 4, 6), 6))
    float_model = net.model()
    onnx.save(float_model, tmp_path / "float.onnx")
    for form in (quantization.QuantFormat.QDQ, quantization.QuantFormat.QOperator):
        quantization.quantize_static(tmp_path / "float.onnx", tmp_path / "integers.onnx", Reader(), quant_format=form)
        model = onnx.load(tmp_path / "integers.onnx")
        fused, report = bnfold.fuse(model)
        assert fused == model
        assert (
            "rounds activations to integers, which no map crosses exactly: fold before quantising, or recalibrate"
            in report.layers[0].reason
        )
    fused, _ = bnfold.fuse(float_model)
    onnx.save(fused, tmp_path / "float.onnx")  # what the reason says to do
    quantization.quantize_static(tmp_path / "float.onnx", tmp_path / "integers.onnx", Reader())
    assert batchnorms(onnx.load(tmp_path / "integers.onnx")) == 0


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack"])
def test_a_network_trained_for_quantisation_becomes_what_it_simulates(backend: str, tmp_path: Path) -> None:
    """Its convolutions have the scale of their BatchNorm in their weight before it is rounded, and divide by it behind: all of it folds."""
    torch = pytest.importorskip("torch")
    quantization = pytest.importorskip("torch.ao.quantization")
    nn = torch.nn
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6)]
    net, x = nn.Sequential(quantization.QuantStub(), *layers), torch.randn(8, 4, 9, 9)
    net = quantization.fuse_modules_qat(net.train(), [["1", "2", "3"], ["4", "5"]])
    net.qconfig = quantization.get_default_qat_qconfig(backend, version=0)
    net = quantization.prepare_qat(net)
    for _ in range(3):
        net(3 * x + 1)
    net.apply(quantization.disable_observer).eval()
    names: dict[str, Any] = {
        "opset_version": 17,
        "do_constant_folding": False,
        "training": torch.onnx.TrainingMode.PRESERVE,
        "dynamo": False,
    }
    torch.onnx.export(net, (x,), tmp_path / "trained.onnx", **names)
    model = onnx.load(tmp_path / "trained.onnx")
    assert batchnorms(model) == 2
    fused, _ = bnfold.fuse(model)
    assert batchnorms(fused) == 0
    assert {"Div", "Add", "Mul"}.isdisjoint(node.op_type for node in fused.graph.node), "the simulation is gone, too"
    found = bnfold.verify(model, fused)
    assert found.verdict == "equivalent", found.reason
    for (old, _), (new, _) in zip(integers(model), integers(fused), strict=True):
        assert (np.abs(old - new) > 1).sum() == 0
        assert (old != new).mean() < 0.01, "runtimes work the float weight out in float32, on whose steps it may lie"


@pytest.mark.parametrize(("what", "reason"), [("zero", "aren't as many as it has places for"), ("scale", "computed to be 0, or no number")])
def test_computed_numbers_that_make_no_sense_leave_the_batchnorm(what: str, reason: str) -> None:
    net = Net("computed numbers", opset=21)
    codes = net.constant(net.rng.integers(-100, 100, SHAPES["Conv"]).astype(np.int8))
    scale, zero = net.weight(np.full(6, 0.01)), net.constant(np.zeros(6, np.int8))
    if what == "scale":
        scale = net.op("Sub", scale, scale)
    else:
        zero = net.op("Sub", codes, codes)
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), net.op("DequantizeLinear", codes, scale, zero, axis=0)), 6))
    report = bnfold.inspect(net.model())
    assert reason in report.layers[0].reason


def test_operators_of_the_runtime_that_hold_scales_say_so() -> None:
    net = Net("holds scales", opset=21)
    x = net.input("N", 32)
    packed = net.constant(net.rng.integers(0, 256, (8, 1, 16)).astype(np.uint8)), net.weight(np.full(8, 0.1))
    y = net.op("MatMulNBits", x, *packed, domain="com.microsoft", K=32, N=8, bits=4, block_size=32)
    net.output(net.bn(y, 8), shape=["N", 8])
    model = net.model()
    assert bnfold.fuse(model)[0] == model
    assert "it multiplies by integers and scales of its own" in bnfold.inspect(model).layers[0].reason
