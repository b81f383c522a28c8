"""Rows as strangers write them: other words, units, gaps and contradictions."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwright.fit.predict import Prediction, predict
from meshwright.fit.settings import read_settings, whole_number
from meshwright.parallel.layout import CpComm, Pipeline, Recompute, Zero
from run_rows import MODELS, ROW, RUNS, one, run


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,024", 1024),
        ("1_024", 1024),
        ("8K", 8192),
        ("1M", 2**20),
        ("4096 tokens", 4096),
        ("64 GPUs", 64),
        ("1e3", 1000),
        ("2.0", 2),
        ("-8", -8),
        ("2.5", None),
        ("8x8", None),
        ("many", None),
        ("", None),
    ],
)
def test_numbers_are_read_with_commas_letters_and_units(text: str, number: int | None) -> None:
    assert whole_number(text) == number


@pytest.mark.parametrize("text", ["", "-", "n/a", "NaN", "None", "null"])
def test_a_cell_that_says_nothing_is_not_stated(text: str) -> None:
    assert any(line == "tp = 1: not stated" for line in run(tp=text).assumed)


def test_an_empty_cell_is_looked_for_among_the_settings() -> None:
    found = run(
        {"model": {"tensor_model_parallel_size": 4}, "training": {"seq_length": "2K"}},
        tp="",
        seq_len="",
    )
    assert (found.layout.tp, found.job.seq_len) == (4, 2048)
    found = run({"gradient_accumulation_steps": 2}, mbs="")
    assert found.layout.mbs == 2
    assert run(n_gpus="", dp="8").cluster.num_gpus == 16


def test_words_are_one_however_they_are_spelled() -> None:
    for key in ("tp_comm_overlap", "--tp-comm-overlap", "TP-COMM-OVERLAP", "+tp_comm_overlap"):
        assert not run({key: "off"}).job.execution.overlap_tp_comm
    deep = {"trainer": {"strategy": {"tp_comm_overlap": False}}}
    assert read_settings({"other_settings": json.dumps(deep)}).find("tp_comm_overlap") is False


def test_numbers_and_tasks_are_one_however_they_are_spelled() -> None:
    for depths in (1, "1", 1.0):
        assert len(run({"mtp_num_layers": depths}, model="deepseek-v3").model.mtp_layers) == 1
    assert run(task="LoRA").job.task == "lora"
    assert run(task="SFT").job.task == "sft"


@pytest.mark.parametrize("no", ["0", "false", "No", "off", "disabled"])
def test_switches_are_read_in_words(no: str) -> None:
    assert not run(sequence_parallel=no).layout.sp
    assert run(sequence_parallel="yes").layout.sp
    assert run(distributed_optimizer=no).layout.zero == Zero.no_shard


@pytest.mark.parametrize(
    ("text", "zero", "replicas"),
    [
        ("none", Zero.optim, 1),
        ("DDP", Zero.optim, 1),
        ("full", Zero.optim_grads_params, 1),
        ("FULL_SHARD:16", Zero.optim_grads_params, 1),
        ("fsdp2", Zero.optim_grads_params, 1),
        ("ZeRO-3", Zero.optim_grads_params, 1),
        ("full:dp (Megatron FSDP)", Zero.optim_grads_params, 1),
        ("zero2", Zero.optim_grads, 1),
        ("SHARD_GRAD_OP", Zero.optim_grads, 1),
        ("hsdp:8", Zero.optim_grads_params, 2),
        ("hsdp:2x8", Zero.optim_grads_params, 2),
        ("HYBRID_SHARD", Zero.optim_grads_params, 2),
    ],
)
def test_sharding_is_read_in_the_words_of_each_framework(
    text: str, zero: Zero, replicas: int
) -> None:
    found = run(fsdp=text)
    assert (found.layout.zero, found.layout.dp_replicate) == (zero, replicas)
    assert not any("fsdp" in line and "read as" in line for line in found.assumed)


def test_sharding_is_found_among_the_settings() -> None:
    megatron = {"ddp": {"use_megatron_fsdp": True, "data_parallel_sharding_strategy": "optim"}}
    assert run(megatron).layout.zero == Zero.optim
    assert run({"zero_optimization": {"stage": 2}}).layout.zero == Zero.optim_grads
    assert run({"fsdp_config": {"sharding_strategy": "FULL_SHARD"}}).layout.zero == Zero(3)


@pytest.mark.parametrize(
    ("text", "modules", "layers"),
    [
        ("none", Recompute.none, 0),
        ("false", Recompute.none, 0),
        ("full", Recompute.full, 0),
        ("True", Recompute.full, 0),
        ("gradient checkpointing", Recompute.full, 0),
        ("full (uniform, 2 layers)", Recompute.full, 2),
        ("full:block:5", Recompute.full | Recompute.block, 5),
        ("block:4", Recompute.full | Recompute.block, 4),
        ("every 2 layers", Recompute.full | Recompute.block, 16),
        ("selective", Recompute.core_attn, 0),
        ("selective:core-attn", Recompute.core_attn, 0),
        ("selective:[core_attn, mlp]", Recompute.core_attn | Recompute.mlp, 0),
        ("attention", Recompute.core_attn, 0),
    ],
)
def test_recomputation_is_read_in_the_words_of_each_framework(
    text: str, modules: Recompute, layers: int
) -> None:
    layout = run(recompute=text).layout
    assert (layout.recompute, layout.recompute_num_layers) == (modules, layers)


def test_recomputation_is_found_among_the_settings() -> None:
    assert run({"gradient_checkpointing": True}, recompute="").layout.recompute == Recompute.full
    titan = {"framework": "torchtitan", "activation_checkpoint": {"mode": "selective"}}
    assert run(titan, recompute="").job.execution.recompute_every_second_matmul
    assert run(
        {"framework": "torchtitan"}, recompute=""
    ).job.execution.recompute_every_second_matmul
    assert run({"framework": "NeMo"}, recompute="").layout.recompute == Recompute.none
    old = {"activations_checkpoint_granularity": "selective"}
    assert run(old, recompute="").layout.recompute == Recompute.core_attn


def test_a_row_without_a_word_recomputes_as_its_recipe_did_later() -> None:
    found = run({"activation_checkpointing_in_recipe_at_main": True}, recompute="")
    assert found.layout.recompute == Recompute.full
    assert any("later recipe" in line for line in found.assumed)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("BF16", "bf16"),
        ("bf16-mixed", "bf16"),
        ("half", "fp16"),
        ("TF32", "fp32"),
        ("e4m3", "fp8"),
        ("fp8-subchannel", "fp8-blockwise"),
        ("FP8_current", "fp8-cs"),
        ("mxfp8", "fp8-mx"),
    ],
)
def test_precision_is_read_in_other_words(text: str, name: str) -> None:
    assert run(precision=text).job.precision.name == name


def test_precision_is_found_among_the_settings() -> None:
    assert run({"mixed_precision._ctor": "bf16_with_mxfp8_mixed"}, precision="").job.precision.name
    for words, name in (
        ({"mixed_precision": {"_ctor": "bf16_with_mxfp8_mixed"}}, "fp8-mx"),
        ({"args": {"fp16": True}}, "fp16"),
        ({"args": {"fp8_format": "hybrid"}}, "fp8"),
        ({}, "bf16"),
    ):
        assert run(words, precision="").job.precision.name == name
    assert run({"fp8_recipe": "blockwise"}, precision="fp8").job.precision.name == "fp8-blockwise"


def test_schedules_and_context_parallelism_are_read_in_other_words() -> None:
    pipeline = {"pp": "2", "n_gpus": "32"}
    assert run({"pp_schedule": "GPipe"}, vpp="1", **pipeline).layout.schedule == Pipeline.gpipe
    assert run({"pp_schedule": "ZBV"}, vpp="2", **pipeline).layout.schedule == Pipeline.zb_v
    assert run({"pp_schedule": "?"}, vpp="1", **pipeline).layout.schedule == Pipeline.one_f_one_b
    for word, comm in (("allgather", CpComm.all_gather), ("a2a+p2p", CpComm.a2a_p2p)):
        assert run({"cp_comm_type": word}, cp="4", tp="1").layout.cp_comm == comm
    assert run({"cp_comm_type": ["a2a", "a2a"]}, cp="4", tp="1").layout.cp_comm == CpComm.a2a


@pytest.mark.parametrize(
    ("cells", "field"),
    [
        ({"tp": "3", "n_gpus": "96"}, "tp"),
        ({"ep": "8"}, "ep"),
        ({"model": "gpt-oss-120b", "ep": "3", "n_gpus": "96"}, "ep"),
        ({"gpu": "A100", "precision": "fp8"}, "precision"),
        ({"gpu": "H100", "precision": "nvfp4"}, "precision"),
        ({"gpu": "V100", "precision": "bf16"}, "precision"),
        ({"n_gpus": "1000000000"}, "n_gpus"),
        ({"n_gpus": "33"}, "n_gpus"),
        ({"pp": "64", "n_gpus": "128"}, "pp"),
        ({"pp": "2", "vpp": "100"}, "vpp"),
        ({"gpu": "TPU-v5p"}, "gpu"),
        ({"gpu": "Gaudi3"}, "gpu"),
        ({"gpus_per_node": "0"}, "gpus_per_node"),
        ({"mbs": "0"}, "mbs"),
    ],
)
def test_a_contradiction_is_refused_with_field_rule_and_remedy(
    cells: dict[str, str], field: str
) -> None:
    found = one(None, **cells)
    assert found.status == "refused"
    assert found.why.startswith(f"{field} = ")
    assert found.why.count(". ") >= 1 or found.why.endswith("?"), "no remedy"


def test_cells_beyond_the_first_line_are_refused() -> None:
    found = predict([{**ROW, "cells beyond the first line": "x"}], MODELS)[0]
    assert found.status == "refused"
    assert "quotes" in found.why


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"dp": "5"}, "dp = 5 contradicts"),
        ({"pp": "1", "vpp": "4"}, "vpp = 1: 4 is stated"),
        ({"pp": "2", "vpp": "4", "gbs": "24", "n_gpus": "32"}, "vpp = 1: 3 micro-batches"),
        ({"gbs": "1", "mbs": "64"}, "the other way round"),
        ({"gbs": "65"}, "gbs 65 is read as"),
        ({"nvlink_domain": "eight"}, "nvlink_domain = 'eight'"),
        ({"recompute": "selective:nonsense"}, "'nonsense' is not known"),
        ({"gpu": "GH200-144GB"}, "nearest known"),
    ],
)
def test_what_is_bent_to_be_priced_is_told(cells: dict[str, str], told: str) -> None:
    found = one(None, **cells)
    assert found.status == "ok"
    assert any(told in line for line in found.assumed), found.assumed


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_of_the_file_can_be_priced(name: str) -> None:
    found = one(model=name, n_gpus="64", tp="1", fsdp="full:64")
    assert found.status == "ok", found.why


CELLS = st.one_of(
    st.sampled_from(
        ["", "0", "1", "2", "3", "8", "64", "-1", "1e9", "NaN", "inf", "2.5", "1,024", "8K", "true"]
    ),
    st.sampled_from(["none", "full", "full:8", "hsdp:3", "selective:moe", "fp8-mx", "H200", "x|y"]),
    st.text(max_size=8),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=5,
)
WORDS = sorted(
    {
        *(key.split(".")[-1] for row in RUNS[::9] for key in read_settings(row).words),
        *("zero_stage", "pp_schedule", "cp_comm_type", "sharding_strategy", "grad_accum", "etp"),
    }
)


def judged(found: Prediction) -> None:
    if found.status == "ok":
        assert 0.0 < (found.step_time_s or 0.0) < math.inf
        assert 0.0 < (found.peak_bytes or 0.0) < math.inf
        assert (found.low_s or 0.0) < (found.step_time_s or 0.0) < (found.high_s or 0.0)
    else:
        assert found.why
        assert "No rule foresees" not in found.why, found.why
    json.dumps(found.to_dict(), allow_nan=False)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(RUNS), st.dictionaries(st.sampled_from(sorted(RUNS[0])), CELLS, max_size=4))
def test_any_cells_are_priced_or_refused_by_a_rule(
    row: dict[str, str], cells: dict[str, str]
) -> None:
    judged(predict([{**row, **cells}], MODELS)[0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(RUNS), st.dictionaries(st.sampled_from(WORDS), JSON, max_size=4))
def test_any_settings_are_priced_or_refused_by_a_rule(
    row: dict[str, str], words: dict[str, Any]
) -> None:
    other = json.loads(row["other_settings"] or "{}")
    judged(predict([{**row, "other_settings": json.dumps({**other, **words})}], MODELS)[0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(MODELS)),
    st.dictionaries(
        st.sampled_from(sorted({key for entry in MODELS.values() for key in entry})),
        JSON | st.integers(-1, 10**6),
        max_size=3,
    ),
)
def test_any_model_is_priced_or_refused_by_a_rule(name: str, words: dict[str, Any]) -> None:
    models = {name: {**MODELS[name], **words}}
    judged(predict([{**ROW, "model": name, "tp": "1", "fsdp": "full:32"}], models)[0])


def respelled(words: dict[str, Any]) -> dict[str, Any]:
    """Return settings with sections nested, names in capitals and values as text."""
    out: dict[str, Any] = {}
    for key, value in words.items():
        section, dot, name = key.partition(".")
        if isinstance(value, dict):
            out[key] = respelled(value)  # pyright: ignore[reportUnknownArgumentType]
        elif dot:
            out.setdefault(section, {})[name] = value
        else:
            plain = str(value) if isinstance(value, bool | int) else value
            out[key.upper().replace("_", "-")] = plain
    return out


def test_a_row_means_the_same_in_other_spelling() -> None:
    for row in RUNS[::83]:
        words = respelled(json.loads(row["other_settings"] or "{}"))
        cells = {
            k: f" {row[k].upper()} " for k in ("gpu", "precision", "fsdp", "task", "recompute")
        }
        other = {**row, **cells, "other_settings": json.dumps(words)}
        first, second = predict([row, other], MODELS)
        assert (first.step_time_s, first.peak_bytes) == (second.step_time_s, second.peak_bytes)
