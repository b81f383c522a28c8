"""What verl refuses or changes; ids of the January 2026 snapshot."""

from __future__ import annotations

from typing import Final

from meshwright.errors import nearest_divisors
from meshwright.frameworks.by_path import (
    Breach,
    Facts,
    Rule,
    expert_world,
    rollout_experts,
    when,
    world,
)

_ACTOR: Final = "actor_rollout_ref.actor"
_ROLLOUT: Final = "actor_rollout_ref.rollout"
_MINI: Final = f"{_ACTOR}.ppo_mini_batch_size"
_MICRO: Final = f"{_ACTOR}.ppo_micro_batch_size_per_gpu"
_OLD_MICRO: Final = f"{_ACTOR}.ppo_micro_batch_size"


def _megatron(f: Facts) -> bool:
    return f[f"{_ACTOR}.strategy"] == "megatron"


def _fixed(f: Facts) -> bool:
    """Say whether batches have fixed sizes; dynamic ones skip verl's checks."""
    return f[f"{_ACTOR}.use_dynamic_bsz"] is not True


def _dynamic(f: Facts) -> bool:
    return not _fixed(f)


def _train(f: Facts) -> object:
    batch, n = f.whole("data.train_batch_size"), f.whole(f"{_ROLLOUT}.n")
    if not _fixed(f) or batch is None or n is None or f.gpus is None or batch * n <= 0:
        return None
    micro = f.whole(_MICRO) or 1
    if _megatron(f):
        unit = (f.dp or 0) * micro
    else:
        unit = f.gpus // (f.whole(f"{_ACTOR}.ulysses_sequence_parallel_size") or 1)
    if unit <= 0 or batch * n % unit == 0:
        return None
    return {"have": batch * n, "batch": batch, "n": n, "unit": unit}


def _normalized(f: Facts) -> int | None:
    """Return the mini batch of one data parallel rank."""
    mini, n = f.whole(_MINI), f.whole(f"{_ROLLOUT}.n")
    if mini is None or n is None or f.gpus is None:
        return None
    if _megatron(f):
        return None if f.dp is None else mini * n // f.dp
    ranks = f.gpus // max(f.whole(f"{_ACTOR}.ulysses_sequence_parallel_size") or 1, 1)
    return mini * n // ranks if ranks else None


def _ulysses_heads(f: Facts) -> object:
    ranks = f.whole(f"{_ACTOR}.ulysses_sequence_parallel_size") or 1
    model = f.model
    if _megatron(f) or model is None or ranks < 1 or model.num_heads % ranks == 0:
        return None
    near = " or ".join(map(str, nearest_divisors(model.num_heads, ranks)))
    return {"heads": model.num_heads, "name": model.name, "near": near}


def _mini_zero(f: Facts) -> object:
    return _normalized(f) == 0


def _mini_micro(f: Facts) -> object:
    each, micro = _normalized(f), f.whole(_MICRO)
    if not _fixed(f) or not each or not micro or micro < 0 or each % micro == 0:
        return None
    return {"each": each, "micro": micro}


def _both(prefix: str) -> Breach:
    def broken(f: Facts) -> object:
        a = f.given(f"{prefix}.log_prob_micro_batch_size")
        b = f.given(f"{prefix}.log_prob_micro_batch_size_per_gpu")
        return a and b

    return broken


def _old_micro_sp(f: Facts) -> object:
    micro, sp = f.whole(_OLD_MICRO), f.whole(f"{_ACTOR}.ulysses_sequence_parallel_size") or 1
    short = micro is not None and f.gpus is not None and micro * sp < f.gpus
    return _fixed(f) and not _megatron(f) and short


def _old_mini_micro(f: Facts) -> object:
    mini, micro = f.whole(_MINI), f.whole(_OLD_MICRO)
    return _fixed(f) and mini and micro and micro > 0 and mini % micro and {"mini": mini}


def _chunk_groups(f: Facts) -> object:
    """Return what is wrong when the micro batches of a mini batch do not fill their groups."""
    each, micro = _normalized(f), f.whole(_MICRO)
    pp = f.degree("pipeline_model_parallel_size")
    if f.degree("virtual_pipeline_model_parallel_size") == 1 or not _fixed(f) or pp == 1:
        return None
    if not each or not micro or micro < 1 or each % micro:
        return None
    group = f.degree("microbatch_group_size_per_vp_stage")
    unit = pp if group == 1 else group
    return each // micro % unit and {"have": each // micro, "unit": unit}


def _cp_of_vision(f: Facts) -> object:
    per_token = f"{_ACTOR}.megatron.override_transformer_config.calculate_per_token_loss"
    split = f.degree("context_parallel_size") > 1
    return _megatron(f) and split and f.sees_images and f[per_token] is not True


def _rollout_node(f: Facts) -> object:
    tp = f.whole(f"{_ROLLOUT}.tensor_model_parallel_size")
    node = f.whole("trainer.n_gpus_per_node")
    return tp is not None and node is not None and 0 < tp < node and node % tp and {"node": node}


RULES: Final = (
    Rule(
        id="VERL-world_div",
        field="trainer.n_gpus_per_node",
        broken=when(_fixed, when(_megatron, world)),
        rule="{gpus} GPUs are no multiple of tp*pp*cp = {unit}.",
        remedy="Use {near} GPUs, or smaller degrees.",
    ),
    Rule(
        id="VERL-world_div",
        field="trainer.n_gpus_per_node",
        broken=when(_dynamic, when(_megatron, world)),
        rule="{gpus} GPUs are no multiple of tp*pp*cp = {unit}; with dynamic batches verl does not"
        " check it, and Megatron Core stops at start.",
        remedy="Use {near} GPUs, or smaller degrees.",
    ),
    Rule(
        id="VERL-MG-expert_world",
        field=f"{_ACTOR}.megatron.expert_model_parallel_size",
        broken=when(_megatron, expert_world),
        rule="{gpus} GPUs are no multiple of etp*ep*pp = {unit}; Megatron Core stops at start.",
        remedy="Use {near} GPUs, a smaller ep, or expert_tensor_parallel_size=1.",
    ),
    Rule(
        id="VERL-ACTOR-micro_both",
        field=_OLD_MICRO,
        broken=lambda f: _fixed(f) and f.given(_OLD_MICRO) and f.given(_MICRO),
        rule="Both the global and the per-GPU micro batch are set.",
        remedy="Keep ppo_micro_batch_size_per_gpu.",
    ),
    Rule(
        id="VERL-ACTOR-micro_none",
        field=_MICRO,
        broken=lambda f: _fixed(f) and not f.given(_OLD_MICRO) and not f.given(_MICRO),
        rule="No micro batch is set.",
        remedy="Set ppo_micro_batch_size_per_gpu=1.",
    ),
    Rule(
        id="VERL-train_div",
        field="data.train_batch_size",
        broken=_train,
        rule="{batch}*{n} = {have} samples are no multiple of {unit} (DP times micro batch; with"
        " FSDP the GPUs).",
        remedy="Use a train_batch_size whose samples are a multiple of {unit}.",
    ),
    Rule(
        id="VERL-ACTOR-mini_le_train",
        field=_MINI,
        broken=lambda f: (
            _fixed(f) and (f.whole("data.train_batch_size") or 2**62) < (f.whole(_MINI) or 0)
        ),
        rule="The mini batch is larger than data.train_batch_size.",
        remedy="Raise data.train_batch_size, or lower it.",
    ),
    Rule(
        id="VERL-ACTOR-mini_zero",
        field=_MINI,
        broken=_mini_zero,
        rule="ppo_mini_batch_size*n // data parallel ranks = 0: it must be at least 1.",
        remedy="Raise ppo_mini_batch_size to the data parallel size or more.",
    ),
    Rule(
        id="VERL-ACTOR-mini_per_gpu",
        field=_MINI,
        broken=_mini_micro,
        rule="The {each} samples of a rank are no multiple of the micro batch {micro}.",
        remedy="Use ppo_micro_batch_size_per_gpu=1, or a mini batch that divides.",
    ),
    Rule(
        id="VERL-ACTOR-mini_micro",
        field=_OLD_MICRO,
        broken=_old_mini_micro,
        rule="It does not divide the mini batch {mini}.",
        remedy="Use ppo_micro_batch_size_per_gpu instead.",
    ),
    Rule(
        id="VERL-ACTOR-micro_sp",
        field=_OLD_MICRO,
        broken=_old_micro_sp,
        rule="Times the Ulysses size it is at least the number of GPUs.",
        remedy="Use ppo_micro_batch_size_per_gpu instead.",
    ),
    Rule(
        id="VERL-ACTOR-ulysses_pad",
        field=f"{_ACTOR}.ulysses_sequence_parallel_size",
        broken=lambda f: (
            not _megatron(f)
            and (f.whole(f"{_ACTOR}.ulysses_sequence_parallel_size") or 1) > 1
            and f["actor_rollout_ref.model.use_remove_padding"] is False
        ),
        rule="Ulysses needs padding removed.",
        remedy="Use actor_rollout_ref.model.use_remove_padding=True.",
    ),
    Rule(
        id="ulysses_divides_heads",
        field=f"{_ACTOR}.ulysses_sequence_parallel_size",
        broken=_ulysses_heads,
        rule="Ulysses splits the {heads} attention heads of {name}.",
        remedy="Use {near}.",
    ),
    Rule(
        id="VERL-micro_one",
        field=f"{_ROLLOUT}.log_prob_micro_batch_size",
        broken=_both(_ROLLOUT),
        rule="Exactly one of the two log-prob micro batches is set.",
        remedy="Keep log_prob_micro_batch_size_per_gpu.",
    ),
    Rule(
        id="VERL-micro_one",
        field="actor_rollout_ref.ref.log_prob_micro_batch_size",
        broken=_both("actor_rollout_ref.ref"),
        rule="Exactly one of the two log-prob micro batches is set.",
        remedy="Keep log_prob_micro_batch_size_per_gpu.",
    ),
    Rule(
        id="VERL-val_temp",
        field=f"{_ROLLOUT}.temperature",
        broken=lambda f: (
            f[f"{_ROLLOUT}.val_kwargs.do_sample"] is True
            and f[f"{_ROLLOUT}.temperature"] in (0, 0.0)
        ),
        rule="Sampling in validation needs a temperature above 0.",
        remedy="Use 1.0.",
    ),
    Rule(
        id="VERL-ENG-mg_dtype",
        field=f"{_ACTOR}.megatron.dtype",
        broken=lambda f: (
            _megatron(f) and f[f"{_ACTOR}.megatron.dtype"] not in ("bfloat16", "float16")
        ),
        rule="Megatron trains in bfloat16 or float16.",
        remedy="Use bfloat16.",
    ),
    Rule(
        id="VERL-ENG-fsdp_strategy",
        field=f"{_ACTOR}.strategy",
        broken=lambda f: f[f"{_ACTOR}.strategy"] not in ("megatron", "fsdp", "fsdp2", "veomni"),
        rule="The strategy is megatron, fsdp or fsdp2.",
        remedy="Use megatron.",
    ),
    Rule(
        id="VERL-MG-mbridge",
        field=f"{_ACTOR}.megatron.use_mbridge",
        broken=lambda f: _megatron(f) and f[f"{_ACTOR}.megatron.use_mbridge"] is False,
        rule="The Megatron engine goes through mbridge.",
        remedy="Use True.",
    ),
    Rule(
        id="VERL-MG-vpp_micro",
        field=_MINI,
        broken=_chunk_groups,
        rule="Interleaved stages take micro batches in groups of {unit}; a mini batch has {have} on"
        " each rank.",
        remedy="Make the micro batches of a mini batch a multiple of {unit}.",
    ),
    Rule(
        id="VERL-MG-fused",
        field="actor_rollout_ref.model.use_fused_kernels",
        broken=lambda f: _megatron(f) and f["actor_rollout_ref.model.use_fused_kernels"] is True,
        rule="The Megatron engine has no fused kernels.",
        remedy="Use False.",
    ),
    Rule(
        id="VERL-ROLL-mode",
        field=f"{_ROLLOUT}.mode",
        broken=lambda f: f[f"{_ROLLOUT}.mode"] == "sync",
        rule="The synchronous rollout is gone.",
        remedy="Use async.",
    ),
    Rule(
        id="VERL-ROLL-ep",
        field=f"{_ROLLOUT}.expert_parallel_size",
        broken=rollout_experts(
            f"{_ROLLOUT}.expert_parallel_size",
            f"{_ROLLOUT}.tensor_model_parallel_size",
            f"{_ROLLOUT}.data_parallel_size",
        ),
        rule="Expert parallelism of the rollout is tp*dp = {have}.",
        remedy="Use {have}, or 1.",
    ),
    Rule(
        id="VERL-ROLL-pp",
        field=f"{_ROLLOUT}.pipeline_model_parallel_size",
        broken=lambda f: (
            (f.whole(f"{_ROLLOUT}.pipeline_model_parallel_size") or 1) > 1
            and f[f"{_ROLLOUT}.name"] in ("vllm", "sglang", "trtllm")
        ),
        rule="This engine generates without pipeline stages.",
        remedy="Use 1.",
    ),
    Rule(
        id="rollout_tp_divides_node",
        field=f"{_ROLLOUT}.tensor_model_parallel_size",
        broken=_rollout_node,
        rule="It divides the {node} GPUs of a node.",
        remedy="Use a divisor of {node}.",
    ),
    Rule(
        id="VERL-ENG-sp_off",
        field=f"{_ACTOR}.megatron.sequence_parallel",
        broken=lambda f: (
            _megatron(f)
            and f.degree("tensor_model_parallel_size") == 1
            and f[f"{_ACTOR}.megatron.sequence_parallel"] is True
        ),
        rule="With TP = 1 sequence parallelism is turned off.",
        remedy="Leave it out.",
        severity="warning",
    ),
    Rule(
        id="vision_cp_wants_loss_per_token",
        field=f"{_ACTOR}.megatron.context_parallel_size",
        broken=_cp_of_vision,
        rule="With context parallelism Megatron-Bridge turns the loss per token on for models that"
        " read images; a loss function that does not expect it makes the gradients explode.",
        remedy="Set override_transformer_config.calculate_per_token_loss=True, with a verl whose"
        " loss returns the number of tokens.",
        severity="warning",
    ),
    Rule(
        id="VERL-MG-disp_fixed",
        field=f"{_ACTOR}.megatron.override_transformer_config",
        broken=lambda f: _megatron(f) and f.degree("expert_model_parallel_size") > 1,
        rule="The bridge takes the alltoall dispatcher, no load balancing and flash attention"
        " unless this says otherwise.",
        severity="note",
    ),
)
