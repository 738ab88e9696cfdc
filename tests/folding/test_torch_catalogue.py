"""The matrix of cases in PyTorch: each network that torch can express folds there as it does in ONNX, by both routes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import ALL, Case
from compare import OTHER_SIZES, SIZES, feeds, run_double, true_inputs
from modules import kept, run
from twins import NotInTorchError, Twin

import bnfold

EXACT = 1e-11  # of an output's largest magnitude, in float64
TWIN = 1e-8  # ONNX states its settings in float32

# What a module can't do that a graph can, by the reasons that it gives.
LIMITS = (
    r"is shared with",  # one layer, called several times, has one weight
    r"it has no bias|has no bias, and",  # a call in the forward has no place for one
    r"is also used by",  # nothing is doubled in a forward
    r"an activation's shape|pads with zeros and the map's shift",  # a number in the code stays
    r"which stays as it is",
    r"unknown number of terms|size of a dynamic axis|on all paths of the code",  # it holds for inputs of any size
    r"is an output of the model",  # no Add grows behind it, and the calls of one layer fold together or not at all
    r"weight is no constant|neither of its|its branches would need the same",
)


# Where a BatchNorm's channels come from a dynamic axis, torch.export sees that they fix its size, and ONNX's shape inference doesn't;
# and a number in PyTorch's graphs has float64's digits, in an ONNX attribute float32's.
FIXED = {"Reshape to channels that the size of a dynamic axis hides", "constant Pad at opset 9, whose attribute holds no float64"}


def twin_of(case: Case) -> Twin:
    try:
        return Twin(case.build_double()).eval()
    except NotInTorchError as why:
        pytest.skip(str(why))


DOUBLE = [case for case in ALL if case.double]
every_case = pytest.mark.parametrize("case", DOUBLE, ids=str)


def inputs(case: Case, sizes: dict[str, int]) -> tuple[dict[str, np.ndarray], tuple[torch.Tensor, ...]]:
    data = feeds(case.build_double(), sizes, below=case.below)
    return data, tuple(torch.from_numpy(np.array(array)) for array in data.values())


def off(want: dict[str, np.ndarray], got: list[torch.Tensor]) -> float:
    worst = 0.0
    for one, returned in zip(want.values(), got, strict=True):
        other = returned.detach()
        finite = np.isfinite(one)
        assert (finite == np.isfinite(other.numpy())).all()
        scale = np.abs(one[finite]).max(initial=0.0) or 1.0
        worst = max(worst, float(np.abs(one - other.numpy())[finite].max(initial=0.0) / scale))
    return worst


@every_case
def test_the_same_folds_in_torch(case: Case) -> None:
    twin = twin_of(case)
    _, example = inputs(case, SIZES)
    program = torch.export.export(twin, example, dynamic_shapes=(axes(case),))
    with_program, by_graph = bnfold.fuse(program, check=False, clone=case.clone)
    with_module, by_module = bnfold.fuse(twin, example=example, check=False)
    for sizes in (SIZES, OTHER_SIZES):
        data, given = inputs(case, sizes)
        own = run(twin, given)
        assert off(run_double(case.build_double(), data), own) < TWIN, "the twin is another network"
        want = {str(i): value.detach().numpy() for i, value in enumerate(own)}
        assert off(want, run(with_module, given)) < EXACT
        if sizes is SIZES or fits(program, given):
            assert off(want, run(with_program, given)) < EXACT
    assert by_graph.batchnorms.after == (0 if case.name in FIXED else case.left), kept(by_graph)
    for reason in kept(by_graph).values():
        assert len(reason.split()) >= 3
    if by_module.batchnorms.after != by_graph.batchnorms.after:
        assert by_module.batchnorms.after > by_graph.batchnorms.after
        assert any(re.search(limit, reason) for limit in LIMITS for reason in kept(by_module).values()), kept(by_module)


def axes(case: Case) -> tuple[Any, ...]:
    """The axes that are dynamic in ONNX are so here."""
    found = []
    for value in true_inputs(case.build_double()):
        dims = value.type.tensor_type.shape.dim
        found.append({i: torch.export.Dim.AUTO for i, d in enumerate(dims) if not d.HasField("dim_value")})
    return tuple(found)


def fits(program: torch.export.ExportedProgram, given: tuple[Any, ...]) -> bool:
    """Whether the program takes these sizes."""
    try:
        run(program, given)
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def test_most_of_the_matrix_is_there() -> None:
    made = 0
    for case in DOUBLE:
        try:
            Twin(case.build_double())
            made += 1
        except NotInTorchError:
            pass
    assert made >= 0.7 * len(DOUBLE)
