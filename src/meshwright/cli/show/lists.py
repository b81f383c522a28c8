"""Lists: process groups, and what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from meshwright.cli.show.terminal import console, plain_table
from meshwright.units import format_count, format_value

if TYPE_CHECKING:
    pass


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
    "hbm_bytes_per_s": "memory bandwidth",
    "bf16_flops_per_s": "bf16 peak",
    "peer_bytes_per_s": "NVLink, one way",
    "num_params": "parameters",
    "num_active_params": "active",
    "model_type": "family",
}


def show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print records as a table, quantities with their units."""
    if not rows:
        return
    table = plain_table()
    for name in rows[0]:
        table.add_column(_HEADINGS.get(name, name), overflow="fold")
    for record in rows:
        table.add_row(*(escape(_cell(k, v)) for k, v in record.items()))
    console().print(table)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return format_count(value) if "params" in name else format_value(name, value)
    return str(value)
