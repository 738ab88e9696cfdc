"""Random networks as modules and exported programs, folded with random options, in float64: all must compute the same (see `graphs`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from modules import difference, run
from twins import NotInTorchError, Twin

import bnfold

from .found import Found, Say, watched
from .graphs import CONDITION, build, options

TOLERANCE = 1e-11  # times the largest magnitude of an output


def tried(seed: int, *, save: Path | None = None, say: Say | None = None) -> Found:
    """The network of a seed, where PyTorch has all its operators."""
    proto = build(seed)
    found = Found(seed)
    try:
        twin = Twin(proto).eval()
    except NotInTorchError as why:
        found.became = f"not in torch: {why}"
        return found
    rng = np.random.default_rng(seed)
    shapes = [[d.dim_value or 3 for d in info.type.tensor_type.shape.dim] for info in proto.graph.input]
    example = tuple(torch.from_numpy(rng.normal(0.1, 1.0, shape)) for shape in shapes)
    with watched(found, "random network", say):
        try:
            run(twin, example)  # which makes its parameters
            program = torch.export.export(twin, example)
        except Exception as why:  # which PyTorch itself can't read
            found.became = f"not exported: {why}"
            return found
        if save is not None:
            torch.export.save(program, save)
        for route, model in (("module", twin), ("program", program)):
            found.problem = found.problem or _compared(found, route, model, example)
    return found


def _compared(found: Found, route: str, model: Any, example: tuple[torch.Tensor, ...]) -> str:
    try:
        fused, found.report = bnfold.fuse(model, example=example, check=False, **options(found.seed))
    except bnfold.BnfoldError as error:
        found.became = f"{type(error).__name__}: {error}"
        return ""
    found.became = "folded" if found.report.batchnorms.after == 0 else "some stay"
    want, got = run(model, example), run(fused, example)
    if (gap := difference(want, got)) <= TOLERANCE:
        return ""
    moved = tuple(x * (1 + 2.0**-52) for x in example)
    noise = difference(want, run(model, moved))
    return f"{route}: the outputs differ by {gap:.2e} of their size (conditioning: {noise:.2e})" if gap > CONDITION * noise else ""
