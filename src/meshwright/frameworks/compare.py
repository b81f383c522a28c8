"""Two launches side by side: what differs, what it costs term by term, which difference it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import MeshwrightError
from meshwright.frameworks.carried import plan_keys
from meshwright.frameworks.check import CheckResult, check
from meshwright.frameworks.convert import with_changes, with_gpus
from meshwright.frameworks.in_place import pairs
from meshwright.frameworks.launch import Launch
from meshwright.frameworks.saved import load_saved
from meshwright.parallel.layout import Layout, to_dict

if TYPE_CHECKING:
    from meshwright.cost.detail import Estimate
    from meshwright.describe.cluster import Cluster
    from meshwright.describe.job import Job
    from meshwright.describe.model import Model


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two: what is known of it."""

    name: str
    layout: Layout[int] | None
    model: Model | None
    job: Job | None
    cluster: Cluster | None
    estimate: Estimate | None
    env: Mapping[str, str]
    result: CheckResult


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that differs, and what changing it alone does to the first of the two.

    ``step_time_s`` and ``peak_bytes`` are the changes; None where it cannot be priced alone.
    """

    field: str
    a: object
    b: object
    step_time_s: float | None = None
    peak_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What differs between two launches, and what it does, term by term.

    ``explains`` names, of step time and peak, the difference that alone does most in the direction
    of the whole change.
    """

    a: Side
    b: Side
    differences: list[Difference]
    explains: dict[str, str]
    notes: list[str]

    @property
    def time(self) -> dict[str, tuple[float, float]] | None:
        """Exposed seconds of every term, of both; None when one is not priced."""
        return self._terms("time")

    @property
    def memory(self) -> dict[str, tuple[float, float]] | None:
        """Bytes of every term at the peak, of both; None when one is not priced."""
        return self._terms("memory")

    @property
    def verdicts(self) -> tuple[str, str] | None:
        """Return whether each fits: "fits", "borderline", "does not fit"; None when not priced."""
        if self.a.estimate is None or self.b.estimate is None:
            return None
        return self.a.estimate.verdict, self.b.estimate.verdict

    def _terms(self, what: str) -> dict[str, tuple[float, float]] | None:
        if self.a.estimate is None or self.b.estimate is None:
            return None
        left: dict[str, float] = getattr(self.a.estimate, what)
        right: dict[str, float] = getattr(self.b.estimate, what)
        return {t: (left.get(t, 0.0), right.get(t, 0.0)) for t in {**left, **right}}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line."""
        return {
            "a": _side_dict(self.a),
            "b": _side_dict(self.b),
            "differences": [asdict(d) for d in self.differences],
            "time": _pairs(self.time),
            "memory": _pairs(self.memory),
            "explains": self.explains,
            "verdicts": None if self.verdicts is None else list(self.verdicts),
            "notes": self.notes,
        }


def _side_dict(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "layout": None if side.layout is None else to_dict(side.layout),
        "model": None if side.model is None else side.model.name,
        "estimate": None if side.estimate is None else side.estimate.to_dict(),
        "unpriced": side.result.unpriced,
        "findings": [f.to_dict() for f in side.result.findings],
    }


def _pairs(terms: Mapping[str, tuple[float, float]] | None) -> dict[str, Any] | None:
    if terms is None:
        return None
    return {t: {"a": a, "b": b, "change": b - a} for t, (a, b) in terms.items()}


def compare(
    a: str | Path | Sequence[str],
    b: str | Path | Sequence[str],
    *,
    cluster: str | None = None,
    gpus: int | None = None,
) -> Comparison:
    """Compare two launches or plan documents.

    ``cluster`` prices both where they do not say on what they run. Raises ``MeshwrightError`` when
    one cannot be read at all.
    """
    left, right = _side(a, cluster, gpus), _side(b, cluster, gpus)
    differences = [*_layout_differences(left, right), *_job_differences(left, right)]
    differences += _other_differences(left, right)
    return Comparison(
        a=left,
        b=right,
        differences=differences,
        explains=_explains(left, right, differences),
        notes=_notes(left, right),
    )


def _side(source: str | Path | Sequence[str], cluster: str | None, gpus: int | None) -> Side:
    is_plan = load_saved(source) is not None
    gpu_text = None if is_plan else _for_world(source, cluster, gpus)
    result = check(source, gpus=None if is_plan else gpus, cluster=gpu_text)
    return Side(
        name=str(source) if isinstance(source, str | Path) else " ".join(source)[:60],
        layout=result.layout,
        model=result.model,
        job=result.job,
        cluster=result.cluster,
        estimate=result.estimate,
        env=result.launch.env,
        result=result,
    )


def _for_world(source: Any, cluster: str | None, gpus: int | None) -> str | None:
    """Return the cluster with as many GPUs as the launch starts: the two may differ in that."""
    if cluster is None:
        return None
    from meshwright.describe.cluster import load_cluster
    from meshwright.frameworks.read import read_launch

    world = gpus or read_launch(source).gpus
    machine = load_cluster(cluster)
    if world is None or world == machine.num_gpus or cluster.endswith(".toml"):
        return cluster
    per_node = machine.gpus_per_node
    if world % per_node == 0:
        return f"{world // per_node}x{per_node}x{machine.gpu.name}"
    return f"{world}x{machine.gpu.name}" if world < per_node else cluster


def _layout_differences(a: Side, b: Side) -> Iterable[Difference]:
    if a.layout is None or b.layout is None:
        return
    left, right = to_dict(a.layout), to_dict(b.layout)
    for key in {**left, **right}:
        if left.get(key) == right.get(key) or key == "edp":
            continue
        if key == "schedule" and left["vpp"] != right["vpp"]:
            continue
        effect = _of_gpus(a, b) if key == "dp" else _alone(a, key, right.get(key))
        yield Difference(
            field=f"layout.{key}",
            a=left.get(key),
            b=right.get(key),
            step_time_s=effect[0],
            peak_bytes=effect[1],
        )


def _alone(a: Side, key: str, value: object) -> tuple[float | None, float | None]:
    """Return the effect of one field of the other layout alone."""
    return (None, None) if a.layout is None else _effect(a, a.job, _changed(a.layout, key, value))


def _of_gpus(a: Side, b: Side) -> tuple[float | None, float | None]:
    """Return the effect of the other number of GPUs alone: data parallelism takes them."""
    if a.layout is None or b.layout is None or b.cluster is None:
        return None, None
    if a.layout.world_size == b.layout.world_size:
        return None, None
    try:
        x = with_gpus(a.layout, b.layout.world_size)
    except MeshwrightError:
        return None, None
    return _effect(a, a.job, x, b.cluster)


def _changed(x: Layout[int], key: str, value: object) -> Layout[int] | None:
    """Return the layout with one field of the other, or None when that alone is not possible."""
    if value is None:
        value = {"first": 0, "last": 0, "microbatch_group_size": 0}.get(key, False)
        if key in ("pipeline_layout", "hierarchical_cp"):
            return replace(x, **{key: None})
    text = str(value).lower() if isinstance(value, bool) else str(value)
    try:
        return with_changes(x, [f"{key}={text}"])
    except MeshwrightError:
        return None


def _effect(
    side: Side, job: Job | None, x: Layout[int] | None, cluster: Cluster | None = None
) -> tuple[float | None, float | None]:
    """Return what another layout, job or cluster alone changes in step time and peak of a side."""
    cluster = cluster or side.cluster
    if side.estimate is None or side.model is None or cluster is None:
        return None, None
    if x is None or job is None or x.world_size != cluster.num_gpus:
        return None, None
    from meshwright.checks import Case, judge_one
    from meshwright.cost.detail import estimate
    from meshwright.parallel.layout import table

    case = Case(model=side.model, job=job, x=table([x]), cluster=cluster)
    if any(f.severity == "error" for f in judge_one(case)):
        return None, None
    price = estimate(side.model, cluster, job, x)
    return (
        price.step_time_s - side.estimate.step_time_s,
        price.peak_bytes - side.estimate.peak_bytes,
    )


def _job_differences(a: Side, b: Side) -> Iterable[Difference]:
    if a.job is None or b.job is None:
        return
    left, right = a.job, b.job
    for name in ("seq_len", "gbs", "precision", "task"):
        if getattr(left, name) != getattr(right, name):
            effect = _effect(a, replace(left, **{name: getattr(right, name)}), a.layout)
            yield Difference(
                field=f"job.{name}",
                a=getattr(getattr(left, name), "name", getattr(left, name)),
                b=getattr(getattr(right, name), "name", getattr(right, name)),
                step_time_s=effect[0],
                peak_bytes=effect[1],
            )
    for item in fields(left.execution):
        before, after = getattr(left.execution, item.name), getattr(right.execution, item.name)
        if before != after:
            execution = replace(left.execution, **{item.name: after})
            effect = _effect(a, replace(left, execution=execution), a.layout)
            yield Difference(
                field=f"job.execution.{item.name}",
                a=before,
                b=after,
                step_time_s=effect[0],
                peak_bytes=effect[1],
            )


def _other_differences(a: Side, b: Side) -> Iterable[Difference]:
    if a.model is not None and b.model is not None and a.model.num_params != b.model.num_params:
        yield Difference(field="model", a=a.model.name, b=b.model.name)
    if a.cluster is not None and b.cluster is not None and a.cluster.name != b.cluster.name:
        yield Difference(field="cluster", a=a.cluster.name, b=b.cluster.name)
    for name in sorted({*a.env, *b.env}):
        if a.env.get(name) != b.env.get(name):
            yield Difference(field=f"env.{name}", a=a.env.get(name), b=b.env.get(name))
    if a.result.launch.framework == b.result.launch.framework:
        yield from _argument_differences(a.result.launch, b.result.launch)


def _argument_differences(a: Launch, b: Launch) -> Iterable[Difference]:
    """Yield the arguments that differ and that no layout, job or model is made of."""
    left, right = pairs(a.argv), pairs(b.argv)
    plan = plan_keys(a) | plan_keys(b)
    for name in {**left, **right}:
        plain = name.lstrip("-+").replace("-", "_")
        if left.get(name) != right.get(name) and not {name, plain} & plan:
            yield Difference(field=name, a=left.get(name), b=right.get(name))


def _explains(a: Side, b: Side, differences: Sequence[Difference]) -> dict[str, str]:
    """Return the difference that alone goes farthest in the direction of the whole change."""
    if a.estimate is None or b.estimate is None:
        return {}
    out: dict[str, str] = {}
    for name in ("step_time_s", "peak_bytes"):
        whole = getattr(b.estimate, name) - getattr(a.estimate, name)
        sign = 1 if whole > 0 else -1
        alone = [(sign * getattr(d, name), d.field) for d in differences if getattr(d, name)]
        if whole and alone and max(alone)[0] > 0:
            out[name] = max(alone)[1]
    return out


def _notes(a: Side, b: Side) -> list[str]:
    from meshwright.frameworks.resize import notes_on

    notes: list[str] = []
    for side in (a, b):
        notes += _starts(side)
    if a.layout is not None and b.layout is not None:
        notes += _loss_notes(a.layout, b.layout)
    if a.layout is not None and b.layout is not None and a.model is not None:
        notes += notes_on(a.model, a.layout, b.layout, (_divisor(a), _divisor(b)))
    return notes


def _starts(side: Side) -> Iterable[str]:
    """Say why one of the two would not start, or is not priced; the verdicts tell of memory."""
    found = side.result.findings
    errors = [f.message for f in found if f.severity == "error" and f.field != "memory.peak_bytes"]
    unpriced = side.result.unpriced
    if side.estimate is None:
        yield f"{side.name} is not priced: {unpriced}"
    told = [message for message in errors if message != unpriced]
    yield from (f"{side.name} would not start: {message}" for message in told[:3])


def _loss_notes(a: Layout[int], b: Layout[int]) -> Iterable[str]:
    for name, before, after in (("cp", a.cp, b.cp), ("tp", a.tp, b.tp)):
        if before != after:
            yield (
                f"{name} {before} -> {after}: some versions print the loss divided by {name};"
                " losses that differ by exactly that ratio differ in their display"
            )


def _divisor(side: Side) -> int:
    """Return what the vocabulary is padded to a multiple of, times TP."""
    words = side.result.launch.words
    value = words.get("make_vocab_size_divisible_by")
    return value if isinstance(value, int) and value > 0 else 128
