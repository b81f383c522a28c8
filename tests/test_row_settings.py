"""Settings that change what a row's model, machines and optimizer are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshwright.fit.predict import predict
from meshwright.fit.settings import read_settings
from meshwright.parallel.layout import Zero
from run_rows import MODELS, ROW, one, run

MLA = "mlm-h1024-l16-a32-swiglu-e32k4-s1024-m1024-mla-mtp1-untied"


@pytest.mark.parametrize("text", ["", "-", "N/A", "none", "null", "nan", "{}"])
def test_other_settings_may_say_nothing(text: str) -> None:
    assert not read_settings({**ROW, "other_settings": text}).words


def test_other_settings_may_be_a_dict_in_the_words_of_python() -> None:
    words = {"model": {"cp_comm_type": ["a2a"], "mtp_num_layers": None, "swiglu": True}, "a": 1.5}
    rows = [{**ROW, "other_settings": text} for text in (str(words), json.dumps(words))]
    assert read_settings(rows[0]).words == read_settings(rows[1]).words
    for text in ("{'a': open}", "{'a': {1, 2}}", "{'a': b''}", "{'a'}", "{" * 10_000):
        broken = predict([{**ROW, "other_settings": text}], MODELS)[0]
        assert (broken.status, broken.why[:14]) == ("refused", "other_settings"), text


@pytest.mark.parametrize("off", [0, "0", False])
def test_switches_add_up_nothing_where_nccl_may_not_let_them(off: Any) -> None:
    def step_s(words: dict[str, Any]) -> float:
        return one(words, tp="8", sequence_parallel="false").step_time_s or 0.0

    assert step_s({}) == step_s({"env_vars": {"NCCL_NVLS_ENABLE": 1}})
    assert step_s({}) < step_s({"env_vars": {"NCCL_NVLS_ENABLE": off}})


@pytest.mark.parametrize("name", ["muon", "dist_muon", "Lion", "sgd"])
def test_optimizers_of_one_moment_keep_half_of_what_adam_keeps(name: str) -> None:
    adam, other = (run({"optimizer": {"optimizer": word}}) for word in ("adam", name))
    assert other.job.precision.moment_bytes == adam.job.precision.moment_bytes / 2
    assert other.job.precision.master_bytes == adam.job.precision.master_bytes


def test_muon_shards_what_it_holds_though_its_switch_is_off() -> None:
    words = {"optimizer": {"optimizer": "dist_muon", "use_distributed_optimizer": False}}
    assert run(words).layout.zero == Zero.optim
    words["optimizer"]["optimizer"] = "adam"
    assert run(words).layout.zero == Zero.no_shard


def test_segments_grow_where_a_word_of_its_own_says_so() -> None:
    for words in (
        {"expandable_segments": True},
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    ):
        assert run(words).job.execution.expandable_segments
    assert not run({}).job.execution.expandable_segments


def test_offloading_the_fused_experts_is_offloading_their_products_and_activation() -> None:
    def peak_bytes(modules: list[str]) -> float:
        words = {"fine_grained_activation_offloading": True, "offload_modules": modules}
        return one({"model": words}, model=MLA, tp="1", ep="8").peak_bytes or 0.0

    apart = peak_bytes(["expert_fc1", "moe_act"])
    assert peak_bytes(["fused_group_mlp"]) == apart < peak_bytes([])


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("allocated GiB on the last rank (last pipeline stage), maximum over the run", "last"),
        ("peak of the last stage", "last"),
        ("allocated GiB rank 0", "first"),
        ("rank-0 measured peak GB after iteration 2", "first"),
        ("GiB, accounting of parameters and activations (first pipeline stage)", "first"),
        ("device memory in use, GB (nvidia-smi, node with the embedding)", "first"),
        ("allocated GiB (max over ranks)", "fullest"),
        ("allocated GiB on rank 10, last iterations", "fullest"),
    ],
)
def test_the_rank_that_is_asked_for_is_read_from_words(kind: str, rank: str) -> None:
    assert run(peak_memory_stat="allocated", peak_memory_kind=kind).rank == rank


@pytest.mark.parametrize(
    ("written", "dense"),
    [
        ("([0]*3+[1]*13)", 3),
        ("[0]*1+[1]*15", 1),
        ([0, 0, *[1] * 14], 2),
        (1, 0),
        ("1", 0),
        ("([0]*3+[1]*4)", 1),
        ("nonsense", 1),
    ],
)
def test_a_row_says_which_layers_have_experts(written: Any, dense: int) -> None:
    found = run({"args": {"moe_layer_freq": written}}, model=MLA).model
    assert [found.layer_kinds[k].is_moe for k in found.layer_pattern].count(False) == dense


def test_a_pattern_of_experts_for_other_layers_is_told() -> None:
    assert any(
        "moe_layer_freq" in line
        for line in one({"moe_layer_freq": "([0]*3+[1]*4)"}, model=MLA).assumed
    )


def test_a_row_changes_the_widths_of_the_model_that_it_names() -> None:
    usual = run(model=MLA).model
    for word in ("moe_ffn_hidden_size", "kv_lora_rank", "q_lora_rank", "v_head_dim"):
        assert run({"args": {word: 64}}, model=MLA).model.num_params < usual.num_params, word


def test_the_vocabulary_is_padded_to_the_multiple_that_is_stated() -> None:
    words = {"args": {"make_vocab_size_divisible_by": 3232}}
    assert run(words, model=MLA, tp="1").model.vocab_size == 16 * 3232
    assert run(words, model=MLA, tp="4").model.vocab_size == 4 * 4 * 3232
    assert run({"make_vocab_size_divisible_by": 10**9}, model=MLA).model.vocab_size == 50257


def test_sections_count_inside_another_object_and_words_with_spaces_around_them() -> None:
    words = {"args": {"bf16": True, "moe_token_dispatcher_type": "allgather"}}
    spaced = {"config": {"args": {"bf16": True, "moe_token_dispatcher_type": " allgather "}}}
    first, second = one(words, model=MLA), one(spaced, model=MLA)
    assert (first.step_time_s, first.peak_bytes) == (second.step_time_s, second.peak_bytes)
    layout = {"pipeline_model_parallel_layout": " Et*8|t*8mL "}
    assert run(layout, model=MLA, pp="2", vpp="1", tp="1").layout.pipeline_layout == "Et*8|t*8mL"
