"""Settings of a measured run -> layout: degrees, sharding, recomputation, placement."""

from __future__ import annotations

import math
import re
from typing import Any

from meshwright.describe.model import Model
from meshwright.errors import LayoutError
from meshwright.fit.framework import Framework
from meshwright.fit.read_degrees import GROUP_SIZE, Degrees, hybrid_stages
from meshwright.fit.read_recompute import Recomputation
from meshwright.fit.read_sharding import read_sharding
from meshwright.fit.settings import Settings
from meshwright.parallel.layout import CP_COMM_TEXT, CpComm, Layout, Pipeline, layout
from meshwright.parallel.placement import place

Hints = dict[str, Any]
"""Arguments of ``layout`` and of ``place`` that say where layers go."""

CP_COMM_WORDS = {
    **{text.replace("+", "_"): comm for comm, text in CP_COMM_TEXT.items()},
    **dict.fromkeys(("ring", "send_recv"), CpComm.p2p),
    **dict.fromkeys(("allgather", "ag"), CpComm.all_gather),
    **dict.fromkeys(("all_to_all", "alltoall", "ulysses"), CpComm.a2a),
}


def read_layout(
    s: Settings,
    framework: Framework,
    model: Model,
    d: Degrees,
    recompute: Recomputation,
    node: int,
) -> Layout[int]:
    """Return the layout of a row on nodes of ``node`` GPUs.

    Raises ``LayoutError`` where it cannot hold together.
    """
    zero, replicas = read_sharding(s, framework, d.dp * d.cp, d.pp, node)
    levels = tuple(int(n) for n in s.items("hierarchical_context_parallel_sizes") if n.isdigit())
    made = layout(
        tp=d.tp,
        cp=d.cp,
        pp=d.pp,
        vpp=d.vpp,
        ep=d.ep,
        etp=d.etp,
        dp=d.dp,
        mbs=d.mbs,
        sp=_sequence_parallel(s, framework, d.tp),
        zero=zero,
        dp_replicate=replicas,
        recompute=recompute.modules,
        recompute_num_layers=recompute.num_layers,
        schedule=_schedule(s, d),
        cp_comm=_cp_comm(s, framework),
        order="tp-cp-ep-pp-dp" if s.flag("use_tp_pp_dp_mapping", default=False) else _ORDER,
        microbatch_group_size=_group_size(s, d),
        hierarchical_cp=levels if math.prod(levels) == d.cp and levels else None,
        **_placement(s, model, d),
    )
    return made


_ORDER = "tp-cp-ep-dp-pp"


def _schedule(s: Settings, d: Degrees) -> Pipeline:
    """Return the schedule that is named where its chunks agree, else Megatron's own."""
    usual = Pipeline.interleaved if d.vpp > 1 else Pipeline.one_f_one_b
    name = s.text("pp_schedule", "pipeline_parallel_schedule")
    word = re.sub(r"[^a-z0-9]", "", name)
    if d.pp == 1 or not word or "1f1b" in word or "interleaved" in word:
        return usual
    if "gpipe" in word and d.vpp == 1:
        return Pipeline.gpipe
    if "zbv" in word and d.vpp == 2:
        return Pipeline.zb_v
    if word.startswith(("zb", "zerobubble", "interleavedzerobubble")) and d.vpp == 1:
        return Pipeline.zb_h1
    s.assumed.append(f"pp_schedule {name!r} is read as {usual.name}")
    return usual


def _sequence_parallel(s: Settings, framework: Framework, tp: int) -> bool:
    name = "sequence_parallel"
    return s.switch(name, name, default=framework.sequence_parallel) and tp > 1


def _group_size(s: Settings, d: Degrees) -> int:
    # A group has no more micro-batches than there are.
    size = min(s.whole(*GROUP_SIZE), max(d.gbs // (d.mbs * d.dp), d.pp))
    return size if d.vpp > 1 and size >= d.pp else 0


def _cp_comm(s: Settings, framework: Framework) -> CpComm:
    stated = s.items("cp_comm_type", "context_parallel_rotate_method")
    word = "_".join(dict.fromkeys(stated)) or framework.cp_comm
    if word not in CP_COMM_WORDS:
        s.assumed.append(f"cp_comm_type {word!r} is read as p2p")
    return CP_COMM_WORDS.get(word, CpComm.p2p)


def _placement(s: Settings, model: Model, d: Degrees) -> Hints:
    """Return the hints of placement; where layers do not divide, the most even split is taken."""
    if d.pp == 1:
        return {}
    counted = "counted" in s.text("pp_partition")
    hints: Hints = {
        "first": s.whole("num_layers_in_first_pipeline_stage", "decoder_first_pipeline_num_layers"),
        "last": s.whole("num_layers_in_last_pipeline_stage", "decoder_last_pipeline_num_layers"),
        "account_for_embedding": counted
        or s.flag("account_for_embedding_in_pipeline_split", default=False),
        "account_for_loss": counted or s.flag("account_for_loss_in_pipeline_split", default=False),
        "pipeline_layout": _pipeline_layout(s),
    }
    tries: list[Hints] = [hints, {}, {"account_for_embedding": True, "account_for_loss": True}]
    tries += [{"account_for_embedding": True}, {"account_for_loss": True}]
    for hint in tries:
        if _can_place(model, d, hint):
            if hint is not hints and any(hints.values()):
                s.assumed.append("the stated split of the pipeline cannot be placed; even is taken")
            return hint
    s.assumed.append("layers do not divide by the pipeline; the most even split is taken")
    return {"pipeline_layout": most_even_layout(model, d.pp * d.vpp)}


def _pipeline_layout(s: Settings) -> str | None:
    text = s.find("pipeline_model_parallel_layout")
    if not isinstance(text, str) or not text.strip():
        stages = hybrid_stages(s)
        return "E" + "|".join("t" * n for n in stages) + "L" if stages else None
    # "(t*4)x14" is written for 14 stages of "t*4".
    return re.sub(r"\(([^()|]*)\)x(\d+)\|?", r"(\1|)*\2", text)


def _can_place(model: Model, d: Degrees, hint: Hints) -> bool:
    try:
        place(model.num_layers, d.pp, d.vpp, mtp=len(model.mtp_layers), **hint)
    except LayoutError:
        return False
    return True


def most_even_layout(model: Model, num_stages: int) -> str:
    """Return the layout text that spreads layers evenly, the ends getting the fewer ones."""
    base, rest = divmod(model.num_layers, num_stages)
    middle = sorted(range(num_stages), key=lambda stage: abs(2 * stage + 1 - num_stages))
    counts = [base + (stage in middle[:rest]) for stage in range(num_stages)]
    texts = ["t" * count for count in counts]
    texts[0] = "E" + texts[0]
    texts[-1] += "m" * len(model.mtp_layers) + "L"
    return "|".join(texts)
