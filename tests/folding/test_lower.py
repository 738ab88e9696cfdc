"""BatchNorms that stay, written as other operators: as exact as a fold, and none is left whose statistics are fixed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import ALL, Case, Net
from compare import OTHER_SIZES, SIZES, batchnorms, difference, feeds, is_valid, operators, roundoff, run_double, run_stored

import bnfold

# What no other operator can say: statistics of the batch, or that are ill, or that a caller may change; channels along an unknown axis.
CANT = "training mode|^its (gamma|beta|running|epsilon|parameters|further)|the rank of its input"
HOWS = ("mul-add", "depthwise")

staying = pytest.mark.parametrize("case", [case for case in ALL if case.left], ids=str)


@staying
@pytest.mark.parametrize("how", HOWS)
def test_none_is_left_whose_statistics_are_fixed(case: Case, how: str) -> None:
    model = case.build()
    fused, report = bnfold.fuse(model, clone=case.clone, lower=how, check=False)
    assert batchnorms(fused) == report.batchnorms.after == len(report.kept)
    assert not [layer.reason for layer in report.kept if not re.search(CANT, layer.reason)]
    lowered = [layer for layer in report.layers if layer.verdict == "lowered"]
    assert len(lowered) + len(report.kept) == case.left
    assert all(layer.reason and "written as" in " ".join(layer.notes) for layer in lowered)
    onnx.checker.check_model(fused, full_check=is_valid(model, full=True))
    for sizes in (SIZES, OTHER_SIZES) if lowered else ():
        data = feeds(model, sizes, below=case.below)
        assert difference(run_double(model, data), run_double(fused, data)) <= case.roundoffs * roundoff(model)
        if case.ort:
            assert difference(run_stored(model, data), run_stored(fused, data)) <= 4 * case.roundoffs * roundoff(model)


@pytest.mark.parametrize("case", [case for case in ALL if case.left and case.double][::4], ids=str)
def test_exact_in_float64(case: Case) -> None:
    model = case.build_double()
    fused, _ = bnfold.fuse(model, clone=case.clone, lower="depthwise", check=False)
    data = feeds(model, SIZES, below=case.below)
    assert difference(run_double(model, data), run_double(fused, data)) <= 1e-12


@pytest.mark.parametrize("how", HOWS)
def test_behind_a_product_that_got_a_bias(how: str) -> None:
    """Whose Add would make a row with the operators behind it."""
    net = Net("bias", dtype="float64")
    y = net.op("MatMul", net.bn(net.input("N", 3), 3), net.matrix(3, 5))
    net.output(y, net.bn(y, 5))
    _, report = bnfold.fuse(net.model(), lower=how)  # checked
    assert [layer.verdict for layer in report.layers] == ["folded", "lowered"]


def case_of(name: str) -> Case:
    return next(case for case in ALL if case.name == name)


def test_the_operators_are_those_that_were_asked_for() -> None:
    model = case_of("a BatchNorm alone").build()
    mul_add, depthwise = (operators(bnfold.fuse(model, lower=how)[0]) for how in HOWS)
    assert (mul_add["Mul"], mul_add["Add"], mul_add["BatchNormalization"]) == (1, 1, 0)
    assert (depthwise["Conv"], depthwise["Mul"], depthwise["BatchNormalization"]) == (1, 0, 0)


def test_float64_isnt_convolved() -> None:
    """ONNX Runtime's CPU provider has no convolution for it."""
    net = Net("double", dtype="float64")
    net.output(net.bn(net.relu(net.input("N", 3, "H", "W")), 3))
    fused, _ = bnfold.fuse(net.model(), lower="depthwise")
    assert (operators(fused)["Mul"], operators(fused)["Conv"]) == (1, 0)
    assert bnfold.verify(net.model(), fused).verdict == "equivalent"


@pytest.mark.parametrize("how", HOWS)
def test_the_first_level_certifies_them(how: str) -> None:
    _, report = bnfold.fuse(case_of("a BatchNorm between activations").build(), lower=how)
    assert report.verify is not None
    level = report.verify.levels.coefficients
    assert (report.verify.verdict, level.verdict, level.certified) == ("equivalent", "equivalent", 1)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("role", ["scale", "shift"])
def test_a_wrong_constant_is_found_by_its_coefficients(how: str, role: str) -> None:
    model = case_of("a BatchNorm between activations").build()
    fused, _ = bnfold.fuse(model, lower=how)
    part = {"mul-add": {"scale": ".mul", "shift": ".add"}, "depthwise": {"scale": ".weight", "shift": ".bias"}}[how][role]
    tensor = next(t for t in fused.graph.initializer if t.name.startswith("BatchNormalization") and t.name.endswith(part))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[-1] *= np.float32(1 + 1e-4)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    verdict = bnfold.verify(model, fused, coefficients_only=True)
    assert verdict.verdict == "different"
    assert f"the {role} of BatchNormalization" in verdict.reason


def test_an_unknown_word_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="one of mul-add, depthwise, or None"):
        bnfold.fuse(case_of("a BatchNorm alone").build(), lower="muladd")


def test_on_the_command_line(tmp_path: Path) -> None:
    onnx.save(case_of("a BatchNorm alone").build(), tmp_path / "a.onnx")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bnfold", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run("fuse", "a.onnx", "-o", "b.onnx", "--lower", "mul-add", "--strict", "--json")
    assert done.returncode == 0, done.stderr
    (layer,) = json.loads(done.stdout)["layers"]
    assert (layer["verdict"], layer["notes"]) == ("lowered", ["written as Mul and Add"])
    assert batchnorms(onnx.load(tmp_path / "b.onnx")) == 0
    assert "0 of 1 folded, 1 written as other operators" in run("fuse", "a.onnx", "--dry-run", "--lower", "depthwise").stdout
    wrong = run("fuse", "a.onnx", "--dry-run", "--lower", "mul")
    assert (wrong.returncode, wrong.stderr.strip().splitlines()[-1]) == (2, "bnfold: error: --lower mul: write mul-add or depthwise")
