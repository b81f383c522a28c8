"""Proofs: a layout against one process, and what ranks hold and send against the price."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshwright.cli.show.terminal import console, plain_table
from meshwright.units import format_s

if TYPE_CHECKING:
    from meshwright.verify.account_report import AccountReport
    from meshwright.verify.numerics import VerifyReport


def show_verified(report: VerifyReport) -> None:
    """Print the answer of ``verify``: every rank's place, the losses, the largest differences."""
    from meshwright.parallel.mesh import coordinates, dense_mesh

    out = console()
    x = report.layout
    degrees = f"TP={x.tp} PP={x.pp} DP={x.dp}"
    degrees += "".join(f" {k}={v}" for k, v in (("CP", x.cp), ("EP", x.ep)) if v > 1)
    out.print(f"{degrees} ({report.ranks} ranks, {report.dtype})")
    mesh = dense_mesh(x)
    for rank in range(report.ranks):
        place = " ".join(f"{k}={v}" for k, v in coordinates(mesh, rank).items())
        out.print(f"  rank {rank}: {place}")
    for name, losses in (("losses", report.losses), ("one process", report.reference_losses)):
        out.print(f"{name:>12}: " + "  ".join(f"{loss:.9g}" for loss in losses))
    out.print(
        f"largest relative differences: loss {report.max_loss_diff:.1e}, "
        f"gradient {report.max_grad_diff:.1e}, parameter {report.max_param_diff:.1e} "
        f"(worst: {report.worst})"
    )
    word = "[bold]equal[/]" if report.ok else "[bold red]not equal[/]"
    out.print(f"The layout and one process are {word}, in {format_s(report.seconds)}.")


def show_account(report: AccountReport) -> None:
    """Print, per kind of rank, what is priced and what was held and sent in a step."""
    from meshwright.verify.account_report import KNOWN

    out = console()
    if report.why_not:
        out.print(f"held and sent bytes were not compared: {report.why_not}")
        return
    table = plain_table()
    table.add_column("ranks")
    table.add_column("bytes")
    for name in ("priced", "known beside", "runtime", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        entry = row.entry
        beyond = entry.unexplained_bytes
        table.add_row(
            _span(row.ranks),
            entry.what.removesuffix("_bytes"),
            f"{entry.priced_bytes:,.0f}",
            f"{entry.different_bytes:+,.0f}" if entry.different_bytes else "",
            f"{entry.runtime_bytes:,.0f}",
            "equal" if abs(beyond) < 0.5 else f"[bold red]{beyond:+,.0f}[/]",
        )
    out.print("\none step of a model whose sizes need no padding, in bytes:")
    out.print(table)
    if report.differs:
        out.print("known beside the price: " + "; ".join(KNOWN))


def _span(ranks: tuple[int, ...]) -> str:
    first, last = ranks[0], ranks[-1]
    if len(ranks) > 1 and ranks == tuple(range(first, last + 1)):
        return f"{first}-{last}"
    return ", ".join(map(str, ranks))
