"""How SkyRL's RL trainer divides its batches over ranks; ids of the August 2026 snapshot."""

from __future__ import annotations

import math
from typing import Final

from meshwright.frameworks.by_path import Facts, Rule, below, near_multiples, when, world

_TP, _PP, _CP = (f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))
_MICRO: Final = "trainer.micro_train_batch_size_per_gpu"


def megatron(f: Facts) -> bool:
    """Say whether the policy trains with Megatron."""
    return f["trainer.strategy"] == "megatron"


def _samples(f: Facts) -> int:
    return f.whole("generator.n_samples_per_prompt") or 1


def _dp(f: Facts) -> int | None:
    if megatron(f):
        return f.dp
    return f.gpus // (f.whole("trainer.policy.sequence_parallel_size") or 1) if f.gpus else None


def _batch(f: Facts) -> tuple[int, int, int, int] | None:
    """Return train and mini batch in prompts, the micro batch, and DP, when all are known."""
    train, mini = f.whole("trainer.train_batch_size"), f.whole("trainer.policy_mini_batch_size")
    micro, dp = f.whole(_MICRO), _dp(f)
    if train is None or mini is None or micro is None or dp is None:
        return None
    return (train, mini, micro, dp) if min(train, mini, micro, dp) > 0 else None


def _train_ge_mini(f: Facts) -> object:
    train, mini = f.whole("trainer.train_batch_size"), f.whole("trainer.policy_mini_batch_size")
    return (
        train is not None
        and mini is not None
        and (mini <= 0 or train < mini)
        and {"train": train, "mini": mini}
    )


def _train_mini_div(f: Facts) -> object:
    train, mini = f.whole("trainer.train_batch_size"), f.whole("trainer.policy_mini_batch_size")
    if train is None or mini is None or mini <= 0 or train < mini or train % mini == 0:
        return None
    return {"train": train, "mini": mini, "near": near_multiples(train, mini)}


def _per_gpu(f: Facts) -> dict[str, int] | None:
    batch = _batch(f)
    if batch is None:
        return None
    train, mini, micro, dp = batch
    n = _samples(f)
    return {
        "mini": mini,
        "micro": micro,
        "dp": dp,
        "n": n,
        "each": mini * n // dp,
        "all": train * n // dp,
        "least": -(-dp // n),
    }


def _mini_per_gpu(f: Facts) -> object:
    numbers = _per_gpu(f)
    return numbers is not None and numbers["each"] == 0 and numbers


def _mini_micro(f: Facts) -> object:
    numbers = _per_gpu(f)
    return numbers and numbers["each"] > 0 and numbers["each"] % numbers["micro"] and numbers


def _train_mini_per_gpu(f: Facts) -> object:
    numbers = None if _train_mini_div(f) else _per_gpu(f)  # said already
    return numbers and numbers["each"] > 0 and numbers["all"] % numbers["each"] and numbers


def _tail(f: Facts) -> object:
    numbers = _per_gpu(f)
    if not numbers or not f.gpus:
        return None
    product = numbers["mini"] * numbers["n"]
    return numbers["each"] > 0 and product % numbers["dp"] and {**numbers, "product": product}


def _critic_micro(f: Facts) -> object:
    """Return what is wrong with the critic's share of a mini batch; only FSDP has a critic."""
    mini, micro = f.whole("trainer.critic_mini_batch_size"), f.whole(_MICRO)
    nodes = f.whole("trainer.placement.critic_num_nodes") or 1
    per_node = f.whole("trainer.placement.critic_num_gpus_per_node")
    if not f.given("trainer.critic.model.path") or mini is None or per_node is None or not micro:
        return None
    dp = nodes * per_node // max(f.whole("trainer.critic.sequence_parallel_size") or 1, 1)
    if dp < 1 or micro < 1:
        return None
    each = mini * _samples(f) // dp
    return (each < 1 or each % micro) and {"each": each, "dp": dp, "micro": micro}


def _ref_dp(f: Facts) -> tuple[int, int] | None:
    """Return GPUs and TP*CP*PP of the reference model, when it is placed."""
    nodes = f.whole("trainer.placement.ref_num_nodes")
    per_node = f.whole("trainer.placement.ref_num_gpus_per_node")
    if nodes is None or per_node is None or not megatron(f):
        return None
    ref = "trainer.ref.megatron_config"
    unit = math.prod(max(f.whole(f"{ref}.{name}") or 1, 1) for name in (_TP, _PP, _CP))
    return nodes * per_node, unit


def _ref_world(f: Facts) -> object:
    ref = _ref_dp(f)
    if ref is None or ref[0] % ref[1] == 0:
        return None
    return {"gpus": ref[0], "unit": ref[1]}


def _lcm_dp(f: Facts) -> object:
    ref, dp, train = _ref_dp(f), _dp(f), f.whole("trainer.train_batch_size")
    if ref is None or dp is None or train is None or ref[0] % ref[1] or ref[0] < ref[1]:
        return None
    unit, have = math.lcm(dp, ref[0] // ref[1]), train * _samples(f)
    return have < unit and {"have": have, "unit": unit}


RULES: Final = (
    Rule(
        id="SKY-RL-train_ge_mini",
        field="trainer.train_batch_size",
        broken=_train_ge_mini,
        rule="It is at least policy_mini_batch_size = {mini}, which is positive.",
        remedy="Use {mini} or a multiple.",
    ),
    Rule(
        id="SKY-RL-micro_pos",
        field=_MICRO,
        broken=below(_MICRO),
        rule="It is at least 1.",
        remedy="Use 1.",
    ),
    Rule(
        id="SKY-RL-micro_fwd_pos",
        field="trainer.micro_forward_batch_size_per_gpu",
        broken=below("trainer.micro_forward_batch_size_per_gpu"),
        rule="It is at least 1.",
        remedy="Use 1.",
    ),
    Rule(
        id="SKY-RL-world_div",
        field="trainer.placement.policy_num_gpus_per_node",
        broken=when(megatron, world),
        rule="{gpus} GPUs are no multiple of pp*cp*tp = {unit}.",
        remedy="Use {near} GPUs, or smaller degrees.",
    ),
    Rule(
        id="SKY-RL-fsdp_dp",
        field="trainer.policy.sequence_parallel_size",
        broken=lambda f: (
            not megatron(f)
            and f.gpus is not None
            and f.gpus % max(f.whole("trainer.policy.sequence_parallel_size") or 1, 1)
        ),
        rule="The GPUs are no multiple of the Ulysses size; data parallelism is rounded down.",
        remedy="Use a divisor of the GPUs.",
        severity="warning",
    ),
    Rule(
        id="SKY-RL-train_mini_div",
        field="trainer.train_batch_size",
        broken=_train_mini_div,
        rule="{train} is no multiple of policy_mini_batch_size = {mini}.",
        remedy="Use {near}.",
    ),
    Rule(
        id="SKY-RL-mini_per_gpu",
        field="trainer.policy_mini_batch_size",
        broken=_mini_per_gpu,
        rule="{mini}*{n} samples // {dp} data parallel ranks = 0: there is nothing to train on.",
        remedy="Use {least} or more.",
    ),
    Rule(
        id="SKY-RL-mini_micro",
        field="trainer.policy_mini_batch_size",
        broken=_mini_micro,
        rule="{mini}*{n} // {dp} = {each} samples a rank are no multiple of the micro batch"
        " {micro}.",
        remedy="Use micro_train_batch_size_per_gpu=1, or a mini batch that divides.",
    ),
    Rule(
        id="SKY-RL-train_mini_per_gpu",
        field="trainer.train_batch_size",
        broken=_train_mini_per_gpu,
        rule="{all} samples a rank are no multiple of the mini batch's {each}.",
        remedy="Make both batches multiples of the data parallel size {dp}.",
    ),
    Rule(
        id="tail_is_cut",
        field="trainer.policy_mini_batch_size",
        broken=_tail,
        rule="{mini}*{n} = {product} samples over {dp} ranks leave a rest, which is cut without a"
        " message.",
        remedy="Make policy_mini_batch_size*n_samples_per_prompt a multiple of {dp}.",
        severity="warning",
    ),
    Rule(
        id="SKY-RL-critic_micro",
        field="trainer.critic_mini_batch_size",
        broken=_critic_micro,
        rule="{each} samples on each of the critic's {dp} data parallel ranks are no positive"
        " multiple of the micro batch {micro}.",
        remedy="Use micro_train_batch_size_per_gpu=1, or a mini batch that divides.",
    ),
    Rule(
        id="SKY-RL-ref_world",
        field="trainer.placement.ref_num_gpus_per_node",
        broken=_ref_world,
        rule="The reference model's {gpus} GPUs are no multiple of pp*cp*tp = {unit}.",
        remedy="Use the degrees and the placement of the policy.",
    ),
    Rule(
        id="SKY-RL-lcm_dp",
        field="trainer.train_batch_size",
        broken=_lcm_dp,
        rule="{have} samples are fewer than lcm of the policy's and the reference's DP = {unit}.",
        remedy="Raise train_batch_size*n_samples_per_prompt to {unit}.",
    ),
)
