"""Tables whose figures are whole, at 80 columns, in a narrow terminal and in a file."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def new_table(title: str, *headings: str, text: int = 1) -> Table:
    """A table whose first `text` columns are words, which may wrap; the others are figures."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, heading in enumerate(headings):
        is_text = number < text
        table.add_column(
            heading,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold" if is_text else "ellipsis",
        )
    return table


def show(console: Console, table: Table) -> None:
    """Prints a table; one that a terminal is too narrow for goes beyond its edge."""
    unlimited = console.options.update(max_width=10_000)
    least = Measurement.get(console, unlimited, table).minimum
    if least > console.width:
        table.width = least
    console.print(table, crop=False)
