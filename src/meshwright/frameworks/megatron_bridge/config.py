"""Rules of Bridge's configuration as a whole: world, batch, precision, groups."""

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
)

_ALGORITHMS = ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS")


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
        "gtp_weight_remat_size",
        "expert_gtp_weight_remat_size",
    )
    return next(({"field": n} for n in names if (getattr(s, n) or 0) < 1), None)


def _world(s: Settings) -> object:
    unit = s.tp * s.pp * s.cp
    return s.world_size % unit and {"unit": unit, "nearest": multiples_near(s.world_size, unit)}


def _local_graph(s: Settings) -> object:
    inference = s.inference_cuda_graph_scope in ("layer", "block") and not s.cuda_graph_modules
    return s.cuda_graph_impl == "local" and not inference


def _old_graphs(s: Settings) -> bool:
    return bool(s.enable_cuda_graph or s.external_cuda_graph)


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
        "MLM-ARG-graph_old_and_impl",
        "transformer_config:2703",
        "cuda_graph_impl",
        lambda s: _old_graphs(s) and s.cuda_graph_impl != "none",
        "The old switches and {write[cuda_graph_impl]} exclude each other.",
        "Keep {write[cuda_graph_impl]}.",
    ),
    error(
        "MLM-ARG-graph_old_both",
        "transformer_config:2704",
        "enable_cuda_graph",
        lambda s: s.enable_cuda_graph and s.external_cuda_graph,
        "There is one implementation of CUDA graphs at a time.",
        "Use {write[cuda_graph_impl=local]} or {write[cuda_graph_impl=transformer_engine]}.",
    ),
    change(
        "MLM-ARG-graph_old_impl",
        "transformer_config:2705",
        "cuda_graph_impl",
        lambda s: (
            _old_graphs(s)
            and s.cuda_graph_impl == "none"
            and {"cuda_graph_impl": "local" if s.enable_cuda_graph else "transformer_engine"}
        ),
        "The old switch means {write[cuda_graph_impl]}={cuda_graph_impl}.",
        "Write that.",
    ),
    derive(
        "num_microbatches:1",
        lambda s: {"data_parallel_size": max(1, s.world_size // (s.tp * s.pp * s.cp * s.gtp))},
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
        "MB-CFG-decentral_gloo",
        "validate:1552",
        "use_gloo_process_groups",
        lambda s: s.dist_use_decentralized_pg and s.use_gloo_process_groups,
        "Decentralised process groups are NCCL only.",
        "Use {write[use_gloo_process_groups=false]}.",
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
    change(
        "MB-TC-hybridep_pad",
        "transformer_config:130",
        "moe_hybridep_pad_uneven_dispatch_inputs",
        lambda s: (
            s.moe_flex_dispatcher_backend == "hybridep"
            and s.moe_token_dispatcher_type == "flex"
            and s.cuda_graph_impl == "none"
            and {"moe_hybridep_pad_uneven_dispatch_inputs": True}
        ),
        "Without CUDA graphs HybridEP pads inputs of unequal lengths.",
        severity="note",
    ),
)
