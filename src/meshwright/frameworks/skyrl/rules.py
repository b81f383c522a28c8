"""What SkyRL refuses or changes before and while it starts; ids of the August 2026 snapshot."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from meshwright.frameworks.by_path import Facts, Rule, near_multiples

_RL: Final = "trainer.policy.megatron_config"
_SFT: Final = "megatron_config"
_ENGINE: Final = "generator.inference_engine"
_TP, _PP, _CP = (f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))


def _megatron(f: Facts) -> bool:
    return f["trainer.strategy"] == "megatron"


def _sft_megatron(f: Facts) -> bool:
    return f["strategy"] == "megatron"


def _world(applies: Callable[[Facts], bool]) -> Callable[[Facts], object]:
    def broken(f: Facts) -> object:
        unit = f.model_parallel
        if not applies(f) or f.gpus is None or f.gpus % unit == 0:
            return None
        return {"gpus": f.gpus, "unit": unit, "near": near_multiples(f.gpus, unit)}

    return broken


def _expert_world(applies: Callable[[Facts], bool]) -> Callable[[Facts], object]:
    def broken(f: Facts) -> object:
        ep, pp = f.degree("expert_model_parallel_size"), f.degree("pipeline_model_parallel_size")
        unit = pp * ep * f.degree("expert_tensor_parallel_size")
        if not applies(f) or f.gpus is None or ep == 1 or f.gpus % unit == 0:
            return None
        return {"gpus": f.gpus, "unit": unit, "near": near_multiples(f.gpus, unit)}

    return broken


def _not_positive(path: str) -> Callable[[Facts], object]:
    def broken(f: Facts) -> object:
        value = f.whole(path)
        return value is not None and value <= 0

    return broken


def _samples(f: Facts) -> int:
    return f.whole("generator.n_samples_per_prompt") or 1


def _dp(f: Facts) -> int | None:
    if _megatron(f):
        return f.dp
    return f.gpus // (f.whole("trainer.policy.sequence_parallel_size") or 1) if f.gpus else None


def _batch(f: Facts) -> tuple[int, int, int, int] | None:
    """Return train and mini batch in prompts, the micro batch, and DP, when all are known."""
    train, mini = f.whole("trainer.train_batch_size"), f.whole("trainer.policy_mini_batch_size")
    micro, dp = f.whole("trainer.micro_train_batch_size_per_gpu"), _dp(f)
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
    numbers = _per_gpu(f)
    return numbers and numbers["each"] > 0 and numbers["all"] % numbers["each"] and numbers


def _tail(f: Facts) -> object:
    numbers = _per_gpu(f)
    if not numbers or not f.gpus:
        return None
    product = numbers["mini"] * numbers["n"]
    return numbers["each"] > 0 and product % numbers["dp"] and {**numbers, "product": product}


def _ref_dp(f: Facts) -> tuple[int, int] | None:
    """Return GPUs and TP*CP*PP of the reference model, when it is placed."""
    nodes = f.whole("trainer.placement.ref_num_nodes")
    per_node = f.whole("trainer.placement.ref_num_gpus_per_node")
    if nodes is None or per_node is None or not _megatron(f):
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


def _cp_padding(root: str, flag: str) -> Callable[[Facts], object]:
    def broken(f: Facts) -> object:
        return (f.whole(f"{root}.{_CP}") or 1) > 1 and f[flag] is False

    return broken


def _colocated(f: Facts) -> object:
    if f["trainer.placement.colocate_all"] is not True or f.gpus is None:
        return None
    sizes = ("num_engines", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    given = [f.whole(f"{_ENGINE}.{name}") for name in sizes]
    if all(size is None for size in given):
        return None
    rollout = math.prod(size or 1 for size in given)
    return rollout != f.gpus and {"rollout": rollout, "gpus": f.gpus}


def _engine_ep(f: Facts) -> object:
    ep = f.whole(f"{_ENGINE}.expert_parallel_size") or 1
    dp = f.whole(f"{_ENGINE}.data_parallel_size") or 1
    tp = f.whole(f"{_ENGINE}.tensor_parallel_size") or 1
    return ep > 1 and dp * tp != ep and {"ep": ep, "have": dp * tp}


def _engine_node(f: Facts) -> object:
    tp = f.whole(f"{_ENGINE}.tensor_parallel_size") or 1
    pp = f.whole(f"{_ENGINE}.pipeline_parallel_size") or 1
    node = f.whole("trainer.placement.policy_num_gpus_per_node")
    mp = f[f"{_ENGINE}.distributed_executor_backend"] == "mp"
    colocated = f["trainer.placement.colocate_all"] is True
    return mp and colocated and node is not None and tp * pp > node and {"have": tp * pp}


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
    if batch is None or micro is None or dp is None or batch <= 0 or micro <= 0:
        return None
    each = batch // dp
    return each % micro and {"each": each, "micro": micro, "near": math.gcd(each, micro)}


def _etp_left_out(root: str) -> Callable[[Facts], object]:
    def broken(f: Facts) -> object:
        ep = f.whole(f"{root}.expert_model_parallel_size") or 1
        return ep > 1 and f.whole(f"{root}.expert_tensor_parallel_size") is None

    return broken


def _recompute_filled(root: str) -> Callable[[Facts], object]:
    def broken(f: Facts) -> object:
        kwargs = f"{root}.transformer_config_kwargs"
        selective = f[f"{kwargs}.recompute_granularity"] == "selective"
        return selective and not all(
            f.has(f"{kwargs}.{name}") for name in ("recompute_method", "recompute_num_layers")
        )

    return broken


def _shared(root: str, applies: Callable[[Facts], bool]) -> tuple[Rule, ...]:
    """Return the rules that both trainers have, for one root."""
    return (
        Rule(
            id="SKY-MG-no_vpp",
            field=f"{root}.transformer_config_kwargs.virtual_pipeline_model_parallel_size",
            broken=lambda f: f.degree("virtual_pipeline_model_parallel_size") > 1,
            rule="SkyRL runs one model chunk a pipeline rank.",
            remedy="Leave it out.",
        ),
        Rule(
            id="SKY-CFG-expert_world",
            field=f"{root}.expert_model_parallel_size",
            broken=_expert_world(applies),
            rule="{gpus} GPUs are no multiple of pp*ep*etp = {unit}; Megatron Core stops at start.",
            remedy="Use {near} GPUs, a smaller ep, or expert_tensor_parallel_size=1.",
        ),
        Rule(
            id="SKY-MG-etp_none",
            field=f"{root}.expert_tensor_parallel_size",
            broken=_etp_left_out(root),
            rule="Left out with experts split, groups take TP where the model takes 1.",
            remedy="Set expert_tensor_parallel_size=1.",
            severity="warning",
        ),
        Rule(
            id="SKY-CFG-recompute_default",
            field=f"{root}.transformer_config_kwargs.recompute_granularity",
            broken=_recompute_filled(root),
            rule="Missing keys are filled with uniform and 1, which selective refuses.",
            remedy="Set recompute_method=null and recompute_num_layers=null.",
        ),
        Rule(
            id="SKY-MG-varlen",
            field=f"{root}.moe_token_dispatcher_type",
            broken=lambda f: f[f"{root}.moe_token_dispatcher_type"] == "allgather",
            rule="Sequences have variable lengths, which the allgather dispatcher does not take.",
            remedy="Use alltoall.",
        ),
        Rule(
            id="SKY-MG-sp_auto",
            field=f"{root}.tensor_model_parallel_size",
            broken=lambda f: applies(f) and f.degree(_TP) > 1,
            rule="Sequence parallelism is turned on, because TP > 1.",
            severity="note",
        ),
    )


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
        broken=_not_positive("micro_train_batch_size_per_gpu"),
        rule="It is at least 1.",
        remedy="Use 1.",
    ),
    Rule(
        id="SKY-SFT-batch_pos",
        field="batch_size",
        broken=_not_positive("batch_size"),
        rule="It is at least 1.",
        remedy="Use 1 or more.",
    ),
    Rule(
        id="SKY-SFT-world_div",
        field="placement.num_gpus_per_node",
        broken=_world(_sft_megatron),
        rule="{gpus} GPUs are no multiple of tp*pp*cp = {unit} (TP and PP are 2 by default).",
        remedy="Use {near} GPUs, or smaller degrees.",
    ),
    Rule(
        id="SKY-SFT-cp",
        field="remove_microbatch_padding",
        broken=_cp_padding(_SFT, "remove_microbatch_padding"),
        rule="Context parallelism needs padding removed.",
        remedy="Use remove_microbatch_padding=true.",
    ),
    Rule(
        id="SKY-SFT-ulysses",
        field="sequence_parallel_size",
        broken=lambda f: _sft_megatron(f) and (f.whole("sequence_parallel_size") or 1) > 1,
        rule="Ulysses is for FSDP; Megatron splits sequences with TP and CP.",
        remedy="Use sequence_parallel_size=1.",
    ),
    Rule(
        id="SKY-SFT-pack_strategy",
        field="use_sequence_packing",
        broken=lambda f: f["use_sequence_packing"] is True and not _sft_megatron(f),
        rule="Packing needs the megatron strategy.",
        remedy="Use strategy=megatron.",
    ),
    Rule(
        id="SKY-SFT-pack_len",
        field="max_length",
        broken=lambda f: f["use_sequence_packing"] is True and f.whole("max_length") is None,
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
        id="SKY-SFT-pack_batch",
        field="batch_size",
        broken=lambda f: (
            f["use_sequence_packing"] is True
            and f.dp is not None
            and 0 < (f.whole("batch_size") or 0) < f.dp
        ),
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
        field=f"{_SFT}.tensor_model_parallel_size",
        broken=lambda f: (
            _sft_megatron(f) and not (f.given(f"{_SFT}.{_TP}") and f.given(f"{_SFT}.{_PP}"))
        ),
        rule="Left out, TP and PP are 2 each.",
        remedy="State both.",
        severity="warning",
    ),
    *_shared(_SFT, _sft_megatron),
)

RL_RULES: Final = (
    Rule(
        id="SKY-RL-train_ge_mini",
        field="trainer.train_batch_size",
        broken=_train_ge_mini,
        rule="It is at least policy_mini_batch_size = {mini}, which is positive.",
        remedy="Use {mini} or a multiple.",
    ),
    Rule(
        id="SKY-RL-micro_pos",
        field="trainer.micro_train_batch_size_per_gpu",
        broken=_not_positive("trainer.micro_train_batch_size_per_gpu"),
        rule="It is at least 1.",
        remedy="Use 1.",
    ),
    Rule(
        id="SKY-RL-micro_fwd_pos",
        field="trainer.micro_forward_batch_size_per_gpu",
        broken=_not_positive("trainer.micro_forward_batch_size_per_gpu"),
        rule="It is at least 1.",
        remedy="Use 1.",
    ),
    Rule(
        id="SKY-RL-world_div",
        field="trainer.placement.policy_num_gpus_per_node",
        broken=_world(_megatron),
        rule="{gpus} GPUs are no multiple of pp*cp*tp = {unit}.",
        remedy="Use {near} GPUs, or smaller degrees.",
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
    Rule(
        id="SKY-RL-mg_sync",
        field=f"{_ENGINE}.weight_sync_backend",
        broken=lambda f: (
            _megatron(f) and f[f"{_ENGINE}.weight_sync_backend"] not in ("nccl", "delta")
        ),
        rule="Megatron's weights are sent by nccl or delta.",
        remedy="Use nccl.",
    ),
    Rule(
        id="SKY-RL-mg_vllm",
        field=f"{_ENGINE}.backend",
        broken=lambda f: _megatron(f) and f[f"{_ENGINE}.backend"] != "vllm",
        rule="The megatron strategy generates with vllm.",
        remedy="Use vllm.",
    ),
    Rule(
        id="SKY-RL-mg_critic",
        field="trainer.critic.model.path",
        broken=lambda f: _megatron(f) and f.given("trainer.critic.model.path"),
        rule="The megatron strategy has no critic.",
        remedy="Leave it out, or use fsdp.",
    ),
    Rule(
        id="SKY-RL-mg_r3",
        field=f"{_ENGINE}.enable_return_routed_experts",
        broken=lambda f: (
            f[f"{_RL}.moe_enable_routing_replay"] is True
            and f[f"{_ENGINE}.enable_return_routed_experts"] is not True
        ),
        rule="Routing replay needs the experts that the engine routed to.",
        remedy="Use true.",
    ),
    Rule(
        id="SKY-RL-mg_router_fusion",
        field=f"{_RL}.transformer_config_kwargs.moe_router_fusion",
        broken=lambda f: (
            f[f"{_RL}.moe_enable_routing_replay"] is True
            and f[f"{_RL}.transformer_config_kwargs.moe_router_fusion"] is True
        ),
        rule="Routing replay excludes the fused router.",
        remedy="Use false.",
    ),
    Rule(
        id="SKY-RL-mg_cp",
        field="trainer.remove_microbatch_padding",
        broken=_cp_padding(_RL, "trainer.remove_microbatch_padding"),
        rule="Context parallelism needs padding removed.",
        remedy="Use trainer.remove_microbatch_padding=true.",
    ),
    Rule(
        id="SKY-RL-mg_ulysses",
        field="trainer.policy.sequence_parallel_size",
        broken=lambda f: (
            _megatron(f) and (f.whole("trainer.policy.sequence_parallel_size") or 1) > 1
        ),
        rule="Ulysses is for FSDP; Megatron splits sequences with TP and CP.",
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
        id="SKY-RL-fsdp_dp",
        field="trainer.policy.sequence_parallel_size",
        broken=lambda f: (
            not _megatron(f)
            and f.gpus is not None
            and f.gpus % max(f.whole("trainer.policy.sequence_parallel_size") or 1, 1)
        ),
        rule="The GPUs are no multiple of the Ulysses size; data parallelism is rounded down.",
        remedy="Use a divisor of the GPUs.",
        severity="warning",
    ),
    Rule(
        id="SKY-RL-colocate",
        field="trainer.placement.colocate_all",
        broken=_colocated,
        rule="Colocated, the rollout's engines*tp*pp*dp = {rollout} GPUs are the policy's {gpus}.",
        remedy="Make both numbers equal.",
    ),
    Rule(
        id="SKY-RL-ie_ep",
        field=f"{_ENGINE}.expert_parallel_size",
        broken=_engine_ep,
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
    *_shared(_RL, _megatron),
)
