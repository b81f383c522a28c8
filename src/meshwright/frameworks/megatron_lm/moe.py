"""Rules of experts: their number and width, routing, capacity, grouped weights."""

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


def _mixed_layers(s: Settings) -> bool:
    freq: object = s.moe_layer_freq
    return (is_list(freq) and 0 in freq) or (isinstance(freq, int) and freq > 1)


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
    if not s.has_experts or not is_list(freq):
        return None
    return len(freq) != s.num_layers and {"length": len(freq)}


def _frequency_values(s: Settings) -> object:
    freq: object = s.moe_layer_freq
    if not s.has_experts:
        return None
    if is_list(freq):
        return any(i not in (0, 1) for i in freq)
    return isinstance(freq, int) and freq < 1


def _dense_layers(s: Settings) -> bool:
    return not s.has_experts or _mixed_layers(s)


def _moe_layers(s: Settings) -> bool:
    freq: object = s.moe_layer_freq
    return s.has_experts and not (is_list(freq) and 1 not in freq)


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
            s.has_experts
            and s.moe_ffn_hidden_size is None
            and {"moe_ffn_hidden_size": s.ffn_hidden_size}
        ),
        "Left out, experts are as wide as the dense layers: {moe_ffn_hidden_size}.",
        "Write --moe-ffn-hidden-size.",
    ),
    error(
        "MLM-ARG-ep_dense",
        "validate_args:1656",
        "expert_model_parallel_size",
        lambda s: s.ep > 1 and not s.has_experts,
        "Expert parallelism (ep = {ep}) needs experts.",
        "Use --expert-model-parallel-size 1, or give --num-experts.",
    ),
    error(
        "MLM-ARG-ep_div",
        "validate_args:1657",
        "expert_model_parallel_size",
        lambda s: (
            s.ep > 1
            and s.has_experts
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
        "MLM-ARG-upcycle_save",
        "validate_args:1864",
        "moe_use_upcycling",
        lambda s: s.moe_use_upcycling and s.save is None,
        "Upcycling saves what it makes.",
        "Add --save.",
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
        lambda s: s.moe_latent_size is not None and not s.has_experts,
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
        lambda s: s.ep > 1 and not s.has_experts,
        "Expert parallelism (ep = {ep}) needs experts.",
        "Use {write[expert_model_parallel_size=1]}, or give {write[num_experts]}.",
        repeats=("MLM-ARG-ep_dense",),
    ),
    error(
        "MLM-TC-inf_etp",
        "transformer_config:1600",
        "expert_tensor_parallel_size",
        lambda s: s.transformer_impl == "inference_optimized" and s.has_experts and s.etp > 1,
        "Inference-optimised experts are not split (etp is {etp}).",
        "Use {write[expert_tensor_parallel_size=1]}.",
    ),
    error(
        "MLM-TC-experts_pos",
        "transformer_config:1683",
        "num_experts",
        lambda s: s.has_experts and s.num_experts <= 0,
        "There is at least one expert, not {num_experts}.",
        "Use 1 or more, or leave it out for a dense model.",
        final=True,
    ),
    change(
        "MLM-TC-moe_ffn_default",
        "transformer_config:1687",
        "moe_ffn_hidden_size",
        lambda s: (
            s.has_experts
            and s.moe_ffn_hidden_size is None
            and {"moe_ffn_hidden_size": s.ffn_hidden_size}
        ),
        "Left out, experts are as wide as the dense layers: {moe_ffn_hidden_size}.",
        "Write {write[moe_ffn_hidden_size]}.",
    ),
    error(
        "MLM-TC-moe_ffn_dense",
        "transformer_config:1702",
        "moe_ffn_hidden_size",
        lambda s: s.moe_ffn_hidden_size is not None and not s.has_experts and not _mixed_layers(s),
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
        "MLM-TC-moe_bias_etp",
        "transformer_config:2613",
        "add_bias_linear",
        lambda s: s.has_experts and s.add_bias_linear and s.etp != 1,
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
            and s.has_experts
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
    warning(
        "MLM-TC-router_dtype",
        "transformer_config:3125",
        "moe_router_dtype",
        lambda s: s.has_experts and s.num_experts >= 32 and not s.moe_router_dtype,
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
        "MLM-MOE-ep_div",
        "moe_forward:186",
        "num_experts",
        lambda s: s.has_experts and s.num_experts % s.ep,
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
            s.has_experts
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
            s.has_experts
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
