"""AdamW on the ranges that this rank owns, with clipping by the norm of the whole gradient."""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from meshwright.runtime.data_parallel import DataParallel
from meshwright.runtime.flat_buffer import Piece

# The fused kernel itself: torch.optim.AdamW calls it too, but imports the compiler first (1.3 s).
_fused_adamw = cast("Callable[..., None]", torch.ops.aten._fused_adamw_.default)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW (arXiv:1711.05101). Norms and biases do not decay; ``clip_norm`` 0: no clipping."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The first and second moment of a piece."""

    piece: Piece
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Optimizer:
    """AdamW over the pieces of every parameter that this rank owns; ``steps`` counts updates."""

    def __init__(self, dp: DataParallel, settings: OptimizerSettings) -> None:
        self.dp, self.settings, self.steps = dp, settings, 0
        self.moments = [
            Moments(
                piece=piece,
                exp_avg=torch.zeros_like(piece.master),
                exp_avg_sq=torch.zeros_like(piece.master),
            )
            for piece in dp.pieces()
        ]

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip, update, publish. Returns the gradient norm and whether the update was made.

        A norm that is not finite skips the update on every rank alike.
        """
        norm = self.dp.grad_norm()
        if not math.isfinite(norm):
            return norm, False
        clip = self.settings.clip_norm
        if clip and norm > clip:
            self.dp.scale_gradients(clip / (norm + 1e-6))
        self.steps += 1
        for decayed in (True, False):
            self._update(decayed, lr)
        self.dp.publish()
        return norm, True

    @torch.no_grad()
    def _update(self, decayed: bool, lr: float) -> None:
        chosen = [m for m in self.moments if m.piece.parameter.box.decay == decayed]
        if not chosen:
            return
        steps = torch.tensor(float(self.steps), device=chosen[0].exp_avg.device)
        _fused_adamw(
            [m.piece.master for m in chosen],
            [m.piece.grad for m in chosen],
            [m.exp_avg for m in chosen],
            [m.exp_avg_sq for m in chosen],
            [],
            [steps] * len(chosen),
            lr=lr,
            beta1=self.settings.betas[0],
            beta2=self.settings.betas[1],
            weight_decay=self.settings.weight_decay if decayed else 0.0,
            eps=self.settings.eps,
            amsgrad=False,
            maximize=False,
        )
