"""The table of the float64 oracle's own operators: those that the reference evaluator gets wrong, computes slowly, or lacks.

The evaluator of the onnx package takes the attribute defaults of the newest version of each operator, blends batch statistics into
the BatchNormalization of opsets 7 to 13, rounds Erf and DequantizeLinear to float32, loops LRN over the wrong axis, knows no
broadcasting of opset 6, and more. What stands in `normalisation`, `activation`, `arithmetic`, `movement`,
`convolution`, `resize` and `recurrent` follows the operator specifications (github.com/onnx/onnx, docs/Operators.md and
docs/Changelog.md) version by version.

Every function takes the inputs in their order (None for an omitted one) and the node's attributes as keywords, and returns a tuple.
Those with a keyword `out` may be given an array that nobody needs any more, to write their result into where it fits (`place`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx.reference.op_run import OpRun

Array = np.ndarray
Function = Callable[..., tuple[Any, ...]]

# By operator: (first opset, function), oldest first. None: from there on the evaluator's own implementation is right.
TABLE: dict[str, list[tuple[int, Function | None]]] = {}
COUNTS_OUTPUTS: set[Function] = set()
OWN: set[Function] = set()  # what these return are arrays of their own, never an input or a view of one
OVERWRITES: set[Function] = set()  # of them, those that take `out`
CACHE = 1 << 19  # bytes that are passed over several times at a stretch


def operator(
    *names: str, since: int = 1, until: int | None = None, counts_outputs: bool = False, own: bool = False, domain: str = ""
) -> Callable[[Function], Function]:
    """Enter a function for operators `names` of opsets `since` to `until`. counts_outputs: it wants to be told how many are asked for.

    own: what it returns is an array of its own, never an input or a view of one.
    """

    def enter(function: Function) -> Function:
        for name in names:
            rows = TABLE.setdefault(_key(domain, name), [])
            rows[:] = [row for row in rows if row[0] != since]  # what closed an older range opens this one
            rows.append((since, function))
            if until is not None and all(row[0] != until + 1 for row in rows):
                rows.append((until + 1, None))
            rows.sort(key=lambda row: row[0])
        if counts_outputs:
            COUNTS_OUTPUTS.add(function)
        if own:
            OWN.add(function)
            OVERWRITES.update({function} if "out" in inspect.signature(function).parameters else ())
        return function

    return enter


def place(out: Array | None, *inputs: Array) -> Array | None:
    """`out`, where numbers made of these inputs, element by element, are float64 and as many."""
    if out is None or {each.dtype for each in (out, *inputs)} != {np.dtype(np.float64)}:
        return None
    return out if np.broadcast_shapes(*(each.shape for each in inputs)) == out.shape else None


def _key(domain: str, name: str) -> str:
    return f"{domain}::{name}" if domain else name


def find(name: str, opset: int, domain: str = "") -> Function | None:
    """The function for an operator at this opset of its domain, or None for the evaluator's own."""
    found = None
    for since, function in TABLE.get(_key(domain, name), ()):
        if since <= opset:
            found = function
    return found


class Operator(OpRun):
    """One of our functions as an operator of the evaluator."""

    op_domain = ""

    def __init__(self, node: onnx.NodeProto, run_params: dict[str, Any], function: Function) -> None:
        # Without a schema: the evaluator would fill in the defaults of the newest version.
        super().__init__(node, run_params, schema=False)
        self.function = function
        self.out: np.ndarray | None = None  # an array that nobody needs after this node
        asked = [i for i, name in enumerate(node.output, 1) if name]
        self._asked = {"outputs": asked[-1] if asked else 1} if function in COUNTS_OUTPUTS else {}

    def _run(self, *values: Any, **attributes: Any) -> tuple[Any, ...]:
        attributes.pop("attributes", None)
        # numpy's float32 scalars would be rounded again in arithmetic among themselves.
        plain = {k: float(v) if isinstance(v, np.floating) else _plain_list(v) for k, v in attributes.items()}
        if self.function in OVERWRITES:
            plain["out"], self.out = self.out, None
        return self.function(*values, **self._asked, **plain)


def _plain_list(value: Any) -> Any:
    return [float(v) if isinstance(v, np.floating) else v for v in value] if isinstance(value, list) else value
