"""Data parallelism with what ZeRO shards (arXiv:1910.02054), the same way for every layout.

Parameters that are reduced together lie end to end in one flat buffer, padded so that it divides
over the ``shard`` group; rank r of it owns the r-th range of weights, gradients and optimizer
state. The gradient of the global batch is a sum over microbatches and ranks (the loss is divided
by the tokens of the global batch), so experts and dense parameters need no scaling factors.

| zero | parameters | gradients | optimizer state |
|---|---|---|---|
| no_shard | whole | whole, all-reduced | whole |
| optim | whole | whole, reduce-scattered at the end | range |
| optim_grads | whole | range: reduce-scattered after every backward pass | range |
| optim_grads_params | gathered around each layer's use | range | range |
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from meshwright.parallel.layout import Zero
from meshwright.runtime.collectives import all_gather, all_reduce, reduce_scatter
from meshwright.runtime.context import Context
from meshwright.runtime.decoder import Chunk
from meshwright.runtime.groups import Group
from meshwright.runtime.parameters import (
    ShardedParameter,
    initial_values,
    parameters_of,
)
from meshwright.runtime.tensor_parallel import accumulate

ALIGNMENT = 64
"""Elements; every parameter starts at a multiple, which keeps grouped products' strides legal."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of gradients and optimizer state: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a parameter that this rank's optimizer owns: elements begin..end of the local
    tensor laid flat, their master weights and their gradient."""

    buffer: FlatBuffer
    parameter: ShardedParameter
    begin: int
    end: int
    master: Tensor
    grad: Tensor


class FlatBuffer:
    """Parameters laid end to end: storage, gradients, and this rank's range of them."""

    def __init__(
        self, members: list[ShardedParameter], shard: Group, replicate: Group, zero: Zero
    ) -> None:
        self.members, self.shard, self.replicate, self.zero = members, shard, replicate, zero
        self.box, self.dtype = members[0].box, members[0].dtype
        self.trainable = members[0].requires_grad
        self.starts: list[int] = []
        end = 0
        for member in members:
            self.starts.append(end)
            end += -(-member.numel() // ALIGNMENT) * ALIGNMENT
        unit = ALIGNMENT * shard.size
        self.numel = -(-end // unit) * unit
        self.range_numel = self.numel // shard.size
        self.range = slice(shard.index * self.range_numel, (shard.index + 1) * self.range_numel)
        self.grad: Tensor | None = None
        self.touched: set[int] = set()
        self.users = 0

    def materialise(
        self, device: torch.device, values: Callable[[ShardedParameter], Tensor]
    ) -> None:
        """Give the parameters storage and values, and keep this rank's master weights."""
        self.data = torch.zeros(self.numel, dtype=self.dtype, device=device)
        for index, member in enumerate(self.members):
            view = self._view(self.data, index)
            view.copy_(values(member))
            member.data = view
            if member.requires_grad:
                member.receive_gradient = partial(self.receive, index)
                member.register_post_accumulate_grad_hook(self._take_gradient)
        self._make_ranges()

    def _make_ranges(self) -> None:
        aliased = self.dtype == wide(self.dtype) and self.zero < Zero.optim_grads_params
        own = self.data[self.range]
        self.master = own if aliased else own.to(wide(self.dtype), copy=True)
        self.aliased = aliased
        if self.trainable:
            self.grad_range = torch.zeros_like(self.master)
            if self.zero < Zero.optim_grads:
                self.grad = torch.zeros(self.numel, dtype=self.master.dtype, device=own.device)
            if self.shard.size == 1 and self.grad is not None:
                self.grad_range = self.grad
        if self.zero == Zero.optim_grads_params:
            self._free()

    @torch.no_grad()
    def fill(self, values: Callable[[ShardedParameter], Tensor]) -> None:
        """Replace the values of every member."""
        sharded = self.zero == Zero.optim_grads_params
        if sharded:
            self.data.untyped_storage().resize_(self.numel * self.data.element_size())
        for index, member in enumerate(self.members):
            self._view(self.data, index).copy_(values(member))
        if not self.aliased:
            self.master.copy_(self.data[self.range])
        if sharded:
            self._free()

    @staticmethod
    def _take_gradient(member: Tensor) -> None:
        grad, member.grad = member.grad, None
        if grad is not None:
            accumulate(member, grad)

    def receive(self, index: int, grad: Tensor) -> None:
        """Add a member's gradient."""
        if self.grad is None:
            self.grad = torch.empty(self.numel, dtype=self.master.dtype, device=self.master.device)
        view = self._view(self.grad, index)
        if index in self.touched:
            view.add_(grad)
        else:
            view.copy_(grad)
            self.touched.add(index)

    def _view(self, flat: Tensor, index: int) -> Tensor:
        member = self.members[index]
        start = self.starts[index]
        return flat[start : start + member.numel()].view(member.shape)

    def start_step(self) -> None:
        """Forget the gradients of the step before."""
        self.touched.clear()
        if self.trainable and self.zero >= Zero.optim_grads:
            self.grad_range.zero_()
            self.grad = None

    def after_backward(self) -> None:
        """Reduce what a backward pass left, where gradients are kept as ranges."""
        if self.zero >= Zero.optim_grads and self.touched and self.grad is not None:
            self._zero_untouched(self.grad)
            self.grad_range.add_(reduce_scatter(self.grad, self.shard))
            self.grad = None
            self.touched.clear()

    def _zero_untouched(self, grad: Tensor) -> None:
        """Clear what no gradient was written to, the padding included."""
        if len(self.touched) < len(self.members):
            for index in range(len(self.members)):
                if index not in self.touched:
                    self._view(grad, index).zero_()
        ends = [*self.starts[1:], self.numel]
        for index, member in enumerate(self.members):
            grad[self.starts[index] + member.numel() : ends[index]].zero_()

    def finish(self) -> None:
        """Make ``grad_range`` the gradient of the global batch over this buffer's copies."""
        if not self.trainable:
            return
        if self.zero >= Zero.optim_grads:
            self.after_backward()
        elif self.grad is not None:
            self._zero_untouched(self.grad)
            if self.shard.size > 1:
                self.grad_range.copy_(reduce_scatter(self.grad, self.shard))
        all_reduce(self.grad_range, self.replicate)

    def sum_partials(self, context: Context) -> None:
        """Add the parts that TP ranks and other holders of a tied table computed."""
        if not self.trainable:
            return
        groups = context.groups
        if self.box.partial:
            all_reduce(self.grad_range, groups.tp if self.box.partial == "tp" else groups.kv)
        if self.box.tied:
            all_reduce(self.grad_range, groups.tied)

    def publish(self) -> None:
        """Bring the updated master weights to every rank that computes with them."""
        if self.zero == Zero.optim_grads_params:
            return
        if not self.aliased:
            self.data[self.range].copy_(self.master)
        if self.shard.size > 1:
            all_gather(self.data[self.range].clone(), self.shard, out=self.data)

    def gather(self) -> None:
        """Make sharded parameters whole; calls nest."""
        self.users += 1
        if self.zero != Zero.optim_grads_params or self.users > 1:
            return
        self.data.untyped_storage().resize_(self.numel * self.data.element_size())
        all_gather(self.master.to(self.dtype), self.shard, out=self.data)

    def release(self) -> None:
        """Give back what ``gather`` took, once the last caller is done."""
        self.users -= 1
        if self.zero == Zero.optim_grads_params and self.users == 0:
            self._free()

    def _free(self) -> None:
        self.data.untyped_storage().resize_(0)

    def pieces(self) -> Iterator[Piece]:
        """Yield the parts of parameters that lie in this rank's range."""
        first = self.range.start
        for member, start in zip(self.members, self.starts, strict=True):
            begin = max(start, first)
            end = min(start + member.numel(), self.range.stop)
            if begin < end:
                here = slice(begin - first, end - first)
                yield Piece(
                    buffer=self,
                    parameter=member,
                    begin=begin - start,
                    end=end - start,
                    master=self.master[here],
                    grad=self.grad_range[here] if self.trainable else self.master[here],
                )


class _BeforeBackward(Function):
    """Runs ``action`` when backward reaches the output of a unit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, action: Callable[[], None]) -> Tensor:
        ctx.action = action
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.action()
        return grad, None


class DataParallel:
    """The flat buffers of one rank's chunks and what a step does with them."""

    def __init__(self, context: Context, chunks: list[Chunk]) -> None:
        self.context = context
        self.zero = Zero(context.layout.zero)
        self.buffers: list[FlatBuffer] = []
        self.of_chunk: list[list[FlatBuffer]] = []
        self.of_parameter: dict[int, FlatBuffer] = {}
        for chunk in chunks:
            self.of_chunk.append(self._add(chunk))
            if self.zero == Zero.optim_grads_params:
                chunk.unit = self.unit

    def _add(self, chunk: Chunk) -> list[FlatBuffer]:
        whole = self.zero < Zero.optim_grads_params
        units: Iterable[nn.Module] = [chunk] if whole else _units(chunk)
        found: list[FlatBuffer] = []
        for module in units:
            kinds: dict[tuple[object, ...], list[ShardedParameter]] = {}
            for member in parameters_of(module):
                box = member.box
                if id(member) not in self.of_parameter:
                    kind = (box.expert, box.partial, box.tied, member.requires_grad)
                    kinds.setdefault(kind, []).append(member)
            for members in kinds.values():
                buffer = self._buffer(members)
                self.of_parameter |= {id(member): buffer for member in members}
                self.buffers.append(buffer)
                found.append(buffer)
        return found

    def _buffer(self, members: list[ShardedParameter]) -> FlatBuffer:
        groups = self.context.groups
        if members[0].box.expert:
            return FlatBuffer(members, groups.expert_shard, groups.expert_replicate, self.zero)
        return FlatBuffer(members, groups.shard, groups.replicate, self.zero)

    def materialise(self, device: torch.device, seed: int, noise: float) -> None:
        """Give every parameter storage and its layout-independent initial value."""

        def values(member: ShardedParameter) -> Tensor:
            return initial_values(member.box, tuple(member.shape), seed, noise)

        for buffer in self.buffers:
            buffer.materialise(device, values)

    def unit(self, module: nn.Module, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Call ``function`` with the parameters of ``module`` gathered, now and in backward."""
        buffers = list({id(b): b for b in map(self._buffer_of, module.parameters())}.values())

        def gather() -> None:
            for buffer in buffers:
                buffer.gather()

        def release() -> None:
            for buffer in buffers:
                buffer.release()

        def release_and_reduce() -> None:
            release()
            for buffer in buffers:
                buffer.after_backward()

        def call(*args: Any) -> Tensor:
            gather()
            first = args[0]
            watched = isinstance(first, Tensor) and first.requires_grad
            if torch.is_grad_enabled() and watched:
                args = (_BeforeBackward.apply(first, release_and_reduce), *args[1:])
            out = function(*args)
            release()
            if torch.is_grad_enabled() and out.requires_grad:
                out = _BeforeBackward.apply(out, gather)
            return out

        return call

    def _buffer_of(self, member: nn.Parameter) -> FlatBuffer:
        return self.of_parameter[id(member)]

    def start_step(self) -> None:
        """Forget the gradients of the step before."""
        for buffer in self.buffers:
            buffer.start_step()

    def after_backward(self, chunk: int) -> None:
        """Tell that a backward pass through a chunk is done."""
        for buffer in self.of_chunk[chunk]:
            if buffer.users:
                # The first unit of a model has no input whose gradient would end its backward.
                buffer.users = 1
                buffer.release()
            buffer.after_backward()

    def finish(self) -> None:
        """Reduce gradients over every group that holds copies or parts."""
        for buffer in self.buffers:
            buffer.finish()
        for buffer in self.buffers:
            buffer.sum_partials(self.context)

    def grad_norm(self) -> float:
        """Return the norm of the whole gradient: every element counted once over both meshes."""
        norms = [
            torch.linalg.vector_norm(piece.grad)
            for buffer in self.buffers
            if buffer.trainable and buffer.replicate.index == 0
            for piece in buffer.pieces()
            if piece.parameter.box.counted
        ]
        total = torch.zeros((), dtype=torch.float64)
        if norms:
            total += torch.stack(norms).double().square().sum().cpu()
        return float(all_reduce(total, self.context.groups.world).sqrt())

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient."""
        for buffer in self.buffers:
            if buffer.trainable:
                buffer.grad_range.mul_(factor)

    def publish(self, *, frozen: bool = False) -> None:
        """Bring updated weights to every rank that computes with them."""
        for buffer in self.buffers:
            if buffer.trainable or frozen:
                buffer.publish()

    def pieces(self, *, frozen: bool = False) -> Iterator[Piece]:
        """Yield the parts of parameters that this rank owns, by default of trainable ones."""
        for buffer in self.buffers:
            if buffer.trainable or frozen:
                yield from buffer.pieces()


def _units(chunk: Chunk) -> Iterator[nn.Module]:
    """Yield the modules whose parameters are gathered and freed together, in order of use."""
    for name, child in chunk.named_children():
        if name in ("layers", "mtp"):
            yield from child.children()
        else:
            yield child
