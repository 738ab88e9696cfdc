"""What the tools in use get wrong on PyTorch models, each on a network where it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from modules import Net, difference, folded, kept, lively, norm, run, weight
from torch import nn

import bnfold
from bnfold.backends.torch.export.trace import trace
from bnfold.backends.torch.runtime.interpreter import TorchOracle
from bnfold.backends.torch.runtime.session import run_failed

X = torch.randn(6, 3, 10, 9, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def both(module: nn.Module, example: Any = X) -> tuple[int, int]:
    """BatchNorms that stay in the module and in its program; neither changes the function, in float64."""
    (_, here), (_, there) = folded(module.eval(), example)
    return here.batchnorms.after, there.batchnorms.after


# --- folding ----------------------------------------------------------------------------------------------------------------------


def test_a_convolution_called_twice_of_which_one_call_is_read_bare() -> None:
    assert both(Net(lambda s, x: s.b(s.c(x)) + s.c(x + 1), c=nn.Conv2d(3, 4, 3), b=norm(4))) == (1, 0)


def test_a_linear_layer_called_twice() -> None:
    assert both(Net(lambda s, x: s.b(s.l(x)).relu() + s.b(s.l(x * 2)), l=nn.Linear(5, 4), b=norm(4, 1)), torch.randn(6, 5)) == (0, 0)


def test_batchnorms_with_one_gamma_and_one_beta() -> None:
    b, d = norm(4), norm(4)
    d.weight, d.bias = b.weight, b.bias
    net = Net(lambda s, x: s.b(s.c(x)).relu() + s.d(s.e(x)).sigmoid(), c=nn.Conv2d(3, 4, 3), b=b, e=nn.Conv2d(3, 4, 3), d=d)
    assert both(net) == (0, 0)


@dataclass
class Answer:
    scores: torch.Tensor
    more: dict[str, torch.Tensor | None]


@dataclass
class Answers:
    first: Answer
    name: str = ""


def test_dataclasses_that_pytorch_does_not_know() -> None:
    def forward(s: Any, x: torch.Tensor) -> Answers:
        y = s.b(s.c(x))
        return Answers(Answer(y.relu(), {"mean": y.mean((2, 3)), "none": None}))

    model = Net(forward, c=nn.Conv2d(3, 4, 3), b=norm(4)).double().eval()
    fused, report = bnfold.fuse(model, example=X)
    assert report.batchnorms.after == 0
    want, got = model(X.double()).first, fused(X.double())
    assert isinstance(got, Answers)
    assert difference([want.scores, want.more["mean"]], [got.first.scores, got.first.more["mean"]]) < 1e-12
    checked = bnfold.verify(model, fused, [X])
    assert checked.verdict == "equivalent"
    assert [output.name for output in checked.outputs] == ["output.first.scores", "output.first.more.mean"]
    with torch.no_grad():
        fused.c.bias[0] += 1e-3
    assert bnfold.verify(model, fused, [X]).verdict == "different"
    assert [layer.name for layer in bnfold.recalibrate(model, [X])[1].layers] == ["b"]


def test_channels_along_an_axis_that_the_linear_layer_doesnt_write() -> None:
    """(N, C, L) with L = C: the weight has as many rows as the BatchNorm channels, and isn't along them."""
    assert both(nn.Sequential(nn.Linear(4, 4), norm(4, 1)), torch.randn(3, 4, 4)) == (1, 1)


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Conv1d(3, 3, 1)])
def test_an_output_that_is_read_elsewhere_too(layer: nn.Module) -> None:
    example = torch.randn(5, 3) if isinstance(layer, nn.Linear) else torch.randn(5, 3, 7)
    assert both(Net(lambda s, x: (s.b(s.l(x)), s.l.weight.sum() + s.l(x)[:, :1]), l=layer, b=norm(3, 1)), example)[0] == 1
    assert both(Net(lambda s, x: (lambda y: s.b(y).relu() * y)(s.l(x)), l=layer, b=norm(3, 1)), example) == (1, 1)


def test_a_product_behind_a_transpose_with_sizes_equal_by_chance() -> None:
    net = Net(lambda s, x: s.b((x @ s.w).transpose(1, 2)), w=nn.Parameter(torch.randn(4, 4)), b=norm(4, 1))
    assert both(net, torch.randn(2, 4, 4)) == (1, 0)


@pytest.mark.parametrize("options", [{"groups": 3}, {"groups": 3, "bias": False}, {"stride": 2, "output_padding": 1}, {"padding": 1}])
def test_transposed_convolutions(options: dict[str, Any]) -> None:
    assert both(nn.Sequential(nn.ConvTranspose2d(3, 6, 3, **options), norm(6))) == (0, 0)


def test_what_has_no_affine_part_or_is_synchronised() -> None:
    assert both(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, affine=False))) == (0, 0)
    assert both(nn.Sequential(nn.Conv2d(3, 4, 3), lively(nn.SyncBatchNorm(4)))) == (0, 0)


def test_bfloat16_folds() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)).eval().bfloat16()
    fused, report = bnfold.fuse(net, example=X.bfloat16())
    assert report.batchnorms.after == 0
    assert report.verify is not None
    assert report.verify.verdict == "equivalent"
    assert difference([t.float() for t in run(net, X.bfloat16())], [t.float() for t in run(fused, X.bfloat16())]) < 0.05


def test_an_epsilon_of_zero() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, eps=0.0))
    assert both(net) == (0, 0)
    net[1].running_var[2] = 0
    assert "both zero in channel 2" in kept(bnfold.inspect(net.eval(), example=X))["1"]


def test_same_padding_upwards_and_downwards() -> None:
    assert both(nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), norm(4))) == (0, 0)
    assert both(nn.Sequential(norm(3), nn.Conv2d(3, 4, (3, 1), padding="same"))) == (1, 1)
    assert both(nn.Sequential(norm(3), nn.Conv2d(3, 4, 1, padding="same"))) == (0, 0)


def test_one_that_never_runs() -> None:
    net = Net(lambda s, x: s.b(s.c(x)), c=nn.Conv2d(3, 4, 3), b=norm(4), idle=norm(4)).eval()
    before = {name: tensor.clone() for name, tensor in net.idle.state_dict().items()}
    fresh, report = bnfold.recalibrate(net, X)
    assert [layer.name for layer in report.layers] == ["b"]
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.idle.state_dict().items())
    fused, _ = bnfold.fuse(net, example=X)
    assert isinstance(fused.idle, nn.BatchNorm2d)


@pytest.mark.parametrize("op", [torch.add, torch.sub, torch.rsub])
@pytest.mark.parametrize("alpha", [0, 2, -0.5])
def test_a_multiple_that_may_be_zero(op: Callable[..., torch.Tensor], alpha: float) -> None:
    """`alpha` is a number, which 0 is too: x + 0*k is x."""

    def net(forward: Callable[..., Any]) -> nn.Module:
        return Net(forward, c=nn.Conv2d(3, 4, 3), d=nn.Conv2d(3, 4, 3), b=norm(4), k=weight(1, 4, 1, 1))

    both(net(lambda s, x: s.b(op(s.c(x), s.k, alpha=alpha))))
    both(net(lambda s, x: s.b(op(s.k, s.c(x), alpha=alpha))))
    assert both(net(lambda s, x: s.b(op(s.c(x), s.d(x), alpha=alpha)))) == (0, 0)


def test_a_multiple_without_end_stays() -> None:
    """Even of zeros, of which it makes no number."""
    net = Net(
        lambda s, x: s.b(torch.add(s.c(x), torch.zeros_like(s.d(x)), alpha=float("inf"))),
        c=nn.Conv2d(3, 4, 3),
        d=nn.Conv2d(3, 4, 3),
        b=norm(4),
    )
    assert "isn't finite" in kept(bnfold.inspect(net.eval(), example=X))["b"]


def test_a_computed_multiple_stays() -> None:
    net = Net(lambda s, x: s.b(torch.add(s.c(x), s.k, alpha=x.shape[2])), c=nn.Conv2d(3, 4, 3), b=norm(4), k=weight(1, 4, 1, 1))
    _, report = bnfold.fuse(net.eval(), example=X)
    assert "a computed multiple" in kept(report)["b"]


def in_float64(net: nn.Module) -> dict[str, Any]:
    traced = trace(net, X)
    return TorchOracle(traced).run({traced.specs[0].name: X.numpy()})


def as_bits(x: torch.Tensor) -> torch.Tensor:
    return (x.view(torch.int32) & -65536).view(torch.float32)


def within(x: torch.Tensor) -> torch.Tensor:
    """The same in place, through a view."""
    y = x.clone()
    y.view(torch.int32).bitwise_and_(-65536)
    return y


READS_BITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "another float of the same size": lambda x: x.half().view(torch.bfloat16).float(),
    "an integer and back": as_bits,
    "an integer, in place": within,
    "float8": lambda x: x.to(torch.float8_e4m3fn).view(torch.float8_e5m2).float(),
    "the next number": lambda x: torch.nextafter(x, torch.zeros_like(x)),
    "the largest number": lambda x: torch.nan_to_num(x.relu().log()) * 1e-30,
    "mantissa": lambda x: torch.frexp(x)[0],
    "sign": lambda x: torch.copysign(torch.ones_like(x), x),
    "round trip through integers": lambda x: (x * 10).int().float(),
}


@pytest.mark.parametrize("kind", READS_BITS)
def test_what_reads_bits_is_no_move(kind: str) -> None:
    """No map crosses it, and a fold before it passes its check, for which the float64 reference reads the same bits."""
    read = READS_BITS[kind]
    net = Net(lambda s, x: s.b(read(s.c(x))), c=nn.Conv2d(3, 4, 3), b=norm(4)).eval()
    _, report = bnfold.fuse(net, example=X)
    assert report.batchnorms.after == 1
    _, report = bnfold.fuse(Net(lambda s, x: read(s.b(s.c(x))), c=nn.Conv2d(3, 4, 3), b=norm(4)).eval(), example=X)
    assert report.batchnorms.after == 0


@pytest.mark.parametrize("kind", [kind for kind in READS_BITS if kind not in ("an integer, in place", "the next number")])
def test_the_float64_reference_reads_the_bits_that_are_stored(kind: str) -> None:
    net = Net(lambda s, x: READS_BITS[kind](x)).eval()
    found = in_float64(net)["output"]
    torch.testing.assert_close(torch.from_numpy(found).float(), net(X), rtol=1e-6, atol=0)


def test_weights_that_are_stored_as_bits() -> None:
    net = Net(
        lambda s, x: s.b(s.c(x) * s.k.view(torch.float32)), c=nn.Conv2d(3, 4, 3), b=norm(4), k=torch.randn(1, 4, 1, 1).view(torch.int32)
    )
    fused, report = bnfold.fuse(net.eval(), example=X)
    assert report.batchnorms.after == 0
    torch.testing.assert_close(fused(X), net(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.int32])
def test_a_weight_whose_bits_mean_another_type(stored: torch.dtype) -> None:
    """It can't be rewritten where its code reads it so; a program gets another one."""
    kind = torch.float32 if stored == torch.int32 else torch.bfloat16
    width = 6 if stored == torch.float32 else 3
    w = nn.Parameter(torch.randn(4, 3, 3, width).to(kind).view(stored), requires_grad=False)
    net = Net(lambda s, x: s.b(torch.conv2d(x, s.w.view(kind).float())), w=w, b=norm(4)).eval()
    for model, after in ((net, 1), (torch.export.export(net, (X,)), 0)):
        assert bnfold.fuse(model, example=X)[1].batchnorms.after == after


def test_a_cast_is_a_copy_that_may_be_written() -> None:
    """In float64 the cast does nothing, but what is then written in place isn't what it was cast from."""
    net = Net(lambda s, x: (lambda y: (y.half().add_(1).float(), y))(s.c(x)), c=nn.Conv2d(3, 4, 3)).eval()
    found = in_float64(net)
    torch.testing.assert_close(torch.from_numpy(found["output.1"]).float(), net(X)[1])


# --- statistics -------------------------------------------------------------------------------------------------------------------


def test_a_ragged_last_batch_and_data_sorted_by_class() -> None:
    """The variance between batches counts, and a short batch counts for what it holds."""
    net = nn.Sequential(norm(3), nn.Conv2d(3, 2, 1)).double().eval()
    data = torch.cat([torch.randn(n, 3, 4, 4, dtype=torch.float64) + level for n, level in ((8, -6), (8, 0), (3, 9))])
    fresh, _ = bnfold.recalibrate(net, list(data.split(8)))
    assert torch.allclose(fresh[0].running_var, data.var((0, 2, 3), correction=0), rtol=1e-12)
    assert torch.allclose(fresh[0].running_mean, data.mean((0, 2, 3)), rtol=1e-12)


def test_old_statistics_leave_no_trace() -> None:
    one, other = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval() for _ in range(2))
    other.load_state_dict(one.state_dict())
    other[1].running_mean.fill_(50)
    other[1].running_var.fill_(9)
    fresh = [bnfold.recalibrate(net, X, batch_size=2)[0] for net in (one, other)]
    assert torch.equal(fresh[0][1].running_mean, fresh[1][1].running_mean)
    assert torch.equal(fresh[0][1].running_var, fresh[1][1].running_var)


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        ("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later", bnfold.DeviceError),
        ("CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", bnfold.DeviceError),
        ("CUDA error: device-side assert triggered", bnfold.DataError),  # an index that isn't there, which the data or the model have
        ("The size of tensor a (4) must match the size of tensor b (3)", bnfold.DataError),
        ("\"addmm_impl_cpu_\" not implemented for 'Half'", bnfold.UnsupportedError),
    ],
)
def test_whose_fault_a_run_is_that_fails(said: str, raised: type[bnfold.BnfoldError]) -> None:
    error = run_failed(RuntimeError(said), "the model", "x (1, 3)", torch.device("cuda:1"))
    assert type(error) is raised
    assert str(error).startswith(f"PyTorch can't run the model on x (1, 3): {said.splitlines()[0]}")
    assert ("device cuda:1" in str(error)) == (raised is bnfold.DeviceError)
