"""A launch of one framework as the launch of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.errors import LaunchError, MeshwrightError
from meshwright.findings import Finding
from meshwright.frameworks.carried import Carried, carry
from meshwright.frameworks.check import CheckResult, check
from meshwright.frameworks.launch import TITLES
from meshwright.frameworks.saved import PLAN
from meshwright.frameworks.write import counterparts, launch_files, places
from meshwright.parallel.layout import Layout, from_text, to_dict, to_text


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The files of a converted launch, and what was read to make them."""

    read: CheckResult
    framework: str
    layout: Layout[int]
    files: dict[str, str]
    carried: Carried
    notes: list[str]

    @property
    def findings(self) -> list[Finding]:
        """What the launch that was read is told."""
        return self.read.findings

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line."""
        return {
            "from": self.read.launch.framework,
            "framework": self.framework,
            "layout": to_dict(self.layout),
            "files": self.files,
            "carried": {name: list(v) for name, v in self.carried.training.items()},
            "not_carried": list(self.carried.lost),
            "notes": self.notes,
            "findings": [f.to_dict() for f in self.findings],
            "unread": list(self.read.unread),
        }


@dataclass(frozen=True, kw_only=True)
class Known:
    """Model, job and layout of a launch that says all three."""

    model: Model
    job: Job
    layout: Layout[int]


def convert(
    source: str | Path | Sequence[str],
    to: str,
    *,
    launcher: str = "torchrun",
    gpus: int | None = None,
    cluster: str | None = None,
    framework: str | None = None,
    model: str | None = None,
    changes: Sequence[str] = (),
) -> Converted:
    """Write a launch for another framework.

    ``changes`` are ``key=value`` of a layout that replace what was read, such as
    ``zero=optim_grads_params`` for a framework that only shards everything; ``model`` states the
    model where the launch does not.

    Raises ``MeshwrightError`` when the launch does not say enough, or would not start itself, and
    ``LaunchError`` when the other framework cannot express it.
    """
    read = check(source, gpus=gpus, cluster=cluster, framework=framework)
    known = known_of(read, model)
    if "cuda_graphs" in _unchosen(read, to):
        execution = replace(known.job.execution, cuda_graphs="none")
        known = replace(known, job=replace(known.job, execution=execution))
    layout = with_changes(known.layout, changes)
    carried = carried_to(read, known, to)
    files = launch_files(known.model, read.cluster, known.job, layout, to, launcher, carried)
    return Converted(
        read=read,
        framework=to,
        layout=layout,
        files=files,
        carried=carried,
        notes=_notes(read, known, to, carried),
    )


def carried_to(read: CheckResult, known: Known, to: str) -> Carried:
    """Return what the launch says besides its plan that a framework can be told."""
    launch = read.launch
    if launch.framework == PLAN:
        return Carried()
    return carry(launch, to, places(launch.framework), counterparts(to), known.job.gbs)


def known_of(read: CheckResult, model: str | None = None) -> Known:
    """Return what a launch says; ``model`` states the model where it does not.

    Raises the first reason why it does not say enough.
    """
    launch = read.launch
    found = read.model
    if model is not None:
        from meshwright.describe.models import load_model

        found = load_model(model)
    if found is None:
        rule = "The launch names no known model and gives no shape."
        raise LaunchError("model", launch.words.get("model"), rule, "Give --model.")
    for finding in launch.findings:
        if finding.severity == "error" and read.layout is None:
            raise LaunchError(finding.field, finding.value, finding.rule, finding.remedy)
    layout = read.layout or launch.layout()
    job = read.job or launch.job(layout)
    return Known(model=found, job=job, layout=layout)


def with_changes(x: Layout[int], changes: Sequence[str]) -> Layout[int]:
    """Return the layout with some ``key=value`` replaced; data parallelism takes what is left.

    Raises ``LayoutError`` when the result is no layout.
    """
    if not changes:
        return x
    items = dict(item.split("=", 1) for item in to_text(x).split(" "))
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign:
            raise MeshwrightError("set", change, "A change is key=value.", "Write tp=4.")
        items[key] = value
    for derived in ("edp", "dp"):
        items.pop(derived, None)
    if {c.partition("=")[0] for c in changes} & {"vpp", "schedule", "pp"} and not any(
        c.startswith("schedule=") for c in changes
    ):
        items.pop("schedule", None)
    return from_text(" ".join(f"{k}={v}" for k, v in items.items()), x.world_size)


def _unchosen(read: CheckResult, to: str) -> list[str]:
    """Return the switches that only the other framework's default turned on."""
    graphs = read.launch.settings.get("cuda_graph_impl")
    default = graphs is not None and graphs.origin.startswith("default")
    return ["cuda_graphs"] if default and to != read.launch.framework else []


def _notes(read: CheckResult, known: Known, to: str, carried: Carried) -> list[str]:
    notes: list[str] = []
    if to in ("skyrl", "verl") and known.job.task == "pretrain":
        trains = "a model by SFT" if to == "skyrl" else "a policy by GRPO"
        notes.append(f"{TITLES[to]} trains {trains}: layout and batch are kept, the task is not.")
    source = TITLES[read.launch.framework]
    notes += [f"{name}: on by {source}'s default only; left off" for name in _unchosen(read, to)]
    notes += [f"not carried: {line}" for line in carried.lost]
    reduced = read.launch.settings.get("grad_reduce_in_bf16")
    if reduced is not None and reduced.value and to != "megatron-lm":
        how = "set grad_reduce_in_fp32=False where its precision is made"
        how = "training.mixed_precision_reduce sets it" if to == "torchtitan" else how
        notes.append(
            f"not carried: gradients in 16 bits ({reduced.origin}): {TITLES[to]} keeps them in"
            f" fp32; {how}"
        )
    by_op = read.launch.settings.get("recompute_every_second_matmul")
    if by_op is not None:
        notes.append(f"not carried: selective checkpointing by op ({by_op.origin}): read as none")
    if not read.ok:
        first = next(f for f in read.findings if f.severity == "error")
        notes.append(f"The launch that was read would not start: {first.message}")
    return notes


def with_gpus(x: Layout[int], gpus: int) -> Layout[int]:
    """Return the layout with data parallelism for another number of GPUs.

    Raises ``LayoutError`` when both meshes do not fit that number.
    """
    items = dict(item.split("=", 1) for item in to_text(x).split(" "))
    for derived in ("edp", "dp"):
        items.pop(derived, None)
    return from_text(" ".join(f"{k}={v}" for k, v in items.items()), gpus)
