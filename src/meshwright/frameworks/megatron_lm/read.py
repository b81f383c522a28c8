"""Megatron-LM's flags, an argument dump from its log, and what both say in Megatron Core's words.

The command line is resolved by the rules of ``launch``, so that values which Megatron-LM changes
are read as it ends up using them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from meshwright.findings import Finding
from meshwright.frameworks.launch import Reading, Setting
from meshwright.frameworks.megatron_lm.arguments import Argument, arguments, by_name
from meshwright.frameworks.megatron_lm.launch import Resolved, resolve
from meshwright.frameworks.overrides import Override, origin_of, value_of
from meshwright.frameworks.shell import Word
from meshwright.parallel.layout import minimum_world_size

TITLE: Final = "Megatron-LM"
MOST_GPUS: Final = 2**20
MOST_REFUSED: Final = 8

_RENAMED: Final = {
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "num_moe_experts": "num_experts",
    "gated_linear_unit": "swiglu",
}
"""Megatron Core's word -> the attribute of Megatron-LM's arguments, where they differ."""

_SAME: Final = (
    *("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel"),
    *("micro_batch_size", "global_batch_size", "seq_length", "use_distributed_optimizer"),
    *("use_megatron_fsdp", "use_torch_fsdp2", "data_parallel_sharding_strategy"),
    *("num_distributed_optimizer_instances", "recompute_granularity", "recompute_method"),
    *("recompute_num_layers", "recompute_modules", "cp_comm_type"),
    *("hierarchical_context_parallel_sizes", "account_for_embedding_in_pipeline_split"),
    *("account_for_loss_in_pipeline_split", "use_tp_pp_dp_mapping"),
    *("pipeline_model_parallel_layout", "virtual_pipeline_model_parallel_size"),
    *("bf16", "fp16", "fp8", "fp8_recipe", "fp4", "fp4_recipe", "overlap_grad_reduce"),
    *("overlap_param_gather", "tp_comm_overlap", "overlap_moe_expert_parallel_comm"),
    *("overlap_p2p_comm", "delay_wgrad_compute", "cuda_graph_impl", "moe_token_dispatcher_type"),
    *("moe_flex_dispatcher_backend", "attention_backend", "cross_entropy_loss_fusion"),
    "moe_permute_fusion",
    *("moe_grouped_gemm", "moe_shared_expert_overlap", "moe_expert_capacity_factor"),
    *("optimizer_cpu_offload", "optimizer_offload_fraction", "cpu_offloading_num_layers"),
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "vocab_size", "padded_vocab_size", "max_position_embeddings"),
    *("position_embedding_type", "normalization", "qk_layernorm", "add_qkv_bias"),
    *("add_bias_linear", "hidden_dropout", "moe_router_topk", "moe_ffn_hidden_size"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_layer_freq"),
    *("moe_router_enable_expert_bias", "mtp_num_layers", "multi_latent_attention"),
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    *("window_size", "window_attn_skip_freq", "softmax_type"),
    *("moe_aux_loss_coeff", "moe_router_load_balancing_type"),
    *("make_vocab_size_divisible_by", "grad_reduce_in_bf16", "masked_softmax_fusion"),
    "eval_micro_batch_size",
    *("gradient_accumulation_fusion", "use_transformer_engine_op_fuser"),
    *("cuda_graph_modules", "fine_grained_activation_offloading", "offload_modules"),
)
"""Words that are attributes of Megatron-LM's arguments."""

ATTRIBUTES: Final = {**{word: word for word in _SAME}, **_RENAMED}
_ONLY_IF_GIVEN: Final = frozenset({"microbatch_group_size_per_vp_stage"})
_MLA_ONLY: Final = frozenset(
    {"q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"}
)


def read(
    args: Sequence[Word], gpus: int | None, env: Mapping[str, object] | None = None
) -> Reading:
    """Read Megatron-LM flags that are started on ``gpus`` ranks (None: not known)."""
    reading = Reading(gpus=gpus)
    argv, origins = _flags(args, reading)
    reading.argv = argv
    if gpus is None:
        gpus = _smallest_world(argv)
        reading.assumed.append(
            f"{gpus} GPUs: the launch does not say how many; the smallest world is taken"
        )
    refused: list[Finding] = []
    resolved = resolve(argv, min(gpus, MOST_GPUS), env)
    while _is_refused(resolved) and len(refused) < MOST_REFUSED:
        refused.append(resolved.findings[0])
        shorter = _without(argv, refused[-1].field)
        if len(shorter) == len(argv):
            break
        argv = shorter
        resolved = resolve(argv, min(gpus, MOST_GPUS), env)
    left = [] if _is_refused(resolved) else resolved.findings
    reading.findings = [*refused, *left]
    reading.settings = settings_of(resolved, origins, TITLE)
    return reading


def _is_refused(resolved: Resolved) -> bool:
    return bool(resolved.findings) and resolved.findings[0].id == "MLM-ARGPARSE"


def _without(argv: Sequence[str], flag: str) -> list[str]:
    """Return the command line without a flag that was refused, so that the rest can be read."""
    out: list[str] = []
    skipping = False
    for word in argv:
        if word.startswith("--"):
            skipping = word.partition("=")[0] == flag
        if not skipping:
            out.append(word)
    return out


def read_settings(
    found: Sequence[Override], gpus: int | None, env: Mapping[str, object] | None = None
) -> Reading:
    """Read settings by name, as a YAML configuration of Megatron-LM has them."""
    words: list[Word] = []
    lost: list[str] = []
    for override in found:
        argument = by_name().get(override.path.rpartition(".")[2])
        if argument is None:
            lost.append(f"{override.origin}: there is no such argument")
        elif override.value is not None:
            words += [Word(text, 0) for text in flag_for(argument, override.value)]
    reading = read(words, gpus, env)
    reading.unread += lost[:50]
    return reading


def _flags(args: Sequence[Word], reading: Reading) -> tuple[list[str], dict[str, str]]:
    """Return the flags whose values are known, and where each attribute is given.

    A flag with a value that is not known is left out and listed, unless the value is only a text.
    """
    table, argv, origins, at = arguments(), list[str](), dict[str, str](), 0
    while at < len(args):
        word = args[at]
        name, sign, value = word.text.partition("=")
        argument = table.get(name)
        end = at + 1
        while argument is not None and not sign and argument.action == "store" and end < len(args):
            following = args[end].text
            if following.startswith("--") or (end > at + 1 and argument.nargs in ("", "1")):
                break
            end += 1
        group = args[at:end]
        if argument is not None and sign:
            group = [word, Word(value, word.line, word.variables, word.unknown)]
        if _is_known(word, argument, group):
            argv += [w.text for w in args[at:end]]
            if argument is not None:
                through = group[1] if len(group) > 1 else word
                origins[argument.name] = origin_of(through, name)
        else:
            _list_unread(reading, word, group)
        at = end
    return argv, origins


def _is_known(word: Word, argument: Argument | None, group: Sequence[Word]) -> bool:
    if argument is None:
        return not word.unknown
    is_text = argument.type == "str" and not argument.choices
    return is_text or not any(w.unknown for w in group[1:])


def _list_unread(reading: Reading, word: Word, group: Sequence[Word]) -> None:
    what = " ".join(dict.fromkeys(u for w in group for u in w.unknown))
    text = " ".join(w.text for w in group)[:120]
    reading.unread.append(f"line {word.line}: {text}: {what} is not known without running it")


def _smallest_world(argv: Sequence[str]) -> int:
    values: dict[str, int] = {}
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        name, sign, joined = flag.partition("=")
        text = joined if sign else value
        if name in _DEGREE_FLAGS and re.fullmatch(r"\d{1,6}", text):
            values[_DEGREE_FLAGS[name]] = max(int(text), 1)
    tp, ep = values.get("tp", 1), values.get("ep", 1)
    etp = values.get("etp", tp if "--num-experts" in argv else 1)
    world = minimum_world_size(tp, values.get("cp", 1), values.get("pp", 1), ep, etp)
    return min(world, MOST_GPUS)


_DEGREE_FLAGS: Final = {
    "--tensor-model-parallel-size": "tp",
    "--context-parallel-size": "cp",
    "--pipeline-model-parallel-size": "pp",
    "--expert-model-parallel-size": "ep",
    "--expert-tensor-parallel-size": "etp",
}


def settings_of(resolved: Resolved, origins: Mapping[str, str], title: str) -> dict[str, Setting]:
    """Return what a resolved launch says in Megatron Core's words.

    ``origins`` has the place of every attribute that was given, ``title`` the framework's name.
    """
    values = resolved.values
    settings: dict[str, Setting] = {}
    for word, attribute in ATTRIBUTES.items():
        value = values.get(attribute)
        if value is not None:
            settings[word] = Setting(
                value=value, origin=_origin(attribute, resolved, origins, title)
            )
    for word in _ONLY_IF_GIVEN & origins.keys():
        settings[word] = Setting(value=values[word], origin=origins[word])
    if not values.get("group_query_attention") and not values.get("multi_latent_attention"):
        settings.pop("num_query_groups", None)
    if not values.get("multi_latent_attention"):
        for word in _MLA_ONLY:
            settings.pop(word, None)
    untied = "untie_embeddings_and_output_weights"
    settings["share_embeddings_and_output_weights"] = Setting(
        value=not values.get(untied), origin=_origin(untied, resolved, origins, title)
    )
    if values.get("sft"):
        settings["task"] = Setting(value="sft", origin=_origin("sft", resolved, origins, title))
    if settings.get("window_size"):
        settings["window_size"] = Setting(
            value=list(values["window_size"]), origin=settings["window_size"].origin
        )
    return settings


def _origin(attribute: str, resolved: Resolved, origins: Mapping[str, str], title: str) -> str:
    source = resolved.sources.get(attribute, "default")
    if source == "default":
        return f"default of {title}"
    if source == "flag":
        return origins.get(attribute, "given")
    return f"derived by {title}" if source == "derived" else f"changed by {title} ({source})"


_DUMP_LINE: Final = re.compile(r"^(?:.{0,60}?[\]:] )?\s{1,4}([a-z]\w{1,80}) \.{2,80} (.{0,500})$")
_DUMP_START: Final = re.compile(r"-{4,} arguments -{4,}")
_DUMP_END: Final = re.compile(r"-{4,} end of arguments -{4,}")


def read_dump(text: str) -> Reading:
    """Read the argument dump of a log: every argument as Megatron-LM used it."""
    reading = Reading()
    start = _DUMP_START.search(text)
    end = _DUMP_END.search(text, start.end() if start else 0)
    body = text[start.end() if start else 0 : end.start() if end else len(text)]
    if end is None:
        reading.unread.append("the end of the argument dump is missing")
    words = {attribute: word for word, attribute in ATTRIBUTES.items()}
    values: dict[str, Any] = {}
    for line in body.splitlines()[:5000]:
        match = _DUMP_LINE.match(line)
        if match is not None:
            values[match[1]] = _dumped(match[1], match[2].strip())
    for name, value in values.items():
        if name in words and value is not None:
            reading.settings[words[name]] = Setting(value=value, origin=f"{name} in the log")
    if "untie_embeddings_and_output_weights" in values:
        reading.settings["share_embeddings_and_output_weights"] = Setting(
            value=not values["untie_embeddings_and_output_weights"],
            origin="untie_embeddings_and_output_weights in the log",
        )
    if not values.keys() & {"bf16", "fp16"} and "torch.bfloat16" in text:
        reading.settings["bf16"] = Setting(value=True, origin="torch.bfloat16 in the log")
    world = values.get("world_size")
    reading.gpus = world if isinstance(world, int) and 0 < world <= MOST_GPUS else None
    reading.argv = _as_flags(values)
    return reading


def _dumped(name: str, text: str) -> Any:
    """Return a value as Python printed it."""
    value = value_of(text)
    if name == "data_parallel_sharding_strategy" or isinstance(value, str):
        return value if not isinstance(value, str) else value.strip("'\"")
    return value


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    """Return the flags that give the dumped values where they are not the defaults."""
    argv: list[str] = []
    for name, value in values.items():
        argument = by_name().get(name)
        if argument is None or value is None or value == argument.default:
            continue
        argv += flag_for(argument, value)
    return argv


def flag_for(argument: Argument, value: Any) -> list[str]:
    """Return the words of a command line that give an argument a value."""
    flag = argument.flags[0]
    if argument.action == "on":
        return [flag] if value else []
    if argument.action == "off":
        return [] if value else [flag]
    if argument.action == "on_off":
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, list | tuple):
        if argument.type == "ints":
            return [flag, ",".join(map(str, value))]  # pyright: ignore[reportUnknownArgumentType]
        if argument.type == "pattern":
            return [flag, f"([{','.join(map(str, value))}])"]  # pyright: ignore[reportUnknownArgumentType]
        return [flag, *map(str, value)]  # pyright: ignore[reportUnknownArgumentType]
    return [flag, str(value)]
