"""Sessions on ONNX Runtime: feeds, providers, types, and what they refuse."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from bnfold.backends.onnx.graph.ranges import inputs
from bnfold.backends.onnx.oracle.evaluator import Oracle
from bnfold.backends.onnx.runtime import session as run
from bnfold.backends.onnx.runtime.session import Session
from bnfold.data import InputSpec
from bnfold.data.random import random_feeds
from bnfold.errors import DataError, DeviceError, UnsupportedError, UsageError

info = helper.make_tensor_value_info
make = helper.make_node


def model(nodes, takes, gives, weights=None, opset=17, ir_version=10) -> ir.Model:
    tensors = [onnx.numpy_helper.from_array(v, k) for k, v in (weights or {}).items()]
    graph = helper.make_graph(nodes, "test", takes, gives, tensors)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version))


def linear(kind=TensorProto.FLOAT) -> ir.Model:
    weight = np.arange(6).reshape(3, 2).astype(helper.tensor_dtype_to_np_dtype(kind))
    nodes = [make("MatMul", ["x", "w"], ["a"]), make("Relu", ["a"], ["y"])]
    return model(nodes, [info("x", kind, ["batch", 3])], [info("y", kind, ["batch", 2])], {"w": weight})


X = np.array([[1, -1, 2], [0, -3, 1]], np.float32)


def test_inputs_leave_out_what_an_initializer_fills():
    net = model(
        [make("Add", ["x", "w"], ["y"])],
        [info("x", TensorProto.FLOAT16, ["n", None, 3]), info("w", TensorProto.FLOAT16, [3])],
        [info("y", TensorProto.FLOAT16, None)],
        {"w": np.zeros(3, np.float16)},
    )
    assert inputs(net) == [InputSpec("x", np.dtype(np.float16), ("n", None, 3))]


def test_an_input_without_a_rank_or_that_is_no_tensor_is_refused():
    net = model([make("Relu", ["x"], ["y"])], [info("x", TensorProto.FLOAT, None)], [info("y", TensorProto.FLOAT, None)])
    with pytest.raises(UnsupportedError, match="input 'x' doesn't state its rank"):
        inputs(net)
    assert inputs(net, {"x": X}) == [InputSpec("x", np.dtype(np.float32), (None, None))]
    for runs in (Session(net), Oracle(net)):
        np.testing.assert_array_equal(runs.run({"x": X})["y"], np.maximum(X, 0))
    sequence = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None)
    net = model([make("SequenceLength", ["x"], ["y"])], [sequence], [info("y", TensorProto.INT64, [])])
    with pytest.raises(UnsupportedError, match="input 'x' is no tensor"):
        inputs(net)


def test_a_session_gives_outputs_by_name_and_inner_values():
    net = linear()
    before = ir.to_proto(net).SerializeToString(deterministic=True)
    for optimise in (False, True):
        found = Session(net, optimise=optimise, outputs=["a", "y"], threads=1).run({"x": X})
        assert list(found) == ["y", "a"]
        np.testing.assert_array_equal(found["a"], X @ np.arange(6).reshape(3, 2))
        np.testing.assert_array_equal(found["y"], np.maximum(found["a"], 0))
    assert ir.to_proto(net).SerializeToString(deterministic=True) == before
    with pytest.raises(UsageError, match="the model computes no value 'zebra'"):
        Session(net, outputs=["zebra"])


def test_two_runs_are_equal():
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((16, 8, 3, 3)).astype(np.float32)}
    net = model(
        [make("Conv", ["x", "w"], ["y"])], [info("x", TensorProto.FLOAT, [2, 8, 20, 20])], [info("y", TensorProto.FLOAT, None)], weights
    )
    session, feeds = Session(net, threads=2), {"x": rng.standard_normal((2, 8, 20, 20)).astype(np.float32)}
    np.testing.assert_array_equal(session.run(feeds)["y"], session.run(feeds)["y"])


def test_with_optimisation_off_a_batchnorm_stays_one():
    """The network's answer is bit for bit that of the BatchNormalization alone, run on the convolution's answer."""
    rng = np.random.default_rng(0)
    c = 4
    weights = {"w": rng.standard_normal((c, 3, 1, 1)), **{k: rng.uniform(0.5, 2, c) for k in "gbmv"}}
    nodes = [make("Conv", ["x", "w"], ["a"]), make("BatchNormalization", ["a", *"gbmv"], ["y"])]
    weights = {k: v.astype(np.float32) for k, v in weights.items()}
    net = model(nodes, [info("x", TensorProto.FLOAT, [2, 3, 5, 5])], [info("y", TensorProto.FLOAT, None)], weights)
    feeds = random_feeds(inputs(net))
    a, *params = (Session(net, outputs=["a"]).run(feeds)["a"], *(weights[k] for k in "gbmv"))
    bn = model(
        [make("BatchNormalization", ["a", *"gbmv"], ["y"])],
        [info("a", TensorProto.FLOAT, a.shape)],
        [info("y", TensorProto.FLOAT, None)],
        dict(zip("gbmv", params, strict=True)),
    )
    np.testing.assert_array_equal(Session(net).run(feeds)["y"], Session(bn).run({"a": a})["y"])


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_precision_goes_in_and_comes_out_as_it_is(kind):
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes = [make("Identity", ["x"], ["a"]), make("Identity", ["a"], ["y"])]
    net = model(nodes, [info("x", kind, ["n", 3])], [info("y", kind, ["n", 3])])
    assert inputs(net)[0].dtype == dtype
    x = (X / 3).astype(dtype)
    found = Session(net, outputs=["a"]).run({"x": x})
    for array in found.values():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array.view(np.uint16), x.view(np.uint16))


def test_bfloat16_reaches_subgraphs_and_overridable_initializers_stay():
    kind = TensorProto.BFLOAT16
    then = helper.make_graph([make("Identity", ["x"], ["yes"])], "then", [], [info("yes", kind, None)])
    other = helper.make_graph([make("Identity", ["w"], ["no"])], "else", [], [info("no", kind, None)])
    takes = [info("x", kind, [2]), info("c", TensorProto.BOOL, []), info("w", kind, [2])]
    weight = np.array([3, 4], ml_dtypes.bfloat16)
    net = model([make("If", ["c"], ["y"], then_branch=then, else_branch=other)], takes, [info("y", kind, None)], {"w": weight})
    session, x = Session(net), np.array([1, 2], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(session.run({"x": x, "c": np.array(True)})["y"], x)
    np.testing.assert_array_equal(session.run({"x": x, "c": np.array(False)})["y"], weight)


def test_an_overridable_initializer_can_be_fed():
    takes = [info("x", TensorProto.FLOAT, [2]), info("w", TensorProto.FLOAT, [2])]
    net = model([make("Add", ["x", "w"], ["y"])], takes, [info("y", TensorProto.FLOAT, [2])], {"w": np.ones(2, np.float32)})
    x = np.zeros(2, np.float32)
    np.testing.assert_array_equal(Session(net).run({"x": x})["y"], [1, 1])
    np.testing.assert_array_equal(Session(net).run({"x": x, "w": x + 5})["y"], [5, 5])


def test_a_model_past_the_limit_of_protocol_buffers_goes_through_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "PROTO_LIMIT", 10)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    session = Session(linear())
    assert len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(session.run({"x": X})["y"], np.maximum(X @ np.arange(6).reshape(3, 2), 0))
    del session
    assert not list(tmp_path.iterdir())


def test_external_data_are_found_wherever_the_program_runs(tmp_path, monkeypatch):
    proto = ir.to_proto(linear())
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = Session(ir.load(tmp_path / "m.onnx")).run({"x": X})["y"]
    np.testing.assert_array_equal(found, np.maximum(X @ np.arange(6).reshape(3, 2), 0))


# ---- providers


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider"])
def test_a_provider_has_a_short_and_a_long_name(name):
    assert Session(linear(), provider=name).provider == "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("name", "wheel"),
    [("cuda", "onnxruntime-gpu"), ("TensorrtExecutionProvider", "onnxruntime-gpu"), ("openvino", "onnxruntime-openvino"),
     ("dml", "onnxruntime-directml"), ("directml", "onnxruntime-directml"), ("rocm", "onnxruntime-rocm"), ("qnn", "onnxruntime-qnn"),
     ("migraphx", "onnxruntime-migraphx"), ("coreml", "wheel for macOS"), ("xnnpack", "an ONNX Runtime that is built with it")],
)  # fmt: skip
def test_a_provider_that_is_not_built_in(name, wheel, capfd):
    short = name.lower().removesuffix("executionprovider")
    if any(short in p.lower() for p in ort.get_available_providers()):
        pytest.skip(f"{name} is there")
    with pytest.raises(DeviceError, match=rf"execution provider \w+ is not in this ONNX Runtime.*has.*cpu; .*{wheel}"):
        Session(linear(), provider=name)
    assert capfd.readouterr() == ("", "")


def test_a_provider_that_nobody_knows(capfd):
    with pytest.raises(UsageError, match="no execution provider is called 'cdua'; did you mean cuda"):
        Session(linear(), provider="cdua")
    with pytest.raises(UsageError, match=r"no execution provider is called 'zzzzzz'; ONNX Runtime knows .*cuda.* cpu"):
        Session(linear(), provider="zzzzzz")
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_onnx_runtime_drops(monkeypatch):
    """As where a wheel has the provider but its libraries don't load."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("CUDA is there")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(DeviceError, match=r"execution provider cuda is built in but ONNX Runtime dropped it and would run on cpu instead"):
        Session(linear(), provider="cuda")


def test_a_provider_that_fails_to_start(monkeypatch, capfd):
    def fail(*args, **kwargs):
        assert kwargs["enable_fallback"] == 0
        assert kwargs["providers"] == [("CUDAExecutionProvider", {"use_tf32": "0"})]
        raise RuntimeError("CUDA failure 35:\n driver too old")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", fail)
    with pytest.raises(
        DeviceError, match=r"execution provider cuda could not start: CUDA failure 35: driver too old; see to its libraries"
    ):
        Session(linear(), provider="cuda")
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
def test_cuda_computes_without_tf32():
    """TF32 has 11 significant bits: its error is some 1e-4 of the answer, float32's 1e-6."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((64, 64, 3, 3)).astype(np.float32)}
    net = model(
        [make("Conv", ["x", "w"], ["y"])], [info("x", TensorProto.FLOAT, ["n", 64, 32, 32])], [info("y", TensorProto.FLOAT, None)], weights
    )
    feeds = random_feeds(inputs(net), batch=2)
    expected = Oracle(net).run(feeds)["y"]
    for optimise in (False, True):
        found = Session(net, provider="cuda", optimise=optimise).run(feeds)["y"]
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


# ---- what ONNX Runtime refuses


def test_an_opset_that_onnx_runtime_has_no_kernel_for(capfd):
    params = {k: np.ones(3, np.float32) for k in "gbmv"}
    takes = [info("x", TensorProto.FLOAT, [2, 3]), *(info(k, TensorProto.FLOAT, [3]) for k in params)]
    nodes = [make("BatchNormalization", ["x", *"gbmv"], ["y"], is_test=1)]
    net = model(nodes, takes, [info("y", TensorProto.FLOAT, [2, 3])], params, opset=6, ir_version=3)
    with pytest.raises(UnsupportedError, match=r"^ONNX Runtime can't run this model: .*BatchNormalization") as caught:
        Session(net)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_invalid_graph(capfd):
    net = model([make("Relu", ["x", "x"], ["y"])], [info("x", TensorProto.FLOAT, [2])], [info("y", TensorProto.FLOAT, [2])])
    with pytest.raises(UnsupportedError, match="ONNX Runtime can't run this model: "):
        Session(net)
    assert capfd.readouterr() == ("", "")


# ---- feeds


@pytest.mark.parametrize(("feeds", "text"), [
    ({}, "no data for input 'x'; the data have nothing"),
    ({"z": X}, "no data for input 'x'; the data have 'z'"),
    ({"x": X, "z": X}, "the data name 'z', but the model's inputs are 'x'"),
    ({"x": X.astype(np.float64)}, "input 'x' takes float32, the data are float64"),
    ({"x": X.astype(np.int32)}, "input 'x' takes float32, the data are int32"),
    ({"x": X[0]}, "input 'x' has shape (batch, 3), the data have (3)"),
    ({"x": X[:, :2]}, "input 'x' has shape (batch, 3), the data have (2, 2)"),
])  # fmt: skip
def test_feeds_that_do_not_fit(feeds, text):
    with pytest.raises(DataError, match=f"^{re.escape(text)}$"):
        Session(linear()).run(feeds)


def test_one_symbol_has_one_size():
    takes = [info("a", TensorProto.FLOAT, ["n"]), info("b", TensorProto.FLOAT, ["n"])]
    net = model([make("Concat", ["a", "b"], ["y"], axis=0)], takes, [info("y", TensorProto.FLOAT, None)])
    with pytest.raises(DataError, match="'n' is 2 on axis 0 of 'a' but 3 on axis 0 of 'b'"):
        Session(net).run({"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)})


def test_a_size_that_the_model_can_not_run(capfd):
    net = model(
        [make("Reshape", ["x", "s"], ["y"])],
        [info("x", TensorProto.FLOAT, ["n"])],
        [info("y", TensorProto.FLOAT, None)],
        {"s": np.array([2, 3])},
    )
    with pytest.raises(DataError, match=r"^ONNX Runtime can't run the model on x \(5\): .*Reshape"):
        Session(net).run({"x": np.zeros(5, np.float32)})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("on_cpu", "raised", "said"), [(True, DeviceError, r"on x \(6\), which the CPU runs: .*failure 700"), (False, DataError, "")]
)
def test_a_provider_that_fails_in_mid_run(monkeypatch, on_cpu, raised, said):
    net = model([make("Sqrt", ["x"], ["y"])], [info("x", TensorProto.FLOAT, ["n"])], [info("y", TensorProto.FLOAT, None)])
    device, run = Session(net), ort.InferenceSession.run

    def failing(self, *args):
        if self is device._session or not on_cpu:
            raise Fail("[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Sqrt node. CUDA failure 700")
        return run(self, *args)

    monkeypatch.setattr(ort.InferenceSession, "run", failing)
    monkeypatch.setattr("bnfold.backends.onnx.runtime.providers.resolve", lambda name: f"{name.upper()}ExecutionProvider")
    device._requested = "cuda"
    with pytest.raises(raised, match=said or r"^ONNX Runtime can't run the model on x \(6\): Non-zero"):
        device.run({"x": np.ones(6, np.float32)})


# ---- random feeds


def spec(name, dtype, *shape):
    return InputSpec(name, np.dtype(dtype), shape)


def test_random_feeds_fill_dynamic_axes():
    specs = [
        spec("image", np.float32, "n", 3, "h", "w"),
        spec("volume", np.float16, None, 1, None, None, None),
        spec("tokens", np.int64, "n", "length"),
        spec("mask", bool, "n", "length"),
        spec("pixels", np.uint8, 2, 5),
        spec("same", ml_dtypes.bfloat16, "w", "length"),
        spec("scalar", np.float64),
    ]
    feeds = random_feeds(specs, batch=4, seed=1, sizes={"w": 48})
    shapes = {k: v.shape for k, v in feeds.items()}
    assert shapes == {
        "image": (4, 3, 64, 48),
        "volume": (4, 1, 32, 32, 32),
        "tokens": (4, 16),
        "mask": (4, 16),
        "pixels": (2, 5),
        "same": (48, 16),
        "scalar": (),
    }
    assert all(feeds[s.name].dtype == s.dtype for s in specs)
    assert set(np.unique(feeds["tokens"])) == {0, 1}
    assert 0.9 < feeds["image"].std() < 1.1
    again, other = random_feeds(specs, batch=4, seed=1, sizes={"w": 48}), random_feeds(specs, batch=4, seed=2, sizes={"w": 48})
    assert all(np.array_equal(feeds[k], again[k]) for k in feeds)
    assert not np.array_equal(feeds["image"], other["image"])


def test_random_feeds_take_whole_shapes():
    specs = [spec("a", np.float32, "n", 3, "h"), spec("b", np.float32, "n", "h")]
    assert {k: v.shape for k, v in random_feeds(specs, batch=9, input_shapes={"a": (2, 3, 7)}).items()} == {"a": (2, 3, 7), "b": (2, 7)}
    with pytest.raises(UsageError, match=re.escape("input 'a' has shape (n, 3, h); (2, 4, 7) doesn't fit it")):
        random_feeds(specs, input_shapes={"a": (2, 4, 7)})
    with pytest.raises(UsageError, match="--input-shape names 'c', which is no input; the model has a and b"):
        random_feeds(specs, input_shapes={"c": (2,)})


def test_random_text_is_refused():
    with pytest.raises(UnsupportedError, match="there are no random data of that type; give --data"):
        random_feeds([spec("t", object, 2)])
