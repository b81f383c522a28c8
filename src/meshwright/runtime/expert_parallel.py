"""Routed experts over the expert mesh: router, dispatch, grouped products, combine.

Expert and dense parallelism are folded (arXiv:2504.14960): the ranks of EP x ETP are any of
TP x CP x DP. A token travels in one all-to-all to every ETP rank of its expert's EP rank and the
ETP partial sums travel back: what is received equals EP all-to-all plus ETP all-gather. Choices
that an expert's capacity dropped do not travel; padded to it, every rank sends as many rows.

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
from meshwright.runtime.capacity import capacity
from meshwright.runtime.context import Context
from meshwright.runtime.groups import Group
from meshwright.runtime.layers import Linear, Mlp, gated, residual_std
from meshwright.runtime.parameters import Box, ShardedParameter, parameter
from meshwright.runtime.routing import Router
from meshwright.runtime.shape import MoeShape
from meshwright.runtime.tensor_parallel import (
    WeightGradients,
    accumulate,
    join_tokens,
    split_tokens,
)


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


@dataclass(frozen=True, kw_only=True)
class _Route:
    """Which rows go where: to undo, the same lists serve backwards.

    ``slot_of_row`` says which choice (number token * k + place) a sent row serves; the number
    t * k is padding.
    """

    slot_of_row: Tensor
    sent: list[int]
    received: list[int]
    by_local_expert_r: Tensor
    tokens_per_expert: list[int]


class Experts(nn.Module):
    """The experts of this rank: stacks ``[e, f, h]`` and ``[e, h, f]``, a grouped product each.

    ETP divides f; of the biases of ``down_proj`` it divides h, so that each is added once.
    """

    def __init__(self, context: Context, name: str, moe: MoeShape) -> None:
        super().__init__()
        self.context, self.moe = context, moe
        groups, layout, shape = context.groups, context.layout, context.shape
        self.local = moe.num_experts // layout.ep
        e, f, h = self.local, moe.ffn_hidden_size // layout.etp, shape.hidden_size
        whole_f, part_h = moe.ffn_hidden_size, h // layout.etp
        first, column = groups.ep_index * e, groups.etp_index * f

        def stack(part: str, whole: list[int], local: list[int], *at: int) -> ShardedParameter:
            bias = part.endswith("bias")
            box = Box(
                name=f"{name}.{part}",
                shape=(moe.num_experts, *whole),
                offsets=(first, *at),
                std=residual_std(context) if part == "down_proj" else shape.initializer_range,
                init="zeros" if bias else "normal",
                expert=True,
                decay=not bias,
            )
            return parameter(box, (e, *local), context.dtype)

        self.gate_proj = stack("gate_proj", [whole_f, h], [f, h], column, 0)
        self.up_proj = stack("up_proj", [whole_f, h], [f, h], column, 0)
        self.down_proj = stack("down_proj", [h, whole_f], [h, f], 0, column)
        self.biases: nn.ParameterList | None = None
        if moe.expert_bias:
            self.first_h = groups.etp_index * part_h
            self.biases = nn.ParameterList(
                [
                    stack("gate_proj_bias", [whole_f], [f], column),
                    stack("up_proj_bias", [whole_f], [f], column),
                    stack("down_proj_bias", [h], [part_h], self.first_h),
                ]
            )

    def forward(
        self, x_th: Tensor, chosen_tk: Tensor, weights_tk: Tensor, padded_to: int = 0
    ) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, ``[t, h]``.

        Choices numbered E are left out. With ``padded_to`` every expert gets so many rows.
        """
        group = self.context.groups.etp_ep
        route = self._route(chosen_tk, padded_to)
        k = chosen_tk.shape[1]
        if padded_to:
            x_th = F.pad(x_th, (0, 0, 0, 1))
        rows = x_th.index_select(0, route.slot_of_row // k)
        if group.handle is not None:
            rows = _AllToAllRows.apply(rows, route.sent, route.received, group)
        rows = rows.index_select(0, route.by_local_expert_r)
        rows = self._compute(rows, route.tokens_per_expert)
        rows = torch.zeros_like(rows).index_copy(0, route.by_local_expert_r, rows)
        if group.handle is not None:
            rows = _AllToAllRows.apply(rows, route.received, route.sent, group)
        slots = rows.new_zeros((chosen_tk.numel() + 1, rows.shape[1]))
        # ETP ranks return partial sums of the same slot, which add up here.
        slots = slots.index_add(0, route.slot_of_row, rows)[:-1]
        return (slots.unflatten(0, (-1, k)) * weights_tk.unsqueeze(-1)).sum(dim=1)

    @torch.no_grad()
    def _route(self, chosen_tk: Tensor, padded_to: int) -> _Route:
        groups, e = self.context.groups, self.local
        slots, counts = self._by_expert(chosen_tk, padded_to)
        ep_of_member = torch.tensor([ep for ep, _ in groups.etp_ep_places], device=slots.device)
        send_counts = counts.view(-1, e)[ep_of_member]
        received_counts = send_counts
        if groups.etp_ep.handle is not None and not padded_to:
            received_counts = torch.empty_like(send_counts)
            dist.all_to_all_single(received_counts, send_counts, group=groups.etp_ep.handle)
        ends = counts.view(-1, e).sum(1).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        expert = torch.arange(e, device=slots.device).repeat(groups.etp_ep.size)
        expert = expert.repeat_interleave(received_counts.flatten())
        return _Route(
            slot_of_row=torch.cat([slots[starts[ep] : ends[ep]] for ep, _ in groups.etp_ep_places]),
            sent=send_counts.sum(1).tolist(),
            received=received_counts.sum(1).tolist(),
            by_local_expert_r=expert.argsort(stable=True),
            tokens_per_expert=received_counts.sum(0).tolist(),
        )

    def _by_expert(self, chosen_tk: Tensor, padded_to: int) -> tuple[Tensor, Tensor]:
        """Return the choices in the order of their experts, and how many each expert has."""
        flat, experts = chosen_tk.flatten(), self.moe.num_experts
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts + 1)[:experts]
        # Choices that were dropped come last.
        if not padded_to:
            return order[: int(counts.sum())], counts
        rows = torch.arange(padded_to, device=flat.device)
        index = (counts.cumsum(0) - counts).unsqueeze(1) + rows
        slots = order[index.clamp_(max=len(order) - 1)]
        slots[rows >= counts.unsqueeze(1)] = len(flat)
        return slots.flatten(), torch.full_like(counts, padded_to)

    def _compute(self, rows: Tensor, tokens: list[int]) -> Tensor:
        later = self.context.later
        gate = grouped_linear(rows, self.gate_proj, tokens, later)
        up = grouped_linear(rows, self.up_proj, tokens, later)
        if self.biases is not None:
            gate = gate + _of_rows(self.biases[0], tokens)
            up = up + _of_rows(self.biases[1], tokens)
        activation = self.context.shape.activation
        hidden = self.context.recomputed(Recompute.moe_act, gated, activation, gate, up)
        out = grouped_linear(hidden, self.down_proj, tokens, later)
        if self.biases is not None:
            own = _of_rows(self.biases[2], tokens)
            after = out.shape[1] - self.first_h - own.shape[1]
            out = out + F.pad(own, (self.first_h, after))
        return out


def _of_rows(bias_ef: Tensor, tokens: list[int]) -> Tensor:
    """Return the bias of each row's expert."""
    return bias_ef.repeat_interleave(torch.tensor(tokens, device=bias_ef.device), dim=0)


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
        flat, chosen, weights = self.gate(own, aux_scale)
        out = self.experts(flat, chosen, weights, self._padded_to(len(flat))).view_as(own)
        if divided:
            out = join_tokens(out, context.groups.tp)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(x).sigmoid()
            out = out + shared
        return out

    def _padded_to(self, tokens: int) -> int:
        """Return the rows that every expert gets from here, 0 where it gets what was chosen."""
        moe, context = self.gate.moe, self.context
        if not (moe.capacity_factor and moe.pad_to_capacity):
            return 0
        assert context.token_groups is not None
        groups = int(context.token_groups.max()) + 1
        return groups * capacity(moe, tokens // groups)
