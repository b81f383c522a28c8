"""Notes that model, layout and machine give together; each is a case that users reported."""

from __future__ import annotations

from launches import bridge, verl
from meshwright.findings import Finding
from meshwright.frameworks.check import check


def note(words: list[str], name: str, **known: object) -> Finding | None:
    found = check(words, **known).findings  # pyright: ignore[reportArgumentType]
    return next((f for f in found if f.id == name), None)


def lora(overrides: str) -> Finding | None:
    words = bridge("qwen3_8b_peft", f"model.seq_length=8192 dataset.seq_length=8192 {overrides}")
    return note(words, "lora_gathers_inputs", gpus=8)


def test_adapters_keep_the_gathered_sequence() -> None:
    """Case BRIDGE-LORA: 4.7 of 47.5 GB go when the inputs are gathered again."""
    found = lora("model.tensor_model_parallel_size=2 model.sequence_parallel=true")
    assert found is not None
    assert "36 layers x 2 x 8192 tokens x 4096 x 2 bytes = 4.5 GiB" in found.rule
    assert lora("model.tensor_model_parallel_size=1") is None
    assert lora("model.tensor_model_parallel_size=2 model.sequence_parallel=false") is None


def gpt_oss(dispatcher: str, cluster: str, ep: int) -> list[str]:
    words = bridge(
        "gpt_oss_120b_pretrain",
        f"model.expert_model_parallel_size={ep} train.micro_batch_size=4"
        " train.global_batch_size=1280 model.moe_token_dispatcher_type=flex"
        f" model.moe_flex_dispatcher_backend={dispatcher}",
    )
    if dispatcher == "alltoall":
        words = [w for w in words[:-2]] + ["model.moe_token_dispatcher_type=alltoall"]
    found = check(words, cluster=cluster).findings
    ours = ("dispatcher_saves_little", "dispatcher_could_save")
    return [f.id for f in found if f.id in ours]


def test_a_dispatcher_that_has_nothing_to_save_is_told() -> None:
    """Case BRIDGE-3561: 64 ranks in one NVLink domain, four experts a token: all-to-all won."""
    assert gpt_oss("hybridep", "64xGB200", 64) == ["dispatcher_saves_little"]
    assert gpt_oss("alltoall", "64xGB200", 64) == []


def test_a_dispatcher_that_saves_network_is_told() -> None:
    """Law: four experts on 4 nodes lie on 2.73 of them, and a third of the payload is saved."""
    assert gpt_oss("alltoall", "4x8xH100", 32) == ["dispatcher_could_save"]
    assert gpt_oss("deepep", "4x8xH100", 32) == []


def test_loading_in_every_process_is_counted_for_the_host() -> None:
    """Case LITGPT-438: 8 processes read a 70B model, over a terabyte on one node."""
    others = "actor_rollout_ref.model.path=meta-llama/Llama-2-70b-hf trainer.n_gpus_per_node=8"
    found = note(verl("", others, strategy="fsdp"), "host_memory_of_loading")
    assert found is not None
    assert "8 x 128.5 GiB = 1.004 TiB" in found.rule
    assert note(verl("tensor_model_parallel_size=8", others), "host_memory_of_loading") is None
