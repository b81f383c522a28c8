"""What a training run is told, and what it tells in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from meshwright.describe.job import Execution
from meshwright.parallel.layout import Layout
from meshwright.runtime.optimizer import OptimizerSettings
from meshwright.runtime.shape import ModelShape

DECAYS = ("constant", "linear", "cosine", "wsd")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where sequences come from: sources, each a text as ``data_sources`` reads it.

    ``valid`` are sources to validate on; without them the last ``valid_fraction`` of the documents
    of every training source is held back. ``tokenizer`` (a ``tokenizer.json``, its folder or a hub
    name) and ``column`` turn datasets of text into tokens, which are kept in the folder ``cache``.
    """

    sources: tuple[str, ...] = ("mock",)
    valid: tuple[str, ...] = ()
    valid_fraction: float = 0.0
    tokenizer: str | None = None
    column: str = "text"
    cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """Chrome traces of some steps (the first and the last, from 1) of some ranks, to a folder."""

    folder: str
    ranks: tuple[int, ...] = (0,)
    steps: tuple[int, int] = (3, 5)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to train and how. ``seq_len`` in tokens, ``gbs`` in sequences, folders as paths.

    ``execution`` has the planner's switches of communication beside compute, ``compile`` the
    backend of ``torch.compile`` for layers (``""``: none).
    ``valid_every`` steps the loss of ``valid_batches`` global batches of held-out data is computed
    (0: never). ``save_every`` 0 saves at the end alone. A run resumes from the newest whole
    checkpoint of ``checkpoints``. ``weights`` is a Hugging Face folder to start from,
    ``save_weights`` one to write at the end, with ``config``. ``model_flops_per_step`` and
    ``peak_flops_per_s`` (of one GPU; 0: that of the device found here, if it is known) are what
    model FLOP/s and MFU are computed from. ``assumed`` is what the model's description left open.
    """

    shape: ModelShape
    layout: Layout[int]
    seq_len: int
    gbs: int
    steps: int
    dtype: str = "fp32"
    execution: Execution = field(default_factory=Execution)
    compile: str = ""
    seed: int = 1234
    data: DataSettings = field(default_factory=DataSettings)
    valid_every: int = 0
    valid_batches: int = 4
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
    tensorboard: str | None = None
    profile: ProfileSettings | None = None
    model_flops_per_step: float = 0.0
    peak_flops_per_s: float = 0.0
    timeout_s: float = 600.0
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """How a run ended: ``step`` is the last one made, ``stopped`` whether a signal ended it.

    ``losses`` are those of this run's own steps, the first of them after step ``first``;
    ``valid_losses`` those on held-out data, by step.
    """

    rank: int
    first: int
    step: int
    losses: list[float]
    valid_losses: dict[int, float]
    stopped: bool
    checkpoint: str | None
    assumed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "step": self.step,
            "first_step": self.first + 1,
            "losses": [finite(loss) for loss in self.losses],
            "valid_losses": {str(k): finite(v) for k, v in self.valid_losses.items()},
            "stopped": self.stopped,
            "checkpoint": self.checkpoint,
            "assumed": list(self.assumed),
        }


def finite(value: float) -> float | None:
    """Return a number that JSON can hold: ``None`` for one that is not finite."""
    return value if value - value == 0 else None
