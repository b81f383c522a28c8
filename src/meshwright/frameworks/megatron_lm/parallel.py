"""Rules of the degrees: world size, tensor, context and expert parallelism, process groups."""

from __future__ import annotations

import math
from typing import Any

from meshwright.frameworks.megatron_lm.rules import (
    Settings,
    change,
    derive,
    divisors_near,
    error,
    indivisible,
    multiples_near,
    warning,
)

_DENSE = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


_DEGREES = (*_DENSE, "expert_model_parallel_size", "expert_tensor_parallel_size")


def _zero(s: Settings) -> object:
    return next(({"field": n} for n in _DENSE if getattr(s, n) == 0), None)


def _not_positive(s: Settings) -> object:
    return next(({"field": n} for n in _DEGREES if getattr(s, n) < 1), None)


def _world_not_divisible(s: Settings) -> object:
    unit = s.tp * s.pp * s.cp * s.gtp
    return s.world_size % unit and {
        "unit": unit,
        "gtp": s.gtp,
        "nearest": multiples_near(s.world_size, unit),
    }


def _expert_world_not_divisible(s: Settings) -> object:
    unit = s.etp * s.ep * s.pp * s.expert_gtp_weight_remat_size
    if s.world_size % unit == 0:
        return None
    both = math.lcm(s.tp * s.cp * s.gtp, unit // s.pp) * s.pp
    per_stage = s.world_size // (s.pp * s.etp)
    return {
        "unit": unit,
        "egtp": s.expert_gtp_weight_remat_size,
        "both": both,
        "nearest": multiples_near(s.world_size, both),
        "ep_choices": divisors_near(per_stage, s.ep) if per_stage else "1",
    }


def _hierarchy_product(s: Settings) -> object:
    sizes = s.hierarchical_context_parallel_sizes
    product = math.prod(sizes or ())
    return sizes and product != s.cp and {"product": product if product < 2**63 else "far more"}


def _one_connection(s: Settings) -> bool:
    return s.site.env.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"


def _split(s: Settings) -> bool:
    return s.tp > 1 or s.cp > 1


def _connections_ignored(s: Settings) -> object:
    return (
        _split(s)
        and s.site.before_blackwell
        and not (s.use_torch_fsdp2 or s.use_megatron_fsdp or s.overlap_moe_expert_parallel_comm)
        and not _one_connection(s)
        and {"given": s.site.env.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset")}
    )


def _stream_groups(s: Settings) -> dict[str, Any]:
    groups = list(s.high_priority_stream_groups)
    blackwell = not s.site.before_blackwell
    if s.use_torch_fsdp2 or (s.use_megatron_fsdp and blackwell):
        groups += [] if "dp_cp" in groups else ["dp_cp"]
        if s.ep > 1:
            groups += [] if "ep_dp" in groups else ["ep_dp"]
    return {"high_priority_stream_groups": groups}


def _expert_dp(s: Settings) -> dict[str, Any]:
    unit = s.etp * s.ep * s.pp * s.expert_gtp_weight_remat_size
    return {"expert_data_parallel_size": s.world_size // unit}


def _pp_not_last(s: Settings) -> object:
    edp = s.expert_data_parallel_size
    return s.use_tp_pp_dp_mapping and s.pp > 1 and edp != s.dp and {"edp": edp}


def _instances_not_dividing_dp(s: Settings) -> object:
    whole = s.dp * s.cp
    instances = s.num_distributed_optimizer_instances
    return indivisible(whole, instances) and {
        "whole": whole,
        "nearest": divisors_near(whole, instances),
    }


def _instances_not_dividing_edp(s: Settings) -> object:
    instances = s.num_distributed_optimizer_instances
    shared = math.gcd(s.dp * s.cp, s.expert_data_parallel_size)
    return indivisible(s.expert_data_parallel_size, instances) and {
        "edp": s.expert_data_parallel_size,
        "nearest": divisors_near(shared, instances),
    }


RULES = (
    error(
        "MLM-PS-ep_positive",
        "validate_args:424",
        "tensor_model_parallel_size",
        _zero,
        "A degree is at least 1; 0 ends in a division by zero.",
        "Use 1 or more.",
        final=True,
    ),
    error(
        "MLM-ARG-world_div",
        "validate_args:432",
        "world_size",
        _world_not_divisible,
        "The world size must be a multiple of tp*pp*cp*gtp = {tp}*{pp}*{cp}*{gtp} = {unit}; "
        "{world_size} GPUs are not.",
        "Use {nearest} GPUs, or degrees whose product divides {world_size}.",
        final=True,
    ),
    error(
        "MLM-ARG-attn_local_spec",
        "validate_args:437",
        "attention_backend",
        lambda s: s.attention_backend == "local" and (not s.spec or s.spec[0] != "local"),
        "The local attention backend goes with the local layer specification.",
        "Add --spec local, or use another --attention-backend.",
    ),
    derive(
        "validate_args:448",
        lambda s: {"data_parallel_size": s.world_size // (s.tp * s.pp * s.cp * s.gtp)},
    ),
    error(
        "MLM-ARG-hcp_product",
        "validate_args:582",
        "hierarchical_context_parallel_sizes",
        _hierarchy_product,
        "The level sizes {hierarchical_context_parallel_sizes} multiply to {product}, "
        "not to cp = {cp}.",
        "Give sizes whose product is {cp}.",
    ),
    error(
        "MLM-ARG-hcp_required",
        "validate_args:583",
        "cp_comm_type",
        lambda s: (
            "a2a+p2p" in (s.cp_comm_type or ()) and s.hierarchical_context_parallel_sizes is None
        ),
        "a2a+p2p needs the sizes of its two levels, the inner (a2a) first.",
        "Add --hierarchical-context-parallel-sizes with two sizes whose product is {cp}.",
    ),
    change(
        "MLM-ARG-etp_default",
        "validate_args:588",
        "expert_tensor_parallel_size",
        lambda s: s.expert_tensor_parallel_size is None and {"expert_tensor_parallel_size": s.tp},
        "Left out, the expert tensor parallel size is tp = {tp}; it multiplies into the expert "
        "grid.",
        "With experts, write {write[expert_tensor_parallel_size=1]} unless experts shall be split.",
        severity="note",
    ),
    change(
        "MLM-ARG-sp_tp1",
        "validate_args:1436",
        "sequence_parallel",
        lambda s: s.tp == 1 and s.sequence_parallel and {"sequence_parallel": False},
        "Sequence parallelism is turned off, because tp is 1.",
        "Drop --sequence-parallel, or use tp > 1.",
    ),
    error(
        "MLM-ARG-tpco_sp",
        "validate_args:1442",
        "tp_comm_overlap",
        lambda s: s.tp_comm_overlap and not s.sequence_parallel,
        "Tensor parallel overlap needs sequence parallelism, hence tp > 1 (tp is {tp}).",
        "Add --sequence-parallel with tp > 1, or drop --tp-comm-overlap.",
    ),
    error(
        "MLM-ARG-hcpx_pp",
        "validate_args:1445",
        "hybrid_context_parallel",
        lambda s: s.hybrid_context_parallel and s.pp > 1,
        "Hybrid context parallelism excludes pipeline parallelism (pp is {pp}).",
        "Use {write[pipeline_model_parallel_size=1]}.",
    ),
    error(
        "MLM-ARG-hcpx_graph",
        "validate_args:1446",
        "hybrid_context_parallel",
        lambda s: s.hybrid_context_parallel and s.enable_cuda_graph,
        "Hybrid context parallelism excludes CUDA graphs.",
        "Drop --enable-cuda-graph.",
    ),
    error(
        "MLM-ARG-hcpx_fsdp",
        "validate_args:1447",
        "hybrid_context_parallel",
        lambda s: s.hybrid_context_parallel and s.use_megatron_fsdp,
        "Hybrid context parallelism excludes Megatron-FSDP.",
        "Drop --use-megatron-fsdp.",
    ),
    error(
        "MLM-ARG-hcpx_loader",
        "validate_args:1448",
        "dataloader_type",
        lambda s: s.hybrid_context_parallel and s.dataloader_type not in (None, "single"),
        "Hybrid context parallelism needs the single-pass data loader.",
        "Use --dataloader-type single.",
    ),
    error(
        "MLM-ARG-hcpx_token",
        "validate_args:1449",
        "calculate_per_token_loss",
        lambda s: s.hybrid_context_parallel and not s.calculate_per_token_loss,
        "Hybrid context parallelism needs the loss per token.",
        "Add --calculate-per-token-loss.",
    ),
    warning(
        "MLM-ARG-conn_fsdp",
        "validate_args:1457",
        "context_parallel_size",
        lambda s: (
            _split(s) and s.site.before_blackwell and (s.use_torch_fsdp2 or s.use_megatron_fsdp)
        ),
        "Before Blackwell, tensor and context parallelism want CUDA_DEVICE_MAX_CONNECTIONS=1 and "
        "fully sharded data parallelism wants more.",
        "Measure both, or use tp = cp = 1 with FSDP.",
    ),
    warning(
        "MLM-ARG-conn_moe",
        "validate_args:1468",
        "overlap_moe_expert_parallel_comm",
        lambda s: (
            _split(s)
            and s.site.before_blackwell
            and not (s.use_torch_fsdp2 or s.use_megatron_fsdp)
            and s.overlap_moe_expert_parallel_comm
        ),
        "Before Blackwell, tensor and context parallelism want CUDA_DEVICE_MAX_CONNECTIONS=1 and "
        "the overlap of expert communication wants 32.",
        "Export 1 or 32, by what matters more.",
    ),
    error(
        "MLM-ARG-conn",
        "validate_args:1477",
        "CUDA_DEVICE_MAX_CONNECTIONS",
        _connections_ignored,
        "Before Blackwell, tp = {tp} and cp = {cp} need CUDA_DEVICE_MAX_CONNECTIONS=1; "
        "it is {given}.",
        "Export CUDA_DEVICE_MAX_CONNECTIONS=1.",
    ),
    change(
        "MLM-ARG-fsdp_prio",
        "validate_args:1486",
        "high_priority_stream_groups",
        _stream_groups,
        "The communication streams of fully sharded data parallelism get high priority: "
        "{high_priority_stream_groups}.",
        severity="note",
    ),
    error(
        "MLM-MPC-sp_tp",
        "transformer_config:504",
        "sequence_parallel",
        lambda s: s.sequence_parallel and s.tp <= 1,
        "Sequence parallelism needs tensor parallelism (tp is {tp}).",
        "Use {write[sequence_parallel=false]}, or tp > 1.",
    ),
    change(
        "MLM-MPC-etp_default",
        "transformer_config:507",
        "expert_tensor_parallel_size",
        lambda s: s.expert_tensor_parallel_size is None and {"expert_tensor_parallel_size": s.tp},
        "Left out, the expert tensor parallel size is tp = {tp}.",
        "With experts, write {write[expert_tensor_parallel_size=1]} unless experts shall be split.",
        severity="note",
    ),
    warning(
        "MLM-MPC-ep_tp_sp",
        "transformer_config:563",
        "sequence_parallel",
        lambda s: s.ep > 1 and s.tp > 1 and not s.sequence_parallel,
        "Experts with tensor parallelism (ep = {ep}, tp = {tp}) train only under sequence "
        "parallelism.",
        "Use {write[sequence_parallel=true]}.",
    ),
    error(
        "MLM-PS-sharp_replica",
        "parallel_state:785",
        "sharp_enabled_group",
        lambda s: (
            s.use_sharp
            and s.sharp_enabled_group == "dp_replica"
            and s.num_distributed_optimizer_instances <= 1
        ),
        "The replica group exists only with several optimizer instances.",
        "Use --sharp-enabled-group dp, or --num-distributed-optimizer-instances 2.",
    ),
    error(
        "MLM-PS-sharp_group",
        "parallel_state:789",
        "sharp_enabled_group",
        lambda s: s.sharp_enabled_group is not None and not s.use_sharp,
        "A group for SHARP is chosen, but SHARP is off.",
        "Add --use-sharp, or drop --sharp-enabled-group.",
    ),
    error(
        "MLM-PS-world_dense",
        "parallel_state:823",
        "world_size",
        _world_not_divisible,
        "The world size must be a multiple of tp*pp*cp*gtp = {tp}*{pp}*{cp}*{gtp} = {unit}; "
        "{world_size} GPUs are not.",
        "Use {nearest} GPUs.",
        final=True,
        repeats=("MLM-ARG-world_div", "MB-CFG-world_div"),
    ),
    error(
        "MLM-PS-vpp_pp",
        "parallel_state:829",
        "virtual_pipeline_model_parallel_size",
        lambda s: s.vpp is not None and s.pp <= 1,
        "Interleaving needs pipeline parallelism (pp is {pp}).",
        "Drop the virtual stages, or use pp of at least 2.",
        repeats=("MLM-ARG-vpp_pp1", "MLM-ARG-vpp_pp2_nooverlap"),
    ),
    error(
        "MLM-PS-ep_positive",
        "parallel_state:880",
        "expert_model_parallel_size",
        _not_positive,
        "A degree is at least 1; 0 ends in a division by zero.",
        "Use 1 or more.",
        final=True,
    ),
    error(
        "MLM-PS-world_expert",
        "parallel_state:882",
        "world_size",
        _expert_world_not_divisible,
        "The world size must also be a multiple of etp*ep*pp*egtp = {etp}*{ep}*{pp}*{egtp} = "
        "{unit}; {world_size} GPUs are not. Both grids fit multiples of pp*lcm(tp*cp, etp*ep) = "
        "{both}.",
        "Use {nearest} GPUs, or ep = {ep_choices}.",
        final=True,
    ),
    derive("parallel_state:883", _expert_dp),
    error(
        "MLM-PS-pp_last",
        "parallel_state:898",
        "use_tp_pp_dp_mapping",
        _pp_not_last,
        "With the order tp-cp-ep-pp-dp and pp > 1 the data parallel sizes of the dense and the "
        "expert grid must be equal, dense models included: dp = {dp}, edp = {edp}.",
        "Make etp*ep equal to tp*cp = {tp}*{cp}, or drop --use-tp-pp-dp-mapping.",
    ),
    error(
        "MLM-PS-inst_dp",
        "parallel_state:922",
        "num_distributed_optimizer_instances",
        _instances_not_dividing_dp,
        "The optimizer instances must divide dp*cp = {whole}: "
        "{num_distributed_optimizer_instances} does not.",
        "Choose from {nearest}.",
        final=True,
    ),
    error(
        "MLM-PS-hybrid_even",
        "parallel_state:1043",
        "hybrid_context_parallel",
        lambda s: s.hybrid_context_parallel and (s.dp * s.cp) % 2,
        "Hybrid context parallelism needs an even dp*cp; it is {dp}*{cp}.",
        "Use a GPU count that makes dp*cp even.",
    ),
    error(
        "MLM-PS-ucc",
        "parallel_state:1205",
        "pipeline_model_parallel_comm_backend",
        lambda s: s.pipeline_model_parallel_comm_backend == "ucc" and _one_connection(s),
        "The UCC backend needs more than one CUDA connection.",
        "Unset CUDA_DEVICE_MAX_CONNECTIONS or raise it, or use the nccl backend.",
    ),
    error(
        "MLM-PS-inst_edp",
        "parallel_state:1447",
        "num_distributed_optimizer_instances",
        _instances_not_dividing_edp,
        "The optimizer instances must divide the expert data parallel size too, dense models "
        "included: edp = {edp}, instances = {num_distributed_optimizer_instances}.",
        "Choose from {nearest}.",
    ),
)
