"""The command that compares predictions with measured runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add ``accuracy``."""
    app.command("accuracy")(accuracy)


def accuracy(
    runs: Annotated[Path, typer.Argument(metavar="RUNS.csv", help="Measured runs, one a row.")],
    models: Annotated[Path, typer.Option("--models", help="The models that the runs name (JSON).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Compare predictions with the measured runs of a file."""
    import json

    from meshwright.fit.documents import load_models, load_runs
    from meshwright.fit.predict import predict
    from meshwright.fit.summary import summarize

    rows, known = load_runs(runs), load_models(models)
    found = predict(rows, known)
    summary = summarize(rows, found, known)
    if as_json:
        answer = {"rows": [p.to_dict() for p in found], "summary": summary}
        typer.echo(json.dumps(answer, allow_nan=False))
        return
    typer.echo(_report(summary))


def _report(summary: dict[str, Any]) -> str:
    lines = [
        f"{summary['rows']} runs: {summary['ok']} predicted, {summary['unsupported']} unsupported, "
        f"{summary['refused']} refused, {summary['inconsistent']} inconsistent (left out)"
    ]
    lines += [f"  {count} x {why}" for why, count in summary["reasons"].items()]
    for name, title in (("step_time", "Step time"), ("peak_memory", "Peak memory")):
        if summary[name]["all"]["rows"]:
            lines += _tables(title, summary[name])
    order = summary["ranking"]
    lines.append(
        f"Ranking: {order['pairs']} pairs, {order['right_fraction']:.1%} right; best layout near "
        f"in {order['best_near_fraction']:.1%} of {order['groups']} groups"
    )
    held = summary["interval"]
    lines.append(f"Interval: holds {held['held_fraction']:.1%} of {held['rows']} runs")
    for name, title in (("worst_step_time", "step time"), ("worst_peak_memory", "peak memory")):
        if summary[name]:
            lines.append(f"Worst {title}:")
            lines += [f"  {row['error']:+8.1%}  {row['id']}" for row in summary[name]]
    return "\n".join(lines)


def _tables(title: str, tables: dict[str, Any]) -> list[str]:
    head = f"{title:<44} {'rows':>5} {'bias':>8} {'median':>7} {'p90':>7} {'mean':>7}"
    lines = ["", head, _line("all", tables["all"])]
    for key, table in tables.items():
        if key != "all":
            lines += [_line(f"{key[3:]}: {name}", row) for name, row in table.items()]
    return lines


def _line(name: str, row: dict[str, float]) -> str:
    return (
        f"{name[:44]:<44} {row['rows']:5d} {row['bias']:+8.1%} {row['median']:7.1%} "
        f"{row['p90']:7.1%} {row['mean']:7.1%}"
    )
