"""The planner's description of a model that the runtime runs, to price what was measured."""

from __future__ import annotations

from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import (
    Attention,
    Decoder,
    FeedForward,
    LatentAttention,
    Layer,
    Mixer,
    Mlp,
    Moe,
)
from meshwright.describe.model import Model
from meshwright.runtime.shape import ModelShape


def described(shape: ModelShape) -> Model:
    """Return the model that ``shape`` computes, as the cost model knows it.

    The inverse of ``shape_of`` as far as costs go. Left out: low-rank adapters, which are a matter
    of the job.
    """
    layers = [_layer(shape, number) for number in range(shape.num_layers + shape.mtp_layers)]
    return build_decoder(
        Decoder(
            model_type=shape.model_type,
            hidden_size=shape.hidden_size,
            vocab_size=shape.vocab_size,
            layers=tuple(layers[: shape.num_layers]),
            tie_word_embeddings=shape.tie_word_embeddings,
            mtp=tuple((layer,) for layer in layers[shape.num_layers :]),
        )
    )


def _layer(shape: ModelShape, number: int) -> Layer:
    return Layer(mixer=_mixer(shape, number), ffn=_ffn(shape, number), norms=shape.norms)


def _mixer(shape: ModelShape, number: int) -> Mixer:
    if shape.mla is None:
        return Attention(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            qkv_bias=shape.qkv_bias,
            out_bias=shape.out_bias,
            qk_norm=shape.qk_norm,
            sinks=shape.sinks,
            window=shape.window if number in shape.window_layers else 0,
            rope=number not in shape.unrotated_layers,
        )
    mla = shape.mla
    return LatentAttention(
        num_heads=shape.num_heads,
        q_lora_rank=mla.q_lora_rank,
        kv_lora_rank=mla.kv_lora_rank,
        qk_nope_head_dim=mla.qk_nope_head_dim,
        qk_rope_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
        bias=shape.qkv_bias,
    )


def _ffn(shape: ModelShape, number: int) -> FeedForward:
    moe = shape.moe
    if moe is None or number not in shape.moe_layers:
        return Mlp(ffn_hidden_size=shape.ffn_hidden_size, bias=shape.mlp_bias)
    return Moe(
        num_experts=moe.num_experts,
        topk=moe.topk,
        ffn_hidden_size=moe.ffn_hidden_size,
        shared_ffn_hidden_size=moe.shared_ffn_hidden_size,
        shared_gate=moe.shared_gate,
        correction_bias=moe.correction_bias,
        router_bias=moe.router_bias,
        expert_bias=moe.expert_bias,
    )
