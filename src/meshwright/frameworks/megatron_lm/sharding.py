"""Rules of data parallelism: distributed optimizer, its overlaps, Torch FSDP2, Megatron-FSDP."""

from __future__ import annotations

from typing import Any

from meshwright.frameworks.megatron_lm.rules import Settings, change, derive, error, warning


def _one_connection(s: Settings) -> bool:
    return s.site.env.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"


def _v1(s: Settings) -> bool:
    return s.use_megatron_fsdp and s.megatron_fsdp_version != 2


def _v2(s: Settings) -> bool:
    return s.use_megatron_fsdp and s.megatron_fsdp_version == 2


def _megatron_ddp(s: Settings) -> bool:
    return not s.use_torch_fsdp2


def _emerging(s: Settings) -> bool:
    return s.optimizer not in ("sgd", "adam")


def _layer_wise(s: Settings) -> object:
    if not _emerging(s):
        return None
    new: dict[str, Any] = {"optimizer": "muon" if s.optimizer == "dist_muon" else s.optimizer}
    if s.optimizer == "dist_muon" or s.use_distributed_optimizer:
        new["use_layer_wise_distributed_optimizer"] = True
    new["use_distributed_optimizer"] = False
    return new


def _fused_shards(s: Settings) -> bool:
    return (
        s.use_megatron_fsdp
        and s.data_parallel_sharding_strategy in ("optim_grads_params", "optim_grads")
        and s.gradient_accumulation_fusion
    )


def _frozen(s: Settings) -> object:
    return s.freeze_all_layers and {
        "use_distributed_optimizer": False,
        "overlap_param_gather": False,
    }


RULES = (
    derive("validate_args:1", lambda s: {"use_layer_wise_distributed_optimizer": False}),
    error(
        "MLM-ARG-opg_distopt",
        "validate_args:1025",
        "overlap_param_gather",
        lambda s: (
            s.overlap_param_gather
            and not s.use_distributed_optimizer
            and not s.use_megatron_fsdp
            and s.optimizer != "dist_muon"
        ),
        "Overlapping the parameter gather needs the distributed optimizer or Megatron-FSDP.",
        "Add --use-distributed-optimizer.",
    ),
    error(
        "MLM-ARG-opg_ogr",
        "validate_args:1028",
        "overlap_param_gather",
        lambda s: s.overlap_param_gather and not s.overlap_grad_reduce,
        "Overlapping the parameter gather goes with overlapping the gradient reduction.",
        "Add --overlap-grad-reduce.",
    ),
    error(
        "MLM-ARG-fsdp2_pp",
        "validate_args:1034",
        "use_torch_fsdp2",
        lambda s: s.use_torch_fsdp2 and s.pp != 1,
        "Torch FSDP2 excludes pipeline parallelism (pp is {pp}).",
        "Use --pipeline-model-parallel-size 1.",
    ),
    error(
        "MLM-ARG-fsdp2_ep",
        "validate_args:1036",
        "use_torch_fsdp2",
        lambda s: s.use_torch_fsdp2 and s.ep != 1,
        "Torch FSDP2 excludes expert parallelism (ep is {ep}).",
        "Use --expert-model-parallel-size 1, or Megatron-FSDP.",
    ),
    error(
        "MLM-ARG-fsdp2_distopt",
        "validate_args:1038",
        "use_torch_fsdp2",
        lambda s: s.use_torch_fsdp2 and s.use_distributed_optimizer,
        "Torch FSDP2 shards the optimizer itself.",
        "Drop --use-distributed-optimizer.",
    ),
    error(
        "MLM-ARG-fsdp2_gaf",
        "validate_args:1040",
        "gradient_accumulation_fusion",
        lambda s: s.use_torch_fsdp2 and s.gradient_accumulation_fusion,
        "Torch FSDP2 excludes gradient accumulation fusion, which is on by default.",
        "Add --no-gradient-accumulation-fusion.",
    ),
    error(
        "MLM-ARG-fsdp2_ckpt",
        "validate_args:1042",
        "ckpt_format",
        lambda s: s.use_torch_fsdp2 and s.ckpt_format not in ("torch_dist", "torch_dcp"),
        "Torch FSDP2 saves torch_dist or torch_dcp checkpoints, not {ckpt_format}.",
        "Use --ckpt-format torch_dist.",
    ),
    error(
        "MLM-ARG-fsdp2_untie",
        "validate_args:1044",
        "untie_embeddings_and_output_weights",
        lambda s: s.use_torch_fsdp2 and not s.untie_embeddings_and_output_weights,
        "Torch FSDP2 needs separate embedding and output weights.",
        "Add --untie-embeddings-and-output-weights.",
    ),
    error(
        "MLM-ARG-fsdp2_fp16",
        "validate_args:1046",
        "fp16",
        lambda s: s.use_torch_fsdp2 and s.fp16,
        "Torch FSDP2 does not train in fp16 here.",
        "Use --bf16.",
    ),
    error(
        "MLM-ARG-fsdp2_conn",
        "validate_args:1048",
        "CUDA_DEVICE_MAX_CONNECTIONS",
        lambda s: s.use_torch_fsdp2 and _one_connection(s),
        "Fully sharded data parallelism needs more than one CUDA connection.",
        "Unset CUDA_DEVICE_MAX_CONNECTIONS or raise it.",
    ),
    change(
        "MLM-ARG-fsdp2_fp8pg",
        "validate_args:1052",
        "fp8_param_gather",
        lambda s: (
            s.use_torch_fsdp2
            and s.fp8_param_gather
            and s.site.te_at_least(2, 0)
            and {"fp8_param_gather": False}
        ),
        "Torch FSDP2 gathers 16-bit weights: the FP8 parameter gather is turned off.",
        "Drop --fp8-param-gather.",
    ),
    error(
        "MLM-ARG-opgos_distopt",
        "validate_args:1067",
        "overlap_param_gather_with_optimizer_step",
        lambda s: s.overlap_param_gather_with_optimizer_step and not s.use_distributed_optimizer,
        "Gathering parameters during the optimizer step needs the distributed optimizer.",
        "Add --use-distributed-optimizer.",
    ),
    error(
        "MLM-ARG-opgos_opg",
        "validate_args:1069",
        "overlap_param_gather_with_optimizer_step",
        lambda s: s.overlap_param_gather_with_optimizer_step and not s.overlap_param_gather,
        "Gathering parameters during the optimizer step builds on the overlapped gather.",
        "Add --overlap-param-gather.",
    ),
    error(
        "MLM-ARG-opgos_vpp",
        "validate_args:1071",
        "overlap_param_gather_with_optimizer_step",
        lambda s: s.overlap_param_gather_with_optimizer_step and s.vpp is None,
        "Gathering parameters during the optimizer step needs interleaved pipelining.",
        "Add --num-virtual-stages-per-pipeline-rank, or drop the flag.",
    ),
    error(
        "MLM-ARG-opgos_ckpt",
        "validate_args:1073",
        "overlap_param_gather_with_optimizer_step",
        lambda s: s.overlap_param_gather_with_optimizer_step and s.ckpt_format != "torch",
        "Gathering parameters during the optimizer step excludes distributed checkpoints "
        "({ckpt_format}).",
        "Use --ckpt-format torch.",
    ),
    error(
        "MLM-ARG-mfsdp_v2",
        "validate_args:1125",
        "use_distributed_optimizer",
        lambda s: _v2(s) and s.use_distributed_optimizer,
        "Megatron-FSDP version 2 shards the optimizer itself.",
        "Drop --use-distributed-optimizer.",
    ),
    change(
        "MLM-ARG-mfsdp_distopt",
        "validate_args:1135",
        "use_distributed_optimizer",
        lambda s: (
            _v1(s) and not s.use_distributed_optimizer and {"use_distributed_optimizer": True}
        ),
        "Megatron-FSDP version 1 turns the distributed optimizer on.",
        "Add --use-distributed-optimizer.",
    ),
    change(
        "MLM-ARG-mfsdp_reuse",
        "validate_args:1137",
        "reuse_grad_buf_for_mxfp8_param_ag",
        lambda s: s.use_megatron_fsdp and {"reuse_grad_buf_for_mxfp8_param_ag": False},
        "Megatron-FSDP does not reuse the gradient buffer for mxfp8 weights: it is turned off.",
        "Drop --reuse-grad-buf-for-mxfp8-param-ag.",
    ),
    error(
        "MLM-ARG-mfsdp_single",
        "validate_args:1143",
        "moe_single_grouped_weight",
        lambda s: (
            s.use_megatron_fsdp and (s.moe_single_grouped_weight or s.moe_single_grouped_bias)
        ),
        "Megatron-FSDP keeps one parameter an expert.",
        "Drop --moe-single-grouped-weight and --moe-single-grouped-bias.",
    ),
    error(
        "MLM-ARG-mfsdp_opt",
        "validate_args:1150",
        "optimizer",
        lambda s: s.use_megatron_fsdp and _emerging(s),
        "Megatron-FSDP works with adam and sgd, not {optimizer}.",
        "Use --optimizer adam.",
    ),
    error(
        "MLM-ARG-mfsdp_hash",
        "validate_args:1163",
        "check_weight_hash_across_dp_replicas_interval",
        lambda s: (
            s.use_megatron_fsdp
            and s.data_parallel_sharding_strategy == "optim_grads_params"
            and s.check_weight_hash_across_dp_replicas_interval is not None
        ),
        "Under full sharding no two ranks hold the same weights to compare.",
        "Drop --check-weight-hash-across-dp-replicas-interval.",
    ),
    error(
        "MLM-ARG-mfsdp_conn",
        "validate_args:1166",
        "CUDA_DEVICE_MAX_CONNECTIONS",
        lambda s: s.use_megatron_fsdp and _one_connection(s),
        "Fully sharded data parallelism needs more than one CUDA connection.",
        "Unset CUDA_DEVICE_MAX_CONNECTIONS or raise it.",
    ),
    error(
        "MLM-ARG-mfsdp_ckpt",
        "validate_args:1169",
        "ckpt_format",
        lambda s: s.use_megatron_fsdp and s.ckpt_format != "fsdp_dtensor",
        "Megatron-FSDP saves fsdp_dtensor checkpoints, not {ckpt_format}, even when nothing is "
        "saved.",
        "Add --ckpt-format fsdp_dtensor.",
    ),
    warning(
        "MLM-ARG-mfsdp_gaf",
        "validate_args:1155",
        "gradient_accumulation_fusion",
        _fused_shards,
        "Sharded gradients are fused only where Transformer Engine supports it for Megatron-FSDP.",
        "Check it, or add --no-gradient-accumulation-fusion.",
    ),
    change(
        "MLM-ARG-mfsdp_ncclub",
        "validate_args:1175",
        "fsdp_double_buffer",
        lambda s: (
            s.use_megatron_fsdp
            and s.nccl_ub
            and {"fsdp_manual_registration": True, "fsdp_double_buffer": True}
        ),
        "NCCL user buffers hold two buffers, registered by hand: more memory.",
        "Count it, or drop --use-nccl-ub.",
    ),
    change(
        "MLM-ARG-mfsdp_pool",
        "validate_args:1179",
        "fsdp_double_buffer",
        lambda s: (
            s.use_megatron_fsdp
            and s.megatron_fsdp_max_pool_double_buffer
            and {"fsdp_double_buffer": True}
        ),
        "The pool allocator holds two buffers: more memory.",
        "Count it.",
    ),
    error(
        "MLM-ARG-mfsdp_meta",
        "validate_args:1184",
        "init_model_with_meta_device",
        lambda s: (
            s.use_megatron_fsdp
            and s.init_model_with_meta_device
            and s.data_parallel_sharding_strategy == "no_shard"
        ),
        "Initialisation on the meta device is for sharded weights.",
        "Drop --init-model-with-meta-device, or shard.",
    ),
    error(
        "MLM-ARG-manreg_fsdp",
        "validate_args:1190",
        "fsdp_manual_registration",
        lambda s: s.fsdp_manual_registration and not s.use_megatron_fsdp,
        "Manual registration belongs to Megatron-FSDP.",
        "Drop --fsdp-manual-registration.",
    ),
    error(
        "MLM-ARG-manreg_ub",
        "validate_args:1191",
        "fsdp_manual_registration",
        lambda s: s.fsdp_manual_registration and not s.nccl_ub,
        "Manual registration registers NCCL user buffers.",
        "Add --use-nccl-ub.",
        repeats=("MLM-ARG-manreg_fsdp",),
    ),
    change(
        "MLM-ARG-muon_distopt",
        "validate_args:1736",
        "use_distributed_optimizer",
        _layer_wise,
        "{optimizer} is sharded layer by layer, not byte by byte.",
        "Count the optimizer states of whole layers.",
    ),
    error(
        "MLM-ARG-muon_fsdp2",
        "validate_args:1739",
        "optimizer",
        lambda s: _emerging(s) and s.use_torch_fsdp2,
        "Torch FSDP2 works with adam and sgd, not {optimizer}.",
        "Use --optimizer adam.",
    ),
    error(
        "MLM-ARG-muon_ckpt",
        "validate_args:1741",
        "ckpt_format",
        lambda s: _emerging(s) and s.ckpt_format not in ("torch", "torch_dist"),
        "{optimizer} is saved as torch or torch_dist, not {ckpt_format}.",
        "Use --ckpt-format torch_dist.",
        repeats=("MLM-ARG-mfsdp_opt",),
    ),
    error(
        "MLM-ARG-gloo_distopt",
        "validate_args:1750",
        "use_gloo_process_groups",
        lambda s: (
            not s.use_gloo_process_groups
            and s.use_distributed_optimizer
            and s.ckpt_format == "torch"
        ),
        "Without Gloo groups the distributed optimizer is saved in a distributed format.",
        "Use --ckpt-format torch_dist.",
    ),
    error(
        "MLM-ARG-gloo_mem",
        "validate_args:1753",
        "distrib_optim_fully_reshardable_mem_efficient",
        lambda s: (
            not s.use_gloo_process_groups
            and s.use_distributed_optimizer
            and s.dist_ckpt_optim_fully_reshardable
            and s.distrib_optim_fully_reshardable_mem_efficient
        ),
        "The memory-efficient fully reshardable checkpoint gathers over Gloo.",
        "Keep the Gloo groups, or drop --distrib-optim-fully-reshardable-mem-efficient.",
    ),
    change(
        "MLM-ARG-freeze_distopt",
        "validate_args:1842",
        "freeze_all_layers",
        _frozen,
        "With every layer frozen there is nothing to shard: the distributed optimizer and its "
        "overlap are off.",
        "Drop them.",
    ),
    error(
        "MLM-DDP-reuse",
        "ddp_config:260",
        "reuse_grad_buf_for_mxfp8_param_ag",
        lambda s: (
            _megatron_ddp(s) and s.reuse_grad_buf_for_mxfp8_param_ag and not s.fp8_param_gather
        ),
        "The gradient buffer is reused to gather FP8 weights.",
        "Add {write[fp8_param_gather=true]}.",
    ),
    warning(
        "MLM-DDP-ub_seg",
        "ddp_config:264",
        "PYTORCH_CUDA_ALLOC_CONF",
        lambda s: (
            s.nccl_ub
            and "expandable_segments:True"
            in s.site.env.get("PYTORCH_CUDA_ALLOC_CONF", "").split(",")
        ),
        "Before PyTorch 2.11, NCCL user buffers exclude expandable segments.",
        "Use PyTorch 2.11, or drop one of the two.",
    ),
    error(
        "MLM-DDP-fp32_local",
        "ddp_config:270",
        "ddp_param_name_patterns_for_fp32_local_accumulation",
        lambda s: (
            _megatron_ddp(s)
            and bool(s.ddp_param_name_patterns_for_fp32_local_accumulation)
            and s.accumulate_allreduce_grads_in_fp32
        ),
        "All gradients are accumulated in fp32 already.",
        "Drop the patterns, or use --grad-reduce-in-bf16.",
    ),
    error(
        "MLM-DDP-buckets",
        "ddp_config:276",
        "ddp_num_buckets",
        lambda s: (
            _megatron_ddp(s) and s.ddp_num_buckets is not None and s.ddp_bucket_size is not None
        ),
        "Buckets are given by number or by size.",
        "Keep one of --ddp-num-buckets and --ddp-bucket-size.",
    ),
    error(
        "MLM-DDP-buckets_pos",
        "ddp_config:277",
        "ddp_num_buckets",
        lambda s: _megatron_ddp(s) and s.ddp_num_buckets is not None and s.ddp_num_buckets <= 0,
        "There is at least one bucket.",
        "Use 1 or more.",
    ),
    warning(
        "MLM-FSDP-v2_outer",
        "fsdp_wrap:671",
        "outer_dp_sharding_strategy",
        lambda s: _v2(s) and s.outer_dp_sharding_strategy != "no_shard",
        "Megatron-FSDP version 2 refuses outer sharding when it wraps the model.",
        "Use {write[outer_dp_sharding_strategy=no_shard]}.",
    ),
    warning(
        "MLM-FSDP-graph_impl",
        "fsdp_wrap:182",
        "cuda_graph_impl",
        lambda s: (
            s.use_megatron_fsdp
            and s.fp8_param_gather
            and s.fp8_recipe == "mxfp8"
            and s.cuda_graph_impl not in ("none", "full_iteration")
        ),
        "Megatron-FSDP gathers mxfp8 parameters module by module, which excludes graphs of layers "
        "({cuda_graph_impl}) when it wraps the model.",
        "Use {write[cuda_graph_impl=none]} or {write[cuda_graph_impl=full_iteration]}.",
    ),
    warning(
        "MLM-FSDP-v2_gaf",
        "fsdp_wrap:673",
        "gradient_accumulation_fusion",
        lambda s: _v2(s) and s.gradient_accumulation_fusion,
        "Megatron-FSDP version 2 refuses gradient accumulation fusion, on by default, when it "
        "wraps the model.",
        "Use {write[gradient_accumulation_fusion=false]}.",
    ),
    warning(
        "MLM-FSDP-v2_token",
        "fsdp_wrap:675",
        "calculate_per_token_loss",
        lambda s: _v2(s) and s.calculate_per_token_loss,
        "Megatron-FSDP version 2 refuses the loss per token when it wraps the model.",
        "Use {write[calculate_per_token_loss=false]}.",
    ),
    warning(
        "MLM-FSDP-v2_fp8",
        "fsdp_wrap:677",
        "fp8",
        lambda s: _v2(s) and (s.fp8 or s.fp4),
        "Megatron-FSDP version 2 refuses FP8 and FP4 when it wraps the model.",
        "Train in 16 bits, or use version 1.",
    ),
    warning(
        "MLM-FSDP-v2_graph",
        "fsdp_wrap:679",
        "cuda_graph_impl",
        lambda s: _v2(s) and s.cuda_graph_impl != "none",
        "Megatron-FSDP version 2 refuses CUDA graphs when it wraps the model.",
        "Use {write[cuda_graph_impl=none]}.",
    ),
)
