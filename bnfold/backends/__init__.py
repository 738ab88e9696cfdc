"""The kinds of models that bnfold serves. Each back-end is imported when a model of its kind comes in, and no earlier."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir


def family(model: Any) -> str:
    """ "onnx" for an onnx_ir.Model or an onnx.ModelProto, "torch" for a torch.nn.Module, an ExportedProgram or the `Traced` of either.

    Raises UsageError for a path, UnsupportedError for anything else. Who holds a model has imported its framework, so none is here.
    """
    if (onnx := sys.modules.get("onnx")) is not None and isinstance(model, onnx.ModelProto):
        return "onnx"
    if (ir := sys.modules.get("onnx_ir")) is not None and isinstance(model, ir.Model):
        return "onnx"
    if (torch := sys.modules.get("torch")) is not None and isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        return "torch"
    if (trace := sys.modules.get(f"{__name__}.torch.export.trace")) is not None and isinstance(model, trace.Traced):
        return "torch"
    if isinstance(model, (str, Path)):
        raise UsageError(f"a model is expected, not a path: bnfold.load({str(model)!r})")
    raise UnsupportedError(
        f"a {type(model).__module__}.{type(model).__qualname__} is not a kind of model that bnfold knows: "
        "give a torch.nn.Module, an ExportedProgram, an onnx_ir.Model or an onnx.ModelProto"
    )


def is_module(model: Any) -> bool:
    """Whether it is a torch.nn.Module, which shows its data flow only when it is called."""
    return (torch := sys.modules.get("torch")) is not None and isinstance(model, torch.nn.Module)


def as_ir(model: Any) -> ir.Model:
    """An ONNX model as onnx_ir's."""
    import onnx_ir as ir

    if isinstance(model, ir.Model):
        return model
    from .onnx.files.load import from_proto

    return from_proto(model)


def as_given(made: ir.Model, model: Any) -> Any:
    """What was made of an ONNX model, as the kind that it came in: onnx_ir's, or a proto."""
    import onnx_ir as ir

    if isinstance(model, ir.Model):
        return made
    from .onnx.files.load import to_proto

    return to_proto(made)
