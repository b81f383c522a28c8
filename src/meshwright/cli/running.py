"""Commands that prove: verify."""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.cli.planning import AsJson, LayoutText


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(verify)


def verify(
    layout: LayoutText,
    model: Annotated[
        str | None, typer.Option("--model", help="Whose structure to use, made small.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or float64.")] = "float32",
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds until a silent rank counts as dead.")
    ] = 120.0,
    switches: Annotated[
        str, typer.Option("--switches", help='What runs beside compute: "overlap_tp_comm=false".')
    ] = "",
    json: AsJson = False,
) -> None:
    """Run a layout on local processes and prove it equal to one.

    What every rank holds and sends is shown beside what the cost model says, in bytes.
    """
    from meshwright import api
    from meshwright.cli.show import show_account, show_verified
    from meshwright.cli.text import print_json

    report = api.verify(layout, model=model, dtype=dtype, timeout_s=timeout, switches=switches)
    found = api.account(layout, model=model, timeout_s=timeout)
    if json:
        print_json(report.to_dict() | {"accounts": found.to_dict()})
    else:
        show_verified(report)
        show_account(found)
    if not report.ok:
        raise typer.Exit(1)
