"""How tokens choose experts: scores, groups of experts, capacity, and what keeps them balanced.

Shapes: t tokens here, s of them in each of b sequences, k experts per token, E experts, h hidden
features.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from meshwright.runtime.capacity import capacity, within_capacity
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.context import Context
from meshwright.runtime.flat_buffer import FlatBuffer, wide
from meshwright.runtime.parameters import Box, ShardedParameter, parameter
from meshwright.runtime.shape import MoeShape

CORRECTION_BIAS = "e_score_correction_bias"


class _AddAuxLoss(Function):
    """Passes ``x`` through and gives ``loss`` a gradient of 1: it joins the objective."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


class Router(nn.Module):
    """Chooses ``topk`` experts per token and their weights.

    Softmax scores (Mixtral, Qwen, DeepSeek-V2) or sigmoid scores with a correction bias and groups
    (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). Losses added to the objective, per microbatch
    of T tokens: load balance ``aux_loss_coef * E * sum_i (c_i / (T k)) * (P_i / T)`` with counts c
    and summed probabilities P (arXiv:2101.03961), or the mean over sequences of the same taken of
    each sequence alone (``seq_aux_loss``: arXiv:2412.19437, equations 17 to 20); and
    ``z_loss_coef * mean(logsumexp^2)``. Counts are of choices, before any are dropped.
    """

    def __init__(self, context: Context, name: str, moe: MoeShape) -> None:
        super().__init__()
        self.context, self.name, self.moe = context, name, moe
        summed = "tp" if context.layout.tp > 1 else ""
        first = context.groups.tp.index == 0
        h, experts = context.shape.hidden_size, moe.num_experts
        box = Box(
            name=f"{name}.weight",
            shape=(experts, h),
            offsets=(0, 0),
            std=context.shape.initializer_range,
            partial=summed,
            counted=first,
        )
        self.weight = parameter(box, (experts, h), context.dtype)
        self.bias: ShardedParameter | None = None
        if moe.router_bias:
            of_logits = replace(
                box, name=f"{name}.bias", shape=(experts,), offsets=(0,), init="zeros", decay=False
            )
            self.bias = parameter(of_logits, (experts,), context.dtype)
        self.correction_bias: ShardedParameter | None = None
        if moe.correction_bias:
            bias_box = Box(
                name=f"{name}.{CORRECTION_BIAS}",
                shape=(experts,),
                offsets=(0,),
                init="zeros",
                counted=first,
            )
            # Updates of 0.001 would be lost in 16 bit.
            self.correction_bias = parameter(bias_box, (experts,), wide(context.dtype))
            self.correction_bias.requires_grad_(False)

    def forward(self, x: Tensor, aux_scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Choose for ``[s, b, h]`` tokens.

        Returns them as ``[t, h]`` (carrying the auxiliary losses), expert numbers and weights
        ``[t, k]``. The number of a choice that was dropped is E.
        """
        moe = self.moe
        b, x = x.shape[1], x.flatten(0, 1)
        at_least = torch.float64 if x.dtype == torch.float64 else torch.float32
        if moe.scoring == "sigmoid":
            bias = None if self.bias is None else self.bias.to(at_least)
            logits = F.linear(x.to(at_least), self.weight.to(at_least), bias)
            scores = logits.sigmoid()
        else:
            logits = F.linear(x, self.weight, self.bias).to(at_least)
            scores = logits.softmax(dim=-1)
        chosen = self._choose(scores)
        weights = scores.gather(-1, chosen)
        if moe.normalise:
            tiny = 1e-20 if moe.scoring == "sigmoid" else 0.0
            weights = weights / (weights.sum(dim=-1, keepdim=True) + tiny)
        weights = weights * moe.routed_scaling_factor
        if torch.is_grad_enabled():
            counts = torch.bincount(chosen.flatten(), minlength=moe.num_experts)
            self.context.expert_counts[self.name] = counts
            x = self._with_losses(x, logits, scores, chosen, b, aux_scale)
        if moe.capacity_factor:
            chosen = self._within_capacity(chosen, weights.detach(), b)
        return x, chosen, weights.to(x.dtype)

    @torch.no_grad()
    def _choose(self, scores: Tensor) -> Tensor:
        moe = self.moe
        shifted = scores
        if self.correction_bias is not None:
            shifted = scores + self.correction_bias.to(scores.dtype)
        if moe.num_groups > 1:
            grouped = shifted.unflatten(-1, (moe.num_groups, -1))
            if moe.group_score == "top2":
                best = grouped.topk(2, dim=-1).values.sum(dim=-1)
            else:
                best = grouped.amax(dim=-1)
            allowed = torch.zeros_like(best, dtype=torch.bool)
            allowed.scatter_(-1, best.topk(moe.topk_groups, dim=-1).indices, value=True)
            shifted = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
        return shifted.topk(moe.topk, dim=-1).indices

    @torch.no_grad()
    def _within_capacity(self, chosen: Tensor, weights: Tensor, b: int) -> Tensor:
        group_s = self.context.token_groups
        assert group_s is not None
        group_t = group_s.repeat_interleave(b).to(chosen.device)
        most = capacity(self.moe, len(group_t) // (int(group_s.max()) + 1))
        kept = within_capacity(self.moe, chosen, weights, group_t, most)
        return chosen.masked_fill(~kept, self.moe.num_experts)

    def _with_losses(
        self, x: Tensor, logits: Tensor, scores: Tensor, chosen: Tensor, b: int, aux_scale: float
    ) -> Tensor:
        moe, group = self.moe, self.context.groups.tp_cp
        if not (moe.aux_loss_coef or moe.z_loss_coef):
            return x
        loss = logits.new_zeros(())
        if moe.aux_loss_coef:
            if moe.scoring == "sigmoid":
                scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
            # Every sequence is weighed alone, or all tokens are taken as one.
            alone = b if moe.balance == "seq_aux_loss" else 1
            loss = moe.aux_loss_coef * self._imbalance(scores, chosen, alone)
        if moe.z_loss_coef:
            tokens = chosen.shape[0] * group.size
            loss = loss + moe.z_loss_coef * logits.logsumexp(-1).square().sum() / tokens
        loss = loss * aux_scale
        self.context.aux_losses.append(loss.detach())
        return _AddAuxLoss.apply(x, loss)

    def _imbalance(self, scores: Tensor, chosen: Tensor, alone: int) -> Tensor:
        """Return the mean over ``alone`` streams of tokens of E * sum_i share_i * probability_i."""
        moe, group = self.moe, self.context.groups.tp_cp
        tokens = chosen.shape[0] // alone * group.size
        stream = torch.arange(chosen.shape[0], device=chosen.device) % alone
        bucket = (stream.unsqueeze(1) * moe.num_experts + chosen).flatten()
        counts = torch.bincount(bucket, minlength=alone * moe.num_experts).to(scores.dtype)
        share = all_reduce(counts, group).view(alone, -1) / (tokens * moe.topk)
        probability = scores.unflatten(0, (-1, alone)).sum(0) / tokens
        return moe.num_experts * (share * probability).sum() / alone


@torch.no_grad()
def summed_counts(
    counts: Mapping[str, Tensor], context: Context, device: torch.device
) -> dict[str, Tensor]:
    """Return how many tokens of the global batch chose each expert, of every router of the model.

    ``counts`` are those of this rank, which saw tokens and layers that no other rank did.
    """
    shape = context.shape
    if shape.moe is None:
        return {}
    names = [f"model.layers.{number}.mlp.gate" for number in shape.moe_layers]
    total = torch.zeros((len(names), shape.moe.num_experts), dtype=torch.float64, device=device)
    for row, name in zip(total, names, strict=True):
        if name in counts:
            row += counts[name]
    return dict(zip(names, all_reduce(total, context.groups.world), strict=True))


@torch.no_grad()
def update_correction_biases(
    buffers: Iterable[FlatBuffer], counts: Mapping[str, Tensor], rate: float
) -> None:
    """Raise the bias of every expert chosen less than the mean by ``rate``, lower the others'.

    ``counts`` are those of the global batch. Ref: auxiliary-loss-free balancing,
    arXiv:2408.15664, algorithm 1; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """
    changes = {
        f"{name}.{CORRECTION_BIAS}": rate * (found.mean() - found).sign()
        for name, found in counts.items()
    }
    for buffer in buffers:
        if not any(member.box.name in changes for member in buffer.members):
            continue
        buffer.drop()
        for piece in buffer.pieces():
            change = changes.get(piece.parameter.box.name)
            if change is not None:
                piece.master.add_(change[piece.begin : piece.end].to(piece.master.dtype))
        buffer.publish()
