"""torchtitan's options in Megatron Core's words.

torchtitan counts tokens where others count sequences, names data parallelism instead of deriving
it, and makes the pipeline layers of embedding and head explicit. TOML files of 2025 count
sequences (``local_batch_size``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from meshwright.describe.model import Model
from meshwright.frameworks.by_path import Facts, by_path, judge
from meshwright.frameworks.launch import Reading, Setting
from meshwright.frameworks.launchers import Started
from meshwright.frameworks.overrides import Override
from meshwright.frameworks.spelling import misread
from meshwright.frameworks.torchtitan.rules import RULES
from meshwright.frameworks.words_model import find_model

TITLE: Final = "torchtitan"
_P: Final = "parallelism"

NAMES: Final = {
    "tensor_model_parallel_size": f"{_P}.tensor_parallel_degree",
    "context_parallel_size": f"{_P}.context_parallel_degree",
    "pipeline_model_parallel_size": f"{_P}.pipeline_parallel_degree",
    "expert_model_parallel_size": f"{_P}.expert_parallel_degree",
}
SCHEDULES: Final = {
    "GPipe": "gpipe",
    "1F1B": "one_f_one_b",
    "Interleaved1F1B": "interleaved",
    "ZBVZeroBubble": "zb_v",
}
"""torchtitan's schedule -> ours; others are listed as not read."""
MULTI: Final = frozenset(
    {"Interleaved1F1B", "ZBVZeroBubble", "InterleavedZeroBubble", "LoopedBFS", "DualPipeV"}
)
DEFAULTS: Final[dict[str, Any]] = {
    f"{_P}.tensor_parallel_degree": 1,
    f"{_P}.context_parallel_degree": 1,
    f"{_P}.pipeline_parallel_degree": 1,
    f"{_P}.expert_parallel_degree": 1,
    f"{_P}.data_parallel_shard_degree": -1,
    f"{_P}.data_parallel_replicate_degree": 1,
    f"{_P}.enable_sequence_parallel": True,
    f"{_P}.pipeline_parallel_schedule": "1F1B",
    f"{_P}.pipeline_parallel_first_stage_less_layers": 1,
    f"{_P}.pipeline_parallel_last_stage_less_layers": 1,
    f"{_P}.fsdp_reshard_after_forward": "default",
    f"{_P}.num_pp_microbatches": 1,
}


def read(
    found: Sequence[Override],
    chosen: Started | None,
    gpus: int | None,
    env: Mapping[str, object],
) -> Reading:
    """Read the options of a launch on ``gpus`` ranks (None: not known)."""
    reading = Reading(argv=[f"--{o.path}={o.value}" for o in found])
    known = dict(_switch(o) for o in by_path(found).values())
    ngpu = env.get("NGPU")
    if gpus is None and isinstance(ngpu, str) and ngpu.isdecimal() and len(ngpu) < 7:
        reading.gpus = int(ngpu) or None
    facts = Facts(known, reading, DEFAULTS, gpus or reading.gpus, env)
    for word, path in NAMES.items():
        reading.settings[word] = _setting(known, path, facts[path])
    model = _model(reading, known, chosen, env)
    _sequence_parallel(reading, known, facts)
    facts.gpus = facts.gpus or _stated_world(facts)
    reading.gpus = reading.gpus or facts.gpus
    _data_parallel(reading, known, facts)
    _pipeline(reading, known, facts, model)
    _batch(reading, known, facts)
    _precision_and_checkpointing(reading, known, facts)
    reading.findings = [*misread(known, NAMES, DEFAULTS, RULES), *judge(RULES, facts)]
    return reading


def _switch(override: Override) -> tuple[str, Override]:
    """Return path and override; ``section.no_name`` turns ``section.name`` off."""
    path = re.sub(r"^(config|cfg)\.", "", override.path)
    section, _, name = path.rpartition(".")
    if override.value is True and name.startswith("no_"):
        return f"{section}.{name.removeprefix('no_')}", replace(override, value=False)
    return path, override


def _setting(known: Mapping[str, Override], path: str, value: Any) -> Setting:
    if path in known:
        return Setting(value=value, origin=known[path].origin)
    return Setting(value=value, origin=f"default of {TITLE}")


def _model(
    reading: Reading,
    known: Mapping[str, Override],
    chosen: Started | None,
    env: Mapping[str, object],
) -> Model | None:
    name, flavor = known.get("model.name"), known.get("model.flavor")
    text, origin = "", ""
    if name is not None and flavor is not None:
        text, origin = f"{name.value}-{flavor.value}", name.origin
    words = [w.text for w in chosen.args] if chosen is not None else []
    for at, word in enumerate(words[:-1]):
        if word == "--config":
            text, origin = words[at + 1], "--config"
    stated = known.get("job.config_file")
    file = env.get("CONFIG_FILE") if stated is None else stated.value
    if not text and isinstance(file, str):
        text = re.sub(r"\.toml$", "", file.rpartition("/")[2])
        origin = "CONFIG_FILE" if stated is None else stated.origin
    if not text and isinstance(env.get("CONFIG"), str):
        text, origin = str(env["CONFIG"]), "CONFIG"
    if text:
        reading.settings["model"] = Setting(value=text, origin=origin)
    return find_model(text) if text else None


def _sequence_parallel(reading: Reading, known: Mapping[str, Override], facts: Facts) -> None:
    path = f"{_P}.enable_sequence_parallel"
    reading.settings["sequence_parallel"] = _setting(known, path, facts[path])
    if f"{_P}.disable_sequence_parallel" in known:
        off = known[f"{_P}.disable_sequence_parallel"]
        reading.settings["sequence_parallel"] = Setting(value=off.value is False, origin=off.origin)
    if facts.degree("context_parallel_size") > 1:
        reading.default("cp_comm_type", "all_gather", TITLE)


def _stated_world(facts: Facts) -> int | None:
    shard = facts.whole(f"{_P}.data_parallel_shard_degree")
    replicate = facts.whole(f"{_P}.data_parallel_replicate_degree")
    if shard is None or replicate is None or shard < 1 or replicate < 1:
        return None
    world = shard * replicate * facts.model_parallel
    return world if world <= 2**20 else None


def _data_parallel(reading: Reading, known: Mapping[str, Override], facts: Facts) -> None:
    shard_path, replicate_path = (
        f"{_P}.data_parallel_shard_degree",
        f"{_P}.data_parallel_replicate_degree",
    )
    shard, replicate = facts.whole(shard_path), facts.whole(replicate_path) or 1
    if shard is not None and shard < 1 and facts.dp is not None:
        shard = max(facts.dp // max(replicate, 1), 1)
    whole = shard is not None and shard * facts.degree("context_parallel_size") == 1
    sharded = not whole or replicate == 1
    reshard = f"{_P}.fsdp_reshard_after_forward"
    if sharded:
        never = facts[reshard] == "never" or (
            facts[reshard] == "default" and facts.degree("pipeline_model_parallel_size") > 1
        )
        strategy = "optim_grads" if never else "optim_grads_params"
        reading.settings["use_megatron_fsdp"] = _setting(known, shard_path, True)
        reading.settings["data_parallel_sharding_strategy"] = _setting(known, reshard, strategy)
        if replicate > 1:
            reading.settings["num_distributed_optimizer_instances"] = _setting(
                known, replicate_path, replicate
            )


def _pipeline(
    reading: Reading, known: Mapping[str, Override], facts: Facts, model: Model | None
) -> None:
    pp = facts.degree("pipeline_model_parallel_size")
    if pp == 1:
        return
    path = f"{_P}.pipeline_parallel_schedule"
    schedule = str(facts[path])
    if schedule in SCHEDULES:
        reading.settings["pipeline_schedule"] = _setting(known, path, SCHEDULES[schedule])
    else:
        reading.unread.append(f"{path} = {schedule}: a schedule that is not priced; read as 1F1B")
    less = [
        facts.whole(f"{_P}.pipeline_parallel_{which}_stage_less_layers") or 0
        for which in ("first", "last")
    ]
    per_stage = facts.whole(f"{_P}.pipeline_parallel_layers_per_stage")
    vpp = 2 if schedule in MULTI else 1
    if per_stage is not None and per_stage > 0 and model is not None:
        stages = -(-(model.num_layers + sum(less)) // per_stage)
        vpp = max(stages // pp, 1)
    if schedule in MULTI or vpp > 1:
        reading.settings["virtual_pipeline_model_parallel_size"] = _setting(known, path, vpp)
    if model is not None:
        _placement(reading, model.num_layers, pp * vpp, less)


def _placement(reading: Reading, layers: int, stages: int, less: Sequence[int]) -> None:
    """Tell where the layers go: the first and the last stage hold fewer by ``less``."""
    origin = f"{TITLE}'s split of {layers} layers"
    counted = layers + sum(less)
    if list(less) == [0, 0] and layers % stages == 0:
        return
    if set(less) <= {0, 1} and counted % stages == 0:
        for word, number in zip(("embedding", "loss"), less, strict=True):
            if number:
                name = f"account_for_{word}_in_pipeline_split"
                reading.settings[name] = Setting(value=True, origin=origin)
        return
    sizes = [counted // stages + (s < counted % stages) for s in range(min(stages, 4096))]
    sizes[0], sizes[-1] = sizes[0] - less[0], sizes[-1] - less[1]
    if min(sizes) < 0 or stages < 2:
        return
    parts = ["t" * n for n in sizes]
    parts[0], parts[-1] = "E" + parts[0], parts[-1] + "L"
    text = "|".join(parts)
    reading.settings["pipeline_model_parallel_layout"] = Setting(value=text, origin=origin)


def _batch(reading: Reading, known: Mapping[str, Override], facts: Facts) -> None:
    if facts.whole("training.seq_len") is not None or facts.given("training.local_batch_size"):
        _batch_of_2025(reading, known, facts)
        return
    seq = facts.whole("training.max_context_length")
    micro = facts.whole("training.num_tokens_per_microbatch_per_dp_rank")
    if seq is None or seq < 1:
        return
    path = "training.max_context_length"
    reading.settings["seq_length"] = _setting(known, path, seq)
    if micro is None or micro < 1:
        return
    path = "training.num_tokens_per_microbatch_per_dp_rank"
    reading.settings["micro_batch_size"] = _setting(known, path, max(micro // seq, 1))
    if micro % seq:
        reading.unread.append(f"{path} = {micro}: no whole number of {seq}-token sequences")
    step = facts.whole("training.num_tokens_per_train_step")
    if (step is None or step < 0) and facts.dp is not None:
        step = micro * (facts.whole(f"{_P}.num_pp_microbatches") or 1) * facts.dp
    if step is not None and step >= seq:
        path = "training.num_tokens_per_train_step"
        reading.settings["global_batch_size"] = _setting(known, path, step // seq)


def _batch_of_2025(reading: Reading, known: Mapping[str, Override], facts: Facts) -> None:
    seq, local = facts.whole("training.seq_len"), facts.whole("training.local_batch_size")
    if seq is not None:
        reading.settings["seq_length"] = _setting(known, "training.seq_len", seq)
    if local is None or local < 1:
        local = facts.whole("training.batch_size") or 8
    micro_path, micro = "training.local_batch_size", local
    if facts.degree("pipeline_model_parallel_size") > 1:
        micro_path = f"{_P}.pipeline_parallel_microbatch_size"
        micro = facts.whole(micro_path) or 1
    reading.settings["micro_batch_size"] = _setting(known, micro_path, micro)
    total = facts.whole("training.global_batch_size")
    if (total is None or total < 1) and facts.dp is not None:
        total = local * facts.dp
    if total is not None and total > 0:
        path = "training.global_batch_size"
        reading.settings["global_batch_size"] = _setting(known, path, total)


def _precision_and_checkpointing(
    reading: Reading, known: Mapping[str, Override], facts: Facts
) -> None:
    path = "training.mixed_precision_param"
    dtype = facts[path] or "bfloat16"
    reading.settings["bf16"] = _setting(known, path, dtype == "bfloat16")
    converters = str(facts["model.converters"] or "")
    if "float8" in converters or "mx" in converters:
        recipe = "mxfp8" if "mx" in converters else "tensorwise"
        reading.settings["fp8"] = _setting(known, "model.converters", "hybrid")
        reading.settings["fp8_recipe"] = _setting(known, "model.converters", recipe)
    mode = facts["activation_checkpoint.mode"]
    if mode == "full":
        path = "activation_checkpoint.mode"
        for word, value in (("recompute_granularity", "full"), ("recompute_method", "uniform")):
            reading.settings[word] = _setting(known, path, value)
        reading.settings["recompute_num_layers"] = _setting(known, path, 1)
    elif mode == "selective" and facts["activation_checkpoint.selective_ac_option"] == "op":
        path = "activation_checkpoint.selective_ac_option"
        reading.settings["recompute_every_second_matmul"] = _setting(known, path, True)
    elif mode not in (None, "none"):
        reading.unread.append(
            f"activation_checkpoint.mode = {mode}: it keeps chosen operations, which no layout"
            " says; read as none"
        )
    counts_tokens = facts.whole("training.num_tokens_per_microbatch_per_dp_rank") is not None
    if counts_tokens and facts["training.disable_cuda_graphs"] is not True:
        reading.default("cuda_graph_impl", "full_iteration", TITLE)
