"""What of a launch a move to other GPUs changes: what it says now, and what it has to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshwright.describe.job import Job
from meshwright.errors import MeshwrightError
from meshwright.frameworks.launch import Launch
from meshwright.frameworks.words import DEGREES
from meshwright.parallel.layout import Layout
from meshwright.parallel.placement import read_pipeline_layout

Quantities = dict[str, int | str]
"""By the layout's words, with ``gpus``, ``gbs`` and ``seq_len``; ``pipeline_layout`` is text."""

_DEGREES: Final = ("pp", "tp", "cp", "ep", "etp", "mbs", "dp_replicate")
FROM_ZERO: Final = ("first", "last", "microbatch_group_size")
"""Quantities of which 0, not 1, is what a launch has that says nothing."""
_DATA_DEGREES: Final = {
    "dp_shard": "parallelism.data_parallel_shard_degree",
    "dp_copies": "parallelism.data_parallel_replicate_degree",
}
WORDS: Final = {
    **DEGREES,
    "sp": "sequence_parallel",
    "gbs": "global_batch_size",
    "seq_len": "seq_length",
    "pipeline_layout": "pipeline_model_parallel_layout",
}
"""A quantity -> its word."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the edited launch has to say; ``gpus_per_node`` is 0 where the launch says none."""

    layout: Layout[int]
    job: Job
    gpus_per_node: int


def quantities(launch: Launch) -> Quantities:
    """Return what of a launch a move to other GPUs may change, in the order of editing.

    What is derived from the degrees and the world comes after them.
    """
    words = launch.words
    found: Quantities = {}
    for name in (*_DEGREES, "gpus_per_node", "gpus", "vpp", *FROM_ZERO):
        value = words.get(WORDS.get(name, name))
        found[name] = int(name not in FROM_ZERO)
        if isinstance(value, int) and not isinstance(value, bool):
            found[name] = value
    found |= {"gpus_per_node": launch.gpus_per_node or 0, "gpus": launch.gpus or 0}
    stages = words.get("pipeline_model_parallel_layout")
    split = launch.framework != "torchtitan" and isinstance(stages, str)
    found["pipeline_layout"] = str(stages) if split else ""
    found["sp"] = int(words.get("sequence_parallel") is True and found["tp"] != 1)
    for name in ("gbs", "seq_len"):
        value = words.get(WORDS[name])
        found[name] = value if isinstance(value, int) else 0
    _leave_idle(found, launch)
    return {**found, **_data_degrees(launch)}


def _leave_idle(found: Quantities, launch: Launch) -> None:
    """Set to their defaults what does nothing in the layout, as ``layout_of`` does."""
    stages, pp = str(found["pipeline_layout"]), found["pp"]
    if stages and isinstance(pp, int) and pp > 0:
        try:
            found["vpp"] = max(len(read_pipeline_layout(stages)) // pp, 1)
        except MeshwrightError:
            found["vpp"] = 1
    if found["vpp"] == 1:
        found["microbatch_group_size"] = 0
    if found["ep"] == 1 and not launch.words.get("num_moe_experts"):
        found["etp"] = 1


def _data_degrees(launch: Launch) -> Quantities:
    """Return the degrees of data parallelism that torchtitan is told; 0 where it derives them."""
    if launch.framework != "torchtitan":
        return {}
    given = dict(a.removeprefix("--").split("=", 1) for a in launch.argv if "=" in a)
    values = {name: given.get(path, "") for name, path in _DATA_DEGREES.items()}
    return {name: int(v) if v.isdecimal() else 0 for name, v in values.items()}


def targets(now: Quantities, before: Layout[int], wanted: Wanted) -> Quantities:
    """Return what every quantity has to become."""
    y, job = wanted.layout, wanted.job
    target = dict(now)
    for name in now.keys() & {*DEGREES, "sp"}:
        target[name] = int(getattr(y, name))
    target["pipeline_layout"] = (y.pipeline_layout or "") if now["pipeline_layout"] else ""
    target |= {"gpus_per_node": wanted.gpus_per_node, "gbs": job.gbs, "seq_len": job.seq_len}
    target["gpus"] = y.world_size if now["gpus"] else 0
    if y.vpp == 1:
        target["microbatch_group_size"] = 0
    copies = before.dp > 1 and before.dp_replicate == 1 and now.get("dp_copies") == before.dp
    if now.get("dp_shard"):
        target["dp_shard"] = 1 if copies else y.dp // max(y.dp_replicate, 1)
    if now.get("dp_copies"):
        target["dp_copies"] = y.dp if copies else y.dp_replicate
    return target
