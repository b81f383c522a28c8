"""The command that compares predictions with measured runs."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

NARROWEST, WIDEST = 80, 120
"""Columns of a report, as the terminal has them; piped output is as narrow as can be."""

SHOWN_ROWS = 10
"""Rows that are listed one by one."""

WHERE_ROWS_WENT = {
    "not_predicted": "not predicted",
    "inconsistent": "called inconsistent by the file",
    "not_measured": "not measured",
    "unusable": "measured as what cannot be",
    "other_quality": "of a quality that is not scored",
    "not_comparable": "of a kind of memory that is not scored",
}


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
    columns = min(max(shutil.get_terminal_size((NARROWEST, 0)).columns, NARROWEST), WIDEST)
    typer.echo("\n".join(line.rstrip() for line in _report(summary, columns)))


def _report(summary: Mapping[str, Any], columns: int) -> Iterator[str]:
    if not summary["rows"]:
        yield "0 runs: the file holds its first line only."
        return
    yield (
        f"{summary['rows']} runs: {summary['ok']} predicted "
        f"({summary['coverage_fraction']:.1%}), {summary['unsupported']} unsupported, "
        f"{summary['refused']} refused"
    )
    for title, told in (
        ("Not predicted", summary["not_predicted"]),
        ("Measured as what cannot be, in no error", summary["unusable_measurements"]),
        ("Memory measured on another model, in no error", summary["impossible_memory"]),
    ):
        yield from _listed(title, told, columns)
    for name, title, key in (
        ("step_time", "Step time", "step_time_by_quality"),
        ("peak_memory", "Peak memory", "peak_memory_by_statistic"),
    ):
        yield ""
        yield from _wrapped(f"{title}: {_where_rows_went(summary[f'{name}_rows'])}", columns)
        if summary[name]["all"]["rows"]:
            yield from _tables({**summary[name], ALL_KINDS[key]: summary[key]}, columns)
            yield from _worst(f"Worst {title.lower()}", summary[f"worst_{name}"], name)
    yield from _order_and_interval(summary)


ALL_KINDS = {
    "step_time_by_quality": "by_quality, those that are not scored too",
    "peak_memory_by_statistic": "by_statistic that was measured",
}


def _wrapped(text: str, columns: int, indent: int = 0) -> list[str]:
    first, rest = " " * indent, " " * (indent or 2)
    return textwrap.wrap(
        text, columns, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def _listed(
    title: str, told: Mapping[str, str] | list[dict[str, str]], columns: int
) -> Iterator[str]:
    rows = [(r["id"], r["why"]) for r in told] if isinstance(told, list) else list(told.items())
    if rows:
        yield f"{title}:"
    for name, why in rows[:SHOWN_ROWS]:
        yield f"  {name or '(no id)'}"
        yield from _wrapped(why, columns, indent=4)
    if len(rows) > SHOWN_ROWS:
        yield f"  and {len(rows) - SHOWN_ROWS} more (--json lists all)"


def _where_rows_went(counts: Mapping[str, int]) -> str:
    rest = [f"{n} {WHERE_ROWS_WENT[k]}" for k, n in counts.items() if n and k != "scored"]
    return ", ".join([f"{counts['scored']} rows scored", *rest])


def _tables(tables: Mapping[str, Any], columns: int) -> Iterator[str]:
    width = columns - 45
    yield ""
    yield (
        f"{'predicted / measured - 1':<{width}} {'rows':>5} {'bias':>7} {'median':>7} {'p90':>7} "
        f"{'mean':>7} {'priced':>6}"
    )
    yield _line("all", tables["all"], width)
    for key, table in tables.items():
        if key != "all":
            yield f"by {key.removeprefix('by_')}"
            yield from (_line(f"  {name or 'not stated'}", e, width) for name, e in table.items())


def _line(name: str, row: Mapping[str, float], width: int) -> str:
    return (
        f"{_middle_left_out(name, width):<{width}} {row['rows']:5d} {row['bias']:+7.1%} "
        f"{row['median']:7.1%} {row['p90']:7.1%} {row['mean']:7.1%} "
        f"{row['coverage_fraction']:6.0%}"
    )


def _middle_left_out(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    tail = width // 2
    return f"{text[: width - tail - 2]}..{text[-tail:]}"


def _worst(title: str, rows: list[Mapping[str, Any]], name: str) -> Iterator[str]:
    from meshwright import units

    form = units.format_s if name == "step_time" else units.format_bytes
    field = "step_time_s" if name == "step_time" else "peak_bytes"
    yield f"{title}: error, predicted, measured, run"
    for row in rows[:SHOWN_ROWS]:
        predicted, actual = form(row[f"predicted_{field}"]), form(row[f"measured_{field}"])
        yield f"  {row['error']:+8.1%} {predicted:>10} {actual:>10}  {row['id']}"


def _order_and_interval(summary: Mapping[str, Any]) -> Iterator[str]:
    order = summary["ranking"]
    yield ""
    if order["pairs"]:
        yield (
            f"Ranking: {order['right_fraction']:.1%} of {order['pairs']} pairs of layouts in the "
            "measured order;"
        )
        yield (
            f"  the layout predicted best is within 2% of the best in "
            f"{order['best_near_fraction']:.1%} of {order['groups']} groups"
        )
    else:
        yield "Ranking: no two layouts of one model, cluster and batch"
    for name, what in (("interval", "step time"), ("peak_interval", "peak memory")):
        held = summary[name]
        if held["rows"]:
            yield (
                f"Interval: holds the measured {what} of {held['held_fraction']:.1%} of "
                f"{held['rows']} runs ({held['stated_fraction']:.0%} stated)"
            )
