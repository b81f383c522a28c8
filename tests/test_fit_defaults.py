"""What frameworks do where a row of measured runs does not say."""

from __future__ import annotations

from typing import Any

import pytest

import run_rows
from meshwright.fit.rows import Run
from meshwright.parallel.layout import Recompute


def run(words: dict[str, Any], **cells: str) -> Run:
    """Return a run on whole layers that states neither ep nor what is recomputed."""
    return run_rows.run(words, **{"tp": "1", "ep": "", "recompute": "", **cells})


@pytest.mark.parametrize("task", ["sft", "lora"])
@pytest.mark.parametrize("framework", ["NeMo 24.07", "Megatron-Bridge"])
def test_nemo_packs_what_it_fine_tunes_on(framework: str, task: str) -> None:
    words = {"framework": framework}
    assert run(words, task=task).job.execution.packed_sample_tokens > 0
    assert run(words, task="pretrain").job.execution.packed_sample_tokens == 0
    for dataset in ("SQuAD, padded", "SQuAD, unpacked", "not packed"):
        unpacked = run({**words, "finetuning_dataset": dataset}, task=task)
        assert unpacked.job.execution.packed_sample_tokens == 0


def test_other_frameworks_pack_where_they_say_so() -> None:
    words = {"framework": "Automodel"}
    assert run(words, task="lora").job.execution.packed_sample_tokens == 0
    packed = run({**words, "dataset": "SQuAD, packed"}, task="lora")
    assert packed.job.execution.packed_sample_tokens > 0


def test_a_named_dispatcher_without_a_degree_serves_all_ranks_of_a_stage() -> None:
    moe = {"framework": "Automodel", "kernels": "TE + DeepEP"}
    found = run(moe, model="gpt-oss-120b", n_gpus="64")
    assert found.layout.ep == 64
    assert any(line.startswith("ep = 64") for line in found.assumed)
    assert run(moe, model="gpt-oss-120b", n_gpus="96", gbs="96").layout.ep == 32
    assert run(moe, model="gpt-oss-120b", n_gpus="64", pp="2").layout.ep == 32
    assert run(moe, model="gpt-oss-120b", n_gpus="64", ep="8").layout.ep == 8
    assert run(moe, n_gpus="64").layout.ep == 1
    assert run({"framework": "Automodel"}, model="gpt-oss-120b", n_gpus="64").layout.ep == 1


def test_automodel_divides_no_sequence_by_tp_unless_told() -> None:
    words = {"framework": "Automodel"}
    assert run(words, tp="2").layout.sp == 0
    assert run({**words, "sequence_parallel": True}, tp="2").layout.sp == 1


def test_automodel_fuses_kernels_of_models_that_stay_whole() -> None:
    words = {"framework": "Automodel"}
    assert run(words).job.execution.fused_kernels
    for degree in ("tp", "cp", "pp"):
        assert not run(words, **{degree: "2"}).job.execution.fused_kernels
    assert run({**words, "kernels": "TE"}, tp="2").job.execution.fused_kernels


def test_a_later_recipe_checkpoints_what_runs_on_several_gpus() -> None:
    words = {"framework": "Automodel", "activation_checkpointing_in_recipe_at_main": True}
    assert run(words).layout.recompute == Recompute.full
    assert run(words, n_gpus="1").layout.recompute == Recompute.none


def test_pipelines_of_torchtitan_cut_a_batch_by_their_ranks() -> None:
    cells = {"pp": "4", "mbs": "", "gbs": "64"}
    for schedule in ("1F1B", "Interleaved1F1B"):
        found = run({"framework": "torchtitan", "pp_schedule": schedule}, **cells)
        assert found.job.gbs // (found.layout.dp * found.layout.mbs) == 4
    assert run({"framework": "NeMo"}, **cells).layout.mbs == 1


def test_scaling_by_rows_is_a_recipe_of_its_own() -> None:
    for text in ("fp8-rowwise", "rowwise"):
        rows, tensor = run({}, precision=text), run({}, precision="fp8-tensorwise")
        assert rows.job.precision.name == "fp8-rowwise"
        moved = rows.job.precision.quantise_bytes_per_element
        assert moved > tensor.job.precision.quantise_bytes_per_element


def test_what_moves_frozen_weights_and_routed_tokens_is_read() -> None:
    found = run({"model": {"disable_parameter_transpose_cache": True}, "fake_balanced_gate": True})
    assert not found.job.execution.caches_quantised_weights
    assert found.job.execution.neighbouring_experts
    assert found.job.execution.forced_balance
    usual = run({}).job.execution
    assert usual.caches_quantised_weights
    assert not usual.neighbouring_experts


def test_a_deferred_head_waits_as_long_as_in_recipes_unless_told() -> None:
    for words, waiting in (
        ({}, 0),
        ({"defer_embedding_wgrad_compute": True}, 22),
        ({"defer_embedding_wgrad_compute": True, "wgrad_deferral_limit": 50}, 50),
        ({"defer_embedding_wgrad_compute": False, "wgrad_deferral_limit": 50}, 0),
    ):
        assert run({"comm_overlap": words}).job.execution.deferred_head_microbatches == waiting


def test_a_paged_stash_is_a_graph_of_the_whole_step_that_drops_no_token() -> None:
    for words, graphs, balanced in (
        ({"cuda_graph_impl": "none", "moe_paged_stash": True}, "full", False),
        ({"cuda_graph_impl": "none"}, "none", False),
        ({"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}, "full", True),
    ):
        found = run(words, model="qwen3-30b-a3b", ep="8").job.execution
        assert (found.cuda_graphs, found.forced_balance) == (graphs, balanced)
