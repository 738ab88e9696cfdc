"""What data are before they are batches: a source of chunks, each of some samples as they were found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .spec import Array, Batch

LABELS = ("labels", "label", "y", "targets", "target")


class Counted(dict[str, Array]):
    """A batch by input name that knows how many samples it holds. One that can't be cut into any is one itself."""

    def __init__(self, arrays: Batch, samples: int) -> None:
        super().__init__(arrays)
        self.samples = samples


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some samples as they were found. where: what an error calls them. single: they were one sample without a sample axis.

    make: what makes the arrays of one sample, in place of `arrays`, where that is work to be done only when they are needed.
    """

    arrays: Batch
    labels: Array | None
    where: str
    single: bool = False
    make: Callable[[], Batch] | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """Chunks, opened anew for every pass.

    total, labels: the number of samples and their labels where these are known without a pass. count: what finds out the number without
    a pass, where that is some work.
    keep: the chunks are batches of the user's own making, kept whole unless another size is asked for.
    again: a second pass is possible. pictures: the chunks are images, one each, decoded when they are needed (`Chunk.make`).
    ahead: reading takes time, so it is done in the background. held: all data, where they are one chunk; how many samples it has depends on
    the model that they are for.
    """

    open: Callable[[], Iterator[Chunk]]
    description: str
    notes: tuple[str, ...] = ()
    total: int | None = None
    labels: Array | None = None
    keep: bool = False
    again: bool = True
    pictures: bool = False
    ahead: bool = True
    count: Callable[[], int] | None = None
    held: Chunk | None = None
