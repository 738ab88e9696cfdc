"""What stands behind the verbs, for models of any kind as a user has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bnfold.backends.open import open_both, open_model
from bnfold.recalibration import scoring
from bnfold.report import VerifyReport
from bnfold.verification import verify as verification


def verify(
    reference: Any,
    candidate: Any,
    batches: Any = None,
    *,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    example: Any = None,
    **options: Any,
) -> VerifyReport:
    first, second, batches = open_both(reference, candidate, batches, input_shapes, example)
    return verification.verify(first, second, batches, input_shapes=input_shapes, **options)


def check_fold(reference: Any, fused: Any, example: Any = None) -> VerifyReport:
    return verification.check_fold(open_model(reference), open_model(fused), example)


def score(model: Any, data: Any, *, example: Any = None, **options: Any) -> scoring.Scores | None:
    return scoring.score(open_model(model, example), data, **options)
