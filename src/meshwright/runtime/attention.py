"""Causal attention on whole heads, and the kernel that context parallelism is built from.

Shapes: b sequences, n heads, q and k tokens of query and key, d features of a head; everywhere
``[b, n, s, d]``. K and V may have fewer heads than Q (grouped queries).
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.runtime.shape import Scores

aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0) -> Tensor:
    """Return causal softmax attention; ``window`` > 0 limits it to that many tokens back.

    V may have fewer features than Q and K (latent attention).
    """
    if window and window < k.shape[2]:
        seen = visible(q.shape[2], k.shape[2], 0, window, q.device)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def visible(queries: int, keys: int, ahead: int, window: int, device: torch.device) -> Tensor:
    """Return which keys a query sees, ``[q, k]``: those at most ``window`` - 1 tokens back.

    The first query stands ``ahead`` tokens after the first key.
    """
    row = torch.arange(ahead, ahead + queries, device=device)
    distance = row[:, None] - torch.arange(keys, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def expand_heads(k: Tensor, num_heads: int) -> Tensor:
    """Repeat each KV head so that there are ``num_heads``."""
    return k if k.shape[1] == num_heads else k.repeat_interleave(num_heads // k.shape[1], dim=1)


@dataclass(frozen=True)
class Sight:
    """What the queries of a block see of its keys: all, causally, or ``seen`` ``[q, k]``."""

    causal: bool = False
    seen: Tensor | None = None


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Attend to one block of keys: output and log-sum-exp ``[b, n, q]`` of its scores.

    The flash kernel of the device, which wants heads of equal size (and on CUDA as many of K and V
    as of Q); plain products where a mask cuts through the block or scores are capped. A query that
    sees nothing gets 0 and a log-sum-exp of minus infinity.
    """
    if sight.seen is not None or scores.cap:
        return _plain_forward(q, k, v, sight, scores)
    scale = scores.scale
    width, v = v.shape[-1], _padded(v, q.shape[-1])
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, sight.causal, scale=scale
        )
        return cast("Tensor", out)[..., :width], cast("Tensor", lse)
    heads = q.shape[1]
    found = aten._scaled_dot_product_flash_attention(
        q, expand_heads(k, heads), expand_heads(v, heads), 0.0, sight.causal, scale=scale
    )
    return cast("Tensor", found[0])[..., :width], cast("Tensor", found[1])


def block_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sight: Sight,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v from one block.

    ``out`` and ``lse`` are those of the whole row, over all blocks: then each block's gradient is
    exact and they add up.
    """
    if sight.seen is not None or scores.cap:
        return _plain_backward(grad, q, k, v, out, lse, sight, scores)
    scale, width = scores.scale, v.shape[-1]
    grad, v, out = (_padded(x, q.shape[-1]) for x in (grad, v, out))
    if q.device.type == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, sight.causal, scale=scale
        )
        return dq, dk, dv[..., :width]
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
        sight.causal,
        zero,
        zero,
        scale=scale,
    )
    return dq, fold_heads(dk, kv_heads), fold_heads(dv, kv_heads)[..., :width]


def fold_heads(grad: Tensor, num_heads: int) -> Tensor:
    """Sum the gradients of the copies that ``expand_heads`` made."""
    if grad.shape[1] == num_heads:
        return grad
    return grad.unflatten(1, (num_heads, -1)).sum(2)


def _padded(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _scored(q: Tensor, k: Tensor, sight: Sight, scores: Scores) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    found = (q @ expand_heads(k, q.shape[1]).transpose(-1, -2)).to(wide) * scores.scale
    if scores.cap:
        found = scores.cap * (found / scores.cap).tanh()
    seen = sight.seen
    if sight.causal:
        seen = visible(q.shape[2], k.shape[2], 0, k.shape[2], q.device)
    return found if seen is None else found.masked_fill(~seen, -torch.inf)


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, scores: Scores
) -> tuple[Tensor, Tensor]:
    found = _scored(q, k, sight, scores)
    lse = found.logsumexp(-1)
    # A row of minus infinities gives weights of 0, not of 0/0.
    weights = (found - lse.clamp_min(torch.finfo(lse.dtype).min).unsqueeze(-1)).exp()
    return weights.to(v.dtype) @ expand_heads(v, q.shape[1]), lse


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sight: Sight,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P = exp(S - lse): dV = P^T dO, dS = P (dO V^T - sum(dO O)), dQ = dS K, dK = dS^T Q.

    A cap multiplies dS by 1 - (S / cap)^2.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    found = _scored(q, k, sight, scores)
    weights = (found - lse.unsqueeze(-1)).exp()
    dv = weights.to(grad.dtype).transpose(-1, -2) @ grad
    of_weights = (grad @ expand_heads(v, heads).transpose(-1, -2)).to(weights.dtype)
    delta = (grad * out).to(weights.dtype).sum(-1, keepdim=True)
    of_scores = weights * (of_weights - delta) * scores.scale
    if scores.cap:
        # Where nothing is seen the score is minus infinity and the weight 0.
        of_scores = of_scores * (1 - (found / scores.cap).clamp_min(-1.0).square())
    of_scores = of_scores.to(q.dtype)
    dq = of_scores @ expand_heads(k, heads)
    dk = of_scores.transpose(-1, -2) @ q
    return dq, fold_heads(dk, kv_heads), fold_heads(dv, kv_heads)


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two partial attentions over disjoint keys: weights softmax(lse) per row.

    Ref: Milakov and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135.
    """
    total = torch.logaddexp(lse, block_lse)
    left, right = (lse - total).exp(), (block_lse - total).exp()
    return out * left.unsqueeze(-1) + block_out * right.unsqueeze(-1), total
