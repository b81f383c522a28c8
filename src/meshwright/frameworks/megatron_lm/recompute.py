"""Rules of activation memory: recomputation, CPU offload, fine-grained offload, paged stash."""

from __future__ import annotations

from meshwright.frameworks.megatron_lm.rules import Settings, change, derive, error, warning

_RECOMPUTED = (
    "core_attn",
    "moe_act",
    "layernorm",
    "mla_up_proj",
    "mlp",
    "moe",
    "shared_experts",
    "gdn_norm_out",
    "gdp_in_proj",
    "gdp_qkv",
    "mhc",
)
_OFFLOADED = (
    "core_attn",
    "attn_proj",
    "expert_fc1",
    "fused_group_mlp",
    "moe_act",
    "attn_norm",
    "mlp_norm",
    "qkv_linear",
    "gdp_qkv",
)
_INSIDE_MOE = {"moe_act", "expert_fc1", "fused_group_mlp"}


def _full(s: Settings) -> bool:
    return s.recompute_granularity == "full"


def _selective(s: Settings) -> bool:
    return s.recompute_granularity == "selective"


def _modules(s: Settings) -> set[str]:
    return set(s.recompute_modules or ())


def _offloads(s: Settings) -> set[str]:
    return set(s.offload_modules or ()) if s.fine_grained_activation_offloading else set()


def _unknown_modules(s: Settings) -> object:
    unknown = sorted(_modules(s) - set(_RECOMPUTED))
    return _selective(s) and unknown and {"unknown": unknown[0], "known": ", ".join(_RECOMPUTED)}


def _unknown_offloads(s: Settings) -> object:
    unknown = sorted(_offloads(s) - set(_OFFLOADED))
    return unknown and {"unknown": unknown[0], "known": ", ".join(_OFFLOADED)}


def _with_moe(s: Settings) -> object:
    if not s.moe_layer_recompute:
        return None
    modules: list[str] = list(s.recompute_modules or ())
    return {
        "recompute_granularity": "selective",
        "recompute_modules": modules if "moe" in modules else [*modules, "moe"],
    }


def _fp8_and(s: Settings) -> bool:
    return _selective(s) and bool(s.fp8) and bool(_modules(s) & {"moe_act", "layernorm"})


RULES = (
    change(
        "MLM-ARG-recompute_activations",
        "validate_args:608",
        "recompute_granularity",
        lambda s: s.recompute_activations and {"recompute_granularity": "selective"},
        "--recompute-activations means --recompute-granularity selective, whatever else is given.",
        "Write --recompute-granularity.",
        severity="note",
    ),
    error(
        "MLM-ARG-dsa_tp",
        "validate_args:1411",
        "distribute_saved_activations",
        lambda s: s.distribute_saved_activations and s.tp <= 1,
        "Saved activations are distributed over tensor parallel ranks; tp is {tp}.",
        "Drop --distribute-saved-activations.",
    ),
    error(
        "MLM-ARG-dsa_full",
        "validate_args:1414",
        "distribute_saved_activations",
        lambda s: s.distribute_saved_activations and not _full(s),
        "Saved activations are distributed under full recomputation only.",
        "Use --recompute-granularity full.",
    ),
    error(
        "MLM-ARG-dsa_method",
        "validate_args:1417",
        "distribute_saved_activations",
        lambda s: s.distribute_saved_activations and s.recompute_method is None,
        "Distributing saved activations needs a recompute method.",
        "Add --recompute-method uniform.",
    ),
    error(
        "MLM-ARG-sel_method",
        "validate_args:1426",
        "recompute_method",
        lambda s: _selective(s) and s.recompute_method is not None,
        "A recompute method belongs to full recomputation.",
        "Drop --recompute-method, or use --recompute-granularity full.",
    ),
    error(
        "MLM-ARG-fgo_impl",
        "validate_args:1936",
        "transformer_impl",
        lambda s: (
            s.fine_grained_activation_offloading and s.transformer_impl != "transformer_engine"
        ),
        "Fine-grained offloading is done by Transformer Engine layers, not {transformer_impl}.",
        "Use --transformer-impl transformer_engine.",
    ),
    error(
        "MLM-ARG-fgo_env",
        "validate_args:1939",
        "NVTE_CPU_OFFLOAD_V1",
        lambda s: (
            s.fine_grained_activation_offloading
            and s.site.te_at_least(2, 10)
            and s.site.env.get("NVTE_CPU_OFFLOAD_V1", "0") != "1"
        ),
        "From Transformer Engine 2.10 on, fine-grained offloading needs NVTE_CPU_OFFLOAD_V1=1.",
        "Export NVTE_CPU_OFFLOAD_V1=1.",
    ),
    change(
        "MLM-ARG-cpu_offload_on",
        "validate_args:1950",
        "cpu_offloading",
        lambda s: s.cpu_offloading_num_layers > 0 and {"cpu_offloading": True},
        "The activations of {cpu_offloading_num_layers} layers go to the CPU.",
        severity="note",
    ),
    error(
        "MLM-TC-off_layers",
        "transformer_config:1887",
        "cpu_offloading_num_layers",
        lambda s: s.cpu_offloading and not 0 <= s.cpu_offloading_num_layers < s.num_layers,
        "Fewer layers are offloaded than the model has: {cpu_offloading_num_layers} of "
        "{num_layers}.",
        "Use less than {num_layers}.",
    ),
    error(
        "MLM-TC-off_pp",
        "transformer_config:1892",
        "cpu_offloading_num_layers",
        lambda s: s.cpu_offloading and s.pp > 1,
        "Offloading activations by layer excludes pipeline parallelism (pp is {pp}).",
        "Use pp = 1, or fine-grained offloading.",
    ),
    error(
        "MLM-TC-off_rc",
        "transformer_config:1897",
        "recompute_granularity",
        lambda s: s.cpu_offloading and s.recompute_granularity is not None,
        "Activations are offloaded or recomputed, not both.",
        "Drop one of the two.",
    ),
    error(
        "MLM-TC-rc_gran",
        "transformer_config:1903",
        "recompute_granularity",
        lambda s: s.recompute_granularity not in (None, "full", "selective"),
        "Recomputation is full or selective, not {recompute_granularity}.",
        "Use {write[recompute_granularity=selective]}.",
    ),
    error(
        "MLM-TC-rc_method_val",
        "transformer_config:1910",
        "recompute_method",
        lambda s: (
            s.recompute_granularity is not None
            and s.recompute_method not in (None, "block", "uniform")
        ),
        "The recompute method is block or uniform, not {recompute_method}.",
        "Use {write[recompute_method=uniform]}.",
    ),
    error(
        "MLM-TC-rc_full_method",
        "transformer_config:1914",
        "recompute_method",
        lambda s: _full(s) and s.recompute_method is None,
        "Full recomputation needs a method.",
        "Use {write[recompute_method=uniform]} and {write[recompute_num_layers=1]}.",
    ),
    error(
        "MLM-TC-rc_full_num",
        "transformer_config:1920",
        "recompute_num_layers",
        lambda s: (
            _full(s) and s.recompute_num_layers is None and {"most": max(1, s.num_layers // s.pp)}
        ),
        "Full recomputation needs a number of layers, 1 to {most}.",
        "Use {write[recompute_num_layers=1]}.",
    ),
    error(
        "MLM-TC-rc_sel_num",
        "transformer_config:1929",
        "recompute_num_layers",
        lambda s: _selective(s) and s.recompute_num_layers is not None,
        "Selective recomputation has no number of layers.",
        "Drop {write[recompute_num_layers]}.",
    ),
    error(
        "MLM-TC-rc_dsa_sp",
        "transformer_config:1935",
        "distribute_saved_activations",
        lambda s: (
            s.recompute_granularity is not None
            and s.distribute_saved_activations
            and s.sequence_parallel
        ),
        "Sequence parallelism already divides the saved activations.",
        "Drop {write[distribute_saved_activations]}.",
    ),
    change(
        "MLM-TC-rc_modules_default",
        "transformer_config:1941",
        "recompute_modules",
        lambda s: (
            _selective(s) and s.recompute_modules is None and {"recompute_modules": ["core_attn"]}
        ),
        "Left out, selective recomputation recomputes core attention.",
        "Write {write[recompute_modules]}.",
        severity="note",
    ),
    derive(
        "transformer_config:1942",
        lambda s: s.recompute_modules is None and {"recompute_modules": ["core_attn"]},
    ),
    error(
        "MLM-TC-rc_modules",
        "transformer_config:1959",
        "recompute_modules",
        _unknown_modules,
        "There is no module {unknown!r} to recompute.",
        "Choose from {known}.",
    ),
    error(
        "MLM-TC-rc_moe_act",
        "transformer_config:1965",
        "recompute_modules",
        lambda s: _selective(s) and "moe_act" in _modules(s) and not s.moe_grouped_gemm,
        "Recomputing the activation of experts needs grouped GEMM.",
        "Add {write[moe_grouped_gemm=true]}.",
    ),
    error(
        "MLM-TC-rc_mla",
        "transformer_config:1970",
        "recompute_modules",
        lambda s: _selective(s) and "mla_up_proj" in _modules(s) and not s.multi_latent_attention,
        "mla_up_proj is part of latent attention.",
        "Drop it from {write[recompute_modules]}.",
    ),
    error(
        "MLM-TC-rc_gdn",
        "transformer_config:1978",
        "recompute_modules",
        lambda s: (
            _selective(s)
            and "gdn_norm_out" in _modules(s)
            and s.experimental_attention_variant not in ("gdn", "gated_delta_net")
        ),
        "gdn_norm_out is part of gated delta net attention.",
        "Drop it from {write[recompute_modules]}.",
    ),
    warning(
        "MLM-TC-rc_core_warn",
        "transformer_config:1985",
        "recompute_modules",
        lambda s: _selective(s) and "core_attn" in _modules(s),
        "Fused and flash attention recompute inside already: core_attn only costs time then.",
        "Drop core_attn, or choose other modules.",
    ),
    error(
        "MLM-TC-rc_shared",
        "transformer_config:1996",
        "recompute_modules",
        lambda s: (
            _selective(s)
            and "shared_experts" in _modules(s)
            and s.moe_shared_expert_intermediate_size is not None
            and s.moe_shared_expert_overlap
        ),
        "Overlapped shared experts are not recomputed.",
        "Drop shared_experts from {write[recompute_modules]}, or "
        "{write[moe_shared_expert_overlap]}.",
    ),
    error(
        "MLM-TC-rc_fp8_delayed",
        "transformer_config:2003",
        "recompute_modules",
        lambda s: _fp8_and(s) and s.fp8_recipe == "delayed",
        "Delayed scaling excludes recomputing moe_act and layernorm in FP8.",
        "Use {write[fp8_recipe=tensorwise]}, or drop these modules.",
    ),
    error(
        "MLM-TC-rc_fp8_te",
        "transformer_config:2008",
        "recompute_modules",
        lambda s: _fp8_and(s) and s.fp8_recipe != "delayed" and not s.site.te_at_least(2, 6),
        "Recomputing moe_act and layernorm in FP8 needs Transformer Engine 2.6.",
        "Install it, or drop these modules.",
    ),
    error(
        "MLM-TC-rc_moelayer_full",
        "transformer_config:2020",
        "moe_layer_recompute",
        lambda s: s.moe_layer_recompute and _full(s),
        "Full recomputation includes the expert layers.",
        "Drop {write[moe_layer_recompute]}.",
    ),
    change(
        "MLM-TC-rc_moelayer",
        "transformer_config:2023",
        "moe_layer_recompute",
        _with_moe,
        "The old option means selective recomputation of moe.",
        "Use {write[recompute_granularity=selective]} with moe in {write[recompute_modules]}.",
    ),
    error(
        "MLM-TC-rc_mhc",
        "transformer_config:2030",
        "recompute_modules",
        lambda s: _selective(s) and "mhc" in _modules(s) and not s.enable_mhc_connections,
        "mhc is part of hyper connections.",
        "Drop it from {write[recompute_modules]}.",
    ),
    warning(
        "MLM-TC-mhc_modules",
        "transformer_config:2050",
        "recompute_modules",
        lambda s: s.enable_mhc_connections and "mhc" not in _modules(s) and not _full(s),
        "Hyper connections keep several residual streams; recomputing mhc saves that memory.",
        "Use {write[recompute_granularity=selective]} with mhc in {write[recompute_modules]}.",
    ),
    error(
        "MLM-TC-mhc_mtp",
        "transformer_config:2064",
        "mtp_num_layers",
        lambda s: s.enable_mhc_connections and s.mtp_num_layers,
        "Hyper connections exclude multi-token prediction.",
        "Drop {write[mtp_num_layers]}.",
    ),
    error(
        "MLM-TC-mhc_full",
        "transformer_config:2070",
        "recompute_granularity",
        lambda s: s.enable_mhc_connections and _full(s),
        "Hyper connections exclude full recomputation.",
        "Use {write[recompute_granularity=selective]} with mhc in {write[recompute_modules]}.",
    ),
    error(
        "MLM-TC-mhc_pp",
        "transformer_config:2093",
        "enable_mhc_connections",
        lambda s: s.enable_mhc_connections and s.pp > 1,
        "Hyper connections exclude pipeline parallelism (pp is {pp}).",
        "Use {write[pipeline_model_parallel_size=1]}.",
    ),
    error(
        "MLM-TC-fgo_cpu",
        "transformer_config:2128",
        "fine_grained_activation_offloading",
        lambda s: s.fine_grained_activation_offloading and s.cpu_offloading,
        "Activations are offloaded by module or by layer, not both.",
        "Drop {write[cpu_offloading_num_layers]}.",
    ),
    error(
        "MLM-TC-fgo_modules",
        "transformer_config:2131",
        "offload_modules",
        lambda s: s.fine_grained_activation_offloading and not s.offload_modules,
        "Fine-grained offloading needs the modules to offload.",
        "Add {write[offload_modules]}.",
    ),
    error(
        "MLM-TC-fgo_allowed",
        "transformer_config:2144",
        "offload_modules",
        _unknown_offloads,
        "There is no module {unknown!r} to offload.",
        "Choose from {known}.",
    ),
    error(
        "MLM-TC-fgo_attnproj",
        "transformer_config:2149",
        "offload_modules",
        lambda s: "attn_proj" in _offloads(s) and "core_attn" not in _offloads(s),
        "The input of attn_proj is the output of core_attn: offload both.",
        "Add core_attn to {write[offload_modules]}.",
    ),
    error(
        "MLM-TC-fgo_moe_rc",
        "transformer_config:2169",
        "offload_modules",
        lambda s: _selective(s) and "moe" in _modules(s) and _offloads(s) & _INSIDE_MOE,
        "Recomputing whole expert layers drops what moe_act, expert_fc1 and fused_group_mlp would "
        "offload.",
        "Drop them from {write[offload_modules]}, or moe from {write[recompute_modules]}.",
    ),
    error(
        "MLM-TC-fgo_min",
        "transformer_config:2176",
        "min_offloaded_tensor_size",
        lambda s: s.fine_grained_activation_offloading and s.min_offloaded_tensor_size < 0,
        "The smallest offloaded tensor has 0 elements or more.",
        "Use 0 or more.",
    ),
    error(
        "MLM-TC-fgo_frac",
        "transformer_config:2179",
        "activation_offload_fraction",
        lambda s: (
            s.fine_grained_activation_offloading and not 0 <= s.activation_offload_fraction <= 1
        ),
        "The offloaded fraction lies between 0 and 1, not {activation_offload_fraction}.",
        "Use {write[activation_offload_fraction=1.0]}.",
    ),
    error(
        "MLM-TC-fgo_delta",
        "transformer_config:2182",
        "delta_offload_bytes_across_pp_ranks",
        lambda s: (
            s.fine_grained_activation_offloading and s.delta_offload_bytes_across_pp_ranks < 0
        ),
        "The difference between ranks is 0 bytes or more.",
        "Use 0 or more.",
    ),
    error(
        "MLM-TC-fgo_fused",
        "transformer_config:2188",
        "offload_modules",
        lambda s: "fused_group_mlp" in _offloads(s) and not s.use_transformer_engine_op_fuser,
        "fused_group_mlp exists with the op fuser only.",
        "Add {write[use_transformer_engine_op_fuser=true]}.",
    ),
    error(
        "MLM-TC-fgo_fused_mix",
        "transformer_config:2191",
        "offload_modules",
        lambda s: "fused_group_mlp" in _offloads(s) and _offloads(s) & {"expert_fc1", "moe_act"},
        "fused_group_mlp includes expert_fc1 and moe_act.",
        "Drop the two.",
    ),
    error(
        "MLM-TC-gtp_optin",
        "transformer_config:2205",
        "gtp_remat_opt_in_modules",
        lambda s: set(s.gtp_remat_opt_in_modules or ()) - {"moe_latent_proj"},
        "Only moe_latent_proj can opt in to weight shards.",
        "Use moe_latent_proj.",
    ),
    error(
        "MLM-TC-paged_cpu",
        "transformer_config:2212",
        "moe_paged_stash",
        lambda s: s.moe_paged_stash and s.cpu_offloading,
        "The paged stash excludes offloading by layer.",
        "Drop {write[cpu_offloading_num_layers]}.",
    ),
    error(
        "MLM-TC-paged_rank",
        "transformer_config:2214",
        "moe_paged_stash",
        lambda s: s.moe_paged_stash and s.moe_expert_rank_capacity_factor is None,
        "The paged stash needs a capacity for each rank.",
        "Add {write[moe_expert_rank_capacity_factor=1.5]}.",
    ),
    error(
        "MLM-TC-paged_off",
        "transformer_config:2222",
        "offload_modules",
        lambda s: s.moe_paged_stash and set(s.offload_modules or ()) & _INSIDE_MOE,
        "The paged stash already holds expert_fc1, moe_act and fused_group_mlp.",
        "Drop them from {write[offload_modules]}.",
    ),
)
