"""Lines and tables on a terminal. What comes out of a file is shown escaped: no name begins a line of its own, or acts on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from bnfold.text import visible

from . import Bar, Part, Table

COLOURS = {
    "improved": "bold green",
    "harmed": "bold red",
    "no effect": "bold",
    "folded": "green",
    "kept": "yellow",
    "equivalent": "bold green",
    "different": "bold red",
    "inconclusive": "bold yellow",
}
BAR = 12  # characters of the longest bar
GAP = 2  # columns between two cells
PROSE = 28  # the least width for a last column of sentences; with less room, a row is written as a paragraph


def show(console: Console, parts: Iterable[Part]) -> None:
    """Print what `document` gives."""
    for part in parts:
        if isinstance(part, Table):
            _table(console, part)
        elif part.verdict:
            text = Text(f"{part.about}: ").append(_coloured(part.verdict))
            console.print(text.append(f" - {visible(part.text)}") if part.text else text)
        else:
            console.print(Text(visible(part.text), style="bold" if part.title else ""))


def _coloured(text: str) -> Text:
    return Text(text, style=COLOURS.get(text, ""))


def _shown(cell: str | Bar) -> str:
    """A cell's text; a bar in eighths of a character."""
    if isinstance(cell, str):
        return visible(cell)
    eighths = round(BAR * 8 * min(cell.share, 1.0))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _table(console: Console, table: Table) -> None:
    """A table without its empty columns, or, where it is too wide for the console, a paragraph for each row. Names are never cut."""
    rows = [[_shown(cell) for cell in row] for row in table.rows]
    titles = [*map(visible, table.columns)]
    used = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    if not used:
        return
    widths = [max(len(titles[i]), *(len(row[i]) for row in rows)) for i in used]
    if table.prose and used[-1] == len(titles) - 1:
        widths[-1] = min(widths[-1], PROSE)
    if sum(widths) + GAP * (len(used) - 1) <= console.width:
        grid = Grid(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        for i in used:
            grid.add_column(titles[i], overflow="fold", no_wrap=i != used[-1], justify="right" if _numbers(rows, i) else "left")
        for row in rows:
            grid.add_row(*(_coloured(row[i]) for i in used))
        console.print(grid)
        return
    for row in rows:
        console.print(Text(row[0], style="bold"), overflow="fold")
        for i in used[1:]:
            if row[i]:
                console.print(Text(f"  {titles[i]}: ").append(_coloured(row[i])), overflow="fold")


def _numbers(rows: Sequence[Sequence[str]], column: int) -> bool:
    return all(row[column][:1].isdigit() or row[column] in ("", "kept", "inf", "nan") for row in rows) and column > 0
