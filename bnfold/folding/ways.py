"""A search for a way on which maps get through: depth first, one state per choice."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bnfold.algebra.affine import Affine, Blocked
from bnfold.algebra.graph import Node
from bnfold.algebra.rule import Step

from .duplicate import Shared
from .feasible import Draft

Maps = dict[Any, Affine]  # going up, what each (user, input) demands; going down, what each value carries

T = TypeVar("T")
ATTEMPTS = 64  # how many ways through the sums and products of one network are tried for one site


@dataclass
class State:
    agenda: list[tuple[int, Node]] = field(default_factory=list)  # a heap, the next to visit first
    waiting: set[Node] = field(default_factory=set)  # those in it
    maps: Maps = field(default_factory=dict)
    draft: Draft = field(default_factory=dict)
    fail: Blocked | None = None

    def visit(self, node: Node, sign: int) -> None:
        """sign: 1 for an order from the front to the back, -1 for the reverse."""
        if node not in self.waiting:
            self.waiting.add(node)
            heapq.heappush(self.agenda, (sign * node.index, node))

    def next(self) -> Node:
        _, node = heapq.heappop(self.agenda)
        self.waiting.remove(node)
        return node

    def copy(self) -> State:
        return State(list(self.agenda), set(self.waiting), dict(self.maps), dict(self.draft))

    def take(self, node: Node, step: Step) -> State:
        self.draft.update({(node, role): update for role, update in step.updates.items()})
        return self


def search(start: State, advance: Callable[[State], list[State]], accept: Callable[[State], T]) -> T:
    """What is accepted of the end of the first way on which nothing is blocked; else why the first such end isn't, or the first way is."""
    stack, first, unfit = [start], None, None
    for _ in range(ATTEMPTS):
        state = stack.pop()
        try:
            while state.agenda and state.fail is None:
                state, *others = advance(state)
                stack.extend(reversed(others))
            if state.fail is not None:
                raise state.fail
        except Blocked as blocked:
            first = first or blocked
        except ValueError as error:  # of numpy: no input makes such a network run, whatever sizes its file leaves open
            first = first or Blocked(f"the sizes of its constants don't fit each other ({error})")
        else:
            try:
                return accept(state)
            except Blocked as blocked:
                unfit = unfit or blocked
        if not stack:
            break
    reason = unfit or first
    assert reason is not None
    raise reason


def named(node: Node, blocked: Blocked) -> Blocked:
    reason = f"{node.label} {node.name} blocks, {blocked}"
    return Shared(reason, blocked.value, blocked.uses) if isinstance(blocked, Shared) else type(blocked)(reason)
