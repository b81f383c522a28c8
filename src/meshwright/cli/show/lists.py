"""Lists: process groups, and what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from meshwright.cli.show.terminal import WIDE, console, plain_table
from meshwright.units import format_count, format_value


def show_groups(groups: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Print process groups, a few of each."""
    table = plain_table()
    table.add_column("group")
    table.add_column("groups", justify="right")
    table.add_column("ranks each", justify="right")
    table.add_column("ranks", overflow="fold")
    for name, members in groups.items():
        some = " ".join(_short(g) for g in members[:4]) + (" ..." if len(members) > 4 else "")
        sizes = sorted({len(g) for g in members})
        table.add_row(name, str(len(members)), "-".join(map(str, sizes)), some)
    console().print(table)


def _short(ranks: Sequence[int]) -> str:
    shown = ",".join(map(str, ranks[:8])) + (",..." if len(ranks) > 8 else "")
    return f"({shown})"


_HEADINGS = {
    "hbm_bytes": "memory",
    "hbm_bytes_per_s": "bandwidth",
    "bf16_flops_per_s": "bf16 peak",
    "peer_bytes_per_s": "NVLink 1-way",
    "num_params": "parameters",
    "num_active_params": "active",
    "model_type": "family",
}


def show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print records as a table, quantities with their units."""
    if not rows:
        return
    table = plain_table()
    out = console()
    if "rule" in rows[0] and out.width < WIDE:
        _show_rules(rows, out)
        return
    shown = [name for name in rows[0] if name != "source" or out.width >= WIDE]
    for name in shown:
        is_number = isinstance(rows[0][name], int | float)
        justify = "right" if is_number else "left"
        heading = _HEADINGS.get(name, name)
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=name in ("name", "id"))
    for record in rows:
        table.add_row(*(escape(_cell(name, record[name])) for name in shown))
    out.print(table)


def _show_rules(rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    for r in rows:
        out.print(f"[bold]{escape(r['id'])}[/] ({r['severity']}, {escape(r['field'])})")
        out.print(f"  {r['rule']} {r['remedy']}", markup=False)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return format_count(value) if "params" in name else format_value(name, value)
    return str(value)
