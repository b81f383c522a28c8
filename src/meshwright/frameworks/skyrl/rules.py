"""What both of SkyRL's trainers refuse or change; ids of the August 2026 snapshot."""

from __future__ import annotations

from typing import Final

from meshwright.frameworks.by_path import Breach, Facts, Rule, below, expert_world, when

RL: Final = "trainer.policy.megatron_config"
SFT: Final = "megatron_config"
DIRECT: Final = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "moe_token_dispatcher_type",
    "moe_grouped_gemm",
    "mtp_num_layers",
)
"""Fields of ``megatron_config`` itself."""


def cp_padding(root: str, flag: str) -> Breach:
    """Return the breach of context parallelism with padding kept."""

    def broken(f: Facts) -> object:
        return (f.whole(f"{root}.context_parallel_size") or 1) > 1 and f[flag] is False

    return broken


def _etp_left_out(root: str) -> Breach:
    def broken(f: Facts) -> object:
        ep = f.whole(f"{root}.expert_model_parallel_size") or 1
        return ep > 1 and f.whole(f"{root}.expert_tensor_parallel_size") is None

    return broken


def _recompute_filled(root: str) -> Breach:
    def broken(f: Facts) -> object:
        kwargs = f"{root}.transformer_config_kwargs"
        selective = f[f"{kwargs}.recompute_granularity"] == "selective"
        return selective and not all(
            f.has(f"{kwargs}.{name}") for name in ("recompute_method", "recompute_num_layers")
        )

    return broken


def _recompute_dropped(root: str) -> Breach:
    kwargs = f"{root}.transformer_config_kwargs"

    def broken(f: Facts) -> object:
        asked = any(f.given(f"{kwargs}.recompute_{name}") for name in ("granularity", "method"))
        return f["trainer.gradient_checkpointing"] is False and asked

    return broken


def _kwargs_win(root: str) -> Breach:
    def broken(f: Facts) -> object:
        twice = [
            name
            for name in DIRECT
            if f.given(f"{root}.{name}") and f.given(f"{root}.transformer_config_kwargs.{name}")
        ]
        return twice and {"names": ", ".join(twice)}

    return broken


def _no_mtp_heads(f: Facts) -> object:
    if f["trainer.mtp.enabled"] is not True or f.model is None:
        return None
    layers = f.word("mtp_num_layers")
    return not (f.model.mtp_layers if layers is None else layers) and {"name": f.model.name}


def shared(root: str, applies: Breach) -> tuple[Rule, ...]:
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
            broken=when(applies, expert_world),
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
            broken=lambda f: applies(f) and f.degree("tensor_model_parallel_size") > 1,
            rule="Sequence parallelism is turned on, because TP > 1.",
            severity="note",
        ),
        Rule(
            id="SKY-MG-vlm_cp",
            field=f"{root}.context_parallel_size",
            broken=lambda f: (
                applies(f) and f.sees_images and (f.whole(f"{root}.context_parallel_size") or 1) > 1
            ),
            rule="Models that read images train without context parallelism here.",
            remedy="Use context_parallel_size=1.",
        ),
        Rule(
            id="SKY-MG-no_gc",
            field="trainer.gradient_checkpointing",
            broken=_recompute_dropped(root),
            rule="Off, it drops every recompute setting without a message.",
            remedy="Use trainer.gradient_checkpointing=true, or leave the recompute settings out.",
            severity="warning",
        ),
        Rule(
            id="SKY-MG-kwargs_last",
            field=f"{root}.transformer_config_kwargs",
            broken=_kwargs_win(root),
            rule="It is applied last: its {names} replace those of megatron_config in the model,"
            " while process groups take megatron_config's.",
            remedy="State each once, in megatron_config.",
            severity="warning",
        ),
        Rule(
            id="SKY-MG-mtp_zero",
            field="trainer.mtp.enabled",
            broken=_no_mtp_heads,
            rule="{name} has no head that predicts further tokens.",
            remedy="Use trainer.mtp.enabled=false, or set mtp_num_layers.",
        ),
        Rule(
            id="SKY-CFG-hf_ranks",
            field="hf_export_config.save_every_n_ranks",
            broken=lambda f: any(
                below(f"{place}hf_export_config.save_every_n_ranks")(f)
                for place in ("", "trainer.")
            ),
            rule="It is at least 1.",
            remedy="Use 1 or more.",
        ),
    )
