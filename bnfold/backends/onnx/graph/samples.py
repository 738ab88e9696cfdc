"""A model whose batch is fixed, with fewer samples in it: what a check runs where each sample goes through the graph by itself.

That it does isn't known from here alone. The shapes of all values tell where the batch is: where it becomes smaller, each shape must be the
old one with fewer entries along the first axis, or the old one. Whether rows of the same shape are mixed (by a softmax along them, say) is
for a trial to tell (`data.samples.rows_are_samples`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bnfold.data.samples import fits_fewer, fixed_size
from bnfold.text import unused

from .ranges import inputs
from .shapes import Shapes
from .walk import arg, is_standard, stored_tensor, subgraphs

# Operators that are told sizes, of which the first is the batch's: at which input.
TOLD = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Resize": 3, "Upsample": 1}


def with_samples(model: ir.Model, samples: int) -> ir.Model | None:
    """A copy of the model that takes so many samples; None where its batch isn't fixed, or the shapes don't show where it goes."""
    batch = fixed_size(inputs(model))
    if batch is None or model.functions or any(True for node in model.graph for _ in subgraphs(node)):
        return None
    made = model.clone()
    for value in made.graph.inputs:
        if not value.is_initializer() and value.shape is not None and value.shape[0] == batch:
            value.shape = ir.Shape((samples, *value.shape[1:]))
    names = {str(value.name) for value in (*made.graph.inputs, *made.graph.initializers.values(), *_values(made))}
    for node in made.graph:
        if node.op_type in TOLD and is_standard(node) and len(node.inputs) > TOLD[node.op_type]:
            _retold(made, node, TOLD[node.op_type], batch, samples, names)
        for value in node.outputs:
            value.shape = None
    before, after = Shapes(model), Shapes(made)
    for old, new in zip(_values(model), _values(made), strict=True):
        whole, fewer = before.probes(old), after.probes(new)
        if whole is None or fewer is None or not fits_fewer(whole[0], fewer[0], batch, samples):
            return None
        if new.is_graph_output():
            new.shape = ir.Shape(fewer[0])
    return made


def _retold(made: ir.Model, node: ir.Node, index: int, batch: int, samples: int, names: set[str]) -> None:
    """Where sizes that begin with the batch are constant, let them begin with the number of samples. names: that are taken."""
    sizes = arg(node, index)
    tensor = None if sizes is None else stored_tensor(sizes)
    array = None if tensor is None or tensor.dtype != ir.DataType.INT64 else tensor.numpy()
    if array is None or array.ndim != 1 or not array.size or array[0] != batch:
        return
    name = unused(f"{node.outputs[0].name}:sizes", names)
    value = ir.Value(name=name, const_value=ir.tensor(np.array([samples, *array[1:]], np.int64), name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.INT64)
    made.graph.register_initializer(value)
    node.replace_input_with(index, value)


def _values(model: ir.Model) -> list[ir.Value]:
    """What the operators make that somebody may read, in order; what a Constant holds may tell sizes."""
    return [value for node in model.graph if node.op_type != "Constant" for value in node.outputs if value.name]
