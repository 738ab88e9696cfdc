"""A few hundred mutated files in each run of the tests; thousands with `python -m tests.fuzz onnx`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from .onnx_files import mutant, outcome, seeds, tried


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_a_mutated_file_is_right_or_refused(first: int) -> None:
    found = [tried(seed) for seed in range(first, first + 50)]
    failed = {f.seed: f.problem for f in found if f.problem}
    assert not failed, f"look closer with: python -m tests.fuzz onnx --only {min(failed)}\n{failed}"
    became = [f.became for f in found]
    assert became.count("folded") > 3, became
    assert sum(text.startswith("ModelError: ") for text in became) > 10, became


VECTORS = "float[1] v = {1.5}, float[4] scales = {1, 1, 2, 3}, float[6] w = {1, -1, 2, 3, -2, 1}, float[6] one = {1, 1, 1, 1, 1, 1}"
ONCE_FAILED = {
    "a product of matrices that don't fit, whose output is stated": (
        17,
        "(float[N, 5, 3] x) => (float[N, 6, 3] y)",
        'p = com.microsoft.FusedMatMul <transA = ""> (m, x) y = BatchNormalization (p, w, w, w, one)',
    ),
    "a product without its second operand": (
        17,
        "(float[N, 7, 3] x) => (float[N, 6, 3] y)",
        "p = com.microsoft.FusedMatMul <transA = 1> (x) y = BatchNormalization (p, w, w, w, one)",
    ),
    "a vector enlarged by scales that are computed": (
        9,
        "(float[2, 4, 6, 5] x) => (float[2, 6, 4, 3] y)",
        'c = Conv <kernel_shape = [3, 3]> (x, f) u = Upsample <mode = "nearest"> (scales, c) y = BatchNormalization (u, w, w, w, one)',
    ),
    "parts of a sequence that aren't there": (
        17,
        "(float[N, 4, H, W] x) => (float[N, 1, H, W] y)",
        "c = Conv <kernel_shape = [3, 3]> (f, x) s = SplitToSequence <axis = 1, keepdims = 0> (c) a = SequenceAt (s, at)"
        " u = Unsqueeze (a, axis) y = BatchNormalization (u, v, v, v, v)",
    ),
    "a kernel of a negative size": (
        17,
        "(float[N, 4, 5, 6] x) => (float[N, 6, 3, 4] y)",
        "c = Conv <kernel_shape = [3, 3]> (x, f) d = Conv <kernel_shape = [3, -1]> (x, f) u = Max (c, d)"
        " y = BatchNormalization (u, w, w, w, one)",
    ),
}


@pytest.mark.parametrize("case", ONCE_FAILED)
def test_what_once_failed_does_no_more(tmp_path: Path, case: str) -> None:
    opset, ports, nodes = ONCE_FAILED[case]
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(f"{head} g {ports} <{VECTORS}, int64 at = {{4}}, int64[1] axis = {{1}}> {{ {nodes} }}")
    rng = np.random.default_rng(0)
    for name, shape in (("m", (5, 6)), ("f", (6, 4, 3, 3))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    onnx.save(model, tmp_path / "m.onnx")
    became, problem = outcome(tmp_path / "m.onnx")
    assert not problem
    assert became == "kept" or became.startswith("ModelError: ")


@pytest.mark.slow
def test_thousands_of_mutated_files_are_right_or_refused() -> None:
    assert [seed for seed in range(100_000, 103_000) if tried(seed).problem] == []


def test_a_seed_is_the_same_file_each_time() -> None:
    assert all(mutant(seed, seeds()) == mutant(seed, seeds()) for seed in range(50))
