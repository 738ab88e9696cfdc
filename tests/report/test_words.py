"""What reports come to, in words; and how they are laid out on a terminal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import bnfold
from bnfold.report import Counts, Effect, FuseReport, InspectReport, Layer, LayerStatistics, PipelineReport, RecalibrateReport
from bnfold.report.recalibrate import Accuracy
from bnfold.report.render.terminal import text
from bnfold.report.words import headline, in_bytes
from bnfold.text import duration

NAMES = [f"/layer{i // 4}/layer{i // 4}.{i % 4}/bn1/BatchNormalization" for i in range(20)]


def fused(kept: int = 0, **more: object) -> FuseReport:
    layers = tuple(
        Layer(name, 64, "kept" if i < kept else "folded", () if i < kept else (f"/conv{i}/Conv",), "a Relu blocks" if i < kept else "")
        for i, name in enumerate(NAMES)
    )
    counts = {"batchnorms": Counts(20, kept), "operators": Counts(69, 49 + kept), "bytes": Counts(46_800_000, 46_740_000)}
    return FuseReport(layers=layers, **{**counts, **more})


def test_the_first_line_says_it_all(digits: Path) -> None:
    model = bnfold.load(digits)
    made, report = bnfold.fuse(model)
    assert headline(report) == ["8 of 8 folded", "equivalent", "119 to 117 kB", "29 operators to 20"]
    verdict = bnfold.verify(model, made)
    assert headline(verdict) == ["equivalent", "compared on 32 samples of random data"]
    before, after = Accuracy(0.809, 0.017, 540), Accuracy(0.978, 0.006, 540)
    effect = Effect("improved", 0.169, 0.016, -0.5, 0.05)
    whole = PipelineReport(fuse=report, verify=verdict, accuracy_before=before, accuracy_after=after, effect=effect)
    line = "8 of 8 folded, equivalent, accuracy 80.9 % to 97.8 %, 119 to 117 kB, 29 operators to 20"
    assert text(whole, width=100).splitlines()[0] == line
    harmed = dataclasses.replace(whole, accuracy_before=after, accuracy_after=before, effect=dataclasses.replace(effect, verdict="harmed"))
    assert headline(harmed)[2:4] == ["accuracy 97.8 % to 80.9 %", "harmed"]
    assert headline(bnfold.inspect(model))[0] == "8 of 8 would fold"
    assert "20 of 20 folded, not checked" in text(fused(), width=100)


def test_samples_and_data_are_named(digits: Path) -> None:
    model = bnfold.load(digits)
    made, _ = bnfold.fuse(model)
    images = np.load(digits.parent / "calibration.npz")["image"][:40]
    report = bnfold.verify(model, made, [images])
    assert (report.samples, report.data) == (40, "")
    assert "compared     on 40 samples" in str(report)
    assert bnfold.verify(model, made, coefficients_only=True).samples == 0


@pytest.mark.parametrize("width", [80, 120, 200])
def test_tables_fit_the_terminal(width: int) -> None:
    layers = tuple(LayerStatistics(name, 32_768, 0.1 * i, 1.5, 0.01, 0.02, 64, 3) for i, name in enumerate(NAMES))
    report = RecalibrateReport(method="exact", samples=512, layers=layers)
    for shown in (report, fused(3), InspectReport(**{f.name: getattr(fused(3), f.name) for f in dataclasses.fields(FuseReport)})):
        lines = text(shown, width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert len(lines) < 30
    lines = text(report, width=width).splitlines()
    rows = [line for line in lines if line.startswith(("/layer", "layer"))]
    assert len(rows) == 5
    names = [line.removeprefix("names in full: BatchNorm: ") for line in lines if line.startswith("names in full: ")]
    (pattern,) = names or ["*"]
    assert [pattern.replace("*", row.split()[0]) for row in rows] == [NAMES[i] for i in (19, 18, 17, 16, 15)]


def test_what_stays_is_grouped_by_its_reason() -> None:
    found = text(fused(12), width=300)
    assert f"12 stay: a Relu blocks ({', '.join(NAMES[:5])} and 7 more)" in found
    assert NAMES[11] not in found
    assert all(name in text(fused(12), width=300, verbose=True) for name in NAMES)


def test_reasons_that_differ_by_names_and_counts_are_one() -> None:
    """Names as torch.onnx.export and torch.export give them."""
    report = fused(12)
    why = "before it: HardSwish n0_{0} blocks, its output is also used by node_add_{0}; behind it: relu relu_{0} blocks, {0} of its 16 "
    layers = tuple(
        dataclasses.replace(
            layer, reason=why.format(i) + ("scales is" if i == 1 else "scales are") + " negative" if layer.verdict == "kept" else ""
        )
        for i, layer in enumerate(report.layers)
    )
    found = text(dataclasses.replace(report, layers=layers), width=300)
    assert (
        "12 stay: before it: HardSwish * blocks, its output is also used by *; behind it: relu * blocks, some of its scales are negative ("
        in found
    )


def test_names_of_digits_are_no_numbers() -> None:
    layers = tuple(Layer(f"{i}.bn", 8, "folded", (f"{i}.{'0' * i}",), "") for i in range(3))
    report = FuseReport(batchnorms=Counts(3, 0), layers=layers)
    assert "\n0.bn              8  folded   0.\n" in text(report, width=300, verbose=True)


def test_amounts_are_said_in_one_unit() -> None:
    cases = {(1_120_000, 1_100_400): "1.12 to 1.10 MB", (118_888, 116_520): "119 to 117 kB", (512, 448): "512 to 448 bytes"}
    assert {pair: in_bytes(Counts(*pair)) for pair in cases} == cases
    assert in_bytes(Counts(102_379_168, 102_287_776)) == "102 MB"
    assert [duration(s) for s in (0.42, 9.99, 59.6, 125, 3790)] == ["0.4 s", "10 s", "1 min 0 s", "2 min 5 s", "1 h 3 min"]
