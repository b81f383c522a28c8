"""Whether it fits, as far as the peak is known; and what offloading to the CPU excludes."""

from __future__ import annotations

from collections.abc import Mapping

from meshwright import units
from meshwright.checks import Case, Floats, Mask, check
from meshwright.parallel.layout import Layout, Recompute


def _band() -> float:
    from meshwright.cost.detail import BAND_FRACTION  # slow to load: only a priced case asks

    return BAND_FRACTION


def _margin(case: Case) -> Floats | None:
    """Return the free share of the capacity per row, negative where it is too small."""
    if case.peak_bytes is None or not case.capacity_bytes:
        return None
    return 1.0 - case.peak_bytes / case.capacity_bytes


def _sizes(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del at
    assert case.peak_bytes is not None and case.capacity_bytes, "the rule fired"
    peak_bytes, capacity = float(case.peak_bytes[0]), case.capacity_bytes
    return {
        "value": peak_bytes,
        "peak": units.format_bytes(peak_bytes),
        "capacity": units.format_bytes(capacity),
        "over": units.format_bytes(abs(peak_bytes - capacity)),
        "percent": round(100 * peak_bytes / capacity, 1),
        "band": round(100 * _band()),
    }


@check("error", field="memory.peak_bytes", values=_sizes)
def peak_fits(case: Case) -> Mask:
    """The fullest rank needs {peak}, {percent}% of the {capacity} that the GPU offers: {over} too
    much.

    Recompute, lower mbs, shard more (zero, tp, pp), or use more GPUs.
    """
    margin = _margin(case)
    return case.nowhere if margin is None else margin < -_band()


@check("warning", field="memory.peak_bytes", values=_sizes)
def peak_is_clear_of_capacity(case: Case) -> Mask:
    """The fullest rank needs {peak}, {percent}% of the {capacity} that the GPU offers. Within
    {band}% of it the memory model cannot tell, and runs fail now and then.

    Recompute, lower mbs, or shard more before a long run.
    """
    margin = _margin(case)
    return case.nowhere if margin is None else abs(margin) <= _band()


@check("error", field="layout.pp", id="MLM-TC-off_pp")
def offload_excludes_pipelines(case: Case) -> Mask:
    """Offloading activations to the CPU works in one stage only, and pp = {pp}.

    Use pp=1, recompute instead, or offload the optimizer.
    """
    if not case.job.execution.activation_offload_layers:
        return case.nowhere
    return case.x.pp > 1


@check("error", field="layout.recompute", id="MLM-TC-off_rc")
def offload_excludes_recompute(case: Case) -> Mask:
    """Activations are offloaded to the CPU or recomputed, not both; recompute = {recompute}.

    Use recompute=none, or offload no layers.
    """
    if not case.job.execution.activation_offload_layers:
        return case.nowhere
    return case.x.recompute != Recompute.none


@check("error", field="model.num_layers", id="MLM-TC-off_layers")
def offload_leaves_a_layer(case: Case) -> Mask:
    """The activations of {job.execution.activation_offload_layers} layers are to be offloaded, and
    at least one layer must stay on the GPU.

    Offload fewer than {model.num_layers} layers.
    """
    return case.nowhere | (case.job.execution.activation_offload_layers >= case.model.num_layers)
