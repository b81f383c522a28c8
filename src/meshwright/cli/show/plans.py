"""Plans and estimates: the ranking, where memory and time go, why, what was assumed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from meshwright.cli.show.terminal import console, plain_table
from meshwright.units import format_bytes, format_count, format_flops_per_s, format_s

if TYPE_CHECKING:
    from meshwright.cost.detail import Estimate
    from meshwright.describe.cluster import Cluster
    from meshwright.describe.job import Job
    from meshwright.describe.model import Model
    from meshwright.findings import Finding
    from meshwright.parallel.layout import Layout
    from meshwright.plans import Plan, Plans
    from meshwright.search import Ranked

_SHORT = {
    "activations_bytes": "activ.",
    "framework_bytes": "software",
    "optimizer_bytes": "optim.",
}
"""Headings that would be too wide for a terminal of 80 columns."""
WORTH_SHOWING = 0.05
"""A layout of a front that is faster by less than this than its neighbour is left out."""


def show_plans(plans: Plans, model: Model, cluster: Cluster, job: Job) -> None:
    """Print the answer of ``plan``."""
    out = console()
    _show_question(model, cluster, job, out)
    found = plans.found
    out.print(
        f"Looked at {found.candidates:,} layouts: {found.legal:,} legal, {found.fit:,} fit, "
        f"{found.simulated:,} simulated, in {format_s(found.seconds)}."
    )
    if not plans.plans:
        _show_nothing_fits(plans, out)
        return
    out.print(ranking(plans.plans))
    best = plans.plans[0]
    _show_detail(best, out)
    out.print("\n[bold]Why it won[/]")
    for line in best.why:
        out.print(f"  - {line}", soft_wrap=True, markup=False)
    _show_starting_points(plans, out)
    if plans.pareto:
        _show_pareto(plans, out)
    _show_findings(best.findings, out)
    _show_assumed(best.estimate, out)
    _show_layout_text(best.layout, out)


def _show_question(model: Model, cluster: Cluster, job: Job, out: Console) -> None:
    size = f"{format_count(model.num_params)} parameters"
    if model.is_moe:
        size += f", {format_count(model.num_active_params)} active"
    out.print(
        f"[bold]{model.name}[/] ({size}) on [bold]{cluster.name}[/]: "
        f"{job.gbs} sequences of {job.seq_len} tokens a step, {job.precision.name}, {job.task}",
        soft_wrap=True,
    )


def show_plan(plan: Plan) -> None:
    """Print the answer of ``estimate``."""
    out = console()
    _show_question(plan.model, plan.cluster, plan.job, out)
    out.print(ranking([plan]))
    _show_detail(plan, out)
    _show_findings(plan.findings, out)
    _show_assumed(plan.estimate, out)


def short_layout(x: Layout[int]) -> str:
    """Return the degrees and the choices that differ from the usual, on one line."""
    from meshwright.parallel.layout import CpComm, Zero, to_dict

    shown = to_dict(x)
    words = [f"tp={x.tp}", f"pp={x.pp}"]
    words += [f"{k}={shown[k]}" for k in ("vpp", "cp", "ep", "etp") if shown[k] > 1]
    words += [f"dp={x.dp}", f"mbs={x.mbs}"]
    if x.cp > 1 and x.cp_comm != CpComm.p2p:
        words.append(shown["cp_comm"])
    if x.zero != Zero.optim:
        words.append(shown["zero"])
    if x.dp_replicate > 1:
        words.append(f"x{x.dp_replicate} replicas")
    if x.recompute:
        words.append(f"recompute={shown['recompute']}")
    if shown["schedule"].startswith(("zb", "gpipe")):
        words.append(shown["schedule"])
    if x.tp > 1 and not x.sp:
        words.append("no sp")
    words += [f"{k}={shown[k]}" for k in ("first", "last") if k in shown]
    if x.pipeline_layout or x.account_for_loss or x.account_for_embedding:
        words.append("uneven")
    return " ".join(words)


def ranking(plans: Sequence[Plan], names: Sequence[str] = ()) -> Table:
    """Return a line a plan: layout, step, rate, peak; numbered, or by ``names``."""
    table = plain_table()
    table.add_column("" if names else "#", justify="left" if names else "right")
    table.add_column("layout", overflow="fold")
    for name in ("step", "tokens/s/GPU", "MFU", "peak", "margin", "fits?"):
        table.add_column(name, justify="right", no_wrap=True)
    for place, plan in enumerate(plans, 1):
        e = plan.estimate
        table.add_row(
            names[place - 1] if names else str(place),
            short_layout(plan.layout),
            format_s(e.step_time_s),
            f"{e.tokens_per_s_per_gpu:,.0f}",
            f"{e.mfu_fraction:.1%}",
            format_bytes(e.peak_bytes),
            f"{e.margin_fraction:.0%}",
            e.verdict,
        )
    return table


def _show_detail(plan: Plan, out: Console) -> None:
    e = plan.estimate
    out.print(f"\n[bold]Where the memory goes[/] (GiB; a GPU offers {_gib(e.capacity_bytes)})")
    out.print(_memory_table(e))
    rate = format_flops_per_s(e.model_flops_per_s_per_gpu)
    out.print(f"\n[bold]Where the time goes[/] (exposed, slowest rank; {rate} per GPU)")
    out.print(_time_table(e))


def _memory_table(e: Estimate) -> Table:
    from meshwright.cost.step import MEMORY_TERMS

    table = plain_table()
    table.add_column("stage", justify="right", no_wrap=True)
    table.add_column("layers", justify="right", no_wrap=True)
    for term in MEMORY_TERMS:
        name = _SHORT.get(term, term.removesuffix("_bytes"))
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True)
    for names, stage in _merged(e.stages, MEMORY_TERMS):
        cells = [_gib(stage[term]) for term in MEMORY_TERMS]
        table.add_row(names, str(stage["layers"]), *cells, _gib(stage["peak_bytes"]))
    return table


def _gib(size_bytes: float) -> str:
    gib = size_bytes / 2**30
    return f"{gib:.2f}" if gib < 100 else f"{gib:.1f}"


def _merged(
    stages: Sequence[Mapping[str, Any]], terms: Sequence[str]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return runs of neighbouring stages that hold the same as one line each."""
    runs: list[list[Mapping[str, Any]]] = []
    for stage in stages:
        key = [round(stage[t], 3) for t in terms] + [stage["layers"]]
        if runs and key == [round(runs[-1][0][t], 3) for t in terms] + [runs[-1][0]["layers"]]:
            runs[-1].append(stage)
        else:
            runs.append([stage])
    return [
        (f"{r[0]['stage']}" if len(r) == 1 else f"{r[0]['stage']}-{r[-1]['stage']}", r[0])
        for r in runs
    ]


def _time_table(e: Estimate) -> Table:
    table = plain_table(header=False)
    table.add_column("term")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("share", justify="right")
    scale, unit = (1.0, "s") if e.step_time_s >= 1.0 else (1e3, "ms")
    digits = max(3 - math.floor(math.log10(e.step_time_s * scale)), 0)
    for term, seconds in e.time.items():
        if seconds >= 5e-5 * e.step_time_s:
            name = term.removesuffix("_s").replace("_", " ")
            shown = f"{seconds * scale:.{digits}f} {unit}"
            table.add_row(name, shown, f"{seconds / e.step_time_s:.1%}")
    step = f"{e.step_time_s * scale:.{digits}f} {unit}"
    table.add_row("[bold]step[/]", f"[bold]{step}[/]", "100%")
    return table


def _show_starting_points(plans: Plans, out: Console) -> None:
    if not plans.starting_points:
        return
    out.print("\n[bold]What the guides would start with[/]")
    table = plain_table()
    for name in ("guide", "layout"):
        table.add_column(name, overflow="fold")
    for name in ("step", "peak", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for start in plans.starting_points:
        e = start.plan.estimate
        table.add_row(
            start.name,
            short_layout(start.plan.layout),
            format_s(e.step_time_s),
            format_bytes(e.peak_bytes),
            e.verdict,
        )
    out.print(table)


def _show_pareto(plans: Plans, out: Console) -> None:
    out.print("\n[bold]Memory against time[/] (each line is the fastest within its memory)")
    shown = _far_apart(plans.pareto)
    table = plain_table()
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("layout", overflow="fold")
    for one in shown:
        table.add_row(
            format_bytes(one.peak_bytes), format_s(one.step_time_s), short_layout(one.layout)
        )
    out.print(table)
    if len(shown) < len(plans.pareto):
        left_out = len(plans.pareto) - len(shown)
        out.print(f"{left_out} more that gain less than {WORTH_SHOWING:.0%}: --json has them all.")


def _far_apart(front: Sequence[Ranked]) -> list[Ranked]:
    """Return the layouts of a front, cheapest first, that are clearly faster than the one before.

    Of those that are nearly as fast the cheapest is shown; the fastest of all always is.
    """
    shown = list(front[-1:])
    slowest = shown[0].step_time_s if shown else 0.0
    for one in reversed(front[:-1]):
        if one.step_time_s > slowest * (1.0 + WORTH_SHOWING):
            shown.append(one)
            slowest = one.step_time_s
    return shown[::-1]


def _show_nothing_fits(plans: Plans, out: Console) -> None:
    closest = plans.closest
    assert closest is not None
    missing, limit = format_bytes(plans.missing_bytes), format_bytes(plans.found.limit_bytes)
    out.print(
        f"\n[bold]Nothing fits.[/] The closest layout needs {missing} more per GPU than the "
        f"{limit} it may hold:",
        soft_wrap=True,
    )
    out.print(ranking([closest]))
    _show_detail(closest, out)
    small = plans.smallest_cluster
    if small is None:
        out.print("\nNo larger cluster of these GPUs works either.")
    else:
        out.print(
            f"\nThe smallest cluster that works: [bold]{small.cluster.name}[/] "
            f"({small.layout.world_size} GPUs)"
        )
        out.print(ranking([small]))
    _show_assumed(closest.estimate, out)


def _show_findings(findings: Sequence[Finding], out: Console) -> None:
    # What the environment should hold is the launch's affair: ``check`` and ``--for`` say it.
    shown = [f for f in findings if not f.field.startswith("env.")]
    if shown:
        out.print("\n[bold]To know[/]")
    for finding in shown:
        line = f"  {finding.severity}: {finding.message} [{finding.id}]"
        out.print(line, markup=False, soft_wrap=True)


def _show_assumed(e: Estimate, out: Console) -> None:
    if e.assumed:
        out.print("\n[bold]Assumed[/]")
        for line in e.assumed:
            out.print(f"  - {line}", markup=False, soft_wrap=True)


def _show_layout_text(x: Layout[int], out: Console) -> None:
    from meshwright.parallel.layout import to_text

    out.print("\nThe best layout, for --layout:")
    print(f'"{to_text(x)}"')
