"""A few hundred mutated files in each run of the tests; thousands with `python -m tests.fuzz onnx`."""

from __future__ import annotations

import pytest

from .onnx_files import mutant, seeds, tried


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_a_mutated_file_is_right_or_refused(first: int) -> None:
    found = [tried(seed) for seed in range(first, first + 50)]
    failed = {f.seed: f.problem for f in found if f.problem}
    assert not failed, f"look closer with: python -m tests.fuzz onnx --only {min(failed)}\n{failed}"
    became = [f.became for f in found]
    assert became.count("folded") > 3, became
    assert sum(text.startswith("ModelError: ") for text in became) > 10, became


@pytest.mark.parametrize("seed", [9178, 701_273, 801_604, 902_533, 903_117])
def test_what_once_failed_does_no_more(seed: int) -> None:
    """Parts of a sequence that aren't there, or are split by a matrix; a constant that has no room for a map; an operand left out."""
    assert not tried(seed).problem


@pytest.mark.slow
def test_thousands_of_mutated_files_are_right_or_refused() -> None:
    assert [seed for seed in range(100_000, 103_000) if tried(seed).problem] == []


def test_a_seed_is_the_same_file_each_time() -> None:
    assert all(mutant(seed, seeds()) == mutant(seed, seeds()) for seed in range(50))
