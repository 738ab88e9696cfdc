"""Execution providers: options, where nodes run, what the runtime prints, the rows of the verdict. On CUDA where there is some."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from opened import verify

import bnfold
from bnfold.backends.onnx.graph.proto import skeleton
from bnfold.backends.onnx.graph.ranges import inputs
from bnfold.backends.onnx.runtime import placement as placements
from bnfold.backends.onnx.runtime import providers
from bnfold.backends.onnx.runtime import session as run
from bnfold.backends.onnx.runtime.session import Session
from bnfold.capture import LOG, Hearing, heard, overhearing
from bnfold.cli import run as cli
from bnfold.data.random import random_feeds
from bnfold.errors import DeviceError, UsageError
from bnfold.report import Deployment
from bnfold.running import Placement
from tests.verification.test_verify_backends import Computes, Doubled

CUDA = "CUDAExecutionProvider"
FULL = [CUDA, "CPUExecutionProvider"]

# --- options --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("cpu", "cpu", {}),
        ("openvino:device_type=CPU", "openvino", {"device_type": "CPU"}),
        ("tensorrt:trt_fp16_enable=1, trt_engine_cache_path=/a/b", "tensorrt", {"trt_fp16_enable": "1", "trt_engine_cache_path": "/a/b"}),
        (
            "trt:trt_profile_min_shapes=x:1x3x8x8,y:1x3,device_id=1",
            "trt",
            {"trt_profile_min_shapes": "x:1x3x8x8,y:1x3", "device_id": "1"},
        ),
        ("cuda:1", "cuda", {"device_id": "1"}),
    ],
)
def test_options_follow_the_name(text: str, name: str, options: dict[str, str]) -> None:
    assert providers.parse(text) == (name, options)


@pytest.mark.parametrize("text", ["cuda:", "cuda:fast", "cuda:=1"])
def test_options_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="is no option; write them like cuda:key=value,key=value"):
        providers.parse(text)


def test_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    both, full, deployed = ("full", "as deployed"), ("full",), ("as deployed",)
    assert [providers.precisions(p) for p in ("cpu", "CPUExecutionProvider")] == [full, full]
    assert [providers.precisions(p) for p in ("cuda", "gpu:device_id=1")] == [both, both]
    assert [providers.precisions(p) for p in ("openvino", "openvino:device_type=CPU")] == [full, full]
    assert [providers.precisions(p) for p in ("openvino:device_type=GPU", "openvino:precision=FP16")] == [deployed, deployed]
    assert [providers.precisions(p) for p in ("tensorrt", "coreml", "dml")] == [deployed] * 3
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert [providers.precisions(p) for p in ("cuda", "trt", "trt:trt_fp16_enable=1")] == [full, full, deployed]


@pytest.fixture
def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An ONNX Runtime that claims to have CUDA; what it was asked for, session by session. All runs on the CPU."""
    asked: list[Any] = []
    real = ort.InferenceSession

    class OnCuda:
        def __init__(self, source: Any, options: Any, providers: Any, enable_fallback: int) -> None:
            asked.append(providers)
            self._real = real(source, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return FULL

        def get_provider_graph_assignment_info(self) -> Any:
            return self._real.get_provider_graph_assignment_info()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    monkeypatch.setattr(ort, "get_available_providers", lambda: FULL)
    monkeypatch.setattr(ort, "InferenceSession", OnCuda)
    return asked


def small(**more: Any) -> ir.Model:
    from conftest import small_model

    return ir.from_proto(small_model(**more))


def test_tf32_is_off_for_the_verdict_and_the_users_in_the_row_as_deployed(as_if_cuda: list[Any]) -> None:
    with placements.cpu_fallback(["Conv", "BatchNormalization"]):
        Session(small(), provider="cuda:use_tf32=1,device_id=0")
        Session(small(), provider="cuda:use_tf32=1,device_id=0", precision="as deployed")
        Session(small(), provider="cuda", precision="as deployed")
    assert as_if_cuda == [
        [(CUDA, {"use_tf32": "0", "device_id": "0"})],
        [(CUDA, {"use_tf32": "1", "device_id": "0"})],
        [(CUDA, {})],
    ]


# --- the rows of the verdict -----------------------------------------------------------------------------------------------------------


def test_every_row_says_where_it_ran(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["fuse", "model.onnx", "-o", "out.onnx"]) == 0
    capsys.readouterr()
    assert cli(["verify", "model.onnx", "out.onnx", "--provider", "cpu", "--json", "-q"]) == 0
    rows = json.loads(capsys.readouterr().out)["levels"]["deployment"]
    assert [(row["optimisation"], row["precision"], row["share"], row["nodes"], row["of"], row["counted"]) for row in rows] == [
        ("off", "full", 1.0, 1, 1, "session"),
        ("on", "full", 1.0, 1, 1, "session"),
    ]


def test_a_provider_that_rounds_by_itself_has_two_rows_for_each_setting(as_if_cuda: list[Any]) -> None:
    with placements.cpu_fallback(["Conv", "BatchNormalization"]):
        fused, _ = bnfold.fuse(small())
        report = bnfold.verify(small(), fused, providers=["cpu", "cuda"])
    rows = report.levels.deployment
    assert [(row.provider, row.precision, row.optimisation) for row in rows] == [
        ("cpu", "full", "off"),
        ("cpu", "full", "on"),
        ("cuda", "full", "off"),
        ("cuda", "full", "on"),
        ("cuda", "as deployed", "off"),
        ("cuda", "as deployed", "on"),
    ]
    assert [row.name for row in rows[3:5]] == ["cuda, optimisation on", "cuda as deployed, optimisation off"]
    assert [(row.share, row.placed) for row in rows[2:3]] == [(0.0, "0 of 1 nodes on cuda")]
    assert report.verdict == "equivalent"


class Coarse(Doubled):
    """As on a GPU: as deployed, the candidate loses more than it should, and in full it doesn't."""

    def __init__(self, shift: float, lost: float = 0.0, everywhere: bool = False) -> None:
        super().__init__(shift)
        self.lost, self.everywhere = lost, everywhere

    def precisions(self, provider: str) -> tuple[str, ...]:
        return ("full", "as deployed")

    def deployed(self, provider: str, optimisation: str, *, jitter: int | None = None, precision: str = "full") -> Computes:
        lost = self.lost if self.everywhere or precision == "as deployed" else 0.0
        return Computes(lambda x: self.scale * x + self.shift + np.float32(lost))


def test_the_row_as_deployed_is_told_and_doesnt_decide() -> None:
    report = verify(Coarse(1.5), Coarse(1.5, 1e-3))
    full, deployed = report.levels.deployment
    assert (report.verdict, full.verdict, deployed.verdict) == ("equivalent", "equivalent", "skipped")
    assert deployed.ratio > 100
    assert deployed.reason.endswith("float32 in full decides, see the other rows")
    assert report.outputs[0].error_ratio < 2
    assert verify(Coarse(1.5), Coarse(1.5, 1e-3, everywhere=True)).verdict == "different"


def test_the_old_keys_of_a_row_are_still_enough() -> None:
    row = Deployment("cpu", "off", 0.5)
    assert (row.name, row.precision, row.share, row.placed) == ("cpu, optimisation off", "full", None, "")
    assert Deployment("openvino:device_type=CPU", "on", 1.0, share=0.5, nodes=1, of=2, counted="profile").placed == (
        "1 of 2 nodes (by a profile) on openvino"
    )


# --- nodes that fall to the CPU --------------------------------------------------------------------------------------------------------


def shapes_and_numbers() -> ir.Model:
    """x (n, 3, 8, 8), reshaped by its own shape, through a Det."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Reshape", ["x", "s"], ["r"], name="again"),
        helper.make_node("Det", ["r"], ["d"], name="det"),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(k, TensorProto.FLOAT, ["n", 3, 8, 8][: 4 if k == "x" else 2]) for k in "xy")
    return ir.from_proto(helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)]))


def test_what_works_out_shapes_may_run_on_the_cpu_and_a_compute_node_only_by_its_name() -> None:
    model = shapes_and_numbers()
    placement = Placement(1, 4, "session", (("Shape", "Shape_0"), ("Det", "det"), ("Relu", "Relu_3")))

    def graph() -> onnx.ModelProto:
        return skeleton(model)

    text = r"openvino leaves 2 of 4 nodes to the CPU: Det 'det', Relu 'Relu_3'; allow .* --allow-cpu-fallback Det --allow-cpu-fallback Relu"
    with pytest.raises(DeviceError, match=text):
        placements.honoured(placement, "openvino", graph)
    with placements.cpu_fallback(["Det"]), pytest.raises(DeviceError, match="leaves 1 of 4 nodes to the CPU: Relu 'Relu_3'"):
        placements.honoured(placement, "openvino", graph)
    with placements.cpu_fallback(["det", "Relu"]):
        placements.honoured(placement, "openvino", graph)
    placements.honoured(Placement(3, 4, "session", (("Shape", "Shape_0"),)), "openvino", graph)
    placements.honoured(None, "openvino", graph)


def test_a_provider_that_leaves_compute_to_the_cpu_is_not_honoured(as_if_cuda: list[Any]) -> None:
    with pytest.raises(DeviceError, match=r"execution provider cuda leaves 2 of 2 nodes to the CPU: Conv 'conv', BatchNormalization 'bn'"):
        Session(small(), provider="cuda")
    with pytest.raises(DeviceError, match="leaves 1 of 1 nodes to the CPU: Conv 'conv'"):
        bnfold.recalibrate(small(), np.zeros((4, 3, 8, 8), np.float32), provider="cuda")
    fresh, _ = bnfold.recalibrate(
        small(), np.ones((4, 3, 8, 8), np.float32), provider="cuda", allow_cpu_fallback=["Conv", "BatchNormalization"]
    )
    report = bnfold.verify(fresh, fresh, providers=["cuda"], allow_cpu_fallback=["Conv", "BatchNormalization"])
    assert report.levels.deployment[0].share == 0


def test_the_command_line_allows_by_name_and_is_told_by_its_status(
    as_if_cuda: list[Any], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["verify", "model.onnx", "model.onnx", "--provider", "cuda", "-q"]
    assert cli(line) == 5
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--allow-cpu-fallback Conv --allow-cpu-fallback BatchNormalization" in err
    assert cli([*line, "--allow-cpu-fallback", "Conv", "--allow-cpu-fallback", "bn"]) == 6  # the same model twice
    out = capsys.readouterr().out
    assert "cuda as deployed, optimisation off" in out
    assert "0 of 2 nodes on cuda" in out


def test_nodes_without_a_name_get_one_of_their_own() -> None:
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"], name=name) for i, name in enumerate(["", "", "Relu_1", "k", "k"])]
    graph = helper.make_graph(nodes, "g", [], [])
    placements.name_nodes(graph)
    names = [node.name for node in graph.node]
    assert len(set(names)) == 5
    assert names[2:4] == ["Relu_1", "k"]


def test_before_there_was_a_record_a_profile_tells_where_nodes_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Older(ort.InferenceSession):
        @property
        def get_provider_graph_assignment_info(self) -> Any:
            raise AttributeError

    monkeypatch.setattr(ort, "InferenceSession", Older)
    monkeypatch.setattr(run, "hasattr", lambda *_: False, raising=False)
    monkeypatch.setattr(run, "CPU", "none")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    net = small()
    session = Session(net)
    assert session.placement is None
    feeds = random_feeds(inputs(net), batch=2)
    first = session.run(feeds)["y"]
    assert session.placement == Placement(2, 2, "profile")
    np.testing.assert_array_equal(session.run(feeds)["y"], first)
    del session
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("bnfold-")]


# --- what the runtime prints -----------------------------------------------------------------------------------------------------------


def test_what_is_printed_past_python_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    heard.clear()
    with overhearing() as outer:
        os.write(2, b"one\n")
        with overhearing() as inner:
            os.write(1, b"two\n")
        os.write(2, b"\x1b[1;31m2026-11-21 08:07:40.139384124 [E:onnxruntime:Default, a.cc:1 Create] three\x1b[m\n")
        os.write(2, b"2026-11-21 08:07:40.139384124 [W:onnxruntime:Default, a.cc:1 Create] four\n")
    os.write(2, b"loose\n")
    assert capfd.readouterr() == ("", "loose\n")
    assert inner.text == ""
    assert outer.errors() == ["three"]
    assert Hearing("one\n\n \x1b[31mtwo\x1b[m \n").errors() == ["one", "two"]
    assert list(heard) == [outer.text]
    assert LOG.match("2026-11-21 08:07:40.1 [W:onnxruntime:Default, a.cc:1 Create] four")
    with overhearing() as quiet:
        pass
    assert quiet.text == ""
    heard.clear()


def test_only_the_end_of_much_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with overhearing() as hearing:
        for _ in range(100):
            os.write(2, b"x" * 10_000)
        os.write(2, b"end")
    assert hearing.text.endswith("xend")
    assert len(hearing.text) == 1 << 16
    heard.clear()


def test_why_a_provider_was_dropped_is_in_the_reason_and_not_loose(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Dropped:
        def __init__(self, *_: Any, **__: Any) -> None:
            os.write(
                2,
                b"2026-11-21 08:07:40.1 [E:onnxruntime:Default, provider_bridge_ort.cc:2310 Create] /a/b/c.cc:141 std::string ns::F(int, "
                b"const ns::G&) [ERROR] libcudnn.so.9: cannot open shared object file\n",
            )

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: FULL)
    monkeypatch.setattr(ort, "InferenceSession", Dropped)
    with pytest.raises(
        DeviceError, match=r"\(it says: \[ERROR\] libcudnn.so.9: cannot open shared object file\); see to its libraries, its driver"
    ):
        Session(small(), provider="cuda")
    assert capfd.readouterr() == ("", "")
    heard.clear()


def test_debug_shows_what_was_heard(monkeypatch: pytest.MonkeyPatch, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    real = ort.InferenceSession.run

    def chatty(self: Any, *args: Any) -> Any:
        os.write(2, b"\x1b[31mkernel says ::hello\n::error::owned\n")
        return real(self, *args)

    heard.clear()
    monkeypatch.setattr(ort.InferenceSession, "run", chatty)
    assert cli(["verify", "model.onnx", "model.onnx", "-q"]) == 6
    assert capfd.readouterr().err == ""
    assert cli(["verify", "model.onnx", "model.onnx", "-q", "--debug"]) == 6
    lines = capfd.readouterr().err.splitlines()
    assert set(lines) == {"runtime: kernel says ::hello", "runtime: \\x3a:error::owned"}


CRASH = """
import os, sys
from bnfold.capture import overhearing
from bnfold.cli.streams import own_stderr
own_stderr()
with overhearing():
    os.write(2, b"CUDA error 700: an illegal memory access\\n")
    print("progress goes on", file=sys.stderr, flush=True)
    os.kill(os.getpid(), {signal})
"""


@pytest.mark.skipif(os.name != "posix", reason="there is no helper process")
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_loses_nothing(number: int) -> None:
    done = subprocess.run([sys.executable, "-c", CRASH.format(signal=int(number))], capture_output=True, text=True, timeout=60)
    assert done.returncode == -number
    assert done.stderr.splitlines() == [
        "progress goes on",
        "bnfold: the process died while this was being said:",
        "CUDA error 700: an illegal memory access",
    ]


def test_an_exception_or_an_exit_leaves_nothing_behind() -> None:
    code = "import sys, os\nfrom bnfold.capture import overhearing\nwith overhearing():\n    os.write(2, b'noise')\n    {last}"
    for last, status in (("raise SystemExit(3)", 3), ("sys.exit(0)", 0)):
        done = subprocess.run([sys.executable, "-c", code.format(last=last)], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


# --- torch and CUDA ---------------------------------------------------------------------------------------------------------------------


def test_torch_counts_the_operators_that_ran_on_the_device() -> None:
    torch = pytest.importorskip("torch")
    from bnfold.backends.torch.runtime.session import Where

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    with Where(torch.device("cpu")) as there, torch.no_grad():
        net(torch.zeros(1, 3, 8, 8))
    with Where(torch.device("cuda")) as elsewhere, torch.no_grad():
        net(torch.zeros(1, 3, 8, 8))
    assert there.there == there.all >= 2
    assert (elsewhere.there, elsewhere.all) == (0, there.all)


def test_torch_on_the_cpu_is_nowhere_else() -> None:
    torch = pytest.importorskip("torch")
    net, x = torch_network(torch)
    (row,) = bnfold.verify(net, copy.deepcopy(net), x[:2]).levels.deployment
    assert (row.share, row.placed, row.precision) == (1.0, "", "full")


def test_a_torch_model_beside_onnx_takes_of_a_providers_options_only_the_device() -> None:
    pytest.importorskip("torch")
    from bnfold.backends.torch.model import TorchModel

    alone = TorchModel(None)
    beside = alone.beside(Doubled(1.5))
    given = ("cpu", "openvino:device_type=CPU", "cuda:1", "CUDA:use_tf32=0,device_id=2", "cuda:use_tf32=0")
    assert [beside._device(p) for p in given] == ["cpu", "cpu", "cuda:1", "cuda:2", "cuda"]
    assert alone._device("cuda:1") == "cuda:1"
    with pytest.raises(UsageError, match="run on cpu or cuda, not on 'openvino'"):
        alone.require("openvino")


@pytest.fixture
def torch_cuda() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch


@pytest.fixture
def ort_cuda() -> None:
    if CUDA not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")


def torch_network(torch: Any) -> tuple[Any, Any]:
    """64 channels, so that TF32's eleven bits show."""
    torch.manual_seed(0)
    layers: list[Any] = []
    for size in (3, 64, 64):
        layers += [torch.nn.Conv2d(size, 64, 3, padding=1, bias=False), torch.nn.BatchNorm2d(64), torch.nn.ReLU()]
    for layer in layers:
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias)
    return torch.nn.Sequential(*layers).eval(), torch.randn(16, 3, 20, 20)


@pytest.mark.gpu
def test_torch_fuses_recalibrates_and_verifies_on_cuda(torch_cuda: Any) -> None:
    net, x = torch_network(torch_cuda)
    on_cpu, _ = bnfold.recalibrate(net, x)
    fresh, report = bnfold.recalibrate(net, x, device="cuda")
    assert report.samples == len(x)
    for ours, theirs in zip(fresh.buffers(), on_cpu.buffers(), strict=True):
        if ours.is_floating_point():
            torch_cuda.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
    fused, folded = bnfold.fuse(copy.deepcopy(fresh).cuda(), example=x.cuda())
    assert folded.batchnorms.after == 0
    assert all(parameter.is_cuda for parameter in fused.parameters())
    verdict = bnfold.verify(fresh, fused, x, providers=["cpu", "cuda"])
    assert verdict.verdict == "equivalent"
    rows = [row for row in verdict.levels.deployment if row.provider == "cuda"]
    assert [row.precision for row in rows] == ["full", "as deployed"]  # PyTorch lets TF32 into convolutions by default
    assert all(row.counted == "operators" and row.share and row.share > 0.9 for row in rows)


@pytest.mark.gpu
def test_a_defect_shows_on_cuda_in_full_precision(torch_cuda: Any) -> None:
    net, x = torch_network(torch_cuda)
    wrong, _ = bnfold.fuse(net, example=x)
    with torch_cuda.no_grad():
        next(wrong.parameters())[2] *= 1.001
    assert bnfold.verify(net, wrong, x, providers=["cuda"]).verdict == "different"


@pytest.mark.gpu
def test_onnx_fuses_recalibrates_and_verifies_on_cuda(ort_cuda: None, digits: Path) -> None:
    model = bnfold.load(digits)
    images = np.load(digits.parent / "calibration.npz")["image"][:256]
    on_cpu, _ = bnfold.recalibrate(model, images)
    fresh, _ = bnfold.recalibrate(model, images, provider="cuda")
    for name, value in fresh.graph.initializers.items():
        ours, theirs = value.const_value.numpy(), on_cpu.graph.initializers[name].const_value.numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    fused, _ = bnfold.fuse(fresh)
    verdict = bnfold.verify(fresh, fused, images[:32], providers=["cpu", "cuda"])
    assert verdict.verdict == "equivalent"
    rows = [row for row in verdict.levels.deployment if row.provider == "cuda"]
    assert [(row.precision, row.optimisation) for row in rows] == [
        ("full", "off"),
        ("full", "on"),
        ("as deployed", "off"),
        ("as deployed", "on"),
    ]
    assert all(row.share and row.share > 0.9 for row in rows)
    assert all(row.ratio <= 2 for row in rows[:2])


@pytest.mark.gpu
def test_tf32_shows_in_the_row_as_deployed(ort_cuda: None) -> None:
    """Its error is a thousand times float32's: both sides have it, so the ratio doesn't show it, but the session's numbers do."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((64, 64, 3, 3)).astype(np.float32)}
    x, y = (helper.make_tensor_value_info(k, TensorProto.FLOAT, ["n", 64, None, None]) for k in "xy")
    tensors = [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", [x], [y], tensors)
    net = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    feeds = {"x": rng.standard_normal((2, 64, 32, 32)).astype(np.float32)}
    expected = Session(net).run(feeds)["y"]
    errors = [
        np.abs(Session(net, provider="cuda", precision=p).run(feeds)["y"] - expected).max() / np.abs(expected).max()
        for p in ("full", "as deployed")
    ]
    assert errors[0] < 1e-5 < errors[1]


# --- OpenVINO, in an environment of its own ----------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.openvino
def test_openvino_by_the_command_of_the_readme(tmp_path: Path, digits: Path, resnet18: Callable[[Path], Path]) -> None:
    from test_readme import named

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if name.startswith(("bnfold/", "samples/", "tests/constraints")) or "/" not in name:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(["bash", "-euc", named("openvino")], cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("equivalent, ")

    def openvino(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [".venv-openvino/bin/bnfold", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
        )

    resnet18(tmp_path / "resnet18.onnx")
    assert openvino("fuse", "resnet18.onnx", "-o", "resnet18-fused.onnx").returncode == 0
    for reference, candidate in (("samples/digits/digits.onnx", "fused.onnx"), ("resnet18.onnx", "resnet18-fused.onnx")):
        done = openvino("verify", reference, candidate, "--provider", "openvino:device_type=CPU", "--samples", "4", "--json", "-q")
        assert (done.returncode, done.stderr) == (0, "")
        report = json.loads(done.stdout)
        assert report["verdict"] == "equivalent"
        for row in report["levels"]["deployment"]:
            print(reference, row)
            assert (row["share"], row["counted"], row["precision"]) == (1.0, "session", "full")
            assert row["ratio"] <= 2
    done = openvino("verify", "resnet18.onnx", "fused.onnx", "--provider", "openvino:device_type=GPU", "-q")
    if done.returncode != 1:  # no Intel GPU
        assert done.returncode == 5
        assert done.stderr.count("\n") == 1
        assert "Device GPU is not available" in done.stderr
    done = openvino("verify", "resnet18.onnx", "resnet18-fused.onnx", "--provider", "cuda", "-q")
    assert done.returncode == 5
    assert "is not in this ONNX Runtime" in done.stderr


@pytest.fixture
def resnet18() -> Callable[[Path], Path]:
    """Writes the network of He et al. with random weights and lively statistics, by onnx.helper."""

    def write(path: Path) -> Path:
        rng = np.random.default_rng(0)
        nodes: list[onnx.NodeProto] = []
        tensors: dict[str, Any] = {}

        def block(x: str, name: str, inside: int, out: int, size: int, stride: int, relu: bool) -> str:
            tensors[f"{name}.w"] = rng.standard_normal((out, inside, size, size)) * np.sqrt(2 / (inside * size * size))
            pads = [size // 2] * 4
            nodes.append(helper.make_node("Conv", [x, f"{name}.w"], [f"{name}.c"], f"{name}.conv", pads=pads, strides=[stride] * 2))
            for key, values in {
                "g": rng.uniform(0.5, 1.5, out),
                "b": rng.normal(0, 0.2, out),
                "m": rng.normal(0, 0.2, out),
                "v": rng.uniform(0.5, 1.5, out),
            }.items():
                tensors[f"{name}.{key}"] = values
            nodes.append(helper.make_node("BatchNormalization", [f"{name}.{k}" for k in "cgbmv"], [f"{name}.n"], f"{name}.bn"))
            if relu:
                nodes.append(helper.make_node("Relu", [f"{name}.n"], [f"{name}.y"], f"{name}.relu"))
            return f"{name}.y" if relu else f"{name}.n"

        y, width = block("image", "stem", 3, 64, 7, 2, True), 64
        nodes.append(helper.make_node("MaxPool", [y], ["pooled"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4))
        y = "pooled"
        for stage, out in enumerate((64, 128, 256, 512)):
            for unit in range(2):
                name, stride = f"layer{stage + 1}.{unit}", 2 if stage and not unit else 1
                inner = block(block(y, f"{name}.1", width, out, 3, stride, True), f"{name}.2", out, out, 3, 1, False)
                skip = block(y, f"{name}.skip", width, out, 1, stride, False) if stride > 1 else y
                nodes.append(helper.make_node("Add", [inner, skip], [f"{name}.sum"], f"{name}.add"))
                nodes.append(helper.make_node("Relu", [f"{name}.sum"], [f"{name}.out"], f"{name}.relu"))
                y, width = f"{name}.out", out
        tensors["fc.w"], tensors["fc.b"] = rng.standard_normal((512, 1000)) / 22, rng.standard_normal(1000)
        nodes += [
            helper.make_node("GlobalAveragePool", [y], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("Gemm", ["flat", "fc.w", "fc.b"], ["logits"]),
        ]
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 64, 64])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1000])
        made = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()]
        graph = helper.make_graph(nodes, "resnet18", [image], [logits], made)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return path

    return write
