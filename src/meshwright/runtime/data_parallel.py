"""Data parallelism, the same way for every layout: the flat buffers of a rank and their traffic.

The gradient of the global batch is a sum over microbatches and ranks (the loss is divided by the
tokens of the global batch), so experts and dense parameters need no scaling factors.

With ``overlap_grad_reduce`` a buffer's gradient begins to be reduced when the last of its members
has received its own, while backward goes on; with ``overlap_param_gather`` updated weights arrive
during the next forward pass, and sharded ones are gathered a layer ahead of their use. Buffers
hold about ``bucket_bytes`` then. Every rank begins the same messages in the same order.
Ref: Li et al., arXiv:2006.15704 (buckets); Zhao et al., arXiv:2304.11277 (prefetch).
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from meshwright.parallel.layout import Zero
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.context import Context
from meshwright.runtime.decoder import Chunk
from meshwright.runtime.flat_buffer import FlatBuffer, Piece
from meshwright.runtime.parameters import ShardedParameter, initial_values, parameters_of


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


class _Unit:
    """Buffers that are used together, with their neighbours in the order of use."""

    def __init__(self, buffers: list[FlatBuffer]) -> None:
        self.buffers = buffers
        self.before: list[FlatBuffer] = []
        self.after: list[FlatBuffer] = []

    def gather(self, ahead: list[FlatBuffer]) -> None:
        """Make the buffers whole; if nobody had, begin with those of the next unit too."""
        first = any(buffer.users == 0 for buffer in self.buffers)
        for buffer in self.buffers:
            buffer.gather()
        if first:
            for buffer in ahead:
                buffer.prefetch()

    def release(self) -> None:
        """Give back what ``gather`` took."""
        for buffer in self.buffers:
            buffer.release()

    def arrive(self) -> None:
        """Wait for updated weights."""
        for buffer in self.buffers:
            buffer.arrive()


class DataParallel:
    """The flat buffers of one rank's chunks and what a step does with them."""

    def __init__(self, context: Context, chunks: list[Chunk]) -> None:
        self.context = context
        self.zero = Zero(context.layout.zero)
        self.buffers: list[FlatBuffer] = []
        self.of_chunk: list[list[FlatBuffer]] = []
        self.of_parameter: dict[int, FlatBuffer] = {}
        self.shared: set[FlatBuffer] = set()
        self.units: dict[int, _Unit] = {}
        self.to_reduce: deque[FlatBuffer] = deque()
        self.in_flight: list[FlatBuffer] = []
        for chunk in chunks:
            self.of_chunk.append(self._add(chunk))
            self._connect(chunk)

    def _add(self, chunk: Chunk) -> list[FlatBuffer]:
        execution = self.context.execution
        kinds: dict[tuple[object, ...], list[ShardedParameter]] = {}
        found: list[FlatBuffer] = []

        def close(kind: tuple[object, ...]) -> None:
            members = kinds.pop(kind)
            buffer = self._buffer(members)
            self.of_parameter |= {id(member): buffer for member in members}
            found.append(buffer)

        sharded = self.zero == Zero.optim_grads_params
        buckets = execution.overlap_grad_reduce or execution.overlap_param_gather
        for module in _units(chunk):
            for member in parameters_of(module):
                if id(member) in self.of_parameter:
                    self.shared.add(self.of_parameter[id(member)])
                    continue
                box = member.box
                kind = (box.expert, box.partial, box.tied, member.dtype, member.requires_grad)
                kinds.setdefault(kind, []).append(member)
            for kind in [k for k in kinds if sharded or (buckets and self._is_full(kinds[k]))]:
                close(kind)
        for kind in list(kinds):
            close(kind)
        self.buffers += found
        return found

    def _is_full(self, members: list[ShardedParameter]) -> bool:
        size_bytes = sum(member.numel() * member.element_size() for member in members)
        return size_bytes >= self.context.bucket_bytes

    def _buffer(self, members: list[ShardedParameter]) -> FlatBuffer:
        groups = self.context.groups
        if members[0].box.expert:
            return FlatBuffer(members, groups.expert_shard, groups.expert_replicate, self.zero)
        return FlatBuffer(members, groups.shard, groups.replicate, self.zero)

    def _connect(self, chunk: Chunk) -> None:
        """Let the chunk call its layers when their weights are there."""
        if self.zero == Zero.optim_grads_params:
            chunk.unit = self.sharded_unit
        elif self.zero != Zero.no_shard and self.context.execution.overlap_param_gather:
            chunk.unit = self.arriving_unit
        before: _Unit | None = None
        for module in _units(chunk):
            if id(module) in self.units:
                continue
            unit = self._unit(module)
            if before is not None and self.context.execution.overlap_param_gather:
                before.after, unit.before = unit.buffers, before.buffers
            before = unit

    def _unit(self, module: nn.Module) -> _Unit:
        key = id(module)
        if key not in self.units:
            buffers = {id(b): b for b in map(self._buffer_of, module.parameters())}
            self.units[key] = _Unit(list(buffers.values()))
        return self.units[key]

    def _buffer_of(self, member: nn.Parameter) -> FlatBuffer:
        return self.of_parameter[id(member)]

    def materialise(self, device: torch.device, seed: int, noise: float) -> None:
        """Give every parameter storage and its layout-independent initial value."""

        def values(member: ShardedParameter) -> Tensor:
            return initial_values(member.box, tuple(member.shape), seed, noise)

        for buffer in self.buffers:
            buffer.materialise(device, values)

    def arriving_unit(
        self, module: nn.Module, function: Callable[..., Tensor]
    ) -> Callable[..., Tensor]:
        """Call ``function`` when the updated parameters of ``module`` have come."""
        unit = self._unit(module)

        def call(*args: Any) -> Tensor:
            unit.arrive()
            return function(*args)

        return call

    def sharded_unit(
        self, module: nn.Module, function: Callable[..., Tensor]
    ) -> Callable[..., Tensor]:
        """Call ``function`` with the parameters of ``module`` gathered, now and in backward."""
        unit = self._unit(module)
        # A table called for one of its two uses does not tell which layer comes next.
        after = unit.after if function is module else []

        def gather_again() -> None:
            unit.gather(unit.before)

        def release_and_reduce() -> None:
            unit.release()
            self._reduce(unit.buffers)

        def call(*args: Any) -> Tensor:
            unit.gather(after)
            first = args[0]
            watched = isinstance(first, Tensor) and first.requires_grad
            if torch.is_grad_enabled() and watched:
                args = (_BeforeBackward.apply(first, release_and_reduce), *args[1:])
            out = function(*args)
            unit.release()
            if torch.is_grad_enabled() and out.requires_grad:
                out = _BeforeBackward.apply(out, gather_again)
            return out

        return call

    def _reduce(self, buffers: Iterable[FlatBuffer]) -> None:
        """Begin to reduce; where whole gradients are freed by it, the ones before first."""
        frees = self.zero >= Zero.optim_grads
        for buffer in buffers:
            if buffer.trainable and (buffer.touched or not frees):
                if frees:
                    self._collect()
                buffer.start_reduce()
                self.in_flight.append(buffer)
        if not self.context.execution.overlap_grad_reduce:
            self._collect()

    def _collect(self) -> None:
        for buffer in self.in_flight:
            buffer.collect()
        self.in_flight.clear()

    def start_step(self) -> None:
        """Forget the gradients of the step before."""
        for buffer in self.buffers:
            buffer.start_step()

    def before_backward(self, chunk: int, *, last: bool) -> None:
        """Prepare for a backward pass through a chunk, its ``last`` of the step or not."""
        reduces = last if self.zero < Zero.optim_grads else self.zero == Zero.optim_grads
        if not (reduces and self.context.execution.overlap_grad_reduce):
            return
        own = [b for b in self.of_chunk[chunk] if b.trainable and b not in self.shared]
        self.to_reduce = deque(reversed(own))
        for buffer in own:
            buffer.await_all(self._reduce_complete)

    def _reduce_complete(self) -> None:
        """Reduce complete buffers in the order that every rank keeps."""
        while self.to_reduce and not self.to_reduce[0].awaited:
            self._reduce([self.to_reduce.popleft()])

    def after_backward(self, chunk: int, *, last: bool) -> None:
        """Tell that a backward pass through a chunk is done, its weight gradients included."""
        buffers = self.of_chunk[chunk][::-1]
        for buffer in buffers:
            if buffer.users:
                # The first unit of a model has no input whose gradient would end its backward.
                buffer.users = 1
                buffer.release()
        if self.zero >= Zero.optim_grads:
            self.to_reduce.clear()
            self._reduce(buffers)
        elif last and self.context.execution.overlap_grad_reduce:
            self.to_reduce.clear()
            self._reduce([b for b in buffers if not b.reduced and b not in self.shared])

    def finish(self) -> None:
        """Reduce gradients over every group that holds copies or parts."""
        self._collect()
        for buffer in self.buffers:
            buffer.finish()
        for buffer in self.buffers:
            buffer.sum_partials(self.context.groups)

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
        if not self.context.execution.overlap_param_gather:
            for buffer in self.buffers:
                buffer.arrive()

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
