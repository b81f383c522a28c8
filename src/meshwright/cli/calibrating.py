"""The command that fits a cluster's own factors to runs measured on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from meshwright.fit.calibrate import Calibration

SHOWN_ROWS = 10


def register(app: typer.Typer) -> None:
    """Add ``calibrate``."""
    app.command("calibrate")(calibrate)


def calibrate(
    cluster: Annotated[str, typer.Argument(help="64xH100, or a cluster TOML.")],
    measurements: Annotated[
        list[Path], typer.Argument(metavar="RUNS.csv...", help="Runs measured on it, one a row.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The cluster TOML to write.")],
    models: Annotated[
        Path | None, typer.Option("--models", help="The models that the runs name (JSON).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Fit a cluster's own factors to runs measured on it.

    The cluster is written with them as a TOML file, which every command takes as CLUSTER.
    """
    import json
    from datetime import date

    from meshwright.cli.show import progress_bar
    from meshwright.describe.cluster import load_cluster
    from meshwright.describe.cluster.document import to_document, to_toml
    from meshwright.errors import DocumentError
    from meshwright.fit.calibrate import calibrate as fitted
    from meshwright.fit.documents import load_models, load_runs, shipped

    machines = load_cluster(cluster)
    rows = [row for path in measurements for row in load_runs(path)]
    known = load_models(models or shipped("models.json.gz"))
    names = ", ".join(path.name for path in measurements)
    source = f"meshwright calibrate {names}, {date.today()}"
    with progress_bar() as progress:
        progress(f"pricing {len(rows)} runs", 0, 1)
        found = fitted(
            machines,
            rows,
            known,
            source=source,
            progress=lambda turn: progress(f"fitting, turn {turn}", 0, 1),
        )
    try:
        output.write_text(to_toml(to_document(found.cluster)) + "\n", encoding="utf-8")
    except OSError as error:
        rule = f"It cannot be written: {error.strerror}."
        raise DocumentError("output", str(output), rule, "Choose another path.") from None
    answer = _answer(found, rows, str(output))
    typer.echo(json.dumps(answer, allow_nan=False) if as_json else _report(answer))


def _answer(found: Calibration, rows: list[dict[str, str]], path: str) -> dict[str, Any]:
    import numpy as np

    medians = [float(np.median(np.abs(np.expm1(e)))) for e in (found.before, found.after)]
    return {
        "written": path,
        "rows": len(rows),
        "used": len(found.before),
        "left_out": [
            {"row": place, "id": rows[place - 1].get("id", ""), "why": why}
            for place, why in found.left_out.items()
        ],
        "median_error_before": medians[0],
        "median_error_after": medians[1],
        "fitted": {
            name: {"before": before, "after": after}
            for name, (before, after) in found.changes.items()
        },
    }


def _report(answer: dict[str, Any]) -> str:
    lines = [f"{answer['used']} of {answer['rows']} rows used"]
    for row in answer["left_out"][:SHOWN_ROWS]:
        lines.append(f"  left out: row {row['row']} {row['id']}: {row['why']}".rstrip())
    if len(answer["left_out"]) > SHOWN_ROWS:
        lines.append(f"  and {len(answer['left_out']) - SHOWN_ROWS} more (--json lists all)")
    lines.append(
        f"median error {answer['median_error_before']:.1%} before, "
        f"{answer['median_error_after']:.1%} after"
    )
    for name, value in answer["fitted"].items():
        lines.append(f"  {name:<18} {value['before']:.4g} -> {value['after']:.4g}")
    if not answer["fitted"]:
        lines.append("  no factor moved: the runs are as predicted, or show none of them")
    return "\n".join([*lines, f"Wrote {answer['written']}"])
