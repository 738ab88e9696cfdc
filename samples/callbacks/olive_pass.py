"""A pass for Microsoft's Olive that folds the BatchNorms of an ONNX model, recalibrated first where there are images to measure on.

    pip install olive-ai requests
    PYTHONPATH=samples/callbacks olive run --config samples/callbacks/olive.json --package-config samples/callbacks/olive_packages.json

olive.json gives the digits sample to it; olive_packages.json says where Olive finds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

import bnfold


class Bnfold(Pass):  # type: ignore[misc]  # Olive needn't be installed
    """Olive's model goes in as its file; what isn't proven equivalent ends the workflow."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        data = PassConfigParam(type_=str, default_value=None, description="A .npz file to measure on: arrays by the names of inputs.")
        return {"data": data}

    def _run_for_config(self, model: ONNXModelHandler, config: Any, output_model_path: str) -> ONNXModelHandler:
        path = resolve_onnx_path(output_model_path, Path(model.model_path).name)
        given = bnfold.load(model.model_path)
        if config.data is None:
            folded, report = bnfold.fuse(given)
        else:
            folded, report = bnfold.pipeline(given, [dict(np.load(config.data))])
        if folded is None:
            raise bnfold.CheckError(report.notes[-1])
        bnfold.save(folded, path)
        return ONNXModelHandler(path)
