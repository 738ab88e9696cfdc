"""Products of matrices in nearly twice the precision of float64, against rational numbers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from bnfold.algebra.products import Total, exact, totalled


@pytest.mark.parametrize("spread", [0, 12], ids=["of one size", "of many sizes"])
@pytest.mark.parametrize("inner", [1, 7, 300])
def test_sums_that_cancel_are_right_to_the_last_place(inner: int, spread: int) -> None:
    rng = np.random.default_rng(inner)
    a, b = (rng.standard_normal(shape) * 10.0 ** rng.integers(-spread, spread + 1, shape) for shape in ((3, inner), (inner, 2)))
    a, b = np.concatenate([a, a], 1), np.concatenate([b, -b * (1 + 2.0**-20)])  # all but a millionth goes
    found = totalled(exact(a, b), (3, 2))
    for i, j in np.ndindex(found.shape):
        want = sum(Fraction(x) * Fraction(y) for x, y in zip(a[i].tolist(), b[:, j].tolist(), strict=True))
        far_below = Fraction(float(np.abs(a[i]).max() * np.abs(b[:, j]).max())) * Fraction(2) ** -85
        assert abs(Fraction(float(found[i, j])) - want) <= max(abs(want) * Fraction(2) ** -52, far_below)


def test_a_total_keeps_what_float64_drops() -> None:
    total = Total((2,))
    for term in (1.0, 2.0**-80, -1.0):
        total.add(np.array([term]), (slice(1, 2),))
    assert total.sum().tolist() == [0.0, 2.0**-80]
    assert not totalled(exact(np.zeros((2, 0)), np.zeros((0, 3))), (2, 3)).any()
