"""Why a layer differs, decided by trying: its coefficients are folded again with each mistake that is known to be made, and the one that
gives what the candidate holds, to rounding, is named. What nothing explains is called that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .absorbing import coefficients
from .affine import Array
from .correspondence import DOUBLE, LIMIT
from .errors import BnfoldError
from .graph import Node, Norm, Value
from .inside import Normal
from .pairing import NORMALISES, Pair

if TYPE_CHECKING:
    from .data import Batch
    from .localise import Compared, Sides

SLACK = 2 * LIMIT  # units of roundoff within which a hypothesis explains what is stored
BETTER = 0.6  # of the misfit of the right coefficients, in root mean square: what a hypothesis must come down to
MOST = 4096  # channels among which another order is looked for
UNEXPLAINED = "nothing that was tried explains it"


@dataclass(frozen=True)
class Cause:
    """In words, and the coefficient that is furthest off, where one is. what: its role."""

    text: str
    batchnorm: str = ""
    what: str = ""
    channel: int | None = None
    position: tuple[int, ...] = ()
    expected: float | None = None
    found: float | None = None


@dataclass(frozen=True)
class Held:
    """The coefficients of one operator. axis: along which the weight's output channels lie; bias: one for each of them, or none."""

    weight: Array
    bias: Array
    axis: int

    def scaled(self, ratio: Array) -> Array:
        return self.weight * _along(ratio, self.axis, self.weight.ndim)


def cause_of(sides: Sides, pair: Pair | None, compared: Compared | None, feeds: Batch | None) -> Cause:
    """What explains the difference at a pair of operators, and the coefficient that is furthest off."""
    if pair is None or pair.other is None:
        return Cause(_in_front(pair) or UNEXPLAINED)
    p, q = pair.node, pair.other
    sites = [node for node in sides.reference.sites.get(p, []) if "norm" in node.attrs] or ([p] if "norm" in p.attrs else [])
    front = _normaliser(p)
    name = sides.reference.name_of(sites[0]) if sites else sides.reference.name_of(front) if front is not None else ""
    worst = _worst(p, q)
    told = replace(worst, batchnorm=name) if worst is not None else Cause("", batchnorm=name)
    for text in _tried(sides, pair, compared, feeds, sites, name):
        return replace(told, text=text)
    return replace(told, text=UNEXPLAINED + _rest(p, q))


def _tried(sides: Sides, pair: Pair, compared: Compared | None, feeds: Batch | None, sites: list[Node], name: str) -> Iterator[str]:
    p, q = pair.node, pair.other
    assert q is not None
    yield from _refused(sides, pair, feeds)
    yield from _not_finite(p, q)
    if compared is not None and compared.border:
        yield from _at_the_border(p, name)
    if p.op != q.op or (p.op == "Barrier" and p.label != q.label):
        product = {p.op, q.op} == {"Contraction", "Affine"}
        if not product and not (_moved(p) and _moved(q)):
            yield f"the candidate has {q.label} {q.name} where the reference has {p.label} {p.name}"
    want, have = held(p), held(q)
    if want is not None and have is not None and want.weight.shape == have.weight.shape:
        unit = unit_of(p, q)
        if len(sites) == 1:
            yield from _folds(
                name, sites[0], want, have, unit, up=sites[0] is p or sites[0].index > p.index, kept=sites[0] is p, stored=_source(p)
            )
        yield from _orders(want, have, unit, int(p.attrs.get("groups", 1)), sites)
        if len(sites) == 1 and sites[0].index >= p.index:
            yield from _statistics(name, sites[0], want, have, unit)
    yield from _settings(p, q)
    if compared is not None and feeds is not None and _depends_on_the_batch(sides, pair, feeds):
        yield "training mode: the candidate's output for one sample depends on the others in its batch"


# --- what the operator itself says ------------------------------------------------------------------------------------------------


def _refused(sides: Sides, pair: Pair, feeds: Batch | None) -> Iterator[str]:
    """A BatchNorm of the candidate that no fold takes."""
    q = pair.other
    assert q is not None
    for node in (q, *(u for u, _ in q.output.users)):
        if node.op == "Barrier" and node.label in NORMALISES and not (pair.node.op == "Barrier" and pair.node.label in NORMALISES):
            why = str(node.attrs.get("why", ""))
            if "training" in why or "each batch by itself" in why:
                told = "its output for one sample depends on the others in its batch"
                proven = feeds is not None and _depends_on_the_batch(sides, pair, feeds)
                name = sides.candidate.name_of(node)
                yield f"training mode: BatchNorm {name} of the candidate normalises each batch by itself" + f"; {told}" * proven
            elif why:
                yield f"BatchNorm {sides.candidate.name_of(node)} of the candidate can't be used: {why}"


def _not_finite(p: Node, q: Node) -> Iterator[str]:
    for node in (q, *(u for u, _ in q.output.users if u.op == "Affine")):
        for role, param in node.params.items():
            array = param.read()
            if not np.isfinite(array).all():
                at = np.argwhere(~np.isfinite(array))[0]
                mine = p.params.get(role)
                if mine is None or np.isfinite(mine.read()).all():
                    yield f"the candidate's {role} holds {array[tuple(at)]} at {_place(at)}"


def _at_the_border(p: Node, name: str) -> Iterator[str]:
    if p.op == "Conv":
        of = f"BatchNorm {name}" if _normaliser(p) is not None else "a BatchNorm"
        yield (
            f"padding: the map is off at its border alone, as where the shift of {of} in front is folded into a convolution "
            "that pads with zeros"
        )


def _normaliser(p: Node) -> Node | None:
    """The BatchNorm in front of an operator."""
    before = p.inputs[0].producer if p.inputs else None
    return before if before is not None and "norm" in before.attrs else None


def _in_front(pair: Pair | None) -> str:
    return f"the candidate has nothing in the place of {pair.node.label} {pair.node.name}" if pair is not None else ""


def _settings(p: Node, q: Node) -> Iterator[str]:
    """Settings that decide which places an operator reads."""
    if p.op != q.op:
        return
    for key in ("groups", "window", "x", "w", "y", "axis", "axes", "signs", "factors"):
        if p.attrs.get(key) != q.attrs.get(key):
            yield f"the candidate's {q.label} {q.name} has other settings: {key} {_shown(q.attrs.get(key))} for {_shown(p.attrs.get(key))}"


def _shown(value: object) -> str:
    from .merge import Window

    if isinstance(value, Window):
        return f"(stride {value.stride}, dilation {value.dilation}, padding {value.before} and {value.after})"
    return str(value)


def _depends_on_the_batch(sides: Sides, pair: Pair, feeds: Batch) -> bool:
    """Whether the candidate's value for the first sample changes with the rest of the batch, and the reference's doesn't."""
    return _mixes(sides, sides.candidate, pair.candidate, feeds) and not _mixes(sides, sides.reference, pair.reference, feeds)


def _mixes(sides: Sides, side: Normal, value: Value, feeds: Batch) -> bool:
    name = side.stands.get(value)
    batch = {key: array for key, array in feeds.items() if array.ndim}
    if name is None or len(batch) < len(feeds) or not batch:
        return False
    if min(len(a) for a in batch.values()) < 2:
        batch = {key: np.concatenate([a, (a * a.dtype.type(0.5)).astype(a.dtype)]) for key, a in batch.items()}
    try:
        whole, alone = (
            next(array for _, array in side.stream(fed, [name], exact=sides.exact))
            for fed in (batch, {key: np.concatenate([a[:1], a[:1]]) for key, a in batch.items()})
        )
    except (BnfoldError, StopIteration):
        return False
    if whole.ndim != alone.ndim or whole.shape[1:] != alone.shape[1:] or not whole[:1].size or not whole.ndim:
        return False
    size = float(np.abs(whole[:1]).max(initial=0.0))
    return bool(np.abs(whole[:1] - alone[:1]).max() > 1e3 * sides.unit * size)


# --- coefficients -----------------------------------------------------------------------------------------------------------------


def held(node: Node) -> Held | None:
    """An operator's coefficients in normal form; None where it has none that a BatchNorm could go into."""
    if "norm" in node.attrs or (node.op == "Affine" and node.params):
        own = coefficients(node)
        scale, shift = np.broadcast_arrays(own.scale, own.shift)
        return Held(scale.ravel(), shift.ravel(), 0)
    weight = node.params.get("weight")
    if weight is None or node.op not in ("Conv", "Contraction"):
        return None
    axis = _out_axis(node)
    array = weight.read()
    bias = node.params.get("bias")
    add = node.output.users[0][0] if len(node.output.users) == 1 else None
    if bias is not None and (bias.tensor is not None or bias.update is not None):
        vector = bias.read().ravel()
    elif add is not None and add.op == "Affine" and add.params.keys() == {"beta"}:
        vector = coefficients(add).shift.ravel()
    else:
        vector = np.zeros(1)
    size = array.shape[axis]
    return Held(array, np.broadcast_to(vector, size) if vector.size in (1, size) else np.zeros(size), axis)


def _out_axis(node: Node) -> int:
    if node.op == "Conv":
        return 0
    w, y = node.attrs["w"], node.attrs["y"]
    return next((i for i in reversed(range(len(w))) if w[i] in y), 0)


def is_right(pair: Pair) -> bool:
    """Whether an operator's coefficients and settings are the reference's: then its value differs for another's sake."""
    p, q = pair.node, pair.other
    want, have = held(p), None if q is None else held(q)
    if q is None or p.op != q.op or want is None or have is None or any(True for _ in _settings(p, q)):
        return False
    return _explains((want.weight, want.bias), have, unit_of(p, q), np.abs(want.bias).max(initial=0.0) * np.ones_like(want.bias))


def _source(node: Node) -> Held | None:
    """The same before anything was folded in."""
    weight = node.params.get("weight")
    if weight is None or weight.tensor is None or node.op not in ("Conv", "Contraction"):
        return None
    axis, bias = _out_axis(node), node.params.get("bias")
    array = weight.layout.canonical(weight.tensor.read())
    vector = np.zeros(1) if bias is None or bias.tensor is None else bias.layout.canonical(bias.tensor.read()).ravel()
    return Held(array, np.broadcast_to(vector, array.shape[axis]) if vector.size in (1, array.shape[axis]) else np.zeros(1), axis)


def _moved(node: Node) -> bool:
    return node.op in ("Conv", "Contraction", "Affine") and bool(node.params)


def unit_of(*nodes: Node) -> float:
    """Unit roundoff of the coarsest type in which their coefficients are stored."""
    from .correspondence import _precision

    limits = [param.tensor.limit for node in nodes for param in node.params.values() if param.tensor is not None]
    return max((_precision(limit)[0] for limit in limits), default=2.0**-24)


def _misfit(got: tuple[Array, Array], have: Held, unit: float, summands: Array) -> tuple[float, float]:
    """How far these are from the candidate's coefficients in units of roundoff, at most and in root mean square.

    summands: what the bias's summands amount to.
    """
    weight, bias = got
    if weight.shape != have.weight.shape or bias.shape != have.bias.shape:
        return np.inf, np.inf
    unit, tiny = max(unit, DOUBLE), float(np.finfo(np.float32).tiny) * unit
    with np.errstate(all="ignore"):
        off = [
            np.maximum(np.abs(found - made) - tiny, 0) / (unit * np.maximum(size, tiny))
            for made, found, size in (
                (weight, have.weight, np.maximum(np.abs(weight), np.abs(have.weight))),
                (bias, have.bias, np.abs(bias) + summands),
            )
        ]
    most = max(float(np.where(np.isnan(each), np.inf, each).max(initial=0.0)) for each in off)
    return most, max(float(np.sqrt(np.square(each).mean())) if each.size else 0.0 for each in off)


def _explains(got: tuple[Array, Array], have: Held, unit: float, summands: Array) -> bool:
    """Whether these are the candidate's coefficients to rounding."""
    return _misfit(got, have, unit, summands)[0] <= SLACK


def _folds(name: str, site: Node, want: Held, have: Held, unit: float, *, up: bool, kept: bool, stored: Held | None) -> Iterator[str]:
    """Mistakes of one BatchNorm's fold."""
    norm: Norm = site.attrs["norm"]
    refold = _up(norm, want, kept, stored) if up else _down(norm, want)
    if refold is None:
        return
    right = _map(norm)
    original = refold(*right)

    def misfit(scale: Array, shift: Array) -> tuple[float, float]:
        with np.errstate(all="ignore"):
            got = refold(scale, shift)
            if up:
                summands = np.abs(shift) + np.abs(norm.beta) + np.abs(norm.mean * scale) + np.abs(got[1] - shift)
            else:
                summands = np.abs(original[1]) + np.abs(norm.beta).max(initial=0.0)
        return _misfit(got, have, unit, summands)

    as_it_is = misfit(*right)[1]

    def explained(scale: Array, shift: Array) -> bool:
        """To rounding, and much better than the right coefficients do."""
        most, usual = misfit(scale, shift)
        return most <= SLACK and usual < BETTER * as_it_is

    gain = _gains(norm, want, have, up)
    if gain is not None:
        for epsilon in _epsilons(norm, gain):
            if epsilon != norm.epsilon and explained(*_map(replace(norm, epsilon=epsilon))):
                yield f"another epsilon: the candidate was folded with {epsilon:.6g}, BatchNorm {name} has {norm.epsilon:.6g}"
        for n, doubt, factor in _counts(norm, gain, unit):
            if explained(*_map(replace(norm, var=norm.var * factor))):
                which = "unbiased" if factor > 1 else "biased"
                doubtful = f" (give or take {doubt})" if doubt > 1 or n >= MOST else ""
                yield f"the {which} variance: the candidate's variances are {factor:.6g} times the reference's, n = {n}{doubtful}"
    with np.errstate(all="ignore"):
        s, t = right
        root = np.sqrt(norm.var + norm.epsilon)
        others = [
            ("the running mean isn't subtracted", _map(replace(norm, mean=0 * norm.mean))),
            ("the running mean is added, not subtracted", _map(replace(norm, mean=-norm.mean))),
            ("gamma is missing (1 in its place)", _map(replace(norm, gamma=np.ones_like(norm.gamma)))),
            ("beta is missing (0 in its place)", _map(replace(norm, beta=0 * norm.beta))),
            ("beta has the other sign", _map(replace(norm, beta=-norm.beta))),
            ("gamma has lost its sign", _map(replace(norm, gamma=np.abs(norm.gamma)))),
            ("epsilon is left out", _map(replace(norm, epsilon=0.0))),
            ("epsilon is added outside the square root", _with_gain(norm, 1 / (np.sqrt(norm.var) + norm.epsilon))),
            ("the square root of the variance is missing", _with_gain(norm, 1 / (norm.var + norm.epsilon))),
            ("the variance is squared before its root", _with_gain(norm, 1 / np.sqrt(norm.var**2 + norm.epsilon))),
            ("it isn't divided by the standard deviation", _with_gain(norm, np.ones_like(root))),
            ("the BatchNorm is missing", (np.ones_like(s), np.zeros_like(t))),
            ("the BatchNorm is applied twice", (s * s, s * t + t)),
            ("its scale is applied, its shift isn't", (s, np.zeros_like(t))),
            ("its shift is applied, its scale isn't", (np.ones_like(s), t)),
        ]
    for text, (scale, shift) in others:
        if np.isfinite(scale).all() and np.isfinite(shift).all() and explained(scale, shift):
            yield f"{text} (BatchNorm {name})"
    if up and not kept and stored is not None and stored.bias.any():
        for text, bias in (("is dropped", t), ("isn't scaled", stored.bias + t)):
            if _explains((original[0], bias), have, unit, np.abs(bias) + np.abs(norm.mean * s)):
                yield f"the operator's own bias {text} in the fold of BatchNorm {name}"
    if up and (order := _vector_order(right, want, have)) is not None and explained(s[order], t[order]):
        yield f"channel order: BatchNorm {name} is folded with its channels in another order, {_order(order)}"


def _map(norm: Norm) -> tuple[Array, Array]:
    with np.errstate(all="ignore"):
        return _with_gain(norm, 1 / np.sqrt(norm.var + norm.epsilon))


def _with_gain(norm: Norm, gain: Array) -> tuple[Array, Array]:
    scale = norm.gamma * gain
    return scale, norm.beta - norm.mean * scale


Refold = Callable[[Array, Array], tuple[Array, Array]]
Order = npt.NDArray[Any]


def _up(norm: Norm, want: Held, kept: bool, stored: Held | None) -> Refold | None:
    """The coefficients for another (scale, shift) of the site behind the operator."""
    s, t = _map(norm)
    channels = want.weight.shape[want.axis]
    if s.size != channels or want.bias.size != channels:
        return None
    if kept:
        return lambda scale, shift: (scale, shift)
    alive = s != 0
    own = want.bias - t
    if stored is not None and stored.weight.shape == want.weight.shape and stored.bias.size == channels:
        direct = Held(stored.weight, stored.bias, want.axis)
        if np.allclose(direct.scaled(s), want.weight, rtol=1e-9, atol=0) and np.allclose(stored.bias * s, own, rtol=1e-6, atol=1e-9):
            return lambda scale, shift: (direct.scaled(scale), stored.bias * scale + shift)
    if not alive.all():
        return None
    return lambda scale, shift: (want.scaled(scale / s), own * (scale / s) + shift)


def _down(norm: Norm, want: Held) -> Refold | None:
    """The same for a site in front of it, whose channels are the weight's inputs."""
    s, t = _map(norm)
    axes = [i for i in range(min(want.weight.ndim, 2)) if i != want.axis and want.weight.shape[i] == s.size]
    if not axes or not (s != 0).all():
        return None
    axis = axes[0]
    others = tuple(i for i in range(want.weight.ndim) if i != want.axis)

    def refold(scale: Array, shift: Array) -> tuple[Array, Array]:
        ratio, moved = (_along(v, axis, want.weight.ndim) for v in (scale / s, (shift - t) / s))
        return want.weight * ratio, want.bias + (want.weight * moved).sum(axis=others)

    return refold


def _gains(norm: Norm, want: Held, have: Held, up: bool) -> tuple[Array, Array] | None:
    """Each channel's variance plus epsilon as the candidate's weights say it, and how well they do; None where they don't."""
    axis = want.axis if up else next((i for i in range(min(want.weight.ndim, 2)) if i != want.axis), 0)
    if want.weight.shape[axis] != norm.gamma.size:
        return None
    others = tuple(i for i in range(want.weight.ndim) if i != axis)
    power = np.square(want.weight).sum(axis=others)
    with np.errstate(all="ignore"):
        ratio = (want.weight * have.weight).sum(axis=others) / power
        found = (norm.var + norm.epsilon) / np.square(ratio)
    usable = (power > 0) & np.isfinite(found) & (found > 0)
    return (np.where(usable, found, 1.0), usable) if usable.any() else None


def _epsilons(norm: Norm, gain: tuple[Array, Array]) -> Iterator[float]:
    """The epsilon that fits best, and the plainest numbers near it."""
    found, usable = gain
    weights = usable / np.square(found)
    fitted = float((weights * (found - norm.var)).sum() / weights.sum())
    if not -1e-9 <= fitted < 1e3:
        return
    tried = [float(f"{fitted:.{digits}g}") for digits in range(1, 6)]
    yield from dict.fromkeys([*(e for e in tried if e >= 0 and abs(e - fitted) <= 0.05 * abs(fitted)), max(fitted, 0.0)])


def _counts(norm: Norm, gain: tuple[Array, Array], unit: float) -> Iterator[tuple[int, int, float]]:
    """The number of elements whose n/(n - 1) fits, or the inverse of that, give or take what rounding hides; first what twos divide."""
    found, usable = gain
    with np.errstate(all="ignore"):
        weights = usable * np.square(norm.var / found)
        factor = float((weights * np.where(norm.var > 0, (found - norm.epsilon) / norm.var, 1.0)).sum() / weights.sum())
    for f, invert in ((factor, False), (1 / factor if factor > 0 else 0.0, True)):
        if 1 + 1e-7 < f <= 2.0:
            count = f / (f - 1)
            doubt = int(count * (count - 1) * unit) + 1  # one more or less changes the variance by 1/n**2
            near = sorted(range(max(2, round(count) - doubt), round(count) + doubt + 1)[:MOST], key=lambda n: (-(n & -n), abs(n - count)))
            for n in near[:4]:
                yield n, doubt, (n - 1) / n if invert else n / (n - 1)


# --- order ------------------------------------------------------------------------------------------------------------------------


def _vector_order(right: tuple[Array, Array], want: Held, have: Held) -> Order | None:
    """The order of a BatchNorm's channels that gives the candidate's scales."""
    s, _ = right
    others = tuple(i for i in range(want.weight.ndim) if i != want.axis)
    with np.errstate(all="ignore"):
        scale = s * (want.weight * have.weight).sum(axis=others) / np.square(want.weight).sum(axis=others)
    if not np.isfinite(scale).all() or s.size > MOST:
        return None
    order = np.empty(s.size, np.intp)
    order[np.argsort(scale, kind="stable")] = np.argsort(s, kind="stable")
    return None if (order == np.arange(s.size)).all() else order


def _orders(want: Held, have: Held, unit: float, groups: int, sites: list[Node]) -> Iterator[str]:
    """The candidate's coefficients are the right ones in another order."""
    still = np.abs(want.bias) + max((float(np.abs(n.attrs["norm"].mean).max(initial=0.0)) for n in sites), default=0.0)
    size = want.weight.shape[want.axis]
    scale = _scale_behind(want, sites)
    for along, when in ((np.ones(size), ""), *([(scale, " before the fold")] if scale is not None else [])):
        bare = [Held(side.scaled(1 / along), side.bias, side.axis) for side in (want, have)]
        order = _permutation(*(np.moveaxis(side.weight, side.axis, 0).reshape(size, -1) for side in bare))
        if order is None or (order == np.arange(size)).all():
            continue
        weight = Held(np.take(bare[0].weight, order, want.axis), want.bias, want.axis).scaled(along)
        for bias, what in ((want.bias[order], ""), (want.bias, " of the weight alone")):
            if _explains((weight, bias), have, unit, still):
                if groups > 1 and (named := _group_order(order, groups)):
                    yield f"group order: {named}{what}{when}"
                yield f"channel order: output channels{what} are swapped{when}, {_order(order)}"
    order = _permutation(want.bias.reshape(-1, 1), have.bias.reshape(-1, 1))
    if order is not None and not (order == np.arange(order.size)).all() and _explains((want.weight, want.bias[order]), have, unit, still):
        yield f"channel order: output channels of the bias alone are swapped, {_order(order)}"
    if want.weight.ndim >= 2:
        inner = 1 - want.axis if want.axis < 2 else 0
        if (fan_in := want.weight.shape[inner]) <= MOST:
            columns = (np.moveaxis(side.weight, inner, 0).reshape(fan_in, -1) for side in (want, have))
            order = _permutation(*columns)
            other = order is not None and not (order == np.arange(fan_in)).all()
            if order is not None and other and _explains((np.take(want.weight, order, inner), want.bias), have, unit, still):
                yield f"channel order: input channels of the weight are swapped, {_order(order)}"
    yield from _turned(want, have, unit, still, sites)


def _scale_behind(want: Held, sites: list[Node]) -> Array | None:
    """The scale that a BatchNorm gave to the output channels, if it is one alone."""
    if len(sites) != 1 or sites[0].attrs["norm"].gamma.size != want.weight.shape[want.axis]:
        return None
    scale = _map(sites[0].attrs["norm"])[0]
    return scale if np.isfinite(scale).all() and (scale != 0).all() else None


def _turned(want: Held, have: Held, unit: float, still: Array, sites: list[Node]) -> Iterator[str]:
    """A weight with two of its axes exchanged, before or after the BatchNorm was folded in."""
    shape, axis = want.weight.shape, want.axis
    behind = _scale_behind(want, sites)
    scale = np.ones(shape[axis]) if behind is None else behind
    turns: list[tuple[str, Callable[[Array], Array]]] = []
    if len(shape) >= 2 and shape[0] == shape[1]:
        turns.append(("transposed weight: input and output channels are exchanged", lambda w: w.swapaxes(0, 1)))
    if len(shape) >= 4 and shape[2] == shape[3] and shape[2] > 1:
        turns.append(("transposed weight: the kernel's height and width are exchanged", lambda w: w.swapaxes(2, 3)))
    if len(shape) >= 3 and max(shape[2:]) > 1:
        turns.append(("the kernel is flipped", lambda w: w[(slice(None), slice(None), *(slice(None, None, -1) for _ in shape[2:]))]))
    with np.errstate(all="ignore"):
        along = _along(scale, axis, len(shape))
        for text, turn in turns:
            for weight in (turn(want.weight), turn(want.weight / along) * along):
                if np.isfinite(weight).all() and _explains((weight, want.bias), have, unit, still):
                    yield text


def _permutation(want: Array, have: Array) -> Order | None:
    """For each row of `have` the row of `want` that it equals, as nearly as the numbers tell; None where that is no permutation."""
    count = len(want)
    if want.shape != have.shape or not 1 < count <= MOST or not (np.isfinite(want).all() and np.isfinite(have).all()):
        return None
    # By a few random projections, so that large weights take no time.
    axes = np.random.default_rng(0).normal(size=(want.shape[1], min(want.shape[1], 8)))
    one, other = want @ axes, have @ axes
    distance = (np.square(other)[:, None].sum(-1) + np.square(one).sum(-1)[None]) - 2 * other @ one.T
    if want.shape[1] == 1:
        distance = np.square(other - one.T)
    order = distance.argmin(axis=1)
    stays = distance[np.arange(count), np.arange(count)] <= distance.min(axis=1) * (1 + 1e-9) + 1e-24
    order = np.where(stays, np.arange(count), order)
    return order if len(set(order.tolist())) == count else None


def _group_order(order: Order, groups: int) -> str:
    size, rest = divmod(len(order), groups)
    if rest or size == 0:
        return ""
    for g, o in ((groups, size), (size, groups)):
        if size > 1 and (order == np.arange(len(order)).reshape(g, o).T.ravel()).all():
            return f"the output channels are laid out as {o} x {g} for {g} x {o}"
    blocks = order.reshape(groups, size)
    if (blocks == blocks[:, :1] + np.arange(size)).all() and (blocks[:, 0] % size == 0).all():
        return f"the groups come in the order {', '.join(str(int(b) // size) for b in blocks[:, 0][:16])}"
    return ""


def _order(order: Order) -> str:
    moved = np.flatnonzero(order != np.arange(len(order)))
    if len(moved) == 2:
        return f"{moved[0]} and {moved[1]}"
    shown = ", ".join(f"{i} holds {order[i]}" for i in moved[:4])
    return f"{shown}{' and so on' if len(moved) > 4 else ''} ({len(moved)} of {len(order)})"


# --- statistics of another checkpoint -----------------------------------------------------------------------------------------------


def _statistics(name: str, site: Node, want: Held, have: Held, unit: float) -> Iterator[str]:
    """Whether another mean and variance, whatever they are, explain all channels, and many of them are others."""
    norm: Norm = site.attrs["norm"]
    if norm.gamma.size != want.weight.shape[want.axis]:
        return
    others = tuple(i for i in range(want.weight.ndim) if i != want.axis)
    power = np.square(want.weight).sum(axis=others)
    alive = power > 0
    with np.errstate(all="ignore"):
        ratio = np.where(alive, (want.weight * have.weight).sum(axis=others) / power, 1.0)
    if not _explains((want.scaled(ratio), have.bias), have, unit, np.abs(have.bias)) or (ratio <= 0).any():
        return
    var = (norm.var + norm.epsilon) / np.square(ratio) - norm.epsilon
    wider = np.abs(ratio - 1) > SLACK * unit
    s, t = _map(norm)
    own = np.where(alive, want.bias - t, 0.0)  # the operator's own bias, scaled
    moved = np.abs(have.bias - (own * ratio + norm.beta - norm.mean * s * ratio)) > SLACK * unit * (
        np.abs(want.bias) + np.abs(norm.beta) + np.abs(norm.mean * s) + np.abs(own)
    )
    if (var[alive] < 0).any() or (wider | moved).sum() < max(2, len(ratio) / 2):
        return
    which = " and ".join(name for name, some in (("means", moved.any()), ("variances", wider.any())) if some)
    with np.errstate(all="ignore"):
        shift = np.abs(have.bias - (own * ratio + norm.beta - norm.mean * s * ratio)) / np.abs(s * ratio) / np.sqrt(norm.var + norm.epsilon)
    worst = float(shift[np.isfinite(shift)].max(initial=0.0))
    yield (
        f"statistics of another checkpoint: other running {which} in BatchNorm {name} explain all channels, as where one model was "
        f"recalibrated (variances times {1 / np.square(ratio).max():.4g} to {1 / np.square(ratio).min():.4g}, means moved by up to "
        f"{worst:.3g} standard deviations)"
    )


# --- the coefficient that is furthest off -------------------------------------------------------------------------------------------


def _worst(p: Node, q: Node) -> Cause | None:
    want, have = held(p), held(q)
    if want is None or have is None or want.weight.shape != have.weight.shape:
        return None
    names = ("gain", "shift") if "norm" in p.attrs else ("weight", "bias")
    best: tuple[float, Cause] | None = None
    for role, mine, theirs, axis in ((names[0], want.weight, have.weight, want.axis), (names[1], want.bias, have.bias, 0)):
        with np.errstate(all="ignore"):
            off = np.abs(theirs - mine) / np.maximum(np.abs(mine), np.abs(mine).mean() if mine.size else 1.0)
        off = np.where(mine == theirs, 0.0, np.where(np.isnan(off), np.inf, off))
        if off.size and (best is None or off.max() > best[0]):
            at = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
            best = float(off.max()), Cause("", "", role, at[axis], at, float(mine[at]), float(theirs[at]))
    return None if best is None else best[1]


def _rest(p: Node, q: Node) -> str:
    """Which channels are off, where they are few."""
    want, have = held(p), held(q)
    if want is None or have is None or want.weight.shape != have.weight.shape:
        return ""
    unit, others = unit_of(p, q), tuple(i for i in range(want.weight.ndim) if i != want.axis)
    off = (np.abs(want.weight - have.weight) > SLACK * unit * np.abs(want.weight)).any(axis=others)
    shifted = np.abs(want.bias - have.bias) > SLACK * unit * np.maximum(np.abs(want.bias), np.abs(want.bias).mean())
    if not (off.any() or shifted.any()):
        return "; its coefficients are right"
    parts = []
    for what, which in (("weight", np.atleast_1d(off)), ("bias", shifted)):
        channels = np.flatnonzero(which)
        if len(channels):
            shown = ", ".join(map(str, channels[:4])) + (" and others" if len(channels) > 4 else "")
            parts.append(f"its {what} is off in channel{'s' * (len(channels) > 1)} {shown} ({len(channels)} of {len(which)})")
    return "; " + ", ".join(parts)


def _along(vector: Array, axis: int, rank: int) -> Array:
    return np.reshape(vector, [-1 if i == axis else 1 for i in range(rank)])


def _place(at: Array) -> str:
    return "(" + ", ".join(str(int(i)) for i in at) + ")"
