"""Which nodes of a session run on the provider that was asked for, and whether those that don't may."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from bnfold.errors import DeviceError
from bnfold.running import Placement
from bnfold.text import unused

from .providers import CPU, resolve

SHOWN = 3  # nodes that a message names
# How the types or names of nodes begin that ONNX Runtime itself puts between others.
INSERTED = ("Memcpy", "ReorderInput", "ReorderOutput", "InsertedPrecisionFreeCast", "InsertedCast")
FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_allowed: ContextVar[frozenset[str]] = ContextVar("allowed_on_the_cpu", default=frozenset())


@contextlib.contextmanager
def cpu_fallback(names: Iterable[str]) -> Iterator[None]:
    """Let nodes of these operator types or names run on the CPU, whatever the provider."""
    token = _allowed.set(frozenset(names))
    try:
        yield
    finally:
        _allowed.reset(token)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own, so that what is said of it can be told."""
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = unused(f"{node.name or node.op_type}_{number}", taken)
        seen.add(node.name)


def assigned(session: Any, provider: str) -> Placement | None:
    """Which nodes are on the provider, from the session itself; None where this ONNX Runtime can't say (before 1.24)."""
    try:
        parts = list(session.get_provider_graph_assignment_info())
    except Exception:  # it isn't there, or says that nothing was recorded
        return None
    nodes = [(part.ep_name, node.op_type, node.name) for part in parts for node in part.get_nodes()]
    return _placement(nodes, resolve(provider), "session") if nodes else None


def profiled(path: str, provider: str) -> Placement | None:
    """The same from the profile of one run, in which a part that a provider took over whole counts as one node. The file is removed."""
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))
        os.unlink(path)
    except (OSError, ValueError):
        return None
    suffix = "_kernel_time"
    found = {
        event["name"]: (event["args"]["provider"], event["args"].get("op_name", ""), event["name"].removesuffix(suffix))
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(suffix) and event.get("args", {}).get("provider")
    }
    return _placement(list(found.values()), resolve(provider), "profile") if found else None


def _placement(nodes: list[tuple[str, str, str]], full: str, source: str) -> Placement:
    on_cpu = () if full == CPU else tuple((op, name) for where, op, name in nodes if where == CPU)
    return Placement(sum(where == full for where, *_ in nodes), len(nodes), source, on_cpu)


def honoured(placement: Placement | None, provider: str, graph: Callable[[], onnx.ModelProto]) -> None:
    """Raise DeviceError where compute nodes are left to the CPU that nobody allowed to. graph: the model, for the types of its values.

    A compute node is one with a floating-point output, or an output whose type can't be told; what only works out shapes and indices is
    the CPU's by ONNX Runtime's own choice.
    """
    if placement is None:
        return
    allowed = _allowed.get()
    left = [(op, name) for op, name in placement.on_cpu if not {op, op.removeprefix("Fused"), name} & allowed]
    left = [(op, name) for op, name in left if not op.startswith(INSERTED) and not name.startswith(INSERTED)]
    if left:
        idle = _without_floats(graph())
        left = [(op, name) for op, name in left if name not in idle]
    if not left:
        return
    by_type = Counter(op for op, _ in left)
    names = [f"{op} {name!r}" for op, name in left[:SHOWN]]
    more = f" and {len(left) - SHOWN:,} more" if len(left) > SHOWN else ""
    allow = " ".join(f"--allow-cpu-fallback {op}" for op in by_type)
    raise DeviceError(
        f"execution provider {provider} leaves {len(left):,} of {placement.of:,} nodes to the CPU: {', '.join(names)}{more}; "
        f"allow them by type or name, with {allow}, or take another provider"
    )


def _without_floats(proto: onnx.ModelProto) -> set[str]:
    """The names, as `name_nodes` gives them, of the nodes that are known to compute no floating-point number."""
    name_nodes(proto.graph)
    known = {info.name: info.type.tensor_type.elem_type for info in _inferred(proto)}
    found = set()
    for node in proto.graph.node:
        kinds = {known.get(name, 0) for name in node.output if name}
        if 0 not in kinds and not kinds & FLOATS:
            found.add(node.name)
    return found


def _inferred(proto: onnx.ModelProto) -> Iterable[onnx.ValueInfoProto]:
    try:
        graph = onnx.shape_inference.infer_shapes(proto).graph
    except Exception:  # past 2 GB, or an operator that it stumbles on
        graph = proto.graph
    return (*graph.value_info, *graph.input, *graph.output)
