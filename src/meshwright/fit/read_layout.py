"""Settings of a measured run -> layout: degrees, sharding, recomputation, placement."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from meshwright.describe.model import Model
from meshwright.errors import LayoutError
from meshwright.fit.framework import Framework
from meshwright.fit.settings import Settings
from meshwright.parallel.layout import (
    CP_COMM_TEXT,
    CpComm,
    Layout,
    Pipeline,
    Recompute,
    Zero,
    layout,
    minimum_world_size,
)
from meshwright.parallel.placement import place

Hints = dict[str, Any]
"""Arguments of ``layout`` and of ``place`` that say where layers go."""

MOST_GPUS = 2**20
"""No run uses more; a larger number is a typing error."""

NODE_GPUS = 8
"""A row without a number of GPUs ran on one node, ..."""
LARGE_RUN_NODES, LARGE_MODEL_PARAMS = 16, 10e9
"""... or on several, where its model is large: Megatron-LM tests its releases on 16 or 32."""

MODULES = {m.name: m for m in Recompute if 0 < m < Recompute.full}
NEAREST_MODULE = {"mla": Recompute.mla_up_proj, "attn": Recompute.core_attn}


@dataclass(frozen=True)
class Degrees:
    """The parallel degrees of a row, and its batch."""

    tp: int
    cp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    mbs: int
    gbs: int
    num_gpus: int


def read_degrees(s: Settings, framework: Framework, model: Model, seq_len: int) -> Degrees:
    """Return the degrees of a row; what it leaves out is supplied and listed.

    Raises ``LayoutError`` where they cannot hold together.
    """
    tp, cp, pp, ep = (_degree(s, name) for name in ("tp", "cp", "pp", "ep"))
    etp = _expert_tensor(s, framework, tp, ep)
    unit = minimum_world_size(tp, cp, pp, ep, etp)
    stated = s.number("n_gpus")
    if stated is None:
        is_large = model.num_params > LARGE_MODEL_PARAMS
        node = s.number("gpus_per_node") or (4 if s.cell("system").startswith("GB") else NODE_GPUS)
        usual = LARGE_RUN_NODES * node if is_large else NODE_GPUS
        num_gpus = -(-usual // unit) * unit
        s.assumed.append(f"n_gpus = {num_gpus}: not stated")
    else:
        num_gpus = stated
    if num_gpus > MOST_GPUS:
        raise LayoutError("n_gpus", num_gpus, f"There are at most {MOST_GPUS:,} GPUs.", "")
    if num_gpus < 1 or num_gpus % unit:
        if etp > 1 and num_gpus > 0 and num_gpus % minimum_world_size(tp, cp, pp, ep, 1) == 0:
            etp = 1
            s.assumed.append("etp = 1: experts of a larger etp do not fit the GPUs")
        else:
            raise LayoutError(
                "n_gpus", num_gpus, f"It is a multiple of pp*lcm(tp*cp, ep*etp) = {unit}.", ""
            )
    dp = num_gpus // (tp * cp * pp)
    mbs = s.number("mbs")
    gbs = s.number("gbs")
    if mbs is None:
        mbs = _micro_batch(gbs, dp, pp, seq_len)
        s.assumed.append(f"mbs = {mbs}: not stated")
    if gbs is None:
        gbs = mbs * dp * pp
        s.assumed.append(f"gbs = {gbs}: not stated, as many micro-batches as pipeline ranks")
    if gbs < 1 or mbs < 1:
        raise LayoutError("gbs", gbs, "Batches hold at least one sequence.", "Use 1 or more.")
    if gbs % (mbs * dp):
        near = max(round(gbs / (mbs * dp)), 1) * mbs * dp
        s.assumed.append(f"gbs {gbs} is read as {near}, whole micro-batches on {dp} ranks")
        gbs = near
    vpp = _chunks(s, model, pp, gbs // (mbs * dp))
    return Degrees(tp, cp, pp, vpp, ep, etp, mbs, gbs, num_gpus)


def _degree(s: Settings, name: str) -> int:
    value = s.number(name)
    if value is None:
        s.assumed.append(f"{name} = 1: not stated")
        return 1
    if not 1 <= value <= MOST_GPUS:
        rule = f"A degree is a whole number from 1 to {MOST_GPUS:,}."
        raise LayoutError(name, value, rule, "Use 1.")
    return value


def _expert_tensor(s: Settings, framework: Framework, tp: int, ep: int) -> int:
    value = s.number("etp") or s.whole("expert_tensor_parallel_size")
    if value >= 1:
        return value
    return tp if ep > 1 and framework.expert_tensor_is_tensor else 1


def _micro_batch(gbs: int | None, dp: int, pp: int, seq_len: int) -> int:
    """Return the micro-batch taken where none is stated: 1 in a pipeline, else up to 8k tokens."""
    if pp > 1 or gbs is None or gbs <= dp:
        return 1
    most = max(8192 // seq_len, 1)
    return max(m for m in range(1, most + 1) if (gbs // dp) % m == 0)


def _chunks(s: Settings, model: Model, pp: int, num_microbatches: int) -> int:
    value = s.number("vpp")
    bars = _hybrid_stages(s)
    if bars and pp > 1 and len(bars) % pp == 0:
        # Bars in the pattern of a hybrid model part its stages, chunks included.
        value = len(bars) // pp
    if value is not None and value >= 1:
        if pp * value > MOST_GPUS:
            raise LayoutError(
                "vpp", value, f"pp*vpp is at most {MOST_GPUS:,}.", "Use fewer chunks."
            )
        return value if pp > 1 else 1
    if pp == 1:
        return 1
    per_rank = model.num_layers // pp
    vpp = 2 if "interleaved" in s.text("pp_schedule") and num_microbatches >= pp else 1
    if model.num_layers % pp == 0 and num_microbatches % pp == 0:
        chunks = range(1, per_rank + 1)
        vpp = max((v for v in chunks if per_rank % v == 0 and per_rank // v >= 2), default=1)
    s.assumed.append(f"vpp = {vpp}: not stated")
    return vpp


def read_layout(s: Settings, framework: Framework, model: Model, d: Degrees) -> Layout[int]:
    """Return the layout of a row. Raises ``LayoutError`` where it cannot hold together."""
    dp = d.num_gpus // (d.tp * d.cp * d.pp)
    recompute, num_layers = read_recompute(s, model.num_layers // (d.pp * d.vpp))
    zero, replicas = _sharding(s, framework, dp * d.cp)
    schedule = Pipeline.interleaved if d.vpp > 1 else Pipeline.one_f_one_b
    levels = tuple(int(n) for n in s.items("hierarchical_context_parallel_sizes") if n.isdigit())
    made = layout(
        tp=d.tp,
        cp=d.cp,
        pp=d.pp,
        vpp=d.vpp,
        ep=d.ep,
        etp=d.etp,
        dp=dp,
        mbs=d.mbs,
        sp=_sequence_parallel(s, framework, d.tp),
        zero=zero,
        dp_replicate=replicas,
        recompute=recompute,
        recompute_num_layers=num_layers,
        schedule=schedule,
        cp_comm=_cp_comm(s, framework),
        order="tp-cp-ep-pp-dp" if s.flag("use_tp_pp_dp_mapping", default=False) else _ORDER,
        microbatch_group_size=_group_size(s, d),
        hierarchical_cp=levels if math.prod(levels) == d.cp and levels else None,
        **_placement(s, model, d),
    )
    return made


_ORDER = "tp-cp-ep-dp-pp"


def _sequence_parallel(s: Settings, framework: Framework, tp: int) -> bool:
    stated = s.number("sequence_parallel")
    if stated is None:
        stated = int(s.flag("sequence_parallel", default=framework.sequence_parallel))
    return bool(stated) and tp > 1


def _group_size(s: Settings, d: Degrees) -> int:
    size = s.whole(
        "microbatch_group_size_per_virtual_pipeline_stage", "microbatch_group_size_per_vp_stage"
    )
    return size if d.vpp > 1 and size >= d.pp else 0


def _cp_comm(s: Settings, framework: Framework) -> CpComm:
    word = s.text("cp_comm_type", default=framework.cp_comm).replace("allgather", "all_gather")
    words = {text: comm for comm, text in CP_COMM_TEXT.items()}
    if word not in words:
        s.assumed.append(f"cp_comm_type {word!r} is read as p2p")
    return words.get(word, CpComm.p2p)


def read_recompute(s: Settings, layers_per_stage: int) -> tuple[Recompute, int]:
    """Return what a run recomputes and the number of layers of a method."""
    text = s.cell("recompute").lower()
    if not text:
        text = _recompute_words(s)
    kind, _, detail = text.partition(":")
    if kind == "full":
        method, _, count = detail.partition(":")
        number = int(count) if count.isdigit() else 0
        block = Recompute.block if method == "block" and number else Recompute.none
        return Recompute.full | block, number
    if kind == "selective":
        if "every 2nd" in detail and "layer" in detail:
            return Recompute.full | Recompute.block, max(layers_per_stage // 2, 1)
        return _modules(s, re.findall(r"[a-z0-9_]+", detail.partition("(")[0])), 0
    if kind not in ("none", ""):
        s.assumed.append(f"recompute {text!r} is read as none")
    return Recompute.none, 0


def _recompute_words(s: Settings) -> str:
    kind = s.text("recompute_granularity")
    if kind == "full":
        method, number = s.text("recompute_method"), s.whole("recompute_num_layers")
        return f"full:{method}:{number}" if method and number else "full"
    if kind == "selective":
        return "selective:" + "+".join(s.items("recompute_modules") or ["core_attn"])
    if s.flag("activation_checkpointing_in_recipe_at_main", default=False):
        s.assumed.append("recompute = full: as in the recipe of a later release")
        return "full"
    s.assumed.append("recompute = none: not stated")
    return "none"


def _modules(s: Settings, names: list[str]) -> Recompute:
    flags = Recompute.none
    for name in names:
        known = MODULES.get(name) or NEAREST_MODULE.get(name)
        if known is not None:
            flags |= known
        elif name != "op":
            s.assumed.append(f"recomputing {name!r} is not known and not priced")
    return flags


def _sharding(s: Settings, framework: Framework, group: int) -> tuple[Zero, int]:
    """Return what is sharded, and over how many replicas, from ``fsdp`` and its like."""
    kind, _, size = s.cell("fsdp").lower().partition(":")
    if kind in ("full", "hsdp", "shard_grad_op"):
        number = int(size) if size.isdigit() else group
        if number < 1 or group % number:
            s.assumed.append(f"fsdp over {size} is read as {group}, the ranks there are")
            number = group
        zero = Zero.optim_grads if kind == "shard_grad_op" else Zero.optim_grads_params
        if framework.gathers_once and s.number("pp") != 1:
            # In a pipeline FSDP2 gathers weights before the first micro-batch and reduces
            # gradients after the last.
            zero = Zero.optim
        return zero, group // number
    if kind not in ("none", ""):
        s.assumed.append(f"fsdp {kind!r} is read as none")
    stage = s.find("zero_stage")
    if isinstance(stage, int) and 0 <= stage <= 3:
        return Zero(stage), 1
    stated = s.number("distributed_optimizer")
    if stated is None:
        used = s.flag("use_distributed_optimizer", default=framework.distributed_optimizer)
    else:
        used = bool(stated)
    instances = s.whole("num_distributed_optimizer_instances", default=1)
    replicas = instances if used and instances > 1 and group % instances == 0 else 1
    return (Zero.optim if used else Zero.no_shard), replicas


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


def _hybrid_stages(s: Settings) -> list[int]:
    """Return how many layers the bars of a hybrid pattern give each stage; none without bars."""
    main = s.text("hybrid_layer_pattern").partition("/")[0]
    return [len(stage) for stage in main.split("|")] if "|" in main else []


def _pipeline_layout(s: Settings) -> str | None:
    text = s.find("pipeline_model_parallel_layout")
    if not isinstance(text, str) or not text.strip():
        stages = _hybrid_stages(s)
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
