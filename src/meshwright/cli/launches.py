"""Commands that read and write launches: check, convert, compare, resize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshwright.cli.planning import AsJson
from meshwright.cli.text import print_json, signed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from meshwright.frameworks.check import CheckResult
    from meshwright.frameworks.compare import Comparison
    from meshwright.frameworks.resize import Resized

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
LaunchText = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE | -- COMMAND ...",
        help="A script, YAML, TOML, Python or log; or after -- the command itself.",
    ),
]
LauncherName = Annotated[str, typer.Option("--launcher", help="torchrun or slurm.")]
ModelText = Annotated[
    str | None, typer.Option("--model", help="The model, where the launch does not say.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (check, convert, compare, resize):
        app.command()(command)


def check(
    launch: LaunchText,
    gpus: Gpus = None,
    cluster: ClusterText = None,
    framework: FrameworkName = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="Also show every setting and where it came from.")
    ] = False,
    notes: Annotated[
        bool, typer.Option("--notes", help="Also show notes: defaults, and changes without harm.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Say what is wrong with a launch before it starts."""
    from meshwright.frameworks import check as checking

    result = checking.check(source_of(launch), gpus=gpus, cluster=cluster, framework=framework)
    if json:
        print_json(result.to_dict())
    else:
        show_check(result, settings=settings, notes=notes)
    if not result.ok:
        raise typer.Exit(1)


def convert(
    launch: LaunchText,
    to: Annotated[
        str,
        typer.Option("--to", help="megatron-lm, megatron-bridge, nemo, skyrl, verl, torchtitan."),
    ],
    launcher: LauncherName = "torchrun",
    gpus: Gpus = None,
    cluster: ClusterText = None,
    framework: FrameworkName = None,
    model: ModelText = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help='Change the layout on the way: "zero=optim_grads_params".'),
    ] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the files into this folder.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Write a launch for another framework, or say what it lacks."""
    from meshwright.frameworks import convert as converting

    done = converting.convert(
        source_of(launch),
        to,
        launcher=launcher,
        gpus=gpus,
        cluster=cluster,
        framework=framework,
        model=model,
        changes=changes or (),
    )
    if output is not None:
        _write_files(done.files, Path(output))
    if json:
        print_json(done.to_dict())
        return
    for note in (*done.notes, *(f"not read: {line}" for line in done.read.unread)):
        typer.echo(note, err=True)
    if output is None:
        _show_files(done.files)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A launch, or a plan document.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    cluster: ClusterText = None,
    gpus: Gpus = None,
    json: AsJson = False,
) -> None:
    """Put two launches side by side: what differs and costs."""
    from meshwright.frameworks import compare as comparing

    found = comparing.compare(a, b, cluster=cluster, gpus=gpus)
    if json:
        print_json(found.to_dict())
        return
    from meshwright.units import format_bytes, format_s

    for difference in found.differences:
        effect = ""
        if difference.step_time_s is not None and difference.peak_bytes is not None:
            effect = (
                f"  alone: step {_change(difference.step_time_s, format_s)},"
                f" peak {_change(difference.peak_bytes, format_bytes)}"
            )
        typer.echo(f"{difference.field}: {difference.a} -> {difference.b}{effect}")
    _show_terms("time", found.time, format_s)
    _show_terms("memory", found.memory, format_bytes)
    _explain(found)
    for note in found.notes:
        typer.echo(f"note: {note}")


def _explain(found: Comparison) -> None:
    """Say what became of step time and peak, and which difference and term it is."""
    from meshwright.units import format_bytes, format_s

    a, b = found.a.estimate, found.b.estimate
    if a is None or b is None:
        return
    forms = {"step_time_s": ("step", format_s), "peak_bytes": ("peak", format_bytes)}
    for what, (name, form) in forms.items():
        before, after = getattr(a, what), getattr(b, what)
        line = f"{name} {form(before)} -> {form(after)}"
        if what == "peak_bytes":
            capacities = dict.fromkeys(form(x.capacity_bytes) for x in (a, b))
            line += f" of {' -> '.join(capacities)}: {a.verdict} -> {b.verdict}"
        typer.echo(f"{line}; {_why(found, what, form)}")


def _why(found: Comparison, what: str, form: Callable[[float], str]) -> str:
    by = next((d for d in found.differences if d.field == found.explains.get(what)), None)
    terms = found.time if what == "step_time_s" else found.memory
    whole = sum(after - before for before, after in (terms or {}).values())
    if _change(whole, form) == "0":
        return "nothing that differs changes it"
    if by is None or terms is None:
        return "no single difference explains it"
    name = max(terms, key=lambda t: (terms[t][1] - terms[t][0]) * (1 if whole > 0 else -1))
    most = _change(terms[name][1] - terms[name][0], form)
    alone = _change(getattr(by, what), form)
    return (
        f"{by.field} ({by.a} -> {by.b}) alone makes {alone} of {_change(whole, form)},"
        f" most of it in {name} ({most})"
    )


def _change(value: float, form: Callable[[float], str]) -> str:
    """Return a change with its sign; what is only rounding is no change."""
    return "0" if abs(value) < 1e-9 else signed(value, form)


def resize(
    launch: LaunchText,
    gpus: Annotated[int, typer.Option("--gpus", min=1, max=2**20, help="GPUs to move to.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the launch to this file.")
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Show what changes in the file, and nothing else.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Write a new script instead of editing the launch.")
    ] = False,
    launcher: LauncherName = "torchrun",
    framework: FrameworkName = None,
    model: ModelText = None,
    json: AsJson = False,
) -> None:
    """Move a launch to another number of GPUs, its batch kept."""
    from meshwright.frameworks import resize as resizing

    moved = resizing.resize(
        source_of(launch), gpus, framework=framework, model=model, launcher=launcher, fresh=fresh
    )
    if output is not None:
        path = Path(output)
        first, *rest = moved.files
        _write_files({path.name: moved.files[first]}, path.parent)
        _write_files({name: moved.files[name] for name in rest}, path.parent)
    if json:
        print_json(moved.to_dict())
        return
    _tell_resized(moved)
    if diff:
        typer.echo(_bytes(moved.diff), nl=False)
    elif output is None:
        _show_files(moved.files)


def _tell_resized(moved: Resized) -> None:
    for name, (before, after) in moved.changes.items():
        typer.echo(f"{name}: {before} -> {after}", err=True)
    for line in moved.kept:
        typer.echo(f"kept: {line}", err=True)
    for line in moved.notes:
        typer.echo(f"note: {line}", err=True)
    if moved.by_hand:
        typer.echo("The launch cannot be edited safely: a new script is written.", err=True)
        typer.echo("To keep your file, change in it:", err=True)
        for line in moved.by_hand:
            typer.echo(f"  {line}", err=True)


def _show_terms(
    title: str, terms: Mapping[str, tuple[float, float]] | None, form: Callable[[float], str]
) -> None:
    if terms is None:
        return
    typer.echo(f"{title}:")
    for name, (before, after) in terms.items():
        if before or after:
            change = _change(after - before, form)
            typer.echo(f"  {name:24} {form(before):>12} {form(after):>12} {change:>13}")
    totals = [sum(pair[side] for pair in terms.values()) for side in (0, 1)]
    change = _change(totals[1] - totals[0], form)
    typer.echo(f"  {'together':24} {form(totals[0]):>12} {form(totals[1]):>12} {change:>13}")


def _show_files(files: Mapping[str, str]) -> None:
    for name, text in files.items():
        if len(files) > 1:
            typer.echo(f"# ---- {name}")
        typer.echo(_bytes(text), nl=False)


def _bytes(text: str) -> bytes:
    """Return text as the bytes it was read from: what was not UTF-8 comes back."""
    return text.encode("utf-8", "surrogateescape")


def _write_files(files: Mapping[str, str], folder: Path) -> None:
    from meshwright.errors import DocumentError

    for name, text in files.items():
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_bytes(text))
        except OSError as error:
            rule = f"It cannot be written: {error.strerror}."
            raise DocumentError("output", str(path), rule, "Choose another path.") from None
        typer.echo(f"Wrote {path}", err=True)


def source_of(words: Sequence[str]) -> str | Sequence[str]:
    """Return the file that the words name, or the words as a command.

    ``bash FILE`` and ``sbatch FILE`` mean the file.
    """
    if len(words) == 1 and not words[0].startswith("-") and "=" not in words[0]:
        return words[0]
    if words[0] in ("bash", "sh", "sbatch") and len(words) > 1 and Path(words[1]).is_file():
        return words[1]
    return words


_NOT_SAID = ("default", "derived", "changed by Megatron-LM (MLM-ARG-etp", "changed by Megatron-B")
"""How origins of values begin that the user did not choose; without experts ETP is one."""


def show_check(result: CheckResult, *, settings: bool = False, notes: bool = False) -> None:
    """Print a check for people: what was read, both grids, findings, price."""
    from meshwright.frameworks.launch import TITLES, layout_settings

    launch = result.launch
    gpus = "an unknown number of" if launch.gpus is None else launch.gpus
    typer.echo(f"{TITLES[launch.framework]}, {gpus} {'GPU' if gpus == 1 else 'GPUs'}")
    shown = launch.settings if settings else layout_settings(launch)
    idle = ("default", "derived") if launch.words.get("num_moe_experts") else _NOT_SAID
    told = {n: s for n, s in shown.items() if settings or not s.origin.startswith(idle)}
    for name, setting in told.items():
        typer.echo(f"  {name} = {setting.value}  ({setting.origin})")
    if result.grids is not None:
        for name, grid in result.grids.items():
            axes = " x ".join(f"{axis} {size}" for axis, size in grid.items())
            typer.echo(f"  {name} grid: {axes} = {_product(grid)} GPUs")
    for finding in result.findings:
        if notes or finding.severity != "note":
            typer.echo(f"{finding.severity}: {finding.message} [{finding.id}]")
    for line in launch.assumed:
        typer.echo(f"assumed: {line}")
    for line in launch.unread:
        typer.echo(f"not read: {line}")
    _show_price(result)
    hidden = 0 if notes else sum(f.severity == "note" for f in result.findings)
    if hidden:
        typer.echo(f"{hidden} {'note' if hidden == 1 else 'notes'} more: --notes shows them.")
    errors = sum(f.severity == "error" for f in result.findings)
    told = f"{errors} {'error' if errors == 1 else 'errors'}"
    typer.echo(f"It would not start: {told}." if errors else "It would start.")


def _show_price(result: CheckResult) -> None:
    if result.estimate is None:
        typer.echo(f"not priced: {result.unpriced}")
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
