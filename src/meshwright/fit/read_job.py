"""Settings of a measured run -> job: sequence, batch, task, switches of execution."""

from __future__ import annotations

import math
import re
from typing import Literal

from meshwright.describe.job import (
    TASKS,
    CrossEntropy,
    Execution,
    Job,
)
from meshwright.fit.framework import Framework
from meshwright.fit.read_precision import read_precision
from meshwright.fit.settings import Settings

PACKED_SAMPLE_TOKENS = 512
"""Mean length taken for the packed samples of a fine-tuning set, which rows do not state."""


def read_job(
    s: Settings,
    framework: Framework,
    seq_len: int,
    gbs: int,
    *,
    architecture: str = "",
    is_latent: bool = False,
    by_op: bool = False,
) -> Job:
    """Return the job of a row; unknown words are read as the nearest and listed.

    ``architecture`` of the GPU: software is no older than the card it runs on. ``by_op``:
    activations are kept by op, of matmul outputs every second one.
    """
    task = s.task
    if task == "module":
        task = "pretrain"
    if task not in TASKS:
        s.assumed.append(f"task {task!r} is read as pretrain")
        task = "pretrain"
    return Job(
        seq_len=seq_len,
        gbs=gbs,
        precision=read_precision(s, framework, is_latent=is_latent),
        task="lora" if task == "lora" else "sft" if task == "sft" else "pretrain",
        lora_rank=max(s.whole("dim", "lora_rank", default=16), 1),
        lora_targets=_lora_targets(s, framework),
        execution=read_execution(s, framework, architecture, by_op=by_op),
    )


def _lora_targets(s: Settings, framework: Framework) -> frozenset[str]:
    """Return the adapted ops; Megatron's recipes adapt the query, key and value projection."""
    stated = frozenset(name.removeprefix("linear_") for name in s.items("target_modules"))
    if stated:
        return frozenset(name.replace("_proj", "") if "_down" in name else name for name in stated)
    is_megatron = framework.name in ("nemo", "megatron-bridge", "megatron-lm")
    return frozenset({"qkv"}) if is_megatron else frozenset()


def read_execution(
    s: Settings, framework: Framework, architecture: str = "", *, by_op: bool = False
) -> Execution:
    """Return the switches of a row: what it states, else what its framework does.

    ``architecture`` and ``by_op`` as in ``read_job``.
    """
    attention = s.text("attention", "attention_backend")
    flash = framework.flash_attention
    if attention:
        flash = "unfused" not in attention and "not flash" not in attention
    if s.text("transformer_impl") == "local" and not s.flag("use_flash_attn", default=False):
        flash = False
    graphs, modules = _cuda_graphs(s, framework)
    loss = _cross_entropy(s, framework, architecture)
    offload = s.whole("cpu_offloading_num_layers") if s.flag("cpu_offloading", default=False) else 0
    capacity = s.find("moe_expert_capacity_factor")
    return Execution(
        overlap_grad_reduce=s.flag("overlap_grad_reduce", default=framework.overlap),
        overlap_param_gather=s.flag("overlap_param_gather", default=framework.overlap),
        # Adapters read what the fused overlap would have kept inside its kernels.
        overlap_tp_comm=s.flag(
            "tp_comm_overlap",
            "async_tp",
            default=framework.overlap_tp and s.task != "lora",
        ),
        asynchronous_tp=s.flag("async_tp", default=False),
        overlap_ep_comm=s.flag(
            "overlap_moe_expert_parallel_comm", "moe_a2a_overlap", default=False
        ),
        overlap_pp_comm=framework.overlap_pp,
        delay_weight_grad=s.flag("delay_wgrad_compute", default=False),
        cuda_graphs=graphs,
        graphed_modules=modules,
        dispatcher=_dispatcher(s, framework),
        flash_attention=flash,
        tuned_attention=framework.tuned_attention or "te" in s.text("kernels"),
        fp8_attention=s.flag("fp8_dot_product_attention", default=False),
        fused_softmax=not s.flag("no_masked_softmax_fusion", default=False)
        and ("unfused" not in attention or s.section("args")),
        softmax_in_fp32=s.flag(
            "attention_softmax_in_fp32", "apply_query_key_layer_scaling", default=False
        ),
        attention_dropout=_has_dropout(s),
        attention_mask=s.section("args")
        and not s.flag("no_create_attention_mask_in_dataloader", default=False),
        transformer_engine=_has_transformer_engine(s, framework),
        megatron_head=framework.name not in ("torchtitan", "composer", "automodel"),
        deterministic=s.flag("deterministic_mode", default=False),
        deferred_head_microbatches=_deferred(s),
        fused_kernels=_fused_kernels(s, framework),
        fused_cross_entropy=loss in ("vendor", "compiled"),
        compiled_cross_entropy=loss == "compiled",
        in_place_cross_entropy=loss != "plain",
        fused_wgrad_accumulation=not s.flag("no_gradient_accumulation_fusion", default=False)
        and s.flag(
            "gradient_accumulation_fusion",
            default=framework.fused_wgrad_accumulation and not s.is_module,
        ),
        fused_expert_activation=s.flag("bias_activation_fusion", default=not s.is_module),
        keeps_placeholders=_keeps_placeholders(s, framework),
        caches_quantised_weights=not s.flag("disable_parameter_transpose_cache", default=False),
        grouped_gemm=s.flag("moe_grouped_gemm", default=not s.section("args")),
        fused_experts=s.flag("use_transformer_engine_op_fuser", default=False),
        fused_permute=s.flag("moe_permute_fusion", default=framework.name == "megatron-bridge"),
        forced_balance=s.flag(
            "moe_router_force_load_balancing",
            "moe_force_balanced",
            "moe_balanced_or_padded",
            "fake_balanced_gate",
            default=False,
        )
        or capacity is not None
        or s.flag("moe_token_drop", default=False)
        # A graph of the whole step has fixed shapes: what an expert gets is cut and padded, unless
        # pages hold whatever comes.
        or (graphs == "full" and not s.flag("moe_paged_stash", default=False)),
        neighbouring_experts=s.flag("fake_balanced_gate", default=False),
        capacity_factor=_capacity(s),
        shared_expert_overlap=s.flag("moe_shared_expert_overlap", default=False),
        recompute_every_second_matmul=by_op,
        blocking_checkpoints=framework.blocking_checkpoints,
        scatters_messages=framework.scatters_messages,
        packed_sample_tokens=PACKED_SAMPLE_TOKENS if _packs_samples(s, framework) else 0,
        optimizer_offload_fraction=min(max(_fraction(s, "optimizer_offload_fraction"), 0.0), 1.0),
        activation_offload_layers=offload,
        offloaded_modules=_offloaded_modules(s),
        bucket_bytes=framework.bucket_bytes,
        gathers_from_master=framework.gathers_from_master,
        expandable_segments="expandable_segments:true" in allocator
        if (allocator := s.text("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
        else s.flag("expandable_segments", default=framework.expandable_segments),
        power_boost=s.flag("vboost", default="with vboost" in s.text("condition")),
    )


FUSED_GROUP_MLP = frozenset({"expert_fc1", "moe_act"})
"""What the experts' products and activation are where no op fuser makes them one module."""


def _offloaded_modules(s: Settings) -> frozenset[str]:
    if not s.flag("fine_grained_activation_offloading", default=False):
        return frozenset()
    names = frozenset(s.items("offload_modules"))
    return names | FUSED_GROUP_MLP if "fused_group_mlp" in names else names


def _packs_samples(s: Settings, framework: Framework) -> bool:
    """Return whether many short samples fill a sequence, each of which attends to itself alone."""
    dataset = s.text("finetuning_dataset", "dataset")
    if dataset or s.task not in ("sft", "lora"):
        return bool(re.search("(?<!un)(?<!not )packed", dataset))
    return framework.packs_samples


def _has_dropout(s: Settings) -> bool:
    """Return whether attention drops out: it does in Megatron-LM unless a launch says otherwise.

    Launches with RMSNorm are of models that are trained without.
    """
    return s.text("normalization") != "rmsnorm"


DEFERRED_MICROBATCHES = 22
"""``wgrad_deferral_limit`` of NeMo's and Megatron-Bridge's recipes of large Llamas."""


def _deferred(s: Settings) -> int:
    """Return for how many micro-batches the head's weight gradient waits (0 limit: one).

    A row that has the switch and no limit has that of NeMo's recipes.
    """
    if not s.flag("defer_embedding_wgrad_compute", default=False):
        return 0
    return max(s.whole("wgrad_deferral_limit", default=DEFERRED_MICROBATCHES), 1)


def _is_rack_recipe(s: Settings, framework: Framework) -> bool:
    """Return whether nothing of the dispatcher is stated where one rack is one NVLink domain.

    There Megatron-Bridge's recipes send tokens with HybridEP and graph what chooses experts,
    unless tokens are dropped.
    """
    words = ("moe_token_dispatcher_type", "moe_flex_dispatcher_backend", "cuda_graph_impl")
    return (
        framework.name == "megatron-bridge"
        and (s.number("nvlink_domain") or 0) > MOST_GPUS_OF_A_NODE
        and (s.number("ep") or 1) > 1
        and not any(s.text(word) for word in words)
        and not s.flag("moe_token_drop", default=False)
    )


MOST_GPUS_OF_A_NODE = 8
"""Larger NVLink domains are racks."""


def _cuda_graphs(
    s: Settings, framework: Framework
) -> tuple[Literal["none", "partial", "full"], frozenset[str]]:
    kind = s.text("cuda_graph_impl")
    scope = frozenset(s.items("cuda_graph_scope", "cuda_graph_modules"))
    if _is_rack_recipe(s, framework) and s.find("cuda_graphs") is None:
        return "partial", frozenset({"moe_router", "moe_preprocess"})
    if kind in ("", "none"):
        # Recipes drop tokens to have fixed shapes, which is what graphs need.
        drops = s.flag("moe_token_drop", default=False)
        whole = not kind and s.flag("cuda_graphs", "enable_cuda_graph", default=drops)
        # A paged stash is how experts that drop nothing fit into a graph of the whole step.
        whole = whole or s.flag("moe_paged_stash", default=False)
        return ("full", frozenset()) if whole else ("none", frozenset())
    if kind == "full_iteration" or "full_iteration" in scope:
        return "full", frozenset()
    known = scope & {"attn", "mamba", "mlp", "moe_router", "moe_preprocess", "moe"}
    return ("partial", known) if known else ("full", frozenset())


def _keeps_placeholders(s: Settings, framework: Framework) -> bool:
    """Return whether Transformer Engine is of version 2, as it is with Megatron since 2025."""
    stated = re.search(r"\bte (\d+)\.", s.text("framework"))
    if stated:
        return int(stated[1]) >= 2
    return framework.name in ("megatron-bridge", "megatron-lm") and _has_transformer_engine(
        s, framework
    )


def _has_transformer_engine(s: Settings, framework: Framework) -> bool:
    if framework.name in ("torchtitan", "composer", "deepspeed"):
        return False
    if framework.name == "automodel":
        return "te" in s.text("kernels")
    return s.text("transformer_impl") != "local"


def _dispatcher(
    s: Settings, framework: Framework
) -> Literal["alltoall", "allgather", "deepep", "hybridep"]:
    kernels = s.text("kernels", "features")
    known = next((w for w in ("hybridep", "deepep") if w in kernels), "")
    if not known and _is_rack_recipe(s, framework):
        s.assumed.append("dispatcher = hybridep: not stated, as in recipes for racks")
        known = "hybridep"
    word = s.text("moe_token_dispatcher_type", default=known or "alltoall")
    word = "alltoall" if word == "alltoall_seq" else word.replace("all_gather", "allgather")
    backend = s.text("moe_flex_dispatcher_backend", default=known)
    if word in ("hybridep", "deepep"):
        return "hybridep" if word == "hybridep" else "deepep"
    if word == "flex" or (backend and s.find("moe_token_dispatcher_type") is None):
        return "hybridep" if backend == "hybridep" else "deepep"
    if word not in ("alltoall", "allgather"):
        s.assumed.append(f"dispatcher {word!r} is read as alltoall")
        word = "alltoall"
    return "allgather" if word == "allgather" else "alltoall"


def _fused_kernels(s: Settings, framework: Framework) -> bool:
    if framework.name == "torchtitan":
        return s.flag("torch_compile", default=True)
    if s.text("transformer_impl") == "local":
        return False
    if framework.name == "automodel":
        # Liger's kernels, which it leaves out where a layer or the model is divided.
        whole = all((s.number(degree) or 1) == 1 for degree in ("tp", "cp", "pp"))
        return whole or "te" in s.text("kernels")
    return framework.fused_kernels


def _cross_entropy(s: Settings, framework: Framework, architecture: str) -> CrossEntropy:
    kind = s.text("cross_entropy_fusion_impl") or s.text("cross_entropy_fusion")
    fused = s.find("cross_entropy_loss_fusion")
    if fused is not None and not s.flag("cross_entropy_loss_fusion", default=True):
        return "in_place"
    if kind == "te":
        return "vendor"
    if kind == "native" or (fused is not None and framework.name == "megatron-lm"):
        return "compiled"
    if fused is None and framework.name == "torchtitan" and _compiles_loss(s, architecture):
        return "vendor"
    return "vendor" if fused is not None else framework.cross_entropy


def _compiles_loss(s: Settings, architecture: str) -> bool:
    """Return whether torchtitan compiles its loss: with the model, since 2025.

    A row does not say which release it ran; what runs on Blackwell is of 2025 or later. Inductor
    reads the logits in 16 bit and writes their gradient, as a fused loss does.
    """
    return architecture.startswith("Blackwell") and s.flag("torch_compile", default=True)


def _capacity(s: Settings) -> float | None:
    """Return the factor that token counts are padded to, where a run pads them."""
    if s.find("moe_expert_capacity_factor") is None:
        # Megatron-Bridge's switch pads to a capacity of 1.
        return 1.0 if s.flag("moe_token_drop", default=False) else None
    if not s.flag("moe_pad_expert_input_to_capacity", default=True):
        return None
    return _fraction(s, "moe_expert_capacity_factor") or None


def _fraction(s: Settings, name: str) -> float:
    """Return a number of at least 0; 0 where none is set or it is none."""
    value = s.find(name)
    try:
        number = float(value) if isinstance(value, int | float | str) else 0.0
    except ValueError:
        number = math.nan
    if 0.0 <= number < math.inf:
        return number
    s.assumed.append(f"{name} = {value!r} is no number of at least 0 and is not used")
    return 0.0
