"""Rules of experts: routing, dispatchers, overlap of their communication, shared experts."""

from __future__ import annotations

from typing import Any

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

_BALANCED = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")


def _as_list(value: object) -> list[Any]:
    return list(value) if is_list(value) else [value]


def _one(value: object) -> object:
    return value[0] if is_list(value) and len(value) == 1 else value


def _single(s: Settings) -> bool:
    return s.moe_single_grouped_weight or s.moe_single_grouped_bias


def _moe(s: Settings) -> bool:
    return s.num_experts is not None


def _mixed_layers(s: Settings) -> bool:
    freq: object = s.moe_layer_freq
    return (is_list(freq) and 0 in freq) or (isinstance(freq, int) and freq > 1)


def _narrow_dispatch(s: Settings) -> bool:
    names = ("moe_dispatch_fwd_dtype", "moe_combine_bwd_dtype")
    return any(getattr(s, n) not in ("bf16", None) for n in names)


def _flex(s: Settings, backend: str) -> bool:
    return (
        _moe(s)
        and s.moe_token_dispatcher_type == "flex"
        and s.moe_flex_dispatcher_backend == backend
    )


def _capacity_given(s: Settings) -> bool:
    return s.moe_expert_capacity_factor is not None


def _unbalanced(s: Settings) -> list[Any]:
    return [b for b in _as_list(s.moe_router_load_balancing_type) if b not in _BALANCED]


def _aux_lengths(s: Settings) -> object:
    kinds: object = s.moe_router_load_balancing_type
    coefficients: object = s.moe_aux_loss_coeff
    if not is_list(kinds) or (is_list(coefficients) and len(coefficients) == len(kinds)):
        return None
    return {"kinds": len(kinds), "coefficients": len(_as_list(coefficients))}


def _sms_conflict(s: Settings) -> object:
    old = {s.moe_deepep_num_sms, s.moe_hybridep_num_sms} - {None}
    return s.moe_flex_dispatcher_num_sms is None and len(old) > 1


def _limited_devices(s: Settings) -> object:
    return (
        not s.moe_router_group_topk
        and s.moe_router_topk_limited_devices
        and {
            "moe_router_group_topk": s.moe_router_topk_limited_devices,
            "moe_router_num_groups": s.ep,
        }
    )


def _frequency_length(s: Settings) -> object:
    freq: object = s.moe_layer_freq
    if not _moe(s) or not is_list(freq):
        return None
    return len(freq) != s.num_layers and {"length": len(freq)}


def _frequency_values(s: Settings) -> object:
    freq: object = s.moe_layer_freq
    if not _moe(s):
        return None
    if is_list(freq):
        return any(i not in (0, 1) for i in freq)
    return isinstance(freq, int) and freq < 1


def _dense_layers(s: Settings) -> bool:
    return not _moe(s) or _mixed_layers(s)


def _moe_layers(s: Settings) -> bool:
    freq: object = s.moe_layer_freq
    return _moe(s) and not (is_list(freq) and 1 not in freq)


def _not_splitting(s: Settings) -> object:
    """The first width that tensor parallelism does not divide."""
    widths: list[tuple[bool, str, int]] = [
        (_dense_layers(s), "ffn_hidden_size", s.tp),
        (_moe_layers(s), "moe_ffn_hidden_size", s.etp),
        (_moe_layers(s), "moe_shared_expert_intermediate_size", s.tp),
    ]
    for built, name, size in widths:
        width = getattr(s, name)
        if built and isinstance(width, int) and indivisible(width, size):
            return {"field": name, "width": width, "size": size}
    return None


RULES = (
    error(
        "MLM-ARG-gg_device",
        "validate_args:1380",
        "moe_grouped_gemm",
        lambda s: s.moe_grouped_gemm and s.site.device_capability[0] < 8,
        "Grouped GEMM needs an Ampere GPU or newer.",
        "Drop --moe-grouped-gemm.",
    ),
    change(
        "MLM-ARG-experts_zero",
        "validate_args:1648",
        "num_experts",
        lambda s: s.num_experts == 0 and {"num_experts": None},
        "Zero experts means a dense model.",
        "Drop --num-experts.",
    ),
    change(
        "MLM-ARG-moe_ffn_default",
        "validate_args:1652",
        "moe_ffn_hidden_size",
        lambda s: (
            _moe(s) and s.moe_ffn_hidden_size is None and {"moe_ffn_hidden_size": s.ffn_hidden_size}
        ),
        "Left out, experts are as wide as the dense layers: {moe_ffn_hidden_size}.",
        "Write --moe-ffn-hidden-size.",
    ),
    error(
        "MLM-ARG-ep_dense",
        "validate_args:1656",
        "expert_model_parallel_size",
        lambda s: s.ep > 1 and not _moe(s),
        "Expert parallelism (ep = {ep}) needs experts.",
        "Use --expert-model-parallel-size 1, or give --num-experts.",
    ),
    error(
        "MLM-ARG-ep_div",
        "validate_args:1657",
        "expert_model_parallel_size",
        lambda s: (
            s.ep > 1
            and _moe(s)
            and s.num_experts % s.ep
            and {"choices": divisors_near(s.num_experts, s.ep)}
        ),
        "The {num_experts} experts must split over ep = {ep}.",
        "Use ep = {choices}.",
    ),
    derive(
        "validate_args:1660",
        lambda s: {
            "moe_router_load_balancing_type": _one(s.moe_router_load_balancing_type),
            "moe_aux_loss_coeff": _one(s.moe_aux_loss_coeff),
        },
    ),
    error(
        "MLM-ARG-fakepg_flex",
        "validate_args:1757",
        "moe_token_dispatcher_type",
        lambda s: s.fake_process_group and s.moe_token_dispatcher_type == "flex",
        "Dry runs with fake process groups cannot use the flex dispatcher.",
        "Use --moe-token-dispatcher-type alltoall.",
    ),
    error(
        "MLM-ARG-upcycle_save",
        "validate_args:1864",
        "moe_use_upcycling",
        lambda s: s.moe_use_upcycling and s.save is None,
        "Upcycling saves what it makes.",
        "Add --save.",
    ),
    error(
        "MLM-ARG-dw_te_impl",
        "validate_args:1904",
        "delay_wgrad_compute",
        lambda s: s.delay_wgrad_compute and s.transformer_impl != "transformer_engine",
        "Delaying weight gradients is done by Transformer Engine layers, not {transformer_impl}.",
        "Use --transformer-impl transformer_engine.",
    ),
    error(
        "MLM-ARG-dw_ogr_te",
        "validate_args:1907",
        "delay_wgrad_compute",
        lambda s: s.delay_wgrad_compute and s.overlap_grad_reduce and not s.site.te_at_least(2, 8),
        "Delayed weight gradients with overlapped reduction need Transformer Engine 2.8.",
        "Install it, or drop --overlap-grad-reduce.",
    ),
    error(
        "MLM-ARG-latent_pos",
        "validate_args:1981",
        "moe_latent_size",
        lambda s: s.moe_latent_size is not None and s.moe_latent_size <= 0,
        "The latent size of experts is positive.",
        "Use 1 or more.",
    ),
    error(
        "MLM-ARG-latent_moe",
        "validate_args:1982",
        "moe_latent_size",
        lambda s: s.moe_latent_size is not None and not _moe(s),
        "A latent size of experts needs experts.",
        "Drop --moe-latent-size, or give --num-experts.",
    ),
    change(
        "MLM-TC-grouped_tensor_auto",
        "transformer_config:1411",
        "moe_use_grouped_tensor",
        lambda s: (
            s.use_transformer_engine_op_fuser
            and s.moe_grouped_gemm
            and {"moe_use_grouped_tensor": True}
        ),
        "The op fuser with grouped GEMM uses grouped tensors.",
        severity="note",
    ),
    error(
        "MLM-TC-grouped_tensor",
        "transformer_config:1414",
        "moe_use_grouped_tensor",
        lambda s: s.moe_use_grouped_tensor and not s.moe_grouped_gemm,
        "Grouped tensors need grouped GEMM.",
        "Add {write[moe_grouped_gemm=true]}.",
    ),
    error(
        "MLM-TC-ep_moe",
        "transformer_config:1596",
        "expert_model_parallel_size",
        lambda s: s.ep > 1 and not _moe(s),
        "Expert parallelism (ep = {ep}) needs experts.",
        "Use {write[expert_model_parallel_size=1]}, or give {write[num_experts]}.",
        repeats=("MLM-ARG-ep_dense",),
    ),
    error(
        "MLM-TC-inf_etp",
        "transformer_config:1600",
        "expert_tensor_parallel_size",
        lambda s: s.transformer_impl == "inference_optimized" and _moe(s) and s.etp > 1,
        "Inference-optimised experts are not split (etp is {etp}).",
        "Use {write[expert_tensor_parallel_size=1]}.",
    ),
    error(
        "MLM-TC-experts_pos",
        "transformer_config:1683",
        "num_experts",
        lambda s: _moe(s) and s.num_experts <= 0,
        "There is at least one expert, not {num_experts}.",
        "Use 1 or more, or leave it out for a dense model.",
        final=True,
    ),
    change(
        "MLM-TC-moe_ffn_default",
        "transformer_config:1687",
        "moe_ffn_hidden_size",
        lambda s: (
            _moe(s) and s.moe_ffn_hidden_size is None and {"moe_ffn_hidden_size": s.ffn_hidden_size}
        ),
        "Left out, experts are as wide as the dense layers: {moe_ffn_hidden_size}.",
        "Write {write[moe_ffn_hidden_size]}.",
    ),
    error(
        "MLM-TC-moe_ffn_dense",
        "transformer_config:1702",
        "moe_ffn_hidden_size",
        lambda s: s.moe_ffn_hidden_size is not None and not _moe(s) and not _mixed_layers(s),
        "The width of experts is given for a dense model.",
        "Drop {write[moe_ffn_hidden_size]}, or give {write[num_experts]}.",
    ),
    error(
        "MLM-TC-single_gg",
        "transformer_config:1709",
        "moe_single_grouped_weight",
        lambda s: _single(s) and not s.moe_grouped_gemm,
        "One weight for all experts needs grouped GEMM.",
        "Add {write[moe_grouped_gemm=true]}.",
    ),
    error(
        "MLM-TC-single_te",
        "transformer_config:1714",
        "moe_single_grouped_weight",
        lambda s: _single(s) and not s.site.te_at_least(2, 14),
        "One weight for all experts needs Transformer Engine 2.14.",
        "Install it, or keep one parameter an expert.",
    ),
    error(
        "MLM-TC-single_recipe",
        "transformer_config:1726",
        "moe_single_grouped_weight",
        lambda s: (
            s.moe_single_grouped_weight
            and ((s.fp8 and s.fp8_recipe != "mxfp8") or (s.fp4 and s.fp4_recipe != "nvfp4"))
        ),
        "One weight for all experts is kept in 16 bits, mxfp8 or nvfp4.",
        "Use {write[fp8_recipe=mxfp8]}.",
    ),
    error(
        "MLM-TC-single_gt",
        "transformer_config:1737",
        "moe_single_grouped_weight",
        lambda s: s.moe_single_grouped_weight and not s.moe_use_grouped_tensor,
        "One weight for all experts needs grouped tensors.",
        "Add {write[moe_use_grouped_tensor=true]}.",
    ),
    error(
        "MLM-TC-single_bias",
        "transformer_config:1739",
        "moe_single_grouped_bias",
        lambda s: s.moe_single_grouped_bias and not s.add_bias_linear,
        "One bias for all experts needs biases.",
        "Drop {write[moe_single_grouped_bias]}.",
    ),
    error(
        "MLM-TC-single_bias_gt",
        "transformer_config:1741",
        "moe_single_grouped_bias",
        lambda s: s.moe_single_grouped_bias and not s.moe_use_grouped_tensor,
        "One bias for all experts needs grouped tensors.",
        "Add {write[moe_use_grouped_tensor=true]}.",
    ),
    error(
        "MLM-TC-deepep_flex",
        "transformer_config:1745",
        "moe_token_dispatcher_type",
        lambda s: s.moe_enable_deepep and s.moe_token_dispatcher_type != "flex",
        "DeepEP works under the flex dispatcher, not {moe_token_dispatcher_type}.",
        "Use {write[moe_token_dispatcher_type=flex]}.",
    ),
    error(
        "MLM-TC-deepep_one",
        "transformer_config:1747",
        "moe_flex_dispatcher_backend",
        lambda s: s.moe_enable_deepep and s.moe_flex_dispatcher_backend == "hybridep",
        "DeepEP and HybridEP exclude each other.",
        "Drop {write[moe_enable_deepep]}.",
    ),
    change(
        "MLM-TC-deepep_old",
        "transformer_config:1750",
        "moe_flex_dispatcher_backend",
        lambda s: s.moe_enable_deepep and {"moe_flex_dispatcher_backend": "deepep"},
        "--moe-enable-deepep is the old form of --moe-flex-dispatcher-backend deepep.",
        "Use {write[moe_flex_dispatcher_backend=deepep]}.",
    ),
    error(
        "MLM-TC-flex_pad",
        "transformer_config:1758",
        "moe_pad_expert_input_to_capacity",
        lambda s: (
            s.moe_token_dispatcher_type == "flex"
            and s.moe_pad_expert_input_to_capacity
            and s.moe_flex_dispatcher_backend == "deepep"
        ),
        "DeepEP does not pad the input of experts to their capacity.",
        "Drop {write[moe_pad_expert_input_to_capacity]}.",
    ),
    error(
        "MLM-TC-ncclep_flex",
        "transformer_config:1765",
        "moe_token_dispatcher_type",
        lambda s: (
            s.moe_flex_dispatcher_backend == "ncclep" and s.moe_token_dispatcher_type != "flex"
        ),
        "NCCL-EP works under the flex dispatcher, not {moe_token_dispatcher_type}.",
        "Use {write[moe_token_dispatcher_type=flex]}.",
    ),
    error(
        "MLM-TC-ncclep_gt",
        "transformer_config:1770",
        "moe_use_grouped_tensor",
        lambda s: (
            s.moe_flex_dispatcher_backend == "ncclep"
            and s.moe_use_grouped_tensor
            and not s.use_transformer_engine_op_fuser
        ),
        "Grouped tensors under NCCL-EP need the op fuser.",
        "Add {write[use_transformer_engine_op_fuser=true]}.",
    ),
    error(
        "MLM-TC-disp_dtype",
        "transformer_config:1781",
        "moe_dispatch_fwd_dtype",
        lambda s: (
            _narrow_dispatch(s)
            and not (
                s.moe_token_dispatcher_type == "flex" and s.moe_flex_dispatcher_backend == "ncclep"
            )
        ),
        "Only NCCL-EP sends tokens in less than 16 bits.",
        "Use {write[moe_token_dispatcher_type=flex]} and "
        "{write[moe_flex_dispatcher_backend=ncclep]}.",
    ),
    error(
        "MLM-TC-disp_dtype_fuser",
        "transformer_config:1786",
        "moe_dispatch_fwd_dtype",
        lambda s: (
            _narrow_dispatch(s) and not (s.use_transformer_engine_op_fuser and s.moe_grouped_gemm)
        ),
        "Sending tokens in less than 16 bits needs the op fuser and grouped GEMM.",
        "Add {write[use_transformer_engine_op_fuser=true]} and {write[moe_grouped_gemm=true]}.",
    ),
    error(
        "MLM-TC-sms_conflict",
        "transformer_config:1807",
        "moe_deepep_num_sms",
        _sms_conflict,
        "Two old options give different numbers of SMs: {moe_deepep_num_sms} and "
        "{moe_hybridep_num_sms}.",
        "Use {write[moe_flex_dispatcher_num_sms]}.",
    ),
    error(
        "MLM-TC-shared_pos",
        "transformer_config:1815",
        "moe_shared_expert_intermediate_size",
        lambda s: (
            s.moe_shared_expert_intermediate_size is not None
            and s.moe_shared_expert_intermediate_size <= 0
        ),
        "The width of shared experts is their number times the width of one, at least 1.",
        "Leave it out when there are none.",
    ),
    error(
        "MLM-TC-shared_overlap",
        "transformer_config:1824",
        "moe_shared_expert_overlap",
        lambda s: (
            s.moe_shared_expert_intermediate_size is not None
            and s.moe_shared_expert_overlap
            and s.moe_token_dispatcher_type not in ("alltoall", "flex")
        ),
        "Shared experts overlap with the alltoall or flex dispatcher, not "
        "{moe_token_dispatcher_type}.",
        "Use {write[moe_token_dispatcher_type=alltoall]}.",
    ),
    error(
        "MLM-TC-aux_len",
        "transformer_config:1829",
        "moe_aux_loss_coeff",
        _aux_lengths,
        "Each of the {kinds} kinds of balancing has its coefficient; {coefficients} given.",
        "Give {kinds} coefficients.",
    ),
    error(
        "MLM-TC-cap_lb",
        "transformer_config:1847",
        "moe_router_load_balancing_type",
        lambda s: (
            _capacity_given(s) and is_list(s.moe_router_load_balancing_type) and _unbalanced(s)
        ),
        "A capacity factor works with auxiliary losses or none, not "
        "{moe_router_load_balancing_type}.",
        "Use {write[moe_router_load_balancing_type=aux_loss]}.",
    ),
    error(
        "MLM-TC-cap_lb2",
        "transformer_config:1857",
        "moe_router_load_balancing_type",
        lambda s: (
            _capacity_given(s) and not is_list(s.moe_router_load_balancing_type) and _unbalanced(s)
        ),
        "A capacity factor works with auxiliary losses or none, not "
        "{moe_router_load_balancing_type}.",
        "Use {write[moe_router_load_balancing_type=aux_loss]}.",
    ),
    change(
        "MLM-TC-cap_neg",
        "transformer_config:1858",
        "moe_expert_capacity_factor",
        lambda s: (
            _capacity_given(s)
            and s.moe_expert_capacity_factor < 0
            and {"moe_expert_capacity_factor": None}
        ),
        "A negative capacity factor means no capacity.",
        "Drop {write[moe_expert_capacity_factor]}.",
    ),
    error(
        "MLM-TC-pad_cap",
        "transformer_config:1864",
        "moe_pad_expert_input_to_capacity",
        lambda s: s.moe_pad_expert_input_to_capacity and not _capacity_given(s),
        "Padding to capacity needs a capacity.",
        "Add {write[moe_expert_capacity_factor=1.0]}.",
    ),
    error(
        "MLM-TC-rank_cap",
        "transformer_config:1870",
        "moe_flex_dispatcher_backend",
        lambda s: (
            s.moe_expert_rank_capacity_factor is not None
            and s.moe_flex_dispatcher_backend not in ("hybridep", "ncclep")
        ),
        "A capacity for each rank is kept by HybridEP or NCCL-EP, not "
        "{moe_flex_dispatcher_backend}.",
        "Use {write[moe_flex_dispatcher_backend=hybridep]}.",
    ),
    error(
        "MLM-TC-rank_cap_hyb",
        "transformer_config:1879",
        "moe_expert_rank_capacity_factor",
        lambda s: (
            s.moe_expert_rank_capacity_factor is not None
            and s.moe_flex_dispatcher_backend == "hybridep"
            and not s.use_transformer_engine_op_fuser
            and not s.moe_use_grouped_tensor
        ),
        "A capacity for each rank under HybridEP needs the op fuser or grouped tensors.",
        "Add {write[use_transformer_engine_op_fuser=true]}.",
    ),
    error(
        "MLM-TC-moe_bias_etp",
        "transformer_config:2613",
        "add_bias_linear",
        lambda s: _moe(s) and s.add_bias_linear and s.etp != 1,
        "Experts with biases are not split: bias is on by default and etp, by default tp, "
        "is {etp}.",
        "Use {write[add_bias_linear=false]}, or {write[expert_tensor_parallel_size=1]}.",
    ),
    error(
        "MLM-TC-expert_bias",
        "transformer_config:2621",
        "moe_router_score_function",
        lambda s: (
            s.moe_router_enable_expert_bias
            and s.moe_router_score_function not in ("sigmoid", "sqrtsoftplus")
        ),
        "A bias for each expert goes with sigmoid scores, not {moe_router_score_function}.",
        "Use {write[moe_router_score_function=sigmoid]}.",
    ),
    error(
        "MLM-TC-topk1",
        "transformer_config:2669",
        "moe_router_topk",
        lambda s: (
            s.moe_router_topk == 1
            and s.moe_router_score_function == "softmax"
            and not s.moe_router_pre_softmax
            and s.moe_router_load_balancing_type != "sinkhorn"
        ),
        "The softmax over one chosen expert is constant: the router would not learn.",
        "Use {write[moe_router_pre_softmax=true]}.",
    ),
    error(
        "MLM-TC-group_num",
        "transformer_config:2678",
        "moe_router_num_groups",
        lambda s: s.moe_router_group_topk and not s.moe_router_num_groups,
        "Choosing among groups of experts needs their number.",
        "Add {write[moe_router_num_groups]}.",
    ),
    error(
        "MLM-TC-group_div",
        "transformer_config:2682",
        "moe_router_num_groups",
        lambda s: (
            s.moe_router_group_topk
            and s.moe_router_num_groups
            and _moe(s)
            and s.num_experts % s.moe_router_num_groups
        ),
        "The {num_experts} experts must split over {moe_router_num_groups} groups.",
        "Choose a divisor of {num_experts}.",
    ),
    error(
        "MLM-TC-group_le",
        "transformer_config:2686",
        "moe_router_group_topk",
        lambda s: (
            s.moe_router_group_topk
            and s.moe_router_num_groups
            and s.moe_router_group_topk > s.moe_router_num_groups
        ),
        "Of {moe_router_num_groups} groups at most as many are chosen, not "
        "{moe_router_group_topk}.",
        "Use at most {moe_router_num_groups}.",
    ),
    change(
        "MLM-TC-group_old",
        "transformer_config:2696",
        "moe_router_topk_limited_devices",
        _limited_devices,
        "The old option means {moe_router_group_topk} of {moe_router_num_groups} groups.",
        "Use {write[moe_router_group_topk]} and {write[moe_router_num_groups]}.",
    ),
    error(
        "MLM-TC-permute_te",
        "transformer_config:3000",
        "moe_permute_fusion",
        lambda s: s.moe_permute_fusion and not s.site.te_at_least(2, 1),
        "The fused permutation needs Transformer Engine 2.1.",
        "Install it, or drop {write[moe_permute_fusion]}.",
    ),
    error(
        "MLM-TC-ov_vpp",
        "transformer_config:3008",
        "overlap_moe_expert_parallel_comm",
        lambda s: s.overlap_moe_expert_parallel_comm and s.pp > 1 and s.vpp is None,
        "Overlapping expert communication under a pipeline needs interleaving.",
        "Add virtual stages, or use pp = 1.",
    ),
    error(
        "MLM-TC-ov_ep",
        "transformer_config:3013",
        "overlap_moe_expert_parallel_comm",
        lambda s: s.overlap_moe_expert_parallel_comm and s.ep <= 1,
        "There is no expert communication to overlap: ep is {ep}.",
        "Use ep > 1, or drop {write[overlap_moe_expert_parallel_comm]}.",
    ),
    error(
        "MLM-TC-ov_disp",
        "transformer_config:3016",
        "moe_token_dispatcher_type",
        lambda s: (
            s.overlap_moe_expert_parallel_comm
            and s.moe_token_dispatcher_type not in ("alltoall", "flex")
        ),
        "Overlapping expert communication works with the alltoall or flex dispatcher, not "
        "{moe_token_dispatcher_type}.",
        "Use {write[moe_token_dispatcher_type=alltoall]}.",
    ),
    error(
        "MLM-TC-ov_full",
        "transformer_config:3021",
        "recompute_granularity",
        lambda s: s.overlap_moe_expert_parallel_comm and s.recompute_granularity == "full",
        "Overlapping expert communication excludes full recomputation.",
        "Use {write[recompute_granularity=selective]}.",
    ),
    error(
        "MLM-TC-ov_method",
        "transformer_config:3024",
        "recompute_method",
        lambda s: s.overlap_moe_expert_parallel_comm and s.recompute_method is not None,
        "Overlapping expert communication excludes a recompute method.",
        "Drop {write[recompute_method]}.",
    ),
    error(
        "MLM-TC-ov_num",
        "transformer_config:3027",
        "recompute_num_layers",
        lambda s: s.overlap_moe_expert_parallel_comm and s.recompute_num_layers is not None,
        "Overlapping expert communication excludes a number of recomputed layers.",
        "Drop {write[recompute_num_layers]}.",
    ),
    error(
        "MLM-TC-ov_moe_rc",
        "transformer_config:3030",
        "recompute_modules",
        lambda s: s.overlap_moe_expert_parallel_comm and "moe" in (s.recompute_modules or ()),
        "Overlapping expert communication excludes recomputing whole expert layers.",
        "Drop moe from {write[recompute_modules]}.",
    ),
    error(
        "MLM-TC-ov_dtype",
        "transformer_config:3035",
        "overlap_moe_expert_parallel_comm",
        lambda s: s.overlap_moe_expert_parallel_comm and not (s.bf16 or s.fp16),
        "Overlapping expert communication is for 16-bit training.",
        "Use {write[bf16=true]}.",
    ),
    error(
        "MLM-TC-ov_shared",
        "transformer_config:3039",
        "moe_shared_expert_overlap",
        lambda s: s.overlap_moe_expert_parallel_comm and s.moe_shared_expert_overlap,
        "Overlapping expert communication excludes overlapping shared experts.",
        "Drop {write[moe_shared_expert_overlap]}.",
    ),
    error(
        "MLM-TC-ov_mtp",
        "transformer_config:3042",
        "mtp_num_layers",
        lambda s: s.overlap_moe_expert_parallel_comm and s.mtp_num_layers not in (None, 0, 1),
        "Overlapping expert communication allows one MTP layer, not {mtp_num_layers}.",
        "Use {write[mtp_num_layers=1]}.",
    ),
    error(
        "MLM-TC-ov_ncclep",
        "transformer_config:3054",
        "offload_modules",
        lambda s: (
            s.overlap_moe_expert_parallel_comm
            and s.moe_token_dispatcher_type == "flex"
            and s.moe_flex_dispatcher_backend == "ncclep"
            and s.fine_grained_activation_offloading
            and "expert_fc1" in (s.offload_modules or ())
        ),
        "Overlapping NCCL-EP frees what offloading expert_fc1 would save.",
        "Drop expert_fc1 from {write[offload_modules]}.",
    ),
    error(
        "MLM-TC-dw_ov",
        "transformer_config:3075",
        "delay_wgrad_compute",
        lambda s: s.delay_wgrad_compute and not s.overlap_moe_expert_parallel_comm,
        "Delayed weight gradients hide expert communication.",
        "Add {write[overlap_moe_expert_parallel_comm=true]}.",
    ),
    error(
        "MLM-TC-odb_ov",
        "transformer_config:3085",
        "overlap_dispatch_backward_with_experts_wgrad",
        lambda s: (
            s.overlap_dispatch_backward_with_experts_wgrad and s.overlap_moe_expert_parallel_comm
        ),
        "The two ways to overlap expert communication exclude each other.",
        "Keep one.",
    ),
    error(
        "MLM-TC-odb_te",
        "transformer_config:3089",
        "overlap_dispatch_backward_with_experts_wgrad",
        lambda s: s.overlap_dispatch_backward_with_experts_wgrad and not s.site.te_at_least(2, 3),
        "Overlapping the backward dispatch needs Transformer Engine 2.3.",
        "Install it.",
    ),
    error(
        "MLM-TC-early_ov",
        "transformer_config:3098",
        "ep_overlap_early_attn_memory_release",
        lambda s: s.ep_overlap_early_attn_memory_release and not s.overlap_moe_expert_parallel_comm,
        "The early release of attention memory belongs to the overlap of expert communication.",
        "Add {write[overlap_moe_expert_parallel_comm=true]}.",
    ),
    warning(
        "MLM-TC-router_dtype",
        "transformer_config:3125",
        "moe_router_dtype",
        lambda s: _moe(s) and s.num_experts >= 32 and not s.moe_router_dtype,
        "With {num_experts} experts a router in 16 bits can be unstable.",
        "Use {write[moe_router_dtype=fp32]}.",
    ),
    error(
        "MLM-SPEC-moe_freq_len",
        "layer_spec:653",
        "moe_layer_freq",
        _frequency_length,
        "The pattern of expert layers has {length} entries, the model {num_layers} layers.",
        "Write one entry a layer, such as ([0]*1+[1]*n).",
    ),
    error(
        "MLM-SPEC-moe_freq_val",
        "layer_spec:671",
        "moe_layer_freq",
        _frequency_values,
        "The pattern of expert layers holds 0 (dense) and 1 (experts), or a number of at least 1.",
        "Use 0 and 1.",
    ),
    error(
        "MLM-DISP-ncclep_drop",
        "moe_dispatcher:1556",
        "moe_pad_expert_input_to_capacity",
        lambda s: _flex(s, "ncclep") and s.moe_pad_expert_input_to_capacity,
        "NCCL-EP does not pad the input of experts to their capacity.",
        "Drop {write[moe_pad_expert_input_to_capacity]}.",
    ),
    error(
        "MLM-DISP-deepep_size",
        "moe_dispatcher:1836",
        "expert_model_parallel_size",
        lambda s: _flex(s, "deepep") and s.ep * s.etp <= 1,
        "DeepEP moves tokens between ranks: etp*ep must be at least 2.",
        "Use ep > 1, or {write[moe_token_dispatcher_type=alltoall]}.",
    ),
    error(
        "MLM-DISP-ncclep_size",
        "moe_dispatcher:1854",
        "expert_model_parallel_size",
        lambda s: _flex(s, "ncclep") and s.ep * s.etp <= 1,
        "NCCL-EP moves tokens between ranks: etp*ep must be at least 2.",
        "Use ep > 1, or {write[moe_token_dispatcher_type=alltoall]}.",
    ),
    error(
        "MLM-MOE-ep_div",
        "moe_forward:186",
        "num_experts",
        lambda s: _moe(s) and s.num_experts % s.ep,
        "The {num_experts} experts must split over ep = {ep}.",
        "Choose ep from the divisors of {num_experts}.",
        repeats=("MLM-ARG-ep_div",),
    ),
    error(
        "MLM-MOE-forward_sp",
        "moe_forward:637",
        "sequence_parallel",
        lambda s: _moe_layers(s) and s.tp > 1 and not s.sequence_parallel,
        "Experts train with tensor parallelism (tp = {tp}) only under sequence parallelism; the "
        "first step would fail.",
        "Use {write[sequence_parallel=true]}.",
    ),
    error(
        "MLM-MOE-shared_bias",
        "module_build:124",
        "add_bias_linear",
        lambda s: (
            _moe_layers(s)
            and s.moe_shared_expert_intermediate_size is not None
            and s.add_bias_linear
        ),
        "Shared experts have no biases, and biases are on by default.",
        "Use {write[add_bias_linear=false]}.",
    ),
    error(
        "MLM-MOE-qb_aux",
        "module_build:227",
        "moe_aux_loss_coeff",
        lambda s: (
            _moe(s)
            and s.moe_router_load_balancing_type == "quantile_balancing"
            and bool(s.moe_aux_loss_coeff)
        ),
        "Quantile balancing has no auxiliary loss.",
        "Use {write[moe_aux_loss_coeff=0]}.",
    ),
    warning(
        "MLM-MOE-sinkhorn_aux",
        "module_build:298",
        "moe_aux_loss_coeff",
        lambda s: (
            _moe(s)
            and s.moe_router_load_balancing_type == "sinkhorn"
            and bool(s.moe_aux_loss_coeff)
        ),
        "Sinkhorn balancing has no auxiliary loss; the first step would fail.",
        "Use {write[moe_aux_loss_coeff=0]}.",
    ),
    error(
        "MLM-BUILD-divide",
        "module_build:592",
        "ffn_hidden_size",
        _not_splitting,
        "A width of {width} does not split over {size} ranks of (expert) tensor parallelism.",
        "Use a multiple of {size}, or a degree that divides {width}.",
    ),
)
