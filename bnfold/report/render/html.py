"""Lines, tables and drawings as a page of HTML: one file, without scripts and without anything from elsewhere, in light and in dark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from bnfold.report.base import Report
from bnfold.text import counted

from . import BAD, DOUBTFUL, GOOD, Bar, Cell, Drawing, Headline, Part, Picture, Table
from .page import breakable, escaped, page

MANY = 40  # rows of a table that is closed until somebody opens it
SHORT = 28  # characters of a cell that stays on one line
CLASSES = dict.fromkeys(GOOD, "good") | dict.fromkeys(BAD, "bad") | dict.fromkeys(DOUBTFUL, "doubt")
# All of it holds within one element, so that it leaves the page of a notebook alone.
STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def html(report: Report, command: str, files: Sequence[str]) -> str:
    """A report as a page of its own. files: the models that it is about."""
    title = f"bnfold {command}: {', '.join(files)}" if files else f"bnfold {command}"
    took = f"{report.seconds:.1f} s, " if report.seconds else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>\n{STYLE}</style></head>\n<body class='bnfold'>\n<h1>{breakable(title)}</h1>\n"
        f"{fragment(page(report))}"
        f"<footer>{took}bnfold {escaped(report.bnfold)}</footer>\n</body></html>\n"
    )


def embedded(report: Report) -> str:
    """A report in a page of somebody else's, a notebook, say."""
    return f'<div class="bnfold"><style>\n{STYLE}</style>\n{fragment(page(report))}</div>'


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
    last = len(table.columns) - 1 if table.prose else None
    numbers = {i for i in used if i and i != last and i not in table.names and all(_is_number(row[i]) for row in table.rows)}
    titles = [title.svg if isinstance(title, Picture) else escaped(title) for title in table.columns]
    head = "".join(f'<th{" class=n" * (i in numbers)} scope="col">{titles[i]}</th>' for i in used)
    head = f"<thead><tr>{head}</tr></thead>\n" if any(table.columns) else ""
    rows = ("".join(_cell(row[i], "n" if i in numbers else "text" if i == last else "") for i in used) for row in table.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    title = f"<h2>{escaped(table.title)}</h2>\n" if table.title else ""
    text = f'<div class="scroll"><table>{head}<tbody>\n{body}\n</tbody></table></div>\n'
    if len(table.rows) > MANY:
        text = f"<details><summary>{counted(len(table.rows), 'row', ',')}</summary>\n{text}</details>\n"
    return title + text


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
