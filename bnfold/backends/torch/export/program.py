"""What torch.export makes of a module, with as many axes of its inputs left open as it lets be."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Container, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from bnfold.capture import quiet
from bnfold.errors import UnsupportedError, UsageError
from bnfold.text import first_line, listed, some

from .call import Call, parameters_of
from .walk import arguments, operator_name

MOST_TERMS = 45  # of a size; what follows it grows with every layer, and so does the time that each takes


def require_readable(model: nn.Module) -> None:
    """A lazy parameter gets its shape in the first call, which is the user's to make; packed weights and TorchScript can't be read."""
    if script := [path for path, each in model.named_modules() if isinstance(each, torch.jit.ScriptModule)]:
        what = f"holds TorchScript ({script[0]})" if script[0] else "is TorchScript"
        way = "" if script[0] else ", or export it to ONNX with dynamo=False"
        raise UnsupportedError(f"{type(model).__name__} {what}, which can't be read: give the module from which it was made{way}")
    if packed := [(path, each) for path, each in model.named_modules() if hasattr(each, "_packed_params")]:
        raise UnsupportedError(
            f"{type(model).__name__} is converted to integers already, and its weights are packed where nothing can rewrite them "
            f"({packed[0][0]}, {type(packed[0][1]).__name__}): fold the model before it is converted, as prepare or prepare_qat left it"
        )
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    if any(map(nn.parameter.is_lazy, tensors.values())):
        raise UsageError(f"{type(model).__name__} has lazy parameters without a shape yet: call it once on a batch, then give it here")
    if fake := [name for name, each in tensors.items() if isinstance(each, FakeTensor)]:
        raise UnsupportedError(
            f"{type(model).__name__} holds no numbers in {fake[0]}: its code made that while torch.export read it; "
            f"make the model anew, and call it once before"
        )
    if sparse := [name for name, each in tensors.items() if each.layout != torch.strided]:
        raise UnsupportedError(
            f"{type(model).__name__} holds sparse tensors ({sparse[0]}), which aren't served: make them dense, by to_dense()"
        )


def export(twin: nn.Module, model: nn.Module, call: Call, most: int | None, patient: bool) -> tuple[ExportedProgram, int | None, str]:
    """The program, how many axes are open in it, and what is to be said of that. most: the most axes that are tried."""
    _spell_out(twin, call)
    failure: Exception | None = None
    note = ""
    for axes in (None, 1, 0) if most is None else range(most, -1, -1):
        candidate = _doubled(call) if axes != 0 else call
        try:
            with quiet(), torch.no_grad(), _watched(twin) if axes is None and not patient else nullcontext():
                closed, deciding = frozenset[tuple[int, int]](), None
                while deciding is None or not deciding <= closed:
                    closed |= deciding or frozenset()
                    shapes = _dynamic(twin, candidate, axes, closed)
                    program = torch.export.export(twin, candidate.args, candidate.kwargs, dynamic_shapes=shapes, strict=False)
                    deciding = _deciding(program, candidate)
                return program, axes, note
        except _TooManyTerms as error:
            note = f"{error}, so it was read at the example's sizes, and others were only tried"
        except Exception as error:  # torch.export raises whatever the model's code raises
            failure = error
    assert failure is not None
    where = _failing_module(failure, twin)
    if len(call.args) == 1 and isinstance(named := call.args[0], dict) and not call.kwargs:
        where += f", given a dict of {some(named)}, of which none is an argument of its forward ({listed(parameters_of(model))})"
    raise UnsupportedError(
        f"torch.export can't read {type(model).__name__}{where}: {first_line(failure)}; give an example of the input as the model is "
        f"called in deployment, or export it to ONNX and give that file"
    ) from failure


def _spell_out(twin: nn.Module, call: Call) -> None:
    """Name in the forward what a call gives it in **kwargs, of which torch.export leaves no size open."""
    forward, signature = twin.forward, inspect.signature(twin.forward)
    known = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in call.kwargs if name not in signature.parameters]
    if more:

        def named(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        named.__signature__ = signature.replace(parameters=[*known, *more])  # type: ignore[attr-defined]  # which inspect looks for
        twin.forward = named


class _TooManyTerms(Exception):
    """A size is so long a formula of the open axes that reading the model would take many times as long as it takes at one size."""


@contextmanager
def _watched(twin: nn.Module) -> Iterator[None]:
    """While it lasts, a module whose output has a size of too many terms ends the reading."""

    def look(name: str, output: Any) -> None:
        for leaf in pytree.tree_leaves(output):
            for size in leaf.shape if isinstance(leaf, Tensor) else ():
                if isinstance(size, torch.SymInt) and has_more_terms(size.node.expr, MOST_TERMS):
                    raise _TooManyTerms(f"the sizes of what {name or 'it'} gives are long formulas of the input's")

    hooks = [
        module.register_forward_hook(lambda module, given, output, name=name: look(name, output)) for name, module in twin.named_modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def has_more_terms(expression: Any, most: int) -> bool:
    """Whether a formula has more than so many terms, those that occur several times counted as often."""
    stack, count = [expression], 0
    while stack and count <= most:
        count += 1
        stack.extend(stack.pop().args)
    return count > most


def _doubled(call: Call) -> Call:
    """A batch of one would be taken for a constant: two of it."""
    if {len(tensor) for tensor in call.tensors if tensor.ndim} != {1}:
        return call
    return call.map_tensors(lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor)


def _deciding(program: ExportedProgram, call: Call) -> frozenset[tuple[int, int]]:
    """The open axes, but for the first, that decide on the settings of a convolution: the channels on its groups, say.

    Each by the identity of its tensor.
    """
    convolutions = (op for op in program.graph.nodes if operator_name(op).startswith("conv"))
    settings = (leaf for op in convolutions for leaf in pytree.tree_leaves(list(arguments(op).values())) if isinstance(leaf, torch.fx.Node))
    sizes = (leaf.meta.get("val") for leaf in settings)
    deciding = {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
    shapes = {
        op.name: op.meta["val"].shape for op in program.graph.nodes if op.op == "placeholder" and isinstance(op.meta.get("val"), Tensor)
    }
    names = [getattr(spec.arg, "name", "") for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    return frozenset(
        (id(leaf), axis)
        for leaf, name in zip(call.leaves, names, strict=True)
        for axis, size in enumerate(shapes.get(name, ()))
        if axis and isinstance(size, torch.SymInt) and size.node.expr.free_symbols & deciding
    )


def _dynamic(twin: nn.Module, call: Call, axes: int | None, closed: Container[tuple[int, int]] = ()) -> Any:
    """The first `axes` axes of every tensor are dynamic, all of them for None, but for those that are closed."""

    def whole(value: Any) -> bool:
        """Whether it is a container that its author registered, of which torch.export asks for the list of what it holds."""
        return type(value) in pytree.SUPPORTED_NODES and type(value) not in pytree.BUILTIN_TYPES

    def of(value: Any) -> Any:
        if whole(value):
            return [pytree.tree_map(of, each, is_leaf=whole) for each in pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0]]
        if not isinstance(value, Tensor):
            return None
        first = range(value.ndim if axes is None else min(axes, value.ndim))
        return {axis: Dim.AUTO for axis in first if (id(value), axis) not in closed}

    return pytree.tree_map(of, dict(inspect.signature(twin.forward).bind(*call.args, **call.kwargs).arguments), is_leaf=whole)


def _failing_module(error: Exception, twin: nn.Module) -> str:
    """The innermost module of the model in whose forward the error rose."""
    names = {id(module): name for name, module in twin.named_modules()}
    found, step = "", error.__traceback__
    while step is not None:
        module = step.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(id(module)):
            cumulative = module.training and getattr(module, "momentum", 0) is None  # it counts batches by a number that it reads
            mode = ", a cumulative average in training mode: call eval() on the model" if cumulative else ""
            found = f", in its module {names[id(module)]} ({type(module).__name__}{mode})"
        step = step.tb_next
    return found
