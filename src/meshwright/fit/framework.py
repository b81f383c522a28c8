"""How the frameworks that runs were made with behave where a row does not say."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.describe.job import CrossEntropy
from meshwright.fit.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Framework:
    """Defaults of a training framework for settings that a row leaves out.

    Fields without a line of their own mean what they do in ``describe.job`` or in a layout.
    """

    name: str
    overlap: bool = True
    """Gradients are reduced and weights gathered beside compute."""
    overlap_tp: bool = False
    """Tensor-parallel communication runs beside compute."""
    overlap_pp: bool = True
    """Messages between stages run beside compute."""
    fused_kernels: bool = True
    cross_entropy: CrossEntropy = "in_place"
    reduces_in_fp32: bool = True
    """Gradients are reduced in fp32, not in 16 bit."""
    fused_wgrad_accumulation: bool = True
    sequence_parallel: bool = True
    """Where tp > 1."""
    distributed_optimizer: bool = True
    """What ``zero=optim`` shards is sharded."""
    expert_tensor_is_tensor: bool = False
    """etp is tp unless it is stated."""
    cp_comm: str = "p2p"
    flash_attention: bool = True
    tuned_attention: bool = True
    gathers_once: bool = False
    """In a pipeline weights are gathered once a step, also where they are sharded (FSDP2)."""
    blocking_checkpoints: bool = False
    scatters_messages: bool = False
    recompute: str = "none"
    expandable_segments: bool = False
    gathers_from_master: bool = False
    bucket_bytes: float = 0.0
    packs_samples: bool = False
    """Fine-tuning fills its sequences with many samples of a data set."""
    microbatch_for_each_rank: bool = False
    """A pipeline cuts a rank's batch into as many micro-batches as it has ranks."""


MEGATRON_LM = Framework(name="megatron-lm", overlap=False, expert_tensor_is_tensor=True)
USUAL = Framework(
    name="megatron-bridge", cross_entropy="vendor", reduces_in_fp32=False, packs_samples=True
)
"""A row that names no framework is read as Megatron-Bridge, a tuned Megatron-Core run."""
FRAMEWORKS = (
    Framework(
        name="torchtitan",
        recompute="selective:op",
        fused_wgrad_accumulation=False,
        cp_comm="all_gather",
        overlap_pp=False,
        tuned_attention=False,
        gathers_once=True,
        expandable_segments=True,
        gathers_from_master=True,
        microbatch_for_each_rank=True,
        cross_entropy="plain",
    ),
    Framework(
        name="composer",
        gathers_from_master=True,
        cross_entropy="vendor",
        fused_kernels=False,
        fused_wgrad_accumulation=False,
        tuned_attention=False,
    ),
    Framework(
        name="automodel",
        sequence_parallel=False,
        fused_wgrad_accumulation=False,
        cross_entropy="plain",
        gathers_from_master=True,
    ),
    Framework(
        name="deepspeed",
        blocking_checkpoints=True,
        scatters_messages=True,
        # One of 5e8 elements to reduce and one to gather, its defaults.
        bucket_bytes=2 * 5e8 * 2,
        overlap=False,
        sequence_parallel=False,
        distributed_optimizer=False,
        flash_attention=False,
        fused_wgrad_accumulation=False,
        overlap_pp=False,
    ),
    Framework(
        name="nemo",
        overlap_tp=True,
        packs_samples=True,
        cross_entropy="vendor",
        reduces_in_fp32=False,
        expert_tensor_is_tensor=True,
    ),
    MEGATRON_LM,
    USUAL,
)


def framework_of(settings: Settings) -> Framework:
    """Return the framework that the settings name, or whose words they use."""
    named = settings.text("framework").replace(" ", "-")
    for known in FRAMEWORKS:
        if known.name in named:
            return known
    if named.startswith("megatron") or settings.section("args"):
        return MEGATRON_LM
    if named:
        settings.assumed.append(f"framework {named!r} is read as {USUAL.name}")
    return USUAL
