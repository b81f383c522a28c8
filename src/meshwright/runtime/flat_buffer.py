"""Parameters that are reduced together, laid end to end: what ZeRO (arXiv:1910.02054) divides.

A flat buffer is padded so that it divides over the ``shard`` group; rank r of it owns the r-th
range of weights, gradients and optimizer state. Reductions and gathers are begun and collected
separately, so that compute can run between the two.

| zero | parameters | gradients | optimizer state |
|---|---|---|---|
| no_shard | whole | whole, all-reduced | whole |
| optim | whole | whole, reduce-scattered in the last backward pass | range |
| optim_grads | whole | range: reduce-scattered in every backward pass | range |
| optim_grads_params | gathered around each layer's use | range | range |
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from meshwright.parallel.layout import Zero
from meshwright.runtime.collectives import (
    Pending,
    all_reduce,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from meshwright.runtime.groups import Group, Groups
from meshwright.runtime.parameters import ShardedParameter
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
        self.awaited: set[int] = set()
        self.when_complete: Callable[[], None] | None = None
        self.reducing: Pending | None = None
        self.reduced = False
        self.gathering: Pending | None = None
        self.users = 0
        self.whole = False

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
                if not member.box.reused:
                    # Autograd adds up the gradients of several uses; then they come at once.
                    member.receive_product = partial(self.receive_product, index)
                member.register_post_accumulate_grad_hook(self._take_gradient)
        self._make_ranges()

    def _make_ranges(self) -> None:
        aliased = self.dtype == wide(self.dtype) and self.zero < Zero.optim_grads_params
        own = self.data[self.range]
        self.master = own if aliased else own.to(wide(self.dtype), copy=True)
        self.aliased = aliased
        if self.trainable:
            if self.zero < Zero.optim_grads:
                # The reduced range lies in the whole gradient, which is read no more by then.
                self.grad = torch.zeros(self.numel, dtype=self.master.dtype, device=own.device)
                self.grad_range = self.grad[self.range]
            else:
                self.grad_range = torch.zeros_like(self.master)
        if self.zero == Zero.optim_grads_params:
            self._free()

    @torch.no_grad()
    def fill(self, values: Callable[[ShardedParameter], Tensor]) -> None:
        """Replace the values of every member."""
        self.drop()
        sharded = self.zero == Zero.optim_grads_params
        if sharded:
            self._allocate()
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
        """Add a member's gradient; the last one awaited makes the buffer complete."""
        view = self._view(self._whole_gradient(), index)
        if index in self.touched:
            view.add_(grad)
        else:
            view.copy_(grad)
        self._note(index)

    def receive_product(self, index: int, left: Tensor, right: Tensor) -> None:
        """Add the gradient ``left.T @ right`` of a matrix, computed in its place."""
        whole = self._whole_gradient()
        if left.dtype != whole.dtype:
            self.receive(index, left.T @ right)
            return
        view = self._view(whole, index)
        if index in self.touched:
            view.addmm_(left.T, right)
        else:
            torch.mm(left.T, right, out=view)
        self._note(index)

    def _whole_gradient(self) -> Tensor:
        if self.grad is None:
            self.grad = torch.empty(self.numel, dtype=self.master.dtype, device=self.master.device)
        return self.grad

    def _note(self, index: int) -> None:
        self.touched.add(index)
        if self.when_complete is not None:
            self.awaited.discard(index)
            if not self.awaited:
                self.when_complete()

    def await_all(self, when_complete: Callable[[], None]) -> None:
        """Call ``when_complete`` once every member's gradient has come."""
        self.awaited, self.when_complete = set(range(len(self.members))), when_complete

    def _view(self, flat: Tensor, index: int) -> Tensor:
        member = self.members[index]
        start = self.starts[index]
        return flat[start : start + member.numel()].view(member.shape)

    def start_step(self) -> None:
        """Forget the gradients of the step before."""
        self.touched.clear()
        self.reduced = False
        if self.trainable and self.zero >= Zero.optim_grads:
            self.grad_range.zero_()
            self.grad = None

    def start_reduce(self) -> None:
        """Begin to reduce the gradients that came; no more may come where they stay whole."""
        self.when_complete = None
        self.collect()
        if self.zero < Zero.optim_grads:
            self.reduced = True
        elif not self.touched:
            return
        if self.grad is None:
            return
        self._zero_untouched(self.grad)
        if self.shard.size == 1 and self.zero < Zero.optim_grads:
            self.reducing = start_all_reduce(self.grad, self.replicate)
            return
        self.reducing = start_reduce_scatter(self.grad, self.shard)
        if self.zero >= Zero.optim_grads:
            self.grad = None
            self.touched.clear()

    def collect(self) -> None:
        """Take what ``start_reduce`` began."""
        if self.reducing is None:
            return
        found, self.reducing = self.reducing.wait(), None
        if self.zero >= Zero.optim_grads:
            self.grad_range.add_(found)
        elif self.shard.size > 1:
            self.grad_range.copy_(found)

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
        self.drop()
        if not self.trainable:
            return
        if not self.reduced:
            self.start_reduce()
        self.collect()
        if self.shard.size > 1 or self.zero >= Zero.optim_grads:
            all_reduce(self.grad_range, self.replicate)

    def sum_partials(self, groups: Groups) -> None:
        """Add the parts that TP ranks and other holders of a tied table computed."""
        if not self.trainable:
            return
        if self.box.partial:
            all_reduce(self.grad_range, groups.tp if self.box.partial == "tp" else groups.kv)
        if self.box.tied:
            all_reduce(self.grad_range, groups.tied)

    def publish(self) -> None:
        """Begin to bring updated weights to every rank; ``arrive`` before they are used."""
        self.drop()
        if self.zero == Zero.optim_grads_params:
            return
        if not self.aliased:
            self.data[self.range].copy_(self.master)
        if self.shard.size > 1:
            self.gathering = start_all_gather(self.data[self.range], self.shard, out=self.data)

    def arrive(self) -> None:
        """Wait for weights that are on their way."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None

    def prefetch(self) -> None:
        """Begin to make sharded parameters whole, ahead of ``gather``."""
        if self.zero == Zero.optim_grads_params and not self.whole:
            self._allocate()
            self.whole = True
            self.gathering = start_all_gather(self.master.to(self.dtype), self.shard, out=self.data)

    def gather(self) -> None:
        """Make sharded parameters whole; calls nest."""
        self.users += 1
        self.prefetch()
        self.arrive()

    def release(self) -> None:
        """Give back what ``gather`` took, once the last caller is done."""
        self.users -= 1
        if self.users == 0:
            self.drop()

    def drop(self) -> None:
        """Wait for weights on their way; free sharded ones that nobody uses."""
        self.arrive()
        if self.whole and self.users == 0:
            self._free()
            self.whole = False

    def _allocate(self) -> None:
        self.data.untyped_storage().resize_(self.numel * self.data.element_size())

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
