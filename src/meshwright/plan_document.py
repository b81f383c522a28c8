"""``plan.toml``: a plan as a person can read, keep, compare and hand to another command."""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.describe.cluster import Cluster, load_cluster
from meshwright.describe.job import Job
from meshwright.describe.job import job as make_job
from meshwright.describe.model import Model
from meshwright.describe.models import load_model
from meshwright.errors import DocumentError
from meshwright.parallel.layout import Layout, from_text, to_text
from meshwright.plans import Plan


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a ``plan.toml`` says: all that is needed to price the plan again."""

    model: Model
    cluster: Cluster
    job: Job
    layout: Layout[int]


def to_toml(plan: Plan, *, model_text: str, cluster_text: str) -> str:
    """Return the document. ``model_text`` and ``cluster_text`` are what was asked for.

    Raises ``DocumentError`` when the job has settings that the document has no words for.
    """
    e, job = plan.estimate, plan.job
    plain = make_job(
        seq_len=job.seq_len, gbs=job.gbs, precision_name=job.precision.name, task=job.task
    )
    if job != plain:
        rule = "A plan document holds sequence length, batch, a known precision and the task alone."
        raise DocumentError("job", job, rule, "Keep the other settings beside it.")
    lines = [
        "# A meshwright plan: `meshwright estimate` prices the layout again.",
        f"model = {_quoted(model_text)}",
        f"cluster = {_quoted(cluster_text)}",
        f"layout = {_quoted(to_text(plan.layout))}",
        "",
        "[job]",
        f"seq_len = {job.seq_len}",
        f"gbs = {job.gbs}",
        f"precision = {_quoted(job.precision.name)}",
        f"task = {_quoted(job.task)}",
        "",
        "[estimate]",
        f"step_time_s = {e.step_time_s!r}",
        f"tokens_per_s_per_gpu = {e.tokens_per_s_per_gpu!r}",
        f"mfu_fraction = {e.mfu_fraction!r}",
        f"peak_bytes = {e.peak_bytes!r}",
        f"capacity_bytes = {e.capacity_bytes!r}",
        f"verdict = {_quoted(e.verdict)}",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # TOML has the escapes of JSON, but not its pairs of surrogates.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def check_writable(path: Path) -> None:
    """Raise ``DocumentError`` unless a file may be written at ``path``; nothing is written."""
    if path.is_dir():
        rule = "It is a folder."
    elif not path.parent.is_dir():
        rule = f"There is no folder {path.parent}."
    elif not os.access(path.parent, os.W_OK):
        rule = f"The folder {path.parent} cannot be written to."
    else:
        return
    raise DocumentError("output", str(path), rule, "Choose another path.")


def save(plan: Plan, path: Path, *, model_text: str, cluster_text: str) -> None:
    """Write the document, whole or not at all.

    Raises ``DocumentError`` when the folder is missing or cannot be written.
    """
    check_writable(path)
    write_whole(path, to_toml(plan, model_text=model_text, cluster_text=cluster_text))


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all. Raises ``DocumentError`` when it cannot be written."""
    check_writable(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            whole = Path(folder) / path.name
            whole.write_text(text, encoding="utf-8")
            whole.replace(path)
    except OSError as error:
        raise DocumentError(
            "output", str(path), f"It cannot be written: {error.strerror}.", "Choose another path."
        ) from None


def load(path: Path) -> Saved:
    """Read a ``plan.toml``. Raises ``MeshwrightError`` naming what is missing or wrong."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        rule = f"It cannot be read: {error.strerror}."
        raise DocumentError("plan", str(path), rule, "Give a plan.toml.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        rule = f"It is not TOML: {error}."
        raise DocumentError("plan", str(path), rule, "Write it with plan -o plan.toml.") from None
    return from_document(document, str(path))


def from_document(document: dict[str, Any], where: str) -> Saved:
    """Read the parsed document; ``where`` names it in errors."""
    job = _entry(document, "job", dict, where)
    cluster = load_cluster(_entry(document, "cluster", str, where))
    return Saved(
        model=load_model(_entry(document, "model", str, where)),
        cluster=cluster,
        job=make_job(
            seq_len=_entry(job, "seq_len", int, where),
            gbs=_entry(job, "gbs", int, where),
            precision_name=_entry(job, "precision", str, where),
            task=_entry(job, "task", str, where),
        ),
        layout=from_text(_entry(document, "layout", str, where), gpus=cluster.num_gpus),
    )


def _entry(document: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = document.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DocumentError(
            f"{where}: {key}",
            value,
            f"A plan has a {kind.__name__} here.",
            "Write it with meshwright plan -o plan.toml.",
        )
    return value
