"""Every situation of the matrix (`cases`): what folds, what stays and why, and that nothing else changes.

Each case is folded twice: as it is stored, and drawn in float64 throughout, where a right fold differs from the original by
about 1e-14 and the mildest wrong one by far more than 1e-12. The matrix checks itself too: a coefficient that is off shows.
"""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from cases import ALL, Case
from compare import (
    OTHER_SIZES,
    SIZES,
    batchnorms,
    defaults,
    difference,
    feeds,
    interface,
    is_valid,
    nodes,
    operators,
    roundoff,
    run_double,
    run_stored,
)

import bnfold

EXACT = 1e-12  # of an output's largest magnitude, in float64

every_case = pytest.mark.parametrize("case", ALL, ids=str)


@every_case
def test_stored(case: Case) -> None:
    model = case.build()
    before, count = model.SerializeToString(deterministic=True), batchnorms(model)
    fused, report = bnfold.fuse(model, clone=case.clone, check=False)
    assert model.SerializeToString(deterministic=True) == before, "the argument was changed"
    _check_report(case, report, fused)
    assert report.batchnorms.before >= count  # a function that is called twice counts twice
    assert interface(fused) == interface(model)
    assert defaults(fused) == defaults(model)
    onnx.checker.check_model(fused, full_check=is_valid(model, full=True))
    allowed = case.roundoffs * roundoff(model)
    for sizes in (SIZES, OTHER_SIZES):
        data = feeds(model, sizes, below=case.below)
        assert difference(run_double(model, data), run_double(fused, data)) <= allowed
        if case.ort:
            assert difference(run_stored(model, data), run_stored(fused, data)) <= 4 * allowed


def test_where_nothing_folds_the_model_comes_back_as_it_was() -> None:
    changed = []
    for case in ALL:
        model = case.build()
        if case.left == batchnorms(model) and bnfold.fuse(model, clone=case.clone, check=False)[0] != model:
            changed.append(case.name)
    assert changed == []


@pytest.mark.parametrize("case", [c for c in ALL if c.double], ids=str)
def test_exact_in_float64(case: Case) -> None:
    model = case.build_double()
    fused, report = bnfold.fuse(model, clone=case.clone, check=False)
    _check_report(case, report, fused)
    for sizes in (SIZES, OTHER_SIZES):
        data = feeds(model, sizes, below=case.below)
        assert difference(run_double(model, data), run_double(fused, data)) <= EXACT


def _check_report(case: Case, report: bnfold.report.FuseReport, fused: onnx.ModelProto) -> None:
    kept = [layer for layer in report.layers if layer.verdict == "kept"]
    assert batchnorms(fused) == case.left, [f"{layer.name}: {layer.reason}" for layer in kept]
    assert report.batchnorms.after == case.left
    for layer in kept:
        assert re.search(case.reason, layer.reason), layer.reason
        assert len(layer.reason.split()) >= 3, f"no sentence: {layer.reason!r}"
    assert bool(kept) == bool(case.left)
    counted = operators(fused)
    assert {op: counted[op] for op in case.after} == case.after
    if case.adds_bytes is not None:
        assert (report.bytes_added > 0) == case.adds_bytes
    if case.notes:
        said = [*report.notes, *(note for layer in report.layers for note in layer.notes)]
        assert any(re.search(case.notes, note) for note in said), said


# --- the matrix itself ---------------------------------------------------------------------------------------------------


def test_names_are_unique() -> None:
    names = [case.name for case in ALL]
    assert len(set(names)) == len(names)


def test_every_line_of_the_catalogue_has_a_case() -> None:
    lines = {line for case in ALL for line in case.lines}
    assert set(range(1, 51)) | {51, 57, 58} <= lines <= set(range(1, 60))  # of the others some are PyTorch's alone


@pytest.mark.parametrize("case", [c for c in ALL if c.double and c.lively], ids=str)
def test_a_wrong_coefficient_would_show(case: Case) -> None:
    """Each BatchNorm's gamma and beta, moved by a thousandth in a single channel, must move an output."""
    model = case.build_double()
    norms = [node for node in nodes(model) if node.op_type == "BatchNormalization"]
    for index in (1, 2):
        moved = onnx.ModelProto()
        moved.CopyFrom(model)
        names = {node.input[index] for node in norms}
        found = [t for t in moved.graph.initializer if t.name in names]
        for tensor in found:
            array = onnx.numpy_helper.to_array(tensor).copy()
            array.flat[-1] += 1e-3
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        batches = [feeds(model, sizes, below=case.below) for sizes in (SIZES, OTHER_SIZES)]
        moves = [difference(run_double(model, data), run_double(moved, data)) for data in batches]
        assert max(moves) > 1e4 * EXACT or not found


@pytest.mark.parametrize("case", [c for c in ALL if c.torch is not None], ids=str)
def test_the_torch_twin_is_the_same_kind_of_network(case: Case) -> None:
    torch = pytest.importorskip("torch")
    assert case.torch is not None
    module = case.torch(torch.nn).eval()
    assert np.isfinite(module(*(torch.randn(shape) for shape in case.example)).detach().numpy()).all()
    kinds = [type(m).__name__ for m in module.modules()]
    assert sum(kind.startswith("BatchNorm") for kind in kinds) == batchnorms(case.build())
