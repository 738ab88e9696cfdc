"""What a module is called with, lists, dicts and numbers in it, is an example for `fuse`, and a batch for `verify` and `recalibrate`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from modules import Net, norm
from opened import score
from torch import Tensor, nn

import bnfold


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Graph:
    nodes: Tensor
    weights: dict[str, Tensor]


torch.export.register_dataclass(Graph)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.b = nn.Linear(4, 4), norm(4, 1)

    def forward(self, x: Tensor, *, groups: list[Tensor], twice: bool = False) -> Tensor:
        y = self.b(self.l(x))
        return torch.stack([y[g].mean(0) for g in groups]) * (2 if twice else 1)


def net(forward: Any) -> nn.Module:
    return Net(forward, l=nn.Linear(4, 4), b=norm(4, 1))


def x(n: int) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(n))


def mean_of_groups(s: Any, x: Tensor, groups: list[Tensor]) -> Tensor:
    y = s.b(s.l(x))
    return torch.stack([y[g].mean(0) for g in groups])


class Free(Keywords):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]  # its arguments are what differs
        return self.b(self.l(x * kwargs["by"]["scale"]))  # type: ignore[no-any-return]  # modules that are attributes give anything


FIRST = [torch.arange(3), torch.arange(3, 6)]
# name: (module, items of data, rows that the BatchNorm sees)
CASES: dict[str, tuple[nn.Module, list[Any], int]] = {
    "a list": (net(mean_of_groups), [(x(6), FIRST), (x(9), [torch.arange(4), torch.arange(4, 9)])], 15),
    "a list, then labels": (net(mean_of_groups), [(x(6), FIRST, torch.tensor([1, 0]))], 6),
    "a list of arrays": (net(mean_of_groups), [(x(6).numpy(), [np.arange(3), np.arange(3, 6)])], 6),
    "a list alone": (net(lambda s, xs: s.b(s.l(torch.cat(xs)))), [([x(6), x(5)],), ([x(2), x(3)],)], 16),
    "a dict": (net(lambda s, d: s.b(s.l(d["a"] - d["c"]))), [{"c": x(6), "a": x(7)[:6], "label": torch.arange(6)}], 6),
    "a named tuple": (net(lambda s, p: s.b(s.l(p.left + p.right))), [(Pair(x(6), x(6)),)], 6),
    "a flag": (net(lambda s, x, flag: s.b(s.l(x if flag else -x))), [(x(6), True), (x(5), True)], 11),
    "a number": (net(lambda s, x, times: s.b(s.l(x * times))), [(x(6), 3)], 6),
    "None": (net(lambda s, x, mask: s.b(s.l(x if mask is None else x + mask))), [(x(6), None)], 6),
    "an empty list": (net(lambda s, x, more: s.b(s.l(x + sum(more)))), [(x(6), []), (x(5), [])], 11),
    "a dataclass": (net(lambda s, g: s.b(s.l(g.nodes * g.weights["w"]))), [(Graph(x(n), {"w": x(n) + 1}),) for n in (6, 5)], 11),
    "free keywords": (Free(), [{"x": x(n), "by": {"scale": x(n) + 1}} for n in (6, 5)], 11),
    "keywords": (Keywords(), [{"x": x(6), "groups": FIRST}, {"groups": FIRST, "x": x(6) + 1}], 12),
}


@pytest.mark.parametrize("name", CASES)
def test_an_item_is_taken_as_the_module_is_called(name: str) -> None:
    module, items, count = CASES[name]
    module.eval()
    labels = name.endswith("labels")
    example = items[0][:2] if labels else {k: v for k, v in items[0].items() if k != "label"} if isinstance(items[0], dict) else items[0]
    fused, folded = bnfold.fuse(module, example=example)
    assert [layer.verdict for layer in folded.layers] == ["folded"]
    for given in ({"example": example}, {})[: 1 if labels else 2]:  # a forward of any number of arguments takes labels for one
        for data in (items, iter(items)):
            assert bnfold.recalibrate(module, data, **given)[1].layers[0].count == count * (2 if "groups" in name else 1)
        assert bnfold.verify(module, fused, items, **given).verdict == "equivalent"
    if isinstance(example, (dict, tuple)) and not isinstance(example[0] if isinstance(example, tuple) else None, (list, tuple)):
        assert bnfold.recalibrate(module, items[0], example=example)[1].layers[0].count <= count


@pytest.mark.parametrize(
    ("module", "example", "item", "text"),
    [
        (CASES["a list"][0], (x(6), FIRST), (x(6), FIRST[:1]), "argument 1 is a list of 1 where the model was read with a list of 2"),
        (CASES["a list"][0], (x(6), FIRST), (x(6),), "it gives 1 of the model's arguments, and none for 1"),
        (CASES["a flag"][0], (x(6), True), (x(6), False), "argument 1 is False where the model was read with True"),
        (CASES["None"][0], (x(6), None), (x(6), x(6), x(6)), "argument 1 is a Tensor where the model was read with None"),
        (CASES["keywords"][0], {"x": x(6), "groups": FIRST}, {"x": x(6), "groups": x(6)}, "argument groups is a Tensor where"),
    ],
)
def test_another_form_is_another_path(module: nn.Module, example: Any, item: Any, text: str) -> None:
    module.eval()
    for verb in (
        lambda: bnfold.recalibrate(module, [item], example=example),
        lambda: bnfold.verify(module, module, [item], example=example),
    ):
        with pytest.raises(bnfold.DataError, match=f"batch 1 of the list given: {text}"):
            verb()


def test_labels_that_ride_along_are_scored() -> None:
    module = CASES["a list"][0].eval()
    found = score(module, [(x(6), FIRST, torch.tensor([1, 0]))], example=(x(6), FIRST))
    assert found is not None
    assert len(found.right) == 2


DATA = """
import torch
from torch import nn

class Groups(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x, groups):
        y = self.b(self.l(x))
        return torch.stack([y[g].mean(0) for g in groups])

def batches():
    for n in (6, 8):
        yield torch.randn(n, 4), [torch.arange(3), torch.arange(3, n)]
"""


def test_a_function_on_the_command_line_may_give_them(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(DATA)
    namespace: dict[str, Any] = {}
    exec(DATA, namespace)
    torch.save(namespace["Groups"]().state_dict(), tmp_path / "c.pth")
    code = "import sys; from bnfold.cli import run; sys.exit(run(sys.argv[1:]))"
    line = ["pipeline", "c.pth", "--arch", "net.py:Groups", "--data", "net.py:batches", "-o", "p.pt2"]
    done = subprocess.run([sys.executable, "-c", code, *line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program = torch.export.load(tmp_path / "p.pt2").module()
    assert program(torch.randn(7, 4), [torch.arange(3), torch.arange(3, 7)]).shape == (2, 4)
