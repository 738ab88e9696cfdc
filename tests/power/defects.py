"""Seeded defects, each at one random place of a network, in ONNX and in PyTorch alike.

A defect changes the original, which is then folded rightly, or the folded network itself. `size` is how large it is: the largest change
of a coefficient in units of roundoff of the stored type, before rounding; a rounding of up to 4 units can't be told from another tool's
arithmetic. It is infinite where a defect isn't one of size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

Array = np.ndarray
STATISTICS = ("gamma", "beta", "mean", "var")


class Net(Protocol):
    """A model that defects are put into. Arrays are float64 here, and rounded to the stored type when they are put back."""

    roundoff: float

    def copy(self) -> Net: ...

    def norm(self, name: str) -> dict[str, Array]:
        """gamma, beta, mean, var."""

    def set_norm(self, name: str, **arrays: Array) -> None: ...

    def scale_epsilon(self, name: str, factor: float) -> None: ...

    def train(self, name: str) -> None: ...

    def weight(self, name: str) -> Array:
        """[out, in/groups, ...] of a convolution or linear layer."""

    def bias(self, name: str) -> Array | None: ...

    def set(self, name: str, weight: Array | None = None, bias: Array | None = None) -> None: ...

    def groups(self, name: str) -> int: ...

    def padded(self) -> list[str]:
        """The convolutions that pad with zeros."""

    def norm_before(self, name: str, arrays: dict[str, Array]) -> None:
        """Put a BatchNorm in front of a convolution."""

    def second_output(self) -> None:
        """Give out one thing more."""


class OnnxNet:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.arrays = {t.name: t for t in model.graph.initializer}
        self.nodes = {n.name: n for n in model.graph.node}
        kinds = {numpy_helper.to_array(t).dtype for t in model.graph.initializer if t.data_type in (1, 10)}
        self.roundoff = float(np.finfo(max(kinds, key=lambda kind: np.finfo(kind).eps)).eps) / 2

    def copy(self) -> OnnxNet:
        return OnnxNet(copy.deepcopy(self.model))

    def _read(self, name: str) -> Array:
        return numpy_helper.to_array(self.arrays[name]).astype(np.float64)

    def _write(self, name: str, array: Array) -> None:
        tensor = self.arrays[name]
        tensor.CopyFrom(numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(tensor.data_type)), name))

    def norm(self, name: str) -> dict[str, Array]:
        return dict(zip(STATISTICS, map(self._read, self.nodes[name].input[1:5]), strict=True))

    def set_norm(self, name: str, **arrays: Array) -> None:
        for role, array in arrays.items():
            self._write(self.nodes[name].input[1 + STATISTICS.index(role)], array)

    def scale_epsilon(self, name: str, factor: float) -> None:
        next(a for a in self.nodes[name].attribute if a.name == "epsilon").f *= factor

    def train(self, name: str) -> None:
        node = self.nodes[name]
        kept = [a for a in node.attribute if a.name != "training_mode"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("training_mode", 1)])
        node.output.extend([f"{name}.mean", f"{name}.var"])

    def _transposed(self, name: str) -> bool:
        node = self.nodes[name]
        return node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)

    def weight(self, name: str) -> Array:
        array = self._read(self.nodes[name].input[1])
        return array.T if self._transposed(name) else array

    def bias(self, name: str) -> Array | None:
        inputs = self.nodes[name].input
        return self._read(inputs[2]) if len(inputs) > 2 and inputs[2] in self.arrays else None

    def set(self, name: str, weight: Array | None = None, bias: Array | None = None) -> None:
        node = self.nodes[name]
        if weight is not None:
            self._write(node.input[1], weight.T if self._transposed(name) else weight)
        if bias is not None and len(node.input) > 2:
            self._write(node.input[2], bias)
        elif bias is not None:
            kind = helper.tensor_dtype_to_np_dtype(self.arrays[node.input[1]].data_type)
            self.model.graph.initializer.append(numpy_helper.from_array(bias.astype(kind), f"{name}.new_bias"))
            node.input.append(f"{name}.new_bias")

    def groups(self, name: str) -> int:
        return next((a.i for a in self.nodes[name].attribute if a.name == "group"), 1)

    def padded(self) -> list[str]:
        pads = {
            n.name: list(next((a.ints for a in n.attribute if a.name == "pads"), ())) for n in self.nodes.values() if n.op_type == "Conv"
        }
        return [name for name, found in pads.items() if any(found)]

    def norm_before(self, name: str, arrays: dict[str, Array]) -> None:
        node = self.nodes[name]
        kind = helper.tensor_dtype_to_np_dtype(self.arrays[node.input[1]].data_type)
        names = [f"{name}.before.{role}" for role in STATISTICS]
        self.model.graph.initializer.extend(
            numpy_helper.from_array(arrays[role].astype(kind), n) for role, n in zip(STATISTICS, names, strict=True)
        )
        made = helper.make_node("BatchNormalization", [node.input[0], *names], [f"{name}.before"], name=f"{name}.before", epsilon=1e-5)
        node.input[0] = f"{name}.before"
        place = next(i for i, n in enumerate(self.model.graph.node) if n.name == name)
        self.model.graph.node.insert(place, made)

    def second_output(self) -> None:
        graph = self.model.graph
        graph.node.append(helper.make_node("Neg", [graph.output[0].name], ["second"], name="second"))
        made = graph.output.add()
        made.CopyFrom(graph.output[0])
        made.name = "second"


class _Answers(nn.Module):
    """The network, and its output under a name, with another or without."""

    def __init__(self, network: nn.Module, name: str, second: bool) -> None:
        super().__init__()
        self.network, self.name, self.second = network, name, second

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.network(x)
        return {self.name: y} | ({"second": -y} if self.second else {})


class TorchNet:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.roundoff = float(torch.finfo(next(model.parameters()).dtype).eps) / 2

    def copy(self) -> TorchNet:
        return TorchNet(copy.deepcopy(self.model))

    def _at(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def norm(self, name: str) -> dict[str, Array]:
        at = self._at(name)
        return {
            role: t.detach().double().numpy()
            for role, t in zip(STATISTICS, (at.weight, at.bias, at.running_mean, at.running_var), strict=True)
        }

    def set_norm(self, name: str, **arrays: Array) -> None:
        at = self._at(name)
        places = dict(zip(STATISTICS, (at.weight, at.bias, at.running_mean, at.running_var), strict=True))
        with torch.no_grad():
            for role, array in arrays.items():
                places[role].copy_(torch.from_numpy(array))

    def scale_epsilon(self, name: str, factor: float) -> None:
        self._at(name).eps *= factor

    def train(self, name: str) -> None:
        self._at(name).train()

    def weight(self, name: str) -> Array:
        return self._at(name).weight.detach().double().numpy()

    def bias(self, name: str) -> Array | None:
        bias = self._at(name).bias
        return None if bias is None else bias.detach().double().numpy()

    def set(self, name: str, weight: Array | None = None, bias: Array | None = None) -> None:
        at = self._at(name)
        kind = at.weight.dtype
        for role, array in (("weight", weight), ("bias", bias)):
            if array is not None:
                setattr(at, role, nn.Parameter(torch.from_numpy(np.ascontiguousarray(array)).to(kind), requires_grad=False))

    def groups(self, name: str) -> int:
        return int(getattr(self._at(name), "groups", 1))

    def padded(self) -> list[str]:
        named = self.model.named_modules()
        return [n for n, m in named if isinstance(m, nn.Conv2d) and m.padding_mode == "zeros" and m.padding not in ((0, 0), "valid")]

    def norm_before(self, name: str, arrays: dict[str, Array]) -> None:
        at = self._at(name)
        made = nn.BatchNorm2d(len(arrays["gamma"])).to(at.weight.dtype).eval()
        parent, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(parent), last, nn.Sequential(made, at))
        self.set_norm(f"{name}.0", **arrays)

    def second_output(self) -> None:
        self.model = _Answers(self.model, "y", True)


@dataclass(frozen=True)
class Site:
    """A BatchNorm and the layer that it folds into, "" where it stays. merged: whether other branches go into that layer too."""

    norm: str
    into: str
    merged: bool = False


@dataclass
class Seeded:
    """reference and candidate, of which the second is wrong. size: see above."""

    reference: Net
    candidate: Net
    size: float


Fold = Callable[[Net], Net]
Defect = Callable[[Net, Net, list[Site], Fold, np.random.Generator], "Seeded | None"]
DEFECTS: dict[str, Defect] = {}


def defect(title: str) -> Callable[[Defect], Defect]:
    def enter(function: Defect) -> Defect:
        DEFECTS[title] = function
        return function

    return enter


def _upwards(net: Net, folded: Net, sites: list[Site], *, merged: bool = True) -> list[Site]:
    """Those whose layer has as many outputs as the BatchNorm has channels. merged: those too of which only a part is the BatchNorm's."""
    sites = [s for s in sites if merged or not s.merged]
    return [s for s in sites if s.into and len(net.norm(s.norm)["gamma"]) == len(folded.weight(s.into)) and folded.bias(s.into) is not None]


def _one(rng: np.random.Generator, items: list[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


def _off(old: Array, new: Array, roundoff: float) -> float:
    """The largest change, in units of roundoff of the number itself."""
    with np.errstate(all="ignore"):
        return float(np.nanmax(np.where(old == new, 0.0, np.abs(new - old) / (roundoff * np.abs(old)))))


@defect("one channel's weight off by 1e-3")
def _weight(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    if not (places := _upwards(net, folded, sites)):
        return None
    site, wrong = _one(rng, places), folded.copy()
    weight = wrong.weight(site.into).copy()
    weight[rng.integers(len(weight))] *= 1.001
    wrong.set(site.into, weight)
    return Seeded(net, wrong, 1e-3 / net.roundoff)


@defect("a bias off by 1e-3 of its channel's deviation")
def _bias(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    if not (places := _upwards(net, folded, sites, merged=False)):
        return None
    site, wrong = _one(rng, places), folded.copy()
    bias, norm = wrong.bias(site.into), net.norm(site.norm)
    assert bias is not None
    c = int(rng.integers(len(bias)))
    delta = 1e-3 * abs(norm["gamma"][c])
    bias = bias.copy()
    bias[c] += delta
    wrong.set(site.into, bias=bias)
    summands = _summands(norm)[c]
    for other in sites:  # a BatchNorm in front of the layer adds as much as its weights make of it
        if other.into == site.into and other.norm != site.norm:
            rows = np.abs(net.weight(site.into)).reshape(len(bias), -1).sum(1)
            summands += float(rows.max() * _summands(net.norm(other.norm)).max())
    return Seeded(net, wrong, delta / (net.roundoff * max(summands, abs(bias[c]))))


def _summands(norm: dict[str, Array]) -> Array:
    """What a shift t is made of, which may cancel, as level 1 counts it: 2 |t| + 2 |s*mean|."""
    product = norm["gamma"] * norm["mean"] / np.sqrt(norm["var"] + 1e-5)
    return 2 * np.abs(norm["beta"] - product) + 2 * np.abs(product)


@defect("two channels swapped")
def _swap(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    if not (places := _upwards(net, folded, sites)):
        return None
    site, wrong = _one(rng, places), folded.copy()
    weight = wrong.weight(site.into).copy()
    a, b = rng.choice(len(weight), 2, replace=False)
    weight[[a, b]] = weight[[b, a]]
    wrong.set(site.into, weight)
    return Seeded(net, wrong, np.inf)


@defect("epsilon 1.1e-5 for 1e-5")
def _epsilon(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    if not (places := [site for site in sites if not site.merged]):
        return None
    site, wrong = _one(rng, places), net.copy()
    wrong.scale_epsilon(site.norm, 1.1)
    least = net.norm(site.norm)["var"].min()
    return Seeded(net, fold(wrong), 0.5 * 1e-6 / least / net.roundoff)


@defect("unbiased variance, n = 32")
def _unbiased(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    site, wrong = _one(rng, sites), net.copy()
    wrong.set_norm(site.norm, var=net.norm(site.norm)["var"] * 32 / 31)
    return Seeded(net, fold(wrong), 0.5 / 31 / net.roundoff)


@defect("mean not subtracted")
def _mean(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    site, wrong = _one(rng, sites), net.copy()
    wrong.set_norm(site.norm, mean=0 * net.norm(site.norm)["mean"])
    return Seeded(net, fold(wrong), np.inf)


@defect("stale statistics")
def _stale(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    """Of some steps before: means moved by 5 % of a deviation, variances by 10 %."""
    site, wrong = _one(rng, sites), net.copy()
    now = net.norm(site.norm)
    moved = {"mean": now["mean"] + 0.05 * np.sqrt(now["var"]) * rng.standard_normal(len(now["var"])), "var": now["var"] * 1.1}
    wrong.set_norm(site.norm, **moved)
    return Seeded(net, fold(wrong), 0.05 / net.roundoff)


@defect("groups in the wrong order")
def _groups(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    grouped = [s for s in _upwards(net, folded, sites) if folded.groups(s.into) > 1]
    if not grouped:
        return None
    site, wrong = _one(rng, grouped), folded.copy()
    weight, g = wrong.weight(site.into), wrong.groups(site.into)
    per = len(weight) // g
    mixed = weight.reshape(g, per, *weight.shape[1:]).swapaxes(0, 1).reshape(weight.shape)
    wrong.set(site.into, mixed if per > 1 else weight[::-1].copy())
    return Seeded(net, wrong, np.inf)


@defect("axis confused at equal sizes")
def _axis(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    square = [s for s in _upwards(net, folded, sites, merged=False) if net.weight(s.into).shape[0] == net.weight(s.into).shape[1] > 1]
    if not square:
        return None
    site, wrong = _one(rng, square), net.copy()
    norm, weight = net.norm(site.norm), net.weight(site.into)
    scale = norm["gamma"] / np.sqrt(norm["var"] + 1e-5)
    rest = (1,) * (weight.ndim - 2)
    wrong.set(site.into, weight * scale.reshape(1, -1, *rest) / scale.reshape(-1, 1, *rest))
    return Seeded(net, fold(wrong), np.inf)


@defect("shift folded through zero padding")
def _padding(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    if not (places := net.padded()):
        return None
    name = _one(rng, places)
    right, wrong = net.copy(), net.copy()
    weight, groups = net.weight(name), net.groups(name)
    n = weight.shape[1] * groups
    arrays = {"gamma": rng.uniform(0.5, 1.5, n), "beta": rng.normal(0, 0.3, n), "mean": np.zeros(n), "var": np.ones(n)}
    right.norm_before(name, arrays)
    rest = (1,) * (weight.ndim - 2)
    per_output = {role: np.repeat(arrays[role].reshape(groups, -1), len(weight) // groups, axis=0) for role in ("gamma", "beta")}
    scale = per_output["gamma"].reshape(len(weight), -1, *rest) / np.sqrt(1 + 1e-5)
    added = (weight * per_output["beta"].reshape(len(weight), -1, *rest)).reshape(len(weight), -1).sum(1)
    bias = net.bias(name)
    wrong.set(name, weight * scale, added if bias is None else bias + added)
    return Seeded(right, fold(wrong), np.inf)


@defect("NaN in a weight")
def _nan(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    if not (places := [site for site in sites if site.into]):
        return None
    site, wrong = _one(rng, places), folded.copy()
    weight = wrong.weight(site.into).copy()
    weight.flat[rng.integers(weight.size)] = np.nan
    wrong.set(site.into, weight)
    return Seeded(net, wrong, np.inf)


@defect("training mode left on")
def _training(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    wrong = net.copy()
    wrong.train(_one(rng, sites).norm)
    return Seeded(net, wrong, np.inf)


@defect("an output missing")
def _missing(net: Net, folded: Net, sites: list[Site], fold: Fold, rng: np.random.Generator) -> Seeded | None:
    right, wrong = net.copy(), folded.copy()
    right.second_output()
    if isinstance(wrong, TorchNet):
        wrong.model = _Answers(wrong.model, "y", False)
    return Seeded(right, wrong, np.inf)
