"""Runs a schedule: the planner's own list of actions, with the messages that they need.

Every rank knows the whole schedule, so it knows in which order a peer sends. It posts its receives
in that order, ahead of need, and sends without waiting; two process groups, one for messages to
higher ranks and one for lower, keep a send from ever standing behind a receive.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.parallel.pipeline import Action, Schedule
from meshwright.runtime import collectives
from meshwright.runtime.context import Context, Microbatch
from meshwright.runtime.data_parallel import DataParallel
from meshwright.runtime.decoder import Chunk
from meshwright.runtime.groups import Group, Groups

LOOKAHEAD = 2
"""Receives posted beyond the one that is needed, per peer."""


class Message(NamedTuple):
    """What travels: hidden states to a stage (``F``) or their gradient (``B``)."""

    kind: Literal["F", "B"]
    stage: int
    microbatch: int


def message_of(schedule: Schedule, rank: int, action: Action) -> tuple[Message, int] | None:
    """Return what an action sends and to which pipeline rank, if anything."""
    stage, owners = schedule.stage(rank, action.chunk), schedule.rank_of_stage
    if action.kind == "F" and stage + 1 < len(owners):
        return Message("F", stage + 1, action.microbatch), owners[stage + 1]
    if action.kind in "BI" and stage > 0:
        return Message("B", stage - 1, action.microbatch), owners[stage - 1]
    return None


def forward_only(schedule: Schedule) -> Schedule:
    """Return the schedule without its backward actions."""
    kept = tuple(tuple(a for a in actions if a.kind == "F") for actions in schedule.ranks)
    return replace(schedule, ranks=kept)


class Mailbox:
    """Messages between pipeline ranks, received in the order in which each peer sends them."""

    def __init__(
        self,
        schedule: Schedule,
        groups: Groups,
        empty: Callable[[], Tensor],
        *,
        overlap: bool,
        streams: Sequence[int] = (),
    ) -> None:
        self.streams = streams or (1,) * (len(schedule.rank_of_stage) + 1)
        pp, self.up, self.down = groups.pp, groups.up, groups.down
        self.pp, self.empty, self.overlap = pp, empty, overlap
        self.expected: dict[int, deque[Message]] = {}
        self.sender: dict[Message, int] = {}
        for peer, actions in enumerate(schedule.ranks):
            for action in actions:
                sent = message_of(schedule, peer, action)
                if sent is not None and sent[1] == pp.index and peer != pp.index:
                    self.expected.setdefault(peer, deque()).append(sent[0])
                    self.sender[sent[0]] = peer
        self.posted: dict[Message, tuple[Tensor, Any]] = {}
        self.local: dict[Message, Tensor] = {}
        self.sends: deque[tuple[Tensor, Any]] = deque()

    def send(self, message: Message, to: int, x: Tensor) -> None:
        """Send without waiting; a message to this rank itself is kept."""
        if to == self.pp.index:
            self.local[message] = x
            return
        x = x.contiguous()
        group = self.up if to > self.pp.index else self.down
        self.sends.append((x, dist.isend(x, self.pp.ranks[to], group=group.handle)))
        while self.sends and self.sends[0][1].is_completed():
            self.sends.popleft()[1].wait()

    def receive(self, message: Message) -> Tensor:
        """Return a message, waiting for it if need be."""
        if message in self.local:
            return self.local.pop(message)
        while message not in self.posted:
            self._post(self.sender[message])
        tensor, work = self.posted.pop(message)
        work.wait()
        return tensor

    def look_ahead(self) -> None:
        """Post a few receives of every peer, so that messages travel while this rank computes."""
        if not self.overlap:
            return
        for peer, queue in self.expected.items():
            waiting = sum(self.sender[message] == peer for message in self.posted)
            for _ in range(min(LOOKAHEAD - waiting, len(queue))):
                self._post(peer)

    def _post(self, peer: int) -> None:
        message = self.expected[peer].popleft()
        group = self.down if peer > self.pp.index else self.up
        buffer = self.empty()
        streams = self.streams[message.stage + (message.kind == "B")]
        if streams > 1:
            buffer = buffer.new_empty((streams * len(buffer), *buffer.shape[1:]))
        work = dist.irecv(buffer, self.pp.ranks[peer], group=group.handle)
        self.posted[message] = (buffer, work)

    def close(self) -> None:
        """Wait until everything sent has left."""
        while self.sends:
            self.sends.popleft()[1].wait()


class Pipeline:
    """One rank's part of a step: its chunks, driven by its actions.

    ``streams`` says how many hidden states enter each stage side by side: one, or one more per
    prediction depth behind the stage that computes these.
    """

    def __init__(
        self,
        context: Context,
        chunks: list[Chunk],
        schedule: Schedule,
        dp: DataParallel,
        streams: Sequence[int] = (),
    ) -> None:
        self.streams = streams
        self.context, self.chunks, self.schedule, self.dp = context, chunks, schedule, dp
        self.rank = context.groups.pp.index
        self.expert_counts: dict[str, Tensor] = {}
        self.last_stage = len(schedule.rank_of_stage) - 1
        self.last_backward = {
            action.chunk: action.microbatch
            for action in schedule.ranks[self.rank]
            if action.kind in "BW"
        }

    def run(
        self, batches: list[Microbatch], empty: Callable[[], Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run forward and backward of every microbatch; gradients collect in ``dp``.

        Returns the losses of the last stage per microbatch (empty elsewhere), stacked
        ``[1 + depths]``, and the auxiliary losses of this rank's routers, whose choices are then in
        ``expert_counts``.
        """
        self.expert_counts.clear()
        step = _Step(self, batches, empty)
        for action in self.schedule.ranks[self.rank]:
            step.perform(action)
        step.mail.close()
        return step.losses, step.aux_losses

    def logits(self, batch: Microbatch, empty: Callable[[], Tensor]) -> Tensor | None:
        """Run one forward pass through every stage; return the logits where the loss sits."""
        owners = self.schedule.rank_of_stage
        pp = self.context.groups.pp
        by_stage = {chunk.plan.stage: chunk for chunk in self.chunks}
        x: Tensor | None = None
        for stage, owner in enumerate(owners):
            if owner == self.rank:
                chunk = by_stage[stage]
                x = chunk.hidden(x, batch)
                if chunk.plan.loss:
                    return chunk.hidden_to_logits(x)
            following = owners[stage + 1] if stage < self.last_stage else owner
            if following != owner and self.rank in (owner, following):
                x = self._hand_over(pp, owner, following, x, empty)
        return None

    def _hand_over(
        self, pp: Group, sender: int, receiver: int, x: Tensor | None, empty: Callable[[], Tensor]
    ) -> Tensor | None:
        group = self.context.groups.up if receiver > sender else self.context.groups.down
        if self.rank == sender:
            assert x is not None
            collectives.send(x, pp.ranks[receiver], group)
            return None
        return collectives.receive(empty(), pp.ranks[sender], group)


class _Step:
    def __init__(
        self, pipeline: Pipeline, batches: list[Microbatch], empty: Callable[[], Tensor]
    ) -> None:
        self.pipeline, self.batches = pipeline, batches
        context = pipeline.context
        overlap = context.execution.overlap_pp_comm
        self.mail = Mailbox(
            pipeline.schedule, context.groups, empty, overlap=overlap, streams=pipeline.streams
        )
        self.held: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.weight_work: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self.losses: list[Tensor] = []
        self.aux_losses: list[Tensor] = []

    def perform(self, action: Action) -> None:
        self.mail.look_ahead()
        match action.kind:
            case "F":
                self._forward(action)
            case "B" | "I":
                self._backward(action)
            case "W":
                with torch.no_grad():
                    for work in self.weight_work.pop((action.chunk, action.microbatch)):
                        work()
                self.pipeline.dp.after_backward(action.chunk, last=self._is_last(action))

    def _forward(self, action: Action) -> None:
        pipeline = self.pipeline
        chunk = pipeline.chunks[action.chunk]
        stage = chunk.plan.stage
        x = None
        if stage > 0:
            x = self.mail.receive(Message("F", stage, action.microbatch))
            x = x.detach().requires_grad_()
        aux, counts = pipeline.context.aux_losses, pipeline.context.expert_counts
        aux.clear()
        counts.clear()
        out = chunk(x, self.batches[action.microbatch])
        # Recomputing in backward collects again, which nobody reads.
        self.aux_losses += aux
        for name, found in counts.items():
            total = pipeline.expert_counts.get(name)
            pipeline.expert_counts[name] = found if total is None else total + found
        if torch.is_grad_enabled():
            self.held[action.chunk, action.microbatch] = (x, out)
        if chunk.plan.loss:
            self.losses.append(torch.stack(chunk.losses))
        self._send(action, out.detach())

    def _backward(self, action: Action) -> None:
        pipeline = self.pipeline
        place = (action.chunk, action.microbatch)
        x, out = self.held.pop(place)
        stage = pipeline.chunks[action.chunk].plan.stage
        grad = None
        if stage < pipeline.last_stage:
            grad = self.mail.receive(Message("B", stage, action.microbatch))
        later = pipeline.context.later
        if action.kind == "I":
            assert later is not None
            later.deferring = True
        elif later is None:
            pipeline.dp.before_backward(action.chunk, last=self._is_last(action))
        if out.requires_grad:
            torch.autograd.backward(out, grad)
        if action.kind == "I" and later is not None:
            later.deferring = False
            self.weight_work[place] = later.take()
        else:
            pipeline.dp.after_backward(action.chunk, last=self._is_last(action))
        if x is not None:
            self._send(action, x.grad if x.grad is not None else torch.zeros_like(x))

    def _is_last(self, action: Action) -> bool:
        return self.pipeline.last_backward[action.chunk] == action.microbatch

    def _send(self, action: Action, x: Tensor) -> None:
        sent = message_of(self.pipeline.schedule, self.pipeline.rank, action)
        if sent is not None:
            self.mail.send(*sent, x)
