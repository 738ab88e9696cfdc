"""A few hundred mutated files in each run of the tests; thousands with `python -m tests.fuzz.onnx_files`."""

from __future__ import annotations

from pathlib import Path

import pytest

from .onnx_files import check, mutant, seeds

COUNT = 200
MODELS = seeds()


@pytest.mark.parametrize("first", range(0, COUNT, 50))
def test_a_mutated_file_is_right_or_refused(tmp_path: Path, first: int) -> None:
    found = {seed: check(seed, MODELS, tmp_path) for seed in range(first, first + 50)}
    failed = {seed: wrong for seed, (_, wrong) in found.items() if wrong}
    assert not failed, f"look closer with: python -m tests.fuzz.onnx_files --only {min(failed)}\n{failed}"
    became = [text for text, _ in found.values()]
    assert sum(text == "folded" for text in became) > 3, became
    assert sum(text.startswith("ModelError: ") for text in became) > 10, became


@pytest.mark.slow
def test_thousands_of_mutated_files_are_right_or_refused(tmp_path: Path) -> None:
    assert [seed for seed in range(100_000, 103_000) if check(seed, MODELS, tmp_path)[1]] == []


def test_a_seed_is_the_same_file_each_time() -> None:
    assert all(mutant(seed, MODELS) == mutant(seed, MODELS) for seed in range(50))
