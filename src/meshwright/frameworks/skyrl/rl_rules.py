"""What SkyRL's RL trainer refuses or changes; ids of the August 2026 snapshot."""

from __future__ import annotations

import math
from typing import Final

from meshwright.frameworks.by_path import Breach, Facts, Rule, below, rollout_experts
from meshwright.frameworks.skyrl import rl_batch
from meshwright.frameworks.skyrl.rl_batch import megatron
from meshwright.frameworks.skyrl.rules import RL, cp_padding, shared

_ENGINE: Final = "generator.inference_engine"
_PLACEMENT: Final = "trainer.placement"
_LORA: Final = "trainer.policy.model.lora.rank"


def _colocated(f: Facts) -> object:
    if f["trainer.placement.colocate_all"] is not True or f.gpus is None:
        return None
    sizes = ("num_engines", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    given = [f.whole(f"{_ENGINE}.{name}") for name in sizes]
    if all(size is None for size in given):
        return None
    rollout = math.prod(size or 1 for size in given)
    return rollout != f.gpus and {"rollout": rollout, "gpus": f.gpus}


def _engine_node(f: Facts) -> object:
    tp = f.whole(f"{_ENGINE}.tensor_parallel_size") or 1
    pp = f.whole(f"{_ENGINE}.pipeline_parallel_size") or 1
    node = f.whole("trainer.placement.policy_num_gpus_per_node")
    mp = f[f"{_ENGINE}.distributed_executor_backend"] == "mp"
    colocated = f["trainer.placement.colocate_all"] is True
    return mp and colocated and node is not None and tp * pp > node and {"have": tp * pp}


def _lora_engine(f: Facts) -> object:
    adapters = (f.whole(_LORA) or 0) > 0
    delta = f[f"{_ENGINE}.weight_sync_backend"] == "delta"
    return adapters and (f[f"{_ENGINE}.backend"] != "vllm" or delta)


def _ref_differs(name: str) -> Breach:
    """Return the breach of a reference model beside the policy on another number of ``name``."""
    policy, ref = f"{_PLACEMENT}.policy_{name}", f"{_PLACEMENT}.ref_{name}"

    def broken(f: Facts) -> object:
        if f[f"{_PLACEMENT}.colocate_policy_ref"] is False or not f.given(ref):
            return None
        return f[ref] != f[policy] and {"ref": f[ref], "policy": f[policy]}

    return broken


def _prompt_length(f: Facts) -> object:
    longest, prompt = f.whole("generator.max_input_length"), f.whole("trainer.max_prompt_length")
    if longest is None or prompt is None:
        return None
    several = (f.whole("generator.max_turns") or 1) > 1
    wrong = longest < prompt or (longest != prompt and not several)
    return wrong and {"prompt": prompt, "how": "at least" if several else "exactly"}


def _prefill(f: Facts) -> object:
    prefill, engines = f.whole(f"{_ENGINE}.num_prefill"), f.whole(f"{_ENGINE}.num_engines")
    if prefill is None or engines is None:
        return None
    return not 0 < prefill < engines and {"engines": engines}


RL_RULES: Final = (
    *rl_batch.RULES,
    Rule(
        id="SKY-RL-mg_sync",
        field=f"{_ENGINE}.weight_sync_backend",
        broken=lambda f: (
            megatron(f) and f[f"{_ENGINE}.weight_sync_backend"] not in ("nccl", "delta")
        ),
        rule="Megatron's weights are sent by nccl or delta.",
        remedy="Use nccl.",
    ),
    Rule(
        id="SKY-RL-mg_vllm",
        field=f"{_ENGINE}.backend",
        broken=lambda f: megatron(f) and f[f"{_ENGINE}.backend"] != "vllm",
        rule="The megatron strategy generates with vllm.",
        remedy="Use vllm.",
    ),
    Rule(
        id="SKY-RL-mg_critic",
        field="trainer.critic.model.path",
        broken=lambda f: megatron(f) and f.given("trainer.critic.model.path"),
        rule="The megatron strategy has no critic.",
        remedy="Leave it out, or use fsdp.",
    ),
    Rule(
        id="SKY-RL-mg_r3",
        field=f"{_ENGINE}.enable_return_routed_experts",
        broken=lambda f: (
            f[f"{RL}.moe_enable_routing_replay"] is True
            and f[f"{_ENGINE}.enable_return_routed_experts"] is not True
        ),
        rule="Routing replay needs the experts that the engine routed to.",
        remedy="Use true.",
    ),
    Rule(
        id="SKY-RL-mg_router_fusion",
        field=f"{RL}.transformer_config_kwargs.moe_router_fusion",
        broken=lambda f: (
            f[f"{RL}.moe_enable_routing_replay"] is True
            and f[f"{RL}.transformer_config_kwargs.moe_router_fusion"] is True
        ),
        rule="Routing replay excludes the fused router.",
        remedy="Use false.",
    ),
    Rule(
        id="SKY-RL-mg_cp",
        field="trainer.remove_microbatch_padding",
        broken=cp_padding(RL, "trainer.remove_microbatch_padding"),
        rule="Context parallelism needs padding removed.",
        remedy="Use trainer.remove_microbatch_padding=true.",
    ),
    Rule(
        id="SKY-RL-mg_ulysses",
        field="trainer.policy.sequence_parallel_size",
        broken=lambda f: (
            megatron(f) and (f.whole("trainer.policy.sequence_parallel_size") or 1) > 1
        ),
        rule="Ulysses is for FSDP; Megatron splits sequences with TP and CP.",
        remedy="Use 1.",
    ),
    Rule(
        id="SKY-RL-mtp_spec",
        field="trainer.mtp.num_speculative_tokens",
        broken=below("trainer.mtp.num_speculative_tokens"),
        rule="It is at least 1.",
        remedy="Use 1.",
    ),
    Rule(
        id="SKY-RL-ulysses_only",
        field="trainer.sequence_parallel_backend",
        broken=lambda f: f["trainer.sequence_parallel_backend"] not in (None, "ulysses"),
        rule="Sequence parallelism is by Ulysses only.",
        remedy="Use ulysses.",
    ),
    Rule(
        id="SKY-RL-lora_vllm",
        field=_LORA,
        broken=_lora_engine,
        rule="Adapters are sent to vllm only, and not as deltas.",
        remedy=f"Use {_ENGINE}.backend=vllm and weight_sync_backend=nccl.",
    ),
    Rule(
        id="SKY-RL-colocate",
        field="trainer.placement.colocate_all",
        broken=_colocated,
        rule="Colocated, the rollout's engines*tp*pp*dp = {rollout} GPUs are the policy's {gpus}.",
        remedy="Make both numbers equal.",
    ),
    Rule(
        id="SKY-RL-colocate_ref_nodes",
        field=f"{_PLACEMENT}.ref_num_nodes",
        broken=_ref_differs("num_nodes"),
        rule="Beside the policy, the reference model has its {policy} nodes, not {ref}.",
        remedy="Use {policy}.",
    ),
    Rule(
        id="SKY-RL-colocate_ref_gpus",
        field=f"{_PLACEMENT}.ref_num_gpus_per_node",
        broken=_ref_differs("num_gpus_per_node"),
        rule="Beside the policy, the reference model has its {policy} GPUs a node, not {ref}.",
        remedy="Use {policy}.",
    ),
    Rule(
        id="SKY-RL-prompt_len",
        field="generator.max_input_length",
        broken=_prompt_length,
        rule="It is {how} trainer.max_prompt_length = {prompt}.",
        remedy="Use {prompt}.",
    ),
    Rule(
        id="SKY-RL-ie_pd",
        field=f"{_ENGINE}.num_prefill",
        broken=_prefill,
        rule="Some of the {engines} engines prefill and some decode: it lies between 1 and one less"
        " than num_engines.",
        remedy="Use num_engines=2 or more, and fewer num_prefill.",
    ),
    Rule(
        id="SKY-RL-ie_ep",
        field=f"{_ENGINE}.expert_parallel_size",
        broken=rollout_experts(
            f"{_ENGINE}.expert_parallel_size",
            f"{_ENGINE}.data_parallel_size",
            f"{_ENGINE}.tensor_parallel_size",
        ),
        rule="Expert parallelism of the rollout is dp*tp = {have}.",
        remedy="Use {have}, or 1.",
    ),
    Rule(
        id="SKY-RL-ie_executor",
        field=f"{_ENGINE}.distributed_executor_backend",
        broken=lambda f: f[f"{_ENGINE}.distributed_executor_backend"] not in (None, "mp", "ray"),
        rule="The executor is mp or ray.",
        remedy="Use ray.",
    ),
    Rule(
        id="SKY-RL-ie_mp_node",
        field=f"{_ENGINE}.tensor_parallel_size",
        broken=_engine_node,
        rule="An engine of tp*pp = {have} GPUs does not fit a node with the mp executor.",
        remedy="Use the ray executor across nodes.",
    ),
    *shared(RL, megatron),
)
