"""Rules of token dispatch: dispatchers and their backends, overlap, delayed gradients."""

from __future__ import annotations

from meshwright.frameworks.megatron_lm.rules import (
    Settings,
    derive,
    error,
    warning,
)


def _narrow_dispatch(s: Settings) -> bool:
    names = ("moe_dispatch_fwd_dtype", "moe_combine_bwd_dtype")
    return any(getattr(s, n) not in ("bf16", None) for n in names)


def _flex(s: Settings, backend: str) -> bool:
    return (
        s.has_experts
        and s.moe_token_dispatcher_type == "flex"
        and s.moe_flex_dispatcher_backend == backend
    )


def _sms_conflict(s: Settings) -> object:
    old = {s.moe_deepep_num_sms, s.moe_hybridep_num_sms} - {None}
    return s.moe_flex_dispatcher_num_sms is None and len(old) > 1


RULES = (
    error(
        "MLM-ARG-fakepg_flex",
        "validate_args:1757",
        "moe_token_dispatcher_type",
        lambda s: s.fake_process_group and s.moe_token_dispatcher_type == "flex",
        "Dry runs with fake process groups cannot use the flex dispatcher.",
        "Use --moe-token-dispatcher-type alltoall.",
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
    warning(
        "MLM-TC-deepep_old",
        "transformer_config:1750",
        "moe_enable_deepep",
        lambda s: s.moe_enable_deepep,
        "DeepEP is chosen as a backend now.",
        "Use {write[moe_flex_dispatcher_backend=deepep]}.",
    ),
    derive(
        "transformer_config:1750",
        lambda s: s.moe_enable_deepep and {"moe_flex_dispatcher_backend": "deepep"},
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
    warning(
        "MLM-TC-sms_old",
        "transformer_config:1808",
        "moe_deepep_num_sms",
        lambda s: s.moe_deepep_num_sms is not None or s.moe_hybridep_num_sms is not None,
        "The number of SMs has one option for every backend now.",
        "Use {write[moe_flex_dispatcher_num_sms]}.",
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
        "MLM-TC-ag_varlen",
        "transformer_config:2979",
        "moe_token_dispatcher_type",
        lambda s: s.moe_token_dispatcher_type == "allgather" and s.variable_seq_lengths,
        "The allgather dispatcher excludes sequences of varying length, dense models included.",
        "Use {write[moe_token_dispatcher_type=alltoall]}.",
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
)
