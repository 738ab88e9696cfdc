"""The two sides of a verification, whatever frameworks they come from, made to speak of their inputs and outputs by the same names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnfold.backends import family, is_module
from bnfold.data.source import peek
from bnfold.errors import UnsupportedError
from bnfold.model import Placement, Plan, Port, Runner, Subject

if TYPE_CHECKING:
    from bnfold.data import Batch, InputSpec


def sides(
    reference: Any, candidate: Any, batches: Any = None, input_shapes: Mapping[str, tuple[int, ...]] | None = None, example: Any = None
) -> tuple[Subject, Subject, Any]:
    """Both models as subjects, and the data, of which the first batch may have been looked at.

    A PyTorch module says nothing of its inputs: it is called as the other side is fed, with the first batch, or with random data.
    """
    kinds = [_family(reference), _family(candidate)]
    mixed = len(set(kinds)) > 1
    call, example = example, None
    if "torch" in kinds and batches is not None and call is None:
        example, batches = peek(batches)
    made: list[Subject | None] = [None, None]

    def asks(side: int) -> tuple[bool, bool]:
        """An ONNX model knows what it takes, and so does a program; a module doesn't, unless it is the one that was read for the call."""
        model = (reference, candidate)[side]
        return kinds[side] == "torch", is_module(model) and getattr(call, "model", None) is not model

    for side in sorted((0, 1), key=asks):
        model, other = (reference, candidate)[side], made[1 - side]
        if isinstance(model, Subject):
            made[side] = model
        elif kinds[side] == "onnx":
            made[side] = _onnx(model)
        else:
            made[side] = _torch(model, other, example, input_shapes, mixed, call)
    first, second = made
    assert first is not None
    assert second is not None
    names = [_paired(first.ports()[i], second.ports()[i]) if i == 0 or mixed else {} for i in (0, 2)]
    renamed = any(mine != theirs for each in names for mine, theirs in each.items())
    return first, Renamed(second, *names) if renamed else second, batches


def _family(model: Any) -> str:
    """As `backends.family`; what is a subject already counts as one of ONNX's kind."""
    if isinstance(model, Subject):
        return "onnx"
    return family(model)


def _onnx(model: Any) -> Subject:
    import onnx_ir as ir

    from bnfold.backends.onnx.model import OnnxSubject

    if not isinstance(model, ir.Model):
        raise UnsupportedError(f"a {type(model).__module__}.{type(model).__qualname__} is not a kind of model that bnfold can verify")
    return OnnxSubject(model)


def _torch(
    model: Any, other: Subject | None, example: Any, shapes: Mapping[str, tuple[int, ...]] | None, mixed: bool, call: Any
) -> Subject:
    from bnfold.backends.torch.export.trace import Traced, example_of, random_example, to_tensor, trace
    from bnfold.backends.torch.model import TorchSubject

    if isinstance(model, Traced):
        return TorchSubject(model, beside_onnx=mixed)
    if isinstance(other, TorchSubject):
        return TorchSubject(trace(model, other.traced), beside_onnx=mixed)
    if call is not None:
        example = call
    elif example is not None:
        example = example_of(model, example)
    elif other is not None:
        fed = other.random(batch=2, seed=0, input_shapes=shapes)
        example = tuple(to_tensor(array) for array in fed.values())
    elif shapes and is_module(model):
        example = random_example(model, shapes)
    return TorchSubject(trace(model, example), beside_onnx=mixed)


def _paired(mine: list[Port], theirs: list[Port]) -> dict[str, str]:
    """For each name of the reference's the candidate's: the same where there is one, else what stands at the same place among the rest."""
    if len(mine) != len(theirs) or {port.name for port in mine} == {port.name for port in theirs}:
        return {}
    left, found = [port.name for port in theirs], {}
    for says in (_whole_name, last_name):
        ours, known = ([says(name) for name in names] for names in ([port.name for port in mine], [port.name for port in theirs]))
        for port, name in zip(mine, ours, strict=True):
            if port.name not in found and name and ours.count(name) == known.count(name) == 1:
                own = theirs[known.index(name)].name
                if own in left:
                    found[port.name] = own
                    left.remove(own)
    rest = [port.name for port in mine if port.name not in found]
    return found | dict(zip(rest, left, strict=True))


def _whole_name(name: str) -> str:
    """What a name says, without how a framework puts it; "" for a number, which says nothing."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.removeprefix("output.").lower()).strip("_")
    return "" if plain.replace("_", "").isdigit() or name == "output" else plain


def last_name(name: str) -> str:
    """The same of the last part, of what lies in another thing."""
    return _whole_name(re.split(r"[./]", name)[-1])


def kind_of(subject: Subject) -> str:
    """The framework of a model, "" of what comes from none that bnfold knows."""
    return str(getattr(subject, "kind", ""))


class Renamed:
    """A subject whose inputs and outputs go by another's names (see `subject.Subject`). inputs, outputs: its own, by the other's."""

    def __init__(self, subject: Subject, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        self.subject = subject
        self.own_inputs, self.own_outputs = dict(inputs), dict(outputs)
        self._inputs = {own: name for name, own in inputs.items()}
        self._outputs = {own: name for name, own in outputs.items()}

    @property
    def kind(self) -> str:
        return kind_of(self.subject)

    @property
    def roundoff(self) -> float:
        return self.subject.roundoff

    @property
    def optimisations(self) -> tuple[str, ...]:
        return self.subject.optimisations

    def identity(self) -> str | None:
        return self.subject.identity()

    def inputs(self) -> list[InputSpec]:
        return [dataclasses.replace(spec, name=self._inputs.get(spec.name, spec.name)) for spec in self.subject.inputs()]

    def ports(self) -> tuple[list[Port], list[Port], list[Port]]:
        fed, defaults, outputs = self.subject.ports()
        return _named(fed, self._inputs), defaults, _named(outputs, self._outputs)

    def example(self) -> Batch | None:
        made = self.subject.example()
        return None if made is None else {self._inputs.get(name, name): array for name, array in made.items()}

    def random(self, *, batch: int, seed: int, input_shapes: Mapping[str, tuple[int, ...]] | None) -> Batch:
        shapes = None if input_shapes is None else {self.own_inputs.get(name, name): shape for name, shape in input_shapes.items()}
        made = self.subject.random(batch=batch, seed=seed, input_shapes=shapes)
        return {self._inputs.get(name, name): array for name, array in made.items()}

    def plan(self, *, clone: bool = False) -> Plan:
        plan = self.subject.plan(clone=clone)
        for node in plan.graph.nodes:
            for value in node.inputs:
                if value.producer is None:
                    value.name = self._inputs.get(value.name, value.name)
        constants = {
            f"output {self._outputs.get(name[7:], name[7:])}" if name.startswith("output ") else name: array
            for name, array in plan.constants.items()
        }
        outputs = {self._outputs.get(name, name): value for name, value in plan.outputs.items()}
        return dataclasses.replace(plan, outputs=outputs, constants=constants)

    def oracle(self, *, jitter: int | None = None, outputs: Iterable[str] = ()) -> Runner:
        return _Renaming(self.subject.oracle(jitter=jitter, outputs=outputs), self.own_inputs, self._outputs)

    def deployed(self, provider: str, optimisation: str, *, jitter: int | None = None, precision: str = "full") -> Runner:
        runner = self.subject.deployed(provider, optimisation, jitter=jitter, precision=precision)
        return _Renaming(runner, self.own_inputs, self._outputs)

    def precisions(self, provider: str) -> tuple[str, ...]:
        return self.subject.precisions(provider)

    def require(self, provider: str) -> None:
        self.subject.require(provider)

    def layers(self) -> dict[str, str]:
        return self.subject.layers()

    def folded(self) -> Subject | None:
        folded = self.subject.folded()
        return None if folded is None else Renamed(folded, self.own_inputs, self.own_outputs)


def _named(ports: list[Port], names: Mapping[str, str]) -> list[Port]:
    return [Port(names.get(port.name, port.name), port.dtype, port.shape) for port in ports]


class _Renaming:
    def __init__(self, runner: Runner, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        self._runner, self._inputs, self._outputs = runner, inputs, outputs

    @property
    def placement(self) -> Placement | None:
        return getattr(self._runner, "placement", None)

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        found = self._runner.run({self._inputs.get(name, name): np.asarray(array) for name, array in feeds.items()})
        return {self._outputs.get(name, name): array for name, array in found.items()}
