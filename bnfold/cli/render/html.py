"""A recalibration as a page of its own: HTML without scripts and without anything from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

from bnfold.files import write_text
from bnfold.report import Accuracy, RecalibrateReport

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; background: #fff; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
td.bar { width: 24%; text-align: left; }
td.bar i { display: block; height: .8em; background: #4477aa; min-width: 1px; }
td.bar i.far { background: #cc6677; }
"""
TITLES = (
    "BatchNorm",
    "channels",
    "values",
    "mean moved by",
    "",
    "variance times",
    "worst channel",
    "dead",
    "error of the mean",
    "error of the variance",
)


def write_page(path: Path, report: RecalibrateReport, model: str) -> None:
    """Write the page whole or not at all. model: what it is about."""
    write_text(path, page(report, model))


def page(report: RecalibrateReport, model: str) -> str:
    """The report as HTML."""
    top = max((layer.mean_shift for layer in report.layers if math.isfinite(layer.mean_shift)), default=0.0)
    rows = []
    for layer in report.layers:
        far = not math.isfinite(layer.mean_shift)
        share = 100.0 if far else 100 * layer.mean_shift / top if top else 0.0
        bar = f'<td class="bar"><i{" class=far" if far else ""} style="width:{share:.1f}%"></i></td>'
        figures = (
            f"{layer.channels:,}",
            f"{layer.count:,}",
            f"{layer.mean_shift:.3g}",
            None,
            f"{layer.var_ratio:.3g}",
            str(layer.worst_channel),
            str(layer.dead),
            f"{layer.stderr:.2g}",
            f"{layer.var_stderr:.2g}",
        )
        cells = "".join(bar if figure is None else f"<td>{escape(figure)}</td>" for figure in figures)
        rows.append(f"<tr><td>{escape(layer.name or '(no name)')}</td>{cells}</tr>")
    facts = [f"{report.samples:,} samples, method {report.method}, {report.variance} variance"]
    if report.accuracy_before is not None and report.accuracy_after is not None and report.effect is not None:
        facts.append(f"accuracy {_accuracy(report.accuracy_before)} before, {_accuracy(report.accuracy_after)} after")
        facts.append(f"effect: {report.effect.verdict}")
    head = "".join(f"<th>{escape(title)}</th>" for title in TITLES)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(model)}: recalibration</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>Recalibration of {escape(model)}</h1>\n{_list(facts)}\n"
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table>\n"
        "<p>Each figure is the layer's worst channel's. Means move in old standard deviations (the bars); the variance is new over old; "
        "standard errors take samples as independent, that of the mean in the data's standard deviations, that of the variance as a share "
        "of it; dead channels are constant on these data.</p>\n"
        f"{_list(report.notes)}\n<p>bnfold {escape(report.bnfold)}</p>\n</body></html>\n"
    )


def _list(texts: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def _accuracy(a: Accuracy) -> str:
    return f"{a.accuracy:.1%} (± {a.stderr:.1%}), loss {a.loss:.3g} (± {a.loss_stderr:.2g})"
