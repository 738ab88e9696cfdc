"""The float64 oracle: what a model computes before rounding.

The reference evaluator of the onnx package runs the model widened to float64 (`widen`), with operators of our own where
it is wrong, slow or lacks one (`registry`). ONNX Runtime can't be the oracle: its CPU provider has no convolution in float64.
Values are dropped after their last use.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
from onnx import inliner
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpFunction, OpRun, RuntimeContextError

from bnfold.data import Batch
from bnfold.data.inputs import check_feeds
from bnfold.errors import BnfoldError, ModelError, UnsupportedError, UsageError
from bnfold.text import listed

from ..files.fit import most_elements
from ..files.schemas import forget_unknown
from ..graph.codes import stored_codes
from ..graph.proto import self_contained
from ..graph.ranges import inputs
from ..graph.weights import weights
from . import activation, arithmetic, convolution, fused, movement, normalisation, pooling, quantised, recurrent, resize  # noqa: F401 - they enter their operators into the table
from . import registry as oracle_ops
from . import widen as widening
from .extent import check_made, check_said, named
from .quantised import state_steps
from .widen import Weight, maybe_jittered, read_inside, reads, state_bits, to_float64, widen

MOST_TURNS = 100_000  # of a loop


class Oracle:
    """A model in float64. The model itself isn't touched.

    jitter: a seed; every weight (see `weights`) is then moved by up to half a unit in the last place of its stored type (see
    `widen.jittered`), which is what rounding may have done to it. outputs: inner values to return besides the model's outputs.
    rounds: whether activations are rounded to integers where the model does it (see `quantised`). most: how many numbers a value may
    have; by default as many as weights and inputs let one expect. skeleton: the model without its initializers, where that is made already.
    Raises UnsupportedError, naming the operator, where the evaluator lacks one or can't run it.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        jitter: int | None = None,
        outputs: Iterable[str] = (),
        rounds: bool = True,
        most: int | None = None,
        skeleton: onnx.ModelProto | None = None,
    ) -> None:
        self._model = model
        proto = onnx.ModelProto()
        proto.CopyFrom(self_contained(model, initializers=False) if skeleton is None else skeleton)
        self._outputs = list(dict.fromkeys((*(o.name for o in proto.graph.output), *outputs)))
        unknown = set(self._outputs) - _defined(proto.graph) - set(model.graph.initializers)
        if unknown:
            raise UsageError(f"the model computes no value {listed(map(repr, sorted(unknown)))}")
        if proto.functions:
            proto = inliner.inline_local_functions(proto)
        codes = _take_codes(proto, model)
        forget_unknown(proto)
        state_bits(proto, {name: v.const_value.dtype.value for name, v in model.graph.initializers.items() if v.const_value is not None})
        moving = {} if jitter is None else weights(proto.graph, _shapes_held(model, codes))
        to_float64(proto, jitter=jitter, moving=moving)
        if jitter is not None or not rounds:
            state_steps(quantised.rounds(proto.graph, [*model.graph.initializers, *codes]), jitter if rounds else None)
        held: dict[str, Any] = dict(codes)
        readers = read_inside(proto.graph) | {*self._outputs}
        room, self._stored = widening.HELD, sum(array.size for array in codes.values())
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            held[name] = Weight(tensor, partial(maybe_jittered, data_type=tensor.dtype.value, name=name, jitter=jitter, moving=moving))
            size = tensor.size  # which onnx_ir works out whenever it is asked
            self._stored += size
            if name in readers or 8 * size <= room:
                room -= 8 * size
                held[name] = held[name].array()
        self._evaluator = _Evaluator(proto)
        self._most = most
        self._weights = held  # here, since the evaluator refers to itself, so that what it holds goes late

    def run(self, feeds: Batch) -> dict[str, np.ndarray]:
        """The outputs by name, in the model's order, then the extra ones; floating-point ones in float64. Feeds of any
        floating-point type go in as they are, widened. Raises DataError for feeds that don't fit."""
        check_feeds(feeds, inputs(self._model, feeds), set(self._weights), any_float=True)
        self._bounded(feeds)
        with np.errstate(all="ignore"):
            results = self._evaluator.run(self._outputs, self._weights | {name: widen(array) for name, array in feeds.items()})
        return dict(zip(self._outputs, results, strict=True))

    def _bounded(self, feeds: Batch) -> None:
        self._evaluator.most = self._most or most_elements(self._stored + sum(array.size for array in feeds.values()))

    def stream(self, feeds: Batch, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """These values as they are computed, each given out once and then no longer held than the model needs it."""
        check_feeds(feeds, inputs(self._model, feeds), set(self._weights), any_float=True)
        self._bounded(feeds)
        yield from self._evaluator.stream(names, self._weights | {name: widen(array) for name, array in feeds.items()})


def moving(model: ir.Model) -> dict[str, int]:
    """The model's weights (see `weights`)."""
    proto = self_contained(model, initializers=False)
    if proto.functions:
        proto = inliner.inline_local_functions(proto)
    return weights(proto.graph, _shapes_held(model, _take_codes(proto, model)))


def _take_codes(proto: onnx.ModelProto, model: ir.Model) -> dict[str, np.ndarray]:
    """What the model rounds to integers of its stored arrays, which stands in the place of the operators that do it."""
    codes = stored_codes(model)
    for node in [node for node in proto.graph.node if codes and node.output[0] in codes]:
        proto.graph.node.remove(node)
    return codes


def _shapes_held(model: ir.Model, codes: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    held = {name: tuple(v.const_value.shape.numpy()) for name, v in model.graph.initializers.items() if v.const_value is not None}
    return held | {name: array.shape for name, array in codes.items()}


class _Evaluator(ReferenceEvaluator):
    """The reference evaluator with our operators, in functions and subgraphs too, holding values no longer than needed.

    most: how many numbers a value may have.
    """

    most = sys.maxsize

    def __init__(self, proto: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(proto, onnx.FunctionProto):  # the body of an operator that the standard defines as a function
            body = onnx.FunctionProto()
            body.CopyFrom(proto)
            to_float64(body)
            proto = body
        self._dead: list[list[str]] | None = None
        self._spare: list[list[str]] = []
        super().__init__(proto, *args, **kwargs)

    def _load_impl(self, node: onnx.NodeProto, input_types: Any = None) -> Any:
        domain = "" if node.domain == "ai.onnx" else node.domain
        opset = self.opsets.get(node.domain, self.opsets.get(domain, 0))
        if domain == "" and node.op_type == "Loop":
            return _Loop
        called = self.functions_.get((node.domain, node.op_type))
        function = None if called is not None and domain else oracle_ops.find(node.op_type, max(opset, 1), domain)
        if function is not None:
            return lambda node, run_params: oracle_ops.Operator(node, run_params, function)
        if called is not None:
            return lambda node, run_params: _Call(node, run_params, impl=called)
        where = f"{domain + '::' if domain else ''}{node.op_type} of opset {opset} (node {node.name or node.output[0]!r})"
        try:
            if domain == "":
                onnx.defs.get_schema(node.op_type, max(opset, 1), domain)  # the evaluator runs it in sets that are older than it
            found = super()._load_impl(node, input_types)
        except RuntimeContextError:
            raise  # the caller asks again, with the types
        except Exception:  # the evaluator raises NotImplementedError, RuntimeError or ValueError for the same thing
            raise UnsupportedError(f"the float64 oracle lacks the operator {where}") from None

        def make(node: onnx.NodeProto, run_params: dict[str, Any]) -> OpRun:
            try:
                return cast(OpRun, found(node, run_params))
            except BnfoldError:
                raise
            except Exception as error:
                raise UnsupportedError(f"the float64 oracle can't run the operator {where}: {_short(error)}") from None

        return make

    def run(
        self, output_names: list[str] | None, feed_inputs: dict[str, Any], attributes: dict[str, Any] | None = None, *_: Any, **__: Any
    ) -> Any:
        """Evaluate node by node. Signature and meaning as in the base class, without checks of shape annotations."""
        wanted = list(self.output_names if output_names is None else output_names)
        found = dict(self.stream(wanted, feed_inputs, attributes))
        return [found[name] for name in wanted]

    def stream(
        self, names: Iterable[str], feed_inputs: dict[str, Any], attributes: dict[str, Any] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """The values of these names, each as soon as it is there."""
        wanted = set(names)
        results: dict[str, Any] = {"": None, **self.rt_inits_, **feed_inputs}
        yield from ((name, value.array() if isinstance(value, Weight) else value) for name, value in results.items() if name in wanted)
        for node, dead, spare in zip(self.rt_nodes_, self._last_uses(), self._spare, strict=True):
            extra: dict[str, Any] = {"context": results} if node.need_context() else {}
            if node.has_linked_attribute and attributes:
                extra["linked_attributes"] = attributes
            try:
                values = [each.array() if isinstance(each, Weight) else each for each in (results[name] for name in node.input)]
                check_said(node.onnx_node, values, self.most)
                if isinstance(node, oracle_ops.Operator):
                    node.out = next((results[name] for name in spare if name not in wanted), None)
                outputs = node.run(*values, **extra)
                del values
            except (BnfoldError, MemoryError):
                raise
            except Exception as error:
                raise UnsupportedError(
                    f"the float64 oracle can't run the operator {node.op_type} (node {named(node.onnx_node)}): {_short(error)}"
                ) from None
            check_made(node.onnx_node, outputs, self.most)
            # A few of the evaluator's operators answer in float32 whatever goes in (AffineGrid, TfIdfVectorizer).
            widened = (widen(value) if isinstance(value, np.ndarray) else value for value in outputs)
            results.update(zip(node.output, widened, strict=False))
            results[""] = None
            yield from ((name, results[name]) for name in node.output if name in wanted)
            for name in dead:
                results.pop(name, None)

    def _last_uses(self) -> list[list[str]]:
        """For each node, the values that nobody needs after it. What came in from outside stays with its owner."""
        if self._dead is None:
            seen, dead = {""}, []
            for node in reversed(self.rt_nodes_):
                names = {*reads(node.onnx_node), *node.output} - seen
                dead.append(sorted(names))
                seen |= names
            self._dead = dead[::-1]
            # Of what a node reads, the arrays that are no other's, nor views of them, and that it alone ever sees: it may write into them.
            times = Counter(name for node in self.rt_nodes_ for name in (*node.input, *reads(node.onnx_node) - {*node.input}))
            own = {node.output[0] for node in self.rt_nodes_ if isinstance(node, oracle_ops.Operator) and node.function in oracle_ops.OWN}
            self._spare = [[name for name in node.input if name in own and times[name] == 1] for node in self.rt_nodes_]
        return self._dead


class _Call(OpFunction):
    """A call of a function of the model, with trailing inputs left out."""

    def _run(self, *values: Any, **attributes: Any) -> Any:
        missing = len(self.impl_.input_names) - len(values)
        return super()._run(*values, *(None,) * missing, **attributes)  # type: ignore[no-untyped-call]


class _Loop(OpRun):
    """Loop (docs/Operators.md). The evaluator's own joins scan outputs along their first axis instead of stacking them."""

    op_domain = ""

    def need_context(self) -> bool:
        return True

    def _run(
        self, trips: Any, condition: Any, *carried: Any, context: Any = None, body: Any = None, attributes: Any = None, **_: Any
    ) -> Any:
        run_body = getattr(self, "_run_body")  # noqa: B009 - the base class makes it from the attribute `body`
        state = list(carried)
        scans: list[list[Any]] = [[] for _ in body.output_names[1 + len(state) :]]
        going = True if condition is None else bool(np.asarray(condition).item())
        limit = None if trips is None else int(np.asarray(trips).item())
        step = 0
        while going and (limit is None or step < limit):
            if step == MOST_TURNS:
                raise ModelError(f"a Loop goes on for more than {MOST_TURNS:,} turns; don't use this file")
            fed = dict(zip(body.input_names, (np.array(step, np.int64), np.array(going), *state), strict=True))
            outputs = run_body({**(context or {}), **fed}, attributes=attributes)
            going, state, now = bool(np.asarray(outputs[0]).item()), outputs[1 : 1 + len(state)], outputs[1 + len(state) :]
            for scan, value in zip(scans, now, strict=True):
                scan.append(value)
            step += 1
        if not step and scans:
            raise NotImplementedError("no step was taken, so the shapes of its scan outputs aren't known")
        return (*state, *(np.stack(scan) for scan in scans))


def _defined(graph: onnx.GraphProto) -> set[str]:
    return {i.name for i in graph.input} | {name for node in graph.node for name in node.output if name}


def _short(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    return text if len(text) <= 200 else text[:199] + "…"
