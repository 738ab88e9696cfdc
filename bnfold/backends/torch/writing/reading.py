"""A module's data flow by itself, as a program; and that of a folded module, made of the original's: torch.export, which takes longer than
all else, reads each module once.

What is changed in the graph is what was changed in the module: BatchNorms are gone, layers have biases, and the tensors are the folded
module's own, by their names. That the two are one function is seen by running both, on numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.verifier import SpecViolationError
from torch.export.graph_signature import InputKind

from bnfold.errors import BnfoldError, UnsupportedError, UsageError

from ..export.call import Call
from ..export.observers import fake_quantisers
from ..export.tensors import to_numpy
from ..export.trace import Traced, trace
from ..export.walk import set_argument
from ..lowering.places import Place
from ..runtime.eager import alike, eager
from ..runtime.interpreter import TorchOracle
from .checks import CLOSE, DifferentialTest
from .module import Fold
from .program import ProgramWriter, copy_program
from .surgery import ATTRIBUTE, Surgery

READ = {"replaced", "biases", "keys"}  # what a change of the structure may be for this
ONE_WAY = "the result is a graph of the module as the example calls it: other ways through its code aren't in it"


def as_program(traced: Traced) -> Traced:
    """A module's program as a model of its own, with its own tensors. Raises UnsupportedError where the module itself gives something
    else, and UsageError where it is called in several ways."""
    if traced.others:
        raise UsageError("a graph holds one way through a module: give one call as the example")
    program = copy_program(traced.runnable)
    if not DifferentialTest(traced).holds(program.module()):
        raise UnsupportedError("torch.export reads another function than the module computes: fold the module itself, without graph=True")
    return dataclasses.replace(trace(program), note=ONE_WAY)


def read_folded(traced: Traced, fold: Fold, folded: nn.Module, call: Call) -> Traced | None:
    """None where more was changed, and where it doesn't give what the folded module gives in a call."""
    surgery: Surgery = getattr(folded, ATTRIBUTE)
    more = any(value for name, value in surgery.to_dict().items() if name not in READ)
    if more or surgery.copied or traced.exported is not None or fold.ctx.program is not traced.program or fake_quantisers(folded):
        return None
    try:
        program = _Reader(fold, folded).finish()
        made = dataclasses.replace(traced, model=folded, program=program)
        tensors = zip(made.input_nodes, call.tensors, strict=True)
        given = TorchOracle(made).run({op.name: to_numpy(tensor) for op, tensor in tensors})
        return made if alike(eager(folded, True).run(call), given, CLOSE) else None
    except (BnfoldError, LookupError, AttributeError, ValueError, SpecViolationError):
        return None  # what it lacks, or holds in another form, torch.export has to say


class _Reader(ProgramWriter):
    def __init__(self, fold: Fold, folded: nn.Module) -> None:
        super().__init__(fold.ctx)
        self._folded = folded
        biases: dict[str, Any] = {}
        for op, argument, place in _grown(fold):
            if place.target not in biases:
                biases[place.target] = self.store(place.target, attrgetter(place.target)(folded))
            set_argument(self.copies[op], argument, biases[place.target])
        for node in (node for site, removal in fold.removed.items() if removal.path is not None for node in site.nodes):
            self.remove(node.native, self.current(node.native.operands[0]))

    def finish(self) -> Any:
        """The program with the folded module's tensors."""
        self.sweep()
        old, self.state = self.state, self._folded.state_dict(keep_vars=True)
        for spec in self.signature.input_specs:
            if spec.target is None or spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
                continue
            before, after = old.get(spec.target, self.constants.get(spec.target)), attrgetter(spec.target)(self._folded)
            if not isinstance(before, Tensor) or not isinstance(after, Tensor) or _form(before) != _form(after):
                raise ValueError(spec.target)
            if spec.target in self.constants:
                self.constants[spec.target] = after
        return super(ProgramWriter, self).finish()


def _grown(fold: Fold) -> Iterator[tuple[torch.fx.Node, str, Place]]:
    """The operators whose layers get a bias, each with the name of the argument."""
    for node, _, param in fold.graph.updates():
        if param.tensor is None:
            assert param.slot is not None
            assert isinstance(param.slot.place, Place)
            yield node.native.op, param.slot.argument, param.slot.place


def _form(tensor: Tensor) -> Any:
    return tensor.shape, tensor.dtype, tensor.device
