"""Local functions, put in the places of their calls."""

from __future__ import annotations

import onnx_ir as ir

from .walk import all_nodes


def inlined(model: ir.Model) -> ir.Model:
    """A copy of the model; local functions are put in the places of their calls, where there are any."""
    copy = model.clone()
    if copy.functions:
        from onnx_ir.passes.common import InlinePass

        for function in copy.functions.values():
            for value in (v for node in all_nodes(function.graph) for v in node.outputs):
                value.const_value = None  # the pass renames values, and a name would reach the tensor that the caller's model holds too
        copy = InlinePass()(copy).model
    return copy
