"""A part of an exported program as a program of its own."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph as Ops
from torch.fx import GraphModule
from torch.fx import Node as Op

from bnfold.capture import quiet
from bnfold.errors import UnsupportedError
from bnfold.text import first_line

from ..export.tensors import to_tensor
from ..runtime.interpreter import stored_tensors


def boundary(program: ExportedProgram, output: str, stops: Collection[str]) -> list[str]:
    """Those of some values that another is computed from without others of them between."""
    found: dict[str, None] = {}
    start = next(op for op in program.graph.nodes if op.name == output)
    seen, stack = {start}, [start]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in seen:
                continue
            seen.add(source)
            if source.name in stops:
                found[source.name] = None
            else:
                stack.append(source)
    return list(found)


def extract(program: ExportedProgram, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> bytes:
    """What computes some values from others, as the content of a .pt2 file. Raises UnsupportedError where more goes into them."""
    by_name = {op.name: op for op in program.graph.nodes}
    stored, root, ops, made = stored_tensors(program), nn.Module(), Ops(), dict[Op, Op]()
    for name in inputs:
        made[by_name[name]] = ops.placeholder(name)
    wanted: set[Op] = set()
    stack = [by_name[name] for name in outputs]
    while stack:
        op = stack.pop()
        if op not in wanted and op not in made:
            wanted.add(op)
            stack.extend(op.all_input_nodes)
    for op in program.graph.nodes:
        if op not in wanted:
            continue
        if op.op in ("placeholder", "get_attr"):
            tensor = stored.get(op.name) if op.op == "placeholder" else attrgetter(str(op.target))(program.graph_module)
            if not isinstance(tensor, Tensor):
                raise UnsupportedError(f"value {op.name!r} of the model comes from outside the part")
            root.register_buffer(op.name, tensor.detach().cpu().clone())
            made[op] = ops.get_attr(op.name)
        else:
            made[op] = ops.node_copy(op, lambda source: made[source])
    ops.output(tuple(made[by_name[name]] for name in outputs))
    module = GraphModule(root, ops)
    file = io.BytesIO()
    with quiet(), torch.no_grad():
        try:
            program = torch.export.export(module, tuple(to_tensor(a.copy()) for a in inputs.values()), strict=False)
            torch.export.save(program, file)
        except Exception as error:  # torch.export raises what it likes
            raise UnsupportedError(f"torch.export can't write the part: {first_line(error)}") from None
    return file.getvalue()
