"""Writing a launch for any framework: complete files, or a refusal that names what is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.errors import LaunchError, did_you_mean
from meshwright.findings import Finding
from meshwright.frameworks.carried import Carried, Place
from meshwright.frameworks.launch import FRAMEWORKS, TITLES
from meshwright.frameworks.written import Target, script
from meshwright.parallel.layout import Layout


def _writer(framework: str) -> Any:
    if framework not in FRAMEWORKS:
        remedy = did_you_mean(framework, FRAMEWORKS)
        raise LaunchError("framework", framework, "It is not a known framework.", remedy)
    return import_module(f"meshwright.frameworks.{framework.replace('-', '_')}.write")


def unsupported(
    model: Model, cluster: Cluster | None, job: Job, layout: Layout[int], framework: str
) -> list[Finding]:
    """Return what the framework cannot express, each with the nearest that it can."""
    target = Target(model=model, job=job, layout=layout, cluster=cluster)
    found: list[Finding] = _writer(framework).unsupported(target)
    return found


def target_of(
    model: Model,
    cluster: Cluster | None,
    job: Job,
    layout: Layout[int],
    carried: Carried | None = None,
) -> Target:
    """Return what is to be written."""
    return Target(
        model=model, job=job, layout=layout, cluster=cluster, carried=carried or Carried()
    )


def places(framework: str) -> dict[str, Place]:
    """Return what the flags and paths of a framework's training settings are called."""
    found: dict[str, Place] = _writer(framework).places()
    return found


def counterparts(framework: str) -> frozenset[str]:
    """Return the names of the training settings that a framework can be told."""
    return frozenset(_writer(framework).TRAINING)


def launch_files(
    model: Model,
    cluster: Cluster | None,
    job: Job,
    layout: Layout[int],
    framework: str,
    launcher: str = "torchrun",
    carried: Carried | None = None,
) -> dict[str, str]:
    """Return the files that start this layout, text by path: a script and what it needs.

    ``launcher`` is ``torchrun`` or ``slurm``. What only the user knows (data, tokenizer, paths)
    are variables at the top of the script, unless ``carried`` has it from another launch.

    Raises ``LaunchError`` when framework or launcher is unknown, or when the framework cannot
    express the layout, with the first thing that it cannot.
    """
    target = target_of(model, cluster, job, layout, carried)
    for found in _writer(framework).unsupported(target):
        raise LaunchError(found.field, found.value, found.rule, found.remedy)
    written = _writer(framework).write(target)
    name = "run.sbatch" if launcher == "slurm" else "run.sh"
    return {name: script(target, written, launcher, TITLES[framework]), **written.files}
