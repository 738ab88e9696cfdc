"""A quantised weight with other scales, in an exported program: the operators that make it, anew and with new numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node as Op

from bnfold.algebra.quantised import Rescaled

from ..export.constants import ProgramConstants
from ..export.quantisers import described
from ..export.tensors import NUMPY, to_tensor
from ..export.walk import arguments, dtype_of, set_argument, value_of
from ..lowering.quantised import Codes
from .editor import ProgramEditor


def requantised(editor: ProgramEditor, constants: ProgramConstants, reader: Op, argument: Op, codes: Codes, made: Rescaled) -> Op:
    """What a copied operator reads instead of the constant that was its argument."""
    return _Chain(editor, constants, reader, argument, codes, made).again(argument)


class _Chain:
    """The operators from what is rounded, or from the codes, to what an operator reads."""

    def __init__(self, editor: ProgramEditor, constants: ProgramConstants, reader: Op, argument: Op, codes: Codes, made: Rescaled) -> None:
        self.editor, self.constants, self.reader, self.codes, self.made = editor, constants, reader, codes, made
        self.start = codes.last.source if codes.first is None or made.source is None else codes.first.source
        self.on_it: dict[Op, bool] = {}
        self._leads(argument)
        copies = {editor.copies[op] for op, leads in self.on_it.items() if leads}
        outside = {user for op in copies - {editor.copies[self.start]} for user in op.users} - copies
        self.alone = outside <= {reader}
        self.copies = copies
        self.value = editor.copies[self.start]
        if made.source is not None:
            self.value = self._stored(self.start, "weight", made.source)
        elif made.codes is not None:
            self.value = self._stored(self.start, "codes", made.codes.astype(NUMPY[dtype_of(self.start) or torch.int8]))
        self.numbers: dict[tuple[Op | None, str], Op] = {}

    def _leads(self, op: Op) -> bool:
        if op not in self.on_it:
            leads = [self._leads(source) for source in op.all_input_nodes]
            self.on_it[op] = op is self.start or any(leads)
        return self.on_it[op]

    def again(self, op: Op) -> Op:
        """An operator of the old program, made anew where it is on the way."""
        if op is self.start or not self.on_it[op]:
            return self.value if op is self.start else self.editor.copies[op]
        before = {self.editor.copies[source]: self.again(source) for source in op.all_input_nodes if source in self.on_it}
        with self.editor.graph.inserting_before(self.reader):
            new: Op = self.editor.graph.node_copy(self.editor.copies[op], lambda each: before.get(each, each))
        self.copies.add(new)
        if op is self.codes.node and self.codes.last.kind == "mul":
            key = next(key for key, given in arguments(op).items() if given is self.codes.last.scale)
            set_argument(new, key, self._numbers(self.editor.copies.get(self.codes.last.scale), "scale", self.made.scale, True))
            return new
        if described(op.target, arguments(op) if isinstance(op.target, torch._ops.OpOverload) else {}) is not None:
            self._rescale(op, new)
        return new

    def _rescale(self, old: Op, new: Op) -> None:
        """Give a quantiser the new scales and zero points; another form of it where it had one scale and gets several."""
        made, given = self.made, arguments(new)
        scale, zero = ("scales", "zero_points") if "scales" in given else ("scale", "zero_point")
        if made.axis is not None and "block_size" not in given:
            _give_channels(new, made.axis)
            scale, zero = ("scales", "zero_points") if "scales" in arguments(new) else ("scale", "zero_point")
        elif made.axis is not None:
            set_argument(new, "block_size", list(made.blocks))
        numbers = np.broadcast_to(made.zero, made.scale.shape)
        for name, was, array in ((scale, "scale", made.scale), (zero, "zero_point", numbers)):
            before = given.get(was, given.get(f"{was}s"))
            if before is None and not array.any():
                continue
            if not isinstance(before, Op) and made.axis is None:
                set_argument(new, name, array.item())
                continue
            set_argument(new, name, self._numbers(before, was, array, "block_size" in given))

    def _numbers(self, before: Any, role: str, array: npt.NDArray[Any], grid: bool) -> Op:
        """Scales or zero points as an input of the graph, the same for all operators that had the same."""
        key = (before if isinstance(before, Op) else None, role)
        if key not in self.numbers:
            old = next((op for op, new in self.editor.copies.items() if new is before), None) if isinstance(before, Op) else None
            kind = NUMPY[dtype_of(old) or torch.int32] if role == "zero_point" else array.dtype
            same = old is not None and value_of(old).numel() == array.size
            shape = tuple(value_of(old).shape) if same else array.shape if grid else (array.size,)
            self.numbers[key] = self._stored(old, role, array.astype(kind).reshape(shape))
        return self.numbers[key]

    def _stored(self, old: Op | None, role: str, array: npt.NDArray[Any]) -> Op:
        """An array as an input of the graph: under the old one's name where nothing else reads that."""
        tensor = to_tensor(np.ascontiguousarray(array))
        stored = None if old is None else self.constants.stored(old)
        own = old is not None and set(self.editor.copies[old].users) <= self.copies | {self.reader}
        fits = stored is not None and (tensor.shape, tensor.dtype) == (stored.tensor.shape, stored.tensor.dtype)
        if stored is not None and old is not None and self.alone and own and fits:
            holder = self.editor.state if stored.target in self.editor.state else self.editor.constants
            if isinstance(stored.tensor, torch.nn.Parameter):
                tensor = torch.nn.Parameter(tensor, stored.tensor.requires_grad)
            holder[stored.target] = tensor.to(stored.tensor.device)
            return self.editor.copies[old]
        stem = stored.target if stored is not None else f"{self.reader.name}.{role}"
        return self.editor.store(self.editor.new_name(stem), tensor.to(self.reader.meta["val"].device), InputKind.BUFFER)


def _give_channels(op: Op, axis: int) -> None:
    """Turn a quantiser of one scale into its form with one for each channel along an axis."""
    given, target = arguments(op), op.target
    assert isinstance(target, torch._ops.OpOverload)
    namespace, _, name = target._schema.name.partition("::")
    several = len(target._schema.returns) > 1
    plain = "fake_quantize_per_channel_affine" + "_cachemask" * several if "fake" in name else name.replace("per_tensor", "per_channel")
    op.target = made = getattr(getattr(torch.ops, namespace), plain).default
    placed = {"scales": 0, "scale": 0, "zero_points": 0, "zero_point": 0, "axis": axis}
    schema = made._schema.arguments
    filled = {a.name: given[a.name] if a.name in given else placed[a.name] for a in schema if a.name in given or a.name in placed}
    op.args = tuple(filled[a.name] for a in schema if not a.kwarg_only)
    op.kwargs = {a.name: filled[a.name] for a in schema if a.kwarg_only and filled.get(a.name) is not None}
