"""Equal ranges of the channels of weights, for quantisers that have one scale for a whole tensor.

For a channel between two linear layers whose largest weights are r1 and r2, the scale s = sqrt(r2 / r1) makes both sqrt(r1 * r2) (Nagel et
al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, section 4.1). Where several layers make a channel, or read
it, r1 and r2 are geometric means, so that no layer counts for more because all of its weights are large. Layers between two such scales are
visited until nothing moves. In real arithmetic the network computes the same. The paper's further steps don't keep that, and aren't taken
here: a ReLU6 is no ReLU, and high biases and rounding are matters of data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bnfold.algebra.affine import Array, Blocked
from bnfold.algebra.graph import Graph, Node, Param, Site
from bnfold.report import Equalised

from .feasible import checked
from .scales import SAME, ScaleGroup, groups

SWEEPS = 1000  # at most
AT_ONCE = 5  # sweeps before which all layers are looked at together
SETTLED = 0.005  # octaves by which nothing moves any more: ranges then match to within 0.7 %
# A channel's factor stays within this of its layer's: one that needs more is as good as dead. In half precision all factors stay below the
# fourth root of what the type holds, since a scaled bias is a scaled activation.
LARGEST = 4096.0
HALF = 1e6


@dataclass(frozen=True)
class _Use:
    """Where a weight is scaled by a group's channels. channels: of which, by element, -1 for none; sign: 1 where it makes them, else -1."""

    weight: npt.NDArray[np.float32]  # magnitudes, the largest along axes on which no scale varies
    channels: npt.NDArray[np.int64]
    sign: int
    group: int


def equalise(graph: Graph, barred: Mapping[Node, str]) -> tuple[list[Equalised], list[Node]]:
    """Equalise all ranges that can be; the updates are left in the graph's parameters. Also the nodes that they are of.

    barred: operators that may take no part, each with the reason.
    """
    found: dict[int, Equalised] = {}
    met: dict[int, ScaleGroup] = {}
    for node, group in groups(graph, barred):
        reason = group if isinstance(group, str) else _quantised(group)
        if isinstance(group, ScaleGroup) and not reason:
            met[node.index] = group
        else:
            found[node.index] = Equalised((node.name,), (), reason)
    changed: list[Node] = []
    for (index, group), octaves in zip(met.items(), _matched([*met.values()]), strict=True):
        makers, readers = _ends(group)
        reason, factor = "" if readers else "no layer with weights reads it", 1.0
        if octaves.any():
            try:
                draft = group.scaled(np.exp2(octaves)).draft
                draft = checked(graph, Site(group.start.name, [], group.size, is_batchnorm=False), draft)
            except Blocked as blocked:
                reason = str(blocked)
            else:
                for (node, role), update in draft.items():
                    node.params[role].update = node.params[role].updated(update)
                    changed.append(node)
                factor = float(np.exp2(np.abs(octaves).max()))
        found[index] = Equalised(makers, readers, reason, factor)
    return [each for _, each in sorted(found.items())], changed


def _quantised(group: ScaleGroup) -> str:
    """Why integers stay as they are; "" where there are none."""
    tensors = ((node, role, node.params[role].tensor) for node, role in group.draft)
    stuck = (f"the {role} of {node.name} is quantised already" for node, role, tensor in tensors if tensor and tensor.quantised)
    return next(stuck, "")


def _weights(group: ScaleGroup) -> Iterator[tuple[Node, str, Array]]:
    """The weights that a group scales, with what the probe makes of each."""
    for (node, role), update in group.draft.items():
        if role.startswith("weight") and np.abs(update.scale - 1).max(initial=0.0) > SAME:
            yield node, role, update.settled().scale


def _ends(group: ScaleGroup) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers that make a group's channels, and those that read them."""
    weights = list(_weights(group))
    makers = dict.fromkeys(node.name for node, _, scale in weights if scale.max() > 1)
    return tuple(makers), tuple(dict.fromkeys(node.name for node, _, scale in weights if scale.min() < 1))


def _matched(met: list[ScaleGroup]) -> list[Array]:
    """For each group, the scales of its channels in octaves, at which the ranges on both sides match."""
    by_weight: dict[tuple[Node, str], list[tuple[int, Array]]] = {}
    for k, group in enumerate(met):
        for node, role, scale in _weights(group):
            by_weight.setdefault((node, role), []).append((k, scale))
    uses: list[list[list[_Use]]] = [[] for _ in met]  # for each group its uses, each with those that other groups make of the weight
    most = np.full(len(met), np.inf)  # octaves
    for (node, role), scales in by_weight.items():
        param = node.params[role]
        magnitudes = _magnitudes(param, [scale for _, scale in scales])
        known = [(k, _channels(scale, met[k].size)) for k, scale in scales]
        alike = [_Use(magnitudes, channels[0], channels[1], k) for k, channels in known if channels is not None]
        for use in alike:
            uses[use.group].append([use, *(other for other in alike if other is not use)])
            if param.tensor is not None and param.tensor.limit < HALF:
                most[use.group] = min(most[use.group], np.log2(param.tensor.limit) / 4)
    octaves = [np.zeros(group.size + 1) for group in met]  # and one that stays 0, for what isn't scaled
    for sweep in range(SWEEPS):
        if sweep < AT_ONCE:
            gaps = [_gaps(each, octaves, len(own) - 1) for each, own in zip(uses, octaves, strict=True)]
            for own, gap, shift in zip(octaves, gaps, _shifts(uses, gaps), strict=True):
                own[:-1] += np.where(np.isnan(gap), 0.0, shift)
        moved = 0.0
        for own, each, limit in zip(octaves, uses, most, strict=True):
            new = own[:-1] + _gaps(each, octaves, len(own) - 1) / 2
            if (live := ~np.isnan(new)).any():
                middle = np.median(new[live])
                new = new.clip(middle - np.log2(LARGEST), middle + np.log2(LARGEST)).clip(-limit, limit)
                moved = max(moved, float(np.abs(new - own[:-1])[live].max()))
                own[:-1][live] = new[live]
        if moved <= SETTLED:
            break
    return [each[:-1] for each in octaves]


def _gaps(uses: list[list[_Use]], octaves: list[Array], size: int) -> Array:
    """By how much a group's channels range further in the layers that read them than in those that make them; NaN where one side lacks."""
    read, made = (_mean([_range(own, octaves, size) for own in uses if own[0].sign == sign], size) for sign in (-1, 1))
    return read - made


def _mean(ranges: list[Array], size: int) -> Array:
    found = np.array(ranges).reshape(-1, size)
    finite = np.isfinite(found)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(finite, found, 0.0).sum(axis=0) / finite.sum(axis=0))


def _shifts(uses: list[list[list[_Use]]], gaps: Sequence[Array]) -> Array:
    """What to add to all channels of each group to close the mean gaps: group by group that takes as many sweeps as there are layers."""
    means = [float(gap[~np.isnan(gap)].mean()) if (~np.isnan(gap)).any() else np.nan for gap in gaps]
    effects = np.zeros((len(uses), len(uses)))
    for k, each in enumerate(uses):
        for own in each:
            alike = sum(other[0].sign == own[0].sign for other in each)
            for use in own:
                if not np.isnan(means[k] + means[use.group]):
                    effects[k, use.group] -= own[0].sign * use.sign / alike
    return np.asarray(np.linalg.lstsq(effects, -np.nan_to_num(means), rcond=1e-9)[0])


def _magnitudes(param: Param, scales: list[Array]) -> npt.NDArray[np.float32]:
    weight = np.abs(param.read())
    still = tuple(axis for axis in range(weight.ndim) if all(scale.shape[axis] == 1 for scale in scales))
    with np.errstate(over="ignore"):
        return np.asarray(weight.max(axis=still, keepdims=True, initial=0.0).astype(np.float32))


def _channels(scale: Array, size: int) -> tuple[npt.NDArray[np.int64], int] | None:
    """Which channel's probe a scale is, by element, and whether as it is or inverted; None where it is made of several."""
    sign = -1 if scale.min() < 1 else 1
    number = (scale**sign - 1) * size
    channels = np.rint(number).astype(np.int64)
    if (np.abs(number - channels) > SAME * size).any() or channels.min() < 0 or channels.max() > size:
        return None
    return channels - 1, sign


def _range(own: list[_Use], octaves: list[Array], size: int) -> Array:
    """The largest weight of each channel, in octaves; not finite where there is none that counts."""
    first = own[0]
    weight = first.weight * np.exp2(sum(use.sign * octaves[use.group][use.channels] for use in own))
    still = tuple(axis for axis in range(weight.ndim) if first.channels.shape[axis] == 1)
    largest = np.zeros(size + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.maximum.at(largest, first.channels.ravel(), weight.max(axis=still, keepdims=True).ravel())
        return np.asarray(np.log2(largest[:-1]))
