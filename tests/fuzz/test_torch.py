"""Some mutated files of PyTorch, and random networks as modules; thousands with `python -m tests.fuzz torch` and `modules`."""

from __future__ import annotations

import pytest

from . import modules, torch_files


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_a_mutated_file_is_right_or_refused(first: int) -> None:
    found = [torch_files.tried(seed) for seed in range(first, first + 20)]
    failed = {f.seed: f.problem for f in found if f.problem}
    assert not failed, f"look closer with: python -m tests.fuzz torch --only {min(failed)}\n{failed}"
    became = [f.became for f in found]
    assert sum(text in ("folded", "kept") for text in became) > 1, became
    assert sum(text.startswith("ModelError: ") for text in became) > 4, became


def test_a_seed_is_the_same_file_each_time() -> None:
    assert all(torch_files.mutant(seed) == torch_files.mutant(seed) for seed in range(20))


def test_folding_changes_no_random_module() -> None:
    found = [modules.tried(seed) for seed in range(20)]
    failed = {f.seed: f.problem for f in found if f.problem}
    assert not failed, f"look closer with: python -m tests.fuzz modules --only {min(failed)}\n{failed}"
    assert sum(f.became in ("folded", "some stay") for f in found) > 3
