"""The options of statistics: how they are measured, and whose."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from bnfold.errors import UsageError

from . import parse
from .common import STATISTICS, option
from .data import Feeding

if TYPE_CHECKING:
    from bnfold.recalibration.methods import Method

OWN_BATCH = 32  # samples
METHODS = "exact, precise, ioffe-szegedy, moving-average or prior"


@dataclass(frozen=True)
class Calibrating:
    """How statistics are measured."""

    method: Annotated[str, option("--method", panel=STATISTICS, metavar="NAME", help=f"{METHODS}. Default: exact.")] = "exact"
    variance: Annotated[
        str | None,
        option("--variance", panel=STATISTICS, metavar="biased|unbiased", help="M2/n or M2/(n-1). Default: as the method's source has it."),
    ] = None
    momentum: Annotated[
        str | None,
        option(
            "--momentum", panel=STATISTICS, metavar="M|none", help="moving-average: weight of the newest batch; none for the plain mean."
        ),
    ] = None
    prior: Annotated[
        float | None, option("--prior", panel=STATISTICS, min=0, metavar="N", help="prior: the old statistics count as N samples (16).")
    ] = None
    mean_shift: Annotated[bool, option("--mean-shift", panel=STATISTICS, help="prior: the variance of the mixture, means being apart.")] = (
        False
    )
    until: Annotated[
        float | None,
        option("--until", panel=STATISTICS, metavar="E", help="As many samples as bring each mean's standard error to E deviations."),
    ] = None

    def chosen(self) -> Method:
        """The method with its settings."""
        from bnfold.recalibration.methods import MovingAverage, method

        if self.variance not in (None, "biased", "unbiased"):
            raise UsageError(f"--variance {self.variance}: it is biased or unbiased")
        for name, given, owner in (
            ("--momentum", self.momentum is not None, "moving-average"),
            ("--prior", self.prior is not None, "prior"),
            ("--mean-shift", self.mean_shift, "prior"),
        ):
            if given and self.method != owner:
                raise UsageError(f"{name} is for the method {owner}, not for {self.method}")
        unbiased = None if self.variance is None else self.variance == "unbiased"
        made = method(self.method, unbiased=unbiased, strength=self.prior, mean_shift=self.mean_shift or None)
        if not isinstance(made, MovingAverage) or self.momentum is None:
            return made
        return dataclasses.replace(made, momentum=None if self.momentum == "none" else parse.numbers(self.momentum, "--momentum")[0])

    def batch_size(self, feeding: Feeding) -> int | None:
        """Where each micro-batch is normalised by itself, its size is a part of the method: 32 unless another is asked for."""
        return feeding.batch_size or (None if self.chosen().lockstep else OWN_BATCH)

    def settings(self, *, of_part: bool = False) -> dict[str, Any]:
        """The arguments of `api.recalibrate`, or of `api.measure_part`."""
        if of_part and self.until is not None:
            raise UsageError("--until looks at all data, and --shard measures a part of them; leave one out")
        return {"method": self.chosen()} | ({} if of_part else {"until": self.until})


@dataclass(frozen=True)
class Choosing:
    """Whose statistics are measured."""

    layers: Annotated[
        list[str] | None, option("--layers", panel=STATISTICS, metavar="PATTERN", help="Only BatchNorms of such names; repeatable.")
    ] = None
    skip_layers: Annotated[
        list[str] | None, option("--skip-layers", panel=STATISTICS, metavar="PATTERN", help="None of such names; repeatable.")
    ] = None
    freeze: Annotated[
        bool, option("--freeze", panel=STATISTICS, help="Give BatchNorms in training mode statistics of their own, so that they can fold.")
    ] = False

    def settings(self) -> dict[str, Any]:
        """The arguments of `api.recalibrate` and its kin."""
        return {"layers": self.layers or (), "skip_layers": self.skip_layers or (), "freeze": self.freeze}
