"""What a run tells: log lines or a progress bar on standard error, JSON lines, TensorBoard.

Rank 0 speaks. The bar is shown where a person watches (a terminal); anything else gets lines.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from meshwright.errors import DocumentError, MeshwrightError
from meshwright.parallel.layout import to_text
from meshwright.runtime.engine import Engine, StepResult
from meshwright.runtime.train_settings import TrainSettings, finite

Record = dict[str, Any]


class Sink(Protocol):
    """Something that keeps records of steps."""

    def write(self, record: Record) -> None:
        """Keep a record."""
        ...

    def close(self) -> None:
        """End."""
        ...


class JsonLines:
    """One JSON object a line, appended; numbers that are not finite are ``null``.

    A run that resumes writes the steps after its checkpoint again: the last record of a step
    counts.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = self._open()

    def _open(self) -> IO[str]:
        try:
            return Path(self.path).open("a", encoding="utf-8")
        except OSError as error:
            raise self._refusal(error) from None

    def _refusal(self, error: OSError) -> DocumentError:
        rule = f"It could not be written: {error.strerror}."
        return DocumentError("train.metrics", self.path, rule, "Name another file.")

    def write(self, record: Record) -> None:
        """Append a record."""
        plain = {k: finite(v) if isinstance(v, float) else v for k, v in record.items()}
        try:
            self.file.write(json.dumps(plain) + "\n")
            self.file.flush()
        except OSError as error:
            raise self._refusal(error) from None

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoard:
    """The numbers of every record as scalars; a resumed run replaces those of repeated steps."""

    def __init__(self, folder: str) -> None:
        if find_spec("tensorboard") is None:
            rule = "Writing for TensorBoard needs this package."
            remedy = "pip install 'meshwright[tensorboard]'"
            raise MeshwrightError("tensorboard", None, rule, remedy)
        self.folder = folder
        self.writer: Any = None

    def write(self, record: Record) -> None:
        """Add the scalars of a record."""
        step = int(record["step"])
        if self.writer is None:
            # Imported here: it takes a second.
            from torch.utils.tensorboard.writer import SummaryWriter

            self.writer = SummaryWriter(self.folder, purge_step=step)
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is held."""
        if self.writer is not None:
            self.writer.close()


class Bar:
    """A progress bar with the newest numbers; lines are printed above it."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(file=sys.stderr),
        )
        self.task = self.progress.add_task("", total=steps)
        self.progress.start()

    def update(self, step: int, text: str) -> None:
        """Show the newest numbers."""
        self.progress.update(self.task, completed=step, description=text)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.progress.stop()


class Log:
    """Everything that a run tells."""

    def __init__(self, settings: TrainSettings, engine: Engine) -> None:
        self.settings, self.engine = settings, engine
        self.speaks = engine.context.groups.rank == 0
        self.sinks: list[Sink] = []
        self.bar: Bar | None = None
        self.stack = ExitStack()

    def __enter__(self) -> Log:
        if not self.speaks:
            return self
        settings = self.settings
        if settings.metrics is not None:
            self._open(JsonLines(settings.metrics))
        if settings.tensorboard is not None:
            self._open(TensorBoard(settings.tensorboard))
        self.say(_about(settings, self.engine))
        for line in settings.assumed:
            self.say(f"assumed: {line}")
        if sys.stderr.isatty():
            self.bar = Bar(settings.steps)
            self.stack.callback(self.bar.close)
        return self

    def _open(self, sink: Sink) -> None:
        self.sinks.append(sink)
        self.stack.callback(sink.close)

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def say(self, text: str, *, passing: bool = False) -> None:
        """Print a line, or where there is a bar show it there if it is only of passing interest."""
        if not self.speaks:
            return
        if self.bar is None:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
        elif passing:
            self.bar.progress.update(self.bar.task, description=text)
        else:
            self.bar.say(text)

    def step(
        self,
        number: int,
        result: StepResult,
        *,
        lr: float,
        samples: int,
        step_s: float,
        peak_bytes: int,
        expert_tokens: Mapping[str, list[int]],
    ) -> None:
        """Tell about a step: a record of each, a line every ``log_every`` steps.

        ``samples`` have been seen so far; ``peak_bytes`` is the most memory that any rank has held;
        ``expert_tokens`` are the tokens that chose each expert, by router.
        """
        if not self.speaks:
            return
        settings, world = self.settings, self.settings.layout.world_size
        flops_per_s = settings.model_flops_per_step / step_s / world
        peak = settings.peak_flops_per_s
        record: Record = {
            "step": number,
            "loss": result.loss,
            "mtp_losses": [finite(loss) for loss in result.mtp_losses],
            "aux_loss": result.aux_loss,
            "grad_norm": result.grad_norm,
            "updated": result.updated,
            "lr": lr,
            "samples": samples,
            "step_time_s": step_s,
            "tokens_per_s_per_gpu": settings.gbs * settings.seq_len / step_s / world,
            "model_flops_per_s_per_gpu": flops_per_s,
            "mfu_fraction": flops_per_s / peak if peak else None,
            "memory_bytes": peak_bytes,
        }
        if expert_tokens:
            record["expert_tokens"] = dict(expert_tokens)
        self._write(record)
        if self.bar is not None:
            self.bar.update(number, _line(record))
        elif number % settings.log_every == 0 or number == settings.steps:
            self.say(f"step {number}/{settings.steps} | {_line(record)}")

    def valid(self, number: int, loss: float, time_s: float) -> None:
        """Tell the loss on held-out data after a step."""
        self._write({"step": number, "valid_loss": loss, "valid_time_s": time_s})
        perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan
        self.say(
            f"valid {number}/{self.settings.steps} | loss {loss:.6f} | "
            f"perplexity {perplexity:.4g} | time {time_s:.3f} s"
        )

    def _write(self, record: Record) -> None:
        for sink in self.sinks:
            sink.write(record)


def _about(settings: TrainSettings, engine: Engine) -> str:
    """Return a line on the layout, the batch and what MFU is taken of."""
    x, device = settings.layout, engine.settings.device
    degrees = " ".join(
        f"{name.upper()}={getattr(x, name)}" for name in ("tp", "pp", "cp", "ep", "dp")
    )
    parts = [
        f"layout {to_text(x)} ({degrees}, {x.world_size} ranks)",
        f"{engine.num_microbatches} micro-batches of {x.mbs} x {settings.seq_len} tokens",
    ]
    if settings.peak_flops_per_s:
        parts.append(f"MFU of {settings.peak_flops_per_s / 1e12:.4g} TFLOP/s ({settings.dtype})")
    else:
        parts.append(f"no MFU: the peak of this {device.type} is not known")
    return " | ".join(parts)


def _line(record: Record) -> str:
    parts = [
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


def memory_bytes(device: torch.device) -> int:
    """Return the most that this rank has held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
