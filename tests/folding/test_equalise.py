"""`--equalise`: ranges of channels match between linear layers, and the network computes what it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cases import Net
from compare import OTHER_SIZES, SIZES, difference, feeds, run_double
from modules import Net as Module
from modules import difference as torch_difference
from modules import lively
from modules import run as torch_run
from onnx import numpy_helper
from torch import nn

import bnfold
from bnfold.backends.torch.export.copies import duplicate
from bnfold.backends.torch.export.trace import trace
from bnfold.cli import run
from bnfold.report import Equalised

Draw = Callable[[Net], None]
STRETCHING = ("Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "Pad")


def uneven(net: Net, cout: int, cin: int, kernel: int = 3, groups: int = 1) -> str:
    """A convolution's weight whose channels differ by a factor of 100 or so, in and out."""
    weight = net.normal(cout, cin // groups, kernel, kernel)
    return net.weight(weight * 10 ** net.rng.uniform(-1, 1, (cout, 1, 1, 1)) * 10 ** net.rng.uniform(-1, 1, (1, cin // groups, 1, 1)), "w")


def conv(net: Net, x: str, cin: int, cout: int, kernel: int = 3, *, groups: int = 1, pads: int = 0) -> str:
    return net.conv(x, cin, cout, kernel, groups=groups, pads=pads, weight=uneven(net, cout, cin, kernel, groups))


def through(net: Net, op: str, x: str) -> str:
    """One operator that lets positive scales pass."""
    if op == "PRelu":
        return net.op("PRelu", x, net.weight(net.rng.uniform(0.1, 0.9, (6, 1, 1)), "slope"))
    if op == "Pad":
        return net.pad(x, 0, 0, 1, 1, 0, 0, 1, 1)
    return net.op(op, x, **({"kernel_shape": [2, 2]} if op.endswith("Pool") else {}))


def pair(net: Net, *ops: str) -> None:
    """Two convolutions, and between them what is told."""
    y = conv(net, net.input("N", 3, "H", "W"), 3, 6, 1)
    for op in ops:
        y = through(net, op, y)
    net.output(conv(net, y, 6, 4, 2))


def drawn(draw: Draw, *, dtype: str = "float64", **options: object) -> tuple[onnx.ModelProto, onnx.ModelProto, tuple[Equalised, ...]]:
    """A network and its equalised form, which must compute the same."""
    net = Net(getattr(draw, "__name__", "equalise"), dtype=dtype)
    draw(net)
    model = net.model()
    fused, report = bnfold.fuse(model, check=False, equalise=True)
    for sizes in (SIZES, OTHER_SIZES):
        data = feeds(model, sizes)
        assert difference(run_double(model, data), run_double(fused, data)) < (1e-11 if dtype == "float64" else 1e-5)
    return model, fused, report.equalised


def weights(model: onnx.ModelProto) -> list[np.ndarray]:
    """Of the layers, in their order, as [out, in, ...]."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            found.append(stored[node.input[1]] if node.op_type == "Conv" else stored[node.input[1]].T)
    return found


def made(weight: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(weight).max(axis=tuple(range(1, weight.ndim))))


def read(weight: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(weight).max(axis=(0, *range(2, weight.ndim))))


@pytest.mark.parametrize("ops", [(), *[(op,) for op in STRETCHING], STRETCHING], ids=str)
def test_both_ranges_of_a_channel_become_their_geometric_mean(ops: tuple[str, ...]) -> None:
    before, after, report = drawn(lambda net: pair(net, *ops))
    first, second = weights(before)
    one, other = weights(after)
    matched = np.sqrt(made(first) * read(second))
    assert made(one) == pytest.approx(matched, rel=1e-6)
    assert read(other) == pytest.approx(matched, rel=1e-6)
    assert report[0] == Equalised(
        ("Conv_node_0",), ("Conv_node_1",), "", pytest.approx(np.exp(np.abs(np.log(matched / made(first))).max()))
    )
    assert report[1].reason == "conv_1 is an output of the model"


def chain(net: Net) -> None:
    """Ten layers, the last two behind a Flatten; two read the same, and one reads both of these side by side."""
    y = conv(net, net.input("N", 3, 8, 8), 3, 8, pads=1)
    for _ in range(4):
        y = conv(net, net.relu(y), 8, 8, pads=1)
    y = net.relu(y)
    y = net.op("Concat", net.relu(conv(net, y, 8, 4, 1)), net.op("LeakyRelu", conv(net, y, 8, 4, 1)), axis=1)
    y = net.op("MaxPool", conv(net, y, 8, 6), kernel_shape=[3, 3], strides=[3, 3])
    net.output(net.gemm(net.relu(net.gemm(net.op("Flatten", net.relu(y)), 24, 5)), 5, 3))


def separable(net: Net) -> None:
    """Pointwise, depthwise, pointwise: the middle layer's channels are read and made at once."""
    y = net.relu(conv(net, net.input("N", 3, "H", "W"), 3, 6, 1))
    y = net.relu(conv(net, y, 6, 6, groups=6, pads=1))
    net.output(conv(net, y, 6, 4, 1))


def grouped(net: Net) -> None:
    y = net.relu(conv(net, net.input("N", 3, "H", "W"), 3, 6, 1))
    net.output(conv(net, y, 6, 4, groups=2))


@pytest.mark.parametrize("draw", [chain, separable, grouped])
def test_longer_chains_settle_where_all_ranges_match(draw: Draw) -> None:
    _, after, report = drawn(draw)
    layers = weights(after)
    matched = 0
    for one, other in pairwise(layers):
        if draw is grouped:
            other = other.reshape(2, 2, 3, 3, 3).swapaxes(1, 2).reshape(6, 2, 3, 3).swapaxes(0, 1)
        if draw is separable and len(other) == 6:
            other = other.swapaxes(0, 1)
        if other.shape[1] == len(one):
            both = draw is chain and other is layers[5]  # two layers read it, whose mean counts
            assert made(one) == pytest.approx(np.sqrt(read(other) * read(layers[6])) if both else read(other), rel=0.01)
            matched += 1
    assert [each.reason for each in report[:-1]] == [""] * (len(report) - 1)
    assert matched == {chain: 6, separable: 2, grouped: 1}[draw]
    second = bnfold.fuse(after, check=False, equalise=True)[1]
    assert max((each.factor for each in second.equalised), default=1) < 1.05


def residual(net: Net) -> None:
    """Blocks on one stream, which all of them read and make; at its end a pooled head."""
    y = net.relu(conv(net, net.input("N", 3, "H", "W"), 3, 6, 1))
    for _ in range(2):
        z = conv(net, net.relu(conv(net, y, 6, 4, pads=1)), 4, 6, pads=1)
        y = net.relu(net.op("Add", y, z))
    net.output(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", y)), 6, 3))


def one_conv_residual(net: Net) -> None:
    """A layer that reads what it is added to: its two scales are the same."""
    y = conv(net, net.input("N", 3, "H", "W"), 3, 6, 1)
    y = net.relu(net.op("Add", y, conv(net, net.relu(y), 6, 6, pads=1)))
    net.output(conv(net, y, 6, 2, 1))


def excited(net: Net) -> None:
    """Squeeze and excitation: the gate reads the scaled channels too, and multiplies them."""
    y = net.relu(conv(net, net.input("N", 3, "H", "W"), 3, 6, 1))
    gate = conv(net, net.relu(conv(net, net.op("GlobalAveragePool", y), 6, 3, 1)), 3, 6, 1)
    net.output(conv(net, net.op("Mul", y, net.op("Sigmoid", gate)), 6, 2, 1))


def split(net: Net) -> None:
    """Halves that go different ways and meet again in another order."""
    y = net.relu(conv(net, net.input("N", 3, "H", "W"), 3, 6, 1))
    one, other = net.split(y, 1, 3, 3)
    y = net.op("Concat", net.relu(other), one, axis=1)
    net.output(conv(net, y, 6, 2, 1))


@pytest.mark.parametrize(
    ("draw", "reasons"),
    [
        (residual, ["", "", "", "gemm_0 is an output of the model"]),
        (one_conv_residual, ["", "conv_2 is an output of the model"]),
        (excited, ["", "", "Sigmoid Sigmoid_node_0 blocks, no rule lets a map cross it", "conv_3 is an output of the model"]),
        (split, ["", "conv_1 is an output of the model"]),
    ],
)
def test_all_who_make_or_read_the_channels_change_together(draw: Draw, reasons: list[str]) -> None:
    report = drawn(draw)[2]
    assert [each.reason for each in report] == reasons
    assert report[0].factor > 1.5
    if draw is residual:
        assert (len(report[0].layers), len(report[0].into)) == (3, 3)


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (lambda net, y: net.op("Clip", y, net.scalar(0), net.scalar(6)), "Clip Clip_node_0 blocks, it clips at a bound other than zero"),
        (lambda net, y: net.op("Sigmoid", y), "Sigmoid Sigmoid_node_0 blocks, no rule lets a map cross it"),
        (lambda net, y: net.pad(y, 0, 0, 1, 1, 0, 0, 1, 1, value=1.0), "Pad Pad_node_0 blocks, it pads with one constant"),
        (lambda net, y: net.op("Softmax", y, axis=1), "Softmax Softmax_node_0 blocks"),
    ],
)
def test_what_is_not_exact_is_left_alone_and_said(op: Callable[[Net, str], str], reason: str) -> None:
    def draw(net: Net) -> None:
        net.output(conv(net, op(net, conv(net, net.input("N", 3, "H", "W"), 3, 6, 1)), 6, 2, 1))

    before, after, report = drawn(draw)
    assert report[0].reason.startswith(reason)
    assert all((a == b).all() for a, b in zip(weights(before), weights(after), strict=True))


@pytest.mark.parametrize("op", ["Conv", "LeakyRelu"])
def test_who_reaches_no_output_has_no_say(op: str) -> None:
    """Channels that nothing else reads keep their scales, and those that others read match these alone."""

    def draw(net: Net, *, dead: bool) -> None:
        y = conv(net, net.input("N", 3, "H", "W"), 3, 6, 1)
        one, other = net.split(y, 1, 4, 2)
        net.output(conv(net, one, 4, 2, 1))
        if dead:
            conv(net, other, 2, 5, 1) if op == "Conv" else net.op(op, net.op("Add", other, net.scalar(1)))

    before, after, report = drawn(lambda net: draw(net, dead=True))
    reasons = {each.layers[0]: each.reason for each in report}
    assert reasons["Conv_node_0"] == ""
    assert reasons.get("Conv_node_2", "it reaches no output of the model") == "it reaches no output of the model"
    first, last = weights(before), weights(after)
    assert (first[0][4:] == last[0][4:]).all()
    assert not (first[0][:4] == last[0][:4]).any()
    assert all((a == b).all() for a, b in zip(first[2:], last[2:], strict=True))
    assert bnfold.verify(before, after).verdict == "equivalent"


def test_shared_weights_change_alike_or_not_at_all() -> None:
    def draw(net: Net) -> None:
        w = uneven(net, 6, 6, 1)
        y = net.relu(net.conv(net.input("N", 6, "H", "W"), 6, 6, 1, weight=w))
        net.output(conv(net, net.relu(net.conv(y, 6, 6, 1, weight=w)), 6, 2, 1))

    before, after, report = drawn(draw)
    assert [each.reason for each in report[:2]] == [
        "w_0 of Conv_node_0 is shared with Conv_node_1",
        "w_0 of Conv_node_1 is shared with Conv_node_0",
    ]
    assert all((a == b).all() for a, b in zip(weights(before), weights(after), strict=True))


def test_channels_of_zeros_stay_and_one_that_is_nearly_dead_is_bounded() -> None:
    def draw(net: Net) -> None:
        first, second = net.normal(6, 3, 1, 1), net.normal(4, 6, 1, 1)
        first[0] = second[:, 1] = 0
        first[2] *= 1e-30
        y = net.conv(net.input("N", 3, "H", "W"), 3, 6, 1, weight=net.weight(first))
        net.output(net.conv(net.relu(y), 6, 4, 1, weight=net.weight(second)))

    before, after, report = drawn(draw)
    assert 4096 < report[0].factor < 2 * 4096  # of what the layer's other channels are multiplied by
    for one, other in zip(weights(before), weights(after), strict=True):
        axis = one.shape.index(6)
        assert (one.take([0, 1], axis) == other.take([0, 1], axis)).all()


def test_weights_that_are_no_numbers_are_left_as_they_are() -> None:
    net = Net("nan")
    first = net.normal(6, 3, 1, 1)
    first[3, 0] = np.nan
    y = net.conv(net.input("N", 3, "H", "W"), 3, 6, 1, weight=net.weight(first))
    net.output(conv(net, net.relu(y), 6, 4, 1))
    report = bnfold.fuse(net.model(), check=False, equalise=True)[1]
    assert "would be no number" in report.equalised[0].reason


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once_and_checked(dtype: str) -> None:
    net = Net("half", dtype=dtype, opset=22)
    pair(net, "Relu")
    model = net.model()
    report = bnfold.fuse(model, equalise=True)[1]
    assert report.verify is not None
    assert (report.verify.verdict, report.verify.levels.coefficients.verdict) == ("equivalent", "equivalent")
    assert 1 < report.equalised[0].factor <= (16 if dtype == "float16" else 4096)


def test_the_result_is_the_same_each_time() -> None:
    net = Net("again", dtype="float32")
    residual(net)
    model = net.model()
    one, other = (bnfold.fuse(model, equalise=True)[0].graph.SerializeToString(deterministic=True) for _ in range(2))
    assert one == other


# --- verify ---------------------------------------------------------------------------------------------------------------------------


def test_verify_takes_moved_scales_for_what_they_are_and_finds_what_does_not_cancel() -> None:
    model = bnfold.load(Path(__file__).parents[2] / "samples" / "digits" / "digits.onnx")
    fused, report = bnfold.fuse(model, equalise=True)
    assert report.verify is not None
    found = report.verify.levels.coefficients
    assert (found.verdict, found.certified) == ("equivalent", 8)
    assert found.reason == "scales were moved between layers, where they cancel"
    verdict = bnfold.verify(model, fused)
    assert verdict.verdict == "equivalent"
    for name, value in fused.graph.initializers.items():
        array = value.const_value.numpy().copy()
        if array.ndim == 4 and array.shape[0] > 4:
            array[3] *= np.float32(1.0001)
            value.const_value = type(value.const_value)(array, name=name)
            break
    spoiled = bnfold.verify(model, fused)
    assert (spoiled.verdict, spoiled.levels.coefficients.verdict) == ("different", "different")


# --- PyTorch --------------------------------------------------------------------------------------------------------------------------


def mobile() -> Module:
    """Conv, depthwise and pointwise with BatchNorms, a residual, PReLU, a linear head."""

    def forward(net: Module, x: torch.Tensor) -> torch.Tensor:
        x = net.act(net.norm1(net.stem(x)))
        x = x + net.norm3(net.point(net.norm2(net.depth(x)).relu()))
        return net.head(x.mean((2, 3)))

    torch.manual_seed(0)
    norms = {f"norm{i}": nn.BatchNorm2d(6) for i in (1, 2, 3)}
    layers = {"stem": nn.Conv2d(3, 6, 3, bias=False), "depth": nn.Conv2d(6, 6, 3, padding=1, groups=6), "point": nn.Conv2d(6, 6, 1)}
    return lively(Module(forward, **norms, **layers, act=nn.PReLU(6), head=nn.Linear(6, 4)).eval())


def test_a_module_and_its_program_are_equalised_alike() -> None:
    module, x = mobile().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    copy, report = bnfold.fuse(module, example=x, equalise=True)
    program, other = bnfold.fuse(trace(duplicate(module), x).program, equalise=True)
    want = torch_run(module, x)
    for result, said in ((copy, report), (program, other)):
        assert torch_difference(want, torch_run(result, x)) < 1e-12
        assert said.batchnorms.after == 0
        assert said.verify is not None
        assert (said.verify.verdict, said.verify.levels.coefficients.verdict) == ("equivalent", "equivalent")
        assert [each.reason for each in said.equalised] == ["", "", "linear is an output of the model"]
    assert [(a.name, a.after) for a in report.ranges] == [(b.name, pytest.approx(b.after)) for b in other.ranges]
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in state.items())
    assert type(copy.norm1) is nn.Identity


def test_a_module_that_adds_its_input_itself_keeps_the_scales_of_that_branch() -> None:
    """RepVGG's identity without a BatchNorm merges in an ONNX file; a module's code goes on adding it."""

    def forward(net: Module, x: torch.Tensor) -> torch.Tensor:
        x = net.stem(x).relu()
        return net.head((net.norm(net.conv(x)) + x).relu())

    torch.manual_seed(0)
    module = lively(
        Module(forward, stem=nn.Conv2d(3, 4, 1), conv=nn.Conv2d(4, 4, 3, padding=1), norm=nn.BatchNorm2d(4), head=nn.Conv2d(4, 2, 1))
    )
    module, x = module.eval().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    copy, report = bnfold.fuse(module, example=x, equalise=True)
    assert torch_difference(torch_run(module, x), torch_run(copy, x)) < 1e-12
    assert len(report.merged) == 1
    assert "its input is added to what it gives" in report.equalised[0].reason
    program, other = bnfold.fuse(trace(module, x).program, equalise=True)
    assert torch_difference(torch_run(module, x), torch_run(program, x)) < 1e-12
    assert [each.reason for each in other.equalised[:2]] == ["", ""]


def test_a_module_with_two_paths_is_equalised_on_both_or_on_none() -> None:
    def forward(net: Module, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        y = net.norm(net.one(x)).relu()
        return net.three(y) if skip else net.three(net.two(y).relu())

    torch.manual_seed(0)
    convs = {"one": nn.Conv2d(3, 4, 1), "two": nn.Conv2d(4, 4, 1), "three": nn.Conv2d(4, 2, 1)}
    module = lively(Module(forward, **convs, norm=nn.BatchNorm2d(4)).eval().double())
    module.forward = forward.__get__(module)  # type: ignore[method-assign]  # with its arguments named
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    copy, report = bnfold.fuse(module, example=[(x,), {"x": x, "skip": True}], equalise=True)
    for options in ({}, {"skip": True}):
        assert torch.allclose(module(x, **options), copy(x, **options), rtol=1e-12)
    assert report.batchnorms.after == 0
    assert not report.equalised
    assert any("no ranges are equalised" in note for note in report.notes)


# --- the command line -----------------------------------------------------------------------------------------------------------------


def test_fuse_and_pipeline_take_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = Path(__file__).parents[2] / "samples" / "digits"
    arguments = [str(samples / "digits.onnx"), "--equalise"]
    assert run(["fuse", *arguments, "-o", str(tmp_path / "fused.onnx"), "--report", str(tmp_path / "fuse.json")]) == 0
    shown = capsys.readouterr().out
    assert "made by" in shown
    assert "logits is an output of the model" in shown
    found = json.loads((tmp_path / "fuse.json").read_text())
    assert found["equalised"][1] == {
        "layers": ["/block1/conv1/Conv"],
        "into": ["/block1/conv2/Conv"],
        "reason": "",
        "factor": found["equalised"][1]["factor"],
    }
    assert run(["verify", str(samples / "digits.onnx"), str(tmp_path / "fused.onnx"), "--data", str(samples / "test.npz")]) == 0
    more = ["--data", str(samples / "calibration.npz"), "-o", str(tmp_path / "ready.onnx"), "--report", str(tmp_path / "pipeline.json")]
    assert run(["pipeline", *arguments, *more]) == 0
    found = json.loads((tmp_path / "pipeline.json").read_text())
    assert any(each["factor"] > 1 for each in found["fuse"]["equalised"])
    assert found["verify"]["verdict"] == "equivalent"


def test_a_model_without_batchnorms_is_equalised_too(tmp_path: Path) -> None:
    net = Net("plain")
    pair(net, "Relu")
    onnx.save(net.model(), tmp_path / "plain.onnx")
    assert run(["fuse", str(tmp_path / "plain.onnx"), "-o", str(tmp_path / "none.onnx")]) == 4
    assert run(["fuse", str(tmp_path / "plain.onnx"), "-o", str(tmp_path / "out.onnx"), "--equalise"]) == 0
    assert run(["verify", str(tmp_path / "plain.onnx"), str(tmp_path / "out.onnx")]) == 0


def test_a_lowered_batchnorm_that_undoes_some_scales() -> None:
    """Which the check finds too."""
    net = Net("lowered", dtype="float64")
    y = net.relu(conv(net, net.input("N", 4, 6, 6), 4, 6))
    net.output(conv(net, net.slice(y, 1, 0, 2), 2, 4), net.bn(y, 6))
    _, report = bnfold.fuse(net.model(), equalise=True, lower="mul-add")
    assert [layer.verdict for layer in report.layers] == ["lowered"]
    assert report.equalised[0].factor > 1.5
