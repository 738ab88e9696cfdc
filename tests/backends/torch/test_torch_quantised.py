"""BatchNorms behind weights that PyTorch quantises: they go into the scales, and not one integer changes but for its sign."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
import torch.nn.functional as F
from modules import Net, difference, norm, run
from torch import Tensor, nn
from torch.export import ExportedProgram

import bnfold

Q = torch.ops.quantized_decomposed
DRAWN = torch.Generator().manual_seed(1)
IMAGE, ROWS = torch.randn(3, 4, 8, 8, generator=DRAWN), torch.randn(5, 4, generator=DRAWN)
INT8 = (-128, 127)

# --- layouts of programs -------------------------------------------------------------------------------------------------------------


def codes(w: Tensor, scale: Tensor, zero: int = 0, axis: int = 0, low: int = -128) -> Tensor:
    shape = [-1 if i == axis and scale.numel() > 1 else 1 for i in range(w.ndim)]
    return (w / scale.reshape(shape) + zero).round().clamp(low, low + 255).to(torch.int8 if low else torch.uint8)


def scales(w: Tensor, axis: int) -> Tensor:
    return w.abs().amax([i for i in range(w.ndim) if i != axis]) / 127.5


def per_channel(fake: bool = False, stored: bool = False, axis: int = 0, zero: int = 0, low: int = -128) -> Any:
    """What makes a weight of a stored one, and that."""

    def build(w: Tensor) -> tuple[dict[str, Tensor], Callable[[Any], Tensor]]:
        s, ends = scales(w, axis), (low, low + 255)
        z = torch.full(s.shape, zero, dtype=torch.int32 if fake else torch.int64)
        kind = torch.int8 if low else torch.uint8
        if fake:
            return {"w": nn.Parameter(w), "s": s, "z": z}, lambda m: torch.fake_quantize_per_channel_affine(m.w, m.s, m.z, axis, *ends)
        if stored:
            held = {"w": codes(w, s, zero, axis, low), "s": s, "z": z}
            return held, lambda m: Q.dequantize_per_channel(m.w, m.s, m.z, axis, *ends, kind)
        return {"w": nn.Parameter(w), "s": s, "z": z}, lambda m: Q.dequantize_per_channel(
            Q.quantize_per_channel(m.w, m.s, m.z, axis, *ends, kind), m.s, m.z, axis, *ends, kind
        )

    return build


def per_tensor(fake: bool = False, stored: bool = False, tensors: bool = False, low: int = -128, zero: int = 0) -> Any:
    def build(w: Tensor) -> tuple[dict[str, Tensor], Callable[[Any], Tensor]]:
        s, ends, kind = w.abs().max() / 127.5, (low, low + 255), torch.int8 if low else torch.uint8
        held: dict[str, Any] = {"w": codes(w, s, zero, low=low) if stored else nn.Parameter(w)}
        held |= {"s": s, "z": torch.tensor(zero, dtype=torch.int32 if fake else torch.int64)} if tensors else {}

        def weight(m: Any) -> Tensor:
            numbers = (m.s, m.z) if tensors else (s.item(), zero)
            if fake:
                return torch.fake_quantize_per_tensor_affine(m.w, *numbers, *ends)
            quantise, dequantise = Q.quantize_per_tensor, Q.dequantize_per_tensor
            if tensors:
                quantise, dequantise = quantise.tensor, dequantise.tensor
            return dequantise(m.w if stored else quantise(m.w, *numbers, *ends, kind), *numbers, *ends, kind)

        return held, weight

    return build


def groups(w: Tensor) -> tuple[dict[str, Tensor], Callable[[Any], Tensor]]:
    s = w.reshape(len(w), -1, 2).abs().amax(2) / 7
    held = {"w": (w / s.repeat_interleave(2, 1)).round().clamp(-8, 7).to(torch.int8), "s": s, "z": torch.zeros_like(s, dtype=torch.int64)}
    return held, lambda m: Q.dequantize_per_channel_group(m.w, m.s, m.z, -8, 7, torch.int8, 2, torch.float32)


OPERATORS: dict[str, tuple[tuple[int, ...], Callable[..., Tensor]]] = {
    "conv": ((6, 4, 3, 3), F.conv2d),
    "depthwise": ((4, 1, 3, 3), lambda x, w: F.conv2d(x, w, groups=4)),
    "transposed": ((4, 6, 2, 2), F.conv_transpose2d),
    "linear": ((6, 4), F.linear),
    "matrix": ((4, 6), torch.matmul),
    "permuted": ((4, 6), lambda x, w: F.linear(x, w.t())),
}
LAYOUTS: dict[str, tuple[str, Any]] = {
    "fake, per channel": ("conv", per_channel(fake=True)),
    "fake, per channel, depthwise": ("depthwise", per_channel(fake=True)),
    "fake, per channel, uint8": ("conv", per_channel(fake=True, low=0, zero=128)),
    "fake, per channel, transposed": ("transposed", per_channel(fake=True, axis=1)),
    "fake, per channel, linear": ("linear", per_channel(fake=True)),
    "fake, one number": ("conv", per_tensor(fake=True)),
    "fake, one number, uint8": ("conv", per_tensor(fake=True, low=0, zero=120)),
    "fake, one tensor": ("linear", per_tensor(fake=True, tensors=True)),
    "fake, one number, transposed": ("transposed", per_tensor(fake=True)),
    "quantised, per channel": ("conv", per_channel()),
    "quantised, per channel, matrix": ("matrix", per_channel(axis=1)),
    "quantised, per channel, permuted": ("permuted", per_channel(axis=1)),
    "quantised, one number": ("conv", per_tensor()),
    "quantised, one tensor": ("conv", per_tensor(tensors=True)),
    "stored, per channel": ("conv", per_channel(stored=True)),
    "stored, per channel, uint8": ("depthwise", per_channel(stored=True, low=0, zero=100)),
    "stored, per channel, transposed": ("transposed", per_channel(stored=True, axis=1)),
    "stored, one number": ("conv", per_tensor(stored=True)),
    "stored, one tensor": ("linear", per_tensor(stored=True, tensors=True)),
    "stored, in groups": ("linear", groups),
}


def network(operator: str, layout: Any, **how: Any) -> Net:
    torch.manual_seed(0)
    shape, call = OPERATORS[operator]
    held, weight = layout(torch.randn(shape))
    out = 6 if 6 in shape else 4
    return Net(lambda s, x: s.b(call(x, weight(s))), **held, b=norm(out, 2 if len(shape) == 4 else 1, **how)).eval()


class Codes(torch.fx.Interpreter):
    """Notes how far the codes of each quantised weight are from their zeros, when a program's module runs."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.found: list[Tensor] = []
        self.held = {node: self.fetch_attr(node.target) for node in module.graph.nodes if node.op == "get_attr"}

    def run_node(self, n: torch.fx.Node) -> Any:
        returned = super().run_node(n)
        if n.op == "call_function" and "quantize" in (name := str(n.target)) and n.all_input_nodes[0] in self.held:
            self.held[n] = returned
            if ".quantize" not in name:
                _, scale, _, *rest = self.fetch_args_kwargs_from_env(n)[0]
                first = returned[0] if isinstance(returned, tuple) else returned
                shape = [1] * first.ndim
                scale = torch.as_tensor(scale)
                if scale.ndim == 2:
                    scale = scale.repeat_interleave(2, 1)
                elif scale.numel() > 1:
                    shape[rest[0]] = -1
                    scale = scale.reshape(shape)
                self.found.append((first / scale).round())
        return returned


def distances(program: ExportedProgram, x: Tensor) -> list[Tensor]:
    seen = Codes(program.module())
    seen.run(x)
    return seen.found


@pytest.mark.parametrize(
    ("name", "decomposed"), [(name, False) for name in LAYOUTS] + [(name, True) for name in LAYOUTS if "fake" in name or "linear" in name]
)
def test_a_program_takes_it_in_its_scales(name: str, decomposed: bool) -> None:
    operator, layout = LAYOUTS[name]
    x = ROWS if len(OPERATORS[operator][0]) == 2 else IMAGE
    program = torch.export.export(network(operator, layout), (x,))
    program = program.run_decompositions() if decomposed else program
    fused, report = bnfold.fuse(program)
    (layer,) = report.layers
    assert layer.verdict == "folded", layer.reason
    assert "takes it in its scales" in layer.notes[0]
    assert "one scale becomes one for each channel" in layer.notes[0] or "one" not in name
    assert difference(run(program, x), run(fused, x)) < 1e-5
    assert bnfold.verify(program, fused, [x]).verdict == "equivalent"
    (before,), (after,) = distances(program, x), distances(fused, x)
    torch.testing.assert_close(before.abs(), after.abs(), rtol=0, atol=0)
    assert len(fused.state_dict) + len(fused.constants) <= len(program.state_dict) + len(program.constants)


# --- the same in operators of other kinds ----------------------------------------------------------------------------------------------


def around(t: Tensor, zero: int = 0) -> Tensor:
    return (t + zero).round().clamp(*INT8) - zero


WRITTEN: dict[str, Callable[[Any], Tensor]] = {
    "rounded": lambda s: around(s.w / s.s) * s.s,
    "rounded, the scale first, a zero point": lambda s: s.s * around(s.w / s.s, 3),
    "rounded past the gradient": lambda s: ((s.w / s.s).round() - s.w / s.s).detach().add(s.w / s.s).clamp(*INT8) * s.s,
    "one scale that is a number": lambda s: around(s.w / 0.02) * 0.02,
    "one scale that is computed": lambda s: around(s.w / s.s.mean().exp()) * s.s.mean().exp(),
    "multiples": lambda s: s.w.sign() * s.s,
    "stored": lambda s: s.q.float() * s.s,
    "stored, a zero point": lambda s: (s.q.to(torch.int32) - 3) * s.s,
    "stored, transposed behind": lambda s: (s.q.float().transpose(0, 1) * s.s.transpose(0, 1)).transpose(0, 1),
}
BY_PARTS: dict[str, Callable[[Any], Tensor]] = {
    "past the gradient of all": lambda s: s.w + (around(s.w / s.s) * s.s - s.w).detach(),
    "divided by a number": lambda s: (s.w * 64).round() / 64,
    "divided by a scale": lambda s: s.q.float() / s.s,
    "stored, an offset behind": lambda s: s.s * s.q + s.z * s.s,
    "stored, cast behind, less a multiple of the scale": lambda s: (s.q.float() * s.s - s.z.float() * s.s).to(torch.float32),
    "dequantised, and bounded": lambda s: Q.dequantize_per_tensor(s.q, 0.01, 3, *INT8, torch.int8).clamp(-1, 0.5),
}


def written(weight: Callable[[Any], Tensor]) -> Net:
    return Net(lambda s, x: s.b(F.conv2d(x, weight(s))), **held_by_a_layer(), b=norm(6)).eval()


def held_by_a_layer() -> dict[str, Tensor]:
    torch.manual_seed(0)
    held = {"w": nn.Parameter(torch.randn(6, 4, 3, 3)), "s": nn.Parameter(torch.rand(6, 1, 1, 1) * 0.01 + 0.01)}
    held["q"] = torch.randint(-127, 128, (6, 4, 3, 3), dtype=torch.int8)
    held["z"] = torch.randint(-9, 9, (6, 1, 1, 1), dtype=torch.int8)
    return held


class Factors(torch.fx.Interpreter):
    """Notes the whole numbers that are multiplied."""

    def run_node(self, n: torch.fx.Node) -> Any:
        if "aten.mul" in str(n.target):
            factors, _ = self.fetch_args_kwargs_from_env(n)
            self.found = next(each for each in factors if isinstance(each, Tensor) and torch.equal(each, each.round()))
        return super().run_node(n)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_product_that_scales_integers_takes_it(name: str) -> None:
    program = torch.export.export(written(WRITTEN[name]), (IMAGE,))
    fused, report = bnfold.fuse(program)
    (layer,) = report.layers
    assert layer.verdict == "folded", layer.reason
    assert "takes it in its scales, and none of its integers changes" in layer.notes[0]
    assert ("one scale becomes one for each channel" in layer.notes[0]) == ("one" in name)
    assert report.verify is not None
    assert report.verify.verdict == "equivalent"
    assert difference(run(program, IMAGE), run(fused, IMAGE)) < 1e-5
    before, after = (Factors(each.module()) for each in (program, fused))
    before.run(IMAGE)
    after.run(IMAGE)
    assert torch.equal(before.found, after.found)


@pytest.mark.parametrize("name", ["rounded", "rounded, the scale first, a zero point", "rounded past the gradient", "one scale"])
def test_a_module_takes_it_in_what_it_rounds_and_in_its_scales(name: str) -> None:
    weight = WRITTEN.get(name, lambda s: around(s.w / s.one) * s.one)
    layer = Net(lambda s, x: F.conv2d(x, weight(s), s.c), c=nn.Parameter(torch.randn(6)), one=torch.tensor(0.02), **held_by_a_layer())
    with torch.no_grad():  # some lie at the middle of two steps
        layer.w.view(-1)[:100] = ((torch.arange(100) - 50.5) * layer.s.view(-1)[0]).to(layer.w)
    net = nn.Sequential(layer, norm(6)).eval()
    fused, report = bnfold.fuse(net, example=IMAGE)
    assert report.batchnorms.after == 0, report.layers[0].reason
    assert "takes it in its scales, and none of its integers changes" in report.layers[0].notes[0]
    assert ("one scale becomes one for each channel" in report.layers[0].notes[0]) == ("one" in name)
    assert bnfold.verify(net, fused, [IMAGE]).verdict == "equivalent"
    before, after = (Factors(torch.export.export(each, (IMAGE,)).module()) for each in (net, fused))
    before.run(IMAGE)
    after.run(IMAGE)
    assert torch.equal(before.found, after.found)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda s, x: F.conv2d(x, WRITTEN["rounded"](s), s.c) * s.w.mean(), "0.w of 0 is shared with"),
        (lambda s, x: F.conv2d(x, WRITTEN["rounded"](s), s.c) * s.s.mean(), "no constant that can be rewritten in a module"),
        (lambda s, x: F.conv2d(F.conv2d(x, WRITTEN["rounded"](s), s.c)[:, :4], WRITTEN["rounded"](s), s.c), "is shared with"),
    ],
)
def test_what_is_rounded_and_does_more_stays(forward: Any, reason: str) -> None:
    net = nn.Sequential(Net(forward, c=nn.Parameter(torch.randn(6)), **held_by_a_layer()), norm(6)).eval()
    report = bnfold.inspect(net, example=IMAGE)
    assert report.batchnorms.after == 1
    assert reason in report.layers[0].reason


@pytest.mark.parametrize("name", BY_PARTS)
def test_what_is_computed_from_integers_is_multiplied(name: str) -> None:
    program = torch.export.export(written(BY_PARTS[name]), (IMAGE,))
    fused, report = bnfold.fuse(program)
    assert report.batchnorms.after == 0
    assert "is multiplied by a factor for each channel, and none of the integers" in report.layers[0].notes[0]
    assert report.verify is not None
    assert report.verify.verdict == "equivalent"
    assert difference(run(program, IMAGE), run(fused, IMAGE)) < 1e-5
    old, new = program.state_dict, fused.state_dict
    assert all(torch.equal(new[key], old[key]) for key in old if key in new)
    assert sorted(tensor.numel() for key, tensor in new.items() if key not in old) == [6, 6], "a factor and a bias"
    assert bnfold.verify(program, fused, [IMAGE]).verdict == "equivalent"


class Rounded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, around(self.weight / 0.02) * 0.02, self.bias)


def test_a_module_whose_weights_are_rounded_says_so_or_names_the_way() -> None:
    torch.manual_seed(0)
    report = bnfold.fuse(nn.Sequential(Rounded(4, 6, 3), norm(6)).eval(), example=IMAGE)[1]
    assert report.layers[0].notes == ("0.weight, which was computed from integers, becomes floats",)
    reason = bnfold.inspect(written(WRITTEN["one scale that is a number"]), example=IMAGE).layers[0].reason
    assert "can be rewritten in a module: give the model as an exported program (torch.export.export)" in reason


# --- modules that hold integers and their scales themselves ------------------------------------------------------------------------------


def unpacked(q: Tensor) -> Tensor:
    return torch.cat([q & 15, q >> 4], 1).to(torch.float32)


def holding(
    call: Callable[[Any, Tensor], Tensor], q: Any = (6, 4, 3, 3), s: Any = (6, 1, 1, 1), *, bias: bool = True, **more: Any
) -> nn.Module:
    """A layer without a float weight, and a BatchNorm. q, s: shapes of its integers and its scales, or these."""
    torch.manual_seed(0)
    stored = torch.randint(-128, 128, q, dtype=torch.int8) if isinstance(q, tuple) else q
    scale = torch.rand(s) * 0.02 + 0.01 if isinstance(s, tuple) else s
    layer = Net(call, q=stored, s=scale, bias=nn.Parameter(torch.randn(6)) if bias else None, **more)
    return nn.Sequential(layer, norm(6, 2 if stored.ndim == 4 else 1)).eval()


def convolved(weight: Callable[[Any], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: F.conv2d(x, weight(m), m.bias, padding=1)


HOLDING: dict[str, Callable[[], nn.Module]] = {
    "a scale per channel": lambda: holding(convolved(lambda m: m.q.to(torch.float32) * m.s)),
    "one number": lambda: holding(convolved(lambda m: m.q.float() * m.s), s=()),
    "one scale": lambda: holding(convolved(lambda m: m.s * m.q), s=(1, 1, 1, 1)),
    "no bias": lambda: holding(convolved(lambda m: m.q * m.s), bias=False),
    "a vector of scales": lambda: holding(convolved(lambda m: m.q.float() * m.s[:, None, None, None]), s=(6,)),
    "scales of half precision": lambda: holding(convolved(lambda m: m.q.float() * m.s.float()), s=torch.rand(6, 1, 1, 1).half()),
    "a zero point": lambda: holding(convolved(lambda m: (m.q.float() - m.z) * m.s), z=torch.randint(-9, 9, (6, 1, 1, 1), dtype=torch.int8)),
    "packed": lambda: holding(convolved(lambda m: (unpacked(m.q) - 8) * m.s), q=torch.randint(0, 256, (6, 2, 3, 3), dtype=torch.uint8)),
    "in groups": lambda: holding(lambda m, x: F.linear(x, (m.q.float() * m.s).reshape(6, 4), m.bias), q=(6, 2, 2), s=(6, 2, 1)),
    "of a codebook": lambda: holding(convolved(lambda m: m.t[m.q.long() & 15] * m.s), t=torch.randn(16)),
    "truths": lambda: holding(convolved(lambda m: ((m.w >= 0).float() * 2 - 1) * m.s), w=torch.randn(6, 4, 3, 3)),
    "both of two": lambda: holding(convolved(lambda m: torch.where(m.w >= 0, 1.0, -1.0) * m.s), w=torch.randn(6, 4, 3, 3)),
    "channels last": lambda: holding(convolved(lambda m: (m.q.float() * m.s).permute(3, 2, 0, 1)), q=(3, 3, 4, 6), s=(6,)),
    "times a number": lambda: holding(convolved(lambda m: m.q.float() * m.s / 127)),
    "transposed": lambda: holding(lambda m, x: F.conv_transpose2d(x, m.q.float() * m.s, m.bias), q=(4, 6, 2, 2), s=(1, 6, 1, 1)),
}


@pytest.mark.parametrize("name", HOLDING)
def test_a_module_takes_it_in_the_scales_that_it_holds(name: str, tmp_path: Any) -> None:
    net = HOLDING[name]()
    x = ROWS if net[0].q.ndim == 3 else IMAGE
    fused, report = bnfold.fuse(net, example=x)
    assert report.batchnorms.after == 0, report.layers[0].reason
    assert "takes it in its scales, and none of its integers changes" in report.layers[0].notes[0]
    assert ("one scale becomes one for each channel" in report.layers[0].notes[0]) == ("one" in name)
    assert torch.equal(net[0].q, fused[0].q)
    assert not torch.equal(net[0].s, fused[0].s)
    assert net[0].s.dtype == fused[0].s.dtype
    close = 2e-3 if "half" in name else 1e-5
    assert difference(run(net, x), run(fused, x)) < close
    assert bnfold.verify(net, fused, [x]).verdict == "equivalent"
    if "one" in name:
        (tmp_path / "made.py").write_text(f"from test_torch_quantised import HOLDING\ndef make(): return HOLDING[{name!r}]()\n")
        bnfold.save(fused, tmp_path / "fused.safetensors")
        loaded = bnfold.load(tmp_path / "fused.safetensors", arch=f"{tmp_path / 'made.py'}:make")
        assert difference(run(fused, x), run(loaded, x)) == 0
        kept = bnfold.fuse(net, example=x, keep_per_tensor=True)[1]
        assert "--keep-per-tensor" in kept.layers[0].reason


@pytest.mark.parametrize("biased", [False, True])
def test_what_scales_the_products_of_integers_takes_it(biased: bool) -> None:
    net = holding(lambda m, x: F.linear(x, m.q.float()) * m.s + (m.bias if biased else 0), q=(6, 4), s=(6,))
    program = torch.export.export(net, (ROWS,))
    fused, report = bnfold.fuse(program)
    assert report.batchnorms.after == 0, report.layers[0].reason
    assert any("scales integers, none of which changes" in note for layer in report.layers for note in layer.notes)
    assert torch.equal(fused.state_dict["0.q"], net[0].q)
    assert difference(run(program, ROWS), run(fused, ROWS)) < 1e-5
    assert bnfold.verify(program, fused, [ROWS]).verdict == "equivalent"


class Doubly(nn.Module):
    """Two layers, of which each has integers of its own, and the scales are the same."""

    def __init__(self) -> None:
        super().__init__()
        one, other = (holding(convolved(lambda m: m.q.float() * m.s)) for _ in range(2))
        self.one, self.other, self.b, self.c = one[0], other[0], one[1], other[1]
        self.other.q, self.other.s = -self.one.q.clamp(-127), self.one.s

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.one(x)) * self.c(self.other(x))


def test_scales_that_do_more_than_scale_one_array_stay() -> None:
    report = bnfold.inspect(Doubly().eval(), example=IMAGE)
    assert report.batchnorms.after == 2
    assert "its scale is also that of others" in report.layers[1].reason
    report = bnfold.inspect(holding(convolved(lambda m: m.q.float() * m.s.view(-1, 1, 1, 1)), s=(1,)), example=IMAGE)
    assert "is quantised with one scale, and the module's code has no other form of it" in report.layers[0].reason


class Coded(Tensor):
    """A weight that is made of integers and their scales, as torchao's are."""

    @staticmethod
    def __new__(cls, q: Tensor, s: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, q.shape, dtype=s.dtype)

    def __init__(self, q: Tensor, s: Tensor) -> None:
        self.q, self.s = q, s

    def __tensor_flatten__(self) -> Any:
        return ["q", "s"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Any:
        return Coded(inner["q"], inner["s"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, w, bias = args
            return F.linear(x, w.q.float() * w.s, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if "detach" not in str(func) and "clone" not in str(func):
            raise NotImplementedError(func)  # as torch wants it said of what a class of tensors doesn't do
        return Coded(func(args[0].q), func(args[0].s))


def test_a_weight_that_is_made_of_tensors_takes_it_in_its_scales_in_a_program() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), norm(6, 1)).eval()
    net[0].weight = nn.Parameter(Coded(torch.randint(-127, 128, (6, 4), dtype=torch.int8), torch.rand(6, 1)))
    program = torch.export.export(net, (ROWS,))
    fused, report = bnfold.fuse(program)
    assert report.batchnorms.after == 0, report.layers[0].reason
    assert "takes it in its scales, and none of its integers changes" in report.layers[0].notes[0]
    assert difference(run(program, ROWS), run(fused, ROWS)) < 1e-5
    assert bnfold.verify(program, fused, [ROWS]).verdict == "equivalent"
    assert "the same model" in bnfold.verify(program, program, [ROWS]).reason
    assert bnfold.recalibrate(program, [ROWS])[1].layers
    report = bnfold.inspect(net, example=ROWS)
    assert "in a module: give the model as an exported program" in report.layers[0].reason


# --- modules -------------------------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ao = pytest.importorskip("torch.ao.quantization")


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.dw, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.up, self.bn3, self.relu3 = nn.ConvTranspose2d(6, 5, 2, stride=2), nn.BatchNorm2d(5), nn.ReLU()
        self.pool, self.fc, self.bn4 = nn.AdaptiveAvgPool2d(1), nn.Linear(5, 10), nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.dw(self.relu1(self.bn1(self.conv1(x)))))
        x = self.relu3(self.bn3(self.up(x)))
        return self.bn4(self.fc(self.pool(x).flatten(1)))


X = torch.randn(4, 1, 8, 8, generator=DRAWN)


def trained(net: nn.Module, *, observing: bool = True) -> nn.Module:
    """Scales and statistics as training leaves them."""
    torch.manual_seed(1)
    for _ in range(3):
        net.train()(torch.randn(8, 1, 8, 8))
    with torch.no_grad():
        for each in net.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm):
                each.weight.uniform_(0.5, 1.5)
                each.bias.normal_()
    net(torch.randn(8, 1, 8, 8))
    return net.eval() if observing else net.apply(ao.disable_observer).eval()


def weights_only(weight: Any, **how: Any) -> nn.Module:
    torch.manual_seed(0)
    net = Digits().train()
    net.qconfig = ao.QConfig(activation=nn.Identity, weight=weight)
    return trained(ao.prepare_qat(net), **how)


SCHEMES = {
    "per channel": ao.default_per_channel_weight_fake_quant,
    "per channel, fused with its observer": ao.default_fused_per_channel_wt_fake_quant,
    "per tensor": ao.default_weight_fake_quant,
    "per tensor, fused with its observer": ao.default_fused_wt_fake_quant,
}


def module_codes(net: nn.Module) -> dict[str, Tensor]:
    found = {}
    for path, each in net.named_modules():
        if hasattr(each, "weight_fake_quant"):
            how = each.weight_fake_quant
            scale = how.scale.reshape([-1, *[1] * (each.weight.ndim - 1)])
            found[path] = (how.apply(ao.disable_observer)(each.weight) / scale).round()
    return found


@pytest.mark.parametrize("observing", [True, False], ids=["observing", "frozen"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_module_takes_it_in_the_scales_of_its_fake_quantisers(name: str, observing: bool) -> None:
    net = weights_only(SCHEMES[name], observing=observing)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    fused, report = bnfold.fuse(net, example=X)
    assert [layer.verdict for layer in report.layers] == ["folded"] * 4, report.layers
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert bnfold.verify(net, fused, [X]).verdict == "equivalent"
    before, after = module_codes(net), module_codes(fused)
    assert len(before) == len(after) == 3
    for path, old in before.items():
        torch.testing.assert_close(old, after[path], rtol=0, atol=0)
    with torch.no_grad():
        assert difference([net.apply(ao.disable_observer)(X)], [fused(X)]) < 1e-5
    quantiser = fused.conv1.weight_fake_quant
    assert quantiser.is_per_channel
    own = net.conv1.weight_fake_quant  # which may state another scale than its observer
    ratios = [(each.calculate_qparams()[0] / each.scale).expand(6) for each in (own, quantiser)]
    torch.testing.assert_close(*ratios)
    assert ("observers of 3 fake quantisers are on" in " ".join(report.notes)) == observing
    assert ("the observer that would set them anew is off" in report.layers[0].notes[0]) == observing


def test_one_scale_of_a_module_can_be_kept() -> None:
    kept, report = bnfold.fuse(weights_only(SCHEMES["per tensor"]), example=X, keep_per_tensor=True)
    assert [layer.verdict for layer in report.layers] == ["kept", "kept", "folded", "kept"]
    assert "--keep-per-tensor" in report.layers[0].reason
    assert not kept.conv1.weight_fake_quant.is_per_channel


def test_a_symmetric_scheme_that_lacks_a_negative_names_the_channel() -> None:
    net = weights_only(SCHEMES["per channel"])
    with torch.no_grad():
        net.conv1.weight[2, 0, 0, 0] = -10
        net.bn1.weight[2] = -1
    report = bnfold.inspect(net, example=X)
    assert "channel 2 would need the negative of -128; a symmetric scheme has one zero point" in report.layers[0].reason


@pytest.mark.parametrize("scale", ["number", "buffer"])
def test_what_a_modules_own_code_rounds_by_one_scale_stays(scale: str) -> None:
    net = network("conv", per_tensor(fake=True, tensors=scale == "buffer"))
    fused, report = bnfold.fuse(net, example=IMAGE)
    assert report.batchnorms.after == 1
    reason = "its scale is no parameter or buffer" if scale == "number" else "the module's code rounds by one"
    assert reason in report.layers[0].reason
    assert bnfold.verify(net, fused, [IMAGE]).verdict == "inconclusive"


def test_scales_that_a_modules_own_code_reads_are_rewritten() -> None:
    torch.manual_seed(0)
    held, weight = per_channel(fake=True)(torch.randn(6, 4, 3, 3))
    net = Net(lambda s, x: s.b(F.conv2d(x, weight(s), s.c)), **held, c=nn.Parameter(torch.randn(6)), b=norm(6, positive=True)).eval()
    fused, report = bnfold.fuse(net, example=IMAGE)
    assert report.batchnorms.after == 0, report.layers[0].reason
    assert bnfold.verify(net, fused, [IMAGE]).verdict == "equivalent"
    assert not torch.equal(net.s, fused.s)


def test_activations_that_are_rounded_between_are_told_of() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(ao.QuantStub(), Digits().train(), ao.DeQuantStub())
    net.qconfig = ao.get_default_qat_qconfig("fbgemm")
    net = trained(ao.prepare_qat(net))
    fused, report = bnfold.fuse(net, example=X)
    assert report.batchnorms.after == 4
    assert all("rounds activations to integers" in layer.reason for layer in report.layers)
    assert all("fold before quantising, or recalibrate" in layer.reason for layer in report.layers)
    assert bnfold.verify(net, fused, [X]).verdict == "inconclusive"


def test_observers_of_a_network_that_is_still_to_be_quantised_are_passed_over() -> None:
    net = nn.Sequential(ao.QuantStub(), trained(Digits()), ao.DeQuantStub()).eval()
    net.qconfig = ao.get_default_qconfig("qnnpack")
    net = ao.prepare(net)
    net(X)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    fused, report = bnfold.fuse(net, example=X)
    assert report.batchnorms.after == 0
    assert "calibrate a folded copy anew" in " ".join(report.notes)
    assert bnfold.verify(net, fused, [X]).verdict == "equivalent"
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert fused[1].bn1.activation_post_process is not net[1].bn1.activation_post_process


class Own(ao.FakeQuantize):
    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X) + 1


@pytest.mark.parametrize("kind", ["learned scales", "a forward of its own"])
def test_a_quantiser_that_nobody_knows_is_told_of(kind: str) -> None:
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    how = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
    made = Own.with_args(**how) if "own" in kind else _LearnableFakeQuantize.with_args(observer=ao.MovingAverageMinMaxObserver, **how)
    with pytest.raises(bnfold.UnsupportedError, match="weight_fake_quant"):
        bnfold.fuse(weights_only(made), example=X)


def test_weights_that_are_packed_are_told_of() -> None:
    net = ao.quantize_dynamic(trained(Digits()), {nn.Linear})
    with pytest.raises(bnfold.UnsupportedError, match=r"weights are packed .* \(fc, Linear\): fold the model before it is converted"):
        bnfold.fuse(net, example=X)


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_whose_operators_observe_is_read_as_it_is_set(decomposed: bool, tmp_path: Any) -> None:
    net = weights_only(SCHEMES["per channel, fused with its observer"])
    program = torch.export.export(net, (X,))
    program = program.run_decompositions() if decomposed else program
    fused, report = bnfold.fuse(program)
    assert report.batchnorms.after == 0
    assert "the observers of 3 fake quantisers are on" in " ".join(report.notes)
    assert not any("moving_avg" in str(op.target) for op in fused.graph.nodes)
    assert not fused.graph_signature.buffers_to_mutate
    bnfold.save(fused, tmp_path / "fused.pt2")
    assert bnfold.verify(program, bnfold.load(tmp_path / "fused.pt2"), [X]).verdict == "equivalent"


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_output_that_is_observed_stays_one(decomposed: bool) -> None:
    torch.manual_seed(0)
    quantise = ao.default_fused_act_fake_quant()
    program = torch.export.export(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), quantise).eval(), (X,))
    program = program.run_decompositions() if decomposed else program
    fused, report = bnfold.fuse(program)
    assert report.batchnorms.after == 0
    assert bnfold.verify(program, fused, [X]).levels.coefficients.verdict == "equivalent"
    assert run(fused, X)[0].shape == (4, 4, 6, 6)


def test_the_operators_of_a_file_are_known_in_a_new_process(tmp_path: Any) -> None:
    torch.export.save(torch.export.export(network("conv", per_channel(stored=True)), (IMAGE,)), tmp_path / "net.pt2")
    run = [sys.executable, "-m", "bnfold", "fuse", str(tmp_path / "net.pt2"), "-o", str(tmp_path / "out.pt2")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 folded" in done.stdout
