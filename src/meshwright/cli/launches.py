"""Commands that read and write launches: check, convert, compare, resize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from meshwright.frameworks.check import CheckResult

Gpus = Annotated[
    int | None, typer.Option("--gpus", min=1, max=2**20, help="Processes; overrides the launch.")
]
ClusterText = Annotated[
    str | None,
    typer.Option("--cluster", help="64xH100, 8x8xH100 or a TOML: adds topology, memory and time."),
]
FrameworkName = Annotated[
    str | None,
    typer.Option("--framework", help="What the launch is for, where its content does not tell."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(check)


def check(
    launch: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE | -- COMMAND ...",
            help="A script, YAML, TOML, Python or log; or after -- the command itself.",
        ),
    ],
    gpus: Gpus = None,
    cluster: ClusterText = None,
    framework: FrameworkName = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="Also show every setting and where it came from.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Say what is wrong with a launch before it starts; exit status 1 when it would fail."""
    from meshwright.frameworks import check as checking

    result = checking.check(source_of(launch), gpus=gpus, cluster=cluster, framework=framework)
    if json:
        _print_json(result.to_dict())
    else:
        show_check(result, settings=settings)
    if not result.ok:
        raise typer.Exit(1)


def source_of(words: Sequence[str]) -> str | Sequence[str]:
    """Return the file that the words name, or the words as a command.

    ``bash FILE`` and ``sbatch FILE`` mean the file.
    """
    if len(words) == 1 and not words[0].startswith("-") and "=" not in words[0]:
        return words[0]
    if words[0] in ("bash", "sh", "sbatch") and len(words) > 1 and Path(words[1]).is_file():
        return words[1]
    return words


def show_check(result: CheckResult, *, settings: bool = False) -> None:
    """Print a check for people: what was read, both grids, findings, price."""
    from meshwright.frameworks.launch import TITLES, layout_settings

    launch = result.launch
    started = "unknown number of" if launch.gpus is None else launch.gpus
    typer.echo(f"{TITLES[launch.framework]}, {started} GPUs")
    shown = launch.settings if settings else layout_settings(launch)
    told = {n: s for n, s in shown.items() if settings or not s.origin.startswith("default")}
    for name, setting in told.items():
        typer.echo(f"  {name} = {setting.value}  ({setting.origin})")
    if result.grids is not None:
        for name, grid in result.grids.items():
            axes = " x ".join(f"{axis} {size}" for axis, size in grid.items())
            typer.echo(f"  {name} grid: {axes} = {_product(grid)} GPUs")
    for finding in result.findings:
        typer.echo(f"{finding.severity}: {finding.message} [{finding.id}]")
    for line in launch.assumed:
        typer.echo(f"assumed: {line}")
    for line in launch.unread:
        typer.echo(f"not read: {line}")
    _show_price(result)
    errors = sum(f.severity == "error" for f in result.findings)
    typer.echo("It would start." if not errors else f"It would not start: {errors} error(s).")


def _show_price(result: CheckResult) -> None:
    if result.estimate is None:
        return
    from meshwright.units import format_bytes, format_s

    price = result.estimate.to_dict()
    for stage in price["stages"]:
        peak = format_bytes(stage["peak_bytes"])
        typer.echo(f"  stage {stage['stage']}: {stage['layers']} layers, peak {peak}")
    typer.echo(
        f"  {price['verdict']}: peak {format_bytes(price['peak_bytes'])} of"
        f" {format_bytes(price['capacity_bytes'])}; step {format_s(price['step_time_s'])}"
    )


def _product(grid: Mapping[str, int]) -> int:
    product = 1
    for size in grid.values():
        product *= size
    return product


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, default=str))
