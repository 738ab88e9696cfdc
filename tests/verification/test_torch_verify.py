"""`verify` on PyTorch models: folds by others are right or wrong, defects are found, and either side may be an ONNX model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from modules import Net, norm
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bnfold
from bnfold.backends.torch.export.trace import trace
from bnfold.backends.torch.runtime.session import TorchSession

X = torch.randn(8, 3, 12, 11, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def network() -> nn.Module:
    first = (nn.Conv2d(3, 8, 3, bias=False), norm(8, positive=True), nn.ReLU())
    second = (nn.Conv2d(8, 8, 3, padding=1), norm(8, positive=True), nn.ReLU())
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


def exported(module: nn.Module, x: torch.Tensor = X) -> onnx.ModelProto:
    axes = ({0: torch.export.Dim("batch")},)
    made = torch.onnx.export(module, (x,), dynamo=True, optimize=False, dynamic_shapes=axes, verbose=False)
    assert made is not None
    model: onnx.ModelProto = made.model_proto
    return model


def test_torchs_own_fold_is_right() -> None:
    net = network()
    report = bnfold.verify(net, optimization.fuse(net), X)
    assert (report.verdict, report.levels.coefficients.verdict) == ("equivalent", "equivalent")
    assert [(row.provider, row.optimisation) for row in report.levels.deployment] == [("cpu", "off")]


def test_torchs_fold_of_a_layer_called_twice_is_wrong() -> None:
    net = Net(lambda s, x: s.b(s.c(x)) + s.c(2 * x), c=nn.Conv2d(3, 4, 3), b=norm(4)).eval()
    wrong = copy.deepcopy(net)
    wrong.c = nn.utils.fuse_conv_bn_eval(net.c, net.b)
    wrong.b = nn.Identity()
    assert bnfold.verify(net, wrong, X).verdict == "different"


def shuffled(module: Any) -> None:
    module[0].weight.data = module[0].weight.data.flip(0)


DEFECTS: dict[str, Callable[[Any], Any]] = {
    "a channel's weight": lambda m: m[0].weight.data[2].mul_(1.001),
    "a bias": lambda m: m[3].bias.data[1].add_(1e-3),
    "channels swapped": shuffled,
    "epsilon": lambda m: setattr(m[1], "eps", 1.1e-5),
    "the unbiased variance": lambda m: m[1].running_var.mul_(100 / 99),
    "the mean isn't subtracted": lambda m: m[4].running_mean.zero_(),
    "NaN": lambda m: m[3].bias.data[0].fill_(float("nan")),
    "training mode": lambda m: m[1].train(),
    "stale statistics": lambda m: m[1].running_mean.add_(0.01),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_found(name: str) -> None:
    net = network()
    wrong = copy.deepcopy(net)
    DEFECTS[name](wrong)
    report = bnfold.verify(net, wrong, X)
    assert report.verdict == "different", report
    assert report.first_difference


class Branches(nn.Module):
    """Three branches of one sum, as RepVGG trains them. in_place: how the sum is formed."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
        self.norms, self.in_place = nn.ModuleList(norm(3) for _ in range(3)), in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found, *others = self.norms[0](self.wide(x)), self.norms[1](self.point(x)), self.norms[2](x)
        for other in others:
            found = found.add_(other) if self.in_place else found + other
        return torch.relu(found)


@pytest.mark.parametrize("in_place", [False, True])
def test_merged_branches_are_certified_by_their_coefficients(in_place: bool) -> None:
    module = nn.Sequential(Branches(in_place), Branches(in_place)).eval()
    fused, report = bnfold.fuse(module, example=X, check=False)
    assert len(report.merged) == 2
    verdict = bnfold.verify(module, fused, example=X, coefficients_only=True)
    assert verdict.verdict == "equivalent", verdict.reason
    with torch.no_grad():
        fused[1].wide.weight[1, 2, 1, 1] += 1e-2
    assert bnfold.verify(module, fused, example=X, coefficients_only=True).verdict == "different"


def test_a_missing_output_and_another_shape() -> None:
    net = Net(lambda s, x: (s.c(x), x.mean()), c=nn.Conv2d(3, 4, 3)).eval()
    less = Net(lambda s, x: (s.c(x),), c=net.c).eval()
    assert "'output.1' is missing" in bnfold.verify(net, less, X).reason
    other = Net(lambda s, x: (s.c(x).half(), x.mean()), c=net.c).eval()
    assert "is float16 instead of float" in bnfold.verify(net, other, X).reason


@pytest.mark.parametrize("order", [1, -1])
def test_torch_against_onnx(order: int) -> None:
    net = network()
    one, other = (net, exported(net))[::order]
    report = bnfold.verify(one, other, X)
    assert (report.verdict, report.levels.coefficients.verdict) == ("equivalent", "equivalent")
    fused, _ = bnfold.fuse(other, example=X)
    assert bnfold.verify(one, fused, X).verdict == "equivalent"
    wrong = copy.deepcopy(net)
    DEFECTS["a bias"](wrong)
    assert bnfold.verify(wrong, exported(net), X).verdict == "different"


def test_without_data_the_onnx_side_or_the_example_says_what_goes_in() -> None:
    net = network()
    assert bnfold.verify(net, exported(net), input_shapes={"input": (2, 3, 12, 11)}).verdict == "equivalent"
    assert bnfold.verify(net, optimization.fuse(net), example=X).verdict == "equivalent"
    with pytest.raises(bnfold.UsageError, match="doesn't say what it takes"):
        bnfold.verify(net, optimization.fuse(net))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(kind: torch.dtype) -> None:
    net = network().to(kind)
    fused, report = bnfold.fuse(net, example=X.to(kind))
    assert report.batchnorms.after == 0
    assert bnfold.verify(net, fused, X.to(kind)).verdict == "equivalent"
    fused[0].weight.data[2] *= 1.05
    assert bnfold.verify(net, fused, X.to(kind)).verdict == "different"


@pytest.mark.parametrize("casts", [False, True])
def test_half_precision_beside_float32(casts: bool) -> None:
    """What is fed keeps its type where the first weight has another, and where the folded copy has but one type left."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = s.b(s.c(s.a(x).half() if casts else x))
        return made

    net = Net(forward, a=norm(3), b=norm(4), c=nn.Conv2d(3, 4, 3).half()).eval()
    x = X if casts else X.half()
    fused, report = bnfold.fuse(net, example=x)
    assert fused(x).dtype is net(x).dtype
    assert report.verify is not None
    assert (report.verify.verdict, bnfold.verify(net, fused, [x]).verdict) == ("equivalent", "equivalent")


def test_a_program_against_the_module_it_came_from() -> None:
    net = network()
    program = torch.export.export(net, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    fused, report = bnfold.fuse(program)
    assert report.verify is not None
    assert report.verify.verdict == "equivalent"
    assert bnfold.verify(net, fused, X).verdict == "equivalent"
    assert bnfold.verify(net, fused).verdict == "equivalent"  # the program says what goes in
    assert bnfold.verify(program, fused).verdict == "equivalent"


def test_a_fold_that_fails_its_check_isnt_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnfold.backends.torch.writing import module as write_module

    right = write_module._set

    def wrong(root: nn.Module, target: str, tensor: torch.Tensor, **how: Any) -> None:
        right(root, target, tensor * 1.001, **how)

    monkeypatch.setattr(write_module, "_set", wrong)
    with pytest.raises(bnfold.CheckError, match="the folded model failed its check, so it is not given out"):
        bnfold.fuse(network(), example=X)


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_a_network_that_was_never_trained(level: float) -> None:
    """All channels have the same map, so it varies along no axis."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
    net[1].running_mean.fill_(level)
    fused, report = bnfold.fuse(net, example=X)
    assert report.verify is not None
    assert (report.batchnorms.after, report.verify.verdict) == (0, "equivalent")
    model = exported(net)
    folded, there = bnfold.fuse(model)
    assert there.verify is not None
    assert (there.batchnorms.after, there.verify.verdict) == (0, "equivalent")
    assert bnfold.verify(fused, folded, X).verdict == "equivalent"


def test_what_a_network_states_of_itself_is_enough() -> None:
    net = network()
    net.example_input_array = X
    fused, report = bnfold.fuse(net)
    assert report.batchnorms.after == 0
    assert bnfold.verify(net, fused).verdict == "equivalent"


def test_a_session_leaves_the_settings_as_they_were() -> None:
    torch.backends.cudnn.allow_tf32 = True
    found = TorchSession(trace(network(), X)).run({"input": X.numpy()})
    assert torch.backends.cudnn.allow_tf32
    assert list(found) == ["output"]
    assert isinstance(found["output"], np.ndarray)


def test_devices_are_named() -> None:
    net = network()
    with pytest.raises(bnfold.UsageError, match="run on cpu or cuda, not on 'openvino'"):
        bnfold.verify(net, net, X, providers=["openvino"])
    if not torch.cuda.is_available():
        with pytest.raises(bnfold.DeviceError, match="device cuda isn't available"):
            bnfold.verify(net, net, X, providers=["cuda"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda() -> None:
    net = network()
    fused, _ = bnfold.fuse(copy.deepcopy(net).cuda(), example=X.cuda())
    assert next(fused.parameters()).is_cuda
    report = bnfold.verify(net, fused, X, providers=["cpu", "cuda"])
    assert report.verdict == "equivalent"
    assert {row.provider for row in report.levels.deployment} == {"cpu", "cuda"}


# --- names --------------------------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Two outputs of one shape, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        z = torch.relu(self.body(x))
        return {"logits": self.first(z), "masks": self.second(z)}


def heads(tmp_path: Path, *names: str) -> tuple[nn.Module, onnx.ModelProto]:
    torch.manual_seed(0)
    net, x = Heads().eval(), torch.randn(2, 3, 9, 9)
    path, axes = tmp_path / "heads.onnx", {"x": {0: "N"}}
    torch.onnx.export(net, (x,), path, dynamo=False, input_names=["x"], output_names=list(names), dynamic_axes=axes)
    return net, onnx.load(path)


def test_outputs_that_have_names_are_paired_by_them(tmp_path: Path) -> None:
    net, right = heads(tmp_path, "logits", "masks")
    assert bnfold.verify(net, right).verdict == "equivalent"
    outputs = [right.graph.output[1], right.graph.output[0]]
    del right.graph.output[:]
    right.graph.output.extend(outputs)
    report = bnfold.verify(net, right)
    assert report.verdict == "equivalent"
    assert "the candidate's outputs come in another order, and are paired by their names: masks, logits" in report.notes
    net, swapped = heads(tmp_path, "masks", "logits")
    assert [bnfold.verify(*pair).verdict for pair in ((net, swapped), (swapped, net))] == ["different"] * 2


def test_other_names_are_told(tmp_path: Path) -> None:
    net, plain = heads(tmp_path, "a", "b")
    report = bnfold.verify(net, plain)
    assert report.verdict == "equivalent"
    pairs = "'output.logits' with 'a', 'output.masks' with 'b'"
    assert f"the candidate's outputs have other names, and were paired: {pairs}" in report.notes
    fixed = copy.deepcopy(plain)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    fixed.graph.input[0].name = "images"
    for node in fixed.graph.node:
        node.input[:] = ["images" if name == "x" else name for name in node.input]
    report = bnfold.verify(plain, fixed)
    assert report.verdict == "equivalent"
    assert "the candidate's inputs have other names, and were paired: 'x' with 'images'" in report.notes
    assert "input 'x' is open in the reference, and fixed in the candidate: axis 0 to 1" in report.notes


def cancelling(wrong: float) -> tuple[nn.Module, nn.Module]:
    """Four parallel convolutions with a BatchNorm each, whose weights come to a ten-thousandth in the sum; and each of them folded."""
    parts: dict[str, nn.Module] = {f"c{i}": nn.Conv2d(8, 8, 3, padding=1) for i in range(4)} | {f"b{i}": norm(8) for i in range(4)}
    net = Net(lambda self, x: sum(getattr(self, f"b{i}")(getattr(self, f"c{i}")(x)) for i in range(4)), **parts).eval()
    norms = [net.get_submodule(f"b{i}") for i in range(4)]
    scales = [(b.weight / torch.sqrt(b.running_var + b.eps)).detach().reshape(-1, 1, 1, 1) for b in norms]
    with torch.no_grad():
        others = sum(s * net.get_submodule(f"c{i}").weight for i, s in enumerate(scales[:3]))
        net.c3.weight.copy_((1e-4 * torch.randn_like(others) - others) / scales[3])
    folded = copy.deepcopy(net)
    for i in range(4):
        folded.set_submodule(f"c{i}", fuse_conv_bn_eval(folded.get_submodule(f"c{i}"), folded.get_submodule(f"b{i}")))
        folded.set_submodule(f"b{i}", nn.Identity())
    with torch.no_grad():
        folded.c1.weight[3, 2] += wrong
    return net, folded


@pytest.mark.parametrize("wrong", [0.0, 1e-5])
def test_what_cancels_in_a_sum_of_branches_is_measured_by_its_summands(wrong: float) -> None:
    report = bnfold.verify(*cancelling(wrong), torch.randn(2, 8, 8, 8), coefficients_only=True)
    assert report.verdict == ("different" if wrong else "equivalent"), report.reason


def shifted(wrong: float) -> tuple[nn.Module, nn.Module]:
    """Four parallel convolutions whose shifts cancel; and each of them folded, in float32, as other tools do."""
    net, _ = cancelling(0.0)
    zero = torch.zeros(1, 8, 1, 1)
    with torch.no_grad():
        for b in (net.b1, net.b2):
            b.running_mean.add_(1000)
            b.bias.add_(700)
        net.b3.bias.sub_((net.b1(zero) + net.b2(zero) + net.b3(zero)).reshape(-1))
    folded = copy.deepcopy(net)
    for i in range(4):
        folded.set_submodule(f"c{i}", fuse_conv_bn_eval(folded.get_submodule(f"c{i}"), folded.get_submodule(f"b{i}")))
        folded.set_submodule(f"b{i}", nn.Identity())
    with torch.no_grad():
        folded.c1.bias[5] += wrong
    return net, folded


@pytest.mark.parametrize("wrong", [0.0, 1e-1])
def test_shifts_that_cancel_in_a_sum_of_branches_are_measured_by_their_summands(wrong: float) -> None:
    report = bnfold.verify(*shifted(wrong), torch.randn(2, 8, 8, 8), coefficients_only=True)
    assert report.verdict == ("different" if wrong else "equivalent"), report.reason


def test_an_operator_that_does_nothing_hides_nothing_from_the_first_level() -> None:
    """As the learnable affine blocks of HGNet stand before training: a fold takes them out."""
    one, zero = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
    block = Net(lambda self, x: self.scale * x + self.bias, scale=one, bias=zero)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), block, nn.Conv2d(8, 4, 1), nn.ReLU()).eval()
    folded, _ = bnfold.fuse(net, example=torch.randn(2, 3, 8, 8), check=False)
    for a, b in ((net, folded), (folded, net)):
        assert bnfold.verify(a, b, torch.randn(2, 3, 8, 8)).levels.coefficients.verdict == "equivalent"


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_a_shift_that_cancels_is_measured_by_its_summands_whichever_side_is_folded(wrong: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), norm(16), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    with torch.no_grad():
        net[1].running_mean.add_(1000)
        net[1].bias.sub_(net[1](torch.zeros(1, 16, 1, 1)).reshape(-1))
    folded = copy.deepcopy(net)
    folded[0], folded[1] = fuse_conv_bn_eval(net[0], net[1]), nn.Identity()
    with torch.no_grad():
        folded[0].bias[3] += wrong
    for one, other in ((net, folded), (folded, net)):
        report = bnfold.verify(one, other, torch.randn(2, 3, 8, 8), coefficients_only=True)
        assert report.verdict == ("different" if wrong else "equivalent"), report.reason
