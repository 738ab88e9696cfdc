"""Folded arrays against exact rational arithmetic, in every type in which weights are stored."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

import bnfold

TYPES = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
EPSILON = 0.25
ROOTS = {2.0: Fraction(3, 2), 6.0: Fraction(5, 2), 12.0: Fraction(7, 2)}  # of variance and epsilon


def numpy_type(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def drawn(name: str, *, scale: float = 1.0) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A convolution and a BatchNorm whose standard deviations are rational."""
    rng, kind = np.random.default_rng(7), numpy_type(name)
    sizes = {"w": (6, 4, 3, 3), "b": (6,), "gamma": (6,), "beta": (6,), "mean": (6,)}
    arrays = {key: (rng.normal(size=size) * (scale if key == "w" else 1)).astype(kind) for key, size in sizes.items()}
    arrays["var"] = rng.choice([*ROOTS], 6).astype(kind)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"]),
        helper.make_node("BatchNormalization", ["h", "gamma", "beta", "mean", "var"], ["y"], epsilon=EPSILON),
    ]
    stored = [helper.make_tensor(key, TYPES[name], a.shape, a.tobytes(), raw=True) for key, a in arrays.items()]
    x, y = (helper.make_tensor_value_info(v, TYPES[name], shape) for v, shape in (("x", [1, 4, 5, 5]), ("y", [1, 6, 3, 3])))
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10), arrays


def folded(name: str, **how: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], bnfold.report.FuseReport]:
    model, arrays = drawn(name, **how)
    fused, report = bnfold.fuse(model, check=False)
    kind = numpy_type(name)
    found = {t.name: np.frombuffer(t.raw_data, kind).reshape(tuple(t.dims)) for t in fused.graph.initializer}
    return arrays, found, report


def nearest(stored: np.generic, exact: Fraction) -> bool:
    """Whether no neighbour of a stored number is nearer."""
    own = abs(Fraction(float(stored)) - exact)
    neighbours = (np.nextafter(stored, stored.dtype.type(way * np.inf)) for way in (-1, 1))
    return all(own <= abs(Fraction(float(other)) - exact) for other in neighbours if np.isfinite(float(other)))


@pytest.mark.parametrize("name", TYPES)
def test_folded_arrays_are_the_exact_ones_rounded_once(name: str) -> None:
    arrays, found, _ = folded(name)
    exact = {key: [Fraction(float(n)) for n in a.ravel()] for key, a in arrays.items()}
    for c in range(6):
        s = exact["gamma"][c] / ROOTS[float(arrays["var"][c])]
        for k in range(36):
            assert nearest(found["w"].reshape(6, 36)[c, k], s * exact["w"][36 * c + k])
        assert nearest(found["b"][c], s * (exact["b"][c] - exact["mean"][c]) + exact["beta"][c])


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_what_a_target_can_not_hold_is_told(target: str) -> None:
    model, _ = drawn("float32", scale=1e-6 if target == "float16" else 1e-38)
    told = bnfold.fuse(model, target=target, check=False)[1].notes
    assert [note for note in told if note.startswith(f"--target {target}: the weight of h")]
    assert "too small for it to keep their digits" in told[0]
    assert not bnfold.fuse(drawn("float32")[0], target=target, check=False)[1].notes
    large, _ = drawn("float32", scale=1e6)
    over = bnfold.fuse(large, target=target, check=False)[1].notes
    assert bool(over) == (target == "float16")


def test_multiply_adds_are_counted() -> None:
    report = bnfold.fuse(drawn("float32")[0], check=False)[1]
    assert report.multiply_adds is not None
    assert (report.multiply_adds.before, report.multiply_adds.after) == (6 * 36 * 9,) * 2


def test_an_unknown_target_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="one of float16, bfloat16, or None"):
        bnfold.fuse(drawn("float32")[0], target="int8")


@pytest.mark.parametrize(("name", "scale"), [("float16", 3e-4), ("bfloat16", 1e-37), ("float32", 1e-37)])
def test_subnormal_numbers_become_0_where_that_is_asked_for(name: str, scale: float) -> None:
    model, _ = drawn(name, scale=scale)
    smallest = float(ml_dtypes.finfo(numpy_type(name)).smallest_normal)
    plain, flushed = (bnfold.fuse(model, check=False, flush_subnormals=flush) for flush in (False, True))
    arrays = [
        {t.name: np.frombuffer(t.raw_data, numpy_type(name)).astype(np.float64) for t in fused.graph.initializer}
        for fused, _ in (plain, flushed)
    ]
    small = np.abs(arrays[0]["w"]) < smallest
    assert small.any()
    assert (arrays[0]["w"][small] != 0).any()
    assert not small.all()
    np.testing.assert_array_equal(arrays[1]["w"], np.where(small, 0, arrays[0]["w"]))
    np.testing.assert_array_equal(arrays[1]["b"], arrays[0]["b"])
    assert plain[1].layers[0].notes == () or "became 0" not in plain[1].layers[0].notes[0]
    assert f"{small.sum()} of the 216 coefficients of h are too small for {name} and became 0" in flushed[1].layers[0].notes
    assert bnfold.verify(model, flushed[0]).equivalent


@pytest.mark.parametrize("kind", ["module", "program"])
def test_they_do_in_pytorch(kind: str) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.BatchNorm2d(6)).eval()
    with torch.no_grad():
        module[0].weight.copy_(torch.linspace(-4e-38, 4e-38, 216).reshape(6, 4, 3, 3))
    x = torch.ones(1, 4, 5, 5)
    fused, report = bnfold.fuse(module if kind == "module" else torch.export.export(module, (x,)), example=x, flush_subnormals=True)
    state = fused.state_dict() if kind == "module" else fused.state_dict
    (weight,) = (each.detach().abs() for each in state.values() if each.ndim == 4)
    assert 50 < int((weight == 0).sum()) < 70
    assert weight[weight > 0].min() >= torch.finfo(torch.float32).smallest_normal
    assert "too small for float32 and became 0" in report.layers[0].notes[0]


def test_what_is_said_of_a_weight_stays_when_something_is_said_of_its_bias() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.BatchNorm2d(6)).eval()
    with torch.no_grad():
        module[0].weight.fill_(1e-39)
        module[0].bias.fill_(2e-39)
    x = torch.ones(1, 4, 5, 5)
    for given in (module, torch.export.export(module, (x,))):
        said = "; ".join(bnfold.fuse(given, example=x, check=False, flush_subnormals=True)[1].layers[0].notes)
        assert all(f"{n} of the {n} coefficients of 0 are too small for float32 and became 0" in said for n in (216, 6))


@pytest.mark.parametrize("lower", ["mul-add", "depthwise"])
def test_those_of_operators_that_stay_do_too(lower: str) -> None:
    torch = pytest.importorskip("torch")
    norm = torch.nn.BatchNorm2d(4).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 1e-39, 2.0, 1e-38]))
    module, x = torch.nn.Sequential(torch.nn.Tanh(), norm, torch.nn.Tanh()).eval(), torch.ones(1, 4, 5, 5)
    program = torch.export.export(module, (x,))
    for given in (module, program):
        fused, report = bnfold.fuse(given, example=x, lower=lower, flush_subnormals=True)
        state = fused.state_dict if given is program else fused.state_dict()
        (scale,) = (each.ravel() for each in state.values() if each.max() > 1.9)
        assert [bool(each) for each in scale] == [True, False, True, False]
        assert any("2 of the 4 coefficients of 1 are too small for float32 and became 0" in note for note in report.layers[0].notes)
