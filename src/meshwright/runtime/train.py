"""A trainer: data, steps, log lines, metrics, checkpoints; one process, or a rank of torchrun."""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.errors import JobError, LaunchError
from meshwright.parallel.layout import to_text
from meshwright.runtime.checkpoint import Checkpointer, complete_checkpoints, load_checkpoint
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.data import Samples, open_samples
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.launch import join_torchrun
from meshwright.runtime.legality import check_runnable
from meshwright.runtime.train_log import Log
from meshwright.runtime.train_settings import DECAYS, DTYPES, TrainReport, TrainSettings
from meshwright.runtime.weights import load_weights, save_weights

WSD_DECAY_FRACTION = 0.1
"""Of a warm-up, stable, decay schedule, the part of the steps that decays (arXiv:2404.06395)."""
MOST_SKIPPED_STEPS = 5
"""Steps in a row whose gradient is not finite before the run ends."""


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then the chosen decay.

    cosine: min + (lr - min) (1 + cos(pi t)) / 2 with t the part of the decay done;
    wsd: constant, then linear over the last tenth of the steps (arXiv:2404.06395).
    """
    lr, low = settings.optimizer.lr, settings.min_lr
    if step < settings.warmup_steps:
        return lr * (step + 1) / settings.warmup_steps
    whole = max(1, settings.steps - settings.warmup_steps)
    done = min(1.0, (step - settings.warmup_steps) / whole)
    match settings.decay:
        case "constant":
            return lr
        case "linear":
            return low + (lr - low) * (1 - done)
        case "cosine":
            return low + (lr - low) * (1 + math.cos(math.pi * done)) / 2
        case _:
            left = min(1.0, (1 - done) / WSD_DECAY_FRACTION)
            return low + (lr - low) * left


def check_settings(settings: TrainSettings) -> None:
    """Raise a ``MeshwrightError`` for settings that cannot be trained."""
    least = {"steps": 1, "log_every": 1, "warmup_steps": 0, "save_every": 0, "keep": 0}
    for name, low in least.items():
        value = getattr(settings, name)
        if value < low:
            raise JobError(f"train.{name}", value, f"It is at least {low}.", f"Use {low}.")
    if settings.dtype not in DTYPES:
        raise JobError("train.dtype", settings.dtype, "Unknown.", f"Use {' or '.join(DTYPES)}.")
    if not 0 <= settings.shape.lora_rank <= settings.shape.hidden_size:
        rank, most = settings.shape.lora_rank, settings.shape.hidden_size
        raise JobError("train.lora_rank", rank, f"It lies from 0 to {most}.", "Use 16.")
    if settings.decay not in DECAYS:
        raise JobError("train.decay", settings.decay, "Unknown.", f"Use {' or '.join(DECAYS)}.")
    if settings.save_every and settings.checkpoints is None:
        rule = "Saving needs a folder."
        raise JobError("train.save_every", settings.save_every, rule, "Give checkpoints.")
    check_runnable(settings.shape, settings.layout, seq_len=settings.seq_len, gbs=settings.gbs)


def train(settings: TrainSettings) -> TrainReport:
    """Train, in this process or as one rank of torchrun.

    SIGTERM and SIGINT end the run after the step under way, with a checkpoint.

    Raises ``LaunchError`` for a wrong world or ranks that were told different things,
    ``DocumentError`` for damaged data or checkpoints, ``JobError`` for impossible settings and for
    a gradient that stays not finite.
    """
    check_settings(settings)
    with join_torchrun(settings.layout.world_size, settings.timeout_s) as rank:
        return train_rank(rank, settings)


def train_rank(rank: int, settings: TrainSettings) -> TrainReport:
    """Train as one rank of a world that has already met."""
    _check_same_settings(settings)
    device = _device()
    engine = Engine(
        settings.shape,
        settings.layout,
        Settings(
            seq_len=settings.seq_len,
            gbs=settings.gbs,
            dtype=DTYPES[settings.dtype],
            seed=settings.seed,
            optimizer=settings.optimizer,
            device=device,
        ),
        rank=rank,
    )
    with _stop_signals() as stop, Log(settings, engine) as log:
        return _Run(settings, engine, log, stop).run()


class _Run:
    """The loop and what it carries from step to step."""

    def __init__(
        self, settings: TrainSettings, engine: Engine, log: Log, stop: Callable[[], bool]
    ) -> None:
        self.settings, self.engine, self.log, self.stop = settings, engine, log, stop
        self.samples = open_samples(
            settings.data,
            seq_len=settings.seq_len,
            vocab_size=settings.shape.vocab_size,
            seed=settings.seed,
        )
        self.step, self.seen, self.skipped = 0, 0, 0
        self.losses: list[float] = []
        self.checkpointer: Checkpointer | None = None
        if settings.checkpoints is not None:
            folder = Path(settings.checkpoints)
            self.checkpointer = Checkpointer(folder, engine, keep=settings.keep)
        self._start()

    def _start(self) -> None:
        settings = self.settings
        folder = settings.checkpoints
        found = complete_checkpoints(Path(folder)) if folder is not None else []
        if found:
            state = load_checkpoint(self.engine, found[-1])
            self.step, self.seen = int(state["step"]), int(state["samples"])
            self.log.say(f"resumed from {found[-1]} after step {self.step}")
        elif settings.weights is not None:
            load_weights(self.engine, Path(settings.weights))
            self.log.say(f"weights from {settings.weights}")

    def run(self) -> TrainReport:
        settings, saved_at, stopped = self.settings, self.step, False
        with _profiler(settings, self.engine.context.groups.rank) as tick:
            while self.step < settings.steps and not stopped:
                self._one_step()
                tick()
                stopped = self._anyone(self.stop())
                if settings.save_every and self.step % settings.save_every == 0:
                    saved_at = self._save()
        if self.checkpointer is not None:
            if saved_at != self.step:
                self._save()
            self.checkpointer.wait()
        if settings.save_weights is not None:
            save_weights(self.engine, Path(settings.save_weights), settings.config)
            self.log.say(f"weights written to {settings.save_weights}")
        if stopped:
            self.log.say(f"stopped by a signal after step {self.step}")
        return TrainReport(
            rank=self.engine.context.groups.rank,
            step=self.step,
            losses=self.losses,
            stopped=stopped,
        )

    def _one_step(self) -> None:
        start_s = time.perf_counter()
        lr = learning_rate(self.settings, self.step)
        rows = own_samples(self.engine, self.samples, self.seen)
        result = self.engine.step(rows.to(self.engine.settings.device), lr=lr)
        self.step += 1
        self.seen += self.settings.gbs
        self.losses.append(result.loss)
        self.skipped = 0 if result.updated else self.skipped + 1
        self.log.step(self.step, result, lr, time.perf_counter() - start_s)
        if self.skipped >= MOST_SKIPPED_STEPS:
            raise JobError(
                "train.loss",
                result.loss,
                f"The gradient was not finite in {self.skipped} steps in a row, the last of them "
                f"step {self.step}; no weight was changed by them.",
                "Lower the learning rate, or resume from an earlier checkpoint.",
            )

    def _anyone(self, flag: bool) -> bool:
        told = torch.tensor(float(flag), device=self.engine.settings.device)
        return bool(all_reduce(told, self.engine.context.groups.world, dist.ReduceOp.MAX) > 0)

    def _save(self) -> int:
        assert self.checkpointer is not None
        state = {
            "step": self.step,
            "samples": self.seen,
            "optimizer_steps": self.engine.optimizer.steps,
            "layout": to_text(self.settings.layout),
            "seed": self.settings.seed,
        }
        self.checkpointer.save(self.step, state)
        return self.step


def own_samples(engine: Engine, samples: Samples, first: int) -> Tensor:
    """Return this rank's rows of the global batch that begins with sample ``first``."""
    numbers = engine.own_rows(torch.arange(first, first + engine.settings.gbs))
    return torch.from_numpy(np.stack([samples.sample(int(n)) for n in numbers]))


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _check_same_settings(settings: TrainSettings) -> None:
    """Raise ``LaunchError`` naming the ranks whose settings differ from those of rank 0."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    text = repr({k: v for k, v in asdict(settings).items() if k != "layout"})
    own = hashlib.sha256((text + to_text(settings.layout)).encode()).hexdigest()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    odd = [rank for rank, digest in enumerate(everyone) if digest != everyone[0]]
    if odd:
        raise LaunchError(
            "rank",
            ", ".join(map(str, odd)),
            "Its settings differ from those of rank 0.",
            "Start every rank with the same command.",
        )


@contextmanager
def _stop_signals() -> Generator[Callable[[], bool], None, None]:
    told = False

    def tell(number: int, frame: object) -> None:
        nonlocal told
        told = True

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _profiler(settings: TrainSettings, rank: int) -> Generator[Callable[[], None], None, None]:
    """Trace ``profile_steps`` of ``profile_ranks`` into Chrome traces of the folder ``profile``."""
    if settings.profile is None or rank not in settings.profile_ranks:
        yield lambda: None
        return
    folder = Path(settings.profile)
    folder.mkdir(parents=True, exist_ok=True)
    first, last = settings.profile_steps

    def written(profile: Any) -> None:
        profile.export_chrome_trace(str(folder / f"rank{rank}.json"))

    with torch.profiler.profile(
        schedule=torch.profiler.schedule(
            wait=max(0, first - 2), warmup=1, active=max(1, last - first + 1), repeat=1
        ),
        on_trace_ready=written,
    ) as profile:
        yield profile.step
