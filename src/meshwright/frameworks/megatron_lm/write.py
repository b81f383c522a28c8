"""A layout as a Megatron-LM command line."""

from __future__ import annotations

from typing import Any, Final

from meshwright.findings import Finding
from meshwright.frameworks.megatron_lm.arguments import by_name
from meshwright.frameworks.megatron_lm.read import ATTRIBUTES, TITLE, flag_for
from meshwright.frameworks.words import job_words, layout_words
from meshwright.frameworks.words_model import model_words, unwritable
from meshwright.frameworks.written import (
    Target,
    Variable,
    Written,
    megatron_environment,
    megatron_refusals,
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
    found = megatron_refusals(target.layout, TITLE)
    problem = unwritable(target.model)
    if problem is not None:
        found.append(refusal("model", target.model.name, problem.rule, problem.remedy))
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
    arguments["TRAINING_ARGS"] = _training(target)
    if not arguments["MOE_ARGS"]:
        del arguments["MOE_ARGS"]
    sharded = target.layout.zero > Zero.optim
    return Written(
        program='"$MEGATRON_PATH/pretrain_gpt.py"',
        arguments=arguments,
        variables=(
            Variable(
                name="MEGATRON_PATH",
                default="/path/to/Megatron-LM",
                comment="a checkout of Megatron-LM",
            ),
            Variable(
                name="DATA_PATH",
                default="/path/to/data_text_document",
                comment="preprocessed data, without .bin and .idx",
            ),
            Variable(
                name="TOKENIZER_MODEL",
                default="/path/to/tokenizer",
                comment="a Hugging Face tokenizer",
            ),
            Variable(name="CHECKPOINTS", default="checkpoints", comment="where to save"),
            Variable(name="TRAIN_ITERS", default="1000", comment="optimizer steps"),
        ),
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


def _training(target: Target) -> list[list[str]]:
    lines = [
        ["--train-iters", "$TRAIN_ITERS"],
        ["--lr", "3.0e-4"],
        ["--min-lr", "3.0e-5"],
        ["--lr-decay-style", "cosine"],
        ["--lr-warmup-fraction", "0.01"],
        ["--weight-decay", "0.1"],
        ["--clip-grad", "1.0"],
        ["--adam-beta1", "0.9"],
        ["--adam-beta2", "0.95"],
        ["--attention-dropout", "0.0"],
        ["--tokenizer-type", "HuggingFaceTokenizer"],
        ["--tokenizer-model", "$TOKENIZER_MODEL"],
        ["--data-path", "$DATA_PATH"],
        ["--split", "99,1,0"],
        ["--save", "$CHECKPOINTS"],
        ["--save-interval", "500"],
        ["--eval-iters", "0"],
        ["--log-interval", "1"],
        ["--log-throughput"],
    ]
    if target.model.is_mla:
        lines.append(["--no-rope-fusion"])
    return lines
