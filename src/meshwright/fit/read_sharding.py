"""Settings of a measured run -> what data parallelism shards, in each framework's words."""

from __future__ import annotations

import re

from meshwright.fit.framework import Framework
from meshwright.fit.settings import NO, NOT_STATED, YES, Settings
from meshwright.parallel.layout import Zero

KINDS = {
    **dict.fromkeys(("full", "full_shard", "fully_shard", "fsdp", "fsdp1", "fsdp2"), "full"),
    **dict.fromkeys(("zero3", "zero_3", "stage3", "stage_3", "zero_stage_3"), "full"),
    **dict.fromkeys(("optim_grads_params", "megatron_fsdp", "mcore_fsdp", "custom_fsdp"), "full"),
    **dict.fromkeys(("shard_grad_op", "optim_grads", "zero2", "zero_2", "stage_2"), "grads"),
    **dict.fromkeys(("optim", "zero1", "zero_1", "stage_1", "distributed_optimizer"), "optim"),
    **dict.fromkeys(("hsdp", "hybrid", "hybrid_shard", "hybrid_full_shard"), "hybrid"),
    **dict.fromkeys(("ddp", "no_shard", "zero0", "zero_0"), "none"),
}
"""The words of FSDP1 and FSDP2, Composer, DeepSpeed and Megatron's FSDP."""

ZERO = {"full": Zero.optim_grads_params, "grads": Zero.optim_grads, "optim": Zero.optim}

REPLICAS = ("num_distributed_optimizer_instances", "data_parallel_replicate_degree", "dp_replicate")


def read_sharding(
    s: Settings, framework: Framework, group: int, pp: int, node: int
) -> tuple[Zero, int]:
    """Return what is sharded, and the number of replicas, over ``group`` data-parallel ranks.

    ``node``: the GPUs of a node, over which hybrid sharding shards where no size is stated.
    """
    kind, size = _stated(s)
    if kind == "none":
        return _without_fsdp(s, framework, group)
    number = _shards(s, kind, size, group, node)
    zero = ZERO.get(kind, Zero.optim_grads_params)
    if framework.gathers_once and pp != 1:
        # In a pipeline FSDP2 gathers weights before the first micro-batch and reduces
        # gradients after the last.
        zero = Zero.optim
    return zero, group // number


def _stated(s: Settings) -> tuple[str, str]:
    """Return the kind of sharding that a row states, and the size of its group as text."""
    word, _, size = s.cell("fsdp").lower().partition(":")
    word = re.sub(r"[\s-]+", "_", word.partition("(")[0].strip())
    if word in YES:
        return "full", size
    if word in KINDS and KINDS[word] != "none":
        return KINDS[word], size
    if word not in NO and word not in NOT_STATED and word not in KINDS:
        s.assumed.append(f"fsdp {word!r} is read as none")
    if s.flag("use_megatron_fsdp", "use_custom_fsdp", "use_torch_fsdp2", default=False):
        words = s.text("data_parallel_sharding_strategy", default="optim_grads_params")
        return KINDS.get(words, "none"), ""
    strategy = s.text("sharding_strategy").rpartition(".")[2]
    return KINDS.get(strategy, "none"), ""


def _shards(s: Settings, kind: str, size: str, group: int, node: int) -> int:
    """Return over how many ranks is sharded; what does not divide the group is read as all."""
    pair = re.match(r"(\d{1,7})x(\d{1,7})", size)
    stated = re.match(r"\d{1,7}(?!\d)", size)
    replicas = s.whole(*REPLICAS)
    if pair is not None and int(pair[1]) * int(pair[2]) == group:
        number = int(pair[2])
    elif stated is not None and pair is None:
        number = int(stated[0])
    elif size and not size.startswith("dp"):
        number = 0
    elif kind != "hybrid":
        return group
    elif replicas > 1 and group % replicas == 0:
        return group // replicas
    else:
        number = node if group % node == 0 else group
        s.assumed.append(f"hybrid sharding over {number} ranks: not stated, those of a node")
    if number < 1 or group % number:
        s.assumed.append(f"fsdp over {size} is read as {group}, the ranks there are")
        return group
    return number


def _without_fsdp(s: Settings, framework: Framework, group: int) -> tuple[Zero, int]:
    stage = s.whole("zero_stage", "zero_optimization.stage", default=-1)
    if 0 <= stage <= 3:
        return Zero(stage), 1
    used = s.switch(
        "distributed_optimizer",
        "use_distributed_optimizer",
        default=framework.distributed_optimizer,
    )
    # Megatron's Muon deals whole matrices out to the ranks.
    used = used or s.text("optimizer").startswith("dist_")
    instances = s.whole(REPLICAS[0], default=1)
    replicas = instances if used and instances > 1 and group % instances == 0 else 1
    return (Zero.optim if used else Zero.no_shard), replicas
