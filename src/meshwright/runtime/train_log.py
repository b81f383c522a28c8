"""What a run says: log lines on standard error, metrics as JSON lines; rank 0 speaks."""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from meshwright.errors import DocumentError
from meshwright.parallel.layout import to_text
from meshwright.runtime.engine import Engine, StepResult
from meshwright.runtime.train_settings import TrainSettings


class Log:
    """Log lines and metrics; rank 0 speaks."""

    def __init__(self, settings: TrainSettings, engine: Engine) -> None:
        self.settings, self.engine = settings, engine
        self.speaks = engine.context.groups.rank == 0
        self.file = None

    def __enter__(self) -> Log:
        if self.speaks and self.settings.metrics is not None:
            try:
                self.file = Path(self.settings.metrics).open("a", encoding="utf-8")
            except OSError as error:
                reason = error.strerror or "unwritable"
                raise DocumentError(
                    "train.metrics", self.settings.metrics, f"{reason}.", "Name another file."
                ) from None
        x = self.settings.layout
        self.say(f"layout {to_text(x)} ({x.world_size} ranks)")
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def say(self, text: str) -> None:
        """Write a line to standard error."""
        if self.speaks:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def step(self, number: int, result: StepResult, lr: float, step_s: float) -> None:
        """Tell about a step: a line every ``log_every`` steps, a metrics record for each."""
        if not self.speaks:
            return
        settings, world = self.settings, self.settings.layout.world_size
        tokens = settings.gbs * settings.seq_len
        flops_per_s = settings.model_flops_per_step / step_s / world
        peak = settings.peak_flops_per_s
        record: dict[str, Any] = {
            "step": number,
            "loss": result.loss,
            "mtp_losses": list(result.mtp_losses),
            "aux_loss": result.aux_loss,
            "grad_norm": result.grad_norm,
            "updated": result.updated,
            "lr": lr,
            "samples": number * settings.gbs,
            "step_time_s": step_s,
            "tokens_per_s_per_gpu": tokens / step_s / world,
            "model_flops_per_s_per_gpu": flops_per_s,
            "mfu_fraction": flops_per_s / peak if peak else None,
            "memory_bytes": _memory_bytes(self.engine.settings.device),
        }
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        if number % settings.log_every == 0 or number == settings.steps:
            self.say(_line(record, settings.steps))


def _line(record: dict[str, Any], steps: int) -> str:
    parts = [
        f"step {record['step']}/{steps}",
        f"loss {record['loss']:.6f}",
        f"grad norm {record['grad_norm']:.4f}",
        f"lr {record['lr']:.3e}",
        f"step time {record['step_time_s']:.3f} s",
        f"{record['tokens_per_s_per_gpu']:.0f} tokens/s/GPU",
    ]
    if record["model_flops_per_s_per_gpu"]:
        parts.append(f"{record['model_flops_per_s_per_gpu'] / 1e12:.3g} TFLOP/s/GPU")
    if record["mfu_fraction"] is not None:
        parts.append(f"MFU {100 * record['mfu_fraction']:.1f}%")
    parts.append(f"memory {record['memory_bytes'] / 2**30:.2f} GiB")
    if not record["updated"]:
        parts.append("NOT UPDATED: the gradient is not finite")
    return " | ".join(parts)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
