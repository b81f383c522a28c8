"""Rules of CUDA graphs: what is captured, and what a captured part must not do."""

from __future__ import annotations

from typing import Any

from meshwright.frameworks.megatron_lm.rules import Settings, change, derive, error, is_list

_LOCAL_OFFLOADS = {"expert_fc1", "moe_act", "fused_group_mlp"}


def _on(s: Settings) -> bool:
    return s.cuda_graph_impl != "none"


def _per_layer(s: Settings) -> bool:
    return s.cuda_graph_impl in ("local", "transformer_engine")


def _modules(s: Settings) -> set[str]:
    return set(s.cuda_graph_modules or ())


def _whole(s: Settings) -> bool:
    return s.cuda_graph_impl == "full_iteration" or not _modules(s)


def _selective(s: Settings) -> bool:
    return _on(s) and s.recompute_granularity == "selective"


def _recomputed(s: Settings) -> set[str]:
    return set(s.recompute_modules or ())


def _captured(s: Settings, module: str) -> bool:
    return _whole(s) or module in _modules(s)


def _has_experts(s: Settings) -> bool:
    return s.num_experts is not None and s.num_experts > 1


def _only_experts(s: Settings) -> bool:
    freq: object = s.moe_layer_freq
    return freq == 1 or (is_list(freq) and 0 not in freq)


def _drop_and_pad(s: Settings) -> bool:
    return s.moe_expert_capacity_factor is not None and s.moe_pad_expert_input_to_capacity


def _old_impl(s: Settings) -> object:
    if s.cuda_graph_impl != "none":
        return None
    if s.enable_cuda_graph:
        return {"cuda_graph_impl": "local"}
    return s.external_cuda_graph and {"cuda_graph_impl": "transformer_engine"}


def _modules_of_scope(s: Settings) -> object:
    if s.cuda_graph_scope_deprecated is None:
        return None
    return {"cuda_graph_modules": list(s.cuda_graph_scope_deprecated)}


def _full_scope(s: Settings) -> object:
    modules: list[str] = list(s.cuda_graph_modules or ())
    new: dict[str, Any] = {}
    if "full_iteration" in modules:
        new["cuda_graph_impl"] = "full_iteration"
    if "full_iteration_inference" in modules and s.cuda_graph_impl != "none":
        new["inference_cuda_graph_scope"] = "block"
    old = ("full", "full_iteration", "full_iteration_inference")
    if any(m in old for m in modules):
        new["cuda_graph_modules"] = [m for m in modules if m not in old]
    return new


def _named_modules(s: Settings) -> dict[str, Any]:
    given: object = s.cuda_graph_modules or ()
    modules = given.split(",") if isinstance(given, str) else list(s.cuda_graph_modules or ())
    return {"cuda_graph_modules": [m for m in modules if m != "full"]}


def _inference_scope(s: Settings) -> dict[str, Any]:
    scope = s.inference_cuda_graph_scope
    if scope is None:
        scope = "layer" if s.cuda_graph_impl == "local" else "none"
    return {"inference_cuda_graph_scope": scope}


def _wrong_inference_scope(s: Settings) -> object:
    allowed = ("layer", "block") if s.cuda_graph_impl == "local" else ("none",)
    return s.inference_cuda_graph_scope not in allowed and {"allowed": " or ".join(allowed)}


def _weight_gradients_captured(s: Settings) -> bool:
    shared = s.moe_shared_expert_intermediate_size is not None and not s.moe_shared_expert_overlap
    return (
        s.delay_wgrad_compute
        and s.overlap_grad_reduce
        and ("attn" in _modules(s) or ("moe_router" in _modules(s) and shared))
    )


def _both_router_parts(s: Settings) -> object:
    modules: list[str] = list(s.cuda_graph_modules or ())
    if s.cuda_graph_impl != "local" or not _modules(s) & {"moe_router", "moe_preprocess"}:
        return None
    missing = [m for m in ("moe_router", "moe_preprocess") if m not in modules]
    return missing and {"cuda_graph_modules": [*modules, *missing]}


def _offloads(s: Settings) -> set[str]:
    on = _on(s) and s.fine_grained_activation_offloading
    return set(s.offload_modules or ()) if on else set()


RULES = (
    error(
        "MLM-ARG-graph_old_and_impl",
        "validate_args:612",
        "cuda_graph_impl",
        lambda s: (s.enable_cuda_graph or s.external_cuda_graph) and _on(s),
        "The old switches and --cuda-graph-impl exclude each other.",
        "Keep --cuda-graph-impl.",
    ),
    error(
        "MLM-ARG-graph_old_both",
        "validate_args:615",
        "enable_cuda_graph",
        lambda s: s.enable_cuda_graph and s.external_cuda_graph,
        "There is one implementation of CUDA graphs at a time.",
        "Use --cuda-graph-impl local or transformer_engine.",
    ),
    change(
        "MLM-ARG-graph_old_impl",
        "validate_args:620",
        "cuda_graph_impl",
        _old_impl,
        "The old switch means --cuda-graph-impl {cuda_graph_impl}.",
        "Write that.",
    ),
    error(
        "MLM-ARG-graph_scope_and_modules",
        "validate_args:634",
        "cuda_graph_modules",
        lambda s: s.cuda_graph_scope_deprecated is not None and s.cuda_graph_modules,
        "--cuda-graph-scope is the old name of --cuda-graph-modules.",
        "Keep --cuda-graph-modules.",
    ),
    change(
        "MLM-ARG-graph_scope_old",
        "validate_args:636",
        "cuda_graph_modules",
        _modules_of_scope,
        "--cuda-graph-scope is the old name of --cuda-graph-modules.",
        "Write --cuda-graph-modules.",
    ),
    error(
        "MLM-ARG-graph_scope_full",
        "validate_args:637",
        "cuda_graph_modules",
        lambda s: "full" in _modules(s) and len(s.cuda_graph_modules) > 1,
        "full captures the whole layer: no other module goes with it.",
        "Leave --cuda-graph-modules empty to capture whole layers.",
    ),
    change(
        "MLM-ARG-graph_full_old",
        "validate_args:640",
        "cuda_graph_modules",
        _full_scope,
        "full, full_iteration and full_iteration_inference are old names: no modules capture whole "
        "layers, --cuda-graph-impl and --inference-cuda-graph-scope the rest.",
        "Write those.",
    ),
    derive("validate_args:645", _inference_scope),
    error(
        "MLM-ARG-graph_infer_scope",
        "validate_args:647",
        "inference_cuda_graph_scope",
        _wrong_inference_scope,
        "With --cuda-graph-impl {cuda_graph_impl} inference captures {allowed}, not "
        "{inference_cuda_graph_scope}.",
        "Leave --inference-cuda-graph-scope out.",
    ),
    error(
        "MLM-ARG-full_iter_nan",
        "validate_args:1236",
        "check_for_nan_in_loss_and_grad",
        lambda s: s.cuda_graph_impl == "full_iteration" and s.check_for_nan_in_loss_and_grad,
        "A graph of the whole iteration cannot stop for NaN.",
        "Add --no-check-for-nan-in-loss-and-grad.",
    ),
    error(
        "MLM-ARG-block_fp8_impl",
        "validate_args:1241",
        "transformer_impl",
        lambda s: (
            s.inference_cuda_graph_scope == "block"
            and s.fp8 is not None
            and s.transformer_impl != "inference_optimized"
        ),
        "FP8 with block inference graphs needs inference-optimised layers.",
        "Use --inference-cuda-graph-scope layer.",
    ),
    error(
        "MLM-ARG-block_fp8_recipe",
        "validate_args:1244",
        "fp8_recipe",
        lambda s: (
            s.inference_cuda_graph_scope == "block"
            and s.fp8 is not None
            and s.fp8_recipe != "mxfp8"
        ),
        "FP8 with block inference graphs uses the mxfp8 recipe, not {fp8_recipe}.",
        "Use --fp8-recipe mxfp8.",
    ),
    error(
        "MLM-ARG-local_graph_num",
        "validate_args:1248",
        "inference_dynamic_batching_num_cuda_graphs",
        lambda s: (
            s.cuda_graph_impl == "local"
            and s.inference_dynamic_batching_num_cuda_graphs <= 0
            and s.inference_dynamic_batching_num_cuda_graphs != -1
        ),
        "The number of inference graphs is positive, or -1 for as many as requests.",
        "Use -1.",
    ),
    error(
        "MLM-ARG-dw_graph_te",
        "validate_args:1916",
        "cuda_graph_modules",
        lambda s: _weight_gradients_captured(s) and not s.site.te_at_least(2, 12),
        "Capturing delayed weight gradients needs Transformer Engine 2.12.",
        "Install it.",
    ),
    error(
        "MLM-ARG-dw_graph_gaf",
        "validate_args:1919",
        "gradient_accumulation_fusion",
        lambda s: _weight_gradients_captured(s) and not s.gradient_accumulation_fusion,
        "Capturing delayed weight gradients needs gradient accumulation fusion.",
        "Drop --no-gradient-accumulation-fusion.",
    ),
    error(
        "MLM-ARG-dw_graph_bias",
        "validate_args:1925",
        "add_bias_linear",
        lambda s: (
            _weight_gradients_captured(s)
            and "attn" in _modules(s)
            and (s.add_bias_linear or s.add_qkv_bias)
        ),
        "Capturing delayed weight gradients of attention excludes biases.",
        "Add --disable-bias-linear.",
    ),
    error(
        "MLM-ARG-dw_gaf_te",
        "validate_args:1930",
        "gradient_accumulation_fusion",
        lambda s: (
            s.delay_wgrad_compute
            and not s.gradient_accumulation_fusion
            and not s.site.te_at_least(2, 7)
        ),
        "Delayed weight gradients without fused accumulation need Transformer Engine 2.7.",
        "Drop --no-gradient-accumulation-fusion.",
    ),
    change(
        "MLM-ARG-graph_rng",
        "validate_args:1959",
        "te_rng_tracker",
        lambda s: (
            _on(s)
            and "transformer_engine" in (s.transformer_impl, s.cuda_graph_impl)
            and {"te_rng_tracker": True}
        ),
        "CUDA graphs turn Transformer Engine's random number tracker on.",
        "Add --te-rng-tracker.",
        severity="note",
    ),
    error(
        "MLM-ARG-graph_alloc",
        "validate_args:1962",
        "NCCL_GRAPH_REGISTER",
        lambda s: (
            s.cuda_graph_impl == "transformer_engine"
            and "expandable_segments:True" in s.site.env.get("PYTORCH_CUDA_ALLOC_CONF", "")
            and s.site.env.get("NCCL_GRAPH_REGISTER", "") != "0"
        ),
        "CUDA graphs with expandable segments need NCCL_GRAPH_REGISTER=0.",
        "Export it, or drop expandable segments.",
    ),
    error(
        "MLM-ARG-full_iter_modules",
        "validate_args:1969",
        "cuda_graph_modules",
        lambda s: s.cuda_graph_impl == "full_iteration" and _modules(s),
        "A graph of the whole iteration has no list of modules.",
        "Drop --cuda-graph-modules.",
    ),
    derive("transformer_config:2790", _named_modules),
    error(
        "MLM-TC-graph_cpu",
        "transformer_config:2801",
        "cpu_offloading_num_layers",
        lambda s: _per_layer(s) and s.cpu_offloading,
        "CUDA graphs of layers exclude offloading layers.",
        "Drop {write[cpu_offloading_num_layers]}.",
    ),
    change(
        "MLM-TC-graph_local_pre",
        "transformer_config:2813",
        "cuda_graph_modules",
        _both_router_parts,
        "Local graphs capture moe_router and moe_preprocess together.",
        severity="note",
    ),
    error(
        "MLM-TC-graph_moe_router",
        "transformer_config:2817",
        "cuda_graph_modules",
        lambda s: _per_layer(s) and {"moe", "moe_router"} <= _modules(s),
        "moe includes moe_router.",
        "Keep one of the two.",
    ),
    error(
        "MLM-TC-graph_pre",
        "transformer_config:2822",
        "cuda_graph_modules",
        lambda s: (
            _per_layer(s) and "moe_preprocess" in _modules(s) and "moe_router" not in _modules(s)
        ),
        "moe_preprocess is captured with moe_router.",
        "Add moe_router.",
    ),
    error(
        "MLM-TC-graph_dense",
        "transformer_config:2826",
        "cuda_graph_modules",
        lambda s: _per_layer(s) and not _has_experts(s) and _modules(s) & {"moe", "moe_router"},
        "A dense model has no experts to capture.",
        "Drop moe and moe_router from {write[cuda_graph_modules]}.",
    ),
    error(
        "MLM-TC-graph_mlp",
        "transformer_config:2834",
        "cuda_graph_modules",
        lambda s: _per_layer(s) and _has_experts(s) and _only_experts(s) and "mlp" in _modules(s),
        "Every layer has experts: there is no dense MLP to capture.",
        "Drop mlp from {write[cuda_graph_modules]}.",
    ),
    error(
        "MLM-TC-graph_moe_drop",
        "transformer_config:2842",
        "cuda_graph_modules",
        lambda s: (
            _per_layer(s) and _has_experts(s) and not _drop_and_pad(s) and "moe" in _modules(s)
        ),
        "Only experts with a fixed, padded capacity are captured whole.",
        "Add {write[moe_expert_capacity_factor=1.0]} and "
        "{write[moe_pad_expert_input_to_capacity=true]}.",
    ),
    error(
        "MLM-TC-graph_pre_sync",
        "transformer_config:2849",
        "cuda_graph_modules",
        lambda s: (
            _per_layer(s)
            and _has_experts(s)
            and not _drop_and_pad(s)
            and s.moe_token_dispatcher_type == "alltoall"
            and (s.moe_expert_capacity_factor is not None or s.moe_router_padding_for_fp8)
            and "moe_preprocess" in _modules(s)
        ),
        "The alltoall dispatcher waits for the host in moe_preprocess here.",
        "Drop moe_preprocess, or pad to capacity.",
    ),
    error(
        "MLM-TC-graph_full_rc",
        "transformer_config:2856",
        "recompute_granularity",
        lambda s: _per_layer(s) and s.recompute_granularity == "full",
        "Full recomputation goes with a graph of the whole iteration only.",
        "Use {write[recompute_granularity=selective]}.",
    ),
    error(
        "MLM-TC-graph_moe_rc",
        "transformer_config:2866",
        "cuda_graph_modules",
        lambda s: (
            _selective(s)
            and s.cuda_graph_impl == "transformer_engine"
            and "moe" in _recomputed(s)
            and "moe_router" in _modules(s)
        ),
        "A recomputed expert layer cannot hold a captured router.",
        "Drop moe from {write[recompute_modules]}, or moe_router.",
    ),
    error(
        "MLM-TC-graph_attn_drop",
        "transformer_config:2879",
        "attention_dropout",
        lambda s: (
            _selective(s)
            and s.attention_dropout != 0
            and _captured(s, "attn")
            and "core_attn" in _recomputed(s)
        ),
        "Captured attention that is recomputed must not draw random numbers: dropout is "
        "{attention_dropout}.",
        "Use {write[attention_dropout=0]}.",
    ),
    error(
        "MLM-TC-graph_hidden_drop",
        "transformer_config:2887",
        "hidden_dropout",
        lambda s: (
            _selective(s)
            and s.hidden_dropout != 0
            and any(_captured(s, m) and m in _recomputed(s) for m in ("mlp", "moe"))
        ),
        "Captured MLPs that are recomputed must not draw random numbers: dropout is "
        "{hidden_dropout}.",
        "Use {write[hidden_dropout=0]}.",
    ),
    error(
        "MLM-TC-graph_jitter",
        "transformer_config:2901",
        "moe_input_jitter_eps",
        lambda s: (
            _selective(s)
            and s.moe_input_jitter_eps is not None
            and _captured(s, "moe")
            and "moe" in _recomputed(s)
        ),
        "Captured experts that are recomputed must not draw random numbers.",
        "Drop {write[moe_input_jitter_eps]}.",
    ),
    error(
        "MLM-TC-graph_fgo_local",
        "transformer_config:2934",
        "offload_modules",
        lambda s: s.cuda_graph_impl == "local" and _offloads(s) - _LOCAL_OFFLOADS,
        "Local graphs offload expert_fc1, moe_act and fused_group_mlp only.",
        "Drop the others from {write[offload_modules]}.",
    ),
    error(
        "MLM-TC-graph_fgo_local2",
        "transformer_config:2940",
        "cuda_graph_modules",
        lambda s: s.cuda_graph_impl == "local" and _offloads(s) and not _modules(s),
        "Local graphs of whole layers exclude offloading.",
        "Name the captured modules.",
    ),
    error(
        "MLM-TC-graph_fgo_drop",
        "transformer_config:2960",
        "cuda_graph_modules",
        lambda s: _offloads(s) and "moe" in _modules(s),
        "Captured whole experts exclude offloading.",
        "Drop moe from {write[cuda_graph_modules]}.",
    ),
    error(
        "MLM-TC-graph_fgo_warm",
        "transformer_config:2963",
        "cuda_graph_warmup_steps",
        lambda s: _offloads(s) and s.cuda_graph_warmup_steps <= 0,
        "Captured offloading needs a warm-up step.",
        "Use {write[cuda_graph_warmup_steps=3]}.",
    ),
    error(
        "MLM-TC-graph_fgo_full",
        "transformer_config:2968",
        "fine_grained_offloading_max_inflight_offloads",
        lambda s: (
            s.cuda_graph_impl == "full_iteration"
            and _offloads(s)
            and (
                s.fine_grained_offloading_max_inflight_offloads is None
                or s.fine_grained_offloading_max_inflight_offloads < 0
            )
        ),
        "A graph of the whole iteration limits the offloads in flight.",
        "Add {write[fine_grained_offloading_max_inflight_offloads=1]}.",
    ),
    error(
        "MLM-TC-ov_graph",
        "transformer_config:3065",
        "cuda_graph_modules",
        lambda s: (
            s.overlap_moe_expert_parallel_comm
            and s.cuda_graph_impl == "transformer_engine"
            and _modules(s) & {"moe", "mlp"}
        ),
        "Overlapped expert communication excludes capturing moe and mlp.",
        "Capture attn only.",
    ),
)
