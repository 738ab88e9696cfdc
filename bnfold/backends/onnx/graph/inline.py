"""Local functions, put in the places of their calls."""

from __future__ import annotations

import onnx_ir as ir

from bnfold.errors import UnsupportedError

from .walk import all_nodes


def inlined(model: ir.Model) -> ir.Model:
    """A copy of the model; local functions are put in the places of their calls, where there are any.

    Raises UnsupportedError where that can't be done.
    """
    copy = model.clone()
    if copy.functions:
        from onnx_ir.passes.common import InlinePass

        for function in copy.functions.values():
            for value in (v for node in all_nodes(function.graph) for v in node.outputs):
                value.const_value = None  # the pass renames values, and a name would reach the tensor that the caller's model holds too
        try:
            copy = InlinePass()(copy).model
        except ValueError as error:  # of what the pass doesn't do, such as graphs that a call hands to a function
            raise UnsupportedError(
                f"the model's functions can't be put in the places of their calls ({error}); export it without them"
            ) from None
    return copy
