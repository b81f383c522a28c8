"""What the runtime needs of a layout, told before any process starts."""

from __future__ import annotations

import math

from meshwright.describe.job import Execution
from meshwright.errors import JobError, LayoutError, ModelError, nearest_divisors
from meshwright.parallel.layout import Layout, Zero
from meshwright.parallel.mesh import pipelines_agree
from meshwright.runtime.groups import cp_levels
from meshwright.runtime.shape import ModelShape, MoeShape
from meshwright.runtime.stages import placement_of, schedule_of


def check_runnable(shape: ModelShape, x: Layout[int], *, seq_len: int, gbs: int) -> None:
    """Raise a ``MeshwrightError`` unless the layout can train the model on such batches."""
    _check_meshes(shape, x)
    _check_heads(shape, x)
    _check_features(shape, x)
    _check_experts(shape, x)
    _check_sequence(shape, x, seq_len)
    _check_batch(x, gbs)
    _check_pipeline(shape, x, gbs)


def _divides(field: str, value: int, whole: int, what: str) -> None:
    if whole % value:
        near = " or ".join(map(str, nearest_divisors(whole, value)))
        raise LayoutError(
            f"layout.{field}", value, f"It must divide {what} = {whole}.", f"Use {near}."
        )


def _check_meshes(shape: ModelShape, x: Layout[int]) -> None:
    if shape.moe and not pipelines_agree(x):
        raise LayoutError(
            "layout.order",
            x.order,
            "Dense and expert mesh must have the same pipelines.",
            "Put pp last.",
        )
    cp_levels(x)
    if shape.moe and x.zero != Zero.no_shard:
        _divides("dp_replicate", x.dp_replicate, x.edp, "edp")


def _check_heads(shape: ModelShape, x: Layout[int]) -> None:
    _divides("tp", x.tp, shape.num_heads, "num_heads")
    kv = shape.num_kv_heads
    if not shape.mla and kv % x.tp and x.tp % kv:
        raise LayoutError(
            "layout.tp",
            x.tp,
            f"It must divide num_kv_heads = {kv}, or be a multiple of it.",
            f"Use {' or '.join(map(str, nearest_divisors(kv, x.tp)))}.",
        )
    if shape.qk_norm == "whole" and x.tp > kv:
        rule = f"A norm over all KV heads needs tp <= num_kv_heads = {kv}."
        raise LayoutError("layout.tp", x.tp, rule, f"Use {kv}.")
    inner = cp_levels(x)[0]
    if shape.num_heads // x.tp % inner:
        raise LayoutError(
            "layout.cp",
            x.cp,
            f"All-to-all over {inner} ranks must divide the heads of a rank, num_heads/tp = "
            f"{shape.num_heads // x.tp}.",
            f"Use cp_comm=p2p, or {nearest_divisors(shape.num_heads // x.tp, inner)[0]} ranks.",
        )


def _check_features(shape: ModelShape, x: Layout[int]) -> None:
    dense = len(shape.moe_layers) < shape.num_layers + shape.mtp_layers
    if dense:
        _divides("tp", x.tp, shape.ffn_hidden_size, "ffn_hidden_size")
    if shape.moe and shape.moe.shared_ffn_hidden_size:
        _divides("tp", x.tp, shape.moe.shared_ffn_hidden_size, "shared_ffn_hidden_size")


def _check_experts(shape: ModelShape, x: Layout[int]) -> None:
    if shape.moe is None:
        if x.ep > 1 or x.etp > 1:
            name, value = ("ep", x.ep) if x.ep > 1 else ("etp", x.etp)
            rule = "The model has no experts."
            raise LayoutError(f"layout.{name}", value, rule, f"Use {name}=1.")
        return
    _divides("ep", x.ep, shape.moe.num_experts, "num_experts")
    _divides("etp", x.etp, shape.moe.ffn_hidden_size, "expert_ffn_hidden_size")
    if shape.moe.num_experts % shape.moe.num_groups:
        raise ModelError(
            "model.n_group",
            shape.moe.num_groups,
            f"It must divide num_experts = {shape.moe.num_experts}.",
            "Correct the config.",
        )

    _check_balancing(shape, shape.moe)
    if shape.moe.expert_bias:
        _divides("etp", x.etp, shape.hidden_size, "hidden_size")


def _check_balancing(shape: ModelShape, moe: MoeShape) -> None:
    """Refuse what would do nothing."""
    for key, value, wrong, rule, remedy in (
        (
            "moe_router_bias_update_rate",
            moe.bias_update_rate,
            moe.bias_update_rate and not moe.correction_bias,
            "The routers of this family have no bias to update.",
            "Use 0.",
        ),
        (
            "moe_router_bias_update_rate",
            moe.bias_update_rate,
            moe.bias_update_rate and shape.lora_rank,
            "With low-rank changes every other weight is frozen.",
            "Use 0.",
        ),
        (
            "moe_pad_expert_input_to_capacity",
            True,
            moe.pad_to_capacity and not moe.capacity_factor,
            "Without a capacity there is nothing to pad to.",
            "Set moe_expert_capacity_factor, to 1.0 say.",
        ),
        (
            "moe_expert_capacity_factor",
            moe.capacity_factor,
            not 0.0 <= moe.capacity_factor < math.inf,
            "It is 0 (dropless) or a finite factor of the balanced load.",
            "Use 1.0.",
        ),
    ):
        if wrong:
            raise ModelError(f"config.{key}", value, rule, remedy)


def check_execution(shape: ModelShape, execution: Execution) -> None:
    """Raise ``JobError`` for switches of the planner that the runtime would only ignore."""
    moe_factor = shape.moe.capacity_factor if shape.moe else 0.0
    for name, wrong, rule, remedy in (
        (
            "overlap_ep_comm",
            execution.overlap_ep_comm,
            "The runtime exchanges tokens of experts before it computes on.",
            "Use overlap_ep_comm=False.",
        ),
        (
            "delay_weight_grad",
            execution.delay_weight_grad,
            "The runtime delays weight gradients where the schedule splits the backward pass.",
            "Use schedule=zb_h1 or zb_v.",
        ),
        (
            "capacity_factor",
            execution.capacity_factor not in (None, moe_factor),
            "Capacity changes what is computed, so the runtime takes it from the model.",
            "Write moe_expert_capacity_factor into the config.",
        ),
    ):
        if wrong:
            raise JobError(f"job.{name}", getattr(execution, name), rule, remedy)


def _check_sequence(shape: ModelShape, x: Layout[int], seq_len: int) -> None:
    inner, outer = cp_levels(x)
    unit = inner * (2 * outer if outer > 1 else 1)
    if x.tp > 1 and (x.sp or shape.moe):
        unit *= x.tp
    if seq_len % unit:
        lower = max(unit, seq_len // unit * unit)
        raise JobError(
            "job.seq_len",
            seq_len,
            f"It must be a multiple of {unit} (2*cp for the zigzag, times tp for SP or experts).",
            f"Use {lower} or {lower + unit}.",
        )


def _check_batch(x: Layout[int], gbs: int) -> None:
    unit = x.dp * x.mbs
    if gbs % unit or gbs < unit:
        lower = max(unit, gbs // unit * unit)
        raise JobError(
            "job.gbs", gbs, f"It must be a multiple of dp*mbs = {unit}.", f"Use {lower}."
        )


def _check_pipeline(shape: ModelShape, x: Layout[int], gbs: int) -> None:
    placement_of(shape, x)
    schedule_of(x, gbs)
