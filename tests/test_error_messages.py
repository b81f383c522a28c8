"""Messages with which frameworks refuse a launch: each is predicted, under its rule's id.

Provenance: spec; one launch for each message in ``tests/data/error_messages.jsonl``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launches import CONNECTION, bridge, megatron, titan, verl
from meshwright.frameworks.check import check
from meshwright.frameworks.compare import compare

POLICY = "trainer.policy.megatron_config"
SKYRL = (
    *("python", "-m", "skyrl.train.entrypoints.main_base", "trainer.strategy=megatron"),
    *("trainer.placement.policy_num_gpus_per_node=8", "trainer.policy.model.path=Qwen/Qwen3-8B"),
)


def skyrl(overrides: str) -> list[str]:
    return [*SKYRL, *overrides.split()]


KINDS = {"megatron": megatron, "bridge": bridge, "verl": verl, "titan": titan, "skyrl": skyrl}
ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "error_messages.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("row", ROWS, ids=[row["message"] for row in ROWS])
def test_a_message_is_predicted(row: dict[str, Any]) -> None:
    launch = KINDS[row["kind"]](*row["args"])
    result = check(launch, gpus=row["gpus"], env=row["env"])
    found = {f.id: f for f in result.findings}
    rule = row["rule"]
    assert rule in found, sorted(found)
    assert found[rule].severity == "error"
    assert found[rule].rule
    assert not result.ok


SILENT = {
    "1 layers are dropped": (megatron("--num-layers 30 --pipeline-model-parallel-size 4"), 4),
    "2 a last stage without a pipeline": (megatron("--decoder-last-pipeline-num-layers 1"), 4),
    "3 ETP inherits TP": (
        megatron(
            "--num-experts 8 --tensor-model-parallel-size 2 --sequence-parallel"
            " --expert-model-parallel-size 2"
        ),
        8,
    ),
    "4 a distributed optimizer of one": (
        megatron("--tensor-model-parallel-size 8 --use-distributed-optimizer --sequence-parallel"),
        8,
    ),
    "5 SP at TP 1": (megatron("--sequence-parallel"), 8),
    "6 an old layout after PP changed": (
        bridge(
            "llama3_8b_pretrain",
            "model.pipeline_model_parallel_size=2 model.virtual_pipeline_model_parallel_size=1"
            " 'model.pipeline_model_parallel_layout=Et*8|t*8|t*8|t*8L'",
        ),
        8,
    ),
    "10 a tail that is cut": (
        [
            *SKYRL,
            f"{POLICY}.tensor_model_parallel_size=1",
            "trainer.train_batch_size=10",
            "trainer.policy_mini_batch_size=5",
            "generator.n_samples_per_prompt=5",
        ],
        8,
    ),
    "11 uniform over a whole stage": (
        megatron(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 32"
        ),
        8,
    ),
    "12 core_attn with fused attention": (megatron("--recompute-activations"), 8),
    "13 one connection for sharded training": (
        titan("llama3_8b", "--training.local_batch_size 1 --training.seq_len 8192"),
        8,
    ),
}
RULES = {
    "1 layers are dropped": "MLM-ARG-layers_pp",
    "2 a last stage without a pipeline": "MLM-TC-uneven_middle",
    "3 ETP inherits TP": "MLM-ARG-etp_default",
    "4 a distributed optimizer of one": "optimizer_is_not_shared",
    "5 SP at TP 1": "MLM-ARG-sp_tp1",
    "6 an old layout after PP changed": "MLM-TC-layout_vpp",
    "10 a tail that is cut": "tail_is_cut",
    "11 uniform over a whole stage": "uniform_recompute_frees_memory",
    "12 core_attn with fused attention": "MLM-TC-rc_core_warn",
    "13 one connection for sharded training": "MLM-ENV-fsdp",
}


@pytest.mark.parametrize("name", SILENT)
def test_a_silent_failure_is_told(name: str) -> None:
    launch, gpus = SILENT[name]
    found = {f.id: f for f in check(launch, gpus=gpus, env=CONNECTION).findings}
    assert RULES[name] in found, sorted(found)
    assert found[RULES[name]].severity in ("error", "warning")


def test_data_order_and_vocabulary_are_told_when_a_layout_changes() -> None:
    """The silent failures 7 and 8."""
    notes = "\n".join(
        compare(
            megatron("--vocab-size 50257"),
            megatron("--vocab-size 50257 --tensor-model-parallel-size 4"),
            gpus=8,
        ).notes
    )
    assert "Data parallelism 8 -> 2" in notes
    assert "Padded vocabulary 50304 -> 50688" in notes


def test_a_loss_that_some_versions_print_divided_is_told() -> None:
    """The silent failure 9: in a check as a note, and where two launches differ in cp or tp."""
    split = megatron("--context-parallel-size 2")
    assert "displayed_loss_is_whole" in {f.id for f in check(split, gpus=8).findings}
    assert "displayed_loss_is_whole" not in {f.id for f in check(megatron(""), gpus=8).findings}
    notes = compare(megatron(""), split, gpus=8).notes
    assert any(note.startswith("cp 1 -> 2") for note in notes)
    assert not any(note.startswith("tp ") for note in notes)
