"""Explanations: a line a term, everything about one, or two layouts side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from meshwright.cli.show.plans import ranking, short_layout
from meshwright.cli.show.terminal import WIDE, console, plain_table
from meshwright.cli.text import signed
from meshwright.units import format_bytes, format_s, format_value

if TYPE_CHECKING:
    from meshwright.api import Explained
    from meshwright.plans import Plan
    from meshwright.why_not import WhyNot


def show_explanation(told: Explained) -> None:
    """Print the answer of ``explain``: a line a term, or everything about one."""
    from meshwright.cost.explain import TERMS

    out = console()
    out.print(short_layout(told.plan.layout))
    if len(told.formulas) > 1:
        table = plain_table()
        table.add_column("term", no_wrap=True)
        table.add_column("value", justify="right", no_wrap=True)
        for name in ("what", "source") if out.width >= WIDE else ("what",):
            table.add_column(name, overflow="fold")
        for term, formulas in told.formulas.items():
            value = format_value(term, told.values[term])
            cells = [term, value, escape(TERMS[term].what)]
            if out.width >= WIDE:
                cells.append(escape(next((f.source for f in formulas if f.source), "")))
            table.add_row(*cells)
        out.print(table)
        out.print(
            "\nFormulas, sources and what they leave out, of one term: meshwright explain ... TERM"
        )
        return
    for term, formulas in told.formulas.items():
        out.print(f"\n[bold]{term}[/] = {format_value(term, told.values[term])}")
        out.print(TERMS[term].what)
        for formula in formulas:
            out.print(f"\n{formula.what}", markup=False)
            for label, text in (
                ("formula", formula.formula),
                ("source", formula.source),
                ("left out", formula.left_out),
            ):
                if text:
                    out.print(f"  {label}: {text}", markup=False, soft_wrap=True)


def show_why_not(answer: WhyNot) -> None:
    """Print two layouts side by side, the difference term by term."""
    out = console()
    if answer.other is not None:
        out.print(ranking([answer.base, answer.other], ("chosen", "asked")))
        out.print(_differences(answer, answer.other))
    out.print(answer.verdict(), markup=False, soft_wrap=True)


def _differences(answer: WhyNot, other: Plan) -> Table:
    from meshwright.why_not import is_worth_telling

    table = plain_table()
    table.add_column("term")
    for name in ("chosen", "asked", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    a, b = answer.base.estimate, other.estimate
    gap = answer.gap()
    for unit, formatter in (("time", format_s), ("memory", format_bytes)):
        first: dict[str, float] = getattr(a, unit)
        second: dict[str, float] = getattr(b, unit)
        for term, change in gap[unit].items():
            if is_worth_telling(change, sum(first.values())):
                cells = (formatter(first[term]), formatter(second[term]))
                table.add_row(term, *cells, signed(change, formatter))
        total = sum(gap[unit].values())
        name = "step_time_s" if unit == "time" else "peak_bytes"
        cells = (formatter(sum(first.values())), formatter(sum(second.values())))
        table.add_row(f"[bold]{name}[/]", *cells, signed(total, formatter))
    return table
