"""When a rank holds most: the end of forward, the first backward, or the update.

Columns [u] are the slices of a group of rows; one candidate is one combination of micro-batches
that a rank could hold at its peak (``cost.stages``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.columns import Floats
from meshwright.cost.stages import PipelineKey, Stages

Phase = Literal["forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class HeldBytes:
    """Bytes of one micro-batch of each kind of block, [u, K] as in ``cost.memory.BlockBytes``.

    ``loss_forward`` [u] is what the loss holds beside what it keeps, ``message`` [u] one message
    between pipeline neighbours; ``is_full`` [u] says where layers are run again whole.
    """

    kept: Floats
    whole: Floats
    logits: Floats
    loss_forward: Floats
    working: Floats
    back: Floats
    message: Floats
    is_full: NDArray[np.bool_]


@dataclass(frozen=True)
class Running:
    """Bytes [u] of a candidate while it runs: kept by layers, kept by the loss, and beside them."""

    activations: Floats
    logits: Floats
    buffers: Floats


def running_bytes(
    b: HeldBytes, s: Stages, key: PipelineKey, phase: Phase | None, *, head: int, splits: bool
) -> Iterator[Running]:
    """Yield for each candidate what it holds of micro-batches at its peak, or at that of a phase.

    Forward ends with everything kept and the loss at work. Backward starts at the head (column
    ``head``), whose logits are gone when the layers run; the peak of the layers is the largest of
    what one needs to run backward, and again where it is run again. ``splits``: weight gradients
    come after all input gradients of a stage, whose layers are then all whole. Ref: Megatron-LM,
    ``pipeline_parallel.schedules``. Left out: what forward holds beside the kept tensors of layers.
    """
    # Each chunk keeps the gradient of its input until the next one, and one message is on its way.
    messages = (key.vpp + 1.0) * b.message * float(key.pp > 1)
    is_full = b.is_full[:, None]
    at_head = {
        "forward": b.loss_forward,
        "backward": b.working[:, head],
        "optimizer": b.loss_forward,
        None: np.maximum(b.loss_forward, b.working[:, head]),
    }[phase]
    for q, rank in enumerate(s.candidate_rank):
        activations = np.einsum("nk,k->n", b.kept, s.held[q])
        activations += np.einsum("nk,k->n", b.whole, s.held_whole[q])
        losses = np.einsum("nk,k->n", b.logits, s.held[q] + s.held_whole[q])
        # The input of a layer that is run again is kept already.
        inputs = s.alive[q] if splits else s.alive[q] > 0
        again = np.where(is_full, np.maximum(b.whole * s.alive[q] - b.kept * inputs, 0.0), 0.0)
        heads, layers_present = s.own[rank, head], s.present[q].copy()
        layers_present[head] = 0.0
        needs = b.working * layers_present
        together = np.einsum("nk->n", again) + _largest(needs)
        layers = together if splits else _largest(again + needs)
        gone, gone_logits = heads * b.kept[:, head], heads * b.logits[:, head]
        first = (at_head + _largest(b.back * layers_present)) * float(heads > 0)
        deeper = (layers - gone > first) & (phase != "forward")
        yield Running(
            activations=activations - losses + np.where(deeper, gone_logits - gone, 0.0),
            logits=losses - np.where(deeper, gone_logits, 0.0),
            buffers=np.where(deeper, layers, first) + messages,
        )


def update_instead(held: dict[str, Floats], copies: Floats, *, always: bool) -> None:
    """Put the update of the optimizer in place of forward and backward where it holds more.

    ``copies`` [n] are the bytes that the update makes copies of gradients in.
    """
    terms = ("activations_bytes", "logits_bytes", "buffers_bytes")
    instead = np.full(len(copies), True) if always else copies > sum(held[term] for term in terms)
    for term in terms:
        held[term] = np.where(instead, copies if term == "buffers_bytes" else 0.0, held[term])


def _largest(per_kind: Floats) -> Floats:
    """Return the largest of the few columns of [u, K]: faster than a maximum along rows."""
    return reduce(np.maximum, per_kind.T)
