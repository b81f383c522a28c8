"""The verbs as typed functions: what the command line, the web page and the MCP tools call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright import plan_document, registry
from meshwright.cost.explain import TERMS, Explanation, explain_term, values
from meshwright.describe.cluster import Cluster, load_cluster
from meshwright.describe.gpu import known_gpus, load_gpu
from meshwright.describe.job import Job
from meshwright.describe.job import job as make_job
from meshwright.describe.model import Model
from meshwright.describe.models import known_models, load_config, load_model
from meshwright.errors import LayoutError, MeshwrightError, did_you_mean
from meshwright.findings import Finding
from meshwright.parallel.layout import (
    SCHEDULE_TEXT,
    Layout,
    Pipeline,
    from_text,
    to_dict,
)
from meshwright.parallel.mesh import rank_groups
from meshwright.plans import Plan, Plans, estimate_plan
from meshwright.plans import plan as _plan
from meshwright.search import Progress, Refuses, read_space
from meshwright.units import parse
from meshwright.why_not import WhyNot
from meshwright.why_not import why_not as _why_not

if TYPE_CHECKING:
    from meshwright.verify.account_report import AccountReport
    from meshwright.verify.numerics import VerifyReport

__all__ = [
    "Cluster",
    "Job",
    "Model",
    "Plan",
    "Plans",
    "check_output",
    "estimate",
    "explain",
    "job",
    "launch_files",
    "list_known",
    "load_cluster",
    "load_model",
    "plan",
    "ranks",
    "report",
    "save_plan",
    "verify",
    "why_not",
    "write_page",
]

DEFAULT_SEQ_LEN = 4096
DEFAULT_TOKENS_PER_STEP = 4 * 2**20
TUNED = (
    "a tuned Megatron-Core run: communication of tp, cp, dp and pp overlapped, flash attention, "
    "fused kernels, balanced experts"
)


def job(
    model: Model,
    seq_len: int | None = None,
    global_batch_size: int | None = None,
    precision: str = "bf16",
    task: str = "pretrain",
) -> Job:
    """Make a job; what is left out is assumed and listed in ``assumed``.

    ``seq_len`` in tokens defaults to 4096 (or the model's maximum, if shorter),
    ``global_batch_size`` in sequences to about 4M tokens.

    Raises ``JobError`` when a size is below 1 or a name is unknown.
    """
    assumed: list[str] = []
    if seq_len is None:
        seq_len = min(DEFAULT_SEQ_LEN, model.max_seq_len or DEFAULT_SEQ_LEN)
        assumed.append(f"seq_len = {seq_len} tokens (not given)")
    if global_batch_size is None:
        wanted = max(DEFAULT_TOKENS_PER_STEP // max(seq_len, 1), 1)
        global_batch_size = int(2 ** round(math.log2(wanted)))
        assumed.append(f"gbs = {global_batch_size} sequences (not given: about 4M tokens a step)")
    made = make_job(seq_len=seq_len, gbs=global_batch_size, precision_name=precision, task=task)
    assumed.append(TUNED)
    return replace(made, assumed=tuple(assumed))


def plan(
    model: Model,
    cluster: Cluster,
    job: Job,
    *,
    top: int = 5,
    fix: Sequence[str] = (),
    max_memory: str | None = None,
    pareto: bool = False,
    framework: str | None = None,
    progress: Progress | None = None,
) -> Plans:
    """Find the ``top`` fastest layouts that fit, and say why.

    With ``framework`` only layouts that it can run are ranked. ``fix`` limits keys
    (``"tp=8"``, ``"pp=2..8"``), ``max_memory`` ("72GB") bounds the peak.

    Raises ``MeshwrightError`` when an input cannot work or no layout is legal.
    """
    limit = None if max_memory is None else parse(max_memory, "bytes", "max_memory")
    if max_memory is not None and max_memory.strip().replace(".", "").isdigit():
        remedy = f"Write {max_memory.strip()}GB."
        raise MeshwrightError("max_memory", max_memory, "It has no unit.", remedy)
    if limit is not None and limit <= 0:
        raise MeshwrightError("max_memory", max_memory, "It must be above 0.", "Write 72GB.")
    return _plan(
        model,
        cluster,
        job,
        top=top,
        space=read_space(fix),
        max_memory_bytes=limit,
        with_pareto=pareto,
        refuses=None if framework is None else _refusals_of(framework, model, cluster, job),
        progress=progress,
    )


def _refusals_of(framework: str, model: Model, cluster: Cluster, job: Job) -> Refuses:
    from meshwright.frameworks import FRAMEWORKS, unsupported

    if framework not in FRAMEWORKS:
        remedy = did_you_mean(framework, FRAMEWORKS)
        raise MeshwrightError("framework", framework, "It is not a known framework.", remedy)

    def refuses(layout: Layout[int]) -> list[Finding]:
        return unsupported(model, cluster, job, layout, framework)

    return refuses


def estimate(model: Model, cluster: Cluster, job: Job, layout: str | Layout[int]) -> Plan:
    """Price one layout.

    Raises ``LayoutError`` with the first broken rule when it is illegal.
    """
    one = from_text(layout, gpus=cluster.num_gpus) if isinstance(layout, str) else layout
    return estimate_plan(model, cluster, job, one)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """The numbers of a layout, each with the formulas behind it."""

    plan: Plan
    values: dict[str, float]
    formulas: dict[str, list[Explanation]]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line."""
        return {
            "layout": to_dict(self.plan.layout),
            "terms": {
                term: {
                    "value": self.values[term],
                    "what": TERMS[term].what,
                    "formulas": [f.to_dict() for f in self.formulas[term]],
                }
                for term in self.formulas
            },
            "assumed": self.plan.estimate.assumed,
        }


def explain(
    model: Model,
    cluster: Cluster,
    job: Job,
    layout: str | None = None,
    term: str | None = None,
) -> Explained:
    """Return every number of a layout (or one ``term``) with formula, source and what it omits.

    Without ``layout``, the best one is explained.

    Raises ``MeshwrightError`` when the term is unknown or the layout cannot be.
    """
    wanted = [term] if term is not None else list(TERMS)
    formulas = {t: explain_term(t) for t in wanted}
    chosen = _chosen(model, cluster, job, layout)
    found = values(chosen.estimate)
    return Explained(plan=chosen, values={t: found[t] for t in wanted}, formulas=formulas)


def _chosen(model: Model, cluster: Cluster, job: Job, layout: str | None) -> Plan:
    if layout is not None:
        return estimate(model, cluster, job, layout)
    plans = plan(model, cluster, job, top=1)
    if not plans.plans:
        raise LayoutError("layout", None, "No layout fits.", "Give one with --layout.")
    return plans.plans[0]


def why_not(model: Model, cluster: Cluster, job: Job, layout: str | None, change: str) -> WhyNot:
    """Return what ``change`` ("tp=8 pp=2") to a layout costs, or which rule forbids it.

    With ``layout``, nothing but the change where that is legal; without, the best layout with the
    change against the best of all.

    Raises ``LayoutError`` when the change cannot be read or the layout cannot be.
    """
    base = _chosen(model, cluster, job, layout)
    return _why_not(model, cluster, job, base, change, given=layout is not None)


def ranks(gpus: int, layout: str = "") -> dict[str, list[list[int]]]:
    """Return the process groups of a layout by name.

    Raises ``LayoutError`` when the layout does not fill ``gpus`` ranks.
    """
    x = from_text(layout, gpus=gpus)
    return rank_groups(
        gpus,
        tp=x.tp,
        cp=x.cp,
        pp=x.pp,
        ep=x.ep,
        etp=x.etp,
        order=x.order,
        hierarchical_cp=x.hierarchical_cp,
        vpp=x.vpp,
    )


def launch_files(plan: Plan, framework: str, launcher: str = "torchrun") -> dict[str, str]:
    """Return the launch files of a plan for a framework, text by path.

    Raises ``MeshwrightError`` when the framework is unknown or cannot express the plan.
    """
    from meshwright.frameworks import launch_files as written

    return written(plan.model, plan.cluster, plan.job, plan.layout, framework, launcher)


def report(path: str) -> str:
    """Return the plan of a TOML file as one HTML page with pictures; needs ``meshwright[report]``.

    Raises ``MeshwrightError`` when the file is no plan, or pictures cannot be drawn.
    """
    saved = plan_document.load(Path(path))
    priced = estimate_plan(saved.model, saved.cluster, saved.job, saved.layout)
    try:
        from meshwright.report import page
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        rule = "Pictures need matplotlib."
        remedy = "pip install 'meshwright[report]'"
        raise MeshwrightError("matplotlib", None, rule, remedy) from None
    return page(priced)


def write_page(path: str, text: str) -> None:
    """Write a page, whole or not at all. Raises ``DocumentError`` when it cannot be written."""
    plan_document.write_whole(Path(path), text)


def save_plan(plan: Plan, path: str, *, model_text: str, cluster_text: str) -> None:
    """Write a plan as TOML, whole or not at all.

    Raises ``DocumentError`` when the file cannot be written.
    """
    plan_document.save(plan, Path(path), model_text=model_text, cluster_text=cluster_text)


def verify(
    layout: str,
    *,
    model: str | None = None,
    dtype: str = "float32",
    timeout_s: float = 120.0,
    switches: str = "",
) -> VerifyReport:
    """Run a layout on local processes against one process; needs ``meshwright[runtime]``.

    ``model`` gives the structure, made small; without it a small one that the layout can use.
    ``switches`` is text such as ``"overlap_tp_comm=false"``, in the names of ``Execution``.

    Raises ``LayoutError`` before anything starts when the layout cannot run, ``LaunchError`` when
    a rank fails or ``timeout_s`` passes.
    """
    try:
        from meshwright.verify.numerics import verify as verified
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        rule = "Running a layout needs PyTorch."
        remedy = "pip install 'meshwright[runtime]'"
        raise MeshwrightError("torch", None, rule, remedy) from None
    from meshwright.runtime.switches import execution_from_text

    execution = execution_from_text(switches)
    if model is None:
        return verified(layout, dtype=dtype, timeout_s=timeout_s, execution=execution)
    from meshwright.runtime.read_shape import shape_of

    shape = shape_of(load_model(model), load_config(model))
    return verified(layout, shape, dtype, timeout_s, execution)


def account(layout: str, *, model: str | None = None, timeout_s: float = 120.0) -> AccountReport:
    """Compare what the ranks of a layout hold and send, to the byte, with what is priced.

    A step of a small model with the structure of ``model`` runs as under ``verify``.

    Raises ``LaunchError`` when a rank fails or ``timeout_s`` passes.
    """
    from meshwright.parallel.layout import from_text
    from meshwright.runtime.read_shape import shape_of
    from meshwright.verify.account_report import account_report

    shape = None if model is None else shape_of(load_model(model))
    return account_report(from_text(layout), shape, timeout_s)


def check_output(path: str) -> None:
    """Raise ``DocumentError`` unless a plan may be written at ``path``."""
    plan_document.check_writable(Path(path))


def list_known(what: str) -> list[dict[str, Any]]:
    """Return what meshwright knows of ``gpus``, ``models``, ``checks``, ``schedules``, ...

    Raises ``MeshwrightError`` when there is no such list.
    """
    makers = {
        "gpus": _gpus,
        "models": _models,
        "checks": _checks,
        "schedules": _schedules,
        "frameworks": _frameworks,
        "terms": _terms,
    }
    if what not in makers:
        raise MeshwrightError("list", what, "There is no such list.", did_you_mean(what, makers))
    return makers[what]()


def _gpus() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in known_gpus():
        gpu = load_gpu(name)
        rows.append(
            {
                "name": gpu.name,
                "architecture": gpu.architecture,
                "hbm_bytes": gpu.hbm_bytes,
                "hbm_bytes_per_s": gpu.hbm_bytes_per_s,
                "bf16_flops_per_s": gpu.peak_flops_per_s.get("bf16", 0.0),
                "peer_bytes_per_s": gpu.peer_bytes_per_s,
                "source": gpu.sources.get("default", ""),
            }
        )
    return rows


def _models() -> list[dict[str, Any]]:
    return [
        {
            "name": m.name,
            "model_type": m.model_type,
            "num_params": m.num_params,
            "num_active_params": m.num_active_params,
        }
        for m in known_models()
    ]


def _checks() -> list[dict[str, Any]]:
    from meshwright.checks import all_checks

    return [
        {"id": c.id, "severity": c.severity, "field": c.field, "rule": c.rule, "remedy": c.remedy}
        for c in all_checks()
    ]


def _schedules() -> list[dict[str, Any]]:
    package = "meshwright.parallel.schedules"
    rows: list[dict[str, Any]] = []
    for name in registry.names(package):
        doc = registry.load(package, name, field="schedule").__doc__ or ""
        text = SCHEDULE_TEXT[Pipeline[name]]
        rows.append({"name": text, "what": doc.strip().splitlines()[0]})
    return rows


def _frameworks() -> list[dict[str, Any]]:
    from meshwright.frameworks import FRAMEWORKS

    return [{"name": name} for name in FRAMEWORKS]


def _terms() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for term in TERMS:
        sources = [f.source for f in explain_term(term) if f.source]
        rows.append({"name": term, "what": TERMS[term].what, "source": sources[0]})
    return rows
