"""Where answers go: a console without colour when piped, a bar for who watches, plain tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 140
"""Columns when nobody watches: wide enough that no cell is cut."""


WIDE = 110
"""Columns from which tables have room for sources."""


def console() -> Console:
    """Return the console for answers; piped output is never narrowed or coloured."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


@contextmanager
def progress_bar() -> Generator[Callable[[str, int, int], None]]:
    """Yield a function that reports progress: a bar on standard error while a person watches."""
    if not sys.stderr.isatty():
        yield lambda what, done, of: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=1)
        yield lambda what, done, of: progress.update(
            task, description=what, completed=done, total=max(of, 1)
        )


def plain_table(*, header: bool = True) -> Table:
    """Return a table without lines."""
    return Table(box=None, pad_edge=False, header_style="bold", show_header=header)
