"""A small model with the structure of a large one, and a batch, that a layout can run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from meshwright.errors import LayoutError, MeshwrightError
from meshwright.parallel.layout import Layout
from meshwright.parallel.placement import read_pipeline_layout
from meshwright.runtime.groups import cp_levels
from meshwright.runtime.shape import MlaShape, ModelShape, MoeShape
from meshwright.runtime.stages import placement_of

MOST_LAYERS = 256
HEAD_DIM = 8
INITIALIZER_RANGE = 0.1
"""Large for the small sizes: with 0.02 differences would be rounding of tiny activations."""
ODD_VOCAB = 101
"""A prime, so that every vocabulary split has padding."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run: a model, tokens per sequence and sequences per step."""

    shape: ModelShape
    seq_len: int
    gbs: int


def default_shape(x: Layout[int]) -> ModelShape:
    """Return a Llama-like model, or a mixture of experts when the layout divides experts."""
    moe = MoeShape(num_experts=4, topk=2, ffn_hidden_size=16, aux_loss_coef=0.01)
    has_experts = x.ep > 1 or x.etp > 1
    mtp = (x.pipeline_layout or "").count("m")
    return ModelShape(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        ffn_hidden_size=32,
        vocab_size=ODD_VOCAB,
        moe=moe if has_experts else None,
        moe_layers=tuple(range(1, MOST_LAYERS)) if has_experts else (),
        mtp_layers=mtp,
    )


def shrink(shape: ModelShape, x: Layout[int]) -> Case:
    """Return the smallest model of the same structure that divides as the layout says.

    Kept: families' choices (norms, biases, routing, latent attention, tying, MTP, the ratio of
    query to KV heads where it can be). Made small: sizes, layers, vocabulary, experts.

    Raises ``LayoutError`` when the layers cannot be placed.
    """
    inner, outer = cp_levels(x)
    heads = _multiple(4, x.tp * inner)
    small = replace(
        shape,
        hidden_size=32,
        num_heads=heads,
        num_kv_heads=_kv_heads(shape, x, heads),
        head_dim=HEAD_DIM,
        ffn_hidden_size=_multiple(32, 4 * x.tp),
        vocab_size=ODD_VOCAB,
        window=16 if shape.window else 0,
        rope=replace(shape.rope, original_max_seq_len=16),
        window_rope=shape.window_rope and replace(shape.window_rope, original_max_seq_len=16),
        moe=_experts(shape.moe, x) if shape.moe else None,
        mla=_latent(shape.mla) if shape.mla else None,
        initializer_range=INITIALIZER_RANGE,
    )
    small = _with_layers(small, shape, x)
    unit = inner * (2 * outer if outer > 1 else 1) * x.tp
    microbatches = 2 if x.pp == 1 else 2 * (x.microbatch_group_size or x.pp)
    return Case(shape=small, seq_len=_multiple(32, unit), gbs=x.dp * x.mbs * microbatches)


def _multiple(least: int, unit: int) -> int:
    return -(-least // unit) * unit


def _kv_heads(shape: ModelShape, x: Layout[int], heads: int) -> int:
    """Keep the ratio of query to KV heads if it divides over TP either way, else use all heads."""
    if shape.mla or shape.num_kv_heads == shape.num_heads:
        return heads
    wanted = max(1, heads * shape.num_kv_heads // shape.num_heads)
    candidates = [n for n in range(1, heads + 1) if heads % n == 0]
    legal = [n for n in candidates if n % x.tp == 0 or x.tp % n == 0]
    if shape.qk_norm == "whole":
        legal = [n for n in legal if n % x.tp == 0]
    return min(legal, key=lambda n: (abs(n - wanted), n))


def _experts(moe: MoeShape, x: Layout[int]) -> MoeShape:
    groups = 2 if moe.num_groups > 1 else 1
    topk = min(moe.topk, 2)
    return replace(
        moe,
        num_experts=_multiple(8 if groups > 1 else 4, math.lcm(x.ep, 4 * groups)),
        topk=topk,
        ffn_hidden_size=_multiple(16, 4 * x.etp),
        shared_ffn_hidden_size=_multiple(16, 4 * x.tp) if moe.shared_ffn_hidden_size else 0,
        num_groups=groups,
        topk_groups=1 if groups == 1 else min(moe.topk_groups, 1),
        aux_loss_coef=moe.aux_loss_coef or 0.01,
    )


def _latent(mla: MlaShape) -> MlaShape:
    return MlaShape(
        q_lora_rank=16 if mla.q_lora_rank else 0,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    )


def _with_layers(small: ModelShape, shape: ModelShape, x: Layout[int]) -> ModelShape:
    """Return the model with the fewest layers, two or more, that can be placed so.

    A pipeline layout says itself how many.
    """
    refusal: MeshwrightError | None = None
    spelled = "".join(read_pipeline_layout(x.pipeline_layout)) if x.pipeline_layout else ""
    counts = [max(1, spelled.count("t"))] if spelled else range(2, MOST_LAYERS)
    for count in counts:
        made = replace(
            small,
            num_layers=count,
            moe_layers=_moe_layers(shape, count),
            window_layers=_kept(shape.window_layers, count, shape),
            unrotated_layers=_kept(shape.unrotated_layers, count, shape),
        )
        try:
            placement_of(made, x)
        except LayoutError as error:
            refusal = refusal or error
        else:
            return made
    assert refusal is not None
    raise refusal


def _kept(layers: tuple[int, ...], count: int, shape: ModelShape) -> tuple[int, ...]:
    """Return which layers of the small model stand for one of ``layers``."""
    return tuple(i for i in range(count) if _like(i, count, shape) in layers)


def _like(layer: int, count: int, shape: ModelShape) -> int:
    """Return the layer of the large model that a small model's layer stands for.

    The first keeps its place (dense layers come first), the others are the large model's last.
    """
    return layer if layer == 0 else max(0, shape.num_layers - count + layer)


def _moe_layers(shape: ModelShape, count: int) -> tuple[int, ...]:
    if shape.moe is None:
        return ()
    mtp = [count + d for d in range(shape.mtp_layers) if shape.num_layers + d in shape.moe_layers]
    return (*_kept(shape.moe_layers, count, shape), *mtp)
