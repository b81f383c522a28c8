"""Rules of Bridge's communication overlap: what it switches, and what expert overlap needs.

They apply when a ``comm_overlap`` section is given; its values win over those of the sections it
writes into.
"""

from __future__ import annotations

from typing import Any

from meshwright.frameworks.megatron_lm.rules import Settings, change, derive, error

_BUCKET = 128 * 1024 * 1024


def _on(s: Settings) -> bool:
    return any(name.startswith("comm_overlap_") for name in s.given)


def _experts(s: Settings) -> bool:
    return _on(s) and s.comm_overlap_overlap_moe_expert_parallel_comm is True


def _chosen(s: Settings, name: str, otherwise: object) -> object:
    value: object = getattr(s, f"comm_overlap_{name}")
    return otherwise if value is None else value


def _tensor_parallel_off(s: Settings, because: bool) -> object:
    return (
        _on(s)
        and s.comm_overlap_tp_comm_overlap is True
        and because
        and {"comm_overlap_tp_comm_overlap": False}
    )


def _model(s: Settings) -> dict[str, Any] | None:
    if not _on(s):
        return None
    piped, interleaved = s.pp > 1, (s.vpp or 1) > 1
    return {
        "tp_comm_overlap": _chosen(s, "tp_comm_overlap", False),
        "overlap_p2p_comm": _chosen(s, "overlap_p2p_comm", piped and interleaved),
        "batch_p2p_comm": _chosen(s, "batch_p2p_comm", piped and not interleaved),
        "defer_embedding_wgrad_compute": _chosen(s, "defer_embedding_wgrad_compute", False),
        "wgrad_deferral_limit": _chosen(s, "wgrad_deferral_limit", -1),
        "overlap_moe_expert_parallel_comm": _chosen(s, "overlap_moe_expert_parallel_comm", False),
        "delay_wgrad_compute": _chosen(s, "delay_wgrad_compute", False),
    }


def _data_parallel(s: Settings) -> dict[str, Any] | None:
    if not _on(s) or not s.use_distributed_optimizer:
        return None
    several = s.dp > 1
    interleaved = s.pp > 1 and (s.vpp or 1) > 1
    gather = _chosen(s, "overlap_param_gather", several)
    align = _chosen(s, "align_param_gather", several and interleaved)
    with_step = _chosen(s, "overlap_param_gather_with_optimizer_step", False)
    return {
        "ddp_bucket_size": _chosen(s, "bucket_size", _BUCKET if several else None),
        "overlap_grad_reduce": _chosen(s, "overlap_grad_reduce", several),
        "overlap_param_gather": gather,
        "optimizer_overlap_param_gather": gather,
        "align_param_gather": align,
        "overlap_param_gather_with_optimizer_step": with_step,
    }


_BUCKETS = frozenset({"ddp_bucket_size", "align_param_gather"})


def _overlaps(s: Settings) -> dict[str, Any] | None:
    """Return what changes unless it is only how buckets are cut, which nobody had chosen."""
    new = _data_parallel(s) or dict[str, Any]()
    changed = {name for name, value in new.items() if getattr(s, name) != value}
    return None if changed <= _BUCKETS - s.given else new


RULES = (
    change(
        "MB-OVL-tp_small",
        "comm_overlap:444",
        "comm_overlap_tp_comm_overlap",
        lambda s: _tensor_parallel_off(s, s.tp < 2),
        "Tensor parallel overlap is turned off: tp is {tp}.",
        "Drop {write[comm_overlap_tp_comm_overlap=true]}, or use tp > 1.",
    ),
    change(
        "MB-OVL-tp_sp",
        "comm_overlap:447",
        "comm_overlap_tp_comm_overlap",
        lambda s: _tensor_parallel_off(s, not s.sequence_parallel),
        "Tensor parallel overlap is turned off: it needs sequence parallelism.",
        "Use {write[sequence_parallel=true]}.",
    ),
    change(
        "MB-OVL-tp_te",
        "comm_overlap:450",
        "comm_overlap_tp_comm_overlap",
        lambda s: _tensor_parallel_off(s, not s.site.te_version),
        "Tensor parallel overlap is turned off: Transformer Engine is absent.",
        "Install it.",
    ),
    error(
        "MB-OVL-ep",
        "comm_overlap:479",
        "comm_overlap_overlap_moe_expert_parallel_comm",
        lambda s: _experts(s) and s.ep <= 1,
        "There is no expert communication to overlap: ep is {ep}.",
        "Use {write[expert_model_parallel_size]} > 1, or drop the overlap.",
    ),
    error(
        "MB-OVL-experts",
        "comm_overlap:482",
        "num_experts",
        lambda s: _experts(s) and (s.num_experts or 0) <= 1,
        "There are no experts whose communication could overlap.",
        "Give {write[num_experts]}, or drop the overlap.",
    ),
    error(
        "MB-OVL-disp",
        "comm_overlap:486",
        "moe_token_dispatcher_type",
        lambda s: _experts(s) and s.moe_token_dispatcher_type not in ("alltoall", "flex"),
        "Overlapping expert communication works with the alltoall or flex dispatcher, not "
        "{moe_token_dispatcher_type}.",
        "Use {write[moe_token_dispatcher_type=alltoall]}.",
    ),
    error(
        "MB-OVL-dtype",
        "comm_overlap:490",
        "bf16",
        lambda s: _experts(s) and not (s.bf16 or s.fp16),
        "Overlapping expert communication is for 16-bit training.",
        "Use {write[bf16=true]}.",
    ),
    error(
        "MB-OVL-vpp",
        "comm_overlap:495",
        "virtual_pipeline_model_parallel_size",
        lambda s: _experts(s) and s.pp > 1 and s.vpp is None,
        "Overlapping expert communication under a pipeline (pp = {pp}) needs interleaving.",
        "Use {write[virtual_pipeline_model_parallel_size=2]}, or pp = 1.",
    ),
    error(
        "MB-OVL-full",
        "comm_overlap:499",
        "recompute_granularity",
        lambda s: _experts(s) and s.recompute_granularity == "full",
        "Overlapping expert communication excludes full recomputation.",
        "Use {write[recompute_granularity=selective]}.",
    ),
    error(
        "MB-OVL-wgrad",
        "comm_overlap:532",
        "comm_overlap_delay_wgrad_compute",
        lambda s: (
            _on(s)
            and s.comm_overlap_delay_wgrad_compute is True
            and not (
                s.overlap_moe_expert_parallel_comm
                or s.comm_overlap_overlap_moe_expert_parallel_comm
            )
        ),
        "Delayed weight gradients hide expert communication.",
        "Use {write[comm_overlap_overlap_moe_expert_parallel_comm=true]}.",
    ),
    change(
        "MB-OVL-p2p",
        "comm_overlap:540",
        "overlap_p2p_comm",
        _model,
        "The overlap section sets the overlaps of the model, what is not given being off: p2p "
        "overlapped when interleaved, batched otherwise.",
        "Set them in comm_overlap.",
        severity="note",
    ),
    change(
        "MB-OVL-dp_defaults",
        "comm_overlap:577",
        "ddp_bucket_size",
        _overlaps,
        "The overlap section sets buckets and overlaps of data parallelism: on, with 128 Mi "
        "elements a bucket, when dp > 1 (dp = {dp}).",
        "Set them in comm_overlap; those of ddp are overwritten.",
    ),
    change(
        "MB-OVL-dp_defaults",
        "comm_overlap:577.5",
        "ddp_bucket_size",
        _data_parallel,
        "The overlap section sets buckets of 128 Mi elements for data parallelism (dp = {dp}), and "
        "aligns the gathering of parameters over interleaved stages.",
        "Set comm_overlap.bucket_size or align_param_gather for others.",
        severity="note",
    ),
    derive("comm_overlap:600", lambda s: {"comm_overlap_applied": _on(s)}),
)
