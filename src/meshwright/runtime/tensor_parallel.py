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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from meshwright.runtime.collectives import (
    Pending,
    all_gather,
    all_reduce,
    gather_blocks,
    own_block,
    reduce_scatter,
    start_all_reduce,
    start_scatter_blocks,
    start_sum,
)
from meshwright.runtime.groups import Group

UNDIVIDED_BYTES = 2**19
"""Up to here a sum that could travel while its second half is computed travels at once."""


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
    return start_sum(x, group).wait()


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


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _weight_gradient(
    weight: Tensor, grad: Tensor, x: Tensor, later: WeightGradients | None
) -> Tensor | None:
    """Return the gradient ``grad.T @ x`` of a weight, unless it goes where gradients are kept."""
    receive = getattr(weight, "receive_product", None)
    if later is not None and later.deferring:
        if receive is None:
            later.queue.append(lambda: accumulate(weight, _rows(grad).T @ _rows(x)))
        else:
            later.queue.append(lambda: receive(_rows(grad), _rows(x)))
        return None
    if receive is None:
        return _rows(grad).T @ _rows(x)
    with torch.no_grad():
        receive(_rows(grad), _rows(x))
    return None


class _Linear(Function):
    """``x @ weight.T + bias`` whose weight gradient can wait and is computed where it is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, later: WeightGradients | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.later, ctx.weight = later, weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            grad @ weight if of_x else None,
            _weight_gradient(ctx.weight, grad, x, ctx.later) if of_weight else None,
            _rows(grad).sum(0) if of_bias else None,
            None,
        )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, later: WeightGradients | None = None
) -> Tensor:
    """Return ``x @ weight.T + bias``. ``later`` allows the weight gradient to be put off."""
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, later)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A tensor-parallel region: its ranks, whether tokens are divided outside of it (``sp``),
    whether its communication runs beside compute where it can."""

    group: Group
    sp: bool
    overlap: bool
    later: WeightGradients | None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write ``x @ weight.T + bias`` to ``out``."""
    torch.mm(_rows(x), weight.T, out=_rows(out))
    if bias is not None:
        out += bias


def _halves(x: Tensor) -> tuple[slice, ...]:
    """Return the rows of two messages, or of one where a message costs as much as its bytes."""
    half = len(x) // 2
    if x.numel() * x.element_size() <= UNDIVIDED_BYTES or not half:
        return (slice(0, len(x)),)
    return slice(0, half), slice(half, len(x))


def _new(like: Tensor, features: int) -> Tensor:
    return like.new_empty((*like.shape[:-1], features))


class _EnterLinear(Function):
    """Enter a region and multiply by several weights.

    Forward multiplies the tokens that are here while the others arrive. Backward computes the
    input gradient first; while that is summed over the ranks, the weight gradients are computed
    (Megatron-LM's asynchronous gradient all-reduce, arXiv:2205.05198).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, region: Region, *parameters: Any) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        weights, biases = parameters[:count], parameters[count:]
        whole, outs = x, ()
        if region.sp and region.overlap:
            whole = x.new_empty((len(x) * region.group.size, *x.shape[1:]))
            outs = tuple(_new(whole, len(weight)) for weight in weights)
            for rows in gather_blocks(x, region.group, whole):
                for weight, bias, out in zip(weights, biases, outs, strict=True):
                    _product(whole[rows], weight, bias, out[rows])
        else:
            whole = all_gather(x, region.group) if region.sp else x
            outs = tuple(F.linear(whole, w, b) for w, b in zip(weights, biases, strict=True))
        ctx.save_for_backward(whole, *weights)
        ctx.region, ctx.weights = region, weights
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        region: Region = ctx.region
        x, *weights = ctx.saved_tensors
        pending: Pending | None = None
        input_gradient: Tensor | None = None
        if ctx.needs_input_grad[0]:
            pending = _start_input_gradient(x, grads, weights, region)
            if not region.overlap:
                input_gradient, pending = pending.wait(), None
        _, _, *needed = ctx.needs_input_grad
        of_weights = [
            _weight_gradient(weight, grad, x, region.later) if need else None
            for weight, grad, need in zip(ctx.weights, grads, needed, strict=False)
        ]
        of_biases = [
            _rows(grad).sum(0) if need else None
            for grad, need in zip(grads, needed[len(grads) :], strict=True)
        ]
        if pending is not None:
            input_gradient = pending.wait()
        return input_gradient, None, *of_weights, *of_biases


def _start_input_gradient(
    x: Tensor, grads: Sequence[Tensor], weights: Sequence[Tensor], region: Region
) -> Pending:
    """Begin to sum ``sum_i grads[i] @ weights[i]`` over the ranks, scattered with SP."""
    total = x.new_empty(x.shape)

    def fill(rows: slice) -> None:
        part = _rows(total[rows])
        torch.mm(_rows(grads[0][rows]), weights[0], out=part)
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            part.addmm_(_rows(grad[rows]), weight)

    if region.sp:
        return start_scatter_blocks(total, fill, region.group)
    fill(slice(None))
    return start_all_reduce(total, region.group)


def enter_linear(
    x: Tensor, region: Region, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Enter a tensor-parallel region and return ``x @ weight.T + bias`` for every weight."""
    if region.group.size == 1:
        pairs = zip(weights, biases, strict=True)
        return tuple(linear(x, w, b, region.later) for w, b in pairs)
    return _EnterLinear.apply(x, region, *weights, *biases)


class _LinearLeave(Function):
    """Multiply by a weight and leave a region: what is computed travels while the rest is made.

    Backward of sequence parallelism works on the tokens that are here while the others arrive.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, region: Region) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.region, ctx.weight = region, weight
        out = _new(x, len(weight))

        def fill(rows: slice) -> None:
            _product(x[rows], weight, None, out[rows])

        if region.sp:
            return start_scatter_blocks(out, fill, region.group).wait()
        begun: list[Pending] = []
        for rows in _halves(out):
            fill(rows)
            begun.append(start_all_reduce(out[rows], region.group))
        for pending in begun:
            pending.wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        region: Region = ctx.region
        x, weight = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        if not region.sp:
            whole, input_gradient = grad, grad @ weight if of_x else None
        else:
            whole = grad.new_empty((*x.shape[:-1], grad.shape[-1]))
            input_gradient = x.new_empty(x.shape) if of_x else None
            for rows in gather_blocks(grad, region.group, whole):
                if input_gradient is not None:
                    torch.mm(_rows(whole[rows]), weight, out=_rows(input_gradient[rows]))
        product = _weight_gradient(ctx.weight, whole, x, region.later) if of_weight else None
        return input_gradient, product, None


def linear_leave(x: Tensor, weight: Tensor, region: Region) -> Tensor:
    """Return ``x @ weight.T`` summed over the ranks of a region (and scattered with SP)."""
    if region.overlap and region.group.size > 1:
        return _LinearLeave.apply(x, weight, region)
    return leave(linear(x, weight, None, region.later), region.group, sp=region.sp)


def vocab_parallel_embedding(tokens: Tensor, table_Vh: Tensor, first_row: int) -> Tensor:
    """Look up the tokens whose rows are here; the others give 0 and are summed in by ``leave``."""
    local = tokens - first_row
    here = (local >= 0) & (local < table_Vh.shape[0])
    found = F.embedding(torch.where(here, local, 0), table_Vh)
    return found * here.unsqueeze(-1).to(found.dtype)


class _VocabParallelCrossEntropy(Function):
    """Works in the memory of float32 logits: fresh memory costs more than the arithmetic."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first_row: int, group: Group) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        top = all_reduce(wide.amax(dim=-1), group, dist.ReduceOp.MAX)
        local = labels - first_row
        here = (local >= 0) & (local < logits.shape[-1])
        index = torch.where(here, local, 0).unsqueeze(-1)
        own = wide.gather(-1, index).squeeze(-1)
        exp = wide.sub_(top.unsqueeze(-1)).exp_()
        sums = torch.stack([exp.sum(dim=-1), torch.where(here, own, 0.0)])
        total, label_logit = all_reduce(sums, group).unbind(0)
        ctx.save_for_backward(exp, total, index, here)
        ctx.dtype = logits.dtype
        return total.log() + top - label_logit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        exp, total, index, here = ctx.saved_tensors
        out = exp.mul_((grad / total).unsqueeze(-1))
        out.scatter_add_(-1, index, -(grad * here).unsqueeze(-1))
        return out.to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, first_row: int, num_rows: int, group: Group
) -> Tensor:
    """Return the cross-entropy per token, ``[s, b]``, in float32 (float64 for float64 logits).

    Each rank holds the logits of ``num_rows`` words from ``first_row``; columns past ``num_rows``
    are padding. Two small all-reduces: the maximum; the sum of exponentials with the label's logit.
    Over several ranks the logits are overwritten.
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
