"""Commands that choose: plan, estimate, explain, report, ranks, list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from meshwright.describe.cluster import Cluster
    from meshwright.describe.job import Job
    from meshwright.describe.model import Model

ModelText = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A config.json, its folder, or a known name."),
]
ClusterText = Annotated[
    str,
    typer.Argument(metavar="CLUSTER", help="64xH100, 8x8xH100 (nodes x GPUs) or a TOML file."),
]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", help="Tokens of a sequence.  [default: 4096]")
]
GlobalBatchSize = Annotated[
    int | None,
    typer.Option(
        "--global-batch-size", help="Sequences of an optimizer step.  [default: about 4M tokens]"
    ),
]
PrecisionName = Annotated[
    str, typer.Option("--precision", help="bf16, fp16, fp32, fp8, fp8-mx, nvfp4, ...")
]
TaskName = Annotated[str, typer.Option("--task", help="pretrain, sft or lora.")]
LayoutText = Annotated[
    str, typer.Option("--layout", help='Degrees and choices, such as "tp=4 pp=4 vpp=5".')
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (plan, estimate, explain, report, ranks):
        app.command()(command)
    app.command(name="list")(list_known)


def plan(
    model: ModelText,
    cluster: ClusterText,
    seq_len: SeqLen = None,
    global_batch_size: GlobalBatchSize = None,
    precision: PrecisionName = "bf16",
    task: TaskName = "pretrain",
    top: Annotated[int, typer.Option("--top", min=1, max=1000, help="Layouts to show.")] = 5,
    framework: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="A framework, such as megatron-lm: rank what it can run, write its launch files.",
        ),
    ] = None,
    launcher: Annotated[str, typer.Option("--launcher", help="torchrun or slurm.")] = "torchrun",
    fix: Annotated[
        list[str] | None,
        typer.Option(
            "--fix", help='Limit a key, any number of times: tp=8, pp=2..8, "zero=optim ep=8,16".'
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", help="Bytes of a GPU to use at most, such as 72GB."),
    ] = None,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Also show the front of memory against time.")
    ] = False,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the best plan to this TOML file.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Find the fastest layouts that fit, and say why."""
    from meshwright import api
    from meshwright.cli.show import progress_bar, show_plans
    from meshwright.cli.text import print_json

    m, c, j = _inputs(model, cluster, seq_len, global_batch_size, precision, task)
    if output is not None:
        api.check_output(output)
    with progress_bar() as progress:
        plans = api.plan(
            m,
            c,
            j,
            top=top,
            fix=fix or (),
            max_memory=max_memory,
            pareto=pareto or json,
            framework=framework,
            progress=progress,
        )
    files: dict[str, str] = {}
    if plans.plans and framework is not None:
        files = api.launch_files(plans.plans[0], framework, launcher)
    if plans.plans and output is not None:
        api.save_plan(plans.plans[0], output, model_text=model, cluster_text=cluster)
    if json:
        out = plans.to_dict()
        for shown in out["plans"][:1] if framework is not None else ():
            shown["files"] = files
        print_json(out)
    else:
        show_plans(plans, m, c, j)
        for path, text in files.items():
            typer.echo(f"\n# {path}\n{text}")
        if output is not None and plans.plans:
            typer.echo(f"Wrote {output}", err=True)
    if not plans.plans:
        raise typer.Exit(1)


def estimate(
    model: ModelText,
    cluster: ClusterText,
    layout: LayoutText,
    seq_len: SeqLen = None,
    global_batch_size: GlobalBatchSize = None,
    precision: PrecisionName = "bf16",
    task: TaskName = "pretrain",
    json: AsJson = False,
) -> None:
    """Price one layout: step time, MFU, memory of every stage."""
    from meshwright import api
    from meshwright.cli.show import show_plan
    from meshwright.cli.text import print_json

    m, c, j = _inputs(model, cluster, seq_len, global_batch_size, precision, task)
    priced = api.estimate(m, c, j, layout)
    if json:
        print_json(
            {
                "layout": priced.to_dict()["layout"],
                "estimate": priced.estimate.to_dict(),
                "findings": [f.to_dict() for f in priced.findings],
            }
        )
    else:
        show_plan(priced)


def explain(
    model: ModelText,
    cluster: ClusterText,
    term: Annotated[
        str | None, typer.Argument(metavar="[TERM]", help="One term, such as tp_comm_s.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option("--layout", help="The layout.  [default: the best one]")
    ] = None,
    why_not: Annotated[
        str | None,
        typer.Option("--why-not", help='Compare with this, such as "tp=8 pp=2" or dp=4.'),
    ] = None,
    seq_len: SeqLen = None,
    global_batch_size: GlobalBatchSize = None,
    precision: PrecisionName = "bf16",
    task: TaskName = "pretrain",
    json: AsJson = False,
) -> None:
    """Show where numbers come from, or why not another layout."""
    from meshwright import api
    from meshwright.cli.show import show_explanation, show_why_not
    from meshwright.cli.text import print_json

    m, c, j = _inputs(model, cluster, seq_len, global_batch_size, precision, task)
    if why_not is not None and term is not None:
        raise typer.BadParameter("TERM and --why-not exclude each other.")
    if why_not is not None:
        answer = api.why_not(m, c, j, layout, why_not)
        print_json(answer.to_dict()) if json else show_why_not(answer)
        return
    told = api.explain(m, c, j, layout, term)
    print_json(told.to_dict()) if json else show_explanation(told)


def report(
    plan: Annotated[
        str, typer.Argument(metavar="PLAN", help="A plan document, written by plan -o.")
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", help="Write the page to this HTML file.")
    ] = "plan.html",
) -> None:
    """Write a plan as one HTML page: memory by stage, time, pipeline."""
    from meshwright import api

    api.check_output(output)
    api.write_page(output, api.report(plan))
    typer.echo(f"Wrote {output}", err=True)


def ranks(
    gpus: Annotated[int, typer.Option("--gpus", help="Number of ranks.")],
    layout: LayoutText = "",
    json: AsJson = False,
) -> None:
    """Print the process groups of a layout."""
    from meshwright import api
    from meshwright.cli.show import show_groups
    from meshwright.cli.text import print_json

    groups = api.ranks(gpus, layout)
    print_json({"groups": groups}) if json else show_groups(groups)


def list_known(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT", help="gpus, models, checks, schedules, frameworks or terms."
        ),
    ],
    json: AsJson = False,
) -> None:
    """List what meshwright knows."""
    from meshwright import api
    from meshwright.cli.show import show_rows
    from meshwright.cli.text import print_json

    rows = api.list_known(what)
    print_json(rows) if json else show_rows(rows)


def _inputs(
    model: str,
    cluster: str,
    seq_len: int | None,
    global_batch_size: int | None,
    precision: str,
    task: str,
) -> tuple[Model, Cluster, Job]:
    from meshwright import api

    m = api.load_model(model)
    c = api.load_cluster(cluster)
    return m, c, api.job(m, seq_len, global_batch_size, precision, task)
