"""What the layers of one rank share: layout, groups, dtype, and what a microbatch brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor

from meshwright.describe.job import Execution
from meshwright.parallel.layout import CpComm, Layout, Recompute
from meshwright.runtime.context_parallel import ContextAttention
from meshwright.runtime.groups import Groups
from meshwright.runtime.shape import ModelShape
from meshwright.runtime.tensor_parallel import Region, WeightGradients

BUCKET_BYTES = 25 * 2**20
"""As of PyTorch's data parallelism (Li et al., arXiv:2006.15704)."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """The setting that every layer of a rank is built in.

    Of ``execution`` the runtime reads the switches of overlap; ``bucket_bytes`` is the least size
    of weights whose gradients are reduced together. ``later`` is there when the schedule splits the
    backward pass. During a forward pass ``aux_losses`` collects what routers add to the objective
    and ``expert_counts`` how many tokens chose each expert, per router. ``token_groups`` is the
    capacity group of each position that this rank routes.
    """

    shape: ModelShape
    layout: Layout[int]
    groups: Groups
    dtype: torch.dtype
    execution: Execution = field(default_factory=Execution)
    bucket_bytes: int = BUCKET_BYTES
    later: WeightGradients | None = None
    token_groups: Tensor | None = None
    aux_losses: list[Tensor] = field(default_factory=list[Tensor])
    expert_counts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def sp(self) -> bool:
        """Whether tokens are divided by TP between tensor-parallel regions."""
        return bool(self.layout.sp) and self.layout.tp > 1

    @cached_property
    def region(self) -> Region:
        """How tensor-parallel regions are entered."""
        return Region(
            group=self.groups.tp,
            sp=self.sp,
            overlap=self.execution.overlap_tp_comm,
            later=self.later,
        )

    @cached_property
    def attention(self) -> ContextAttention:
        """Attention over the sequence as context parallelism spreads it."""
        return ContextAttention(
            comm=CpComm(self.layout.cp_comm),
            inner=self.groups.cp_inner,
            outer=self.groups.cp_outer,
            overlap=self.execution.overlap_cp_comm,
        )

    def recomputed(self, module: Recompute, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function``; drop and recompute what it keeps if ``module`` is to be recomputed."""
        if self.layout.recompute & module and torch.is_grad_enabled():
            return recompute(function, *args)
        return function(*args)


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` keeping its arguments alone; backward calls it again."""
    kept = cast("Callable[..., Any]", torch.utils.checkpoint.checkpoint)
    return kept(function, *args, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One microbatch as one rank sees it; tensors ``[s, b]`` with this rank's positions.

    ``mask`` is 1 where a token's loss counts. ``rope`` holds cos and sin ``[s, dim]``,
    ``window_rope`` those of layers with a window. ``mtp`` has, per prediction depth, the shifted
    tokens, labels and mask. ``loss_scale`` is one over the counted tokens of the global batch,
    ``mtp_scales`` the same per depth, ``aux_scale`` one over its microbatches: gradients are then
    sums over microbatches and ranks.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    rope: tuple[Tensor, Tensor]
    window_rope: tuple[Tensor, Tensor]
    mtp: tuple[tuple[Tensor, Tensor, Tensor], ...]
    loss_scale: float
    mtp_scales: tuple[float, ...]
    aux_scale: float
