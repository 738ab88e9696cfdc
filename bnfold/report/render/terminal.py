"""Lines and tables on a terminal. What comes out of a file is shown escaped: no name begins a line of its own, or acts on a terminal."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from bnfold.report.base import Report
from bnfold.text import visible

from . import BAD, DOUBTFUL, GOOD, VERDICTS, Bar, Cell, Drawing, Headline, Line, Part, Table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

COLOURS = dict.fromkeys(GOOD, "green") | dict.fromkeys(BAD, "red") | dict.fromkeys(DOUBTFUL, "yellow")
COLOURS |= {word: f"bold {COLOURS.get(word, '')}".strip() for word in VERDICTS}
BAR = 12  # characters of the longest bar
GAP = 2  # columns between two cells
PROSE = 28  # the least width for a last column of sentences; with less room, a row is written as a paragraph
LEFT_OUT = "*"  # what is shown of a name, in what is said of the rest
NEAR = "./"  # what two names of a row have in common

Cells = list[list[str]]


def text(report: Report, *, verbose: bool = False, width: int | None = None) -> str:
    """A report as plain text. width: columns, those of the terminal where it is None."""
    from .documents import document

    parts = [part for part in document(report, verbose=verbose) if not isinstance(part, Drawing)]
    width = shutil.get_terminal_size((100, 24)).columns if width is None else width
    lines = ["".join(text for text, _ in _pieces(part)) for part in parts if not isinstance(part, Table)]
    if len(lines) == len(parts) and all(2 * len(line) <= width for line in lines):  # no character takes more than two columns
        return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines())
    from rich.console import Console

    page = io.StringIO()
    show(Console(file=page, width=width, color_system=None, markup=False, highlight=False, emoji=False), parts)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def show(console: Console, parts: Iterable[Part]) -> None:
    """Print what `document` gives."""
    from rich.text import Text

    for part in parts:
        if isinstance(part, Table):
            _table(console, part)
        elif not isinstance(part, Drawing):
            _print(console, Text.assemble(*_pieces(part)))


def _print(console: Console, text: Text) -> None:
    """Print a line; what of it goes on in the next one is indented as it is."""
    indent = len(text.plain) - len(text.plain.lstrip())
    for line in text[indent:].wrap(console, max(console.width - indent, 1), overflow="fold") if text.plain else [text]:
        line.rstrip()
        line.pad_left(indent)
        console.print(line)


def _pieces(part: Headline | Line) -> Iterator[tuple[str, str]]:
    """The texts of a line with their styles."""
    if isinstance(part, Headline):
        for i, each in enumerate(part.parts):
            yield from [(", ", "bold")] if i else []
            yield visible(each), COLOURS.get(each, "bold")
    elif part.verdict:
        yield f"{part.about}: " if part.about else "", ""
        yield part.verdict, COLOURS.get(part.verdict, "")
        yield f" - {visible(part.text)}" if part.text else "", ""
    else:
        yield visible(part.text), "bold" if part.title else ""


def _coloured(text: str) -> Text:
    from rich.text import Text

    return Text(text, style=COLOURS.get(text, ""))


def _shown(cell: Cell) -> str:
    """A cell's text; a bar in eighths of a character."""
    if not isinstance(cell, Bar):
        return visible(cell) if isinstance(cell, str) else ""
    eighths = round(BAR * 8 * min(cell.share, 1.0))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _table(console: Console, table: Table) -> None:
    """A table without its empty columns. Where it is too wide for the console, what all names of a column begin and end with is left out
    and told once, then what other names in a row share with the first, then spare columns; else a row is a paragraph. No name is cut."""
    from rich.text import Text

    whole = rows = [[_shown(cell) for cell in row] for row in table.rows]
    titles = [*map(_shown, table.columns)]
    used = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    if not used:
        return
    shortened: list[str] = []
    names = [i for i in table.names if i in used]
    for step in ("", "ends", "places", *table.spare):
        if step == "ends":
            rows, ends = _shortened(rows, names)
            shortened += [f"{titles[k]}: {before}{LEFT_OUT}{behind}" for k, (before, behind) in ends.items() if before or behind]
        elif step == "places":
            rows, found = _nearer(rows, names)
            shortened += [f"{NEAR} is where the first name is"] if found else []
        elif isinstance(step, int) and step in used:
            used.remove(step)
        if _fits(console, table, titles, rows, used):
            _grid(console, table, titles, rows, used)
            if shortened:
                console.print(Text(f"names in full: {'; '.join(shortened)}", style="dim"))
            return
    for row in whole:
        _print(console, Text(row[0], style="bold"))
        for i in used[1:]:
            if row[i]:
                _print(console, Text(f"  {titles[i]}: " if titles[i] else "  ").append(_coloured(row[i])))


def _fits(console: Console, table: Table, titles: Sequence[str], rows: Cells, used: Sequence[int]) -> bool:
    from rich.cells import cell_len

    widths = [max(cell_len(titles[i]), *(cell_len(row[i]) for row in rows)) for i in used]
    if table.prose and used[-1] == len(titles) - 1:
        widths[-1] = min(widths[-1], PROSE)
    return sum(widths) + GAP * (len(used) - 1) <= console.width


def _grid(console: Console, table: Table, titles: Sequence[str], rows: Cells, used: Sequence[int]) -> None:
    from rich.table import Table as Grid

    grid = Grid(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold", show_header=any(titles))
    prose = table.prose and len(titles) - 1
    for i in used:
        numbers = i != prose and i not in table.names and _numbers(rows, i)
        grid.add_column(titles[i], overflow="fold", no_wrap=i != used[-1], justify="right" if numbers else "left")
    for row in rows:
        grid.add_row(*(_coloured(row[i]) for i in used))
    console.print(grid)


def _shortened(rows: Cells, names: Sequence[int]) -> tuple[Cells, dict[int, tuple[str, str]]]:
    """The rows without what all names of a column begin and end with, by whole parts of a name; and that, by column."""
    found: dict[int, tuple[str, str]] = {}
    for i in names:
        given = [row[i] for row in rows if row[i]]
        before = "".join(_shared([re.split(r"(?<=[/.])", name) for name in given]))
        rest = [re.split(r"(?=[/.])", name.removeprefix(before)) for name in given]
        behind = "".join(reversed(_shared([parts[::-1] for parts in rest])))
        found[i] = before, behind
        rows = [[*row[:i], row[i].removeprefix(before).removesuffix(behind), *row[i + 1 :]] for row in rows]
    return rows, found


def _nearer(rows: Cells, names: Sequence[int]) -> tuple[Cells, bool]:
    """The rows with names shortened from the place of the row's first name, where they have one in common; and whether any is."""
    found = [[*row] for row in rows]
    for row in found:
        mine = re.split(r"(?<=[/.])", row[names[0]]) if names else []
        for i in names[1:]:
            several = row[i].split(", ")
            shared = ["".join(_shared([mine, re.split(r"(?<=[/.])", name)])) for name in several]
            row[i] = ", ".join(NEAR + name.removeprefix(place) if place else name for name, place in zip(several, shared, strict=True))
    return found, found != rows


def _shared(names: Sequence[Sequence[str]]) -> list[str]:
    """The parts with which all of several names begin, but for the last part of each."""
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*(name[:-1] for name in names), strict=False))
    return [parts[0] for parts in same] if len(names) > 1 else []


def _numbers(rows: Cells, column: int) -> bool:
    return all(row[column][:1].isdigit() or row[column] in ("", "kept", "inf", "nan") for row in rows) and column > 0
