"""What SkyRL's SFT trainer refuses or changes; ids of the August 2026 snapshot."""

from __future__ import annotations

import math
from typing import Final

from meshwright.frameworks.by_path import Facts, Rule, below, near_multiples, when, world
from meshwright.frameworks.skyrl.rules import SFT, cp_padding, shared

_TP: Final = "tensor_model_parallel_size"
_PP: Final = "pipeline_model_parallel_size"


def _megatron(f: Facts) -> bool:
    return f["strategy"] == "megatron"


def _packs(f: Facts) -> bool:
    return f["use_sequence_packing"] is True


def _sft_batch(f: Facts) -> object:
    batch, gpus = f.whole("batch_size"), f.gpus
    if batch is None or gpus is None or batch <= 0 or gpus % f.model_parallel:
        return None
    unit = gpus // (f.degree(_TP) * f.degree(_PP))
    if batch % unit == 0:
        return None
    return {"batch": batch, "unit": unit, "near": near_multiples(batch, unit)}


def _sft_micro(f: Facts) -> object:
    batch, micro, dp = f.whole("batch_size"), f.whole("micro_train_batch_size_per_gpu"), f.dp
    if _packs(f) or batch is None or micro is None or dp is None or batch <= 0 or micro <= 0:
        return None
    each = batch // dp
    return each % micro and {"each": each, "micro": micro, "near": math.gcd(each, micro)}


SFT_RULES: Final = (
    Rule(
        id="SKY-SFT-strategy",
        field="strategy",
        broken=lambda f: f["strategy"] not in ("megatron", "fsdp", "fsdp2"),
        rule="The strategy is megatron or fsdp.",
        remedy="Use megatron.",
    ),
    Rule(
        id="SKY-SFT-micro_pos",
        field="micro_train_batch_size_per_gpu",
        broken=below("micro_train_batch_size_per_gpu"),
        rule="It is at least 1.",
        remedy="Use 1.",
    ),
    Rule(
        id="SKY-SFT-batch_pos",
        field="batch_size",
        broken=below("batch_size"),
        rule="It is at least 1.",
        remedy="Use 1 or more.",
    ),
    Rule(
        id="SKY-SFT-world_div",
        field="placement.num_gpus_per_node",
        broken=when(_megatron, world),
        rule="{gpus} GPUs are no multiple of tp*pp*cp = {unit} (TP and PP are 2 by default).",
        remedy="Use {near} GPUs, or smaller degrees.",
    ),
    Rule(
        id="SKY-SFT-cp",
        field="remove_microbatch_padding",
        broken=cp_padding(SFT, "remove_microbatch_padding"),
        rule="Context parallelism needs padding removed.",
        remedy="Use remove_microbatch_padding=true.",
    ),
    Rule(
        id="SKY-SFT-ulysses",
        field="sequence_parallel_size",
        broken=lambda f: _megatron(f) and (f.whole("sequence_parallel_size") or 1) > 1,
        rule="Ulysses is for FSDP; Megatron splits sequences with TP and CP.",
        remedy="Use sequence_parallel_size=1.",
    ),
    Rule(
        id="SKY-SFT-pack_strategy",
        field="use_sequence_packing",
        broken=lambda f: _packs(f) and not _megatron(f),
        rule="Packing needs the megatron strategy.",
        remedy="Use strategy=megatron.",
    ),
    Rule(
        id="SKY-SFT-pack_padding",
        field="remove_microbatch_padding",
        broken=lambda f: _packs(f) and f["remove_microbatch_padding"] is False,
        rule="Packing removes padding whatever is set here.",
        remedy="Use remove_microbatch_padding=true.",
        severity="warning",
    ),
    Rule(
        id="SKY-SFT-pack_len",
        field="max_length",
        broken=lambda f: _packs(f) and f.whole("max_length") is None,
        rule="Packing needs a maximum length.",
        remedy="Set max_length.",
    ),
    Rule(
        id="SKY-SFT-pack_capacity",
        field="max_tokens_per_microbatch",
        broken=lambda f: (
            (f.whole("max_tokens_per_microbatch") or 2**62) < (f.whole("max_length") or 0)
        ),
        rule="A microbatch holds at least one sequence of max_length.",
        remedy="Raise max_tokens_per_microbatch to max_length.",
    ),
    Rule(
        id="SKY-SFT-pack_micro1",
        field="micro_train_batch_size_per_gpu",
        broken=lambda f: (
            _packs(f)
            and f.given("micro_train_batch_size_per_gpu")
            and f["micro_train_batch_size_per_gpu"] != 1
        ),
        rule="With packing a micro batch is one packed sequence, whatever is set here.",
        remedy="Use 1, and set max_tokens_per_microbatch for memory.",
        severity="warning",
    ),
    Rule(
        id="SKY-SFT-pack_batch",
        field="batch_size",
        broken=lambda f: _packs(f) and f.dp is not None and 0 < (f.whole("batch_size") or 0) < f.dp,
        rule="With packing every data parallel rank needs a sequence.",
        remedy="Raise batch_size to the data parallel size.",
    ),
    Rule(
        id="SKY-SFT-batch_div",
        field="batch_size",
        broken=_sft_batch,
        rule="{batch} is no multiple of gpus/(tp*pp) = {unit}; CP counts as data parallel here.",
        remedy="Use {near}.",
    ),
    Rule(
        id="SKY-SFT-micro_div",
        field="micro_train_batch_size_per_gpu",
        broken=_sft_micro,
        rule="The {each} sequences of a data parallel rank are no multiple of {micro}.",
        remedy="Use {near}.",
    ),
    Rule(
        id="SKY-SFT-default_tp2_pp2",
        field=f"{SFT}.tensor_model_parallel_size",
        broken=lambda f: _megatron(f) and not (f.given(f"{SFT}.{_TP}") and f.given(f"{SFT}.{_PP}")),
        rule="Left out, TP and PP are 2 each.",
        remedy="State both.",
        severity="warning",
    ),
    *shared(SFT, _megatron),
)
