"""Lines, tables and drawings as a page of HTML: one file, without scripts and without anything from elsewhere, in light and in dark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bnfold.report.base import Report
from bnfold.text import counted

from . import BAD, DOUBTFUL, GOOD, Bar, Cell, Drawing, Headline, Part, Picture, Table
from .page import breakable, escaped, page

MANY = 40  # rows of a table that is closed until somebody opens it
SHORT = 28  # characters of a cell that stays on one line
CLASSES = dict.fromkeys(GOOD, "good") | dict.fromkeys(BAD, "bad") | dict.fromkeys(DOUBTFUL, "doubt")
# All of it holds within one element, so that it leaves the page of a notebook alone.
STYLE = """
.bnfold { color-scheme: light dark; --page: #fff; --text: #1c2128; --soft: #59636e; --line: #d1d9e0; --band: #f6f8fa;
  --good: #1a7f37; --bad: #c4232c; --doubt: #8a5a00; --one: #3569a8; --other: #b4552d; }
@media (prefers-color-scheme: dark) { .bnfold { --page: #14181d; --text: #e4e9ee; --soft: #9aa5b1; --line: #3a424c;
  --band: #1d232a; --good: #4cc06a; --bad: #ff7b72; --doubt: #e0a93b; --one: #79aee8; --other: #e8946c; } }
html:has(> .bnfold) { background: var(--page); }
.bnfold { font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", sans-serif; color: var(--text); background: var(--page);
  overflow-wrap: normal;
body& { margin: 0 auto; max-width: 78rem; padding: 1.2rem clamp(.8rem, 3vw, 2rem) 3rem; }
* { box-sizing: border-box; }
h1 { font-size: 1.25rem; font-weight: 600; margin: .4rem 0; }
h2 { font-size: 1.05rem; font-weight: 600; margin: 2.2rem 0 .5rem; }
p { margin: .35rem 0; max-width: 60rem; }
.headline { font-size: 1.3rem; line-height: 1.35; border-left: .35rem solid var(--soft);
  padding: .3rem 0 .3rem .8rem; margin: .8rem 0; }
.headline.good { border-color: var(--good); } .headline.bad { border-color: var(--bad); }
.headline.doubt { border-color: var(--doubt); }
.good { color: var(--good); } .bad { color: var(--bad); } .doubt { color: var(--doubt); }
.headline.good, .headline.bad, .headline.doubt { color: inherit; }
.soft { color: var(--soft); font-size: .87rem; } .whole { white-space: nowrap; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: .87rem; vertical-align: bottom; }
td { white-space: nowrap; } td:not(.long):not(.text) > wbr { display: none; } td.long { white-space: normal; min-width: 19rem; }
td.text { white-space: normal; min-width: 13rem; }
td.n, th.n { text-align: right; }
td.bar { min-width: 8rem; }
td.bar i { display: block; height: .8em; margin-top: .3em; background: var(--one); min-width: 1px; }
td.bar i.far { background: var(--bad); }
figure { margin: .6rem 0; } figcaption { color: var(--soft); font-size: .87rem; max-width: 60rem; }
svg { display: block; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
path.axis { stroke: var(--line); fill: none; } path.one { fill: var(--one); }
circle.ring { stroke: var(--one); stroke-width: 2; fill: none; }
circle.dot { fill: var(--other); }
table.graph { width: 100%; max-width: 62rem; }
table.graph td { border: 0; padding: .1rem .3rem; white-space: normal; vertical-align: middle;
  width: 50%; } table.graph th { border: 0; }
table.graph td.rail { position: relative; padding: 0; width: 1px; }
td.rail svg { position: absolute; top: 0; left: 0; height: 100%; }
td.rail s { display: block; height: 1px; }
td.rail path { fill: none; stroke: var(--soft); stroke-width: 1.4; vector-effect: non-scaling-stroke; }
td.rail i { position: absolute; top: 50%; width: 8px; height: 8px; margin: -4px 0 0 -4px; border-radius: 50%;
  background: var(--soft); }
.op { border: 1px solid var(--line); border-left: .25rem solid var(--line); border-radius: .25rem;
  padding: .12rem .5rem; background: var(--band); }
.op b { font-weight: 600; } .op span { color: var(--soft); font-size: .87rem; }
.graph small { display: block; padding-left: .3rem; }
tr.holds .op, tr.lowered .op { border-left-color: var(--good); }
tr.folded .op, tr.merged .op { border: 1px dashed var(--good); background: none; }
tr.folded small, tr.merged small, tr.lowered small, tr.holds small { color: var(--good); }
tr.differs .op { border-color: var(--bad); } tr.differs small { color: var(--bad); font-weight: 600; }
tr.gone .op, tr.new .op { border: 1px dashed var(--doubt); } tr.gone small, tr.new small { color: var(--doubt); }
@media (max-width: 600px) { .op span { display: block; } th, td { padding-right: .4rem; font-size: .85rem; }
  td.long, td.text { min-width: 9rem; } table:not(.graph) td:first-child { min-width: 7rem; }
  td:not(.n) { white-space: normal; } td:not(.long):not(.text) > wbr { display: inline; } }
summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .87rem; }
}
"""


def html(report: Report, command: str, files: Sequence[str]) -> str:
    """A report as a page of its own. files: the models that it is about."""
    title = f"bnfold {command}: {', '.join(files)}" if files else f"bnfold {command}"
    took = f"{report.seconds:.1f} s, " if report.seconds else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head>\n<body class='bnfold'>\n<h1>{breakable(title)}</h1>\n"
        f"{fragment(page(report))}"
        f"<footer>{took}bnfold {escaped(report.bnfold)}</footer>\n</body></html>\n"
    )


def embedded(report: Report) -> str:
    """A report in a page of somebody else's, a notebook, say."""
    return f'<div class="bnfold"><style>{STYLE}</style>\n{fragment(page(report))}</div>'


def fragment(parts: Iterable[Part]) -> str:
    """The parts, without what makes a page of them."""
    return "".join(map(_part, parts))


def _part(part: Part) -> str:
    if isinstance(part, Drawing):
        title = f"<h2>{escaped(part.title)}</h2>\n" if part.title else ""
        return f'{title}<figure><div class="scroll">{part.markup}</div><figcaption>{escaped(part.caption)}</figcaption></figure>\n'
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Headline):
        kind = next((CLASSES[each] for each in part.parts if each in CLASSES), "")
        return f'<p class="headline {kind}">{", ".join(map(_verdict, part.parts))}</p>\n'
    if part.title:
        return f"<h2>{breakable(part.text)}</h2>\n"
    about = f"{escaped(part.about)}: " if part.about else ""
    texts = filter(None, (f"{about}{_verdict(part.verdict)}" if part.verdict else "", breakable(part.text)))
    text = ": ".join(texts)
    return f"<p{' class=soft' * part.text.startswith('  ')}>{text}</p>\n" if text else ""


def _verdict(word: str) -> str:
    return f'<b class="{CLASSES[word]}">{word}</b>' if word in CLASSES else breakable(word)


def _table(table: Table) -> str:
    """A table without its empty columns; a wide one scrolls by itself."""
    used = [i for i in range(len(table.columns)) if any(row[i] for row in table.rows)]
    if not used:
        return ""
    last = table.prose and len(table.columns) - 1
    numbers = {i for i in used if i and i != last and i not in table.names and all(_is_number(row[i]) for row in table.rows)}
    head = "".join(f'<th{" class=n" * (i in numbers)} scope="col">{_title(table.columns[i])}</th>' for i in used)
    head = f"<thead><tr>{head}</tr></thead>\n" if any(table.columns) else ""
    rows = ("".join(_cell(row[i], "n" if i in numbers else "text" if i == last else "") for i in used) for row in table.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    title = f"<h2>{escaped(table.title)}</h2>\n" if table.title else ""
    text = f'<div class="scroll"><table>{head}<tbody>\n{body}\n</tbody></table></div>\n'
    if len(table.rows) > MANY:
        text = f"<details><summary>{counted(len(table.rows), 'row', ',')}</summary>\n{text}</details>\n"
    return title + text


def _title(title: str | Picture) -> str:
    return title.svg if isinstance(title, Picture) else escaped(title)


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, str) and re.match(r"[-+±]? ?[\d.]|$|kept$|inf$|nan$", cell) is not None


def _cell(cell: Cell, kind: str) -> str:
    if isinstance(cell, Picture):
        return f"<td>{cell.svg}</td>"
    if isinstance(cell, Bar):
        far = " class=far" if cell.share > 1 else ""
        return f'<td class="bar"><i{far} style="width:{100 * min(cell.share, 1.0):.1f}%"></i></td>'
    kind = kind or ("long" if len(cell) > SHORT else "")
    return f"<td{f' class={kind}' if kind else ''}>{_verdict(cell)}</td>"
