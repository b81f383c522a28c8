"""Rules of attention: heads and groups, positions, latent, sparse and linear attention."""

from __future__ import annotations

from meshwright.frameworks.megatron_lm.rules import (
    Settings,
    change,
    derive,
    divisors_near,
    error,
    indivisible,
    is_list,
    warning,
)

_LINEAR = ("gdn", "gdp", "gated_delta_net")


def _latent_by_pattern(s: Settings) -> object:
    pattern = s.hybrid_layer_pattern or ""
    return ("+" in pattern or "D" in pattern) and {"multi_latent_attention": True}


def _linear(s: Settings) -> bool:
    return s.experimental_attention_variant in _LINEAR


def _linear_heads(s: Settings) -> tuple[int, int]:
    return s.linear_num_key_heads or 0, s.linear_num_value_heads or 0


def _not_all_gather(s: Settings) -> bool:
    given: object = s.cp_comm_type
    kinds = given if is_list(given) else [given]
    names = {str(kind).replace("_", "").lower() for kind in kinds}
    return s.experimental_attention_variant == "dsa" and s.cp > 1 and names != {"allgather"}


def _rotary_kernel_missing(s: Settings) -> bool:
    return s.apply_rope_fusion and not s.multi_latent_attention and not s.site.te_at_least(1, 4)


RULES = (
    error(
        "MLM-ARG-kv_div",
        "validate_args:1332",
        "num_attention_heads",
        lambda s: (
            s.kv_channels is None
            and indivisible(s.hidden_size, s.num_attention_heads)
            and {"choices": divisors_near(s.hidden_size, s.num_attention_heads)}
        ),
        "Without --kv-channels the {num_attention_heads} heads must divide the hidden size "
        "{hidden_size}.",
        "Add --kv-channels, or use {choices} heads.",
    ),
    derive(
        "validate_args:1333",
        lambda s: (
            s.kv_channels is None
            and s.num_attention_heads
            and {"kv_channels": s.hidden_size // s.num_attention_heads}
        ),
    ),
    error(
        "MLM-ARG-qkclip_te",
        "validate_args:1613",
        "qk_clip",
        lambda s: s.qk_clip and not s.site.te_at_least(2, 9),
        "Clipping attention weights needs Transformer Engine 2.9.",
        "Install it, or drop --qk-clip.",
    ),
    error(
        "MLM-ARG-qkclip_alpha",
        "validate_args:1615",
        "qk_clip_alpha",
        lambda s: s.qk_clip and not 0.0 < s.qk_clip_alpha < 1.0,
        "Alpha lies between 0 and 1, not {qk_clip_alpha}.",
        "Use --qk-clip-alpha 0.5.",
    ),
    error(
        "MLM-ARG-qkclip_thr",
        "validate_args:1617",
        "qk_clip_threshold",
        lambda s: s.qk_clip and not s.qk_clip_threshold > 0,
        "The threshold is positive, not {qk_clip_threshold}.",
        "Use --qk-clip-threshold 100.",
    ),
    error(
        "MLM-ARG-logit_te",
        "validate_args:1622",
        "log_max_attention_logit",
        lambda s: s.log_max_attention_logit and not s.site.te_at_least(2, 9),
        "Logging the largest attention logit needs Transformer Engine 2.9.",
        "Install it, or drop --log-max-attention-logit.",
    ),
    derive(
        "validate_args:1626",
        lambda s: s.use_rotary_position_embeddings and {"position_embedding_type": "rope"},
    ),
    change(
        "MLM-ARG-rope_fusion_off",
        "validate_args:1628",
        "apply_rope_fusion",
        lambda s: s.position_embedding_type != "rope" and {"apply_rope_fusion": False},
        "Without rotary positions their fusion is off.",
        severity="note",
    ),
    error(
        "MLM-ARG-abs_pos",
        "validate_args:1634",
        "position_embedding_type",
        lambda s: not s.add_position_embedding and s.position_embedding_type != "rope",
        "--no-position-embedding is the old form of --position-embedding-type none.",
        "Use --position-embedding-type none.",
    ),
    error(
        "MLM-ARG-relative_impl",
        "validate_args:1638",
        "position_embedding_type",
        lambda s: (
            s.position_embedding_type == "relative" and s.transformer_impl != "transformer_engine"
        ),
        "Relative positions are added by Transformer Engine layers, not {transformer_impl}.",
        "Use --transformer-impl transformer_engine.",
    ),
    error(
        "MLM-ARG-mrope",
        "validate_args:1644",
        "mrope_section",
        lambda s: s.position_embedding_type == "mrope" and s.mrope_section is None,
        "Multimodal rotary positions need their sections.",
        "Add --mrope-section.",
    ),
    derive("validate_args:900", _latent_by_pattern),
    error(
        "MLM-ARG-mla_gqa",
        "validate_args:1974",
        "group_query_attention",
        lambda s: s.multi_latent_attention and s.group_query_attention,
        "Latent attention and grouped queries exclude each other.",
        "Drop --group-query-attention.",
    ),
    error(
        "MLM-ARG-mla_fusion",
        "validate_args:1977",
        "mla_down_proj_fusion",
        lambda s: s.mla_down_proj_fusion and not s.multi_latent_attention,
        "The fused down-projection is part of latent attention.",
        "Drop --mla-down-proj-fusion.",
    ),
    error(
        "MLM-CFG-rope_type",
        "config_from_args:339",
        "rope_type",
        lambda s: not s.multi_latent_attention and s.rope_type not in (None, "rope"),
        "Only latent attention knows the rotary type {rope_type}.",
        "Use --rope-type rope, or leave it out.",
    ),
    error(
        "MLM-TC-heads_tp",
        "transformer_config:1447",
        "num_attention_heads",
        lambda s: (
            s.num_attention_heads % s.tp and {"choices": divisors_near(s.num_attention_heads, s.tp)}
        ),
        "The {num_attention_heads} attention heads must split over tp = {tp}.",
        "Use tp = {choices}.",
    ),
    derive(
        "config_from_args:340",
        lambda s: not s.group_query_attention and {"num_query_groups": None},
    ),
    change(
        "MLM-TC-groups_default",
        "transformer_config:1459",
        "num_query_groups",
        lambda s: s.num_query_groups is None and {"num_query_groups": s.num_attention_heads},
        "Every head has its own keys and values unless grouped queries are on: "
        "{num_query_groups} groups.",
        "Use {write[group_query_attention=true]} with {write[num_query_groups]} for fewer.",
        severity="note",
    ),
    error(
        "MLM-TC-groups_tp",
        "transformer_config:1465",
        "num_query_groups",
        lambda s: (
            s.num_query_groups % s.tp != 0
            and indivisible(s.tp, s.num_query_groups)
            and {"choices": divisors_near(s.num_query_groups, s.tp)}
        ),
        "The {num_query_groups} key-value groups must be a multiple or a divisor of tp = {tp}.",
        "Use tp = {choices}, or another number of groups.",
    ),
    error(
        "MLM-TC-gdn_freq",
        "transformer_config:1475",
        "linear_attention_freq",
        lambda s: _linear(s) and s.linear_attention_freq is None,
        "Linear attention needs the pattern of its layers.",
        "Add {write[linear_attention_freq=4]}.",
    ),
    error(
        "MLM-TC-gdn_ratio",
        "transformer_config:1495",
        "linear_num_value_heads",
        lambda s: _linear(s) and indivisible(_linear_heads(s)[1], _linear_heads(s)[0]),
        "The {linear_num_value_heads} value heads must be a multiple of the "
        "{linear_num_key_heads} key heads.",
        "Use a multiple.",
    ),
    error(
        "MLM-TC-gdn_key_tpcp",
        "transformer_config:1502",
        "linear_num_key_heads",
        lambda s: _linear(s) and _linear_heads(s)[0] % (s.tp * s.cp),
        "The {linear_num_key_heads} key heads of linear attention must split over tp*cp = "
        "{tp}*{cp}.",
        "Use fewer ranks, or a multiple of heads.",
    ),
    error(
        "MLM-TC-gdn_val_tpcp",
        "transformer_config:1506",
        "linear_num_value_heads",
        lambda s: _linear(s) and _linear_heads(s)[1] % (s.tp * s.cp),
        "The {linear_num_value_heads} value heads of linear attention must split over tp*cp = "
        "{tp}*{cp}.",
        "Use fewer ranks, or a multiple of heads.",
    ),
    error(
        "MLM-TC-dsa_bias",
        "transformer_config:1513",
        "add_bias_linear",
        lambda s: s.experimental_attention_variant == "dsa" and s.add_bias_linear,
        "Sparse attention has no biases, and biases are on by default.",
        "Use {write[add_bias_linear=false]}.",
    ),
    error(
        "MLM-TC-rope_fusion_te",
        "transformer_config:2518",
        "apply_rope_fusion",
        _rotary_kernel_missing,
        "The fused rotary kernel comes with Transformer Engine.",
        "Install it, or use {write[apply_rope_fusion=false]}.",
    ),
    error(
        "MLM-TC-mla_inter",
        "transformer_config:2527",
        "rotary_interleaved",
        lambda s: s.multi_latent_attention and s.rotary_interleaved,
        "Latent attention has no interleaved rotary positions.",
        "Drop {write[rotary_interleaved]}.",
    ),
    error(
        "MLM-TC-dsa_rope",
        "transformer_config:3165",
        "apply_rope_fusion",
        lambda s: s.experimental_attention_variant == "dsa" and s.apply_rope_fusion,
        "Sparse attention has no fused rotary kernel.",
        "Use {write[apply_rope_fusion=false]}.",
    ),
    error(
        "MLM-TC-dsa_cp",
        "transformer_config:3170",
        "cp_comm_type",
        _not_all_gather,
        "Sparse attention exchanges keys and values by all-gather only.",
        "Use {write[cp_comm_type=allgather]}.",
    ),
    error(
        "MLM-TC-binv_attn",
        "transformer_config:3216",
        "attention_backend",
        lambda s: s.batch_invariant_mode and s.attention_backend != "flash",
        "Batch-invariant mode needs flash attention, not {attention_backend}.",
        "Use {write[attention_backend=flash]}.",
    ),
    error(
        "MLM-TC-binv_cp",
        "transformer_config:3230",
        "context_parallel_size",
        lambda s: s.batch_invariant_mode and s.cp != 1,
        "Batch-invariant mode excludes context parallelism (cp is {cp}).",
        "Use {write[context_parallel_size=1]}.",
    ),
    error(
        "MLM-TC-mla_rope",
        "transformer_config:3346",
        "apply_rope_fusion",
        lambda s: (
            s.multi_latent_attention and s.apply_rope_fusion and s.rope_type not in (None, "yarn")
        ),
        "The fused rotary kernel of latent attention is for yarn, not {rope_type}.",
        "Use {write[apply_rope_fusion=false]}, or {write[rope_type=yarn]}.",
    ),
    error(
        "MLM-TC-mla_gate",
        "transformer_config:3349",
        "attention_output_gate",
        lambda s: s.multi_latent_attention and s.attention_output_gate,
        "Latent attention has no output gate.",
        "Drop {write[attention_output_gate]}.",
    ),
    error(
        "MLM-TC-mla_cache",
        "transformer_config:3352",
        "cache_mla_latents",
        lambda s: s.multi_latent_attention and s.cache_mla_latents and s.apply_rope_fusion,
        "Caching latents excludes the fused rotary kernel.",
        "Use {write[apply_rope_fusion=false]}.",
    ),
    warning(
        "MLM-TC-mla_fusion_training",
        "transformer_config:2500",
        "apply_rope_fusion",
        lambda s: s.multi_latent_attention and s.apply_rope_fusion,
        "The fused rotary kernel of latent attention is experimental and for training only.",
        "Use {write[apply_rope_fusion=false]} when in doubt.",
    ),
)
