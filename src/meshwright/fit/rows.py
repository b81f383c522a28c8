"""A row of a file of measured runs -> what the cost model prices, and what is asked of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from meshwright.checks import Case, all_checks
from meshwright.cost.memory import Statistic
from meshwright.describe.cluster import Cluster, build_cluster
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Decoder
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.describe.published import published_decoder
from meshwright.errors import DocumentError, LayoutError, ModelError, did_you_mean
from meshwright.fit.documents import SURPLUS
from meshwright.fit.framework import framework_of
from meshwright.fit.read_degrees import read_degrees
from meshwright.fit.read_job import read_job
from meshwright.fit.read_layout import read_layout
from meshwright.fit.read_recompute import read_recompute
from meshwright.fit.settings import Settings, read_settings
from meshwright.parallel.layout import Layout, table

Rank = Literal["fullest", "first", "last"]

DEFAULT_SEQ_LEN = 8192


@dataclass(frozen=True)
class Run:
    """One row, understood: what to price, which memory is asked for, what was supplied."""

    model: Model
    cluster: Cluster
    job: Job
    layout: Layout[int]
    statistic: Statistic
    rank: Rank
    is_module: bool
    assumed: tuple[str, ...]


def read_row(row: Mapping[str, str], models: Mapping[str, Any]) -> Run:
    """Return the run that a row describes, from its settings alone.

    Raises ``MeshwrightError`` where the row cannot mean anything.
    """
    s = read_settings(row)
    if s.cell(SURPLUS):
        rule = "A row has as many cells as the first line names."
        raise DocumentError("row", s.cell(SURPLUS)[:60], rule, "Put cells with commas in quotes.")
    framework = framework_of(s)
    model = read_model(s, models)
    seq_len = s.number("seq_len")
    if seq_len is None:
        seq_len = DEFAULT_SEQ_LEN
        s.assumed.append(f"seq_len = {seq_len}: not stated")
    degrees = read_degrees(s, framework, model, seq_len)
    cluster = read_cluster(s, degrees.num_gpus)
    per_stage = model.num_layers // (degrees.pp * degrees.vpp)
    recompute = read_recompute(s, framework, per_stage)
    job = read_job(
        s,
        framework,
        seq_len,
        degrees.gbs,
        architecture=cluster.gpu.architecture,
        is_latent=model.is_mla,
        by_op=recompute.by_op,
    )
    made = read_layout(s, framework, model, degrees, recompute, cluster.gpus_per_node)
    _refuse_what_cannot_be(Case(model=model, job=job, x=table([made]), cluster=cluster))
    statistic, rank = read_question(s)
    return Run(
        model=model,
        cluster=cluster,
        job=job,
        layout=made,
        statistic=statistic,
        rank=rank,
        is_module=s.is_module,
        assumed=tuple(dict.fromkeys((*model.assumed, *cluster.assumed, *s.assumed))),
    )


REFUSED_RULES = ("divisibility", "ep_needs_experts", "ep_divides_experts", "gpu_has_the_format")
"""Topics and names of the rules of ``checks`` by which a row contradicts its model or its GPU."""


def _refuse_what_cannot_be(case: Case) -> None:
    rules = (c for c in all_checks() if {c.topic, c.name} & set(REFUSED_RULES))
    broken = next((c for c in rules if c.severity == "error" and c.fires(case)[0]), None)
    if broken is not None:
        told = broken.finding(case, 0)
        field = told.field.removeprefix("layout.").removeprefix("job.")
        raise LayoutError(field, told.value, told.rule, told.remedy)


def read_model(s: Settings, models: Mapping[str, Any]) -> Model:
    """Return the model of a row, with the multi-token prediction that the run trains."""
    name = s.cell("model")
    if name not in models:
        raise ModelError(
            "model", name, "The file of models does not hold it.", did_you_mean(name, models)
        )
    entry = dict(models[name])
    _override(entry, s)
    depths = s.whole("mtp_num_layers", default=-1)
    if depths >= 0:
        entry["mtp_layers"] = depths
    if entry.get("mtp_layers") and depths < 0 and s.task in ("sft", "lora"):
        entry["mtp_layers"] = 0
    facts = published_decoder(name, entry)
    return build_decoder(_megatron_defaults(facts, s) if s.section("args") else facts)


DROPOUT = 0.1
"""What Megatron-LM drops out of hidden states unless a launch says otherwise."""


def _megatron_defaults(facts: Decoder, s: Settings) -> Decoder:
    """Return a model as Megatron-LM builds it where its launch leaves its defaults in force.

    Learned positions and dropout; biases unless ``disable_bias_linear``. Models with recurrent
    layers, RMSNorm or squared ReLU are of recipes that have none of the first two.
    """
    if s.text("normalization") == "rmsnorm":
        return facts
    if not (s.text("position_embedding_type") or s.text("hybrid_layer_pattern")):
        length = s.number("seq_len") or DEFAULT_SEQ_LEN
        facts = replace(facts, learned_positions=length, max_seq_len=length)
    if not s.flag("squared_relu", default=False):
        facts = replace(facts, hidden_dropout=DROPOUT)
    return facts


OVERRIDES = {
    "num_experts": "num_experts",
    "num_moe_experts": "num_experts",
    "moe_router_topk": "experts_per_token",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
    "moe_latent_size": "moe_latent_size",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_state_dim": "ssm_state_size",
    "mamba_num_groups": "mamba_n_groups",
}
"""Settings that change the shape of the model a row names, and the words of the file of models."""


def _override(entry: dict[str, Any], s: Settings) -> None:
    if s.flag("swiglu", default=False):
        _default_ffn(entry)
    for name, key in OVERRIDES.items():
        stated = s.whole(name)
        if stated > 0 and key in entry:
            entry[key] = stated
    _set_layers_of_experts(entry, s)
    _pad_vocabulary(entry, s)
    pattern = s.text("hybrid_layer_pattern").upper() or entry.get("hybrid_pattern")
    if not isinstance(pattern, str) or "hybrid_pattern" not in entry:
        return
    # Bars part pipeline stages, and what follows a slash is one depth of multi-token prediction.
    main, *ahead = pattern.replace("|", "").split("/")
    _refuse_other_depth(main, str(entry["hybrid_pattern"]), s)
    entry["hybrid_pattern"], entry["num_hidden_layers"] = main, len(main)
    if ahead:
        entry["mtp_hybrid_pattern"], entry["mtp_layers"] = ahead[0], len(ahead)


def _set_layers_of_experts(entry: dict[str, Any], s: Settings) -> None:
    """Set which layers have experts as ``moe_layer_freq`` says: ``2``, or ``([0]*3+[1]*11)``."""
    stated = s.find("moe_layer_freq")
    if stated is None or "num_experts" not in entry:
        return
    pieces = re.findall(r"\[([01,\s]+)\]\s*(?:\*\s*(\d{1,4}))?", str(stated))
    if not pieces:
        every = s.whole("moe_layer_freq")
        if every > 0:
            entry["moe_layer_freq"], entry["first_dense_layers"] = every, 0
        return
    pattern = "".join(re.sub(r"[^01]", "", layers) * int(times or 1) for layers, times in pieces)
    dense = len(pattern) - len(pattern.lstrip("0"))
    if len(pattern) != entry.get("num_hidden_layers") or "0" in pattern[dense:]:
        s.assumed.append(f"moe_layer_freq = {stated!r} is no split of these layers and is not used")
        return
    entry["moe_layer_freq"], entry["first_dense_layers"] = 1, dense


def _pad_vocabulary(entry: dict[str, Any], s: Settings) -> None:
    """Pad the vocabulary to the multiple, times tp, that Megatron is told to pad it to."""
    size, multiple = entry.get("vocab_size"), s.whole("make_vocab_size_divisible_by")
    if isinstance(size, int) and 0 < multiple <= size:
        unit = multiple * max(s.number("tp") or 1, 1)
        entry["vocab_size"] = -(-size // unit) * unit


def _refuse_other_depth(pattern: str, published: str, s: Settings) -> None:
    """Raise ``ModelError`` where settings lay out another number of layers than the named model.

    Such a run trains a cut-down model; its widths cannot be told from the settings.
    """
    layers = len(published.replace("|", "").partition("/")[0])
    if layers and len(pattern) != layers:
        rule = (
            f"The settings lay out {len(pattern)} layers ({pattern}), this model has {layers}: "
            "they contradict each other."
        )
        raise ModelError("model", s.cell("model"), rule, "Name the model that was trained.")


def _default_ffn(entry: dict[str, Any]) -> None:
    """Give a gated MLP of 4h the width that Megatron-LM gives it unless told: 8h/3, by 64s."""
    hidden, wide = entry.get("hidden_size"), entry.get("intermediate_size")
    if not isinstance(hidden, int) or wide != 4 * hidden:
        return
    for key in ("intermediate_size", "moe_intermediate_size"):
        if entry.get(key) == wide:
            entry[key] = 8 * hidden // 3 // 64 * 64


def read_cluster(s: Settings, num_gpus: int) -> Cluster:
    """Return the machines of a row; a domain of 0 GPUs is none.

    ``NCCL_NVLS_ENABLE=0`` keeps switches from adding up what GPUs send.
    """
    domain = s.number("nvlink_domain")
    cluster = build_cluster(
        s.cell("gpu"),
        num_gpus,
        system=s.cell("system"),
        gpus_per_node=s.number("gpus_per_node"),
        nvlink_domain=1 if domain == 0 else domain,
        network=s.cell("internode"),
        nearest=True,
    )
    return replace(cluster, nvls=cluster.nvls and s.flag("NCCL_NVLS_ENABLE", default=True))


def read_question(s: Settings) -> tuple[Statistic, Rank]:
    """Return which memory is asked for, of which rank."""
    stat, kind = s.cell("peak_memory_stat").lower(), s.cell("peak_memory_kind").lower()
    statistic: Statistic = "allocated"
    if "smi" in stat or "device memory in use" in kind:
        statistic = "nvidia-smi"
    elif stat == "reserved" or (stat not in ("allocated", "accounting") and "reserved" in kind):
        statistic = "reserved"
    rank: Rank = "fullest"
    if re.search(r"last (pipeline )?(stage|rank)", kind):
        rank = "last"
    elif re.search(r"rank[ -]?0\b|embedding|first (pipeline )?stage", kind):
        rank = "first"
    return statistic, rank
