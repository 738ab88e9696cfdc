"""torch.ao's layers that simulate a fold: they become what they simulate, and their integers stay, also where the statistics change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from modules import difference
from test_torch_quantised import DRAWN, SCHEMES, Digits, X, trained, weights_only
from torch import Tensor, nn

import bnfold
from bnfold.backends.torch.export.observers import settled_quantisers

ao = pytest.importorskip("torch.ao.quantization")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
DATA = [torch.randn(8, 1, 8, 8, generator=DRAWN) * 2 + 1 for _ in range(3)]


def eager(backend: str) -> nn.Module:
    torch.manual_seed(0)
    net = ao.fuse_modules_qat(Digits().train(), [["conv1", "bn1", "relu1"], ["dw", "bn2"]])
    net = nn.Sequential(ao.QuantStub(), net, ao.DeQuantStub())
    net.qconfig = ao.get_default_qat_qconfig(backend)
    return trained(ao.prepare_qat(net), observing=False)


def traced(backend: str) -> nn.Module:
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    torch.manual_seed(0)
    return trained(prepare_qat_fx(Digits().train(), ao.get_default_qat_qconfig_mapping(backend), (X,)), observing=False)


NETS: dict[str, Any] = {
    "eager, per channel": (eager, "fbgemm", ["1.conv1", "1.dw"]),
    "FX, per tensor": (traced, "qnnpack", ["conv1", "dw", "fc"]),
}


def codes(net: nn.Module, path: str) -> Tensor:
    layer: Any = net.get_submodule(path)
    shape, weight = [-1, *[1] * (layer.weight.ndim - 1)], layer.weight
    if hasattr(layer, "bn"):
        weight = weight * (layer.bn.weight / torch.sqrt(layer.bn.running_var + layer.bn.eps)).reshape(shape)
    return (layer.weight_fake_quant(weight) / layer.weight_fake_quant.scale.reshape(shape)).round()


@pytest.mark.parametrize("name", NETS)
def test_a_layer_becomes_what_it_simulates(name: str) -> None:
    make, backend, paths = NETS[name]
    net = make(backend)
    fused, report = bnfold.fuse(net, example=X)
    folded = {layer.name: layer for layer in report.layers if layer.verdict == "folded"}
    assert {f"{path}.bn" for path in paths} <= folded.keys()
    assert "becomes the layer that it simulates" in folded[f"{paths[0]}.bn"].notes[0]
    assert report.batchnorms.before == 4
    for path in paths:
        layer = fused.get_submodule(path)
        assert not hasattr(layer, "bn")
        assert type(layer).__name__ == type(net.get_submodule(path)).__name__.replace("Bn1d", "").replace("Bn", "")
        assert torch.equal(codes(net, path), codes(fused, path))
        assert torch.equal(layer.weight_fake_quant.scale, net.get_submodule(path).weight_fake_quant.scale)
    assert bnfold.verify(net, fused, DATA).verdict == "equivalent"
    with torch.no_grad():
        assert difference([net(X)], [fused(X)]) < 1e-4


def test_what_it_becomes_is_converted_to_integers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(ao.QuantStub(), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), ao.DeQuantStub()).train()
    net = ao.fuse_modules_qat(net, [["1", "2", "3"]])
    net.qconfig = ao.get_default_qat_qconfig("fbgemm")
    net = trained(ao.prepare_qat(net), observing=False)
    want, got = (ao.convert(copy.deepcopy(each)) for each in (net, bnfold.fuse(net, example=X)[0]))
    assert type(got[1]) is type(want[1])
    assert torch.equal(want[1].weight().int_repr(), got[1].weight().int_repr())
    assert difference([want(X)], [got(X)]) < 0.02
    with pytest.raises(bnfold.UnsupportedError):
        bnfold.inspect(want, example=X)


@pytest.mark.parametrize("name", NETS)
def test_new_statistics_leave_the_integers(name: str) -> None:
    make, backend, paths = NETS[name]
    net = make(backend)
    fresh, _ = bnfold.recalibrate(net, DATA)
    assert all(torch.equal(codes(net, path), codes(fresh, path)) for path in paths)
    again = bnfold.recalibrate(fresh, DATA)[1]
    assert all(abs(layer.mean_shift) < 1e-4 and abs(layer.var_ratio - 1) < 1e-3 for layer in again.layers)
    fused, report = bnfold.fuse(fresh, example=X)
    assert all(torch.equal(codes(net, path), codes(fused, path)) for path in paths)
    assert bnfold.verify(fresh, fused, DATA).verdict == "equivalent"
    program = torch.export.export(settled_quantisers(copy.deepcopy(net)), (DATA[0],))
    other, _ = bnfold.recalibrate(program, DATA)
    assert bnfold.verify(fresh, other, DATA[:1]).verdict == "equivalent"
    with torch.no_grad():
        assert difference([fresh(DATA[0])], [other.module()(DATA[0])]) < 1e-5
    folded, program_report = bnfold.fuse(other)
    assert program_report.batchnorms == report.batchnorms
    assert bnfold.verify(other, folded, [DATA[0]]).verdict == "equivalent"
    assert not any("sqrt" in str(op.target) for op in folded.graph.nodes), "the simulation is gone"


def test_a_folded_layer_is_loaded_again(tmp_path: Any) -> None:
    net = eager("qnnpack")
    fused, _ = bnfold.fuse(bnfold.recalibrate(net, DATA)[0], example=X)
    (tmp_path / "made.py").write_text(
        "import torch\nfrom torch import nn\nimport torch.ao.quantization as ao\nfrom test_torch_simulated import eager\n"
        "def make(): return eager('qnnpack')\n"
    )
    bnfold.save(fused, tmp_path / "fused.safetensors")
    loaded = bnfold.load(tmp_path / "fused.safetensors", arch=f"{tmp_path / 'made.py'}:make")
    with torch.no_grad():
        assert torch.equal(fused(X), loaded(X))


def test_a_layer_in_training_mode_is_told_of() -> None:
    net = eager("fbgemm").train()
    report = bnfold.inspect(net, example=X)
    assert report.batchnorms.after == 4


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
def test_what_the_exporters_make_of_a_quantised_network_folds_too(dynamo: bool, tmp_path: Any) -> None:
    net = weights_only(SCHEMES["per channel"], observing=False)
    how: dict[str, Any] = {"optimize": False} if dynamo else {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
    net = settled_quantisers(net) if dynamo else net  # the newer one reads no switches of a fake quantiser
    torch.onnx.export(net, (X,), tmp_path / "net.onnx", dynamo=dynamo, **how)
    model = bnfold.load(tmp_path / "net.onnx")
    fused, report = bnfold.fuse(model)
    assert [layer.verdict for layer in report.layers if layer.batchnorm] == ["folded"] * 4
    assert sum("takes it in its scales" in " ".join(layer.notes) for layer in report.layers) == 3
    assert bnfold.verify(model, fused).verdict == "equivalent"


def test_a_folded_program_of_a_file_is_written_as_onnx(tmp_path: Any) -> None:
    """A loaded program lets nobody run an operator to find its shapes; and some weights lie at the middle of a step in float32 alone."""
    net = settled_quantisers(weights_only(SCHEMES["per channel, fused with its observer"], observing=False))
    torch.export.save(torch.export.export(net, (X,)), tmp_path / "net.pt2")
    fused, _ = bnfold.fuse(bnfold.load(tmp_path / "net.pt2"))
    bnfold.save(fused, tmp_path / "net.onnx")
    assert bnfold.verify(fused, bnfold.load(tmp_path / "net.onnx"), [X]).verdict == "equivalent"


def test_a_program_that_torchao_prepares_folds() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    torch.manual_seed(0)
    graph = torch.export.export(Digits().train(), (X,)).module()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=True))
    net = prepare_qat_pt2e(graph, quantizer)
    for _ in range(3):
        net(torch.randn(4, 1, 8, 8))
    net = move_exported_model_to_eval(net)
    program = torch.export.export(settled_quantisers(copy.deepcopy(net)), (X,))
    fused, report = bnfold.fuse(program)
    reasons = {layer.name: layer.reason for layer in report.layers if layer.batchnorm}
    assert reasons["bn1"] == reasons["bn2"] == reasons["bn3"] == "", "torchao has the scales of a transposed filter along its inputs"
    assert "rounds activations to integers" in reasons["bn4"]
    levels = bnfold.verify(program, fused, [X]).levels
    assert levels.coefficients.verdict == levels.function.verdict == "equivalent"
    report = bnfold.inspect(net, example=X)
    assert all(layer.reason for layer in report.layers)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(ao.QuantStub(), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), ao.DeQuantStub()).train()
    net = ao.fuse_modules_qat(net, [["1", "2", "3"]])
    net.qconfig = ao.get_default_qat_qconfig("fbgemm")
    net = trained(ao.prepare_qat(net), observing=False)
    return net, bnfold.fuse(net, example=X)[0]


def set_to(path: str, name: str, change: Any) -> Any:
    """A defect: of a fake quantiser's numbers, one or those of one channel."""

    def spoil(net: nn.Module) -> None:
        owner = net.get_submodule(path)
        old = getattr(owner, name)
        new = old.detach().clone() if isinstance(old, Tensor) else old
        if isinstance(new, Tensor):
            new.view(-1)[-1] = change(new.view(-1)[-1])
            setattr(owner, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
        else:
            setattr(owner, name, change(old))

    return spoil


DEFECTS: dict[str, Any] = {
    "a scale of one channel": set_to("1.weight_fake_quant", "scale", lambda s: s * 1.001),
    "the zero point of one channel": set_to("1.weight_fake_quant", "zero_point", lambda z: z + 64),
    "a weight": set_to("1", "weight", lambda w: 2 * w + 1),
    "the scale of activations": set_to("0.activation_post_process", "scale", lambda s: s * 1.01),
    "the zero point of activations": set_to("0.activation_post_process", "zero_point", lambda z: z + 1),
    "the last code of activations": set_to("0.activation_post_process.activation_post_process", "quant_max", lambda n: n - 1),
}


def test_without_the_rounding_of_activations_a_right_fold_agrees(pair: tuple[nn.Module, nn.Module]) -> None:
    levels = bnfold.verify(*pair, DATA).levels
    assert levels.function.before_rounding
    assert levels.function.error < 1e-5


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_found(name: str, pair: tuple[nn.Module, nn.Module]) -> None:
    net, fused = pair
    spoilt = copy.deepcopy(fused)
    DEFECTS[name](spoilt)
    assert bnfold.verify(net, spoilt, DATA[:1]).verdict == "different"
