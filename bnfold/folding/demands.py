"""What all who read a value, taken together, want to happen to it."""

from __future__ import annotations

import contextlib

import numpy as np

from bnfold.algebra.affine import Affine, Blocked
from bnfold.algebra.graph import Node, Value, reachable
from bnfold.algebra.movement import move_up

from .duplicate import Shared
from .ways import Maps


def demanded(value: Value, demands: Maps) -> Affine:
    """What the users of a value, taken together, want to happen to it."""
    return _agreed(value, demands).settled()


def _agreed(value: Value, demands: Maps) -> Affine:
    """The same, in which elements that none of them reads are free (NaN)."""
    wishes: list[tuple[str, Affine]] = []
    all_as_is = False
    for user, i in value.users:
        if (user, i) in demands:
            wishes.append((f"is also used by {user.name}", demands[user, i]))
        elif user.op == "Move" or not all_as_is:  # one of those who read all of it speaks for the others
            wishes.append((f"is also used by {user.name}", _as_is(user, i, value)))
            all_as_is |= user.op != "Move"
    if value.is_output:
        wishes.append(("is an output of the model", Affine.identity(value.rank or 0)))
    merged = Affine(*[np.full((1,) * (value.rank or 0), np.nan)] * 2)
    # those who want a map come first, so that a conflict names one who doesn't
    for clause, a in sorted(wishes, key=lambda wish: bool(np.nan_to_num(wish[1].scale, nan=1.0).min() == 1) and wish[1].is_identity):
        scales, shifts = np.broadcast_arrays(merged.scale, a.scale), np.broadcast_arrays(merged.shift, a.shift)
        for one, other in (scales, shifts):
            if ((one != other) & ~np.isnan(one) & ~np.isnan(other)).any():
                raise Shared(f"its output {clause}", value, [use for use in value.users if use in demands])
        merged = Affine(*(np.where(np.isnan(one), other, one) for one, other in (scales, shifts)))
    return merged


def _as_is(user: Node, i: int, value: Value) -> Affine:
    """The identity on all that a user reads of a value; a move may leave some of it unread, or those behind it, and that is free."""
    if user.op == "Move" and user.output.rank is not None:
        for move in [] if "reads" in user.attrs else _unread(user):  # the same for every site: what an operator moves doesn't change
            move.attrs["reads"] = None
            with contextlib.suppress(Blocked):
                move.attrs["reads"] = move_up(move, _agreed(move.output, {}), shrink=False)
        if user.attrs["reads"] is not None:
            return user.attrs["reads"][i]  # type: ignore[no-any-return]
    return Affine.identity(value.rank or 0)


def _unread(first: Node) -> list[Node]:
    """A move, and those behind it of which isn't known yet what they read: the last first, since each reads what those behind it do."""

    def behind(node: Node) -> list[Node]:
        return [user for user, _ in node.output.users if user.op == "Move" and "reads" not in user.attrs and user.output.rank is not None]

    return sorted(reachable([first], behind), key=lambda node: -node.index)
