"""What runs, but slower than it must: thin matmuls, and switches that fight each other."""

from __future__ import annotations

from collections.abc import Mapping

from meshwright import units
from meshwright.checks import Case, Mask, check, nearest
from meshwright.checks.divisibility import common_size, legal_tps
from meshwright.parallel.layout import Layout, Zero

DEEP_LAYERS, LARGE_PARAMS = 50, 10e9
"""Layers, and parameters, from which the guides use pipeline parallelism."""
THIN_FEATURES = 1024
"""Features per rank below which a sliced matmul no longer fills a GPU."""
NARROW_HIDDEN = 4096
"""The hidden size from which the guides use tensor parallelism."""


def _slices(case: Case, at: Layout[int]) -> Mapping[str, object]:
    hidden = case.model.hidden_size
    wide = [tp for tp in legal_tps(case.model, at.cp) if hidden >= THIN_FEATURES * tp] or [1]
    return {"slice": hidden // at.tp, "near": wide[-1]}


@check("warning", field="layout.tp", values=_slices)
def tp_leaves_wide_matmuls(case: Case) -> Mask:
    """Tensor parallelism leaves {slice} of {model.hidden_size} hidden features on a rank: matmuls
    so thin run well below peak while the traffic stays the same.

    Use tp={near}, and pp or a sharded optimizer for memory.
    """
    return (case.x.tp > 1) & (case.model.hidden_size < THIN_FEATURES * case.x.tp)


@check("note", field="layout.tp")
def tp_is_for_wide_models(case: Case) -> Mask:
    """Guides use tensor parallelism from a hidden size of 4096 on; {model.name} has
    {model.hidden_size}.

    Try tp=1 with zero=optim first.
    """
    if case.model.hidden_size >= NARROW_HIDDEN:
        return case.nowhere
    return case.x.tp > 1


def _billions(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del at
    return {"params": units.format_count(case.model.num_params)}


@check("note", field="layout.pp", values=_billions)
def pp_is_for_deep_models(case: Case) -> Mask:
    """Guides use pipeline parallelism for models of 50 and more layers or above 10B parameters;
    {model.name} has {model.num_layers} layers and
    {params} parameters.

    Try pp=1 with more tp, or a sharded optimizer.
    """
    if case.model.num_layers >= DEEP_LAYERS or case.model.num_params >= LARGE_PARAMS:
        return case.nowhere
    return case.x.pp > 1


def _expert_slices(case: Case, at: Layout[int]) -> Mapping[str, object]:
    return {"slice": case.model.expert_ffn_hidden_size // at.etp}


@check("warning", field="layout.etp", values=_expert_slices)
def etp_leaves_wide_experts(case: Case) -> Mask:
    """Expert tensor parallelism leaves {slice} of {model.expert_ffn_hidden_size} features of each
    expert on a rank, and gathers every token etp = {etp} times.

    Use etp=1 and more ep.
    """
    size = case.model.expert_ffn_hidden_size
    return (case.x.etp > 1) & (size < THIN_FEATURES * case.x.etp) if size else case.nowhere


def _alignments(case: Case, at: Layout[int]) -> Mapping[str, object]:
    size, unit = common_size(case.model, "tp"), _alignment(case)
    legal = [tp for tp in legal_tps(case.model, at.cp) if size // tp % unit == 0]
    return {"unit": unit, "slice": size // at.tp, "near": nearest(legal or [1], at.tp)}


def _alignment(case: Case) -> int:
    """Return the multiple that quantised matmuls demand of their sizes; 1 in 16 bit.

    Ref: Transformer Engine: 16 for FP8, 32 for the blocks of MXFP8 and NVFP4.
    """
    if case.job.precision.matmul not in ("fp8", "fp4"):
        return 1
    return 32 if case.job.precision.name in ("fp8-mx", "nvfp4") else 16


@check("warning", field="layout.tp", values=_alignments)
def quantised_slices_are_aligned(case: Case) -> Mask:
    """Matmuls in {job.precision.name} take sizes that are multiples of {unit}; tp = {tp} leaves
    {slice} features.

    Use tp={near}.
    """
    size, unit = common_size(case.model, "tp"), _alignment(case)
    if unit == 1 or not size:
        return case.nowhere
    return (size % case.x.tp == 0) & (size // case.x.tp % unit != 0)


def _before_blackwell(case: Case) -> bool:
    if case.cluster is None:
        return False
    major = case.cluster.gpu.compute_capability.partition(".")[0]
    return major.isdecimal() and int(major) < 10


def _shards_gradients(case: Case) -> Mask:
    return case.x.zero >= Zero.optim_grads


def _overlaps_in_order(case: Case) -> Mask:
    return (case.x.tp > 1) | (case.x.cp > 1)


def _unset(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del case, at
    return {"value": "unknown"}


@check("note", field="env.CUDA_DEVICE_MAX_CONNECTIONS", id="MLM-ARG-conn", values=_unset)
def one_connection_orders_kernels(case: Case) -> Mask:
    """Before Blackwell, communication of tp and cp overlaps with matmuls only if kernels start in
    the order in which they were launched, that is over one connection; Megatron-LM insists on it.

    Export CUDA_DEVICE_MAX_CONNECTIONS=1 before the launch.
    """
    if not _before_blackwell(case) or case.job.execution.overlap_ep_comm:
        return case.nowhere
    return _overlaps_in_order(case) & ~_shards_gradients(case)


@check("note", field="env.CUDA_DEVICE_MAX_CONNECTIONS", id="MLM-ARG-mfsdp_conn", values=_unset)
def sharding_wants_connections(case: Case) -> Mask:
    """Sharded gradients and weights move beside the matmuls, which needs more than one connection.

    Leave CUDA_DEVICE_MAX_CONNECTIONS unset, or above 1.
    """
    clear = ~_overlaps_in_order(case) if _before_blackwell(case) else ~case.nowhere
    return _shards_gradients(case) & (case.x.dp_shard > 1) & clear


@check("warning", field="env.CUDA_DEVICE_MAX_CONNECTIONS", id="MLM-ARG-conn_fsdp", values=_unset)
def connections_cannot_serve_both(case: Case) -> Mask:
    """Before Blackwell the overlap of tp = {tp} or cp = {cp} wants one connection and zero = {zero}
    more than one: one of the two overlaps is lost.

    Use zero=optim, or tp=1 and cp=1.
    """
    if not _before_blackwell(case):
        return case.nowhere
    return _overlaps_in_order(case) & _shards_gradients(case)
