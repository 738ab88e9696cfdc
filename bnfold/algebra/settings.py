"""What an operator is set to, beside the coefficients that a fold could change: level 1 of `verify` compares these too.

A front-end states them in a form that doesn't depend on how a file writes them: defaults filled in, axes counted from the front, what is
an attribute in one version of an operator and an input in the next by one name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from .graph import Node, Value

ROUNDED = 2.0**-22  # relatively: settings are stored in float32 by some files, and computed in it
LARGEST = 3.4e38  # a bound beyond it is none
LONGEST = 80  # characters of a setting that are shown
Common = tuple[str, Mapping[str, Any]]  # an operator and its settings by ONNX's names
UNREAD = "it isn't known what it is set to"


@dataclass(frozen=True)
class Body:
    """A graph that an operator holds. inputs: its own, in order; outputs: a value each, or the array of one that is constant."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class Settings:
    """operator: its name; values: numbers, text, tuples and arrays by name; common: operator and values in ONNX's terms, if it has them.

    places: which of the operator's outputs each of the node's is; activations: which of its inputs; shape_of: whose sizes it gives;
    flows: what of the rest is computed.
    unread: why the rest isn't known.
    """

    operator: str
    values: Mapping[str, Any] = field(default_factory=dict)
    common: Common | None = None
    places: Mapping[Value, int] = field(default_factory=dict)
    activations: tuple[Any, ...] = ()
    shape_of: Value | None = None
    flows: Mapping[str, Value] = field(default_factory=dict)
    bodies: tuple[Body, ...] = ()
    kind: str = ""  # of its framework
    unread: str = ""


class Setting(NamedTuple):
    """One that differs. number: whether it is a number of the function, that data may fail to show; text: in words.

    widespread: whether it is an array of which at least half is off by 1 % or more, so that data would show it.
    """

    text: str
    number: bool
    widespread: bool = False


Stated = Callable[[], Settings]
# Of these all that they are is in their coefficients and their attributes, whatever they are called.
SAID_BY_COEFFICIENTS = {"Affine", "Clamp", "Contraction", "Table", "Constant"}
COMMUTATIVE = {"Add", "Mul", "Mean", "Maximum"}


# --- one form of what is said in several ways ----------------------------------------------------------------------------------------


def counted(axes: Any, rank: int) -> Any:
    """Axes from the front: one, or a tuple in their order."""
    found = np.asarray(axes, np.int64)
    return int(found) % rank if found.ndim == 0 else tuple(int(n) % rank for n in found.ravel())


def bound(value: Any, default: float) -> float:
    """A bound of a clip; where there is none, or one beyond all numbers, an infinite one."""
    number = default if value is None else float(np.ravel(value)[0])
    return number if abs(number) < LARGEST else float(np.copysign(np.inf, number))


def clip(low: Any, high: Any) -> Common:
    low, high = bound(low, -np.inf), bound(high, np.inf)
    return ("Relu", {}) if (low, high) == (0, np.inf) else ("Clip", {"min": low, "max": high})


def reduction(operator: str, axes: Any, rank: int, *, keeps: Any = True) -> Common:
    """axes: None for all of them."""
    every = range(rank) if axes is None or not np.size(axes) else np.ravel(axes)
    return operator, {"axes": tuple(sorted(counted(every, rank))) if rank else (), "keepdims": int(bool(keeps))}


# --- what a node is set to -----------------------------------------------------------------------------------------------------------


def settings(node: Node) -> Settings:
    """Those of an operator; what it fills with as it is planned."""
    stated: Stated | None = node.attrs.get("settings")
    found = Settings(node.label, unread=UNREAD) if stated is None else stated()
    if "fill" not in node.params:
        return found
    fill = {"value": float(node.params["fill"].read())}
    common = None if found.common is None else (found.common[0], {**found.common[1], **fill})
    return replace(found, values={**found.values, **fill}, common=common)


def restated(stated: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings of an operator that is set otherwise from now on: what it has of some values, by their names in both frameworks."""

    def changed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {**values, **{name: value for name, value in changes.items() if name in values}}

    common = None if stated.common is None else (stated.common[0], changed(stated.common[1]))
    return replace(stated, values=changed(stated.values), common=common)


def operator(node: Node) -> str:
    """What an operator is called, alike in both frameworks where they have the same."""
    found = settings(node)
    return found.operator if found.common is None else found.common[0]


def place(value: Value, node: Node) -> int:
    """Which of an operator's outputs a value is."""
    return settings(node).places.get(value, node.outputs.index(value))


def differing(p: Node, q: Node) -> tuple[list[Setting], str]:
    """The settings in which two operators of one kind differ, and why some can't be compared, "" where all were.

    An operator of another name isn't one that is set otherwise: it may well do the same.
    """
    if p.op in SAID_BY_COEFFICIENTS:
        return [], ""
    one, other = settings(p), settings(q)
    name = f"{p.label} {p.name}"
    if one.unread or other.unread:
        return [], f"of {name} {one.unread or other.unread}"
    mine, theirs = (one.operator, one.values), (other.operator, other.values)
    if one.kind != other.kind or one.operator != other.operator:
        if one.common is None or other.common is None:
            return [], f"what {name} is set to can't be held against {q.label} {q.name} of another framework"
        mine, theirs = one.common, other.common
    elif p.op not in COMMUTATIVE and one.activations != other.activations:
        return [], f"{name} reads its inputs in other places than {q.label} {q.name} does"
    if mine[0] != theirs[0]:
        return [], f"{name} stands where the candidate has {q.label} {q.name}"
    if one.flows.keys() != other.flows.keys():
        return [], f"{name} is set by other computed values than {q.label} {q.name}"
    coefficients = {"value"} if "fill" in p.params and "fill" in q.params else set()
    found = [
        Setting(f"{name} has {_shown_both(key, *both)}", _is_number(both[0]), _is_widespread(*both))
        for key in mine[1]
        if key in theirs[1] and key not in coefficients and not same(*(both := (mine[1][key], theirs[1][key])))
    ]
    only = sorted(mine[1].keys() ^ theirs[1].keys())
    return found, f"{name} states its {only[0]} in one of the models alone" if only and not found else ""


MOST = 1 << 22  # elements that are moved to see where they go
RESHAPING = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "view", "reshape", "flatten", "squeeze", "unsqueeze", "_unsafe_view"}
ONE_WAY = {"Transpose", "permute", "Concat", "cat", "DepthToSpace", "SpaceToDepth", "flip"}  # what is set otherwise moves otherwise


def differing_moves(p: Node, q: Node) -> tuple[list[Setting], str]:
    """As `differing`, of operators that move data, of which many do the same: by what they are set to, or by trying."""
    one, other = settings(p), settings(q)
    found, unread = differing(p, q)
    plain = not unread and not one.flows and not other.flows
    if plain and place(p.output, p) == place(q.output, q) and (not found or one.operator in ONE_WAY):
        return found, ""
    name = f"{p.label} {p.name} isn't known to move data as {q.label} {q.name} does"
    mine, theirs = ([v.probes for v in (*node.inputs, node.output)] for node in (p, q))
    if mine[:-1] == theirs[:-1] and _known(mine) and _known(theirs) and mine[-1] != theirs[-1]:
        return [Setting(f"{p.label} {p.name} gives other sizes than the candidate's {q.label} {q.name}", number=False)], ""
    if mine != theirs:  # of what is reshaped, sizes say all
        return [], "" if {one.operator, other.operator} <= RESHAPING and _sizes_agree(p, q) else name
    for shapes in zip(*(probes or () for probes in mine), strict=False):
        if any(None in shape for shape in shapes) or sum(int(np.prod(shape)) for shape in shapes) > MOST:
            return [], name
        starts = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
        ids = [np.arange(start, start + int(np.prod(shape))).reshape(shape) for start, shape in zip(starts, shapes[:-1], strict=False)]
        if not np.array_equal(*(node.attrs["run"](list(ids), shapes[-1]) for node in (p, q))):
            return [Setting(f"{p.label} {p.name} moves data otherwise than the candidate's {q.label} {q.name}", number=False)], ""
    return [], "" if all(mine) else name


def _known(values: Sequence[Any]) -> bool:
    return all(probes is not None and all(None not in sizes for sizes in probes) for probes in values)


def _sizes_agree(p: Node, q: Node) -> bool:
    """Whether input and output have the same known sizes in both models, all but one."""
    pairs = ((p.inputs[0].sizes, q.inputs[0].sizes), (p.output.sizes, q.output.sizes))
    return all(one is not None and one == other and one.count(None) <= 1 for one, other in pairs)


def same(a: Any, b: Any) -> bool:
    """Whether two settings are equal, numbers up to their rounding."""
    if a is None or b is None or isinstance(a, (str, bytes)) or isinstance(b, (str, bytes)):
        return a is b or bool(a == b)
    if any(isinstance(each, (tuple, list)) and not all(isinstance(n, (int, float)) for n in each) for each in (a, b)):
        return isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(same, a, b))
    x, y = np.asarray(a), np.asarray(b)
    if x.size == y.size == 1:
        x, y = x.reshape(()), y.reshape(())
    if x.shape != y.shape:
        return False
    if x.dtype.kind not in "fc" and y.dtype.kind not in "fc":
        return bool((x == y).all())
    with np.errstate(all="ignore"):
        close = np.isfinite(x) & np.isfinite(y) & (np.abs(x - y) <= ROUNDED * np.maximum(np.abs(x), np.abs(y)))
    return bool((close | (x == y) | (np.isnan(x) & np.isnan(y))).all())


def _is_widespread(one: Any, other: Any) -> bool:
    if not (isinstance(one, np.ndarray) and isinstance(other, np.ndarray)) or one.shape != other.shape or one.size < 2:
        return False
    return one.dtype.kind == "f" and bool((np.abs(one - other) >= 0.01 * np.abs(one)).mean() >= 0.5)


def _is_number(value: Any) -> bool:
    """Whether a setting is real, as an epsilon is; one that is whole, or a word, changes too much to stay unseen."""
    if isinstance(value, (tuple, list)):
        return any(map(_is_number, value))
    return value is not None and np.asarray(value).dtype.kind in "fc"


def _shown_both(key: str, mine: Any, theirs: Any) -> str:
    one, other = _shown(mine), _shown(theirs)
    return f"{key} {one}, the candidate has {other}" if one and other and one != other else f"another {key} than the candidate has"


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        if value.size > 8:
            return ""
        return str(value.tolist())
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else ""
