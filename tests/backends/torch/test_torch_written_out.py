"""BatchNorms written out in the forward of a larger module, as Keras writes them on PyTorch; and code that looks at what folds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from modules import Net
from torch import Tensor, nn

import bnfold

EPSILON = 1e-3
X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))
STAYS = "its call stays in the forward, where it now does nothing"
SHIFT = "its call stays in the forward, where it now adds its shift alone"


def along(tensor: Tensor, axis: int = 1) -> Tensor:
    """A vector along one of four axes."""
    return tensor.reshape([-1 if i == axis else 1 for i in range(4)])


def parts(channels: int = 4, seed: int = 0, suffix: str = "", affine: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    gamma, beta, mean, var = (torch.rand(channels, generator=generator) + 0.5 for _ in range(4))
    learnt = {f"gamma{suffix}": nn.Parameter(gamma), f"beta{suffix}": nn.Parameter(beta - 1)} if affine else {}
    return {**learnt, f"mean{suffix}": mean - 1, f"var{suffix}": var}


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "rsqrt": lambda s, y: (y - along(s.mean)) * torch.rsqrt(along(s.var) + EPSILON) * along(s.gamma) + along(s.beta),
    "sqrt": lambda s, y: (y - along(s.mean)) / (along(s.var) + EPSILON).sqrt() * along(s.gamma) + along(s.beta),
    "power": lambda s, y: along(s.gamma) * ((y - along(s.mean)) * (along(s.var) + EPSILON) ** -0.5) + along(s.beta),
    "in place": lambda s, y: y.sub(along(s.mean)).mul_((along(s.var) + EPSILON).rsqrt_()).mul_(along(s.gamma)).add_(along(s.beta)),
    "one map": lambda s, y: y * along(s.gamma * (s.var + EPSILON).rsqrt()) + along(s.beta - s.mean * s.gamma * (s.var + EPSILON).rsqrt()),
    "between numbers": lambda s, y: (
        0.5 * (((y + 1) - along(s.mean)) * torch.rsqrt(along(s.var) + EPSILON) * along(s.gamma) + along(s.beta)) + 0.1
    ),
}


def checked(model: nn.Module, x: Tensor = X) -> tuple[nn.Module, bnfold.FuseReport]:
    """The folded copy, which gives the same in float64, the argument being as it was."""
    before = copy.deepcopy(model.state_dict())
    fused, report = bnfold.fuse(model, example=x)
    want, got = (copy.deepcopy(each).double()(x.double()) for each in (model, fused))
    assert float((want - got).abs().max()) <= 1e-6 * float(want.abs().max())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return fused, report


@pytest.mark.parametrize("form", FORMS)
def test_a_batchnorm_in_a_larger_forward_folds(form: str) -> None:
    model = Net(lambda s, x: F.relu(FORMS[form](s, s.conv(x))), conv=nn.Conv2d(3, 4, 3, bias=False), **parts()).eval()
    fused, report = checked(model)
    (layer,) = report.layers
    assert (layer.channels, layer.verdict, layer.into, layer.notes) == (4, "folded", ("conv",), (STAYS,))
    assert (report.batchnorms.before, report.batchnorms.after) == (1, 0)
    assert fused.conv.bias is not None
    assert torch.equal(fused.gamma, torch.ones(4))
    assert not fused.beta.any()
    assert not fused.mean.any()
    assert torch.equal(fused.var + EPSILON, torch.ones(4))
    verdict = bnfold.verify(model, fused, example=X)
    assert verdict.verdict == "equivalent"
    assert "nothing is folded" not in verdict.reason


def test_the_shift_stays_where_the_code_has_no_bias() -> None:
    for affine, holder, sign in ((True, "beta", 1), (False, "mean", -1)):
        held = parts(affine=affine)
        form = FORMS["rsqrt"] if affine else lambda s, y: (y - along(s.mean)) * torch.rsqrt(along(s.var) + EPSILON)
        model = Net(
            lambda s, x, form=form: F.relu(form(s, F.conv2d(x, s.weight))), weight=nn.Parameter(torch.randn(4, 3, 3, 3)), **held
        ).eval()
        fused, report = checked(model)
        (layer,) = report.layers
        assert (layer.verdict, layer.into) == ("folded", ("conv2d",))
        assert layer.notes == (f"{SHIFT}, for which conv2d has no place",)
        gain = held.get("gamma", torch.ones(4)) / (held["var"] + EPSILON).sqrt()
        torch.testing.assert_close(sign * getattr(fused, holder), held.get("beta", torch.zeros(4)) - gain * held["mean"])
        torch.testing.assert_close(fused.weight, model.weight * gain.reshape(-1, 1, 1, 1))


def test_channels_on_the_last_axis() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return F.relu((y - s.mean) * (s.var + EPSILON).rsqrt().mul_(s.gamma) + s.beta)

    model = Net(forward, conv=nn.Conv2d(3, 4, 3), **parts()).eval()
    x = X.permute(0, 2, 3, 1)
    assert checked(model, x)[1].batchnorms.after == 0
    data = [torch.randn(4, 9, 8, 3) * 2 + 1 for _ in range(3)]
    fresh, report = bnfold.recalibrate(model, data, example=x)
    seen = model.conv(torch.cat(data).permute(0, 3, 1, 2)).detach().double()
    torch.testing.assert_close(fresh.mean.double(), seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fresh.var.double(), seen.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)
    assert [layer.count for layer in report.layers] == [seen[:, 0].numel()]


def test_several_are_told_apart_by_their_names() -> None:
    def norm(s: Any, y: Tensor, k: str) -> Tensor:
        gamma, beta, mean, var = (along(getattr(s, f"{k}{name}")) for name in ("gamma", "beta", "mean", "var"))
        return (y - mean) * torch.rsqrt(var + EPSILON) * gamma + beta

    held = {f"{k}_{name}": tensor for k, seed in (("one", 0), ("two", 1)) for name, tensor in parts(seed=seed).items()}
    convs = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 3)}
    block = Net(lambda s, x: norm(s, s.b(F.relu(norm(s, s.a(x), "one_"))), "two_"), **convs, **held)
    _, report = checked(nn.Sequential(block, nn.ReLU()).eval())
    assert [(layer.name, layer.into) for layer in report.layers] == [("0.one", ("0.a",)), ("0.two", ("0.b",))]


def test_what_cannot_be_set_is_listed_and_stays() -> None:
    def plus_one(s: Any, y: Tensor) -> Tensor:
        return (y - along(s.mean)) * torch.rsqrt(along(s.var) + EPSILON) * (1 + along(s.gamma)) + along(s.beta)

    kinds: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
        "another formula": (lambda s, x: F.relu(plus_one(s, s.conv(x))), parts()),
        "read elsewhere": (lambda s, x: F.relu(FORMS["rsqrt"](s, s.conv(x))) * s.gamma.sum(), parts()),
    }
    for forward, held in kinds.values():
        model = Net(forward, conv=nn.Conv2d(3, 4, 3), **held).eval()
        report = checked(model)[1]
        assert [(layer.verdict, layer.reason) for layer in report.layers] == [
            ("kept", "it is computed in the forward of Net, which stays as it is")
        ]
        assert (report.batchnorms.before, report.batchnorms.after) == (1, 1)
        assert not report.layers[0].notes
    with pytest.raises(bnfold.NothingToDoError, match="keeps its statistics: it is written out"):
        bnfold.recalibrate(Net(kinds["another formula"][0], conv=nn.Conv2d(3, 4, 3), **parts()).eval(), [X])


def test_an_exported_module_names_the_way_on_which_it_folds() -> None:
    torch.manual_seed(0)
    module = torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), (X,)).module()
    reason = bnfold.inspect(module, example=X).layers[0].reason
    assert reason.endswith("give the model as an exported program (torch.export.export), or as a .pt2 or .onnx file")
    assert bnfold.fuse(torch.export.export(module, (X,)))[1].batchnorms.after == 0


def test_other_roots_are_no_batchnorms() -> None:
    """The length of a weight's rows; a quantised layer that undoes the scale of its BatchNorm."""

    def forward(s: Any, x: Tensor) -> Tensor:
        length = along((s.w.square().sum(1) + EPSILON).sqrt())
        return s.b(s.conv(x) / length)

    model = Net(forward, conv=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4), w=torch.randn(4, 5)).eval()
    assert [layer.name for layer in bnfold.inspect(model, example=X).layers] == ["b"]


# --- code that looks at its own modules ---------------------------------------------------------------------------------------------


def _children(s: Any, x: Tensor) -> Tensor:
    for child in s.children():
        x = child(x) + 1 if isinstance(child, nn.BatchNorm2d) else child(x)
    return x


LOOKING: dict[str, tuple[Callable[[Any, Tensor], Tensor], set[str]]] = {
    "isinstance": (_children, {"b", "d"}),
    "num_features": (lambda s, x: s.d(s.c(F.relu(s.b(s.a(x))))) * s.b.num_features, {"b"}),
    "the bias of a convolution": (lambda s, x: s.d(s.c(F.relu(s.b(s.a(x) * (2 if s.a.bias is None else 1))))), {"b"}),
    "nothing": (lambda s, x: s.d(s.c(F.relu(s.b(s.a(x))))), set()),
}


def looking(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    norms = [nn.BatchNorm2d(4) for _ in range(2)]
    for norm in norms:
        norm.running_mean.normal_()
    return Net(forward, a=nn.Conv2d(3, 4, 3, bias=False), b=norms[0], c=nn.Conv2d(4, 4, 3), d=norms[1]).eval()


@pytest.mark.parametrize("name", LOOKING)
def test_what_code_looks_at_stays(name: str) -> None:
    forward, stay = LOOKING[name]
    report = checked(looking(forward))[1]
    assert {layer.name for layer in report.layers if layer.verdict == "kept"} == stay
    assert all("the module's own code, or a hook, looks at it" in layer.reason for layer in report.layers if layer.verdict == "kept")


def test_what_a_hook_reads_stays() -> None:
    model = looking(LOOKING["nothing"][0])
    seen: list[torch.Size] = []
    model.b.register_forward_hook(lambda module, given, output: seen.append(module.weight.shape))
    fused, report = bnfold.fuse(model, example=X)
    assert {layer.name: layer.verdict for layer in report.layers} == {"b": "kept", "d": "folded"}
    fused(X)


# --- Keras --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    found = pytest.importorskip("keras")
    if found.backend.backend() != "torch":
        pytest.skip("Keras runs on another back-end")
    return found


def lively(model: Any) -> Any:
    """The model with variables that look trained."""
    random = np.random.default_rng(0)
    for variable in model.weights:
        positive = variable.path.endswith(("gamma", "moving_variance"))
        variable.assign(random.uniform(0.5, 1.5, variable.shape) if positive else random.normal(0, 0.5, variable.shape))
    return model.eval()


def _residual(k: Any, x: Any) -> Any:
    y = k.layers.ReLU()(k.layers.BatchNormalization()(k.layers.Conv2D(4, 3, padding="same")(x)))
    z = k.layers.BatchNormalization()(k.layers.Conv2D(4, 3, padding="same", use_bias=False)(y))
    return k.layers.ReLU()(k.layers.Add()([y, z]))


KERAS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "convolution": ((9, 8, 3), lambda k: [k.layers.Conv2D(4, 3), k.layers.BatchNormalization(), k.layers.ReLU()]),
    "without bias": ((9, 8, 3), lambda k: [k.layers.Conv2D(4, 3, use_bias=False), k.layers.BatchNormalization(), k.layers.ReLU()]),
    "no center": ((9, 8, 3), lambda k: [k.layers.Conv2D(4, 3, use_bias=False), k.layers.BatchNormalization(center=False, scale=False)]),
    "no scale": ((9, 8, 3), lambda k: [k.layers.Conv2D(4, 3), k.layers.BatchNormalization(scale=False), k.layers.ReLU()]),
    "dense": ((5,), lambda k: [k.layers.Dense(4), k.layers.BatchNormalization(), k.layers.ReLU(), k.layers.Dense(2)]),
    "depthwise": ((9, 8, 3), lambda k: [k.layers.DepthwiseConv2D(3), k.layers.BatchNormalization(), k.layers.ReLU()]),
    "separable": ((9, 8, 3), lambda k: [k.layers.SeparableConv2D(4, 3, use_bias=False), k.layers.BatchNormalization()]),
    "transposed": ((5, 5, 3), lambda k: [k.layers.Conv2DTranspose(4, 3, strides=2), k.layers.BatchNormalization()]),
    "before it": ((9, 8, 3), lambda k: [k.layers.BatchNormalization(), k.layers.Conv2D(4, 3), k.layers.ReLU()]),
    "residual": ((9, 8, 3), lambda k: _residual),
}


def keras_model(keras: Any, name: str) -> tuple[Any, Tensor]:
    shape, make = KERAS[name]
    layers, given = make(keras), keras.Input(shape)
    model = keras.Sequential([given, *layers]) if isinstance(layers, list) else keras.Model(given, layers(keras, given))
    return lively(model), torch.randn(2, *shape)


@pytest.mark.parametrize("name", KERAS)
def test_keras_modules_fold(keras: Any, name: str) -> None:
    model, x = keras_model(keras, name)
    before = [variable.numpy().copy() for variable in model.variables]
    fused, report = bnfold.fuse(model, example=x)
    assert type(fused) is type(model)
    assert report.batchnorms.after == 0
    assert report.verify is not None
    assert report.verify.verdict == "equivalent"
    assert all(layer.name.rpartition("/")[2].startswith("batch_normalization") for layer in report.layers)
    assert all(np.array_equal(old, new.numpy()) for old, new in zip(before, model.variables, strict=True))
    assert not all(np.array_equal(old, new.numpy()) for old, new in zip(before, fused.variables, strict=True))
    want, got = (np.asarray(each(x).detach()) for each in (model, fused))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert [variable.path for variable in fused.variables] == [variable.path for variable in model.variables]
    assert list(fused.state_dict()) == list(model.state_dict())
    assert bnfold.verify(model, fused, example=x).verdict == "equivalent"


def test_a_folded_keras_model_is_saved_and_loaded(keras: Any, tmp_path: Any) -> None:
    model, x = keras_model(keras, "without bias")
    fused, _ = bnfold.fuse(model, example=x)
    fused.save(tmp_path / "fused.keras")
    loaded = keras.models.load_model(tmp_path / "fused.keras")
    torch.testing.assert_close(loaded(x), fused(x))
    torch.testing.assert_close(copy.deepcopy(fused)(x), fused(x))


def test_keras_within_a_torch_module(keras: Any) -> None:
    inner, x = keras_model(keras, "convolution")
    model = nn.Sequential(inner, nn.Flatten(), nn.Linear(7 * 6 * 4, 3), nn.BatchNorm1d(3)).eval()
    fused, report = bnfold.fuse(model, example=x)
    assert report.batchnorms.after == 0
    torch.testing.assert_close(fused(x), model(x))


@pytest.mark.parametrize("name", ["without bias", "dense", "residual"])
def test_keras_statistics_are_measured(keras: Any, name: str) -> None:
    model, x = keras_model(keras, name)
    data = [torch.randn(4, *x.shape[1:]) * 2 + 1 for _ in range(3)]
    program = torch.export.export(model, (torch.cat(data),), strict=False)
    fresh, report = bnfold.recalibrate(model, data, example=x)
    other, _ = bnfold.recalibrate(program, [torch.cat(data)])
    norms = [layer for layer in fresh.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert [layer.name.rpartition("/")[2] for layer in report.layers] == [layer.name for layer in norms]
    for layer in norms:
        seen = keras.Model(fresh.inputs, layer.input)(torch.cat(data)).detach().double()
        axes = tuple(range(seen.ndim - 1))
        torch.testing.assert_close(torch.tensor(layer.moving_mean.numpy()).double(), seen.mean(axes), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(layer.moving_variance.numpy()).double(), seen.var(axes, correction=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.module()(torch.cat(data)), fresh(torch.cat(data)), rtol=1e-4, atol=1e-5)
