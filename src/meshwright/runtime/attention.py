"""Causal attention on whole heads, and the kernel that context parallelism is built from.

Shapes: b sequences, n heads, q and k tokens of query and key, d features of a head; everywhere
``[b, n, s, d]``. K and V may have fewer heads than Q (grouped queries).
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0) -> Tensor:
    """Return causal softmax attention; ``window`` > 0 limits it to that many tokens back.

    V may have fewer features than Q and K (latent attention).
    """
    if window and window < k.shape[2]:
        position = torch.arange(k.shape[2], device=q.device)
        distance = position[:, None] - position[None, :]
        seen = (distance >= 0) & (distance < window)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def expand_heads(k: Tensor, num_heads: int) -> Tensor:
    """Repeat each KV head so that there are ``num_heads``."""
    return k if k.shape[1] == num_heads else k.repeat_interleave(num_heads // k.shape[1], dim=1)


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to one block of keys: output and log-sum-exp ``[b, n, q]`` of its scores.

    The flash kernel of the device; on CUDA K and V are expanded to the heads of Q first.
    """
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
        return cast("Tensor", out), cast("Tensor", lse)
    heads = q.shape[1]
    found = aten._scaled_dot_product_flash_attention(
        q, expand_heads(k, heads), expand_heads(v, heads), 0.0, causal, scale=scale
    )
    return cast("Tensor", found[0]), cast("Tensor", found[1])


def block_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v from one block.

    ``out`` and ``lse`` are those of the whole row, over all blocks: then each block's gradient is
    exact and they add up.
    """
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    heads, kv_heads = q.shape[1], k.shape[1]
    zero = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        grad,
        q,
        expand_heads(k, heads),
        expand_heads(v, heads),
        out,
        lse,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        zero,
        zero,
        scale=scale,
    )
    if heads == kv_heads:
        return dq, dk, dv
    folded = (k.shape[0], kv_heads, heads // kv_heads, *k.shape[2:])
    return dq, dk.reshape(folded).sum(2), dv.reshape(folded).sum(2)


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two partial attentions over disjoint keys: weights softmax(lse) per row.

    Ref: Milakov and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135.
    """
    total = torch.logaddexp(lse, block_lse)
    left, right = (lse - total).exp(), (block_lse - total).exp()
    return out * left.unsqueeze(-1) + block_out * right.unsqueeze(-1), total
