"""Facts of a decoder -> ``Model``: the only place where a layer's ops are put in order."""

from __future__ import annotations

from meshwright.describe.blocks import (
    FULL,
    embedding_block,
    head_block,
    hyper_connection,
    norm,
    residual,
    whole_linear,
)
from meshwright.describe.facts import (
    Attention,
    CompressedAttention,
    Decoder,
    DeltaNet,
    FeedForward,
    LatentAttention,
    Layer,
    Mamba,
    Mixer,
    Mlp,
    Moe,
)
from meshwright.describe.feed_forward import feed_forward_ops
from meshwright.describe.mixers import mixer_ops
from meshwright.describe.model import Block, Model, Op, Saved
from meshwright.parallel.layout import Recompute

Softmax = Attention | LatentAttention | CompressedAttention
SOFTMAX = (Attention, LatentAttention, CompressedAttention)


def build_decoder(facts: Decoder) -> Model:
    """Return the model that the facts describe; equal layers become one kind."""
    kinds = list(dict.fromkeys(facts.layers))
    attention = next((m for m in facts.mixers() if isinstance(m, SOFTMAX)), None)
    moe = next((f for f in facts.ffns() if isinstance(f, Moe)), None)
    mlp = next((f for f in facts.ffns() if isinstance(f, Mlp)), None)
    mamba = next((m for m in facts.mixers() if isinstance(m, Mamba)), None)
    dense_ffn = mlp.ffn_hidden_size if mlp else 0
    return Model(
        name=facts.name or facts.model_type,
        model_type=facts.model_type,
        hidden_size=facts.hidden_size,
        num_heads=attention.num_heads if attention else 0,
        num_kv_heads=_kv_heads(attention),
        head_dim=_head_dim(attention),
        ffn_hidden_size=dense_ffn or (moe.ffn_hidden_size if moe else 0),
        vocab_size=facts.vocab_size,
        max_seq_len=facts.max_seq_len,
        num_experts=moe.num_experts if moe else 0,
        topk=moe.topk if moe else 0,
        expert_ffn_hidden_size=moe.ffn_hidden_size if moe else 0,
        shared_expert_ffn_hidden_size=moe.shared_ffn_hidden_size if moe else 0,
        layer_kinds=tuple(_layer_block(facts, kind) for kind in kinds),
        layer_pattern=tuple(kinds.index(layer) for layer in facts.layers),
        embedding=embedding_block(facts),
        head=head_block(facts),
        mtp_layers=tuple(_mtp_block(facts, layers) for layers in facts.mtp),
        tie_word_embeddings=facts.tie_word_embeddings,
        is_mla=isinstance(attention, LatentAttention),
        mamba_num_heads=mamba.num_heads if mamba else 0,
        mamba_num_groups=mamba.num_groups if mamba else 0,
        facts=facts,
        assumed=facts.assumed,
    )


def _kv_heads(attention: Softmax | None) -> int:
    match attention:
        case None:
            return 0
        case Attention():
            return attention.num_kv_heads
        case LatentAttention():
            return attention.num_heads
        case CompressedAttention():
            return 1


def _head_dim(attention: Softmax | None) -> int:
    match attention:
        case None:
            return 0
        case LatentAttention():
            return attention.qk_head_dim
        case Attention() | CompressedAttention():
            return attention.head_dim


def _layer_block(facts: Decoder, layer: Layer) -> Block:
    """Return one decoder layer: norms, mixer, feed-forward network and residual adds."""
    return Block(
        name=_layer_name(layer),
        ops=tuple(_layer_ops(facts, layer)),
        is_moe=isinstance(layer.ffn, Moe),
        hidden_inputs=facts.residual_streams,
    )


def _layer_ops(facts: Decoder, layer: Layer) -> list[Op]:
    h = facts.hidden_size
    ops: list[Op] = []
    if layer.mixer is not None:
        ops += _branch(facts, layer, "attention", mixer_ops(layer.mixer, h), layer.mixer)
    if layer.ffn is not None:
        ops += _branch(facts, layer, "mlp", feed_forward_ops(layer.ffn, h), layer.ffn)
    return ops


def _branch(
    facts: Decoder, layer: Layer, name: str, inner: list[Op], what: Mixer | FeedForward
) -> list[Op]:
    """Return one residual branch: its norms, its ops and the add.

    The norm before a dense projection is fused into it; only latent attention and experts have a
    norm of their own, which recomputing ``layernorm`` runs again.
    """
    params = facts.norm_weights * facts.hidden_size
    h = facts.hidden_size
    ops: list[Op] = hyper_connection(facts, name)
    shares = name == "mlp" and layer.parallel and layer.shared_norm
    if layer.norms != "post" and not shares:
        # Parallel branches read the same tensor, which is kept once.
        keep = "" if name == "mlp" and layer.parallel else f"{name}_norm_input"
        ops.append(norm(f"{name}_norm", h, params, keep=keep, rerun=_norm_rerun(what)))
    ops += inner
    if layer.norms != "pre":
        ops.append(norm(f"{name}_post_norm", h, params, keep=f"{name}_post_norm_input"))
    ops.append(residual(facts, name, bias=_has_output_bias(what)))
    return ops


def _norm_rerun(what: Mixer | FeedForward) -> Recompute:
    match what:
        case LatentAttention() | CompressedAttention() | Moe():
            return Recompute.layernorm | FULL
        case Mlp():
            return Recompute.mlp | FULL
        case _:
            return FULL


def _has_output_bias(what: Mixer | FeedForward) -> bool:
    match what:
        case Attention():
            return what.out_bias
        case LatentAttention() | Mamba() | Mlp():
            return what.bias
        case Moe():
            return what.shared_bias
        case CompressedAttention() | DeltaNet():
            return False


_MIXER_NAMES = {
    Attention: "attention",
    LatentAttention: "latent attention",
    CompressedAttention: "compressed attention",
    Mamba: "mamba",
    DeltaNet: "delta net",
}


def _layer_name(layer: Layer) -> str:
    parts = [_MIXER_NAMES[type(layer.mixer)]] if layer.mixer is not None else []
    match layer.mixer:
        case Attention() if layer.mixer.window:
            parts[0] = "window attention"
        case CompressedAttention():
            parts[0] += f" 1:{layer.mixer.compress_ratio}"
        case _:
            pass
    if layer.ffn is not None:
        parts.append("experts" if isinstance(layer.ffn, Moe) else "mlp")
    return " + ".join(parts) or "empty"


def _mtp_block(facts: Decoder, layers: tuple[Layer, ...]) -> Block:
    """Return one multi-token-prediction depth: two norms, their projection, layers, final norm.

    DeepSeek-V3, arXiv:2412.19437, section 2.2; embedding and head are shared with the main model.
    """
    h = facts.hidden_size
    params = facts.norm_weights * h
    joined = Saved(name="mtp_proj_input", elements=2 * h, where="sp", dtype="matmul")
    ops = [
        norm("mtp_embedding_norm", h, params, keep="mtp_embedding"),
        norm("mtp_hidden_norm", h, params, keep="mtp_hidden"),
        whole_linear("mtp_proj", 2 * h, h, saved=(joined,)),
    ]
    for layer in layers:
        ops += _layer_ops(facts, layer)
    ops.append(norm("mtp_final_norm", h, params, keep="mtp_final_norm_input"))
    return Block(
        name="mtp",
        ops=tuple(ops),
        is_moe=any(isinstance(layer.ffn, Moe) for layer in layers),
        hidden_inputs=2,
    )
