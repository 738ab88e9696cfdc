"""Modules that are read once, and folded modules as graphs, in which branches merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.list import lively
from torch import Tensor, nn
from torch.fx import GraphModule
from vision import package

import bnfold
from bnfold.errors import UnsupportedError, UsageError


class Branches(nn.Module):
    """Two convolutions and the input itself, each with its BatchNorm, as in RepVGG."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4, H, W] to the same."""
        a, b, c = self.norms
        return torch.relu(a(self.wide(x)) + b(self.narrow(x)) + c(x))


class Exporting(Branches):
    def forward(self, x: Tensor) -> Tensor:
        """[N, 4, H, W] to the same, which torch.export reads in another way than it runs."""
        return super().forward(x) * (2 if torch.compiler.is_exporting() else 1)


def convolutions(module: nn.Module) -> int:
    assert isinstance(module, GraphModule)
    return sum(str(op.target).startswith("aten.conv") for op in module.graph.nodes)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that torch.export reads from now on."""
    seen: list[nn.Module] = []
    export = torch.export.export

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(module)
        return export(module, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", spy)
    return seen


@pytest.mark.parametrize("bias", [False, True])
def test_a_module_is_exported_once(exports: list[nn.Module], bias: bool) -> None:
    module = lively(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    ).eval()
    fused, report = bnfold.fuse(module, example=torch.randn(2, 3, 64, 64))
    assert len(exports) == 1
    assert report.batchnorms.after == 0
    assert report.verify is not None
    assert report.verify.verdict == "equivalent"
    assert report.verify.levels.coefficients.verdict == "equivalent"
    x = torch.randn(3, 3, 9, 7)
    torch.testing.assert_close(fused(x), module(x))


def test_what_is_read_of_a_folded_module_is_what_torch_export_reads() -> None:
    from bnfold.backends.torch.export.trace import Traced, trace
    from bnfold.backends.torch.fuse import fuse

    module = lively(package("timm").create_model("mobilenetv3_small_050", num_classes=7)).eval()
    read, _ = fuse(trace(module, torch.randn(2, 3, 64, 64)))
    assert isinstance(read, Traced)
    assert isinstance(read.model, nn.Module)
    again = trace(read.model, torch.randn(2, 3, 64, 64))
    operators = [[str(op.target) for op in each.program.graph.nodes if op.op == "call_function"] for each in (read, again)]
    assert operators[0] == operators[1]
    assert read.identity() == again.identity()


@pytest.mark.parametrize("name", ["repvgg_a0", pytest.param("mobileone_s0", marks=pytest.mark.slow)])
def test_a_graph_is_the_deploy_form(name: str) -> None:
    timm = package("timm")
    module = lively(timm.create_model(name, num_classes=7)).eval()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    graph, report = bnfold.fuse(module, example=torch.randn(2, 3, 64, 64), graph=True)
    assert isinstance(graph, GraphModule)
    deploy = timm.utils.model.reparameterize_model(module)
    assert convolutions(graph) == sum(isinstance(each, nn.Conv2d) for each in deploy.modules())
    assert report.batchnorms.after == 0
    assert report.merged
    x = torch.randn(3, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), module(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, module.state_dict()[key]) for key, tensor in before.items())
    verdict = bnfold.verify(module, graph, example=x)
    assert verdict.verdict == "equivalent"
    assert any(note.startswith("the candidate states for which sizes it holds, and doesn't run with x of shape") for note in verdict.notes)


def test_a_graph_carries_its_certificate_and_is_verified(tmp_path: Path) -> None:
    module, x = lively(Branches()).eval(), torch.randn(2, 4, 32, 32)
    graph, report = bnfold.fuse(module, example=x, graph=True)
    assert convolutions(graph) == 1
    assert any("other ways through its code aren't in it" in note for note in report.notes)
    found = bnfold.certificate(graph)
    assert found is not None
    assert found["verdict"]["verdict"] == "equivalent"
    verdict = bnfold.verify(module, graph, example=x)
    assert verdict.verdict == "equivalent"
    bnfold.save(graph, tmp_path / "graph.pt2", example=x)
    torch.testing.assert_close(bnfold.load(tmp_path / "graph.pt2").module()(x), graph(x))
    with pytest.raises(NotImplementedError, match="train"):  # torch's own refusal, which the docstring of `fuse` promises
        graph.train()


def test_a_graph_keeps_types_and_shares_nothing() -> None:
    module, x = lively(Branches()).double().eval(), torch.randn(2, 4, 32, 32).double()
    graph, _ = bnfold.fuse(module, example=x, graph=True)
    assert {tensor.dtype for tensor in graph.state_dict().values()} == {torch.float64}
    theirs = {tensor.data_ptr() for tensor in module.state_dict().values()}
    assert theirs.isdisjoint(tensor.data_ptr() for tensor in graph.state_dict().values())
    torch.testing.assert_close(graph(x[:1]), module(x[:1]))


class Ghost(nn.Module):
    """Hoffer, Hubara & Soudry 2017: as many calls of one BatchNorm as the batch has parts of four samples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 5] to [N, 6]."""
        return torch.cat([self.norm(part) for part in self.linear(x).chunk(-(-len(x) // 4))])


def test_a_graph_is_tried_at_a_batch_for_which_it_holds() -> None:
    """Not with two samples, as others are."""
    module, x = lively(Ghost()).eval(), torch.randn(16, 5)
    graph, report = bnfold.fuse(module, example=x, graph=True)
    assert report.batchnorms.after == 0
    torch.testing.assert_close(graph(x), module(x))


def test_a_graph_of_what_has_no_single_one_is_refused() -> None:
    x = torch.randn(2, 4, 32, 32)
    with pytest.raises(UnsupportedError, match=r"torch\.export reads another function"):
        bnfold.fuse(lively(Exporting()).eval(), example=x, graph=True)
    with pytest.raises(UsageError, match="give one call"):
        bnfold.fuse(lively(Branches()).eval(), example=[(x,), (x[:, :, :8],)], graph=True)
    with pytest.raises(UsageError, match="graph already"):
        bnfold.fuse(torch.export.export(lively(Branches()).eval(), (x,)), graph=True)
