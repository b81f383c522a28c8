"""Routed experts over the expert mesh: router, dispatch, grouped products, combine.

Expert and dense parallelism are folded (arXiv:2504.14960): the ranks of EP x ETP are any of
TP x CP x DP. A token travels in one all-to-all to every ETP rank of its expert's EP rank and the
ETP partial sums travel back: what is received equals EP all-to-all plus ETP all-gather. Dropless.

Shapes: t tokens here, k experts per token, E experts, e experts here, r rows received, f expert
features here, h hidden features.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from meshwright.parallel.layout import Recompute
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.context import Context
from meshwright.runtime.groups import Group
from meshwright.runtime.layers import Linear, Mlp, residual_std
from meshwright.runtime.parameters import Box, ShardedParameter, parameter
from meshwright.runtime.shape import MoeShape
from meshwright.runtime.tensor_parallel import (
    WeightGradients,
    accumulate,
    join_tokens,
    split_tokens,
)


class _AddAuxLoss(Function):
    """Passes ``x`` through and gives ``loss`` a gradient of 1: it joins the objective."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


class _AllToAllRows(Function):
    """Send ``sent[m]`` rows to member m, receive ``received[m]`` from it; backward the reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange_rows(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange_rows(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange_rows(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group.handle)
    return out


class Router(nn.Module):
    """Chooses ``topk`` experts per token and their weights.

    Softmax scores (Mixtral, Qwen, DeepSeek-V2) or sigmoid scores with a correction bias and groups
    (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). Losses added to the objective, per microbatch
    of T tokens: load balance ``aux_loss_coef * E * sum_i (c_i / (T k)) * (P_i / T)`` with counts c
    and summed probabilities P (arXiv:2101.03961), and ``z_loss_coef * mean(logsumexp^2)``.
    """

    def __init__(self, context: Context, name: str, moe: MoeShape) -> None:
        super().__init__()
        self.context, self.moe = context, moe
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
        if moe.correction_bias:
            bias_box = Box(
                name=f"{name}.e_score_correction_bias",
                shape=(experts,),
                offsets=(0,),
                init="zeros",
                counted=first,
            )
            self.bias = parameter(bias_box, (experts,), context.dtype)
            self.bias.requires_grad_(False)

    def forward(self, x: Tensor, aux_scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``x`` (carrying the auxiliary losses), expert numbers and weights ``[t, k]``."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.moe.scoring == "sigmoid":
            logits = F.linear(x.to(wide), self.weight.to(wide))
            scores = logits.sigmoid()
        else:
            logits = F.linear(x, self.weight).to(wide)
            scores = logits.softmax(dim=-1)
        chosen = self._choose(scores)
        weights = scores.gather(-1, chosen)
        if self.moe.normalise:
            tiny = 1e-20 if self.moe.scoring == "sigmoid" else 0.0
            weights = weights / (weights.sum(dim=-1, keepdim=True) + tiny)
        weights = weights * self.moe.routed_scaling_factor
        x = self._with_losses(x, logits, scores, chosen, aux_scale)
        return x, chosen, weights.to(x.dtype)

    @torch.no_grad()
    def _choose(self, scores: Tensor) -> Tensor:
        moe = self.moe
        shifted = scores if self.bias is None else scores + self.bias.to(scores.dtype)
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

    def _with_losses(
        self, x: Tensor, logits: Tensor, scores: Tensor, chosen: Tensor, aux_scale: float
    ) -> Tensor:
        moe, group = self.moe, self.context.groups.tp_cp
        if not (moe.aux_loss_coef or moe.z_loss_coef) or not torch.is_grad_enabled():
            return x
        tokens = chosen.shape[0] * group.size
        loss = logits.new_zeros(())
        if moe.aux_loss_coef:
            counts = torch.bincount(chosen.flatten(), minlength=moe.num_experts).to(scores.dtype)
            share = all_reduce(counts, group) / (tokens * moe.topk)
            probability = scores
            if moe.scoring == "sigmoid":
                probability = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
            loss = moe.aux_loss_coef * moe.num_experts * (share * probability.sum(0)).sum() / tokens
        if moe.z_loss_coef:
            loss = loss + moe.z_loss_coef * logits.logsumexp(-1).square().sum() / tokens
        loss = loss * aux_scale
        self.context.aux_losses.append(loss.detach())
        return _AddAuxLoss.apply(x, loss)


@dataclass(frozen=True, kw_only=True)
class _Route:
    """Which rows go where: to undo, the same lists serve backwards."""

    by_expert_tk: Tensor
    send_index: Tensor
    sent: list[int]
    received: list[int]
    by_local_expert_r: Tensor
    tokens_per_expert: list[int]


class Experts(nn.Module):
    """The experts of this rank: stacks ``[e, f, h]`` and ``[e, h, f]``, a grouped product each."""

    def __init__(self, context: Context, name: str, moe: MoeShape) -> None:
        super().__init__()
        self.context, self.moe = context, moe
        groups, layout = context.groups, context.layout
        self.local = moe.num_experts // layout.ep
        e, f, h = self.local, moe.ffn_hidden_size // layout.etp, context.shape.hidden_size
        first, column = groups.ep_index * e, groups.etp_index * f
        full = moe.num_experts, moe.ffn_hidden_size

        def stack(part: str, shape: tuple[int, int, int], offsets: tuple[int, int, int]) -> Any:
            down = part == "down_proj"
            whole = (full[0], h, full[1]) if down else (full[0], full[1], h)
            std = context.shape.initializer_range
            box = Box(
                name=f"{name}.{part}",
                shape=whole,
                offsets=offsets,
                std=residual_std(context) if down else std,
                expert=True,
            )
            return parameter(box, shape, context.dtype)

        self.gate_proj = stack("gate_proj", (e, f, h), (first, column, 0))
        self.up_proj = stack("up_proj", (e, f, h), (first, column, 0))
        self.down_proj = stack("down_proj", (e, h, f), (first, 0, column))

    def forward(self, x_th: Tensor, chosen_tk: Tensor, weights_tk: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, ``[t, h]``."""
        group = self.context.groups.etp_ep
        route = self._route(chosen_tk)
        k = chosen_tk.shape[1]
        rows = x_th.index_select(0, route.by_expert_tk[route.send_index] // k)
        if group.handle is not None:
            rows = _AllToAllRows.apply(rows, route.sent, route.received, group)
        rows = rows.index_select(0, route.by_local_expert_r)
        rows = self._compute(rows, route.tokens_per_expert)
        rows = torch.zeros_like(rows).index_copy(0, route.by_local_expert_r, rows)
        if group.handle is not None:
            rows = _AllToAllRows.apply(rows, route.received, route.sent, group)
        slots = rows.new_zeros((chosen_tk.numel(), rows.shape[1]))
        # ETP ranks return partial sums of the same slot, which add up here.
        slots = slots.index_add(0, route.by_expert_tk[route.send_index], rows)
        return (slots.unflatten(0, (-1, k)) * weights_tk.unsqueeze(-1)).sum(dim=1)

    @torch.no_grad()
    def _route(self, chosen_tk: Tensor) -> _Route:
        groups, e = self.context.groups, self.local
        flat = chosen_tk.flatten()
        by_expert = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.moe.num_experts)
        ep_of_member = torch.tensor([ep for ep, _ in groups.etp_ep_places], device=flat.device)
        send_counts = counts.view(-1, e)[ep_of_member]
        received_counts = send_counts
        if groups.etp_ep.handle is not None:
            received_counts = torch.empty_like(send_counts)
            dist.all_to_all_single(received_counts, send_counts, group=groups.etp_ep.handle)
        ends = counts.view(-1, e).sum(1).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        send_index = torch.cat(
            [
                torch.arange(starts[ep], ends[ep], device=flat.device)
                for ep, _ in groups.etp_ep_places
            ]
        )
        expert = torch.arange(e, device=flat.device).repeat(groups.etp_ep.size)
        expert = expert.repeat_interleave(received_counts.flatten())
        return _Route(
            by_expert_tk=by_expert,
            send_index=send_index,
            sent=send_counts.sum(1).tolist(),
            received=received_counts.sum(1).tolist(),
            by_local_expert_r=expert.argsort(stable=True),
            tokens_per_expert=received_counts.sum(0).tolist(),
        )

    def _compute(self, rows: Tensor, tokens: list[int]) -> Tensor:
        later = self.context.later
        gate = grouped_linear(rows, self.gate_proj, tokens, later)
        up = grouped_linear(rows, self.up_proj, tokens, later)
        hidden = self.context.recomputed(Recompute.moe_act, _silu_product, gate, up)
        return grouped_linear(hidden, self.down_proj, tokens, later)


def _silu_product(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def grouped_linear(
    x_rh: Tensor, weight_efh: Tensor, tokens: list[int], later: WeightGradients | None
) -> Tensor:
    """Multiply consecutive groups of rows, ``tokens[i]`` of them, by ``weight[i].T``.

    The engine's grouped product where it serves (rows present, 16-byte strides, not float64, weight
    gradient at once), else a loop over experts.
    """
    if later is not None:
        return _SplitGroupedLinear.apply(x_rh, weight_efh, tokens, later)
    bytes_apart = x_rh.element_size() * torch.tensor(weight_efh.shape[1:])
    aligned = bool((bytes_apart % 16 == 0).all())
    if x_rh.shape[0] == 0 or x_rh.dtype == torch.float64 or not aligned:
        return _loop(x_rh, weight_efh, tokens)
    ends = torch.tensor(tokens, device=x_rh.device).cumsum(0).to(torch.int32)
    return F.grouped_mm(x_rh, weight_efh.transpose(-2, -1), offs=ends)


def _loop(x_rh: Tensor, weight_efh: Tensor, tokens: list[int]) -> Tensor:
    # Indexing weight[i] would write a whole stack of zeros per expert in backward; unbind does not.
    parts = zip(x_rh.split(tokens), weight_efh.unbind(0), strict=True)
    return torch.cat([F.linear(x, w) for x, w in parts])


class _SplitGroupedLinear(Function):
    """``grouped_linear`` whose weight gradient can wait."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, tokens: list[int], later: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tokens, ctx.later, ctx.weight = tokens, later, weight
        return _loop(x, weight, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        tokens: list[int] = ctx.tokens
        pairs = zip(grad.split(tokens), weight.unbind(0), strict=True)
        input_gradient = torch.cat([g @ w for g, w in pairs])

        def weight_gradient() -> Tensor:
            pairs = zip(grad.split(tokens), x.split(tokens), strict=True)
            return torch.stack([g.T @ rows for g, rows in pairs])

        if ctx.needs_input_grad[1] and ctx.later.deferring:
            parameter = ctx.weight
            ctx.later.queue.append(lambda: accumulate(parameter, weight_gradient()))
            return input_gradient, None, None, None
        return input_gradient, weight_gradient() if ctx.needs_input_grad[1] else None, None, None


class Moe(nn.Module):
    """Router, routed experts and shared experts: the feed-forward branch of a layer."""

    def __init__(self, context: Context, name: str, moe: MoeShape) -> None:
        super().__init__()
        self.context = context
        self.gate = Router(context, f"{name}.gate", moe)
        self.experts = Experts(context, f"{name}.experts", moe)
        self.shared_experts: Mlp | None = None
        self.shared_expert_gate: Linear | None = None
        if moe.shared_ffn_hidden_size:
            shared = "shared_experts" if moe.names == "deepseek" else "shared_expert"
            self.shared_experts = Mlp(
                context, f"{name}.{shared}", moe.shared_ffn_hidden_size, Recompute.shared_experts
            )
            if moe.shared_gate:
                gate_name = f"{name}.shared_expert_gate"
                self.shared_expert_gate = Linear(context, gate_name, context.shape.hidden_size, 1)

    def forward(self, x: Tensor, aux_scale: float) -> Tensor:
        """Return the branch's output for the tokens here."""
        return self.context.recomputed(Recompute.moe, self._compute, x, aux_scale)

    def _compute(self, x: Tensor, aux_scale: float) -> Tensor:
        context = self.context
        # Without SP the TP ranks hold the same tokens, of which each routes its part.
        divided = context.layout.tp > 1 and not context.sp
        own = split_tokens(x, context.groups.tp) if divided else x
        flat, chosen, weights = self.gate(own.flatten(0, 1), aux_scale)
        out = self.experts(flat, chosen, weights).view_as(own)
        if divided:
            out = join_tokens(out, context.groups.tp)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(x).sigmoid()
            out = out + shared
        return out
