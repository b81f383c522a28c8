"""The ops of mixers: softmax attention with grouped, latent or compressed keys and values."""

from __future__ import annotations

from meshwright.describe.blocks import (
    FULL,
    column_linear,
    elementwise,
    norm,
    row_linear,
    whole_linear,
)
from meshwright.describe.facts import (
    Attention,
    CompressedAttention,
    DeltaNet,
    LatentAttention,
    Mamba,
    Mixer,
)
from meshwright.describe.model import Comm, Op, OpKind, Saved
from meshwright.describe.recurrences import delta_net_ops, mamba_ops
from meshwright.parallel.layout import Recompute


def mixer_ops(mixer: Mixer, hidden_size: int) -> list[Op]:
    """Return the ops between the norm before a mixer and the residual add after it."""
    match mixer:
        case Attention():
            return _attention(mixer, hidden_size)
        case LatentAttention():
            return _latent_attention(mixer, hidden_size)
        case CompressedAttention():
            return _compressed_attention(mixer, hidden_size)
        case Mamba():
            return mamba_ops(mixer, hidden_size)
        case DeltaNet():
            return delta_net_ops(mixer, hidden_size)


def _core_attention(
    *,
    heads: int,
    kv_heads: int,
    qk: int,
    v: int,
    window: int = 0,
    sinks: bool = False,
    feeds_matmul: bool = True,
    drop_qkv: Recompute = FULL,
) -> Op:
    """Return the attention itself; ``drop_qkv`` names what computes Q, K and V again.

    ``v`` 0 means that values are the keys, which are then sent and kept once.

    Recomputing it (``core_attn``) still keeps Q, K, V, its inputs, and the output, which the
    projection keeps: with flash attention it frees the log-sum-exp only.
    """
    core = Recompute.core_attn | FULL
    q_k_v = heads * qk + kv_heads * (qk + v)
    out = heads * (v or qk)
    copies = (Saved(name="proj_input", elements=out, where="tp", dtype="copy"),) * feeds_matmul
    return Op(
        name="core_attention",
        kind=OpKind.attention,
        params=heads * sinks,
        holder="tp",
        where="tp",
        num_heads=heads,
        num_kv_heads=kv_heads,
        qk_head_dim=qk,
        v_head_dim=v or qk,
        window=window,
        saved=(
            Saved(name="q_k_v", elements=q_k_v, where="tp", dropped=drop_qkv),
            Saved(name="softmax_lse", elements=heads, where="tp", dtype="fp32", dropped=core),
            Saved(name="attention_output", elements=out, where="tp"),
            *copies,
        ),
        comm=(
            Comm(kind="cp_kv", elements=kv_heads * (qk + v)),
            Comm(kind="cp_heads", elements=q_k_v + out),
        ),
        rerun=core,
        trained_in_16_bit=True,
    )


def _attention(a: Attention, h: int) -> list[Op]:
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    ops = [
        column_linear(
            "qkv",
            h,
            q * (2 if a.output_gate else 1) + 2 * kv,
            bias=a.qkv_bias,
            saved=(Saved(name="qkv_input", elements=h, where="sp", dtype="matmul"),),
        )
    ]
    if a.qk_norm:
        ops.append(_qk_norm(a, q, kv))
    if a.rope:
        ops.append(elementwise("rope", 2 * (q + kv), backward_moved=2 * (q + kv)))
    ops.append(
        _core_attention(
            heads=a.num_heads,
            kv_heads=a.num_kv_heads,
            qk=a.head_dim,
            v=a.head_dim,
            window=a.window,
            sinks=a.sinks,
            feeds_matmul=not a.output_gate,
        )
    )
    if a.output_gate:
        kept = (
            Saved(name="attention_gate", elements=q, where="tp"),
            Saved(name="gated_attention", elements=q, where="tp", dtype="matmul"),
        )
        ops.append(elementwise("attention_gate", 3 * q, backward_moved=5 * q, saved=kept))
    ops.append(row_linear("proj", q, h))
    return ops


def _qk_norm(a: Attention, q: int, kv: int) -> Op:
    weights = {"weightless": 0, "head": 2 * a.head_dim, "whole": q + kv}[a.qk_norm]
    return Op(
        name="qk_norm",
        kind=OpKind.elementwise,
        params=weights,
        holder="tp" if a.qk_norm == "whole" else "all",
        where="tp",
        moved_per_token=2 * (q + kv),
        backward_moved_per_token=3 * (q + kv),
        saved=(Saved(name="qk_norm_input", elements=q + kv, where="tp"),),
    )


def _latent_attention(a: LatentAttention, h: int) -> list[Op]:
    """Return MLA: down-projections on each rank's own tokens, up-projections divided by heads."""
    again = Recompute.mla_up_proj | FULL
    n = a.num_heads
    hidden = Saved(
        name="qkv_input",
        elements=h,
        where="sp",
        dtype="matmul",
        dropped=Recompute.layernorm | FULL,
    )
    ops: list[Op] = []
    if a.q_lora_rank:
        ops.append(_down(a, "q_down", h, a.q_lora_rank, saved=(hidden,)))
        ops.extend(_up(a, "q", a.q_lora_rank, a.q_lora_rank, n * a.qk_head_dim))
    else:
        ops.append(column_linear("q_proj", h, n * a.qk_head_dim, saved=(hidden,)))
    compressed = a.kv_lora_rank + a.qk_rope_head_dim
    again_hidden = Saved(name="kv_down_input", elements=h, where="sp", dtype="copy")
    ops.append(_down(a, "kv_down", h, compressed, saved=(again_hidden,)))
    up = n * (a.qk_nope_head_dim + a.v_head_dim)
    ops.extend(_up(a, "kv", a.kv_lora_rank, compressed, up))
    rotated = 2 * n * a.qk_head_dim
    ops.append(elementwise("rope", 2 * rotated, backward_moved=2 * rotated, rerun=again))
    if a.index_topk:
        ops.append(whole_linear("indexer_k", h, a.index_head_dim))
        ops.append(norm("indexer_norm", a.index_head_dim, 2 * a.index_head_dim))
        ops.extend(_indexer(a, h, keys_per_token=1))
    ops.append(
        _core_attention(
            heads=n,
            kv_heads=n,
            qk=a.qk_head_dim,
            v=a.v_head_dim,
            window=a.index_topk,
            drop_qkv=again,
        )
    )
    ops.append(row_linear("proj", n * a.v_head_dim, h))
    return ops


def _indexer(
    a: LatentAttention | CompressedAttention, h: int, *, keys_per_token: float
) -> list[Op]:
    """Return the indexer's queries, head weights and scores; every rank runs it whole.

    Scores of ``keys_per_token`` keys a token are priced as attention with narrower heads.
    """
    width = a.index_heads * a.index_head_dim
    queries = Saved(name="indexer_q", elements=width, where="sp")
    return [
        whole_linear("indexer_q", a.q_lora_rank or h, width),
        whole_linear("indexer_weights", h, a.index_heads),
        Op(
            name="indexer_scores",
            kind=OpKind.attention,
            num_heads=a.index_heads,
            num_kv_heads=1,
            qk_head_dim=round(a.index_head_dim * keys_per_token),
            saved=(queries,),
            rerun=Recompute.core_attn | FULL,
        ),
    ]


def _compressed_attention(a: CompressedAttention, h: int) -> list[Op]:
    """Return DeepSeek-V4's attention: everything but the heads is held and run whole.

    Attended are the window and the picked compressed tokens; those of a layer that takes all
    (1:128) are few and left out.
    """
    again = Recompute.mla_up_proj | FULL
    q, d = a.num_heads * a.head_dim, a.head_dim
    hidden = Saved(
        name="qkv_input",
        elements=h,
        where="sp",
        dtype="matmul",
        dropped=Recompute.layernorm | FULL,
    )
    q_compressed = Saved(name="q_compressed", elements=a.q_lora_rank, where="sp")
    normed = Saved(
        name="q_up_input", elements=a.q_lora_rank, where="sp", dtype="matmul", dropped=again
    )
    kv = Saved(name="kv_compressed", elements=d, where="sp")
    ops = [
        whole_linear("q_down", h, a.q_lora_rank, saved=(hidden, q_compressed)),
        norm("q_norm", a.q_lora_rank, a.q_lora_rank, rerun=again),
        column_linear("q_up", a.q_lora_rank, q, saved=(normed,), rerun=again),
        whole_linear("kv_down", h, d, saved=(kv,)),
        norm("kv_norm", d, d, rerun=again),
        elementwise("rope", 2 * (q + d), backward_moved=2 * (q + d), rerun=again),
    ]
    if a.compress_ratio:
        ops += _compressor("compressor", h, d, a.overlap, a.compress_ratio)
    if a.index_topk:
        ops += _compressor("indexer_k", h, a.index_head_dim, a.overlap, a.compress_ratio)
        ops += _indexer(a, h, keys_per_token=1 / a.compress_ratio)
    ops.append(
        _core_attention(
            heads=a.num_heads,
            kv_heads=1,
            qk=d,
            v=0,
            window=a.window + a.index_topk,
            sinks=True,
            drop_qkv=again,
        )
    )
    grouped = Op(
        name="o_down",
        kind=OpKind.matmul,
        params=q * a.o_lora_rank,
        holder="tp",
        in_features=q,
        out_features=a.o_lora_rank,
        split="in",
        where="tp",
    )
    rank = a.o_groups * a.o_lora_rank
    inside = Saved(name="o_up_input", elements=rank, where="tp", dtype="matmul")
    return [*ops, grouped, row_linear("proj", rank, h, saved=(inside,))]


def _compressor(name: str, h: int, features: int, overlap: int, ratio: int) -> list[Op]:
    """Return the gated pooling of ``ratio`` tokens into one: keys, gates, positions, norm."""
    wide = overlap * features
    kept = Saved(name=f"{name}_output", elements=2 * wide, where="sp")
    pool = Op(
        name=f"{name}_pool",
        kind=OpKind.elementwise,
        params=ratio * wide + features,
        moved_per_token=2 * wide,
        saved=(kept,),
    )
    return [whole_linear(name, h, 2 * wide), pool]


def _down(a: LatentAttention, name: str, h: int, out: int, saved: tuple[Saved, ...] = ()) -> Op:
    if a.split_down:
        return column_linear(name, h, out, bias=a.bias, saved=saved)
    return whole_linear(name, h, out, bias=a.bias, saved=saved)


def _up(a: LatentAttention, name: str, rank: int, compressed: int, out: int) -> list[Op]:
    """Return norm and up-projection of one compressed vector.

    Transformer Engine fuses the norm into the up-projection, so both are computed again together.
    """
    again = Recompute.mla_up_proj | FULL
    kept = Saved(name=f"{name}_compressed", elements=compressed, where="sp")
    normed = Saved(
        name=f"{name}_up_input", elements=rank, where="sp", dtype="matmul", dropped=again
    )
    first = Op(
        name=f"{name}_norm",
        kind=OpKind.elementwise,
        params=rank,
        moved_per_token=2 * rank,
        backward_moved_per_token=3 * rank,
        saved=(kept,),
        rerun=again,
    )
    up = Op(
        name=f"{name}_up",
        kind=OpKind.matmul,
        params=rank * out,
        holder="tp",
        in_features=rank,
        out_features=out,
        split="out",
        where="tp",
        saved=(normed,) if a.norms else (kept,),
        comm=(Comm(kind="enter_tp", elements=compressed),),
        rerun=again,
    )
    return [first, up] if a.norms else [up]
