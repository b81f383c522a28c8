"""Tensor and sequence parallelism on local tensors (Megatron-LM, arXiv:1909.08053, 2205.05198).

A tensor-parallel region is entered and left. Without sequence parallelism entering is free and
leaving is an all-reduce; with it entering gathers the sequence and leaving reduces and scatters it;
backward is the mirror image. Tensors are ``[s, b, h]`` (sequence first): gathering needs no copy.

Shapes: s tokens of the sequence on this rank, b sequences, h features, V vocabulary rows here.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from meshwright.runtime.collectives import all_gather, all_reduce, own_block, reduce_scatter
from meshwright.runtime.groups import Group


class _Pair(Function):
    """Applies one collective forward and its mirror backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: Group,
        forward: Callable[[Tensor, Group], Tensor],
        backward: Callable[[Tensor, Group], Tensor],
    ) -> Tensor:
        ctx.group, ctx.mirror = group, backward
        return forward(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.mirror(grad, ctx.group), None, None, None


def _same(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


def _reduced(x: Tensor, group: Group) -> Tensor:
    return all_reduce(x.clone(memory_format=torch.contiguous_format), group)


def enter(x: Tensor, group: Group, *, sp: bool) -> Tensor:
    """Enter a tensor-parallel region: every rank gets all tokens; gradients are summed."""
    if group.size == 1:
        return x
    return _Pair.apply(x, group, *((all_gather, reduce_scatter) if sp else (_same, _reduced)))


def leave(x: Tensor, group: Group, *, sp: bool) -> Tensor:
    """Leave a tensor-parallel region: partial results are summed (and scattered with SP)."""
    if group.size == 1:
        return x
    return _Pair.apply(x, group, *((reduce_scatter, all_gather) if sp else (_reduced, _same)))


def split_tokens(x: Tensor, group: Group) -> Tensor:
    """Keep this rank's block of replicated tokens; backward gathers what the ranks computed."""
    if group.size == 1:
        return x
    return _Pair.apply(x, group, _own_copy, all_gather)


def join_tokens(x: Tensor, group: Group) -> Tensor:
    """Gather blocks into replicated tokens; backward keeps this rank's block."""
    if group.size == 1:
        return x
    return _Pair.apply(x, group, all_gather, _own_copy)


def _own_copy(x: Tensor, group: Group) -> Tensor:
    return own_block(x, group).contiguous()


def sum_over(x: Tensor, group: Group) -> Tensor:
    """Sum over ranks forward and backward: for statistics that each rank uses in part."""
    if group.size == 1:
        return x
    return _Pair.apply(x, group, _reduced, _reduced)


class WeightGradients:
    """Where split backward passes leave their weight half (zero bubble, arXiv:2401.10241).

    While ``deferring``, a linear layer's backward computes the input gradient at once and queues
    the weight gradient; ``run`` works the queue off.
    """

    def __init__(self) -> None:
        self.deferring = False
        self.queue: list[Callable[[], None]] = []

    def take(self) -> list[Callable[[], None]]:
        """Return what is queued and start afresh."""
        queue, self.queue = self.queue, []
        return queue


def accumulate(parameter: Tensor, grad: Tensor) -> None:
    """Add to a parameter's gradient as autograd does, its accumulation hook included."""
    receive = getattr(parameter, "receive_gradient", None)
    if receive is not None:
        receive(grad)
    elif parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad


class _SplitLinear(Function):
    """``x @ weight.T`` whose weight gradient can wait."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, later: WeightGradients) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.later, ctx.weight = later, weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors

        def weight_gradient() -> Tensor:
            return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])

        if not ctx.needs_input_grad[1]:
            return grad @ weight, None, None
        if ctx.later.deferring:
            parameter = ctx.weight
            ctx.later.queue.append(lambda: accumulate(parameter, weight_gradient()))
            return grad @ weight, None, None
        return grad @ weight, weight_gradient(), None


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, later: WeightGradients | None = None
) -> Tensor:
    """Return ``x @ weight.T + bias``. ``later`` allows the weight gradient to be put off."""
    if later is None:
        return F.linear(x, weight, bias)
    y = _SplitLinear.apply(x, weight, later)
    return y if bias is None else y + bias


def vocab_parallel_embedding(tokens: Tensor, table_Vh: Tensor, first_row: int) -> Tensor:
    """Look up the tokens whose rows are here; the others give 0 and are summed in by ``leave``."""
    local = tokens - first_row
    here = (local >= 0) & (local < table_Vh.shape[0])
    found = F.embedding(torch.where(here, local, 0), table_Vh)
    return found * here.unsqueeze(-1).to(found.dtype)


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first_row: int, group: Group) -> Tensor:
        wide = logits.double() if logits.dtype == torch.float64 else logits.float()
        top = all_reduce(wide.amax(dim=-1), group, dist.ReduceOp.MAX)
        exp = (wide - top.unsqueeze(-1)).exp()
        total = all_reduce(exp.sum(dim=-1), group)
        local = labels - first_row
        here = (local >= 0) & (local < logits.shape[-1])
        index = torch.where(here, local, 0).unsqueeze(-1)
        own = wide.gather(-1, index).squeeze(-1)
        label_logit = all_reduce(torch.where(here, own, 0.0), group)
        ctx.save_for_backward(exp, total, index, here)
        ctx.dtype = logits.dtype
        return total.log() + top - label_logit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        exp, total, index, here = ctx.saved_tensors
        out = exp / total.unsqueeze(-1)
        out.scatter_add_(-1, index, -here.unsqueeze(-1).to(out.dtype))
        return (out * grad.unsqueeze(-1)).to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, first_row: int, num_rows: int, group: Group
) -> Tensor:
    """Return the cross-entropy per token, ``[s, b]``, in float32 (float64 for float64 logits).

    Each rank holds the logits of ``num_rows`` words from ``first_row``; columns past ``num_rows``
    are padding. Three small all-reduces: maximum, sum of exponentials, the label's logit.
    Ref: Megatron-LM, arXiv:1909.08053, section 3.
    """
    if group.size == 1:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), reduction="none")
        return losses.view_as(labels)
    if num_rows < logits.shape[-1]:
        columns = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(columns >= num_rows, torch.finfo(logits.dtype).min)
    return _VocabParallelCrossEntropy.apply(logits, labels, first_row, group)
