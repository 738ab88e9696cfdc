"""Count, mean and squared deviations per channel, pooled over micro-batches without loss.

The sums of squares are taken around the mean of a block that fits the cache and pooled by the pairwise formula of Chan, Golub & LeVeque
("Updating formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1), in float64. E[x^2] - E[x]^2 is never
formed: in float32 it gives 8.0 for a true variance of 1.0 at mean 1e4.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bnfold.algebra.affine import Array

J = TypeVar("J")
R = TypeVar("R")
BLOCK = 1 << 16  # elements: 512 KiB in float64, which stays in a core's second-level cache over both passes
PARALLEL = 1 << 19  # elements below which starting a second thread costs more than it saves


@dataclass(frozen=True, eq=False)
class Samples:
    """Each sample by itself, where all have as many elements: what `Moments` are made of, many micro-batches at once (see `pool`).

    size: elements per channel of each sample. mean, m2: float64 [samples, C].
    """

    size: int
    mean: Array
    m2: Array

    @property
    def count(self) -> int:
        """Elements per channel."""
        return self.size * len(self.mean)


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of each channel of the data so far.

    count: elements per channel. mean, m2: float64 [C], the mean and the sum of squared deviations from it. samples: entries along
    the batch axis. weight, spread: how the samples differ among themselves, which the standard errors come from. With n_i elements of
    sample i, d_i their mean less the mean of all, and u_i their squared deviations from the mean of all: weight is sum n_i^2, and
    spread, float64 [5, C], is the sums of n_i^2 d_i, n_i^2 d_i^2, n_i u_i, n_i d_i u_i and u_i^2.
    """

    count: int
    mean: Array
    m2: Array
    samples: int
    weight: float
    spread: Array

    @classmethod
    def empty(cls, channels: int) -> Moments:
        return cls(0, np.zeros(channels), np.zeros(channels), 0, 0.0, np.zeros((5, channels)))

    @classmethod
    def of_samples(cls, parts: Sequence[Samples]) -> Moments:
        """Of samples that all have as many elements."""
        size, means, m2 = parts[0].size, *(np.concatenate([getattr(part, name) for part in parts]) for name in ("mean", "m2"))
        samples = len(means)
        mean = means.mean(0) if samples else np.zeros(means.shape[1])
        off = means - mean
        about = m2 + size * off * off
        return cls(samples * size, mean, about.sum(0), samples, float(samples * size * size), _spread(size, off, about))

    def variance(self, unbiased: bool = False) -> Array:
        """M2/n, the variance of these data, as one batch of them all is normalised by; NaN for no data.

        unbiased: M2/(n-1) instead, the estimate for the distribution that the data came from (Ioffe & Szegedy 2015, Algorithm 2,
        line 10), which PyTorch keeps in running_var. The two differ by a factor 1 - 1/n.
        """
        n = self.count - 1 if unbiased else self.count
        return self.m2 / n if n > 0 else np.full_like(self.m2, np.nan)

    def standard_error(self) -> Array:
        """Standard error of the mean, taking samples and not elements as independent; infinite for fewer than two samples.

        Neighbouring pixels resemble each other, so sqrt(var/n) would promise too much. A mean over samples of n_i elements is a ratio
        of two sums, of variance sum n_i^2 (mean_i - mean)^2 / n^2 * S/(S-1) with S samples (Cochran, "Sampling Techniques", 3rd ed.,
        1977, eq. 9A.4 without finite-population term); for one element per sample that is M2/(n (n-1)), the textbook's.
        """
        return self._error(self.spread[1])

    def variance_error(self) -> Array:
        """Standard error of the variance M2/n, with samples as the independent units; infinite for fewer than two samples.

        The same formula for the ratio sum u_i / sum n_i: sum (u_i - n_i var)^2 / n^2 * S/(S-1), which takes the data's own kurtosis
        into account (for one normal element per sample it tends to 2 var^2 / n).
        """
        variance = self.variance()
        return self._error(self.spread[4] - 2 * variance * self.spread[2] + variance * variance * self.weight)

    def _error(self, squares: Array) -> Array:
        if self.samples < 2:
            return np.full_like(self.mean, np.inf)
        error: Array = np.sqrt(np.maximum(squares, 0) * (self.samples / (self.samples - 1))) / self.count
        return error

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of data together."""
        if not self.count or not other.count:
            return other if other.count else self
        return _pooled((self, other))


def pool(parts: Iterable[Moments | Samples]) -> Moments:
    """The moments of all parts together; there must be at least one."""
    every, alike = [], dict[int, list[Samples]]()
    for part in parts:
        if isinstance(part, Samples):
            alike.setdefault(part.size, []).append(part)
        else:
            every.append(part)
    every += map(Moments.of_samples, alike.values())
    filled = [part for part in every if part.count] or every[:1]
    return filled[0] if len(filled) == 1 else _pooled(filled)


def _spread(size: float, off: Array, about: Array) -> Array:
    """Moments.spread of samples of one size. off, about: [samples, C], their d and u."""
    sums = (size * size * off.sum(0), size * size * _dot(off, off), size * about.sum(0), size * _dot(off, about), _dot(about, about))
    return np.stack(sums)


def _dot(x: Array, y: Array) -> Array:
    found: Array = np.einsum("nc,nc->c", x, y)
    return found


def _pooled(parts: Sequence[Moments]) -> Moments:
    """Chan's formula for any number of parts at once, M2 = sum M2_i + sum n_i (mean_i - mean)^2, and the spreads about the new mean."""
    counts, a = (np.array([getattr(part, name) for part in parts], float)[:, None] for name in ("count", "weight"))
    means, m2 = (np.stack([getattr(part, name) for part in parts]) for name in ("mean", "m2"))
    d, dd, nu, du, uu = np.stack([part.spread for part in parts], axis=1)
    mean = (counts * means).sum(0) / max(counts.sum(), 1)
    s = mean - means
    moved = (
        d - s * a,
        dd - 2 * s * d + s * s * a,
        nu - 2 * s * d + s * s * a,
        du - 2 * s * dd + 3 * s * s * d - s * nu - s**3 * a,
        uu - 4 * s * du + 4 * s * s * dd + 2 * s * s * nu - 4 * s**3 * d + s**4 * a,
    )
    return Moments(
        count=sum(part.count for part in parts),
        mean=mean,
        m2=(m2 + counts * s * s).sum(0),
        samples=sum(part.samples for part in parts),
        weight=sum(part.weight for part in parts),
        spread=np.stack([each.sum(0) for each in moved]),
    )


@dataclass(frozen=True, eq=False)
class Pointwise:
    """A convolution whose kernel is one position: it gives W x + b of the channels at each.

    weight: [C_out, C_in], bias: [C_out] or None, float64, in whatever array type the moments are computed.
    """

    weight: Any
    bias: Any

    @staticmethod
    def pays(into: int, out: int, size: int) -> bool:
        """Whether what it gives, of `size` positions, costs more to compute than its moments do without it.

        The moments take C_in^2 multiply-adds for each position and C_out C_in^2 for each sample, in float64; the convolution C_out C_in
        for each position. So a convolution pays that gives several times the channels that it takes, over a large image.
        """
        return 2 * into * (size + out) <= out * size

    def moments(self, mean: Any, products: Any) -> tuple[Any, Any]:
        """Mean and M2 of each sample's output, [..., C_out], from the mean m and the sum of (x - m)(x - m)^T of its input.

        mean: [..., C_in]; products: [..., C_in, C_in]. An affine map takes a mean m and a covariance C to W m + b and W C W^T
        (Petersen & Pedersen, "The Matrix Cookbook", 2012, equations 315 and 313). In float64 that is nearer to what the exact outputs
        have than sums over outputs in float32 are, since those were rounded.
        """
        carried = mean @ self.weight.T
        return carried if self.bias is None else carried + self.bias, ((self.weight @ products) * self.weight).sum(-1)


def measure_samples(x: npt.NDArray[Any]) -> Moments | Samples:
    """What the moments of each channel are made of, from [samples, C, ...].

    x: any floating-point type (ml_dtypes' too) and any rank from 2. Memory beside x: a block per thread and two float64 numbers per
    sample and channel where x is C-contiguous, and a copy of x otherwise. Time: about 1.2 ns per float32 element and core.
    """
    samples, channels = x.shape[:2]
    rows = np.ascontiguousarray(x).reshape(samples, channels, math.prod(x.shape[2:]))
    size = rows.shape[2]
    if not rows.size:
        return Moments.empty(channels)
    if size == 1:
        several = max(1, BLOCK // channels)
        return _pooled(_each(lambda a: _flat(rows[a : a + several, :, 0]), range(0, samples, several), rows.size))

    # A block is a band of channels of some whole samples, or a piece of one that alone would not fit the cache.
    piece = min(size, BLOCK)
    pieces = -(-size // piece)
    band = min(channels, max(1, BLOCK // piece, 1024 // size))
    several = max(1, BLOCK // (band * piece)) if pieces == 1 else 1
    means, m2 = np.empty((2, samples, pieces, channels))

    def work(job: tuple[int, int, int]) -> None:
        a, c, p = job
        at = (slice(a, a + several), p, slice(c, c + band))
        means[at], m2[at] = _block(rows[a : a + several, c : c + band, p * piece : (p + 1) * piece])

    _each(work, [(a, c, p) for a in range(0, samples, several) for p in range(pieces) for c in range(0, channels, band)], rows.size)
    if pieces == 1:
        return Samples(size, means[:, 0], m2[:, 0])
    counts = np.diff([*range(0, size, piece), size]).astype(float)[:, None]
    whole = (counts * means).sum(1) / size
    return Samples(size, whole, m2.sum(1) + (counts * np.square(means - whole[:, None])).sum(1))


def measure_through(x: npt.NDArray[Any], pointwise: Pointwise) -> Samples:
    """What the moments of a pointwise convolution's output are made of, from its input [samples, C_in, ...]."""
    rows = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    samples, size = len(rows) if rows.size else 0, rows.shape[2]
    means, m2 = np.empty((2, samples, len(pointwise.weight)))
    for i in range(samples):
        d = np.array(rows[i], np.float64)
        mean = np.einsum("cl->c", d) / size
        d -= mean[:, None]
        means[i], m2[i] = pointwise.moments(mean, d @ d.T)
    return Samples(size, means, np.maximum(m2, 0))


def _flat(x: npt.NDArray[Any]) -> Moments:
    """Of samples of one element per channel, [samples, C]."""
    d = np.array(x, np.float64)
    mean = d.mean(0)
    d -= mean
    squares = d * d
    m2 = np.einsum("nc->c", squares)
    spread = np.stack([np.zeros_like(m2), m2, m2, _dot(d, squares), _dot(squares, squares)])
    return Moments(len(d), mean, m2, len(d), float(len(d)), spread)


def _block(x: npt.NDArray[Any]) -> tuple[Array, Array]:
    """Mean and M2 of each sample and channel of a block [samples, channels, size]: two passes over a float64 copy in the cache."""
    d = np.array(x, np.float64)
    mean = np.einsum("ncl->nc", d) / x.shape[2]  # three times faster than sum() along a short axis
    d -= mean[..., None]
    return mean, (d[..., None, :] @ d[..., None])[..., 0, 0]


def _each(work: Callable[[J], R], jobs: Sequence[J], elements: int) -> list[R]:
    """The outcomes of all jobs, on several threads where there is enough to do."""
    threads = _threads() if elements >= PARALLEL else 1
    if threads == 1:
        return [work(job) for job in jobs]
    shares = _workers().map(lambda share: [work(job) for job in share], [jobs[i::threads] for i in range(threads)])
    found: list[Any] = [None] * len(jobs)
    for i, share in enumerate(shares):
        found[i::threads] = share
    return found


def _threads() -> int:
    """At most four: beyond that the memory's bandwidth is the limit."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, 4)


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), thread_name_prefix="bnfold-moments")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # a child has none of its parent's threads
