"""A layout as a Megatron-LM command line."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, Final

from meshwright.describe.job import Execution
from meshwright.findings import Finding
from meshwright.frameworks.carried import Place, Unexpanded, Values, training_of
from meshwright.frameworks.megatron_lm.arguments import Argument, arguments, by_name
from meshwright.frameworks.megatron_lm.read import ATTRIBUTES, TITLE, flag_for
from meshwright.frameworks.overrides_text import text_of
from meshwright.frameworks.words import job_words, layout_words
from meshwright.frameworks.words_model import model_words, published_words, unwritable
from meshwright.frameworks.written import (
    Target,
    Variable,
    Written,
    megatron_environment,
    megatron_refusals,
    model_refusals,
    refusal,
)
from meshwright.parallel.layout import Zero

_GROUPS: Final = {
    "MODEL_ARGS": (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
        *("num_query_groups", "kv_channels", "vocab_size", "max_position_embeddings"),
        *("position_embedding_type", "normalization", "qk_layernorm", "add_qkv_bias"),
        *("add_bias_linear", "gated_linear_unit", "share_embeddings_and_output_weights"),
        *("hidden_dropout", "multi_latent_attention", "q_lora_rank", "kv_lora_rank"),
        *("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "mtp_num_layers"),
        *("window_size", "window_attn_skip_freq", "softmax_type"),
    ),
    "MOE_ARGS": (
        *("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_layer_freq"),
        *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
        *("moe_router_enable_expert_bias", "moe_router_score_function", "moe_grouped_gemm"),
        *("moe_token_dispatcher_type", "moe_flex_dispatcher_backend"),
        *("moe_expert_capacity_factor", "moe_shared_expert_overlap", "moe_permute_fusion"),
    ),
    "PARALLEL_ARGS": (),
}
"""Which array of the script a word stands in; the rest is how it is split."""


def unsupported(target: Target) -> list[Finding]:
    """Return what Megatron-LM cannot express."""
    found = megatron_refusals(target, TITLE)
    problem = unwritable(target.model)
    if problem is not None:
        found.append(refusal("model", target.model.name, problem.rule, problem.remedy))
    found += model_refusals(target, TITLE)
    if target.job.task == "lora":
        rule = f"{TITLE} trains all weights; it has no LoRA."
        found.append(refusal("job.task", "lora", rule, "Use megatron-bridge, nemo or skyrl."))
    return found


def write(target: Target) -> Written:
    """Return the launch of ``pretrain_gpt.py``."""
    words = flag_words(target)
    arguments = {name: _lines(words, names) for name, names in _GROUPS.items() if names}
    placed = {word for names in _GROUPS.values() for word in names}
    arguments["PARALLEL_ARGS"] = _lines(words, [w for w in words if w not in placed])
    given = {line[0] for lines in arguments.values() for line in lines}
    arguments["TRAINING_ARGS"] = [ln for ln in _training(target) if ln[0] not in given]
    if not arguments["MOE_ARGS"]:
        del arguments["MOE_ARGS"]
    sharded = target.layout.zero > Zero.optim
    return Written(
        program='"$MEGATRON_PATH/pretrain_gpt.py"',
        arguments=arguments,
        variables=_variables(target, arguments),
        env=megatron_environment(target),
        unset=("CUDA_DEVICE_MAX_CONNECTIONS",) if sharded else (),
    )


def flag_words(target: Target) -> dict[str, Any]:
    """Return the words of model, layout and job that Megatron-LM has flags for."""
    words = {
        **model_words(target.model),
        **layout_words(target.layout),
        **job_words(target.job, target.layout),
    }
    positions = words.get("max_position_embeddings", 0)
    if words["position_embedding_type"] == "rope":
        words["max_position_embeddings"] = max(positions, target.job.seq_len)
    if not target.model.is_moe:
        words = {w: v for w, v in words.items() if not w.startswith(("moe_", "expert_"))}
    if words.get("use_megatron_fsdp"):
        words["ckpt_format"] = "fsdp_dtensor"
        words["gradient_accumulation_fusion"] = False
    return words


def _lines(words: dict[str, Any], names: Any) -> list[list[str]]:
    return [line for name in names if name in words for line in _flags(name, words)]


def _flags(word: str, words: dict[str, Any]) -> list[list[str]]:
    value = words[word]
    if word == "share_embeddings_and_output_weights":
        return [] if value else [["--untie-embeddings-and-output-weights"]]
    if word == "virtual_pipeline_model_parallel_size":
        return [["--num-virtual-stages-per-pipeline-rank", str(value)]]
    if word == "num_query_groups" and value == words.get("num_attention_heads"):
        return []
    if word == "task":
        return [["--sft"]] if value == "sft" else []
    argument = by_name().get(ATTRIBUTES.get(word, word))
    if argument is None or value is None:
        return []
    if word in _ALWAYS or value != argument.default:
        flags = flag_for(argument, value)
        lines = [flags] if flags else []
        return [["--group-query-attention"], *lines] if word == "num_query_groups" else lines
    return []


_ALWAYS: Final = frozenset(
    {
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "num_query_groups",
        "micro_batch_size",
        "data_parallel_sharding_strategy",
    }
)


TRAINING: Final = {name: argument.flags[0] for name, argument in by_name().items()}
"""Every argument is one that Megatron-LM can be told."""

_DEFAULTS: Final = {
    "train_iters": "$TRAIN_ITERS",
    "lr": "3.0e-4",
    "min_lr": "3.0e-5",
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": "0.01",
    "weight_decay": "0.1",
    "clip_grad": "1.0",
    "adam_beta1": "0.9",
    "adam_beta2": "0.95",
    "attention_dropout": "0.0",
    "layernorm_epsilon": "$NORM_EPSILON",
    "tokenizer_type": "HuggingFaceTokenizer",
    "tokenizer_model": "$TOKENIZER_MODEL",
    "data_path": "$DATA_PATH",
    "split": "99,1,0",
    "save": "$CHECKPOINTS",
    "save_interval": "500",
    "eval_iters": "0",
    "log_interval": "1",
    "log_throughput": "true",
}
_VARIABLES: Final = (
    Variable(name="DATA_PATH", default="/path/to/data_text_document", comment="see below"),
    Variable(
        name="TOKENIZER_MODEL", default="/path/to/tokenizer", comment="a Hugging Face tokenizer"
    ),
    Variable(name="CHECKPOINTS", default="checkpoints", comment="where to save"),
    Variable(name="PRETRAINED", default="/path/to/checkpoint", comment="the weights to tune"),
    Variable(name="TRAIN_ITERS", default="1000", comment="optimizer steps"),
    Variable(name="ROTARY_BASE", default="10000", comment="rope_theta of the model's config.json"),
    Variable(
        name="NORM_EPSILON", default="1e-5", comment="rms_norm_eps of the model's config.json"
    ),
)
_DATA: Final = {
    "pretrain": "preprocessed data, without .bin and .idx",
    "sft": "conversations, one JSON object a line",
}
_RENAMED: Final = {
    **{attribute: word for word, attribute in ATTRIBUTES.items()},
    "group_query_attention": "num_query_groups",
    "untie_embeddings_and_output_weights": "share_embeddings_and_output_weights",
    "num_layers_per_virtual_pipeline_stage": "virtual_pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
    "recompute_activations": "recompute_granularity",
    "accumulate_allreduce_grads_in_fp32": "grad_reduce_in_bf16",
    "sft": "task",
}
"""Megatron-LM's attribute -> the word that says the same of a plan."""


@cache
def places() -> dict[str, Place]:
    """Return what Megatron-LM's flags are called."""
    return {
        flag: Place(
            _RENAMED.get(argument.name, argument.name), _bare(flag, argument), _most(argument)
        )
        for flag, argument in arguments().items()
    }


def _bare(flag: str, argument: Argument) -> str:
    negated = argument.action == "on_off" and flag != argument.flags[0]
    return "false" if negated or argument.action == "off" else "true"


def _needed(execution: Execution) -> dict[str, Values]:
    """Return what Megatron-LM asks for beside a switch of the plan."""
    needed: dict[str, Values] = {}
    if execution.cuda_graphs != "none":
        needed["te_rng_tracker"] = ("true",)
    if execution.cuda_graphs == "full":
        needed["check_for_nan_in_loss_and_grad"] = ("false",)
    if execution.optimizer_offload_fraction:
        needed["use_precision_aware_optimizer"] = ("true",)
    return needed


def _most(argument: Argument) -> int:
    if argument.action != "store":
        return 0
    return 1 if argument.nargs in ("", "1", "?") else MOST_VALUES


MOST_VALUES: Final = 10_000


def _training(target: Target) -> list[list[str]]:
    defaults = {n: Unexpanded(v) if "$" in v else v for n, v in _DEFAULTS.items()}
    if target.job.task == "sft":
        defaults["tokenizer_type"] = "SFTTokenizer"
        if "load" not in target.carried.training:
            defaults["pretrained_checkpoint"] = Unexpanded("$PRETRAINED")
    if model_words(target.model)["position_embedding_type"] == "rope":
        defaults["rotary_base"] = Unexpanded("$ROTARY_BASE")
    defaults |= {n: text_of(value) for n, value in published_words(target.model).items()}
    if target.model.is_mla:
        defaults["apply_rope_fusion"] = "false"
    found = {**training_of(target.carried, defaults), **_needed(target.job.execution)}
    return [line for name, values in found.items() if (line := _line(name, values))]


def _line(name: str, values: Values) -> list[str]:
    argument = by_name()[name]
    if argument.action == "store":
        return [argument.flags[0], *values]
    return flag_for(argument, values[0] == "true")


def _variables(target: Target, groups: dict[str, list[list[str]]]) -> list[Variable]:
    """Return the variables that the arguments use."""
    used = {word for lines in groups.values() for line in lines for word in line}
    about = _DATA["sft" if target.job.task == "sft" else "pretrain"]
    first = Variable(
        name="MEGATRON_PATH", default="/path/to/Megatron-LM", comment="a checkout of Megatron-LM"
    )
    rest = [v for v in _VARIABLES if f"${v.name}" in used]
    return [first, *(replace(v, comment=about) if v.name == "DATA_PATH" else v for v in rest)]
