"""What a training run is told, and what it tells in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from meshwright.parallel.layout import Layout
from meshwright.runtime.optimizer import OptimizerSettings
from meshwright.runtime.shape import ModelShape

DECAYS = ("constant", "linear", "cosine", "wsd")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to train and how. ``seq_len`` in tokens, ``gbs`` in sequences, folders as paths.

    ``data`` is ``mock`` or the path prefix of a Megatron-LM ``.bin/.idx`` corpus. ``save_every`` 0
    saves at the end alone. A run resumes from the newest whole checkpoint of ``checkpoints``.
    ``weights`` is a Hugging Face folder to start from, ``save_weights`` one to write at the end,
    with ``config``. ``model_flops_per_step`` and
    ``peak_flops_per_s`` (of one GPU) are what model FLOP/s and MFU are computed from.
    """

    shape: ModelShape
    layout: Layout[int]
    seq_len: int
    gbs: int
    steps: int
    dtype: str = "fp32"
    seed: int = 1234
    data: str = "mock"
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    decay: str = "cosine"
    warmup_steps: int = 0
    min_lr: float = 0.0
    checkpoints: str | None = None
    save_every: int = 0
    keep: int = 0
    weights: str | None = None
    save_weights: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    log_every: int = 1
    metrics: str | None = None
    profile: str | None = None
    profile_ranks: tuple[int, ...] = (0,)
    profile_steps: tuple[int, int] = (3, 5)
    model_flops_per_step: float = 0.0
    peak_flops_per_s: float = 0.0
    timeout_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """How a run ended: ``step`` is the last one made, ``stopped`` whether a signal ended it."""

    rank: int
    step: int
    losses: list[float]
    stopped: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {"step": self.step, "losses": self.losses, "stopped": self.stopped}
