"""Megatron Core's words for a training: the vocabulary into which every reader translates.

``words`` are a mapping such as ``{"tensor_model_parallel_size": 4, "seq_length": 8192}``; a word
that is absent or None is not set. ``layout_of`` and ``job_of`` understand them, ``layout_words``
and ``job_words`` write them, and one undoes the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final, cast

from meshwright.describe.job import Execution, Job, Precision, precision
from meshwright.errors import LayoutError, MeshwrightError, did_you_mean, nearest_divisors
from meshwright.parallel.layout import (
    CP_COMM_TEXT,
    DEFAULT_ORDER,
    CpComm,
    Layout,
    Pipeline,
    Recompute,
    Zero,
    layout,
    recompute_from_text,
    recompute_to_text,
    whole_number,
)
from meshwright.parallel.placement import read_pipeline_layout

Words = Mapping[str, Any]

PP_BEFORE_DP: Final = "tp-cp-ep-pp-dp"
DEGREES: Final = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "mbs": "micro_batch_size",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
    "microbatch_group_size": "microbatch_group_size_per_vp_stage",
    "dp_replicate": "num_distributed_optimizer_instances",
}
"""A field of the layout -> its word."""
_SWITCHES: Final = {
    "account_for_embedding": "account_for_embedding_in_pipeline_split",
    "account_for_loss": "account_for_loss_in_pipeline_split",
}
_CP_COMM: Final = {**{t: c for c, t in CP_COMM_TEXT.items()}, "allgather": CpComm.all_gather}


def number(words: Words, word: str, default: int, low: int = 1) -> int:
    """Return a whole number. Raises ``LayoutError`` on the word when it is none."""
    value = words.get(word)
    return default if value is None else whole_number(word, value, low)


def flag(words: Words, word: str, default: bool = False) -> bool:
    """Return a switch. Raises ``LayoutError`` on the word when it is neither true nor false."""
    value = words.get(word)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise LayoutError(word, value, "It is true or false.", "Use true or false.")
    return value


def layout_of(words: Words, gpus: int | None = None) -> Layout[int]:
    """Return the layout that the words describe on ``gpus`` GPUs.

    Without ``gpus`` it is the smallest world that both meshes allow. On a dense model
    ``expert_tensor_parallel_size`` means nothing and is 1; sequence parallelism without tensor
    parallelism is off, and without interleaving there are no groups of micro-batches.

    Raises ``LayoutError`` naming the word, its value, the rule and the nearest legal values.
    """
    tp, pp = number(words, DEGREES["tp"], 1), number(words, DEGREES["pp"], 1)
    ep = number(words, DEGREES["ep"], 1)
    experts = words.get("num_moe_experts")
    dense = ep == 1 and not experts
    recompute, recompute_num_layers = _recompute(words)
    stages = _stages(words)
    vpp = _vpp(words, pp, stages)
    return layout(
        tp=tp,
        cp=number(words, DEGREES["cp"], 1),
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=1 if dense else number(words, DEGREES["etp"], 1),
        gpus=gpus,
        mbs=number(words, DEGREES["mbs"], 1),
        sp=flag(words, "sequence_parallel") and tp > 1,
        zero=_zero(words),
        dp_replicate=number(words, DEGREES["dp_replicate"], 1),
        recompute=recompute,
        recompute_num_layers=recompute_num_layers,
        schedule=_schedule(words),
        cp_comm=_cp_comm(words),
        first=number(words, DEGREES["first"], 0, low=0),
        last=number(words, DEGREES["last"], 0, low=0),
        account_for_embedding=flag(words, _SWITCHES["account_for_embedding"]),
        account_for_loss=flag(words, _SWITCHES["account_for_loss"]),
        microbatch_group_size=_group_size(words) if vpp > 1 else 0,
        order=PP_BEFORE_DP if flag(words, "use_tp_pp_dp_mapping") else DEFAULT_ORDER,
        pipeline_layout=stages,
        hierarchical_cp=_hierarchical_cp(words),
    )


def _group_size(words: Words) -> int:
    return number(words, DEGREES["microbatch_group_size"], 0, low=0)


def _vpp(words: Words, pp: int, stages: str | None) -> int:
    given = words.get(DEGREES["vpp"])
    if given is not None:
        return number(words, DEGREES["vpp"], 1)
    word = "num_layers_per_virtual_pipeline_stage"
    if words.get(word) is not None:
        per_chunk, layers = number(words, word, 1), words.get("num_layers")
        if not isinstance(layers, int) or layers % pp or (layers // pp) % per_chunk:
            of = layers // pp if isinstance(layers, int) else 1
            near = " or ".join(map(str, nearest_divisors(max(of, 1), per_chunk)))
            rule = f"It divides the {layers} layers / {pp} stages."
            raise LayoutError(word, per_chunk, rule, f"Use {near}.")
        return layers // pp // per_chunk
    return max(len(read_pipeline_layout(stages)) // pp, 1) if stages else 1


def _stages(words: Words) -> str | None:
    """Return the pipeline layout as text; Bridge also writes lists of words."""
    given = words.get("pipeline_model_parallel_layout")
    if given is None or isinstance(given, str):
        return given or None
    if not isinstance(given, Sequence):
        rule = "It is a layout text such as Et|t|tL."
        raise LayoutError("pipeline_model_parallel_layout", given, rule, "Write it as text.")
    rows: list[Any] = list(cast("Sequence[Any]", given))
    return "|".join(map(_stage_letters, rows))


def _stage_letters(row: Any) -> str:
    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    items = list(cast("Sequence[Any]", row)) if isinstance(row, list | tuple) else [row]
    return "".join(letters.get(str(item), str(item)) for item in items)


def _zero(words: Words) -> Zero:
    if flag(words, "use_torch_fsdp2"):
        return Zero.optim_grads_params
    if flag(words, "use_megatron_fsdp"):
        strategy = words.get("data_parallel_sharding_strategy") or "no_shard"
        if strategy not in Zero.__members__:
            remedy = did_you_mean(str(strategy), Zero.__members__)
            raise LayoutError("data_parallel_sharding_strategy", strategy, "Unknown.", remedy)
        return Zero[strategy]
    return Zero.optim if flag(words, "use_distributed_optimizer") else Zero.no_shard


def _recompute(words: Words) -> tuple[Recompute, int]:
    granularity = words.get("recompute_granularity")
    if granularity in (None, "none"):
        return Recompute.none, 0
    if granularity == "full":
        method = words.get("recompute_method") or "uniform"
        layers = number(words, "recompute_num_layers", 1)
        return recompute_from_text(f"full:{method}:{layers}")
    if granularity != "selective":
        remedy = did_you_mean(str(granularity), ["full", "selective"])
        raise LayoutError("recompute_granularity", granularity, "Unknown granularity.", remedy)
    modules = words.get("recompute_modules")
    if modules is None:
        modules = ["core_attn"]
    if isinstance(modules, str):
        modules = modules.replace(",", " ").split()
    if not isinstance(modules, Sequence):
        raise LayoutError("recompute_modules", modules, "It is a list.", "Write [core_attn].")
    return recompute_from_text("+".join(str(m) for m in cast("Sequence[Any]", modules)) or "none")


def _schedule(words: Words) -> Pipeline | None:
    given = words.get("pipeline_schedule")
    if given is None:
        return None
    if given not in Pipeline.__members__:
        remedy = did_you_mean(str(given), Pipeline.__members__)
        raise LayoutError("pipeline_schedule", given, "Unknown schedule.", remedy)
    return Pipeline[given]


def _cp_comm(words: Words) -> CpComm:
    given = words.get("cp_comm_type")
    if isinstance(given, list | tuple):
        kinds = {str(kind) for kind in cast("Sequence[object]", given)}
        if len(kinds) > 1:
            rule = f"One type for all layers is understood; the layers differ: {sorted(kinds)}."
            raise LayoutError("cp_comm_type", sorted(kinds), rule, "Give one type.")
        given = next(iter(kinds), None)
    if given is None:
        return CpComm.p2p
    if not isinstance(given, str) or given not in _CP_COMM:
        remedy = did_you_mean(str(given), _CP_COMM)
        raise LayoutError("cp_comm_type", given, "Unknown type.", remedy)
    return _CP_COMM[given]


def _hierarchical_cp(words: Words) -> tuple[int, ...] | None:
    word = "hierarchical_context_parallel_sizes"
    given = words.get(word)
    if given is None or given == []:
        return None
    if not isinstance(given, list | tuple):
        raise LayoutError(word, given, "It is a list of whole numbers.", "Write 2 2.")
    return tuple(whole_number(word, v) for v in cast("Sequence[Any]", given))


def layout_words(x: Layout[int]) -> dict[str, Any]:
    """Return the words that describe a layout; choices left at "none" are absent."""
    words: dict[str, Any] = {DEGREES[k]: getattr(x, k) for k in ("tp", "cp", "pp", "mbs")}
    if x.vpp > 1 and x.pipeline_layout is None:
        words[DEGREES["vpp"]] = x.vpp
    if x.ep > 1 or x.etp > 1:
        words[DEGREES["ep"]] = x.ep
    words[DEGREES["etp"]] = x.etp
    words["sequence_parallel"] = bool(x.sp)
    words.update(_zero_words(x))
    words.update(recompute_words(x.recompute, x.recompute_num_layers))
    if x.cp > 1 or x.cp_comm in (CpComm.all_gather, CpComm.a2a):
        words["cp_comm_type"] = CP_COMM_TEXT[CpComm(x.cp_comm)]
    if x.hierarchical_cp is not None:
        words["hierarchical_context_parallel_sizes"] = list(x.hierarchical_cp)
    for name in ("first", "last", "microbatch_group_size"):
        if getattr(x, name):
            words[DEGREES[name]] = getattr(x, name)
    words.update({word: True for name, word in _SWITCHES.items() if getattr(x, name)})
    if x.order == PP_BEFORE_DP:
        words["use_tp_pp_dp_mapping"] = True
    if x.pipeline_layout is not None:
        words["pipeline_model_parallel_layout"] = x.pipeline_layout
    return words


def _zero_words(x: Layout[int]) -> dict[str, Any]:
    words: dict[str, Any] = {}
    if x.zero != Zero.no_shard:
        words["use_distributed_optimizer"] = True
    if x.zero > Zero.optim:
        words["use_megatron_fsdp"] = True
        words["data_parallel_sharding_strategy"] = Zero(x.zero).name
    if x.dp_replicate > 1:
        words[DEGREES["dp_replicate"]] = x.dp_replicate
    return words


def recompute_words(recompute: int, num_layers: int) -> dict[str, Any]:
    """Return the words of recomputation: granularity, method, layers or modules."""
    text = recompute_to_text(recompute, num_layers)
    if text == "none":
        return {}
    if text.startswith("full"):
        _, method, layers = text.split(":") if ":" in text else ("full", "uniform", "1")
        return {
            "recompute_granularity": "full",
            "recompute_method": method,
            "recompute_num_layers": int(layers),
        }
    return {"recompute_granularity": "selective", "recompute_modules": text.split("+")}


FP8_RECIPES: Final = {
    "fp8": "delayed",
    "fp8-cs": "tensorwise",
    "fp8-mx": "mxfp8",
    "fp8-blockwise": "blockwise",
}
"""Our precision -> the word of ``fp8_recipe``."""
_SAME: Final = {
    "overlap_grad_reduce": "overlap_grad_reduce",
    "overlap_param_gather": "overlap_param_gather",
    "overlap_tp_comm": "tp_comm_overlap",
    "overlap_ep_comm": "overlap_moe_expert_parallel_comm",
    "overlap_pp_comm": "overlap_p2p_comm",
    "delay_weight_grad": "delay_wgrad_compute",
    "fused_cross_entropy": "cross_entropy_loss_fusion",
    "grouped_gemm": "moe_grouped_gemm",
    "fused_permute": "moe_permute_fusion",
    "shared_expert_overlap": "moe_shared_expert_overlap",
    "fused_softmax": "masked_softmax_fusion",
    "fused_wgrad_accumulation": "gradient_accumulation_fusion",
    "fused_experts": "use_transformer_engine_op_fuser",
}
"""A switch of ``Execution`` -> its word."""
_CUDA_GRAPHS: Final = {
    "none": "none",
    "local": "partial",
    "transformer_engine": "partial",
    "full_iteration": "full",
}


def job_of(words: Words, x: Layout[int] | None = None) -> Job:
    """Return the job that the words describe; switches that do nothing in ``x`` are at default.

    Raises ``MeshwrightError`` when ``seq_length`` or ``global_batch_size`` is missing.
    """
    for word in ("seq_length", "global_batch_size"):
        if words.get(word) is None:
            rule = "The job needs it, and it could not be read."
            raise MeshwrightError(word, None, rule, f"State {word} in the launch.")
    execution = _execution(words)
    return Job(
        seq_len=number(words, "seq_length", 1),
        gbs=number(words, "global_batch_size", 1),
        precision=_precision(words),
        task=words.get("task") or "pretrain",
        lora_rank=number(words, "lora_rank", 16),
        execution=execution if x is None else effective(execution, x, _has_experts(words)),
    )


def _precision(words: Words) -> Precision:
    """Return the precision, with gradients in 16 bits where the launch reduces them so."""
    chosen = precision(precision_of(words))
    if words.get("grad_reduce_in_bf16") and chosen.grad_bytes == 4.0:
        return replace(chosen, grad_bytes=2.0, grad_reduce_bytes=2.0)
    return chosen


def precision_of(words: Words) -> str:
    """Return the name of the precision that the words choose."""
    if words.get("fp4"):
        return "nvfp4"
    if words.get("fp8"):
        recipe = words.get("fp8_recipe") or "delayed"
        return next((p for p, r in FP8_RECIPES.items() if r == recipe), "fp8")
    if words.get("bf16"):
        return "bf16"
    return "fp16" if words.get("fp16") else "fp32"


def _execution(words: Words) -> Execution:
    values: dict[str, Any] = {k: flag(words, w, getattr(Execution(), k)) for k, w in _SAME.items()}
    graphs = words.get("cuda_graph_impl")
    values["cuda_graphs"] = _CUDA_GRAPHS.get(str(graphs), "none")
    if values["cuda_graphs"] == "partial":
        values["graphed_modules"] = _names(words, "cuda_graph_modules") - {"full"}
    if flag(words, "fine_grained_activation_offloading"):
        values["offloaded_modules"] = _names(words, "offload_modules")
    dispatcher = words.get("moe_token_dispatcher_type")
    if dispatcher == "flex":
        backend = words.get("moe_flex_dispatcher_backend") or "deepep"
        dispatcher = backend if backend in ("deepep", "hybridep") else "deepep"
    if dispatcher in ("alltoall", "allgather", "deepep", "hybridep"):
        values["dispatcher"] = dispatcher
    values["flash_attention"] = words.get("attention_backend") not in ("unfused", "local")
    factor = words.get("moe_expert_capacity_factor")
    if isinstance(factor, int | float) and factor > 0:
        values["capacity_factor"] = float(factor)
    if flag(words, "optimizer_cpu_offload"):
        fraction = words.get("optimizer_offload_fraction")
        values["optimizer_offload_fraction"] = (
            float(fraction) if isinstance(fraction, int | float) else 1.0
        )
    by_op = "recompute_every_second_matmul"
    values[by_op] = flag(words, by_op)
    values["activation_offload_layers"] = number(words, "cpu_offloading_num_layers", 0, low=0)
    return Execution(**values)


def _names(words: Words, word: str) -> frozenset[str]:
    given = words.get(word) or ()
    items = given.replace(",", " ").split() if isinstance(given, str) else given
    if not isinstance(items, Sequence):
        raise LayoutError(word, given, "It is a list of names.", "Write [attn,mlp].")
    return frozenset(str(item) for item in cast("Sequence[Any]", items))


def _has_experts(words: Words) -> bool:
    return bool(words.get("num_moe_experts")) or words.get("num_layers") is None


def effective(execution: Execution, x: Layout[int], moe: bool = True) -> Execution:
    """Return the switches with those at their default that do nothing in this layout.

    ``moe``: the model has experts.
    """
    idle: list[str] = ["overlap_cp_comm", "forced_balance"]
    if x.zero == Zero.no_shard or x.dp * x.cp == 1:
        idle.append("overlap_param_gather")
    if x.zero > Zero.optim:
        # Megatron-FSDP holds gradients in buffers of its own, which matmuls cannot add to.
        idle.append("fused_wgrad_accumulation")
    if x.dp * x.cp == 1:
        idle.append("overlap_grad_reduce")
    if x.tp == 1 or not x.sp:
        idle.append("overlap_tp_comm")
    if x.vpp == 1:
        idle.append("overlap_pp_comm")
    if x.ep == 1:
        idle += ["overlap_ep_comm", "dispatcher"]
    if not moe:
        idle += [
            "grouped_gemm",
            "fused_permute",
            "shared_expert_overlap",
            "fused_experts",
            "capacity_factor",
            "dispatcher",
        ]
    if execution.cuda_graphs != "partial":
        idle.append("graphed_modules")
    default = Execution()
    return replace(execution, **{name: getattr(default, name) for name in idle})


def precision_words(name: str) -> dict[str, Any]:
    """Return the words of a precision."""
    if name in ("bf16", "fp16"):
        return {name: True}
    if name == "fp32":
        return {}
    if name == "nvfp4":
        return {"bf16": True, "fp4": "e2m1", "fp4_recipe": "nvfp4"}
    return {"bf16": True, "fp8": "hybrid", "fp8_recipe": FP8_RECIPES[name]}


def job_words(job: Job, x: Layout[int]) -> dict[str, Any]:
    """Return the words that describe a job in this layout."""
    execution = effective(job.execution, x)
    words: dict[str, Any] = {
        "seq_length": job.seq_len,
        "global_batch_size": job.gbs,
        **precision_words(job.precision.name),
        **{word: getattr(execution, name) for name, word in _SAME.items()},
    }
    if x.tp == 1 or not x.sp:
        words["tp_comm_overlap"] = False
    if x.zero == Zero.no_shard:
        words["overlap_param_gather"] = False
    if x.ep > 1 and execution.dispatcher in ("deepep", "hybridep"):
        words["moe_token_dispatcher_type"] = "flex"
        words["moe_flex_dispatcher_backend"] = execution.dispatcher
    else:
        words["moe_token_dispatcher_type"] = execution.dispatcher
    if job.precision.grad_bytes == 2.0 and job.precision.master_bytes:
        words["grad_reduce_in_bf16"] = True
    return {**words, **_execution_words(execution), **_task_words(job)}


def _execution_words(execution: Execution) -> dict[str, Any]:
    """Return the words of the switches that are more than on or off."""
    words: dict[str, Any] = {}
    if execution.cuda_graphs != "none":
        full = execution.cuda_graphs == "full"
        words["cuda_graph_impl"] = "full_iteration" if full else "transformer_engine"
        if execution.graphed_modules:
            words["cuda_graph_modules"] = sorted(execution.graphed_modules)
    if execution.offloaded_modules:
        words["fine_grained_activation_offloading"] = True
        words["offload_modules"] = sorted(execution.offloaded_modules)
    if execution.capacity_factor is not None:
        words["moe_expert_capacity_factor"] = execution.capacity_factor
    if execution.optimizer_offload_fraction:
        words["optimizer_cpu_offload"] = True
        words["optimizer_offload_fraction"] = execution.optimizer_offload_fraction
    if execution.activation_offload_layers:
        words["cpu_offloading_num_layers"] = execution.activation_offload_layers
    if not execution.flash_attention:
        words["attention_backend"] = "unfused"
    return words


def _task_words(job: Job) -> dict[str, Any]:
    if job.task == "lora":
        return {"task": "lora", "lora_rank": job.lora_rank}
    return {"task": job.task} if job.task != "pretrain" else {}


EXECUTION_FIELDS: Final = tuple(f.name for f in fields(Execution))


def layout_word_names() -> tuple[str, ...]:
    """Return the words that ``layout_of`` reads."""
    return (
        *DEGREES.values(),
        *_SWITCHES.values(),
        "sequence_parallel",
        "num_layers_per_virtual_pipeline_stage",
        "pipeline_model_parallel_layout",
        "use_distributed_optimizer",
        "use_megatron_fsdp",
        "use_torch_fsdp2",
        "data_parallel_sharding_strategy",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "recompute_modules",
        "cp_comm_type",
        "hierarchical_context_parallel_sizes",
        "use_tp_pp_dp_mapping",
        "pipeline_schedule",
    )
