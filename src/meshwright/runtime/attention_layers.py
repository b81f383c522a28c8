"""Attention as a branch of a decoder layer: grouped queries, latent attention.

Tensors are ``[s, b, h]``. Shapes: s tokens here, b sequences, h hidden features, n heads here,
d features of a head.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import torch
from torch import Tensor, nn

from meshwright.parallel.layout import Recompute
from meshwright.runtime.context import Context
from meshwright.runtime.layers import (
    Linear,
    RmsNorm,
    enter_and_project,
    project_and_leave,
    residual_std,
    rotate,
)
from meshwright.runtime.parameters import Box, Partial, ShardedParameter, parameter
from meshwright.runtime.tensor_parallel import enter


def to_heads(x: Tensor, heads: int) -> Tensor:
    """``[s, b, n*d]`` -> ``[b, n, s, d]``."""
    return x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def from_heads(x: Tensor) -> Tensor:
    """``[b, n, s, d]`` -> ``[s, b, n*d]``."""
    return x.permute(2, 0, 1, 3).flatten(-2)


class Attention(nn.Module):
    """Causal attention with grouped queries; heads are divided by TP.

    Where TP exceeds the KV heads, TP/KV neighbouring ranks hold the same KV head.
    """

    def __init__(self, context: Context, name: str, *, window: int = 0) -> None:
        super().__init__()
        shape, tp = context.shape, context.groups.tp
        self.context, self.window = context, window
        self.heads = shape.num_heads // tp.size
        kv_blocks = min(tp.size, shape.num_kv_heads)
        self.kv_heads = shape.num_kv_heads // kv_blocks
        h, d = shape.hidden_size, shape.head_dim

        def project(part: str, heads: int, kv: bool) -> Linear:
            return Linear(
                context,
                f"{name}.{part}",
                h,
                heads * d,
                split="out",
                bias=shape.qkv_bias,
                blocks=kv_blocks if kv else tp.size,
                block=tp.index * kv_blocks // tp.size if kv else tp.index,
                partial="kv" if kv and kv_blocks < tp.size else "",
            )

        self.q_proj = project("q_proj", shape.num_heads, kv=False)
        self.k_proj = project("k_proj", shape.num_kv_heads, kv=True)
        self.v_proj = project("v_proj", shape.num_kv_heads, kv=True)
        self.o_proj = Linear(
            context,
            f"{name}.o_proj",
            shape.num_heads * d,
            h,
            split="in",
            bias=shape.out_bias,
            std=residual_std(context),
        )
        self.q_norm, self.k_norm = self._norms(context, name)
        self.sinks: ShardedParameter | None = None
        if shape.sinks:
            box = Box(
                name=f"{name}.sinks",
                shape=(shape.num_heads,),
                offsets=(tp.index * self.heads,),
                std=shape.initializer_range,
                decay=False,
            )
            self.sinks = parameter(box, (self.heads,), context.dtype)

    @staticmethod
    def _norms(context: Context, name: str) -> tuple[RmsNorm | None, RmsNorm | None]:
        shape, tp = context.shape, context.groups.tp
        if not shape.qk_norm:
            return None, None
        if shape.qk_norm == "head":
            # Every TP rank normalises its own heads with the same weights.
            summed: Partial = "tp" if tp.size > 1 else ""
            return (
                RmsNorm(context, f"{name}.q_norm", shape.head_dim, partial=summed),
                RmsNorm(context, f"{name}.k_norm", shape.head_dim, partial=summed),
            )
        return (
            RmsNorm(context, f"{name}.q_norm", shape.num_heads * shape.head_dim, over=tp),
            RmsNorm(context, f"{name}.k_norm", shape.num_kv_heads * shape.head_dim, over=tp),
        )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the branch's output for the tokens here; ``rope`` ``None``: nothing turns."""
        context = self.context
        q, k, v = enter_and_project(context, x, self.q_proj, self.k_proj, self.v_proj)
        if self.q_norm and self.k_norm and context.shape.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = to_heads(q, self.heads), to_heads(k, self.kv_heads), to_heads(v, self.kv_heads)
        if self.q_norm and self.k_norm and context.shape.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            pair = context.shape.rope.interleaved
            q, k = rotate(q, rope, interleaved=pair), rotate(k, rope, interleaved=pair)
        out = context.recomputed(
            Recompute.core_attn,
            context.attention,
            q,
            k,
            v,
            context.shape.scores,
            self.window,
            self.sinks,
        )
        return project_and_leave(context, from_heads(out), self.o_proj)


class LatentAttention(nn.Module):
    """Multi-head latent attention; heads are divided by TP, down-projections are whole.

    Ref: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """

    def __init__(self, context: Context, name: str) -> None:
        super().__init__()
        shape = context.shape
        mla = shape.mla
        assert mla is not None
        self.context, self.mla = context, mla
        self.heads = shape.num_heads // context.groups.tp.size
        h, q_rank, kv_rank = shape.hidden_size, mla.q_lora_rank, mla.kv_lora_rank
        q_out = shape.num_heads * mla.qk_head_dim
        self.q_proj: Linear | None = None
        self.q_a_proj: Linear | None = None
        if q_rank:
            self.q_a_proj = Linear(context, f"{name}.q_a_proj", h, q_rank, bias=shape.qkv_bias)
            self.q_a_layernorm = RmsNorm(context, f"{name}.q_a_layernorm", q_rank)
            self.q_b_proj = Linear(context, f"{name}.q_b_proj", q_rank, q_out, split="out")
        else:
            self.q_proj = Linear(context, f"{name}.q_proj", h, q_out, split="out")
        self.kv_a_proj = Linear(
            context,
            f"{name}.kv_a_proj_with_mqa",
            h,
            kv_rank + mla.qk_rope_head_dim,
            bias=shape.qkv_bias,
        )
        self.kv_a_layernorm = RmsNorm(context, f"{name}.kv_a_layernorm", kv_rank)
        kv_out = shape.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        self.kv_b_proj = Linear(context, f"{name}.kv_b_proj", kv_rank, kv_out, split="out")
        self.o_proj = Linear(
            context,
            f"{name}.o_proj",
            shape.num_heads * mla.v_head_dim,
            h,
            split="in",
            bias=shape.out_bias,
            std=residual_std(context),
        )

    def _query(self, x: Tensor) -> Tensor:
        if self.q_proj is not None:
            return enter_and_project(self.context, x, self.q_proj)[0]
        assert self.q_a_proj is not None
        compressed = self.q_a_layernorm(self.q_a_proj(x))
        return enter_and_project(self.context, compressed, self.q_b_proj)[0]

    def _up(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        mla, context = self.mla, self.context
        tp, sp = context.groups.tp, context.sp
        pair = context.shape.rope.interleaved
        q = to_heads(self._query(x), self.heads)
        compressed, k_rope = self.kv_a_proj(x).split([mla.kv_lora_rank, mla.qk_rope_head_dim], -1)
        joined = torch.cat([self.kv_a_layernorm(compressed), k_rope], dim=-1)
        latent, k_rope = enter(joined, tp, sp=sp).split(
            [mla.kv_lora_rank, mla.qk_rope_head_dim], -1
        )
        kv = to_heads(self.kv_b_proj(latent), self.heads)
        k_nope, v = kv.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=-1)
        q_nope, q_rope = q.split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1)
        q_rope = rotate(q_rope, rope, interleaved=pair)
        k_rope = rotate(to_heads(k_rope, 1), rope, interleaved=pair).expand(-1, self.heads, -1, -1)
        return torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, k_rope], -1), v

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the branch's output for the tokens here."""
        context = self.context
        assert rope is not None
        q, k, v = context.recomputed(Recompute.mla_up_proj, self._up, x, rope)
        out = context.recomputed(
            Recompute.core_attn, context.attention, q, k, v, context.shape.scores, 0
        )
        return project_and_leave(context, from_heads(out), self.o_proj)
