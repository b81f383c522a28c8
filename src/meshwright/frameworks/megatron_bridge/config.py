"""Rules of Bridge's configuration as a whole: batch, data, schedule, checkpoints, precision."""

from __future__ import annotations

import math

from meshwright.frameworks.megatron_lm.rules import (
    Settings,
    change,
    derive,
    error,
    indivisible,
    is_list,
    multiples_near,
    warning,
)

_ALGORITHMS = ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS")


def _sft(s: Settings) -> bool:
    return s.dataset_kind == "sft"


def _checkpoints(s: Settings) -> bool:
    return s.save is not None or s.checkpoint_load is not None


def _packed(s: Settings) -> bool:
    return bool(s.dataset_enable_offline_packing)


def _training_graph(s: Settings) -> bool:
    return s.cuda_graph_impl in ("full_iteration", "transformer_engine")


def _zero(s: Settings) -> object:
    names = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "micro_batch_size",
        "global_batch_size",
    )
    return next(({"field": n} for n in names if (getattr(s, n) or 0) < 1), None)


def _world(s: Settings) -> object:
    unit = s.tp * s.pp * s.cp
    return s.world_size % unit and {"unit": unit, "nearest": multiples_near(s.world_size, unit)}


def _local_graph(s: Settings) -> object:
    inference = s.inference_cuda_graph_scope in ("layer", "block") and not s.cuda_graph_modules
    return s.cuda_graph_impl == "local" and not inference


def _modes(s: Settings) -> int:
    given = (s.train_iters, s.train_samples, s.train_num_epochs)
    return sum(value is not None for value in given)


def _by_samples(s: Settings) -> bool:
    return s.train_samples is not None


def _mixed_schedule(s: Settings) -> bool:
    iterations = s.scheduler_lr_decay_iters is not None or s.scheduler_lr_warmup_iters != 0
    samples = s.scheduler_lr_decay_samples is not None or s.scheduler_lr_warmup_samples != 0
    return (iterations or s.scheduler_lr_wsd_decay_iters is not None) and (
        samples or s.scheduler_lr_wsd_decay_samples is not None
    )


def _profiled_steps(s: Settings) -> bool:
    start, end = s.profiling_profile_step_start, s.profiling_profile_step_end
    return start < 0 or end < start


def _eval_cp(s: Settings) -> int:
    return s.dist_eval_context_parallel_size or s.cp


def _eval_world(s: Settings) -> object:
    size = s.dist_eval_context_parallel_size
    if size is None:
        return None
    unit = s.tp * s.pp * size
    return indivisible(s.world_size, unit) and {
        "unit": unit,
        "nearest": multiples_near(s.world_size, unit) if unit > 0 else unit,
    }


def _eval_batch(s: Settings) -> object:
    eval_dp = s.world_size // (s.tp * s.pp * _eval_cp(s))
    unit = s.eval_micro_batch_size * eval_dp
    return indivisible(s.eval_global_batch_size, unit) and {
        "eval_dp": eval_dp,
        "unit": unit,
        "nearest": multiples_near(s.eval_global_batch_size, unit) if unit > 0 else unit,
    }


def _eval_defaults(s: Settings) -> dict[str, object]:
    gbs, mbs = s.eval_global_batch_size, s.eval_micro_batch_size
    return {
        "eval_global_batch_size": s.global_batch_size if gbs is None else gbs,
        "eval_micro_batch_size": s.micro_batch_size if mbs is None else mbs,
    }


def _nccl_algorithm(s: Settings) -> object:
    given = s.site.env.get("NCCL_ALGO")
    return (
        s.deterministic_mode
        and given not in _ALGORITHMS
        and {"given": given or "unset", "known": ", ".join(_ALGORITHMS)}
    )


def _optimizer_dtypes_differ(s: Settings) -> bool:
    return s.use_precision_aware_optimizer and (
        bool(s.bf16) != bool(s.optimizer_bf16) or bool(s.fp16) != bool(s.optimizer_fp16)
    )


def _kinds(s: Settings) -> list[str]:
    kinds: object = s.cp_comm_type
    return kinds if is_list(kinds) else [str(kinds or "p2p")]


def _kinds_per_layer(s: Settings) -> object:
    kinds: object = s.cp_comm_type
    if s.cp <= 1 or not is_list(kinds):
        return None
    return len(kinds) != s.num_layers and {"kinds": len(kinds)}


def _hierarchy(s: Settings) -> object:
    sizes = s.hierarchical_context_parallel_sizes
    if sizes is None:
        return None
    product = math.prod(sizes)
    return product != s.cp and {"product": product if product < 2**63 else "far more"}


def _symmetric(s: Settings) -> bool:
    given = (
        s.decoder_first_pipeline_num_layers,
        s.decoder_last_pipeline_num_layers,
        s.pipeline_model_parallel_layout,
    )
    counted = s.account_for_embedding_in_pipeline_split or s.account_for_loss_in_pipeline_split
    return not counted and all(value is None for value in given)


def _not_collated(s: Settings) -> object:
    if not _sft(s) or not s.dataset_seq_length:
        return None
    sizes = {s.cp, _eval_cp(s)}
    units = [2 * size for size in sizes if size > 1]
    units += [size * s.tp for size in sizes if s.sequence_parallel and s.tp > 1]
    unit = math.lcm(*units) or 1
    return s.dataset_seq_length % unit and {"unit": unit}


def _variable_lengths(s: Settings) -> object:
    packs = s.dataset_enable_in_batch_packing and s.pp > 1
    return packs and {"variable_seq_lengths": True}


def _expert_unit(s: Settings) -> int:
    return max(1, s.etp) * max(1, s.ep) * s.pp


def _decentral_expert_world(s: Settings) -> object:
    unit = _expert_unit(s)
    return (
        s.dist_use_decentralized_pg
        and s.world_size % unit
        and {"unit": unit, "nearest": multiples_near(s.world_size, unit)}
    )


def _decentral_instances(s: Settings) -> object:
    edp = s.world_size // _expert_unit(s)
    instances = s.num_distributed_optimizer_instances
    return s.dist_use_decentralized_pg and indivisible(edp, instances) and {"edp": edp}


RULES = (
    error(
        "MB-CFG-samples_gbs",
        "data_parallel:0",
        "global_batch_size",
        lambda s: _by_samples(s) and s.global_batch_size is None,
        "Training by samples needs the global batch.",
        "Set {write[global_batch_size]}.",
    ),
    error(
        "MB-CFG-epochs_gbs",
        "data_parallel:0",
        "global_batch_size",
        lambda s: s.train_num_epochs is not None and s.global_batch_size is None,
        "Training by epochs needs the global batch.",
        "Set {write[global_batch_size]}.",
    ),
    error(
        "MB-CFG-positive",
        "data_parallel:1",
        "num_layers",
        _zero,
        "It is at least 1.",
        "Use 1 or more.",
        final=True,
    ),
    error(
        "MB-CFG-world_div",
        "data_parallel:1024",
        "world_size",
        _world,
        "The world size must be a multiple of tp*pp*cp = {tp}*{pp}*{cp} = {unit}; {world_size} "
        "GPUs are not.",
        "Use {nearest} GPUs, or degrees whose product divides {world_size}.",
        final=True,
    ),
    derive(
        "data_parallel:1030",
        lambda s: {"data_parallel_size": s.world_size // (s.tp * s.pp * s.cp)},
    ),
    error(
        "MB-CFG-packing_excl",
        "dataset:1277",
        "dataset_enable_in_batch_packing",
        lambda s: _packed(s) and s.dataset_enable_in_batch_packing,
        "Sequences are packed ahead or in the batch, not both.",
        "Keep one of the two.",
    ),
    error(
        "MB-CFG-packing_specs",
        "dataset:1279",
        "dataset_offline_packing_specs",
        lambda s: (
            _packed(s)
            and s.dataset_offline_packing_specs is None
            and "dataset_offline_packing_specs" in s.given
        ),
        "Packing ahead needs its specification.",
        "Set {write[dataset_offline_packing_specs]}.",
    ),
    error(
        "MB-CFG-packing_graph",
        "dataset:1300",
        "dataset_pad_to_max_length",
        lambda s: _packed(s) and _training_graph(s) and not s.dataset_pad_to_max_length,
        "CUDA graphs need packed sequences of a fixed length.",
        "Use {write[dataset_pad_to_max_length=true]}.",
    ),
    change(
        "MB-CFG-pad_fixed",
        "dataset:1352",
        "dataset_pad_to_max_length",
        lambda s: _sft(s) and (s.pp > 1 or s.ep > 1) and {"dataset_pad_to_max_length": True},
        "With pipeline or expert parallelism every sample is padded to the full length.",
        "Plan memory and time for full sequences.",
        severity="note",
    ),
    warning(
        "MB-CFG-sft_multiple",
        "dataset:1369",
        "dataset_seq_length",
        _not_collated,
        "Fine-tuning data are padded to multiples of {unit}: 2*cp, and cp*tp under sequence "
        "parallelism; {dataset_seq_length} is none.",
        "Use a multiple of {unit} in {write[seq_length]} and {write[dataset_seq_length]}.",
    ),
    error(
        "MB-GRAPH-local",
        "cuda_graphs:148",
        "cuda_graph_impl",
        _local_graph,
        "Bridge takes local CUDA graphs for inference only.",
        "Use {write[cuda_graph_impl=transformer_engine]} or "
        "{write[cuda_graph_impl=full_iteration]}.",
    ),
    change(
        "MB-TC-etp_default",
        "transformer_config:88",
        "expert_tensor_parallel_size",
        lambda s: (
            s.expert_tensor_parallel_size is None
            and s.ep > 1
            and {"expert_tensor_parallel_size": 1}
        ),
        "Left out, the expert tensor parallel size is 1 when ep > 1; Megatron-LM would take tp.",
        "Write {write[expert_tensor_parallel_size=1]}.",
    ),
    change(
        "MB-TC-pipe_dtype",
        "transformer_config:174",
        "pipeline_dtype",
        lambda s: (
            s.pp > 1
            and s.pipeline_dtype is None
            and {"pipeline_dtype": "torch.float16" if s.fp16 else "torch.bfloat16"}
        ),
        "Left out, stages send the dtype of the parameters.",
        severity="note",
    ),
    change(
        "MB-TC-sp_off",
        "transformer_config:176",
        "sequence_parallel",
        lambda s: s.tp <= 1 and s.sequence_parallel and {"sequence_parallel": False},
        "Sequence parallelism is turned off, because tp is 1.",
        "Use {write[sequence_parallel=false]}, or tp > 1.",
    ),
    change(
        "MB-TC-varlen",
        "transformer_config:9000",
        "variable_seq_lengths",
        _variable_lengths,
        "Sequences packed in the batch vary in length, so stages exchange lengths too.",
        severity="note",
    ),
    error(
        "MB-CFG-train_mode_given",
        "validate:1410",
        "train_iters",
        lambda s: _modes(s) == 0,
        "Training is counted in iterations, samples or epochs.",
        "Give {write[train_iters]}.",
    ),
    error(
        "MB-CFG-train_mode_one",
        "validate:1411",
        "train_iters",
        lambda s: _modes(s) > 1,
        "Training is counted in one of iterations, samples and epochs.",
        "Keep one of {write[train_iters]}, {write[train_samples]} and {write[train_num_epochs]}.",
    ),
    error(
        "MB-CFG-samples_rampup",
        "validate:1412",
        "train_rampup_batch_size",
        lambda s: (_by_samples(s) or s.train_num_epochs) and s.train_rampup_batch_size,
        "Training by samples or epochs excludes a batch that grows.",
        "Use {write[train_rampup_batch_size=null]}.",
    ),
    error(
        "MB-CFG-sched_max",
        "validate:1420",
        "scheduler_max_steps",
        lambda s: s.scheduler_max_steps is not None and s.scheduler_max_steps <= 0,
        "The steps of the schedule are positive.",
        "Use 1 or more.",
    ),
    error(
        "MB-CFG-sched_mix",
        "validate:1421",
        "scheduler_lr_decay_iters",
        _mixed_schedule,
        "The schedule counts in iterations or in samples.",
        "Use one family of fields.",
    ),
    error(
        "MB-CFG-async_save",
        "validate:1430",
        "async_save",
        lambda s: s.async_save and s.save is None,
        "Asynchronous saving needs a place.",
        "Set {write[save]}.",
    ),
    error(
        "MB-CFG-async_worker",
        "validate:1431",
        "use_persistent_ckpt_worker",
        lambda s: s.async_save and not s.use_persistent_ckpt_worker,
        "Asynchronous saving needs the persistent worker.",
        "Use {write[use_persistent_ckpt_worker=true]}.",
    ),
    error(
        "MB-CFG-profilers",
        "validate:1440",
        "profiling_use_nsys_profiler",
        lambda s: s.profiling_use_pytorch_profiler and s.profiling_use_nsys_profiler,
        "There is one profiler at a time.",
        "Keep one.",
    ),
    error(
        "MB-CFG-profile_steps",
        "validate:1441",
        "profiling_profile_step_end",
        _profiled_steps,
        "Profiling ends after it starts, from step 0 on.",
        "Give 0 <= start <= end.",
    ),
    derive("validate:1460", _eval_defaults),
    error(
        "MB-CFG-eval_cp_world",
        "validate:1467",
        "dist_eval_context_parallel_size",
        _eval_world,
        "For evaluation the world size must be a multiple of tp*pp*eval_cp = {unit}.",
        "Use {nearest} GPUs, or another {write[dist_eval_context_parallel_size]}.",
        final=True,
    ),
    error(
        "MB-CFG-eval_gbs",
        "validate:1474",
        "eval_global_batch_size",
        _eval_batch,
        "The evaluation batch, by default the global batch, must be a multiple of mbs*dp = "
        "{eval_micro_batch_size}*{eval_dp} = {unit}; {eval_global_batch_size} is not.",
        "Use {nearest}.",
    ),
    error(
        "MB-CFG-mxfp8_reuse",
        "validate:1495",
        "mixed_precision_reuse_grad_buf_for_mxfp8_param_ag",
        lambda s: (
            s.mixed_precision is not None
            and not s.use_megatron_fsdp
            and s.mixed_precision_fp8_param_gather
            and s.mixed_precision_fp8_recipe == "mxfp8"
            and not s.mixed_precision_reuse_grad_buf_for_mxfp8_param_ag
        ),
        "mxfp8 weights are gathered through the gradient buffer.",
        "Use {write[mixed_precision_reuse_grad_buf_for_mxfp8_param_ag=true]}.",
    ),
    error(
        "MB-CFG-det_ce",
        "validate:1500.1",
        "cross_entropy_loss_fusion",
        lambda s: s.deterministic_mode and s.cross_entropy_loss_fusion,
        "The fused cross entropy, on by default, is not deterministic.",
        "Use {write[cross_entropy_loss_fusion=false]}.",
    ),
    error(
        "MB-CFG-det_algo",
        "validate:1500.2",
        "NCCL_ALGO",
        _nccl_algorithm,
        "Deterministic mode needs NCCL_ALGO among {known}; it is {given}.",
        "Export NCCL_ALGO=Ring.",
    ),
    error(
        "MB-CFG-model_bf16_fp16",
        "validate:1504.1",
        "fp16",
        lambda s: s.bf16 and s.fp16,
        "bf16 and fp16 exclude each other.",
        "Keep bf16, or use a mixed_precision recipe.",
        repeats=("MLM-TC-fp16_bf16",),
    ),
    error(
        "MB-CFG-prec_bf16",
        "validate:1504.2",
        "optimizer_bf16",
        _optimizer_dtypes_differ,
        "The precision-aware optimizer has the dtype of the model.",
        "Set bf16 and fp16 alike in model and optimizer.",
    ),
    error(
        "MB-CFG-fgo_impl",
        "validate:1505.1",
        "transformer_impl",
        lambda s: (
            s.fine_grained_activation_offloading and s.transformer_impl != "transformer_engine"
        ),
        "Fine-grained offloading is done by Transformer Engine layers, not {transformer_impl}.",
        "Use {write[transformer_impl=transformer_engine]}.",
    ),
    error(
        "MB-CFG-fgo_env",
        "validate:1505.2",
        "NVTE_CPU_OFFLOAD_V1",
        lambda s: (
            s.fine_grained_activation_offloading
            and s.site.te_at_least(2, 10)
            and s.site.env.get("NVTE_CPU_OFFLOAD_V1", "0") != "1"
        ),
        "From Transformer Engine 2.10 on, fine-grained offloading needs NVTE_CPU_OFFLOAD_V1=1.",
        "Export NVTE_CPU_OFFLOAD_V1=1.",
    ),
    error(
        "MB-CFG-full_iter_nan",
        "validate:1510",
        "rerun_state_machine_check_for_nan_in_loss",
        lambda s: (
            s.cuda_graph_impl == "full_iteration" and s.rerun_state_machine_check_for_nan_in_loss
        ),
        "A graph of the whole iteration cannot stop for NaN.",
        "Use {write[rerun_state_machine_check_for_nan_in_loss=false]}.",
    ),
    error(
        "MB-CFG-ckpt_dtensor",
        "validate:1531",
        "ckpt_format",
        lambda s: (
            _checkpoints(s)
            and s.ckpt_format == "fsdp_dtensor"
            and (not s.use_megatron_fsdp or s.use_torch_fsdp2)
        ),
        "The fsdp_dtensor format goes with Megatron-FSDP.",
        "Use {write[ckpt_format=torch_dist]}.",
    ),
    error(
        "MB-CFG-async_fmt",
        "validate:1537",
        "ckpt_format",
        lambda s: s.async_save and s.ckpt_format not in ("torch_dist", "fsdp_dtensor"),
        "Asynchronous saving writes torch_dist or fsdp_dtensor, not {ckpt_format}.",
        "Use {write[ckpt_format=torch_dist]}.",
    ),
    error(
        "MB-CFG-decentral_gloo",
        "validate:1552",
        "use_gloo_process_groups",
        lambda s: s.dist_use_decentralized_pg and s.use_gloo_process_groups,
        "Decentralised process groups are NCCL only.",
        "Use {write[use_gloo_process_groups=false]}.",
    ),
    error(
        "MB-CFG-gloo_distopt",
        "validate:1563",
        "ckpt_format",
        lambda s: (
            not s.use_gloo_process_groups
            and s.optimizer_use_distributed_optimizer
            and s.ckpt_format not in ("torch_dist", "fsdp_dtensor")
        ),
        "Without Gloo groups the distributed optimizer is saved as torch_dist or fsdp_dtensor, "
        "not {ckpt_format}.",
        "Use {write[ckpt_format=torch_dist]}.",
    ),
    error(
        "MB-CFG-samples_sched",
        "validate:1570.1",
        "scheduler_lr_decay_iters",
        lambda s: (
            _by_samples(s)
            and (s.scheduler_lr_decay_iters is not None or s.scheduler_lr_warmup_iters != 0)
        ),
        "Training by samples is scheduled by samples.",
        "Use {write[scheduler_lr_decay_samples]}.",
    ),
    error(
        "MB-CFG-iters_sched",
        "validate:1570.2",
        "scheduler_lr_decay_samples",
        lambda s: (
            not _by_samples(s)
            and (s.scheduler_lr_decay_samples is not None or s.scheduler_lr_warmup_samples != 0)
        ),
        "Training by iterations is scheduled by iterations.",
        "Use {write[scheduler_lr_decay_iters]}.",
    ),
    error(
        "MB-CFG-max_steps",
        "validate:1570.3",
        "scheduler_max_steps",
        lambda s: (
            s.scheduler_max_steps is not None
            and s.train_iters is not None
            and 0 < s.scheduler_max_steps < s.train_iters
        ),
        "The schedule has at least as many steps as the training: {scheduler_max_steps} < "
        "{train_iters}.",
        "Use {train_iters} or more.",
    ),
    error(
        "MB-CFG-seq_2cp",
        "validate:1575",
        "seq_length",
        lambda s: (
            s.cp > 1
            and s.seq_length % (2 * s.cp)
            and {"unit": 2 * s.cp, "nearest": multiples_near(s.seq_length, 2 * s.cp)}
        ),
        "Context parallelism cuts a sequence into 2*cp = {unit} pieces of equal length; "
        "{seq_length} is no multiple.",
        "Use {nearest}, in {write[seq_length]} and {write[dataset_seq_length]}.",
    ),
    error(
        "MB-CFG-sft_cp_token",
        "validate:1591",
        "calculate_per_token_loss",
        lambda s: _sft(s) and s.cp > 1 and not s.calculate_per_token_loss,
        "Fine-tuning with context parallelism (cp = {cp}) needs the loss per token.",
        "Use {write[calculate_per_token_loss=true]}.",
    ),
    error(
        "MB-CFG-sft_cp_avg",
        "validate:1594",
        "ddp_average_in_collective",
        lambda s: _sft(s) and s.cp > 1 and s.ddp_average_in_collective,
        "Fine-tuning with context parallelism (cp = {cp}) excludes averaging in the collective.",
        "Use {write[ddp_average_in_collective=false]}.",
    ),
    error(
        "MB-CFG-cp_list",
        "validate:1600.1",
        "cp_comm_type",
        _kinds_per_layer,
        "{kinds} kinds of context parallel communication for {num_layers} layers.",
        "Give one for all layers, or one a layer.",
        repeats=("MLM-TC-cp_list",),
    ),
    error(
        "MB-CFG-hcp_required",
        "validate:1600.2",
        "hierarchical_context_parallel_sizes",
        lambda s: (
            any("a2a+p2p" in str(kind) for kind in _kinds(s))
            and s.hierarchical_context_parallel_sizes is None
        ),
        "a2a+p2p needs the sizes of its two levels; without them ranks would attend to their own "
        "piece only.",
        "Set {write[hierarchical_context_parallel_sizes]} to two sizes whose product is {cp}.",
    ),
    error(
        "MB-CFG-hcp_product",
        "validate:1600.3",
        "hierarchical_context_parallel_sizes",
        _hierarchy,
        "The level sizes {hierarchical_context_parallel_sizes} multiply to {product}, not to "
        "cp = {cp}.",
        "Give sizes whose product is {cp}.",
    ),
    error(
        "MB-CFG-pack_mbs1",
        "validate:1606",
        "micro_batch_size",
        lambda s: _packed(s) and s.micro_batch_size > 1,
        "A packed sequence is a batch of its own: the micro batch is 1, not {micro_batch_size}.",
        "Use {write[micro_batch_size=1]} and a packed length {micro_batch_size} times as long.",
    ),
    error(
        "MB-CFG-pack_mbs2",
        "validate:1620",
        "micro_batch_size",
        lambda s: s.dataset_enable_in_batch_packing and s.micro_batch_size == 1,
        "Packing in the batch needs a micro batch of 2 or more.",
        "Use {write[micro_batch_size=2]}.",
    ),
    error(
        "MB-CFG-seq_match",
        "validate:1644",
        "seq_length",
        lambda s: s.dataset_seq_length is not None and s.seq_length != s.dataset_seq_length,
        "The model's sequence, {seq_length}, and the data's, {dataset_seq_length}, are equal.",
        "Set {write[seq_length]} and {write[dataset_seq_length]} alike.",
    ),
    change(
        "MB-FLEX-none",
        "dataset:1",
        "moe_token_dispatcher_type",
        lambda s: (
            s.moe_token_dispatcher_type == "flex"
            and s.moe_flex_dispatcher_backend is None
            and {"moe_token_dispatcher_type": "alltoall"}
        ),
        "The flex dispatcher without a backend becomes alltoall.",
        "Use {write[moe_flex_dispatcher_backend=deepep]}.",
    ),
    error(
        "MB-FLEX-hybridep",
        "validate:1650",
        "moe_flex_dispatcher_backend",
        lambda s: (
            s.moe_token_dispatcher_type == "flex"
            and s.moe_flex_dispatcher_backend == "hybridep"
            and s.site.device_capability[0] not in (8, 9, 10)
        ),
        "HybridEP runs on Ampere, Hopper and Blackwell GPUs.",
        "Use {write[moe_token_dispatcher_type=alltoall]}.",
    ),
    error(
        "MB-FLEX-deepep",
        "validate:1651",
        "moe_flex_dispatcher_backend",
        lambda s: (
            s.moe_token_dispatcher_type == "flex"
            and s.moe_flex_dispatcher_backend == "deepep"
            and s.site.device_capability[0] not in (8, 9, 10)
        ),
        "DeepEP runs on Ampere, Hopper and B200/B300 GPUs.",
        "Use {write[moe_token_dispatcher_type=alltoall]}.",
    ),
    error(
        "MB-INIT-hcp_decentral",
        "parallel_state:411",
        "hierarchical_context_parallel_sizes",
        lambda s: s.dist_use_decentralized_pg and s.hierarchical_context_parallel_sizes,
        "Decentralised process groups exclude hierarchical context parallelism.",
        "Use {write[dist_use_decentralized_pg=false]}.",
    ),
    error(
        "MB-INIT-world_expert",
        "parallel_state:456",
        "world_size",
        _decentral_expert_world,
        "The world size must be a multiple of etp*ep*pp = {etp}*{ep}*{pp} = {unit}; {world_size} "
        "GPUs are not.",
        "Use {nearest} GPUs.",
        final=True,
    ),
    error(
        "MB-INIT-inst_edp",
        "parallel_state:464",
        "num_distributed_optimizer_instances",
        _decentral_instances,
        "The optimizer instances must divide the expert data parallel size {edp}.",
        "Choose from the divisors of {edp}.",
        final=True,
    ),
    error(
        "MB-GPT-rng",
        "provider_checks:235",
        "use_te_rng_tracker",
        lambda s: (
            s.cuda_graph_impl != "none" and not s.use_te_rng_tracker and not s.rng_te_rng_tracker
        ),
        "CUDA graphs need Transformer Engine's random number tracker.",
        "Use {write[use_te_rng_tracker=true]}.",
    ),
    error(
        "MB-GPT-chunks",
        "provider_checks:253",
        "virtual_pipeline_model_parallel_size",
        lambda s: (
            bool(s.vpp)
            and _symmetric(s)
            and (s.num_layers // s.pp) % s.vpp
            and {"each": s.num_layers // s.pp}
        ),
        "The {each} layers of a rank must be a multiple of vpp = "
        "{virtual_pipeline_model_parallel_size}.",
        "Choose vpp among the divisors of {each}.",
    ),
)
